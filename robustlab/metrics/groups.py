"""Differences between groups, each with the value that equal groups would show at the same sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from robustlab.core.registry import METRICS
from robustlab.core.rng import SampleRng

from .base import Context, Direction, Estimate, GroupMetric, MetricValue, Statistic
from .group_table import GroupRow, all_units, check_groups, group_table, label_metric, size_reasons
from .stats import (
    Linear,
    Proportion,
    effective_count,
    estimate_of,
    linearise,
    unit_count,
    units_of,
    worst_of,
)
from .store import PredictionStore
from .thresholds import calls, decide_labels, labels_of

__all__ = [
    "AccuracyGap",
    "AurocGap",
    "DemographicParityDifference",
    "EceGap",
    "EqualisedOddsDifference",
    "EquityScaledAccuracy",
    "EquityScaledAuroc",
    "GroupDifference",
    "GroupRow",
    "WorstGroupAccuracy",
    "group_table",
]

DRAWS = 1000
RANK_DRAWS = 300  # for metrics that are not ratios of sums
_CELLS = 1 << 21
_BLOCK = 16  # draws at once: part of what a seed means
_EQUAL = 1e-9


Combine = Callable[[Tensor, Tensor], Tensor]
"""Maps values of groups (R, G, b) and of all of them (R, b), R rates each, to (b,); differentiable."""


def _range(groups: Tensor, overall: Tensor) -> Tensor:
    """Return the largest range over groups of the rates."""
    del overall
    return (groups.amax(1) - groups.amin(1)).amax(0)


def _smallest(groups: Tensor, overall: Tensor) -> Tensor:
    del overall
    return groups[0].amin(0)


def _equity_scaled(groups: Tensor, overall: Tensor) -> Tensor:
    return overall[0] / (1 + (groups[0] - overall[0]).abs().sum(0))


@dataclass(frozen=True, eq=False)
class _Rates:
    """R quantities of a store's samples, such as accuracy, or true and false positive rates.

    Args:
        sums: Numerators and denominators, float64 (R, N) each, of ratios of sums; None for anything else.
        statistic: Maps weights (N, b) to (R, b).
        note: Text for the method column.
    """

    statistic: Statistic
    sums: tuple[Tensor, Tensor] | None = None
    note: str = ""

    @staticmethod
    def of_sums(numerator: Tensor, denominator: Tensor, note: str = "") -> _Rates:
        return _Rates(lambda w: (numerator @ w) / (denominator @ w), (numerator, denominator), note)


@dataclass(frozen=True)
class GroupDifference:
    """A difference between groups.

    Args:
        estimate: The difference and its interval.
        null: What equal groups of these sizes show on average; NaN where undefined.
        p: Share of permutations at least as unequal (with 1 added to both counts); NaN where undefined.
        groups: Value of every compared group, for differences of one rate.
        excluded: Group to the reason why it is not compared.
    """

    estimate: Estimate
    null: float
    p: float
    groups: Mapping[str, float]
    excluded: Mapping[str, str]


class _Between(GroupMetric):
    """A function of the rates of the groups, with its permutation null."""

    direction: ClassVar[Direction] = "lower"
    draws: ClassVar[int] = DRAWS
    kind: ClassVar[Literal["range", "smallest", "equity-scaled"]] = "range"

    def rates(self, store: PredictionStore, context: Context) -> _Rates | str | None:
        """Return the rates of a store; a reason where they are undefined, None where the metric does not apply."""
        raise NotImplementedError

    def compute(
        self, store: PredictionStore, codes: Tensor, levels: Sequence[str], context: Context
    ) -> list[MetricValue]:
        made = self.difference(store, codes, levels, context)
        return [] if made is None else [MetricValue(self.name, made.estimate, self.direction)]

    def difference(
        self, store: PredictionStore, codes: Tensor, levels: Sequence[str], context: Context
    ) -> GroupDifference | None:
        """Return the difference with its null value and p-value; None where the metric does not apply.

        Args:
            store: Labelled predictions.
            codes: int64 (N,) group of every sample, -1 for missing.
            levels: Names of the groups.
            context: Operating points and resampler, whose seed decides the permutations.

        Raises:
            ShapeError: Not one code a sample, or codes without a name.
        """
        check_groups(store, codes, levels)
        if store.answers_only and not self.from_answers:
            return self._undefined("answers_only", store, {})
        rates = self.rates(store, context)
        if rates is None:
            return None
        if isinstance(rates, str):
            return self._undefined(rates, store, {})
        reasons = dict(zip(levels, size_reasons(store, codes, len(levels)), strict=True))
        place = torch.arange(len(levels), device=codes.device)
        with torch.no_grad():
            inside = (codes[:, None] == place).to(torch.float64)
            values = rates.statistic(inside)
        for level, bad in zip(levels, torch.isnan(values).any(0).tolist(), strict=True):
            reasons[level] = reasons[level] or ("undefined_in_group" if bad else "")
        excluded = {level: reason for level, reason in reasons.items() if reason}
        kept = [code for code, level in enumerate(levels) if level not in excluded]
        if len(kept) < 2:
            return self._undefined("too_few_groups", store, excluded)
        rows = torch.isin(codes, torch.tensor(kept, device=codes.device))
        part = store.select(rows)
        renumbered = torch.searchsorted(torch.tensor(kept, device=codes.device), codes[rows])
        return self._compared(part, renumbered, [levels[code] for code in kept], excluded, context)

    def _undefined(self, reason: str, store: PredictionStore, excluded: Mapping[str, str]) -> GroupDifference:
        nothing = Estimate.undefined(reason, n=len(store), n_units=all_units(store))
        if excluded:
            nothing = replace(nothing, method=f"none{_listed(excluded)}")
        return GroupDifference(nothing, math.nan, math.nan, {}, excluded)

    def _compared(
        self,
        store: PredictionStore,
        codes: Tensor,
        levels: Sequence[str],
        excluded: Mapping[str, str],
        context: Context,
    ) -> GroupDifference:
        rates = self.rates(store, context)
        if rates is None or isinstance(rates, str):
            return self._undefined("undefined_in_group" if rates is None else rates, store, excluded)
        combine = _COMBINE[self.kind]
        inside = (codes[:, None] == torch.arange(len(levels), device=codes.device)).to(torch.float64)
        ones = torch.ones((len(store), 1), dtype=torch.float64, device=codes.device)
        values, overall = rates.statistic(inside), rates.statistic(ones)
        seen = float(combine(values[..., None], overall)[0])
        drawn = _permuted(store, codes, len(levels), rates, combine, context.resampler.seed, self.draws)
        drawn = drawn[~torch.isnan(drawn)]
        extreme = drawn >= seen - _EQUAL if self.kind == "range" else drawn <= seen + _EQUAL
        p = (1 + int(extreme.sum()) + self.draws - len(drawn)) / (1 + self.draws)
        null = float(drawn.mean()) if len(drawn) else math.nan
        note = f"{rates.note}; {null:.3g} expected with equal groups, p = {p:.3g}{_listed(excluded)}"
        estimate = self._estimate(store, codes, levels, values, overall, context, note)
        named = dict(zip(levels, values[0].tolist(), strict=True)) if len(values) == 1 else {}
        return GroupDifference(estimate, null, p, named, excluded)

    def _estimate(
        self,
        store: PredictionStore,
        codes: Tensor,
        levels: Sequence[str],
        values: Tensor,
        overall: Tensor,
        context: Context,
        note: str,
    ) -> Estimate:
        """Return the estimate by the delta method: which group is largest, and which smallest, is taken as given."""
        with torch.enable_grad():
            at, whole = values[..., None].clone().requires_grad_(), overall.clone().requires_grad_()
            value = _COMBINE[self.kind](at, whole)[0]
            slopes, share = torch.autograd.grad(value, (at, whole), allow_unused=True)
        influence = torch.zeros(len(store), dtype=torch.float64, device=codes.device)
        for group in range(len(levels)):
            rows = (codes == group).nonzero()[:, 0]
            if bool((slopes[:, group] != 0).any()):
                influence[rows] += self._influence(store.select(rows), slopes[:, group, 0], context)
        if share is not None and bool((share != 0).any()):
            influence += self._influence(store, share[:, 0], context)
        everyone = torch.ones_like(store.ids, dtype=torch.bool)
        made = Linear(float(value.detach()), influence)
        confidence = context.resampler.confidence
        if self.kind == "equity-scaled":
            return estimate_of(store, made, everyone, confidence=confidence, bounds=(0.0, 1.0), note=note)
        # a difference of two groups may be of either sign: no scale that holds 0 off
        linear = estimate_of(store, made, everyone, confidence=confidence, note=note)
        return replace(linear, low=_clip(linear.low), high=_clip(linear.high))

    def _influence(self, store: PredictionStore, slopes: Tensor, context: Context) -> Tensor:
        rates = self.rates(store, context)
        if rates is None or isinstance(rates, str):
            return torch.full((len(store),), math.nan, dtype=torch.float64, device=store.ids.device)
        statistic = rates.statistic
        return linearise(lambda weights: slopes @ statistic(weights), len(store), store.ids.device).influence


_COMBINE: Mapping[str, Combine] = {"range": _range, "smallest": _smallest, "equity-scaled": _equity_scaled}


def _clip(value: float) -> float:
    return value if math.isnan(value) else min(max(value, 0.0), 1.0)


def _listed(excluded: Mapping[str, str]) -> str:
    return "".join(f"; not compared: {level} ({reason})" for level, reason in excluded.items())


def _permuted(
    store: PredictionStore, codes: Tensor, count: int, rates: _Rates, combine: Combine, seed: int, draws: int
) -> Tensor:
    """Return float64 (draws,), the combined rates when the group labels are dealt out to the units anew.

    Units are patients where they are known; one whose samples lie in several groups is as many units. Which label a
    unit gets depends on (seed, draw, units) alone, not on the order of rows.
    """
    names, unit = torch.unique(torch.stack([units_of(store), codes], 1), dim=0, return_inverse=True)
    sizes = torch.bincount(names[:, 1], minlength=count)
    keyed = names[:, 0] * count + names[:, 1]  # wraps around, which does no harm
    rng = SampleRng.make(seed, "group permutation", keyed)
    with torch.no_grad():
        overall = rates.statistic(torch.ones((len(store), 1), dtype=torch.float64, device=codes.device))
        sums, rows = None, len(store)
        if rates.sums is not None:
            each = torch.stack(rates.sums)  # (2, R, N)
            sums = each.new_zeros((*each.shape[:2], len(names))).index_add_(2, unit, each)
            rows = len(names)
        width = max(1, _CELLS // (rows * count))
        out = []
        for first in range(0, draws, _BLOCK):
            bits = rng.bits(f"draws {first}", _BLOCK)[:, : draws - first]
            for start in range(0, bits.shape[1], width):
                below = _dealt(bits[:, start : start + width], sizes)  # (U, G, b)
                if sums is not None:
                    found = sums.flatten(0, 1) @ below.flatten(1).to(torch.float64)
                    found = found.reshape(*sums.shape[:2], count, -1)
                    found = found.diff(dim=2, prepend=torch.zeros_like(found[:, :, :1]))
                    values = found[0] / found[1]
                else:
                    inside = below.clone()
                    inside[:, 1:] ^= below[:, :-1]
                    weights = inside.flatten(1)[unit].to(torch.float64)
                    values = rates.statistic(weights).reshape(len(overall), count, -1)
                out.append(combine(values, overall))
    return torch.cat(out)


def _dealt(bits: Tensor, sizes: Tensor) -> Tensor:
    """Return bool (U, G, b): whether a unit (row of the keys (U, b)) is in the group or in one before it.

    Every column is a random deal of groups of these sizes: the smallest keys get the first group.
    """
    ends = sizes.cumsum(0) - 1
    keys = bits.T.contiguous()  # (b, U)
    if bits.device.type == "cpu":  # NumPy finds order statistics several times faster than torch sorts there
        keys = torch.from_numpy(np.partition(keys.numpy(), ends.tolist(), axis=1))
    else:
        keys = keys.sort(1).values
    return bits[:, None] <= keys[:, ends].T


class _Accuracies(_Between):
    from_answers = True

    def rates(self, store: PredictionStore, context: Context) -> _Rates | str | None:
        if store.task != "multilabel":
            right = (store.predicted == labels_of(store)).to(torch.float64)[None]
            return _Rates.of_sums(right, torch.ones_like(right))
        made = decide_labels(store, context.frozen)
        right = (made.correct & made.annotated).sum(1, dtype=torch.float64)
        return _Rates.of_sums(right[None], made.annotated.sum(1, dtype=torch.float64)[None], f"; decisions {made.rule}")


class _Overall(_Between):
    """Of one metric's overall value."""

    of: ClassVar[str]
    draws = RANK_DRAWS

    def rates(self, store: PredictionStore, context: Context) -> _Rates | str | None:
        statistic = label_metric(self.of).statistics(store, context).get("")
        if statistic is None:
            return "single_class" if len(store) else "no_samples"
        return _Rates(lambda weights: statistic(weights)[None])


