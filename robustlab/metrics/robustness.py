"""Robustness of one model over several conditions: errors, curves over severity, flips and per-sample failures.

Aggregation has one order: the metric of each condition, its mean over the severities of a shift, the mean over shifts.
Predictions of different conditions are never pooled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from robustlab.core.registry import METRICS

from .base import ConditionMetric, Conditions, ConditionStore, Context, Estimate, MetricValue
from .selective import wrong_answers
from .smooth import everyone
from .stats import Bounds, Linear, estimate_of, linearise, proportion, worst_condition
from .stats.compare import comparable, matched, paired_difference, same_outputs
from .store import PredictionStore
from .thresholds import decide_labels

_ROUNDING = 1e-12

Coefficients = Callable[[Sequence[float]], tuple[float, Sequence[float]]]
"""Maps the severities of a shift to the coefficients of the clean value and of the value at each severity."""


def paired(conditions: Conditions) -> Conditions:
    """Return the conditions with all samples in the order of the clean store, and its clusters.

    Raises:
        ConfigError: The samples of a condition are not those of the clean store.
        LabelError: Their labels differ.
    """
    clean = conditions.clean
    return Conditions(clean, tuple(replace(item, store=_match(clean, item.store)) for item in conditions.shifted))


def _match(clean: PredictionStore, store: PredictionStore) -> PredictionStore:
    in_order = clean.pseudonyms == store.pseudonyms and torch.equal(clean.ids, store.ids)
    if in_order and clean.labels is not None and store.labels is not None and torch.equal(clean.labels, store.labels):
        return replace(store, clusters=clean.clusters)
    return matched(clean, store)


def _linear(store: PredictionStore, metric: str, context: Context) -> Linear:
    item = comparable(metric)
    statistic = None if store.answers_only and not item.from_answers else item.statistics(store, context).get("")
    if statistic is None:
        return Linear(math.nan, torch.zeros(len(store), dtype=torch.float64, device=store.ids.device))
    return linearise(statistic, len(store), store.ids.device)


def shift_values(
    conditions: Conditions, metric: str, context: Context, coefficients: Coefficients
) -> dict[str, Linear]:
    """Return, for every shift, a linear combination of a metric's values on clean data and at each severity."""
    clean = _linear(conditions.clean, metric, context)
    found = {}
    for shift, items in conditions.by_shift().items():
        first, others = coefficients([item.severity for item in items])
        value, influence = (first * clean.value if first else 0.0), first * clean.influence
        for item, share in zip(items, others, strict=True):
            part = _linear(item.store, metric, context)
            value, influence = value + share * part.value, influence + share * part.influence
        found[shift] = Linear(value, influence)
    return found


def mean_of(parts: Sequence[Linear]) -> Linear:
    """Return the mean of several values with their influence values."""
    return Linear(fmean(part.value for part in parts), torch.stack([part.influence for part in parts]).mean(0))


def _without_rounding(part: Linear) -> Linear:
    """Return a value that is whole, and influence that is nothing, without the roundings of their sums."""
    value, influence = part.value, part.influence
    if math.isfinite(value) and abs(value - round(value)) < _ROUNDING:
        value = float(round(value))
    if len(influence) and float(influence.abs().amax()) * len(influence) < _ROUNDING:
        influence = torch.zeros_like(influence)
    return Linear(value, influence)


def severity_mean(severities: Sequence[float]) -> tuple[float, Sequence[float]]:
    """Return the coefficients of the mean over severities."""
    return 0.0, [1 / len(severities)] * len(severities)


def severity_rise(severities: Sequence[float]) -> tuple[float, Sequence[float]]:
    """Return the coefficients of the mean over severities minus the clean value."""
    return -1.0, [1 / len(severities)] * len(severities)


def _trapezoid(severities: Sequence[float]) -> tuple[float, Sequence[float]]:
    at = [0.0, *severities]
    last = len(severities)
    ends = [(at[max(i - 1, 0)], at[min(i + 1, last)]) for i in range(last + 1)]
    shares = [(right - left) / (2 * at[-1]) for left, right in ends]
    return shares[0], shares[1:]


