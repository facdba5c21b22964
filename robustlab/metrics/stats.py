"""Intervals and comparisons: Wilson, the paired Poisson bootstrap over units, corrected worst cases, verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from scipy.stats import norm, t
from torch import Tensor

from robustlab.core.errors import ConfigError, LabelError
from robustlab.core.registry import METRICS

from .base import Context, Direction, Estimate, Metric, Statistic
from .resample import Resampler as Resampler
from .store import PredictionStore

IntervalKind = Literal["percentile", "reflected"]
Bounds = tuple[float, float]
Decision = Literal["better", "worse", "no decision"]
Verdict = Literal["breaks", "worse", "holds", "no decision"]

FEW_CLUSTERS = 30
_LOST_SHARE = 0.05
_DENSE = 1 << 22  # outputs whose float64 forms are made, and kept with their store, at once (32 MB each)
_UNBOUNDED: Bounds = (-math.inf, math.inf)


def wilson(successes: float, n: float, *, confidence: float = 0.95, alpha_divisor: float = 1.0) -> tuple[float, float]:
    """Return the score interval of a proportion.

    Args:
        successes: Count in [0, n]; real-valued for effective counts.
        n: Trials, at least 0; real-valued for effective counts.
        confidence: Coverage in (0, 1).
        alpha_divisor: The error probability is divided by it (Bonferroni).

    Returns:
        Lower and upper end in [0, 1]; NaN when n is 0.

    References:
        Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    if not n > 0:
        return math.nan, math.nan
    z = float(norm.ppf(1 - (1 - confidence) / (2 * alpha_divisor)))
    centre = (successes + z * z / 2) / (n + z * z)
    half = z * math.sqrt(max(successes * (n - successes) / n, 0.0) + z * z / 4) / (n + z * z)
    # rounding must not lift the ends off 0 and 1
    low = 0.0 if successes <= 0 else max(0.0, centre - half)
    return low, 1.0 if successes >= n else min(1.0, centre + half)


def unit_count(clusters: Tensor | None, rows: Tensor) -> int:
    """Return how many independent units the rows (bool (N,)) hold: clusters, or samples without clusters."""
    return int(rows.sum()) if clusters is None else len(torch.unique(clusters[rows]))


def effective_count(hits: Tensor, clusters: Tensor | None, *, confidence: float = 0.95) -> tuple[float, int]:
    """Return (effective n, units) of a proportion: n over the design effect, which is at least 1.

    The design effect is the cluster-robust variance G / (G - 1) sum_g (sum_{i in g} (v_i - v))^2 / n^2 over the
    binomial one. Fewer than 30 clusters shrink n by (z / t)^2. Where no variance can be seen (share 0 or 1, or one
    cluster) the effective n is the number of clusters.

    Args:
        hits: bool or float (n,), 1 for success.
        clusters: int64 (n,) codes, or None for independent samples.
        confidence: Coverage of the interval to be made, in (0, 1).

    References:
        Korn and Graubard, Confidence intervals for proportions with small expected number of positive counts
        estimated from survey data, 1998.
    """
    n = len(hits)
    if clusters is None or n == 0:
        return float(n), n
    values = hits.to(torch.float64)
    codes, inverse = torch.unique(clusters, return_inverse=True)
    units = len(codes)
    share = float(values.mean())
    if units == 1 or not 0 < share < 1:
        return float(units), units
    sums = values.new_zeros(units).index_add_(0, inverse, values - share)
    variance = units / (units - 1) * float((sums * sums).sum()) / n**2
    binomial = share * (1 - share)
    count = min(float(n), binomial / variance) if variance > binomial / n else float(n)
    if units < FEW_CLUSTERS:
        tail = (1 + confidence) / 2
        count *= float(norm.ppf(tail) / t.ppf(tail, units - 1)) ** 2
    return count, units


def proportion(
    hits: Tensor, clusters: Tensor | None, *, confidence: float = 0.95, samples: int | None = None, note: str = ""
) -> Estimate:
    """Return the share of hits with a Wilson interval, at the effective n where samples are clustered.

    Args:
        hits: bool (n,).
        clusters: int64 (n,) codes of the unit, or None for independent samples.
        confidence: Coverage in (0, 1).
        samples: Samples that entered, where they are not the hits themselves (several decisions a sample).
        note: Added to the method text.
    """
    count = len(hits) if samples is None else samples
    if len(hits) == 0:
        return Estimate.undefined("no_samples")
    effective, units = effective_count(hits, clusters, confidence=confidence)
    share = float(hits.to(torch.float64).mean())
    low, high = wilson(share * effective, effective, confidence=confidence)
    method = "wilson" if clusters is None else "wilson at effective n = n / design effect"
    return Estimate(share, low, high, count, units, f"{method}{note}", effective_n=effective)