@METRICS.register("accuracy-gap")
class AccuracyGap(_Accuracies):
    """Largest minus smallest accuracy of the groups.

    Groups of fewer than 50 samples, or for two classes of fewer than 10 of each, are listed and not compared. The
    method text gives the mean and the p-value under permutations of the group labels between units (patients). The
    interval is the delta method's with the two groups taken as given; the expected value of equal groups is above 0.
    """

    title = "Accuracy gap between groups"


@METRICS.register("auroc-gap")
class AurocGap(_Overall):
    """Largest minus smallest AUROC of the groups; exclusions, null value and interval as for ``accuracy-gap``.

    For several classes or labels a group that lacks one of them is not compared: its mean would be over others.
    """

    title = "AUROC gap between groups"
    of = "auroc"


@METRICS.register("ece-gap")
class EceGap(_Overall):
    """Largest minus smallest ECE of the groups; exclusions, null value and interval as for ``accuracy-gap``.

    Small groups have larger ECE by chance alone, which the null value shows.
    """

    title = "ECE gap between groups"
    of = "ece"


@METRICS.register("worst-group-accuracy")
class WorstGroupAccuracy(_Accuracies):
    """Smallest accuracy of a group, with an interval that allows for its having been picked.

    Exclusions and null value as for ``accuracy-gap``.
    """

    title = "Accuracy of the worst group"
    direction = "higher"
    kind = "smallest"

    def _estimate(
        self,
        store: PredictionStore,
        codes: Tensor,
        levels: Sequence[str],
        values: Tensor,
        overall: Tensor,
        context: Context,
        note: str,
    ) -> Estimate:
        del overall
        rates = self.rates(store, context)
        if rates is None or isinstance(rates, str) or rates.sums is None:
            return Estimate.undefined("no_samples")
        hits, asked = rates.sums[0][0], rates.sums[1][0]
        confidence = context.resampler.confidence
        found = []
        for group, level in enumerate(levels):
            rows = (codes == group) & (asked > 0)
            # decisions on the labels of one sample hang together: the sample is the unit
            clusters = None if store.clusters is None else store.clusters[rows]
            effective, _ = effective_count(hits[rows] / asked[rows], clusters, confidence=confidence)
            found.append(Proportion(level, float(values[0, group]) * effective, effective))
        level, worst = worst_of(found, direction="higher", confidence=confidence)
        rows = codes == levels.index(level)
        method = f"{worst.method.replace('conditions', 'groups')}; {level}{note}"
        return replace(worst, n=int(rows.sum()), n_units=unit_count(store.clusters, rows), method=method)


