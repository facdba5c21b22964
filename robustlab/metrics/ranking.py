"""Discrimination of scores: area under the ROC curve, average precision, sensitivity at a given specificity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from scipy.stats import norm
from torch import Tensor

from robustlab.core.registry import METRICS

from .base import Context, Estimate, Metric, MetricValue, Statistic
from .rankings import Ranking, rankings, values_of
from .stats import (
    DeLong,
    bootstrap,
    cumulative,
    linear_estimate,
    linear_interval,
    macro,
    proportion,
    unit_count,
    wilson,
)
from .store import PredictionStore


def pair_bounds(value: float, first: int, second: int, confidence: float) -> tuple[float, float]:
    """Return the interval of a rank probability that is exactly 0 or 1, where no replicate can vary.

    min(first, second) disjoint, independent pairs of one unit from each side all agree, so Wilson holds for that many
    trials. Conservative: the other pairs are not used.
    """
    pairs = min(first, second)
    return wilson(value * pairs, pairs, confidence=confidence)


class _Ranked(Metric):
    """A mean over classes or labels of what each has; labels are listed as well."""

    two_sided: ClassVar[bool] = True
    """A class without negatives is undefined."""

    def _defined(self, store: PredictionStore) -> tuple[list[Ranking], Tensor]:
        made, entered = rankings(store)
        return [item for item in made if item.counts[1] or not self.two_sided], entered

    def _value(self, item: Ranking) -> Tensor:
        """Return the value of one class, ()."""
        raise NotImplementedError

    def _statistic(self, item: Ranking) -> Statistic:
        raise NotImplementedError

    def _one(self, store: PredictionStore, item: Ranking, context: Context) -> Estimate:
        """Return the estimate of one class."""
        raise NotImplementedError

    def _mean(
        self, store: PredictionStore, made: Sequence[Ranking], parts: list[Estimate], entered: Tensor, context: Context
    ) -> Estimate:
        """Return the estimate of the mean of two classes or more."""
        raise NotImplementedError

    def _weight(self, made: Sequence[Ranking]) -> Tensor:
        """Return float64 (k,) shares of the classes in the mean."""
        return torch.full((len(made),), 1 / len(made), dtype=torch.float64)

    def _macro(self, store: PredictionStore, made: Sequence[Ranking]) -> Statistic:
        return macro([self._statistic(item) for item in made])

    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        made, entered = self._defined(store)
        n, units = int(entered.sum()), unit_count(store.clusters, entered)
        missing = Estimate.undefined("no_samples" if n == 0 else self._missing(), n=n, n_units=units)
        if not made:
            return [MetricValue(self.name, missing, self.direction)]
        per_label = store.task == "multilabel"
        parts = [self._one(store, item, context) for item in made] if per_label or len(made) == 1 else []
        overall = parts[0] if len(made) == 1 else self._mean(store, made, parts, entered, context)
        overall = replace(overall, n=n, n_units=units)
        if len(made) < (1 if store.positive_class else store.num_classes):
            overall = replace(overall, method=f"{overall.method}; mean of {len(made)} of {store.num_classes} defined")
        result = [MetricValue(self.name, overall, self.direction)]
        if per_label:
            by_index = {item.index: part for item, part in zip(made, parts, strict=True)}
            for index in range(store.num_classes):
                estimate = by_index.get(index, missing)
                result.append(MetricValue(self.name, estimate, self.direction, context.target(index)))
        return result

    def _missing(self) -> str:
        return "single_class" if self.two_sided else "no_positives"

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        made, _ = self._defined(store)
        if not made:
            return {}
        labels = {context.target(item.index): self._statistic(item) for item in made}
        return {"": self._macro(store, made), **(labels if store.task == "multilabel" else {})}

    def point(self, store: PredictionStore, context: Context) -> Mapping[str, float]:
        made, _ = self._defined(store)
        if not made:
            return {}
        values = values_of(self._value, made)
        found = {"": float(values @ self._weight(made))}
        if store.task == "multilabel":
            found |= {context.target(item.index): float(value) for item, value in zip(made, values, strict=True)}
        return found


@METRICS.register("auroc")
class Auroc(_Ranked):
    """Area under the ROC curve with ties counted half; macro one-vs-rest over classes, macro over labels.

    Rows are ranked by log-odds from the logits, so saturated probabilities make no ties. Classes or labels without both
    sides are left out of the mean. Intervals are DeLong's, also for the mean of several areas on the same samples;
    exactly 0 or 1 gets Wilson's on disjoint pairs.

    References:
        Hanley and McNeil, The meaning and use of the area under a ROC curve, 1982; DeLong, DeLong and Clarke-Pearson,
        Comparing the areas under two or more correlated receiver operating characteristic curves, 1988.
    """

    default = True
    title = "AUROC"

    def _value(self, item: Ranking) -> Tensor:
        return item.wins().to(torch.float64) / (2 * item.counts[0] * item.counts[1])

    def _statistic(self, item: Ranking) -> Statistic:
        return item.area_statistic()

    def _one(self, store: PredictionStore, item: Ranking, context: Context) -> Estimate:
        first, second = item.placements()
        units = None
        if store.clusters is not None:
            codes = torch.unique(store.clusters, return_inverse=True)[1]
            units = (codes[item.sides[0]], codes[item.sides[1]])
        confidence = context.resampler.confidence
        made = DeLong(first[None], second[None], units)
        value = float(self._value(item))
        if value not in (0.0, 1.0):
            return replace(made.estimate(confidence=confidence), value=value)
        low, high = pair_bounds(value, *made.counts, confidence)
        total = len(item.rows) if units is None else len(torch.unique(torch.cat(units)))
        return Estimate(value, low, high, len(item.rows), total, "wilson on disjoint pairs")

    def _mean(
        self, store: PredictionStore, made: Sequence[Ranking], parts: list[Estimate], entered: Tensor, context: Context
    ) -> Estimate:
        values = values_of(self._value, made)
        value = float(values @ self._weight(made))
        confidence = context.resampler.confidence
        if value in (0.0, 1.0):
            parts = parts or [self._one(store, item, context) for item in made]
            low, high = (sum(ends) / len(ends) for ends in ([p.low for p in parts], [p.high for p in parts]))
            return replace(parts[0], low=low, high=high)
        error, freedom = self._spread(store, made, values, confidence)
        n, units = int(entered.sum()), unit_count(store.clusters, entered)
        method = f"delong, mean of {len(made)} areas" + ("" if store.clusters is None else ", over clusters")
        if not error > 0:
            return Estimate(value, math.nan, math.nan, n, units, method, "no_variance")
        low, high = linear_interval(value, error, freedom, confidence=confidence, bounds=(0.0, 1.0))
        return Estimate(value, low, high, n, units, method)

    def _spread(
        self, store: PredictionStore, made: Sequence[Ranking], values: Tensor, confidence: float
    ) -> tuple[float, float]:
        """Return (standard error, degrees of freedom) of the mean of the areas.

        Every side of every class has its own P / (P - 1), as in DeLong's variance, and its own P - 1 degrees of
        freedom, which are pooled as Welch does: few positives of one class widen the interval of the mean. A class that
        is perfectly ranked, or has one positive, varies as far as the bound for disjoint pairs says.
        """
        codes = torch.unique(store.clusters, return_inverse=True)[1] if store.clusters is not None else None
        total = len(store) if codes is None else int(codes.max()) + 1
        sums = torch.zeros(total, dtype=torch.float64, device=store.logits.device)
        certain, pooled = 0.0, 0.0
        quantile = float(norm.ppf((1 + confidence) / 2))
        for item, value, share in zip(made, values.tolist(), self._weight(made).tolist(), strict=True):
            places = [rows if codes is None else codes[rows] for rows in item.sides]
            counts = [len(rows) if codes is None else len(torch.unique(rows)) for rows in places]
            if value in (0.0, 1.0) or min(counts) < 2:
                low, high = pair_bounds(value, counts[0], counts[1], confidence)
                certain += (share * (high - low) / quantile) ** 2
                continue
            gains = (self._gain(made, values, value), 0.0)
            for rows, placed, count, gain in zip(places, item.placements(), counts, gains, strict=True):
                own = ((placed - value) * (share / len(rows)) + gain) * math.sqrt(count / (count - 1))
                part = torch.zeros_like(sums).index_add_(0, rows, own)
                pooled += float(part.square().sum()) ** 2 / (count - 1)
                sums += part
        seen = float(sums.square().sum())
        freedom = seen**2 / pooled if pooled > 0 else math.inf
        # a bound that allows for small numbers already has no degrees of freedom to lose
        freedom = freedom * ((seen + certain) / seen) ** 2 if seen > 0 else math.inf
        return math.sqrt(seen + certain), max(1.0, min(freedom, total - 1.0))

    def _gain(self, made: Sequence[Ranking], values: Tensor, value: float) -> float:
        """Return what a positive of an area ``value`` adds to the mean by its weight alone."""
        del made, values, value
        return 0.0


@METRICS.register("auroc-weighted")
class WeightedAuroc(Auroc):
    """Mean of the one-vs-rest areas, or of those of the labels, weighted by the number of positives."""

    default = False
    title = "AUROC weighted by class"

    def _weight(self, made: Sequence[Ranking]) -> Tensor:
        counts = torch.tensor([item.counts[0] for item in made], dtype=torch.float64)
        return counts / counts.sum()

    def _gain(self, made: Sequence[Ranking], values: Tensor, value: float) -> float:
        return (value - float(values @ self._weight(made))) / sum(item.counts[0] for item in made)

    def _macro(self, store: PredictionStore, made: Sequence[Ranking]) -> Statistic:
        areas = [item.area_statistic() for item in made]
        rows = [item.sides[0] for item in made]

        def statistic(weights: Tensor) -> Tensor:
            mass = torch.stack([weights[positives].sum(0) for positives in rows])
            return (torch.stack([area(weights) for area in areas]) * mass).sum(0) / mass.sum(0)

        return statistic


@METRICS.register("average-precision")
class AveragePrecision(_Ranked):
    """Area under the precision-recall curve as a step function; macro one-vs-rest over classes, macro over labels.

    sum_k (R_k - R_{k-1}) P_k over distinct scores, which is the mean precision at the scores of the positives. Classes
    or labels without positives are left out of the mean. The method names the prevalence, which a score without
    information reaches.
    """

    title = "Average precision"
    two_sided = False

    def _value(self, item: Ranking) -> Tensor:
        return item.precision()

    def _statistic(self, item: Ranking) -> Statistic:
        return item.precision_statistic()

    def _one(self, store: PredictionStore, item: Ranking, context: Context) -> Estimate:
        entered = torch.zeros_like(store.finite)
        entered[item.rows] = True
        return self._linear(store, [item], item.precision_statistic(), entered, context)

    def _mean(
        self, store: PredictionStore, made: Sequence[Ranking], parts: list[Estimate], entered: Tensor, context: Context
    ) -> Estimate:
        return self._linear(store, made, self._macro(store, made), entered, context)

    def _linear(
        self, store: PredictionStore, made: Sequence[Ranking], statistic: Statistic, entered: Tensor, context: Context
    ) -> Estimate:
        shares = [item.counts[0] / len(item.rows) for item in made]
        note = f"; prevalence {sum(shares) / len(shares):.4g}"
        confidence = context.resampler.confidence
        return linear_estimate(store, statistic, entered, confidence=confidence, bounds=(0.0, 1.0), note=note)


@dataclass(frozen=True, eq=False)
class _Cut:
    """Positives above the lowest threshold that keeps the specificity, re-estimated under weights.

    That threshold is the next score above the weighted quantile of the negatives.
    """

    item: Ranking
    numerator: int
    denominator: int

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows of positives and negatives by score; last rank of each distinct negative score; positives through it."""
        (positives, high), (negatives, low) = self.item.by_score()
        levels, counts = torch.unique_consecutive(low, return_counts=True)
        return positives, negatives, counts.cumsum(0), torch.searchsorted(high, levels, right=True)

    def __call__(self, weights: Tensor) -> Tensor:
        positives, negatives, ends, through = self._tables
        kept = cumulative(weights[negatives])
        # whole weights are compared exactly
        short = self.denominator * kept[ends] < self.numerator * kept[-1]
        level = short.sum(0).clamp_max(len(ends) - 1)
        missed = cumulative(weights[positives])
        value = 1 - missed.gather(0, through[level][None])[0] / missed[-1]
        return torch.where(kept[-1] > 0, value, torch.nan)

    def reached(self) -> tuple[Tensor, float]:
        """Return bool (P,), the positives above, and the specificity."""
        low = self.item.ordered[1]
        last = -(-self.numerator * len(low) // self.denominator) - 1
        return self.item.values[0] > low[last], int(torch.searchsorted(low, low[last], right=True)) / len(low)


@METRICS.register("sensitivity-at-95-specificity")
class SensitivityAt95Specificity(_Ranked):
    """Sensitivity at the lowest threshold whose specificity is at least 95 %, on the evaluated data themselves.

    Positive is at or above one of the observed scores; macro one-vs-rest over classes, macro over labels. The method
    names the specificity that was reached. Every replicate of the bootstrap sets its own threshold.
    """

    title = "Sensitivity at 95 % specificity"
    smooth = False

    def _statistic(self, item: Ranking) -> Callable[[Tensor], Tensor]:
        return _Cut(item, 19, 20)

    def _value(self, item: Ranking) -> Tensor:
        return _Cut(item, 19, 20).reached()[0].to(torch.float64).mean()

    def _one(self, store: PredictionStore, item: Ranking, context: Context) -> Estimate:
        entered = torch.zeros_like(store.finite)
        entered[item.rows] = True
        made = bootstrap(store, self._statistic(item), context.resampler, entered, bounds=(0.0, 1.0))
        above, reached = _Cut(item, 19, 20).reached()
        note = f"; specificity {reached:.4g}"
        if made.value in (0.0, 1.0):  # no replicate varies; the threshold is taken as given
            clusters = None if store.clusters is None else store.clusters[item.sides[0]]
            rate = proportion(above, clusters, confidence=context.resampler.confidence)
            return replace(made, low=rate.low, high=rate.high, method=f"{rate.method}{note}", reason="")
        return replace(made, method=f"{made.method}{note}")

    def _mean(
        self, store: PredictionStore, made: Sequence[Ranking], parts: list[Estimate], entered: Tensor, context: Context
    ) -> Estimate:
        estimate = bootstrap(store, self._macro(store, made), context.resampler, entered, bounds=(0.0, 1.0))
        reached = [_Cut(item, 19, 20).reached()[1] for item in made]
        note = f"; specificity {sum(reached) / len(reached):.4g}"
        if estimate.value in (0.0, 1.0):
            parts = parts or [self._one(store, item, context) for item in made]
            low, high = (sum(ends) / len(ends) for ends in ([p.low for p in parts], [p.high for p in parts]))
            return replace(estimate, low=low, high=high, method=f"mean of wilson bounds{note}", reason="")
        return replace(estimate, method=f"{estimate.method}{note}")
