"""Intervals from influence values: the infinitesimal jackknife, clustered, on a scale that respects the bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import t
from torch import Tensor

from robustlab.metrics.base import Estimate, Statistic
from robustlab.metrics.store import PredictionStore

from .bootstrap import UNBOUNDED, Bounds
from .proportions import unit_count

_ROUNDING = 1e-12  # influence values that should cancel leave so much


@dataclass(frozen=True, eq=False)
class Linear:
    """A statistic at its point, with its first-order change in every sample's weight.

    Args:
        value: The point estimate; NaN where undefined.
        influence: float64 (N,), d value / d weight at weights of 1; they sum to 0.
    """

    value: float
    influence: Tensor


def linearise(statistic: Statistic, n: int, device: torch.device | str = "cpu") -> Linear:
    """Return a statistic's value and influence values, by one pass of automatic differentiation.

    Args:
        statistic: Maps float64 weights (N, b) to (b,); differentiable, and unchanged when all weights are scaled.
        n: Number of samples.
        device: Where the statistic computes.

    References:
        Jaeckel, The infinitesimal jackknife, 1972; Efron and Stein, The jackknife estimate of variance, 1981.
    """
    with torch.enable_grad():
        weights = torch.ones((n, 1), dtype=torch.float64, device=device, requires_grad=True)
        value = statistic(weights)[0]
        (gradient,) = torch.autograd.grad(value, weights) if value.requires_grad else (torch.zeros_like(weights),)
    return Linear(float(value.detach()), gradient[:, 0].detach())


def unit_sums(influence: Tensor, clusters: Tensor | None, entered: Tensor) -> Tensor:
    """Return the influence of each independent unit, (U,): samples, or clusters with all samples of each summed.

    Args:
        influence: float64 (N,).
        clusters: int64 (N,) codes, or None for independent samples.
        entered: bool (N,), the samples that the statistic uses.
    """
    influence = influence[entered]
    if clusters is None:
        return influence
    codes, inverse = torch.unique(clusters[entered], return_inverse=True)
    return influence.new_zeros(len(codes)).index_add_(0, inverse, influence)


def spread(units: Tensor) -> tuple[float, float]:
    """Return (standard error, degrees of freedom) from the influence of independent units (U,).

    The variance is U / (U - 1) sum u^2. Its own precision gives the degrees of freedom, 2 V^2 / Var(V) with the
    observed fourth moment and at most U - 1: a few units that carry the estimate widen the interval.

    References:
        Satterthwaite, An approximate distribution of estimates of variance components, 1946.
    """
    count = len(units)
    if count < 2:
        return math.nan, math.nan
    squares = units.square()
    total = float(squares.sum())
    if not total > 0:
        return 0.0, count - 1.0
    noise = float(squares.square().sum()) - total**2 / count
    freedom = min(count - 1.0, 2 * total**2 / noise) if noise > 0 else count - 1.0
    return math.sqrt(count / (count - 1) * total), max(1.0, freedom)


def linear_interval(
    value: float, error: float, freedom: float, *, confidence: float = 0.95, bounds: Bounds = UNBOUNDED
) -> tuple[float, float]:
    """Return a Student interval: of the logit between two finite bounds, of the logarithm above one, else as it is.

    Args:
        value: Point estimate, strictly inside the bounds.
        error: Its standard error.
        freedom: Degrees of freedom.
        confidence: Coverage in (0, 1).
        bounds: Valid range of the statistic.
    """
    low, high = bounds
    half = float(t.ppf((1 + confidence) / 2, freedom)) * error
    if math.isfinite(low) and math.isfinite(high):
        share = (value - low) / (high - low)
        odds = math.log(share / (1 - share))
        half /= (high - low) * share * (1 - share)
        ends = [low + (high - low) / (1 + math.exp(min(-odds + side * half, 700.0))) for side in (1, -1)]
        return ends[0], ends[1]
    if math.isfinite(low):
        factor = math.exp(min(half / (value - low), 700.0))
        return low + (value - low) / factor, low + (value - low) * factor
    return value - half, value + half


def linear_estimate(
    store: PredictionStore,
    statistic: Statistic,
    entered: Tensor,
    *,
    confidence: float = 0.95,
    bounds: Bounds = UNBOUNDED,
    reason: str = "no_samples",
    note: str = "",
) -> Estimate:
    """Return a smooth statistic with the interval of its influence values, robust to clusters.

    Args:
        store: The predictions.
        statistic: Maps float64 weights (N, b) to (b,), differentiable.
        entered: bool (N,), the samples that the statistic uses.
        confidence: Coverage in (0, 1).
        bounds: Valid range of the statistic; decides the scale of the interval.
        reason: Why the value is undefined when it is.
        note: Added to the method text.
    """
    return estimate_of(
        store,
        linearise(statistic, len(store), store.ids.device),
        entered,
        confidence=confidence,
        bounds=bounds,
        reason=reason,
        note=note,
    )


def estimate_of(
    store: PredictionStore,
    linear: Linear,
    entered: Tensor,
    *,
    confidence: float = 0.95,
    bounds: Bounds = UNBOUNDED,
    reason: str = "no_samples",
    note: str = "",
) -> Estimate:
    """Return the estimate that a value and its influence values make; arguments as in ``linear_estimate``.

    Where no sample moves the value, as at the ends of its range, the interval is NaN with the reason ``no_variance``.
    """
    n, units = int(entered.sum()), unit_count(store.clusters, entered)
    if math.isnan(linear.value):
        return Estimate.undefined(reason, n=n, n_units=units)
    method = f"influence values over {'samples' if store.clusters is None else 'clusters'}{note}"
    error, freedom = spread(unit_sums(linear.influence, store.clusters, entered))
    if math.isnan(error):
        return Estimate(linear.value, math.nan, math.nan, n, units, method, "too_few_units")
    inside = bounds[0] < linear.value < bounds[1]
    if error <= _ROUNDING * max(1.0, abs(linear.value)) or not inside:
        return Estimate(linear.value, math.nan, math.nan, n, units, method, "no_variance")
    low, high = linear_interval(linear.value, error, freedom, confidence=confidence, bounds=bounds)
    return Estimate(linear.value, low, high, n, units, method)
