"""What a metric is: a named pure function of a PredictionStore that returns values with intervals."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from .store import PredictionStore

if TYPE_CHECKING:
    from .stats import Resampler

Direction = Literal["higher", "lower", "none"]
On = Literal["labels", "ood", "groups", "conditions", "attacks"]
Share = tuple[Tensor, Tensor]
"""Hits and rows, bool (N,) each: the share of hits among the rows."""
Statistic = Callable[[Tensor], Tensor]
"""Maps float64 sample weights (N, b) of b replicates to values (b,), NaN where undefined."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Args:
        value: The point estimate; NaN when undefined.
        low: Lower end of the 95 % interval; NaN when it cannot be estimated.
        high: Upper end.
        n: Samples that entered.
        n_units: Independent units that entered (patients, or samples).
        method: How the interval was made, e.g. ``"wilson"`` or ``"bootstrap (patients), B=1000"``.
        reason: Why value or interval is undefined, e.g. ``"single_class"``; empty when both are defined.
        effective_n: Trials of the Wilson interval of a proportion; NaN for everything else.
    """

    value: float
    low: float
    high: float
    n: int
    n_units: int
    method: str
    reason: str = ""
    effective_n: float = math.nan

    @staticmethod
    def undefined(reason: str, *, n: int = 0, n_units: int = 0) -> Estimate:
        """Return NaN with a reason."""
        return Estimate(math.nan, math.nan, math.nan, n, n_units, "none", reason)


@dataclass(frozen=True)
class MetricValue:
    """One estimate of one metric.

    Args:
        metric: Registered name.
        estimate: The number.
        direction: Which way is better.
        target: Class, label or group level, or empty.
        scorer: Detector score, or empty.
        shift: Shift that it sums up, for metrics of several conditions; empty for all shifts together.
        unit: Unit of the number, where it has one.
    """

    metric: str
    estimate: Estimate
    direction: Direction
    target: str = ""
    scorer: str = ""
    shift: str = ""
    unit: str = ""


@dataclass(frozen=True, eq=False)
class Frozen:
    """Operating points fitted on clean validation data and frozen for every condition.

    Args:
        thresholds: float64 (L,) decision thresholds on the positive probability, one a label (one for two classes), or
            None without validation data. Positive is at or above; NaN for a label that lacks a class in validation;
            empty for several classes, where the most probable one is the answer, and for answers without probabilities.
        confidence: Refer cases whose confidence, as log-odds of the answer, is at or below this value; NaN without
            validation data.
        detector: Scorer whose score refers cases too; empty without validation data.
        score: Refer cases whose score is at or above this value; NaN without validation data.
        referral: Agreed share of referred cases.
        flags: Scorer to the score at or above which an image is flagged as foreign: at most 5 % of the validation
            images are.
    """

    thresholds: Tensor | None = None
    confidence: float = math.nan
    detector: str = ""
    score: float = math.nan
    referral: float = 0.1
    flags: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Context:
    """What a metric may use besides the store.

    Args:
        resampler: Makes intervals; shared by all metrics and conditions, so differences are paired.
        frozen: Operating points.
        reference: Clean in-distribution predictions, for metrics that compare (OOD detection); None otherwise.
        class_names: Names of classes or labels.
    """

    resampler: Resampler
    frozen: Frozen = field(default_factory=Frozen)
    reference: PredictionStore | None = None
    class_names: tuple[str, ...] | None = None

    def target(self, index: int) -> str:
        """Return the name of a class or label."""
        return self.class_names[index] if self.class_names is not None else str(index)


class AnyMetric(ABC):
    """What all metrics share. They are registered under a kebab-case name; the default set is marked by ``default``.

    ``on`` says what a metric is a function of: a store with labels, an OOD store and its reference, the groups of a
    store, or the stores of several conditions. ``from_answers`` marks metrics that are right for answers without
    probabilities (``PredictionStore.answers_only``); the others are NaN there with that reason.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    direction: ClassVar[Direction] = "higher"
    default: ClassVar[bool] = False
    on: ClassVar[On] = "labels"
    from_answers: ClassVar[bool] = False


class Metric(AnyMetric):
    """A metric of one store: on labels, or of an OOD store against the clean reference."""

    smooth: ClassVar[bool] = True
    keeps_broken: ClassVar[bool] = False
    """Rows that are not finite enter, as errors or as referred; other metrics leave them out."""

    @abstractmethod
    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        """Return the values; undefined ones as NaN with a reason, an empty list where the metric does not apply."""

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        """Return target to statistic, for paired comparisons; empty where nothing is defined.

        The statistics of ``smooth`` metrics are differentiable in the weights.
        """
        del store, context
        return {}

    def shares(self, store: PredictionStore, context: Context) -> Mapping[str, Sequence[Share]]:
        """Return target to shares whose mean the metric is, of rows that labels alone decide; empty for others."""
        del store, context
        return {}

    def point(self, store: PredictionStore, context: Context) -> Mapping[str, float]:
        """Return target (for OOD metrics, scorer) to value, without intervals; empty where nothing is defined."""
        ones = torch.ones((len(store), 1), dtype=torch.float64, device=store.ids.device)
        return {target: float(made(ones)[0]) for target, made in self.statistics(store, context).items()}


class GroupMetric(AnyMetric):
    """A metric of the differences between the groups of one store."""

    on = "groups"

    @abstractmethod
    def compute(
        self, store: PredictionStore, codes: Tensor, levels: Sequence[str], context: Context
    ) -> list[MetricValue]:
        """Return the values.

        Args:
            store: Labelled predictions.
            codes: int64 (N,) group of every sample, -1 for missing.
            levels: Names of the groups.
            context: Operating points and resampler.
        """


@dataclass(frozen=True, eq=False)
class ConditionStore:
    """Predictions under one condition.

    Args:
        key: Name of the condition.
        shift: Name of the shift, the same at all its severities.
        severity: In (0, 5].
        amount: Physical amount at that severity; NaN without one.
        unit: Unit of the amount.
        store: Labelled predictions of the samples of the clean store.
        kind: ``"corruption"``, ``"attack"`` ...
        identity: Amount at severity 0, which may be infinite; NaN where unknown.
    """

    key: str
    shift: str
    severity: float
    amount: float
    unit: str
    store: PredictionStore
    kind: str = "corruption"
    identity: float = math.nan


@dataclass(frozen=True, eq=False)
class Conditions:
    """Clean predictions and those under every condition, shifts in order, severities ascending within each."""

    clean: PredictionStore
    shifted: tuple[ConditionStore, ...]

    def by_shift(self) -> dict[str, list[ConditionStore]]:
        """Return the conditions of every shift, severities ascending."""
        out: dict[str, list[ConditionStore]] = {}
        for item in sorted(self.shifted, key=lambda item: item.severity):
            out.setdefault(item.shift, []).append(item)
        return {shift: out[shift] for shift in dict.fromkeys(item.shift for item in self.shifted)}


class ConditionMetric(AnyMetric):
    """A metric of one model over several conditions."""

    on: ClassVar[On] = "conditions"  # or only on those of attacks
    each_shift: ClassVar[bool] = False  # one value a shift, attacks among them

    @abstractmethod
    def compute(self, conditions: Conditions, context: Context) -> list[MetricValue]:
        """Return the values; one a shift with ``shift`` set, or one for all of them."""
