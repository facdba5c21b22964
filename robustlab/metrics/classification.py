"""Discrimination: accuracy, balanced accuracy, sensitivity and specificity at frozen thresholds, AUROC."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from robustlab.core.errors import ConfigError
from robustlab.core.registry import METRICS

from .base import Context, Estimate, Frozen, Metric, MetricValue, Statistic
from .stats import (
    bootstrap,
    macro,
    proportion,
    rank_probability,
    ratio,
    replicate,
    rowwise,
    stack,
    summarise,
    unit_count,
    wilson,
)
from .store import PredictionStore

_ROWS = 1 << 14


def labels_of(store: PredictionStore) -> Tensor:
    """Return the labels.

    Raises:
        ConfigError: The store has none.
    """
    if store.labels is None:
        raise ConfigError("metrics", "labelled predictions", "a store without labels", "Use the OOD metrics instead.")
    return store.labels


def fit_thresholds(store: PredictionStore) -> Tensor:
    """Return the thresholds on the positive probability with the largest Youden index.

    A case is positive at or above its threshold, which lies midway between adjacent observed probabilities (below the
    lowest one: midway to 0). Counts are compared as integers; of equal optima the lowest threshold, which has the
    higher sensitivity, is taken.

    Args:
        store: Clean, labelled validation predictions.

    Returns:
        float64 (1,) for two classes, (L,) for multi-label, (0,) for more classes and for answers without
        probabilities; NaN for a label without both classes.

    References:
        Youden, Index for rating diagnostic tests, 1950.
    """
    labels = labels_of(store)
    if store.task != "multilabel":
        columns = [(store.probs[:, 1], labels)] if store.positive_class and not store.answers_only else []
    else:
        columns = list(zip(store.probs.unbind(1), labels.unbind(1), strict=True))
    thresholds = [_youden(p[known], y[known]) for p, y in columns for known in [store.finite & (y >= 0)]]
    return torch.tensor(thresholds, dtype=torch.float64, device=store.logits.device)


def _youden(scores: Tensor, truth: Tensor) -> float:
    levels, inverse = torch.unique(scores, return_inverse=True)
    positives, negatives = (torch.bincount(inverse[truth == wanted], minlength=len(levels)) for wanted in (1, 0))
    p, n = int(positives.sum()), int(negatives.sum())
    if p == 0 or n == 0:
        return math.nan
    # true and false positives at or above each level
    hits, alarms = (counts.flip(0).cumsum(0).flip(0) for counts in (positives, negatives))
    index = hits * n - alarms * p
    best = int((index == index.max()).nonzero()[0])
    below = float(levels[best - 1]) if best else 0.0
    return (below + float(levels[best])) / 2


@dataclass(frozen=True, eq=False)
class Decisions:
    """Multi-label decisions.

    Args:
        correct: bool (N, L); false for rows that are not finite.
        annotated: bool (N, L).
        rule: Text for the method column.
    """

    correct: Tensor
    annotated: Tensor
    rule: str


def decide_labels(store: PredictionStore, frozen: Frozen) -> Decisions:
    """Decide every label at its frozen threshold, at 0.5 where there is none."""
    labels = labels_of(store)
    if frozen.thresholds is None:
        thresholds, rule = store.probs.new_full((store.num_classes,), 0.5), "at 0.5"
    else:
        missing = torch.isnan(frozen.thresholds)
        thresholds = torch.where(missing, 0.5, frozen.thresholds)
        rule = "at frozen thresholds" + (f", 0.5 for {int(missing.sum())} labels" if bool(missing.any()) else "")
    correct = (store.probs >= thresholds) == (labels == 1)
    return Decisions(correct & store.finite[:, None], labels >= 0, rule)


def _unit_codes(store: PredictionStore, repeat: int) -> Tensor:
    """Return the unit of each of ``repeat`` decisions a row, (N, repeat)."""
    codes = torch.arange(len(store), device=store.ids.device) if store.clusters is None else store.clusters
    return codes[:, None].expand(-1, repeat)


@dataclass(frozen=True, eq=False)
class _Rate:
    """A share of hits among some rows: a recall, a specificity."""

    hits: Tensor
    rows: Tensor

    def statistic(self) -> Statistic:
        rows = self.rows.to(torch.float64)[None]
        return ratio(self.hits.to(torch.float64)[None] * rows, rows)

    def estimate(self, store: PredictionStore, context: Context, reason: str, note: str = "") -> Estimate:
        if not bool(self.rows.any()):
            return Estimate.undefined(reason if len(store) else "no_samples")
        clusters = None if store.clusters is None else store.clusters[self.rows]
        return proportion(self.hits[self.rows], clusters, confidence=context.resampler.confidence, note=note)


@METRICS.register("accuracy")
class Accuracy(Metric):
    """Share of right answers; for multi-label the share of right decisions on annotated labels."""

    title = "Accuracy"
    from_answers = True

    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        confidence = context.resampler.confidence
        if store.task != "multilabel":
            estimate = proportion(store.predicted == labels_of(store), store.clusters, confidence=confidence)
            return [MetricValue(self.name, estimate, self.direction)]
        made = decide_labels(store, context.frozen)
        codes = _unit_codes(store, store.num_classes)[made.annotated]
        samples = int(made.annotated.any(1).sum())
        # the decisions of one image hang together, so the image (or its patient) is the unit
        note = f"; decisions {made.rule}"
        estimate = proportion(made.correct[made.annotated], codes, confidence=confidence, samples=samples, note=note)
        return [MetricValue(self.name, estimate, self.direction)]

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        if store.task != "multilabel":
            return {"": _Rate(store.predicted == labels_of(store), torch.ones_like(store.finite)).statistic()}
        made = decide_labels(store, context.frozen)
        right = (made.correct & made.annotated).sum(1, dtype=torch.float64)
        return {"": ratio(right[None], made.annotated.sum(1, dtype=torch.float64)[None])}


@METRICS.register("balanced-accuracy")
class BalancedAccuracy(Metric):
    """Mean recall over the classes that occur; for multi-label the macro mean over labels that have both classes."""

    title = "Balanced accuracy"
    from_answers = True

    def _rates(self, store: PredictionStore, context: Context) -> tuple[list[_Rate], str]:
        labels = labels_of(store)
        if store.task != "multilabel":
            right = store.predicted == labels
            rates = [_Rate(right, labels == index) for index in range(store.num_classes)]
            return [rate for rate in rates if bool(rate.rows.any())], ""
        made = decide_labels(store, context.frozen)
        pairs = [
            (_Rate(made.correct[:, index], labels[:, index] == 1), _Rate(made.correct[:, index], labels[:, index] == 0))
            for index in range(store.num_classes)
        ]
        both = [pair for pair in pairs if bool(pair[0].rows.any()) and bool(pair[1].rows.any())]
        return [rate for pair in both for rate in pair], f"; decisions {made.rule}"

    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        rates, note = self._rates(store, context)
        if not rates:
            reason = "no_samples" if len(store) == 0 else "single_class"
            return [MetricValue(self.name, Estimate.undefined(reason), self.direction)]
        parts = [rate.estimate(store, context, "") for rate in rates]
        value = sum(part.value for part in parts) / len(parts)
        entered = torch.stack([rate.rows for rate in rates]).any(0)
        n, units = int(entered.sum()), unit_count(store.clusters, entered)
        if store.task != "multilabel" and store.clusters is None:
            low, high = _mover(parts)
            estimate = Estimate(value, low, high, n, units, "wilson a class, combined by MOVER")
        elif value in (0.0, 1.0):
            # every replicate would be 0 or 1 too; the rates hang together, so their bounds are averaged, not pooled
            low, high = (sum(ends) / len(parts) for ends in ([p.low for p in parts], [p.high for p in parts]))
            estimate = Estimate(value, low, high, n, units, f"mean of wilson bounds{note}")
        else:
            estimate = bootstrap(store, _mean_rate(rates), context.resampler, entered)
            estimate = replace(estimate, method=f"{estimate.method}{note}")
            if estimate.low == estimate.high:  # one answer to everything: no replicate differs, though the rates do
                low, high = _mover(parts)
                estimate = Estimate(value, low, high, n, units, f"wilson a class, combined by MOVER{note}")
        return [MetricValue(self.name, estimate, self.direction)]

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        rates, _ = self._rates(store, context)
        return {"": _mean_rate(rates)} if rates else {}


def _mean_rate(rates: Sequence[_Rate]) -> Statistic:
    rows = torch.stack([rate.rows for rate in rates])
    hits = torch.stack([rate.hits for rate in rates]) & rows

    def statistic(weights: Tensor) -> Tensor:
        right, all_of = (weights.new_zeros((len(rates), weights.shape[1])) for _ in range(2))
        for start in range(0, len(weights), _ROWS):  # sums of whole numbers: blocks change no digit
            block = slice(start, start + _ROWS)
            right += hits[:, block].to(torch.float64) @ weights[block]
            all_of += rows[:, block].to(torch.float64) @ weights[block]
        return (right / all_of).mean(0)

    return statistic


def _mover(parts: Sequence[Estimate]) -> tuple[float, float]:
    """Return the interval of a mean of independent proportions from their own intervals.

    References:
        Zou and Donner, Construction of confidence limits about effect measures: a general approach, 2008.
    """
    value = sum(part.value for part in parts) / len(parts)
    down = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / len(parts)
    up = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / len(parts)
    return max(0.0, value - down), min(1.0, value + up)


class _ConditionalRate(Metric):
    """Share of right answers among the rows that are, or are not, of a class."""

    from_answers = True
    wanted: ClassVar[bool]
    empty: ClassVar[str]

    def _rates(self, store: PredictionStore, context: Context) -> Iterator[tuple[str, _Rate, str, str]]:
        """Yield (target, rate, reason if it has no rows or no threshold, method note)."""
        labels = labels_of(store)
        if store.task != "multilabel" and (store.answers_only or not store.positive_class):
            for index in (1,) if store.positive_class else range(store.num_classes):
                rows = (labels == index) == self.wanted
                # an answer that is not finite is an error in both rates
                hits = ((store.predicted == index) == self.wanted) & store.finite
                target, note = ("", "; of the answers given") if store.positive_class else (context.target(index), "")
                yield target, _Rate(hits, rows), self.empty, note
            return
        columns = (
            [(store.probs[:, 1], labels)]
            if store.positive_class
            else list(zip(store.probs.unbind(1), labels.unbind(1), strict=True))
        )
        for index, (p, y) in enumerate(columns):
            target = "" if store.positive_class else context.target(index)
            rows = y == int(self.wanted)
            thresholds = context.frozen.thresholds
            threshold = math.nan if thresholds is None else float(thresholds[index])
            if math.isnan(threshold):
                reason = "no_val" if thresholds is None else "val_single_class"
                yield target, _Rate(rows, torch.zeros_like(rows)), reason, ""
                continue
            hits = ((p >= threshold) == self.wanted) & store.finite
            yield target, _Rate(hits, rows), self.empty, f"; threshold {threshold:.4g} frozen on val"

    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        return [
            MetricValue(self.name, rate.estimate(store, context, reason, note), self.direction, target)
            for target, rate, reason, note in self._rates(store, context)
        ]

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        rates = self._rates(store, context)
        return {target: rate.statistic() for target, rate, _, _ in rates if bool(rate.rows.any())}


@METRICS.register("sensitivity")
class Sensitivity(_ConditionalRate):
    """Share of positive cases called positive, at the frozen threshold; one-vs-rest by argmax for several classes.

    For answers without probabilities the answer given decides, and no validation data are needed.
    """

    title = "Sensitivity"
    wanted = True
    empty = "no_positives"


@METRICS.register("specificity")
class Specificity(_ConditionalRate):
    """Share of negative cases called negative, at the frozen threshold; one-vs-rest by argmax for several classes.

    For answers without probabilities the answer given decides, and no validation data are needed.
    """

    title = "Specificity"
    wanted = False
    empty = "no_negatives"


@dataclass(frozen=True, eq=False)
class _Ranking:
    """One class or label against the rest: rows of the positives, and of the negatives by ascending score."""

    index: int
    positives: Tensor
    negatives: Tensor
    statistic: Statistic

    @staticmethod
    def make(index: int, scores: Tensor, positive: Tensor, negative: Tensor) -> _Ranking | None:
        """Return None where a side is empty."""
        positives, negatives = positive.nonzero()[:, 0], negative.nonzero()[:, 0]
        if len(positives) == 0 or len(negatives) == 0:
            return None
        negatives = negatives[torch.argsort(scores[negatives], stable=True)]
        area = rank_probability(scores[positives], scores[negatives])
        return _Ranking(index, positives, negatives, lambda w: area(w[positives], w[negatives]))


def _rankings(store: PredictionStore) -> tuple[list[_Ranking], Tensor]:
    """Return the defined rankings and bool (N,), the rows that enter any of them."""
    labels, odds = labels_of(store), rowwise(store, lambda part: part.log_odds)
    finite = torch.zeros_like(store.finite) if store.answers_only else store.finite
    if store.task == "multilabel":
        made = [
            _Ranking.make(i, odds[:, i], finite & (labels[:, i] == 1), finite & (labels[:, i] == 0))
            for i in range(store.num_classes)
        ]
        entered = finite & (labels >= 0).any(1)
    else:
        classes = (1,) if store.positive_class else range(store.num_classes)
        made = [_Ranking.make(i, odds[:, i], finite & (labels == i), finite & (labels != i)) for i in classes]
        entered = finite
    return [ranking for ranking in made if ranking is not None], entered


def pair_bounds(value: float, first: int, second: int, confidence: float) -> tuple[float, float]:
    """Return the interval of a rank probability that is exactly 0 or 1, where no replicate can vary.

    min(first, second) disjoint, independent pairs of one unit from each side all agree, so Wilson holds for that many
    trials. Conservative: the other pairs are not used.
    """
    pairs = min(first, second)
    return wilson(value * pairs, pairs, confidence=confidence)


@METRICS.register("auroc")
class Auroc(Metric):
    """Area under the ROC curve with ties counted half; macro one-vs-rest over classes, macro over labels.

    Rows are ranked by log-odds from the logits, so saturated probabilities make no ties. Classes or labels without both
    sides are left out of the mean.

    References:
        Hanley and McNeil, The meaning and use of the area under a ROC curve, 1982.
    """

    title = "AUROC"

    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        rankings, entered = _rankings(store)
        n, units = int(entered.sum()), unit_count(store.clusters, entered)
        per_label = store.task == "multilabel"
        if not rankings:
            reason = "no_samples" if n == 0 else "single_class"
            return [MetricValue(self.name, Estimate.undefined(reason, n=n, n_units=units), self.direction)]
        points, values = replicate(store, stack([item.statistic for item in rankings]), context.resampler)
        parts = []
        for row, item in enumerate(rankings):
            used = torch.zeros_like(entered)
            used[item.positives] = used[item.negatives] = True
            estimate = summarise(store, values[row], float(points[row]), context.resampler, used)
            parts.append(_off_the_edge(store, context, estimate, item))
        overall = summarise(store, values.mean(0), float(points.mean()), context.resampler, entered)
        if overall.value in (0.0, 1.0):
            ends = (sum(p.low for p in parts) / len(parts), sum(p.high for p in parts) / len(parts))
            overall = replace(overall, low=ends[0], high=ends[1], method=parts[0].method, reason="")
        if len(parts) < (1 if store.positive_class else store.num_classes):
            overall = replace(overall, method=f"{overall.method}; mean of {len(parts)} of {store.num_classes} defined")
        result = [MetricValue(self.name, overall, self.direction)]
        if per_label:
            by_index = {item.index: part for item, part in zip(rankings, parts, strict=True)}
            missing = Estimate.undefined("single_class", n=n, n_units=units)
            for index in range(store.num_classes):
                estimate = by_index.get(index, missing)
                result.append(MetricValue(self.name, estimate, self.direction, context.target(index)))
        return result

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        rankings, _ = _rankings(store)
        if not rankings:
            return {}
        parts = {context.target(item.index): item.statistic for item in rankings} if store.task == "multilabel" else {}
        return {"": macro([item.statistic for item in rankings]), **parts}


def _off_the_edge(store: PredictionStore, context: Context, estimate: Estimate, item: _Ranking) -> Estimate:
    if estimate.value not in (0.0, 1.0):
        return estimate
    sides = [
        len(rows) if store.clusters is None else len(torch.unique(store.clusters[rows]))
        for rows in (item.positives, item.negatives)
    ]
    low, high = pair_bounds(estimate.value, sides[0], sides[1], context.resampler.confidence)
    return replace(estimate, low=low, high=high, method="wilson on disjoint pairs", reason="")