class _OverShifts(ConditionMetric):
    """A linear combination of a metric over severities, for every shift and as a mean over shifts."""

    from_answers = True
    of: ClassVar[str]
    coefficients: ClassVar[Coefficients]
    bounds: ClassVar[Bounds] = (0.0, 1.0)
    error: ClassVar[bool] = True
    """The value is 1 - metric, or the fall of the metric."""
    overall: ClassVar[bool] = True

    def compute(self, conditions: Conditions, context: Context) -> list[MetricValue]:
        if not conditions.shifted:
            return []
        same = paired(conditions)
        found = shift_values(same, self.of, context, type(self).coefficients)
        shifts = same.by_shift()
        parts = [(shift, shifts[shift], part, "") for shift, part in found.items()]
        if self.overall:
            parts.insert(0, ("", list(same.shifted), mean_of(list(found.values())), f" of {len(found)} shifts"))
        return [
            MetricValue(
                self.name,
                self._estimate(same.clean, items, part, context, f"; {len(items)} conditions{note}"),
                self.direction,
                shift=shift,
            )
            for shift, items, part, note in parts
        ]

    def _estimate(
        self, clean: PredictionStore, items: Sequence[ConditionStore], part: Linear, context: Context, note: str
    ) -> Estimate:
        confidence = context.resampler.confidence
        if self.error:
            part = Linear((1.0 if self.bounds[0] == 0 else 0.0) - part.value, -part.influence)
        part = _without_rounding(part)
        reason = "no_samples" if len(clean) == 0 else "single_class"
        made = estimate_of(
            clean, part, everyone(clean), confidence=confidence, bounds=self.bounds, note=note, reason=reason
        )
        if made.reason != "no_variance":
            return made
        if self.bounds[0] < 0:
            # no condition moved the metric: every one has the interval of the first, and so has their mean
            each = paired_difference(clean, items[0].store, self.of, context)
            if not all(same_outputs(clean, item.store) for item in items) and each.value == part.value == 0:
                return replace(made, low=-each.high, high=-each.low, method=f"{each.method}{note}", reason="")
            if all(same_outputs(clean, item.store) for item in items):
                return replace(made, low=0.0, high=0.0, method=f"identical predictions{note}", reason="")
            return made
        if part.value not in self.bounds:
            return made
        # every condition is all right, or all wrong: each has the same interval, and so has their mean
        each = comparable(self.of).compute(items[0].store, context)[0].estimate
        low, high = (1 - each.high, 1 - each.low) if self.error else (each.low, each.high)
        return replace(made, low=low, high=high, method=f"{each.method}{note}", reason="")


@METRICS.register("mean-corruption-error")
class MeanCorruptionError(_OverShifts):
    """Unnormalised mCE: mean over shifts of the mean over severities of 1 - accuracy; one value a shift as well.

    References:
        Hendrycks and Dietterich, Benchmarking neural network robustness to common corruptions and perturbations, 2019,
        arXiv:1903.12261.
    """

    title = "Mean corruption error"
    direction = "lower"
    of = "accuracy"
    coefficients = severity_mean


@METRICS.register("mean-corruption-error-balanced")
class BalancedMeanCorruptionError(MeanCorruptionError):
    """``mean-corruption-error`` of 1 - balanced accuracy: a shift that destroys a rare class alone is seen.

    References:
        Di Salvo, Doerrich and Ledig, MedMNIST-C: comprehensive benchmark and improved classifier robustness by
        simulating realistic image corruptions, 2024, arXiv:2406.17536.
    """

    title = "Mean balanced corruption error"
    of = "balanced-accuracy"


@METRICS.register("mean-corruption-error-relative")
class RelativeMeanCorruptionError(MeanCorruptionError):
    """Degradation: ``mean-corruption-error`` minus the clean error of the same samples, paired."""

    title = "Rise of the corruption error"
    coefficients = severity_rise
    bounds = (-math.inf, math.inf)


@METRICS.register("mean-corruption-error-relative-balanced")
class RelativeBalancedMeanCorruptionError(RelativeMeanCorruptionError):
    """``mean-corruption-error-balanced`` minus the clean balanced error of the same samples, paired."""

    title = "Rise of the balanced corruption error"
    of = "balanced-accuracy"


@METRICS.register("severity-area")
class SeverityArea(_OverShifts):
    """Area under accuracy over severity, by trapezoids from clean (0) to the largest severity, divided by that."""

    title = "Area under accuracy over severity"
    of = "accuracy"
    coefficients = _trapezoid
    error = False
    overall = False


@METRICS.register("worst-condition")
class WorstCondition(ConditionMetric):
    """Accuracy under the worst of all conditions, which is the target; corrected for having been picked."""

    title = "Accuracy under the worst condition"
    from_answers = True

    def compute(self, conditions: Conditions, context: Context) -> list[MetricValue]:
        if not conditions.shifted:
            return []
        stores = {item.key: item.store for item in paired(conditions).shifted}
        key, estimate = worst_condition(stores, "accuracy", context)
        return [MetricValue(self.name, estimate, self.direction, target=key)]


@METRICS.register("all-conditions-accuracy")
class AllConditionsAccuracy(ConditionMetric):
    """Share of samples whose answer is right on clean data and under every condition.

    For multi-label an answer is right if all annotated labels are.
    """

    title = "Right under all conditions"
    from_answers = True

    def compute(self, conditions: Conditions, context: Context) -> list[MetricValue]:
        if not conditions.shifted:
            return []
        same = paired(conditions)
        wrong, entered = wrong_answers(same.clean, context.frozen)
        for item in same.shifted:
            wrong = wrong | wrong_answers(item.store, context.frozen)[0]
        clusters = None if same.clean.clusters is None else same.clean.clusters[entered]
        note = f"; clean and {len(same.shifted)} conditions"
        estimate = proportion(~wrong[entered], clusters, confidence=context.resampler.confidence, note=note)
        return [MetricValue(self.name, estimate, self.direction)]


