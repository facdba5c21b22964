"""Comparisons: paired differences and what they show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from scipy.stats import norm, t
from torch import Tensor

from robustlab.core.errors import ConfigError, LabelError
from robustlab.core.registry import METRICS
from robustlab.metrics.base import Context, Direction, Estimate, Frozen, Metric, Share, Statistic
from robustlab.metrics.store import PredictionStore

from .bootstrap import bootstrap
from .linear import linear_estimate
from .proportions import mover, unit_count

Decision = Literal["better", "worse", "no decision"]
Verdict = Literal["breaks", "worse", "holds", "no decision"]

IDENTICAL = "identical predictions"
"""Method of the difference between predictions that are the same to the last bit."""


def paired_difference(
    a: PredictionStore,
    b: PredictionStore,
    metric: str,
    context: Context,
    *,
    context_b: Context | None = None,
    target: str = "",
) -> Estimate:
    """Return the difference b - a of a metric on the same samples, with a paired interval.

    Metrics that leave out rows which are not finite are compared on the rows that are finite on both sides. Shares of
    rows that labels decide (accuracy, sensitivity ...) use ``discordance_interval``, a mean of several on independent
    samples MOVER of these; other smooth metrics use the influence values of the difference, and the rest the paired
    bootstrap over units.

    Args:
        a: Predictions of one model and condition.
        b: Predictions of the other one; samples are matched by id.
        metric: Registered name of a metric on labels.
        context: Resampler and operating points (of ``a``, where ``context_b`` is given).
        context_b: Operating points of ``b`` where they differ.
        target: Class or label, for metrics that have one value each.

    Returns:
        The difference; exactly 0 with interval [0, 0] for identical predictions at the same operating points.

    Raises:
        ConfigError: The ids differ or repeat, or the metric cannot be compared.
        LabelError: The two hold different labels for the same ids.
    """
    item = comparable(metric)
    b = matched(a, b)
    note, both = "", a.finite & b.finite
    if not item.keeps_broken and not bool(both.all()):
        note = f"; {int((~both).sum())} of {len(a)} rows not finite on a side"
        a, b = a.select(both), b.select(both)
    everyone = torch.ones_like(a.ids, dtype=torch.bool)
    count = unit_count(a.clusters, everyone)
    if (a.answers_only or b.answers_only) and not item.from_answers:
        return Estimate.undefined("answers_only", n=len(a), n_units=count)
    context_b = context_b or context
    first, second = item.statistics(a, context), item.statistics(b, context_b)
    if not first or not second:
        return Estimate.undefined("undefined_on_one_side", n=len(a), n_units=count)
    if target not in first or target not in second:
        have = ", ".join(map(repr, sorted(first)))
        raise ConfigError("paired_difference", f"target= one of {have}", repr(target), "Name the class or label.")
    difference = _Difference(first[target], second[target])
    confidence = context.resampler.confidence
    if same_outputs(a, b) and _same_points(context.frozen, context_b.frozen):
        value = float(difference(torch.ones((len(a), 1), dtype=torch.float64, device=a.ids.device))[0])
        if value == 0:
            return Estimate(0.0, 0.0, 0.0, len(a), count, IDENTICAL + note)
    parts = _gains(a, item.shares(a, context).get(target, ()), item.shares(b, context_b).get(target, ()), confidence)
    if len(parts) == 1:
        return replace(parts[0], method=parts[0].method + note)
    if parts and a.clusters is None and a.task != "multilabel":
        low, high = mover(parts)
        value = sum(part.value for part in parts) / len(parts)
        return Estimate(value, low, high, len(a), count, f"{parts[0].method} a class, combined by MOVER{note}")
    if item.smooth:
        estimate = linear_estimate(a, difference, everyone, confidence=confidence, reason="undefined_on_one_side")
    else:
        estimate = bootstrap(a, difference, context.resampler, everyone, reason="undefined_on_one_side")
    if parts and estimate.reason == "no_variance":
        # no answer changed; the parts hang together, so their bounds are averaged, not pooled
        low, high = (sum(ends) / len(parts) for ends in ([p.low for p in parts], [p.high for p in parts]))
        return Estimate(estimate.value, low, high, len(a), count, f"mean of the bounds of {len(parts)} shares{note}")
    return replace(estimate, method=f"paired, {estimate.method}{note}")


def _gains(a: PredictionStore, first: Sequence[Share], second: Sequence[Share], confidence: float) -> list[Estimate]:
    """Return the paired difference of every share; nothing where the rows differ."""
    if len(first) != len(second) or not all(torch.equal(x[1], y[1]) for x, y in zip(first, second, strict=True)):
        return []
    out = []
    for (before, rows), (after, _) in zip(first, second, strict=True):
        clusters = None if a.clusters is None else a.clusters[rows]
        gain = after[rows].to(torch.float64) - before[rows].to(torch.float64)
        low, high = discordance_interval(gain, clusters, confidence)
        method = "paired, Bonett-Price" if clusters is None else "paired, Bonett-Price over clusters"
        out.append(Estimate(float(gain.mean()), low, high, len(gain), unit_count(a.clusters, rows), method))
    return out


def _same_points(a: Frozen, b: Frozen) -> bool:
    return _same(a.thresholds, b.thresholds) and repr(replace(a, thresholds=None)) == repr(replace(b, thresholds=None))


@dataclass(frozen=True, eq=False)
class _Difference:
    before: Statistic
    after: Statistic

    def __call__(self, weights: Tensor) -> Tensor:
        return self.after(weights) - self.before(weights)


def comparable(metric: str) -> Metric:
    """Return a metric that can be compared between two stores of the same samples.

    Raises:
        UnknownNameError: No such metric.
        ConfigError: It has no form for comparisons.
    """
    item = METRICS.get(metric)
    if issubclass(item, Metric) and item.on == "labels" and item.statistics is not Metric.statistics:
        return item()
    raise ConfigError("paired_difference", "a metric on labels that can be compared", repr(metric), "Use 'accuracy'.")


def same_outputs(a: PredictionStore, b: PredictionStore) -> bool:
    """Return whether two stores of the same samples, in the same order, hold the same outputs and scores."""
    scores = a.scores.keys() == b.scores.keys() and all(_same(a.scores[name], b.scores[name]) for name in a.scores)
    return scores and _same(a.logits, b.logits)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two tensors are equal, NaN where the other is NaN."""
    if a is None or b is None:
        return a is b
    kept = [torch.nan_to_num(side, nan=0.0, posinf=math.inf, neginf=-math.inf) for side in (a, b)]
    return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(kept[0], kept[1])


