"""Metrics that are smooth functions of the sample weights: one definition gives value, interval and comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Context, Estimate, Metric, MetricValue, Statistic
from .stats import Bounds, linear_estimate, unit_count
from .store import PredictionStore


@dataclass(frozen=True, eq=False)
class Part:
    """One value of a metric.

    Args:
        statistic: Maps float64 weights (N, b) to (b,), differentiable; None where the value is undefined.
        entered: bool (N,), the samples that it uses.
        reason: Why it is undefined, or would be.
        note: Added to the method text.
        bounds: Valid range, where it is not the metric's.
    """

    statistic: Statistic | None
    entered: Tensor
    reason: str = "no_samples"
    note: str = ""
    bounds: Bounds | None = None


class SmoothMetric(Metric):
    """A metric of labelled predictions that states its statistics; the rest follows."""

    bounds: ClassVar[Bounds] = (0.0, 1.0)

    def parts(self, store: PredictionStore, context: Context) -> Mapping[str, Part]:
        """Return target to part; the target is empty for the overall value."""
        raise NotImplementedError

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        parts = self.parts(store, context)
        return {target: part.statistic for target, part in parts.items() if part.statistic is not None}

    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        return [
            MetricValue(self.name, self.estimate(store, part, context), self.direction, target)
            for target, part in self.parts(store, context).items()
        ]

    def estimate(self, store: PredictionStore, part: Part, context: Context) -> Estimate:
        """Return value and interval of one part."""
        if part.statistic is None or not bool(part.entered.any()):
            n, units = int(part.entered.sum()), unit_count(store.clusters, part.entered)
            return Estimate.undefined(part.reason if len(store) else "no_samples", n=n, n_units=units)
        return linear_estimate(
            store,
            part.statistic,
            part.entered,
            confidence=context.resampler.confidence,
            bounds=self.bounds if part.bounds is None else part.bounds,
            reason=part.reason,
            note=part.note,
        )


def everyone(store: PredictionStore) -> Tensor:
    """Return bool (N,), all True."""
    return torch.ones_like(store.finite)
