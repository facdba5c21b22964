"""Discrimination of scores: area under the ROC curve, average precision, sensitivity at a given specificity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from robustlab.core.registry import METRICS

from .base import Context, Estimate, Metric, MetricValue, Statistic
from .stats import (
    DeLong,
    Linear,
    bootstrap,
    cumulative,
    estimate_of,
    linear_estimate,
    macro,
    proportion,
    rank_probability,
    unit_count,
    wilson,
)
from .store import PredictionStore
from .thresholds import labels_of

_CELLS = 1 << 15  # numbers that stay in a core's cache, and that torch leaves to one thread: waiting costs more
_MANY = 1 << 16


def rank_keys(store: PredictionStore, rows: Tensor) -> Tensor:
    """Return float64 (C, n), for each class or label numbers that order the rows (int64 (n,)) as its log-odds do.

    One row for two classes. From the logits, so saturated probabilities make no ties; the order is that of
    log p for p <= 1/2 and of the log-odds z_k - log sum_{j != k} exp(z_j) above, where log p would lose digits. The sum
    is made of terms rounded to one grid, so it is exact, and permuted classes change no digit.
    """
    logits, count = store.logits, store.num_classes
    if store.task == "multilabel" or count < 2:
        return logits[rows].T.to(torch.float64, memory_format=torch.contiguous_format)
    if count == 2:
        return (logits[rows, 1].to(torch.float64) - logits[rows, 0].to(torch.float64))[None]
    out = torch.empty((count, len(rows)), dtype=torch.float64, device=logits.device)
    # x + grid - grid rounds x in [0, 1] so that a sum of as many such terms as there are classes needs no rounding
    grid = 1.5 * 2.0 ** count.bit_length()
    step = max(1, _CELLS // count)
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        z = logits.index_select(0, rows[block]).T.to(torch.float64, memory_format=torch.contiguous_format)
        top, where = z.max(0, keepdim=True)
        z -= top
        z.scatter_(0, where, -torch.inf)
        second = z.amax(0)
        others = (z - second).exp_().add_(grid).sub_(grid).sum(0).log_()
        ahead = -second - others
        scale = torch.log1p((-ahead).exp_()) - math.log(2)
        # log p + log 2 meets the log-odds at p = 1/2, and is below them where p is larger
        z -= scale
        z.scatter_(0, where, torch.maximum(-scale, ahead)[None])
        out[:, block] = z
    return out


@dataclass(frozen=True, eq=False)
class Ranking:
    """One class or label against the rest.

    Args:
        index: Class or label.
        rows: int64 (n,), the rows that enter.
        scores: float64 (n,), larger for positives.
        inside: Where the positives are.
    """

    index: int
    rows: Tensor
    scores: Tensor
    inside: slice

    def _split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return values[self.inside], torch.cat([values[: self.inside.start], values[self.inside.stop :]])

    @property
    def counts(self) -> tuple[int, int]:
        """Positives and negatives."""
        positives = self.inside.stop - self.inside.start
        return positives, len(self.rows) - positives

    @cached_property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Rows of the positives (P,) and of the negatives (M,)."""
        return self._split(self.rows)

    @cached_property
    def values(self) -> tuple[Tensor, Tensor]:
        """Scores of the positives (P,) and of the negatives (M,)."""
        return self._split(self.scores)

    @cached_property
    def ordered(self) -> tuple[Tensor, Tensor]:
        """Scores of positives and of negatives, ascending."""
        if self.scores.device.type != "cpu":
            high, low = self._split(self.scores)
            return high.sort().values, low.sort().values
        # NumPy sorts several times faster than torch on a CPU
        scores = self.scores.numpy()
        low_values = np.concatenate([scores[: self.inside.start], scores[self.inside.stop :]])
        low_values.sort()
        return torch.from_numpy(np.sort(scores[self.inside])), torch.from_numpy(low_values)

    def by_score(self) -> list[tuple[Tensor, Tensor]]:
        """Return (rows, scores) of the positives and of the negatives, ascending by score."""
        orders = [torch.argsort(values, stable=True) for values in self.values]
        return [(r[o], v[o]) for r, v, o in zip(self.sides, self.values, orders, strict=True)]

    def wins(self) -> Tensor:
        """Return int64 (), pairs that are in order, counted twice, plus equal ones."""
        high, low = self.ordered
        below = torch.searchsorted(low, high)
        through = torch.searchsorted(low, high, right=True)
        return below.sum() + through.sum()

    def placements(self) -> tuple[Tensor, Tensor]:
        """Return the share of negatives below each positive, and of positives above each negative; ties count half."""
        first, second = (
            (torch.searchsorted(others, values) + torch.searchsorted(others, values, right=True)).to(torch.float64)
            / (2 * len(others))
            for values, others in zip(self.values, self.ordered[::-1], strict=True)
        )
        return first, 1 - second

    def precision(self) -> Tensor:
        """Return float64 (), the mean precision at the scores of the positives."""
        high, low = self.ordered
        true = len(high) - torch.searchsorted(high, high)
        false = len(low) - torch.searchsorted(low, high)
        return (true / (true + false).to(torch.float64)).mean()

    def area_statistic(self) -> Statistic:
        """Return the area under the ROC curve as a function of the weights of all samples."""
        (positives, high), (negatives, low) = self.by_score()
        area = rank_probability(high, low)
        return lambda weights: area(weights[positives], weights[negatives])

    def precision_statistic(self) -> Statistic:
        """Return the average precision as a function of the weights of all samples."""
        (positives, high), (negatives, low) = self.by_score()
        first, below = torch.searchsorted(high, high), torch.searchsorted(low, high)

        def statistic(weights: Tensor) -> Tensor:
            own = weights[positives]
            true, false = cumulative(own), cumulative(weights[negatives])
            hits = true[-1] - true[first]
            called = hits + (false[-1] - false[below])
            # where nothing of weight is called, the positive itself has none
            return (own * hits / called.clamp_min(torch.finfo(called.dtype).tiny)).sum(0) / true[-1]

        return statistic


