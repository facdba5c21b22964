"""Metrics: pure functions of a PredictionStore, every value with n and an interval; importing registers them.

Single metrics are asked for by name (``robustlab list metrics``). What takes arguments of its own is a function here;
intervals and tests are in ``robustlab.metrics.stats``, states for outputs too large to store in
``robustlab.metrics.states``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from robustlab.core.registry import METRICS

from . import agreement, clinical_calibration, robustness, smooth_calibration  # noqa: F401 - registers
from .base import (
    AnyMetric,
    ConditionMetric,
    Conditions,
    ConditionStore,
    Context,
    Direction,
    Estimate,
    Frozen,
    GroupMetric,
    Metric,
    MetricValue,
    Statistic,
)
from .calibration import calibration_test
from .classification import ppv_at_prevalence
from .failure_threshold import Scale, failure_threshold
from .flags import fit_flags
from .forecasts import bin_index
from .group_table import GroupRow, group_table
from .groups import GroupDifference
from .minimal_budget import Budgets, budgets_of
from .ood import full_spectrum
from .patients import aggregate_patients
from .proper_scores import BrierDecomposition, brier_decomposition
from .relative_robustness import (
    CorruptionErrors,
    condition_errors,
    corruption_error,
    effective_robustness,
    errors_over_baseline,
    relative_corruption_error,
)
from .reliability import Reliability, reliability
from .resample import Resampler
from .risk_coverage import excess_aurc, risk_coverage
from .robustness import flips, least_failing_severity
from .selective import fit_referral, referred
from .smooth import Part, SmoothMetric
from .stats import (
    MetricComparison,
    compare_metric,
    condition_verdict,
    decide,
    paired_difference,
    simultaneous,
    unit_count,
    wilson,
    worst_condition,
)
from .store import PredictionStore
from .thresholds import fit_thresholds
from .uncertainty import (
    disagreement,
    expected_entropy,
    mutual_information,
    predictive_entropy,
    reduce_members,
    variation_ratio,
)

__all__ = [
    "AnyMetric",
    "BrierDecomposition",
    "Budgets",
    "ConditionMetric",
    "ConditionStore",
    "Conditions",
    "Context",
    "CorruptionErrors",
    "Direction",
    "Estimate",
    "Frozen",
    "GroupDifference",
    "GroupMetric",
    "GroupRow",
    "Metric",
    "MetricComparison",
    "MetricValue",
    "Part",
    "PredictionStore",
    "Reliability",
    "Resampler",
    "Scale",
    "SmoothMetric",
    "Statistic",
    "aggregate_patients",
    "bin_index",
    "brier_decomposition",
    "budgets_of",
    "calibration_test",
    "compare_metric",
    "compute",
    "condition_errors",
    "condition_verdict",
    "corruption_error",
    "decide",
    "disagreement",
    "effective_robustness",
    "errors_over_baseline",
    "excess_aurc",
    "expected_entropy",
    "failure_threshold",
    "fit_flags",
    "fit_frozen",
    "fit_referral",
    "fit_thresholds",
    "flips",
    "full_spectrum",
    "group_table",
    "least_failing_severity",
    "mutual_information",
    "paired_difference",
    "ppv_at_prevalence",
    "predictive_entropy",
    "reduce_members",
    "referred",
    "relative_corruption_error",
    "reliability",
    "risk_coverage",
    "simultaneous",
    "variation_ratio",
    "wilson",
    "worst_condition",
]


def compute(store: PredictionStore, context: Context, names: Sequence[str] | None = None) -> list[MetricValue]:
    """Compute metrics of one store.

    A labelled store gets the metrics on labels; a store without labels gets the OOD metrics against
    ``context.reference``. Names of the other kind are passed over, so one list serves both.

    Args:
        store: The predictions.
        context: Resampler, operating points, reference.
        names: Registered names; None for the default set, in the order of the registry.

    Raises:
        UnknownNameError: No such metric.
    """
    if store.labels is None and context.reference is None:
        return []
    kind = "ood" if store.labels is None else "labels"
    chosen = [item for _, item in METRICS.items() if item.default] if names is None else map(METRICS.get, names)
    return [
        value
        for item in chosen
        if issubclass(item, Metric) and item.on == kind
        for value in _values(item(), store, context)
    ]


def _values(metric: Metric, store: PredictionStore, context: Context) -> list[MetricValue]:
    if store.answers_only and not metric.from_answers:
        everyone = torch.ones(len(store), dtype=torch.bool, device=store.ids.device)
        nothing = Estimate.undefined("answers_only", n=len(store), n_units=unit_count(store.clusters, everyone))
        return [MetricValue(metric.name, nothing, metric.direction)]
    return metric.compute(store, context)


def fit_frozen(store: PredictionStore, referral: float, detector: str = "") -> Frozen:
    """Fit all operating points on clean validation predictions.

    Args:
        store: Validation predictions; thresholds need labels, referral does not.
        referral: Agreed share of referred cases, in [0, 1].
        detector: Scorer that refers cases beside confidence; dropped where its scores are NaN throughout.

    Returns:
        The operating points. Answers without probabilities have none: nothing is referred, and the answer is the
        decision.
    """
    if store.answers_only:
        thresholds = None if store.labels is None else fit_thresholds(store)
        return Frozen(thresholds=thresholds, referral=referral, flags=fit_flags(store))
    sure, score = fit_referral(store, referral, detector)
    return Frozen(
        thresholds=None if store.labels is None else fit_thresholds(store),
        confidence=sure,
        detector="" if math.isnan(score) else detector,
        score=score,
        referral=referral,
        flags=fit_flags(store),
    )