def discordance_interval(gain: Tensor, clusters: Tensor | None, confidence: float = 0.95) -> tuple[float, float]:
    """Return an interval for the mean of paired gains in {-1, 0, 1}, valid also when few samples differ.

    One gain and one loss are added before the Wald interval is taken; a bootstrap would see no variance where all the
    few differences point one way. With clusters, gains are summed in them, the variance is the cluster-robust one, and
    each of the two stands for D samples: the design effect (S + m^2) / (Q + m) with the sums S of squared cluster sums
    and Q of squared gains, and the typical cluster size m = sum m_g^2 / N. Where no gain is seen D is m, for whole
    clusters may then change.

    Args:
        gain: float64 (N,) in [-1, 1]: 1 where only the second is right, -1 where only the first is.
        clusters: int64 (N,) codes of the unit, or None for independent samples.
        confidence: Coverage in (0, 1).

    References:
        Bonett and Price, Adjusted Wald confidence interval for a difference of binomial proportions based on paired
        data, 2012.
    """
    if clusters is None:
        count = len(gain) + 2.0
        mean = float(gain.sum()) / count
        variance = (float(gain.square().sum()) + 2) / count - mean**2
        quantile = float(norm.ppf((1 + confidence) / 2))
        spread = math.sqrt(variance / count)
    else:
        inverse, sizes = torch.unique(clusters, return_inverse=True, return_counts=True)[1:]
        sizes, sums = sizes.to(torch.float64), gain.new_zeros(len(sizes)).index_add_(0, inverse, gain)
        typical = float(sizes.square().sum()) / len(gain)
        effect = (float(sums.square().sum()) + typical**2) / (float(gain.square().sum()) + typical)
        effect = min(max(effect, 1.0), typical)
        units, count = len(sizes) + 2, len(gain) + 2 * effect
        mean = float(gain.sum()) / count
        total = float((sums - sizes * mean).square().sum()) + effect**2 * ((1 - mean) ** 2 + (1 + mean) ** 2)
        quantile = float(t.ppf((1 + confidence) / 2, units - 1))
        spread = math.sqrt(units / (units - 1) * total) / count
    return max(-1.0, mean - quantile * spread), min(1.0, mean + quantile * spread)


def units_to_decide(difference: Estimate, *, confidence: float = 0.95, power: float = 0.8) -> float:
    """Return how many independent units would show a true difference of the observed size: U ((z + z') s / d)^2.

    d is the difference, s its standard error (half the interval over its normal quantile z, which is a little wide for
    few units), U the present number of units and z' the quantile of the power. Infinite where d is 0, NaN without an
    interval.

    Args:
        difference: A paired difference with an interval at ``confidence``.
        confidence: Coverage of that interval.
        power: Probability in (0, 1) with which the interval would then leave out 0.

    References:
        Lachin, Introduction to sample size determination and power analysis for clinical trials, 1981.
    """
    needed = detectable_difference(difference, confidence=confidence, power=power)
    if math.isnan(needed) or math.isnan(difference.value):
        return math.nan
    if difference.value == 0:
        return math.inf
    return float(math.ceil(difference.n_units * (needed / difference.value) ** 2))