def interval(
    values: Tensor,
    point: float,
    kind: IntervalKind = "percentile",
    *,
    confidence: float = 0.95,
    bounds: Bounds = _UNBOUNDED,
) -> tuple[float, float, str]:
    """Return (low, high, reason) from the values of all replicates.

    ``"percentile"`` takes the quantiles. ``"reflected"`` takes 2 point - quantile, for non-negative statistics such as
    ECE whose replicates carry the sampling bias twice; its interval need not hold the (biased) point.

    Args:
        values: float64 (replicates,); NaN where a replicate lost a class.
        point: The point estimate.
        kind: ``"percentile"`` or ``"reflected"``.
        confidence: Coverage in (0, 1).
        bounds: Valid range of the statistic; the ends are clipped to it.

    Returns:
        The ends and an empty reason, or NaN with ``"too_few_units"`` when more than 5 % of the replicates are NaN.
    """
    kept = values[~torch.isnan(values)]
    if len(kept) == 0 or len(kept) < (1 - _LOST_SHARE) * len(values):
        return math.nan, math.nan, "too_few_units"
    tail = (1 - confidence) / 2
    low, high = torch.quantile(kept, torch.tensor([tail, 1 - tail], dtype=kept.dtype, device=kept.device)).tolist()
    if kind == "reflected":
        low, high = 2 * point - high, 2 * point - low
    return min(max(low, bounds[0]), bounds[1]), min(max(high, bounds[0]), bounds[1]), ""