def rankings(store: PredictionStore) -> tuple[list[Ranking], Tensor]:
    """Return the classes or labels that have positives, and bool (N,), the rows that enter any of them."""
    labels = labels_of(store)
    finite = torch.zeros_like(store.finite) if store.answers_only else store.finite
    if store.task == "multilabel":
        known = labels >= 0
        keys = rank_keys(store, torch.arange(len(store), device=labels.device))
        made = []
        for index, key in enumerate(keys):
            sides = [(finite & (labels[:, index] == side)).nonzero()[:, 0] for side in (1, 0)]
            rows = torch.cat(sides)
            made.append(Ranking(index, rows, key[rows], slice(0, len(sides[0]))))
        return [item for item in made if item.counts[0]], finite & known.any(1)
    rows = _grouped(labels, store.num_classes)
    if not bool(finite.all()):
        rows = rows[finite[rows]]
    # rows of a class are neighbours from here on, so its negatives are all before and all behind
    keys = rank_keys(store, rows)
    ends = [0, *torch.bincount(labels[rows], minlength=store.num_classes).cumsum(0).tolist()]
    classes = (1,) if store.positive_class else range(store.num_classes)
    made = [
        Ranking(index, rows, key, slice(ends[index], ends[index + 1])) for key, index in zip(keys, classes, strict=True)
    ]
    return [item for item in made if item.counts[0]], finite


def _values(function: Callable[[Ranking], Tensor], made: Sequence[Ranking]) -> Tensor:
    """Return float64 (k,), the value of every ranking, on the CPU."""
    threads = min(len(made), torch.get_num_threads())
    if threads > 1 and made[0].scores.device.type == "cpu" and len(made[0].rows) >= _MANY:
        with ThreadPoolExecutor(threads) as pool:  # a sort by NumPy takes one thread and leaves the interpreter free
            list(pool.map(lambda item: item.ordered, made))
    return torch.stack([function(item) for item in made]).cpu()


def _grouped(labels: Tensor, classes: int) -> Tensor:
    """Return the rows ordered by label, int64 (N,)."""
    if labels.device.type == "cpu" and classes < 1 << 15:  # small integers are sorted by radix there
        return torch.from_numpy(np.argsort(labels.numpy().astype(np.int16), kind="stable"))
    return torch.argsort(labels, stable=True)


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
        values = _values(self._value, made)
        found = {"": float(values @ self._weight(made))}
        if store.task == "multilabel":
            found |= {context.target(item.index): float(value) for item, value in zip(made, values, strict=True)}
        return found


@METRICS.register("auroc")
class Auroc(_Ranked):
    """Area under the ROC curve with ties counted half; macro one-vs-rest over classes, macro over labels.

    Rows are ranked by log-odds from the logits, so saturated probabilities make no ties. Classes or labels without both
    sides are left out of the mean. Intervals are DeLong's for one area, and made of the same placement values for the
    mean of several; exactly 0 or 1 gets Wilson's on disjoint pairs.

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
        values = _values(self._value, made)
        value = float(values @ self._weight(made))
        confidence = context.resampler.confidence
        if value in (0.0, 1.0):
            parts = parts or [self._one(store, item, context) for item in made]
            low, high = (sum(ends) / len(ends) for ends in ([p.low for p in parts], [p.high for p in parts]))
            return replace(parts[0], low=low, high=high)
        influence = self._influence(store, made, values)
        return estimate_of(store, Linear(value, influence), entered, confidence=confidence, bounds=(0.0, 1.0))

    def _influence(self, store: PredictionStore, made: Sequence[Ranking], values: Tensor) -> Tensor:
        """Return float64 (N,), the change of the mean with every sample's weight."""
        influence = torch.zeros(len(store), dtype=torch.float64, device=store.logits.device)
        for item, value, share in zip(made, values.tolist(), self._weight(made).tolist(), strict=True):
            for rows, placed in zip(item.sides, item.placements(), strict=True):
                influence.index_add_(0, rows, (placed - value) * (share / len(rows)))
        return influence


@METRICS.register("auroc-weighted")
class WeightedAuroc(Auroc):
    """Mean of the one-vs-rest areas, or of those of the labels, weighted by the number of positives."""

    default = False
    title = "AUROC weighted by class"

    def _weight(self, made: Sequence[Ranking]) -> Tensor:
        counts = torch.tensor([item.counts[0] for item in made], dtype=torch.float64)
        return counts / counts.sum()

    def _influence(self, store: PredictionStore, made: Sequence[Ranking], values: Tensor) -> Tensor:
        influence = super()._influence(store, made, values)
        total = sum(item.counts[0] for item in made)
        mean = float(values @ self._weight(made))
        for item, value in zip(made, values.tolist(), strict=True):
            influence[item.sides[0]] += (value - mean) / total
        return influence

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
