"""Failure threshold: the physical amount of a shift at which accuracy, or another rate, has fallen by five points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from robustlab.core.errors import ConfigError
from robustlab.core.registry import METRICS

from .base import ConditionMetric, Conditions, ConditionStore, Context, Estimate, Metric, MetricValue
from .robustness import paired
from .stats import unit_count
from .stats.compare import comparable, discordance_interval
from .store import PredictionStore
from .thresholds import decide_labels

DROP = 0.05


@dataclass(frozen=True)
class Scale:
    """Severity to amount: between the tested severities amounts are interpolated, as they are towards severity 0.

    Args:
        severities: 0, then those tested, ascending.
        amounts: Amounts there, monotone; the first may be infinite, or NaN where it is unknown.
        unit: Their unit.
    """

    severities: tuple[float, ...]
    amounts: tuple[float, ...]
    unit: str

    @staticmethod
    def of(items: Sequence[ConditionStore]) -> Scale:
        """Return the scale of one shift; severity itself where it has no amounts, or they turn back."""
        severities = (0.0, *(item.severity for item in items))
        amounts = tuple(item.amount for item in items)
        known = (items[0].identity, *amounts) if not math.isnan(items[0].identity) else amounts
        steps = [b - a for a, b in pairwise(known)]
        monotone = all(step > 0 for step in steps) or all(step < 0 for step in steps)
        if not monotone or not all(math.isfinite(amount) for amount in amounts):
            return Scale(severities, severities, "severity")
        return Scale(severities, (items[0].identity, *amounts), items[0].unit)

    @property
    def rising(self) -> bool:
        """Whether a larger amount is the severer one."""
        first, *others = self.amounts
        return others[0] < others[1] if len(others) > 1 else not first > others[0]

    def amount(self, severity: float) -> float:
        """Return the amount at a severity up to the last one; NaN if it needs the unknown one at 0."""
        for (a, b), (low, high) in zip(pairwise(self.severities), pairwise(self.amounts), strict=True):
            if severity == b:
                return high
            if severity < b:
                if math.isinf(low):  # amounts in inverse proportion, as for a number of photons
                    return high * b / severity if severity > 0 else low
                return low + (high - low) * (severity - a) / (b - a)
        return math.nan


def crossing(severities: Sequence[float], values: Sequence[float], level: float) -> float:
    """Return the first severity at which the polygon through the values reaches a level from below; inf if never."""
    for (a, b), (low, high) in zip(pairwise(severities), pairwise(values), strict=True):
        if low < level <= high:
            return b if high == level else a + (b - a) * (level - low) / (high - low)
    return math.inf


def rate_falls(
    clean: PredictionStore, store: PredictionStore, context: Context, metric: str = "accuracy", target: str = ""
) -> tuple[Tensor, Tensor]:
    """Return (fall of a rate, one number a sample with that mean, float64 (n,); entered, bool (N,)).

    Of the accuracy of several labels with different annotation the numbers are the linear parts of the fall of the
    ratio.

    Args:
        clean: Clean predictions.
        store: Predictions of the same samples in the same order.
        context: Operating points of decisions.
        metric: Registered name.
        target: Class or label.

    Raises:
        ConfigError: The metric is no share of rows that labels decide.
    """
    item = comparable(metric)
    if clean.task != "multilabel" or metric != "accuracy":
        first, second = (item.shares(side, context).get(target, ()) for side in (clean, store))
        if type(item).shares is Metric.shares or len(first) > 1:
            raise ConfigError("failure_threshold", "a share, such as 'accuracy'", repr(metric), "Name another metric.")
        if not first or not second:
            nothing = torch.zeros_like(clean.finite)
            return nothing[nothing].to(torch.float64), nothing
        (before, rows), (after, _) = first[0], second[0]
        return before[rows].to(torch.float64) - after[rows].to(torch.float64), rows
    decided, changed = decide_labels(clean, context.frozen), decide_labels(store, context.frozen)
    asked = decided.annotated.sum(1, dtype=torch.float64)
    entered = asked > 0
    fall = ((decided.correct & decided.annotated).sum(1) - (changed.correct & changed.annotated).sum(1))[entered]
    asked = asked[entered]
    mean = fall.sum() / asked.sum()
    return mean + (fall - mean * asked) / asked.mean(), entered


@METRICS.register("failure-threshold")
class FailureThreshold(ConditionMetric):
    """Amount of a shift, in its unit, at which accuracy lies 5 points below clean; one value a shift.

    The paired fall of accuracy is interpolated linearly over severity from 0 on clean data, and its first crossing of 5
    points is mapped to the amount between the tested ones. The ends of the interval are the first crossings of the
    pointwise limits of the fall (``discordance_interval``). A fall that does not get there is NaN with the reason
    ``not_reached``; the end on the mild side is then the largest amount that is safe with that confidence. An end
    beyond the last severity is NaN with the reason ``open_interval``. Below the first severity the amount at severity 0
    is used; where that is unknown the value is NaN with the reason ``below_first_severity``, and the end on the severe
    side is the amount at which the model is known to fail. Shifts without amounts are given in severities.
    """

    title = "Failure threshold (5 points of accuracy)"
    direction = "none"
    default = True
    from_answers = True
    each_shift = True
    of: ClassVar[str] = "accuracy"

    def compute(self, conditions: Conditions, context: Context) -> list[MetricValue]:
        if self.of != "accuracy" and not conditions.clean.positive_class:
            return []
        same = paired(conditions)
        made = []
        for shift, items in same.by_shift().items():
            scale = Scale.of(items)
            estimate = failure_threshold(same.clean, items, context, scale, metric=self.of)
            made.append(MetricValue(self.name, estimate, self.direction, shift=shift, unit=scale.unit))
        return made


@METRICS.register("failure-threshold-sensitivity")
class SensitivityFailureThreshold(FailureThreshold):
    """Amount of a shift at which sensitivity, at the frozen threshold, lies 5 points below clean; of two classes.

    All else is as for ``failure-threshold``.
    """

    title = "Failure threshold (5 points of sensitivity)"
    default = False
    of = "sensitivity"


def failure_threshold(
    clean: PredictionStore,
    shifted: Sequence[ConditionStore],
    context: Context,
    scale: Scale,
    *,
    drop: float = DROP,
    metric: str = "accuracy",
    target: str = "",
) -> Estimate:
    """Return the amount at which a rate has fallen by ``drop``, as ``FailureThreshold`` says.

    Args:
        clean: Clean predictions.
        shifted: Conditions of one shift, severities ascending, of the same samples in the same order.
        context: Operating points and confidence.
        scale: Its amounts.
        drop: Fall of the rate, in (0, 1).
        metric: ``"accuracy"``, or another share of rows that labels decide, such as ``"sensitivity"``.
        target: Class or label, for metrics that have one value each.

    Raises:
        ConfigError: The metric is no such share.
    """
    curves: list[list[float]] = [[0.0], [0.0], [0.0]]
    entered = torch.zeros_like(clean.finite)
    for item in shifted:
        gains, entered = rate_falls(clean, item.store, context, metric, target)
        if len(gains) == 0:
            made = comparable(metric).compute(clean, context) if len(clean) else []
            reasons = (value.estimate.reason for value in made if value.target == target)
            return Estimate.undefined(next(reasons, "") or "no_samples", n=len(clean))
        clusters = None if clean.clusters is None else clean.clusters[entered]
        low, high = discordance_interval(gains, clusters, context.resampler.confidence)
        for curve, value in zip(curves, (float(gains.mean()), high, low), strict=True):
            curve.append(value)
    at, mild, severe = (crossing(scale.severities, curve, drop) for curve in curves)
    value, near, far = (scale.amount(severity) for severity in (at, min(mild, scale.severities[-1]), severe))
    if math.isnan(far) and math.isfinite(severe):
        far = scale.amounts[1]
    low, high = (near, far) if scale.rising else (far, near)
    note = f"; {drop:.0%} of {metric}, paired fall over {len(shifted)} severities"
    if math.isinf(at):
        reason = "not_reached"
        note += "; the end given is the amount up to which it is safe"
    elif math.isnan(value):
        reason = "below_first_severity"
    else:
        reason = "open_interval" if math.isnan(low) or math.isnan(high) else ""
    units = unit_count(clean.clusters, entered)
    return Estimate(value, low, high, int(entered.sum()), units, f"crossings of paired limits{note}", reason)