def _bounded_mean(
    store: PredictionStore, values: Tensor, entered: Tensor, context: Context, *, top: float = 1.0, note: str = ""
) -> Estimate:
    """Return the mean of values (N,) in [0, top]; where all are 0 or all are top, Wilson's interval of that share."""
    shares = values[entered] / top
    clusters = None if store.clusters is None else store.clusters[entered]
    confidence = context.resampler.confidence
    if len(shares) == 0 or bool(((shares == 0) | (shares == 1)).all()):
        made = proportion(shares, clusters, confidence=confidence, note=note)
        if top == 1:
            return made
        return replace(made, value=made.value * top, low=made.low * top, high=made.high * top, effective_n=math.nan)
    mean = values[entered].mean()
    influence = torch.where(entered, (values - mean) / len(shares), 0.0)
    linear = Linear(float(mean), influence)
    return estimate_of(store, linear, entered, confidence=confidence, bounds=(0.0, top), note=note)


def flips(clean: PredictionStore, store: PredictionStore, context: Context) -> Tensor:
    """Return float64 (N,), 1 where the answer differs from the clean one; for multi-label the share of labels.

    Decisions on labels are made at the frozen thresholds (0.5 without). No labels are needed. A row that is not finite
    has no answer: it differs from any answer, and not from another such row.

    Args:
        clean: Clean predictions.
        store: Predictions of the same samples in the same order.
        context: Operating points.
    """
    if clean.task != "multilabel":
        return (clean.predicted != store.predicted).to(torch.float64)
    first, second = (_called(item, context) for item in (clean, store))
    return (first != second).to(torch.float64).mean(1)


def _called(store: PredictionStore, context: Context) -> Tensor:
    """Return int64 (N, L), 1 for positive, 0 for negative, -1 in rows that are not finite."""
    # the decision on a label is right for a label of 1 exactly where it is positive
    made = decide_labels(replace(store, labels=torch.ones_like(store.logits, dtype=torch.int64)), context.frozen)
    return torch.where(store.finite[:, None], made.correct.to(torch.int64), -1)


@METRICS.register("flip-rate")
class FlipRate(ConditionMetric):
    """Share of samples whose answer differs from the clean one: mean over severities, then over shifts.

    One value a shift as well. No labels are needed.
    """

    title = "Answers that flip"
    direction = "lower"
    from_answers = True

    def compute(self, conditions: Conditions, context: Context) -> list[MetricValue]:
        if not conditions.shifted:
            return []
        same = paired(conditions)
        found = {
            shift: torch.stack([flips(same.clean, item.store, context) for item in items]).mean(0)
            for shift, items in same.by_shift().items()
        }
        made = {"": torch.stack(list(found.values())).mean(0)} | found
        entered = everyone(same.clean)
        return [
            MetricValue(self.name, _bounded_mean(same.clean, values, entered, context), self.direction, shift=shift)
            for shift, values in made.items()
        ]


def least_failing_severity(clean: PredictionStore, shifted: Sequence[ConditionStore], context: Context) -> Tensor:
    """Return float64 (N,), the smallest severity of one shift at which the answer is wrong; 0 if it is on clean data.

    NaN where it is right at all severities, and for multi-label rows without annotation, of which any wrong label
    counts.

    Args:
        clean: Clean predictions.
        shifted: Conditions of one shift, in any order, of the same samples in the same order.
        context: Operating points.
    """
    wrong, entered = wrong_answers(clean, context.frozen)
    found = torch.where(wrong & entered, 0.0, torch.nan).to(torch.float64)
    for item in sorted(shifted, key=lambda item: item.severity):
        now = wrong_answers(item.store, context.frozen)[0] & entered
        found = torch.where(now & torch.isnan(found), item.severity, found)
    return found


@METRICS.register("least-failing-severity")
class LeastFailingSeverity(ConditionMetric):
    """Mean over samples of the smallest severity at which the answer is wrong, one value a shift.

    A restricted mean: 0 where the clean answer is wrong, the largest severity where none is; the method text gives the
    share of the latter.
    """

    title = "Least failing severity"
    from_answers = True
    each_shift = True

    def compute(self, conditions: Conditions, context: Context) -> list[MetricValue]:
        same = paired(conditions)
        made = []
        for shift, items in same.by_shift().items():
            first = least_failing_severity(same.clean, items, context)
            entered, top = wrong_answers(same.clean, context.frozen)[1], items[-1].severity
            never = torch.isnan(first[entered]).to(torch.float64).mean()
            note = f"; {float(never):.3g} never fail, counted as {top:g}"
            values = torch.nan_to_num(first, nan=top)
            estimate = _bounded_mean(same.clean, values, entered, context, top=top, note=note)
            made.append(MetricValue(self.name, estimate, self.direction, shift=shift, unit="severity"))
        return made