@METRICS.register("equity-scaled-accuracy")
class EquityScaledAccuracy(_Accuracies):
    """M / (1 + sum_a |M_a - M|) with the accuracy M of all compared groups together and M_a of each.

    The sum grows with the number of groups, and is above 0 for equal ones; exclusions, null value (p: permutations with
    a value as small) and interval as for ``accuracy-gap``.

    References:
        Luo et al., FairVision: equitable deep learning for eye disease screening via fair identity scaling, 2023,
        arXiv:2310.02492; Tian et al., FairSeg, 2024, arXiv:2311.02189.
    """

    title = "Equity-scaled accuracy"
    direction = "higher"
    kind = "equity-scaled"


@METRICS.register("equity-scaled-auroc")
class EquityScaledAuroc(_Overall):
    """``equity-scaled-accuracy`` of the AUROC."""

    title = "Equity-scaled AUROC"
    direction = "higher"
    kind = "equity-scaled"
    of = "auroc"


class _Decisions(_Between):
    """Of decisions on two classes at the frozen threshold, or of the answers given."""

    from_answers = True

    def rates(self, store: PredictionStore, context: Context) -> _Rates | str | None:
        if not store.positive_class:
            return None
        (made,) = calls(store, context)
        if made.reason:
            return made.reason
        called = made.called.to(torch.float64)
        decided = (made.called | made.cleared).to(torch.float64)
        sides = [side.to(torch.float64) for side in self._sides(made.positive, made.negative)]
        of = torch.stack([decided * side for side in sides])
        return _Rates.of_sums(called * of, of, made.note)

    def _sides(self, positive: Tensor, negative: Tensor) -> Sequence[Tensor]:
        """Return the rows, bool (N,), among which the calls are counted."""
        raise NotImplementedError


@METRICS.register("demographic-parity-difference")
class DemographicParityDifference(_Decisions):
    """Largest minus smallest share called positive in a group, at the frozen threshold, for two classes.

    Rows that are not finite are called neither and leave it. Exclusions, null value and interval as for
    ``accuracy-gap``.
    """

    title = "Demographic parity difference"

    def _sides(self, positive: Tensor, negative: Tensor) -> Sequence[Tensor]:
        return [positive | negative]


@METRICS.register("equalised-odds-difference")
class EqualisedOddsDifference(_Decisions):
    """The larger of the ranges over groups of the true and of the false positive rate, at the frozen threshold.

    For two classes. Rows that are not finite are called neither and leave it. Exclusions, null value and interval as
    for ``accuracy-gap``.

    References:
        Hardt, Price and Srebro, Equality of opportunity in supervised learning, 2016, arXiv:1610.02413.
    """

    title = "Equalised odds difference"

    def _sides(self, positive: Tensor, negative: Tensor) -> Sequence[Tensor]:
        return [positive, negative]
