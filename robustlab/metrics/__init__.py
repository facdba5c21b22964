"""Metrics: pure functions of a PredictionStore, every value with n and an interval; importing registers them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from robustlab.core.registry import METRICS

from .base import Context, Direction, Estimate, Frozen, Metric, MetricValue, Statistic
from .calibration import (
    Brier,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    NullCalibrationError,
    Reliability,
    bin_index,
    reliability,
)
from .classification import Accuracy, Auroc, BalancedAccuracy, Sensitivity, Specificity, fit_thresholds
from .ood import Fpr95IdPositive, Fpr95OodPositive, OodAuroc
from .resample import Resampler
from .selective import ReferredShare, SilentFailureRate, fit_referral, referred
from .stats import (
    Proportion,
    condition_verdict,
    decide,
    effective_count,
    interval,
    paired_difference,
    proportion,
    unit_count,
    wilson,
    worst_of,
)
from .store import PredictionStore

__all__ = [
    "Accuracy",
    "Auroc",
    "BalancedAccuracy",
    "Brier",
    "Context",
    "Direction",
    "Estimate",
    "ExpectedCalibrationError",
    "Fpr95IdPositive",
    "Fpr95OodPositive",
    "Frozen",
    "Metric",
    "MetricValue",
    "NegativeLogLikelihood",
    "NullCalibrationError",
    "OodAuroc",
    "PredictionStore",
    "Proportion",
    "ReferredShare",
    "Reliability",
    "Resampler",
    "Sensitivity",
    "SilentFailureRate",
    "Specificity",
    "Statistic",
    "bin_index",
    "compute",
    "condition_verdict",
    "decide",
    "effective_count",
    "fit_frozen",
    "fit_referral",
    "fit_thresholds",
    "interval",
    "paired_difference",
    "proportion",
    "referred",
    "reliability",
    "wilson",
    "worst_of",
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
    return [value for item in chosen if item.on == kind for value in _values(item(), store, context)]


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
        return Frozen(thresholds=None if store.labels is None else fit_thresholds(store), referral=referral)
    sure, score = fit_referral(store, referral, detector)
    return Frozen(
        thresholds=None if store.labels is None else fit_thresholds(store),
        confidence=sure,
        detector="" if math.isnan(score) else detector,
        score=score,
        referral=referral,
    )