def rowwise(store: PredictionStore, function: Callable[[PredictionStore], Tensor]) -> Tensor:
    """Return ``function(store)``, whose row i depends on row i alone; large stores are worked on in blocks of rows.

    What the function derives from all outputs, in float64, then exists for one block at a time.
    """
    count = max(1, _DENSE // max(store.num_classes, 1))
    if len(store) <= count:
        return function(store)
    out = torch.empty(0)
    for start in range(0, len(store), count):
        rows = torch.arange(start, min(start + count, len(store)), device=store.ids.device)
        part = function(store.select(rows))
        if start == 0:
            out = part.new_empty((len(store), *part.shape[1:]))
        out[start : start + count] = part
    return out


def units_of(store: PredictionStore) -> Tensor:
    """Return the codes that are resampled, int64 (N,): clusters, or hashed ids without clusters."""
    return store.keys if store.clusters is None else store.clusters


def bootstrap(
    store: PredictionStore,
    statistic: Statistic,
    resampler: Resampler,
    entered: Tensor,
    *,
    kind: IntervalKind = "percentile",
    bounds: Bounds = _UNBOUNDED,
    reason: str = "no_samples",
) -> Estimate:
    """Return a statistic with its bootstrap interval over units.

    Args:
        store: The predictions.
        statistic: Maps float64 (N, b) sample weights to (b,) values.
        resampler: Draws the weights.
        entered: bool (N,), the samples that the statistic uses.
        kind: See ``interval``.
        bounds: Valid range of the statistic.
        reason: Why the value is undefined when it is.
    """
    points, values = replicate(store, lambda weights: statistic(weights)[None], resampler)
    point = float(points[0])
    return summarise(store, values[0], point, resampler, entered, kind=kind, bounds=bounds, reason=reason)


def replicate(store: PredictionStore, statistic: Statistic, resampler: Resampler) -> tuple[Tensor, Tensor]:
    """Return K point estimates (K,) and their values under all replicates (K, B) of a statistic that returns (K, b)."""
    ones = torch.ones((len(store), 1), dtype=torch.float64, device=store.ids.device)
    return statistic(ones)[:, 0], resampler.values(statistic, units_of(store))


def summarise(
    store: PredictionStore,
    values: Tensor,
    point: float,
    resampler: Resampler,
    entered: Tensor,
    *,
    kind: IntervalKind = "percentile",
    bounds: Bounds = _UNBOUNDED,
    reason: str = "no_samples",
) -> Estimate:
    """Return the estimate that a point and its replicates (B,) make; arguments as in ``bootstrap``."""
    n, units = int(entered.sum()), unit_count(store.clusters, entered)
    if math.isnan(point):
        return Estimate.undefined(reason, n=n, n_units=units)
    method = f"bootstrap over {_unit_name(store)}, B={resampler.replicates}"
    if kind == "reflected":
        method += ", reflected about the estimate"
    if units < 2:
        return Estimate(point, math.nan, math.nan, n, units, method, "too_few_units")
    low, high, why = interval(values, point, kind, confidence=resampler.confidence, bounds=bounds)
    return Estimate(point, low, high, n, units, method, why)


def _unit_name(store: PredictionStore) -> str:
    return "samples" if store.clusters is None else "clusters"


def ratio(numerator: Tensor, denominator: Tensor) -> Statistic:
    """Return the statistic: mean over K rows of weighted numerator / weighted denominator.

    Args:
        numerator: float64 (K, N).
        denominator: float64 (K, N).
    """
    return lambda weights: ((numerator @ weights) / (denominator @ weights)).mean(0)


def macro(parts: Sequence[Statistic]) -> Statistic:
    """Return the statistic: mean of the parts, NaN where one of them is."""
    return lambda weights: torch.stack([part(weights) for part in parts]).mean(0)


def stack(parts: Sequence[Statistic]) -> Statistic:
    """Return the statistic (K, b) that holds each of the K parts."""
    return lambda weights: torch.stack([part(weights) for part in parts])


def cumulative(weights: Tensor) -> Tensor:
    """Return (N + 1, b): the weight of the first 0, 1, ..., N rows."""
    mass = weights.new_zeros((len(weights) + 1, weights.shape[1]))
    torch.cumsum(weights, 0, out=mass[1:])
    return mass


def rank_probability(positive: Tensor, negative: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the statistic P(positive > negative) + P(equal) / 2, the area under the ROC curve.

    Args:
        positive: float64 (P,) scores that should be larger.
        negative: float64 (M,) scores, ascending.

    Returns:
        A function of weights (P, b) and (M, b) that returns (b,); NaN where a side has no weight.
    """
    below = torch.searchsorted(negative, positive)
    through = torch.searchsorted(negative, positive, right=True)

    def statistic(positive_weights: Tensor, negative_weights: Tensor) -> Tensor:
        mass = cumulative(negative_weights)
        wins = mass[below].add_(mass[through]).mul_(positive_weights).sum(0)
        return wins / (2 * positive_weights.sum(0) * mass[-1])

    return statistic


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

    Accuracy of one answer a sample uses ``discordance_interval``; everything else the paired bootstrap over units.

    Args:
        a: Predictions of one model and condition.
        b: Predictions of the other one; samples are matched by id.
        metric: Registered name of a metric on labels.
        context: Resampler and operating points (of ``a``, where ``context_b`` is given).
        context_b: Operating points of ``b`` where they differ.
        target: Class or label, for metrics that have one value each.

    Returns:
        The difference; exactly 0 with interval [0, 0] for identical predictions.

    Raises:
        ConfigError: The ids differ or repeat, or the metric cannot be compared.
        LabelError: The two hold different labels for the same ids.
    """
    item = METRICS.get(metric)()
    if item.on != "labels" or type(item).statistics is Metric.statistics:
        raise ConfigError(
            "paired_difference", "a metric on labels that has a bootstrap form", repr(metric), "Use e.g. 'accuracy'."
        )
    b = _matched(a, b)
    everyone = torch.ones_like(a.ids, dtype=torch.bool)
    if (a.answers_only or b.answers_only) and not item.from_answers:
        return Estimate.undefined("answers_only", n=len(a), n_units=unit_count(a.clusters, everyone))
    first, second = item.statistics(a, context), item.statistics(b, context_b or context)
    if not first or not second:
        return Estimate.undefined("undefined_on_one_side", n=len(a), n_units=unit_count(a.clusters, everyone))
    if target not in first or target not in second:
        have = ", ".join(map(repr, sorted(first)))
        raise ConfigError("paired_difference", f"target= one of {have}", repr(target), "Name the class or label.")
    before, after = first[target], second[target]

    def difference(weights: Tensor) -> Tensor:
        return after(weights) - before(weights)

    labels = a.labels if metric == "accuracy" and a.task != "multilabel" else None
    if labels is not None and unit_count(a.clusters, everyone) >= FEW_CLUSTERS:  # so many units are never all left out
        point = float(difference(everyone.to(torch.float64)[:, None])[0])
        estimate = Estimate(point, point, point, len(a), unit_count(a.clusters, everyone), "")
    else:
        estimate = bootstrap(a, difference, context.resampler, everyone, reason="undefined_on_one_side")
    if labels is None:
        return replace(estimate, method=f"paired {estimate.method}")
    gain = (b.predicted == labels).to(torch.float64) - (a.predicted == labels).to(torch.float64)
    identical = torch.equal(a.logits.nan_to_num(), b.logits.nan_to_num())
    low, high = (0.0, 0.0) if identical else discordance_interval(gain, a.clusters, context.resampler.confidence)
    method = "paired, Bonett-Price" if a.clusters is None else "paired, Bonett-Price over clusters"
    return replace(estimate, low=low, high=high, method=method)


def discordance_interval(gain: Tensor, clusters: Tensor | None, confidence: float = 0.95) -> tuple[float, float]:
    """Return an interval for the mean of paired gains in {-1, 0, 1}, valid also when few samples differ.

    One gain and one loss are added before the Wald interval is taken; a bootstrap would see no variance where all the
    few differences point one way. With clusters, gains are summed in them and the variance is the cluster-robust one.

    Args:
        gain: float64 (N,), 1 where only the second is right, -1 where only the first is.
        clusters: int64 (N,) codes of the unit, or None for independent samples.
        confidence: Coverage in (0, 1).

    References:
        Bonett and Price, Adjusted Wald confidence interval for a difference of binomial proportions based on paired
        data, 2012.
    """
    count = len(gain) + 2
    mean = float(gain.sum()) / count
    if clusters is None:
        variance = (float(gain.square().sum()) + 2) / count - mean**2
        quantile = float(norm.ppf((1 + confidence) / 2))
        spread = math.sqrt(variance / count)
    else:
        codes, inverse = torch.unique(clusters, return_inverse=True)
        units = len(codes) + 2
        sums = gain.new_zeros(len(codes)).index_add_(0, inverse, gain - mean)
        total = float(sums.square().sum()) + (1 - mean) ** 2 + (1 + mean) ** 2
        quantile = float(t.ppf((1 + confidence) / 2, units - 1))
        spread = math.sqrt(units / (units - 1) * total) / count
    return max(-1.0, mean - quantile * spread), min(1.0, mean + quantile * spread)


def _matched(a: PredictionStore, b: PredictionStore) -> PredictionStore:
    """Return ``b`` in the order of ``a``, with the clusters of ``a``."""
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


@dataclass(frozen=True)
class Proportion:
    """A proportion of one condition.

    Args:
        key: Name of the condition.
        successes: Counted events, in units of ``effective_n``.
        effective_n: Trials, or effective trials of clustered samples.
    """

    key: str
    successes: float
    effective_n: float


def worst_of(
    conditions: Sequence[Proportion], *, direction: Direction, confidence: float = 0.95
) -> tuple[str, Estimate]:
    """Return the condition with the worst proportion and an interval that allows for its having been picked.

    All K intervals hold at once with the stated confidence (Wilson at alpha / K), hence also the picked one. Undefined
    conditions (NaN, or no trials) are passed over but count in K.

    Args:
        conditions: At least one proportion; the first one wins a tie.
        direction: ``"higher"`` or ``"lower"`` is better.
        confidence: Simultaneous coverage in (0, 1).

    Raises:
        ConfigError: No condition, or no direction.
    """
    if not conditions or direction == "none":
        raise ConfigError(
            "worst_of",
            "at least one condition, and a direction 'higher' or 'lower'",
            f"{len(conditions)} conditions, direction {direction!r}",
            "Pass the conditions of one metric.",
        )
    defined = [item for item in conditions if item.effective_n > 0 and not math.isnan(item.successes)]
    if not defined:
        return conditions[0].key, Estimate.undefined("no_samples")
    pick = min if direction == "higher" else max
    worst = pick(defined, key=lambda item: item.successes / item.effective_n)
    count = len(conditions)
    low, high = wilson(worst.successes, worst.effective_n, confidence=confidence, alpha_divisor=count)
    units = round(worst.effective_n)
    method = f"wilson, Bonferroni over {count} conditions"
    return worst.key, Estimate(
        worst.successes / worst.effective_n, low, high, units, units, method, effective_n=worst.effective_n
    )
