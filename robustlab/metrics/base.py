"""What a metric is: a named pure function of a PredictionStore that returns values with intervals."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from .store import PredictionStore

if TYPE_CHECKING:
    from .stats import Resampler

Direction = Literal["higher", "lower", "none"]
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
    """One estimate of one metric: for a class or label (``target``) or for a scorer."""

    metric: str
    estimate: Estimate
    direction: Direction
    target: str = ""
    scorer: str = ""


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
    """

    thresholds: Tensor | None = None
    confidence: float = math.nan
    detector: str = ""
    score: float = math.nan
    referral: float = 0.1


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


class Metric(ABC):
    """A metric of one store. Registered under a kebab-case name; the default set is marked by ``default``.

    ``from_answers`` marks metrics that are right for answers without probabilities (``PredictionStore.answers_only``);
    ``robustlab.metrics.compute`` reports the others as NaN with that reason.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    direction: ClassVar[Direction] = "higher"
    default: ClassVar[bool] = True
    on: ClassVar[Literal["labels", "ood"]] = "labels"
    from_answers: ClassVar[bool] = False

    @abstractmethod
    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        """Return the values; undefined ones as NaN with a reason, an empty list where the metric does not apply."""

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        """Return target to statistic, for paired comparisons; empty where nothing is defined."""
        del store, context
        return {}
