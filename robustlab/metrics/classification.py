"""Discrimination of decisions: accuracy, balanced accuracy, sensitivity, specificity and predictive values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from robustlab.core.errors import ConfigError, RangeError
from robustlab.core.registry import METRICS

from .agreement import Table
from .base import Context, Estimate, Metric, MetricValue, Share, Statistic
from .ranking import Auroc, pair_bounds
from .stats import linear_estimate, mover, proportion, ratio, unit_count
from .store import PredictionStore
from .thresholds import Calls, calls, decide_labels, fit_thresholds, labels_of

__all__ = [
    "Accuracy",
    "Auroc",
    "BalancedAccuracy",
    "NegativePredictiveValue",
    "PositivePredictiveValue",
    "Sensitivity",
    "Specificity",
    "Top3Accuracy",
    "Top5Accuracy",
    "decide_labels",
    "fit_thresholds",
    "labels_of",
    "pair_bounds",
    "ppv_at_prevalence",
]

_ROWS = 1 << 14
_CELLS = 1 << 15  # numbers that stay in a core's cache, and that torch leaves to one thread: waiting costs more


def _unit_codes(store: PredictionStore, repeat: int) -> Tensor:
    """Return the unit of each of ``repeat`` decisions a row, (N, repeat)."""
    codes = torch.arange(len(store), device=store.ids.device) if store.clusters is None else store.clusters
    return codes[:, None].expand(-1, repeat)


@dataclass(frozen=True, eq=False)
class _Rate:
    """A share of hits among some rows: a recall, a specificity, a predictive value."""

    hits: Tensor
    rows: Tensor

    @property
    def value(self) -> float:
        """The share; NaN without rows."""
        total = int(self.rows.sum())
        return int((self.hits & self.rows).sum()) / total if total else math.nan

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

    default = True
    title = "Accuracy"
    from_answers = True
    keeps_broken = True

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

    def shares(self, store: PredictionStore, context: Context) -> Mapping[str, Sequence[Share]]:
        if store.task == "multilabel":
            return {}
        return {"": [(store.predicted == labels_of(store), torch.ones_like(store.finite))]}

    def point(self, store: PredictionStore, context: Context) -> Mapping[str, float]:
        if store.task == "multilabel":
            made = decide_labels(store, context.frozen)
            return {"": _Rate(made.correct, made.annotated).value}
        right = int((store.predicted == labels_of(store)).sum())
        return {"": right / len(store) if len(store) else math.nan}


class _TopAccuracy(Metric):
    """Share of samples whose class is among the most probable few."""

    most: ClassVar[int]
    keeps_broken = True

    def _hits(self, store: PredictionStore) -> Tensor | None:
        """Return bool (N,), or None where every answer would be a hit."""
        labels = labels_of(store)
        if store.task == "multilabel" or store.num_classes <= self.most:
            return None
        out = torch.empty_like(store.finite)
        classes = torch.arange(store.num_classes, device=labels.device)[:, None]
        small = torch.uint8 if store.num_classes < 256 else torch.int64
        step = max(1, _CELLS // store.num_classes)
        for start in range(0, len(store), step):
            rows = slice(start, start + step)
            # classes first, so that the count over them runs along contiguous rows
            z, y = store.logits[rows].T.contiguous(), labels[rows][None]
            own = z.gather(0, y)
            ahead = (z > own) | ((z == own) & (classes < y))
            out[rows] = ahead.sum(0, dtype=small) < self.most
        return out & store.finite

    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        hits = self._hits(store)
        if hits is None:
            return []
        estimate = proportion(hits, store.clusters, confidence=context.resampler.confidence)
        return [MetricValue(self.name, estimate, self.direction)]

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        hits = self._hits(store)
        return {} if hits is None else {"": _Rate(hits, torch.ones_like(hits)).statistic()}

    def shares(self, store: PredictionStore, context: Context) -> Mapping[str, Sequence[Share]]:
        hits = self._hits(store)
        return {} if hits is None else {"": [(hits, torch.ones_like(hits))]}

    def point(self, store: PredictionStore, context: Context) -> Mapping[str, float]:
        hits = self._hits(store)
        return {} if hits is None else {"": int(hits.sum()) / len(hits) if len(hits) else math.nan}


@METRICS.register("top-3-accuracy")
class Top3Accuracy(_TopAccuracy):
    """Share of samples whose class is among the three most probable, first index at ties as for the answer itself.

    For more than three classes; rows that are not finite are errors.
    """

    title = "Top-3 accuracy"
    most = 3


@METRICS.register("top-5-accuracy")
class Top5Accuracy(_TopAccuracy):
    """Share of samples whose class is among the five most probable, first index at ties as for the answer itself.

    For more than five classes; rows that are not finite are errors.
    """

    title = "Top-5 accuracy"
    most = 5


@METRICS.register("balanced-accuracy")
class BalancedAccuracy(Metric):
    """Mean recall over the classes that occur; for multi-label the macro mean over labels that have both classes."""

    default = True
    title = "Balanced accuracy"
    from_answers = True
    keeps_broken = True

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
        note += _defined(len(rates) // 2 if store.task == "multilabel" else len(rates), store)
        value = sum(part.value for part in parts) / len(parts)
        entered = torch.stack([rate.rows for rate in rates]).any(0)
        n, units = int(entered.sum()), unit_count(store.clusters, entered)
        if store.task != "multilabel" and store.clusters is None:
            low, high = mover(parts, bounds=(0.0, 1.0))
            estimate = Estimate(value, low, high, n, units, f"wilson a class, combined by MOVER{note}")
        elif value in (0.0, 1.0):
            # no sample moves the value; the rates hang together, so their bounds are averaged, not pooled
            low, high = (sum(ends) / len(parts) for ends in ([p.low for p in parts], [p.high for p in parts]))
            estimate = Estimate(value, low, high, n, units, f"mean of wilson bounds{note}")
        else:
            confidence = context.resampler.confidence
            statistic = _mean_rate(rates)
            estimate = linear_estimate(
                store, statistic, entered, confidence=confidence, bounds=(0.0, 1.0), note=note, reason="single_class"
            )
            if estimate.reason == "no_variance":  # one answer to everything: no weight moves it, though the rates vary
                low, high = mover(parts, bounds=(0.0, 1.0))
                estimate = Estimate(value, low, high, n, units, f"wilson a class, combined by MOVER{note}")
        return [MetricValue(self.name, estimate, self.direction)]

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        rates, _ = self._rates(store, context)
        return {"": _mean_rate(rates)} if rates else {}

    def shares(self, store: PredictionStore, context: Context) -> Mapping[str, Sequence[Share]]:
        return {"": [(rate.hits, rate.rows) for rate in self._rates(store, context)[0]]}

    def point(self, store: PredictionStore, context: Context) -> Mapping[str, float]:
        if store.task == "multilabel":
            rates = [rate.value for rate in self._rates(store, context)[0]]
            return {"": sum(rates) / len(rates)} if rates else {}
        counts = Table(labels_of(store), store.predicted, store.num_classes).counts()
        recalls = (counts.hits / counts.truth)[counts.truth > 0]
        return {"": float(recalls.mean())} if len(recalls) else {}


def _defined(count: int, store: PredictionStore) -> str:
    return "" if count == store.num_classes else f"; mean of {count} of {store.num_classes} defined"


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


class _ConditionalRate(Metric):
    """A share among some rows of each class or label."""

    from_answers = True
    keeps_broken = True
    empty: ClassVar[str]

    def _rate(self, made: Calls) -> _Rate:
        raise NotImplementedError

    def _rates(self, store: PredictionStore, context: Context) -> Iterator[tuple[str, _Rate, str, str]]:
        """Yield (target, rate, reason if it has no rows or no threshold, method note)."""
        for made in calls(store, context):
            if made.reason:
                nothing = torch.zeros_like(made.positive)
                yield made.target, _Rate(nothing, nothing), made.reason, ""
            else:
                yield made.target, self._rate(made), self.empty, made.note

    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        return [
            MetricValue(self.name, rate.estimate(store, context, reason, note), self.direction, target)
            for target, rate, reason, note in self._rates(store, context)
        ]

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        rates = self._rates(store, context)
        return {target: rate.statistic() for target, rate, _, _ in rates if bool(rate.rows.any())}

    def _fixed_shares(self, store: PredictionStore, context: Context) -> Mapping[str, Sequence[Share]]:
        rates = self._rates(store, context)
        return {target: [(rate.hits, rate.rows)] for target, rate, _, _ in rates if bool(rate.rows.any())}

    def point(self, store: PredictionStore, context: Context) -> Mapping[str, float]:
        rates = self._rates(store, context)
        return {target: rate.value for target, rate, _, _ in rates if bool(rate.rows.any())}


@METRICS.register("sensitivity")
class Sensitivity(_ConditionalRate):
    """Share of positive cases called positive, at the frozen threshold; one-vs-rest by argmax for several classes.

    For answers without probabilities the answer given decides, and no validation data are needed.
    """

    default = True
    title = "Sensitivity"
    empty = "no_positives"

    def shares(self, store: PredictionStore, context: Context) -> Mapping[str, Sequence[Share]]:
        return self._fixed_shares(store, context)

    def _rate(self, made: Calls) -> _Rate:
        return _Rate(made.called, made.positive)


@METRICS.register("specificity")
class Specificity(_ConditionalRate):
    """Share of negative cases called negative, at the frozen threshold; one-vs-rest by argmax for several classes.

    For answers without probabilities the answer given decides, and no validation data are needed.
    """

    default = True
    title = "Specificity"
    empty = "no_negatives"

    def shares(self, store: PredictionStore, context: Context) -> Mapping[str, Sequence[Share]]:
        return self._fixed_shares(store, context)

    def _rate(self, made: Calls) -> _Rate:
        return _Rate(made.cleared, made.negative)


@METRICS.register("ppv")
class PositivePredictiveValue(_ConditionalRate):
    """Share of cases called positive that are, at the prevalence of the data; decisions as for sensitivity.

    Rows that are not finite are called neither and leave it; ``ppv_at_prevalence`` gives it at another prevalence.
    """

    title = "PPV"
    empty = "none_called_positive"

    def _rate(self, made: Calls) -> _Rate:
        return _Rate(made.positive, made.called & (made.positive | made.negative))


@METRICS.register("npv")
class NegativePredictiveValue(_ConditionalRate):
    """Share of cases called negative that are, at the prevalence of the data; decisions as for sensitivity.

    Rows that are not finite are called neither and leave it.
    """

    title = "NPV"
    empty = "none_called_negative"

    def _rate(self, made: Calls) -> _Rate:
        return _Rate(made.negative, made.cleared & (made.positive | made.negative))


def ppv_at_prevalence(store: PredictionStore, context: Context, prevalence: float, target: str = "") -> Estimate:
    """Return the positive predictive value where a share ``prevalence`` of the cases is positive.

    PPV = s q / (s q + (1 - c)(1 - q)) with the sensitivity s and specificity c of the data and the prevalence q. The
    interval is the influence-value one of its logit; where no sample moves it (c = 1 or s = 0), it spans the Wilson
    ends of both rates.

    Args:
        store: Labelled predictions.
        context: Frozen thresholds and confidence level.
        prevalence: In (0, 1).
        target: Class or label; empty for the positive class of two.

    Raises:
        RangeError: The prevalence is not in (0, 1).
        ConfigError: No such class or label.
    """
    if not 0 < prevalence < 1:
        raise RangeError("ppv_at_prevalence", "prevalence in (0, 1)", f"{prevalence}", "Give a share, such as 0.05.")
    found = {made.target: made for made in calls(store, context)}
    if target not in found:
        have = ", ".join(map(repr, found))
        raise ConfigError("ppv_at_prevalence", f"target= one of {have}", repr(target), "Name the class or label.")
    made = found[target]
    entered = made.positive | made.negative
    reason = made.reason or ("" if bool(made.positive.any()) else "no_positives")
    reason = reason or ("" if bool(made.negative.any()) else "no_negatives")
    if reason:
        n, units = int(entered.sum()), unit_count(store.clusters, entered)
        return Estimate.undefined(reason if n else "no_samples", n=n, n_units=units)
    hits, clear = _Rate(made.called, made.positive), _Rate(made.cleared, made.negative)
    sensitivity, specificity = hits.statistic(), clear.statistic()

    def statistic(weights: Tensor) -> Tensor:
        true = sensitivity(weights) * prevalence
        return true / (true + (1 - specificity(weights)) * (1 - prevalence))

    note = f"; at prevalence {prevalence:g}{made.note}"
    confidence = context.resampler.confidence
    estimate = linear_estimate(
        store, statistic, entered, confidence=confidence, bounds=(0.0, 1.0), reason="none_called_positive", note=note
    )
    if estimate.reason != "no_variance":
        return estimate
    rates = [rate.estimate(store, context, "") for rate in (hits, clear)]
    low, high = (
        s * prevalence / (s * prevalence + (1 - c) * (1 - prevalence)) if s > 0 else 0.0
        for s, c in ((rates[0].low, rates[1].low), (rates[0].high, rates[1].high))
    )
    return replace(estimate, low=low, high=high, method=f"wilson ends of both rates{note}", reason="")