def detectable_difference(difference: Estimate, *, confidence: float = 0.95, power: float = 0.8) -> float:
    """Return the smallest true difference that as many units as now would show: (z + z') s, see ``units_to_decide``."""
    quantile = float(norm.ppf((1 + confidence) / 2))
    return (quantile + float(norm.ppf(power))) * (difference.high - difference.low) / (2 * quantile)


@dataclass(frozen=True)
class MetricComparison:
    """What a paired comparison shows, and what it would take to decide it.

    Args:
        difference: Second minus first.
        decision: Whether the second is better or worse, or that this cannot be told at this n.
        units_to_decide: Independent units that would show a true difference of the observed size with 80 % power;
            infinite where it is 0, NaN without an interval.
        detectable: Smallest true difference that the present units would show with 80 % power; NaN without an interval.
        reason: Why the number of units is not finite: ``"no_difference"``, or the reason of the estimate.
    """

    difference: Estimate
    decision: Decision
    units_to_decide: float
    detectable: float
    reason: str = ""

    def __str__(self) -> str:
        n = self.difference.n_units
        if self.decision != "no decision":
            return f"{self.decision} (n = {n:,})"
        if not math.isfinite(self.units_to_decide):
            return f"no decision at n = {n:,} ({self.reason.replace('_', ' ')})"
        return f"no decision at n = {n:,}; about {roughly(self.units_to_decide)} would decide a difference of this size"


def roughly(count: float) -> str:
    """Return a number in two significant digits, as an estimate of it deserves: 228,716 is about 230,000."""
    return f"{float(f'{count:.2g}'):,.0f}"


def compare_metric(
    a: PredictionStore,
    b: PredictionStore,
    metric: str,
    context: Context,
    *,
    context_b: Context | None = None,
    target: str = "",
) -> MetricComparison:
    """Return what ``paired_difference`` shows, whose arguments and errors it has: better, worse, or no decision."""
    difference = paired_difference(a, b, metric, context, context_b=context_b, target=target)
    confidence = context.resampler.confidence
    units = units_to_decide(difference, confidence=confidence)
    reason = "" if math.isfinite(units) else "no_difference" if math.isinf(units) else difference.reason
    return MetricComparison(
        difference,
        decide(difference.low, difference.high, METRICS.get(metric).direction),
        units,
        detectable_difference(difference, confidence=confidence),
        reason,
    )


def matched(a: PredictionStore, b: PredictionStore) -> PredictionStore:
    """Return ``b`` in the order of ``a``, with the clusters of ``a``.

    Raises:
        ConfigError: The ids differ or repeat.
        LabelError: The two hold different labels for the same ids.
    """
    (ids, rows), (ids_b, rows_b) = torch.sort(a.keys), torch.sort(b.keys)
    if not torch.equal(ids, ids_b):
        common = int(torch.isin(ids, ids_b).sum())
        raise ConfigError(
            "paired_difference",
            "predictions of the same samples",
            f"{len(a)} and {len(b)} samples, of which {common} are common",
            "Select the common ones first: store.select(torch.isin(store.keys, keys)).",
        )
    if bool((ids[1:] == ids[:-1]).any()):
        raise ConfigError("paired_difference", "ids that are unique", "repeated ids", "Give every sample its own id.")
    if torch.equal(rows, rows_b):
        matched = b
    else:
        position = torch.empty_like(rows)
        position[rows] = rows_b
        matched = b.select(position)
    if a.labels is not None and matched.labels is not None and not torch.equal(a.labels, matched.labels):
        raise LabelError(
            "paired_difference", "the same labels on both sides", "different ones", "Check that both use one split."
        )
    return replace(matched, clusters=a.clusters)


def decide(low: float, high: float, direction: Direction) -> Decision:
    """Say what the interval of a difference shows: ``"better"``, ``"worse"`` or ``"no decision"``.

    Args:
        low: Lower end of the difference (new minus old).
        high: Upper end.
        direction: Whether a higher or a lower metric is better; ``"none"`` never decides.
    """
    if direction == "none" or not (low > 0 or high < 0):
        return "no decision"
    return "better" if (low > 0) == (direction == "higher") else "worse"


def condition_verdict(low: float, high: float, margin: float) -> Verdict:
    """Say what the interval of a drop (clean minus shifted; positive is harm) shows.

    Args:
        low: Lower end of the drop.
        high: Upper end.
        margin: Drop that matters, in the metric's unit.

    Returns:
        ``"breaks"`` if the whole interval lies above the margin, else ``"worse"`` if above 0, else ``"holds"`` if below
        the margin, else ``"no decision"``.
    """
    if low > margin:
        return "breaks"
    if low > 0:
        return "worse"
    return "holds" if high < margin else "no decision"
