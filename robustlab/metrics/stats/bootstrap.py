"""The bootstrap over units, and the statistics of weights that it and the linear intervals share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from robustlab.metrics.base import Estimate, Statistic
from robustlab.metrics.resample import Resampler
from robustlab.metrics.store import PredictionStore

from .proportions import unit_count

IntervalKind = Literal["percentile", "reflected"]
Bounds = tuple[float, float]

UNBOUNDED: Bounds = (-math.inf, math.inf)
_LOST_SHARE = 0.05
_DENSE = 1 << 22  # outputs whose float64 forms are made, and kept with their store, at once (32 MB each)


def interval(
    values: Tensor,
    point: float,
    kind: IntervalKind = "percentile",
    *,
    confidence: float = 0.95,
    bounds: Bounds = UNBOUNDED,
) -> tuple[float, float, str]:
    """Return (low, high, reason) from the values of all replicates.

    ``"percentile"`` takes the quantiles. ``"reflected"`` takes 2 point - quantile, for non-negative statistics such as
    ECE whose replicates carry the sampling bias twice; its interval need not hold the (biased) point.

    Args:
        values: float64 (replicates,); NaN where a replicate lost a class.
        point: The point estimate.
        kind: ``"percentile"`` or ``"reflected"``.
        confidence: Coverage in (0, 1).
        bounds: Valid range of the statistic; the ends are clipped to it.

    Returns:
        The ends and an empty reason, or NaN with ``"too_few_units"`` when more than 5 % of the replicates are NaN.
    """
    kept = values[~torch.isnan(values)]
    if len(kept) == 0 or len(kept) < (1 - _LOST_SHARE) * len(values):
        return math.nan, math.nan, "too_few_units"
    tail = (1 - confidence) / 2
    low, high = torch.quantile(kept, torch.tensor([tail, 1 - tail], dtype=kept.dtype, device=kept.device)).tolist()
    if kind == "reflected":
        low, high = 2 * point - high, 2 * point - low
    return min(max(low, bounds[0]), bounds[1]), min(max(high, bounds[0]), bounds[1]), ""


def rowwise(store: PredictionStore, function: Callable[[PredictionStore], Tensor]) -> Tensor:
    """Return ``function(store)``, whose row i depends on row i alone; large stores are worked on in blocks of rows.

    What the function derives from all outputs, in float64, then exists for one block at a time.
    """
    count = max(1, _DENSE // max(store.num_classes, 1))
    if len(store) <= count:
        return function(store)
    out = torch.empty(0)
    for start in range(0, len(store), count):
        rows = torch.arange(start, min(start + count, len(store)), device=store.ids.device)
        part = function(store.select(rows))
        if start == 0:
            out = part.new_empty((len(store), *part.shape[1:]))
        out[start : start + count] = part
    return out


def units_of(store: PredictionStore) -> Tensor:
    """Return the codes that are resampled, int64 (N,): clusters, or hashed ids without clusters."""
    return store.keys if store.clusters is None else store.clusters


def bootstrap(
    store: PredictionStore,
    statistic: Statistic,
    resampler: Resampler,
    entered: Tensor,
    *,
    kind: IntervalKind = "percentile",
    bounds: Bounds = UNBOUNDED,
    reason: str = "no_samples",
) -> Estimate:
    """Return a statistic with its bootstrap interval over units.

    Args:
        store: The predictions.
        statistic: Maps float64 (N, b) sample weights to (b,) values.
        resampler: Draws the weights.
        entered: bool (N,), the samples that the statistic uses.
        kind: See ``interval``.
        bounds: Valid range of the statistic.
        reason: Why the value is undefined when it is.
    """
    points, values = replicate(store, lambda weights: statistic(weights)[None], resampler)
    point = float(points[0])
    return summarise(store, values[0], point, resampler, entered, kind=kind, bounds=bounds, reason=reason)


def replicate(store: PredictionStore, statistic: Statistic, resampler: Resampler) -> tuple[Tensor, Tensor]:
    """Return K point estimates (K,) and their values under all replicates (K, B) of a statistic that returns (K, b)."""
    ones = torch.ones((len(store), 1), dtype=torch.float64, device=store.ids.device)
    return statistic(ones)[:, 0], resampler.values(statistic, units_of(store))


def summarise(
    store: PredictionStore,
    values: Tensor,
    point: float,
    resampler: Resampler,
    entered: Tensor,
    *,
    kind: IntervalKind = "percentile",
    bounds: Bounds = UNBOUNDED,
    reason: str = "no_samples",
) -> Estimate:
    """Return the estimate that a point and its replicates (B,) make; arguments as in ``bootstrap``."""
    n, units = int(entered.sum()), unit_count(store.clusters, entered)
    if math.isnan(point):
        return Estimate.undefined(reason, n=n, n_units=units)
    method = f"bootstrap over {_unit_name(store)}, B={resampler.replicates}"
    if kind == "reflected":
        method += ", reflected about the estimate"
    if units < 2:
        return Estimate(point, math.nan, math.nan, n, units, method, "too_few_units")
    low, high, why = interval(values, point, kind, confidence=resampler.confidence, bounds=bounds)
    return Estimate(point, low, high, n, units, method, why)


def _unit_name(store: PredictionStore) -> str:
    return "samples" if store.clusters is None else "clusters"


def ratio(numerator: Tensor, denominator: Tensor) -> Statistic:
    """Return the statistic: mean over K rows of weighted numerator / weighted denominator.

    Args:
        numerator: float64 (K, N).
        denominator: float64 (K, N).
    """
    return lambda weights: ((numerator @ weights) / (denominator @ weights)).mean(0)


def macro(parts: Sequence[Statistic]) -> Statistic:
    """Return the statistic: mean of the parts, NaN where one of them is."""
    return lambda weights: torch.stack([part(weights) for part in parts]).mean(0)


def stack(parts: Sequence[Statistic]) -> Statistic:
    """Return the statistic (K, b) that holds each of the K parts."""
    return lambda weights: torch.stack([part(weights) for part in parts])


def stratified(statistic: Statistic, strata: Tensor) -> Statistic:
    """Return the statistic with all weights scaled so that every stratum keeps its share of the samples.

    Replicates then differ as if units were drawn within each stratum, and none loses a class: where a replicate has no
    weight in a stratum at all, its samples get weight 1. The influence values of the returned statistic are those of
    stratified sampling. With clusters, give all samples of a cluster the same stratum (such as whether any is
    positive). Differences of two models are stratified as a whole.

    Args:
        statistic: Maps float64 (N, b) weights to (..., b) values.
        strata: int64 (N,) codes.
    """
    codes, inverse = torch.unique(strata, return_inverse=True)
    counts = torch.bincount(inverse, minlength=len(codes)).to(torch.float64)[:, None]

    def scaled(weights: Tensor) -> Tensor:
        totals = weights.new_zeros((len(codes), weights.shape[1])).index_add(0, inverse, weights)
        empty = totals == 0
        factor = counts / torch.where(empty, 1.0, totals)
        return statistic(torch.where(empty[inverse], 1.0, weights * factor[inverse]))

    return scaled


def cumulative(weights: Tensor) -> Tensor:
    """Return (N + 1, b): the weight of the first 0, 1, ..., N rows."""
    if weights.requires_grad:
        return torch.cat([weights.new_zeros((1, weights.shape[1])), weights.cumsum(0)])
    mass = weights.new_zeros((len(weights) + 1, weights.shape[1]))
    torch.cumsum(weights, 0, out=mass[1:])
    return mass


def rank_probability(positive: Tensor, negative: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the statistic P(positive > negative) + P(equal) / 2, the area under the ROC curve.

    Args:
        positive: float64 (P,) scores that should be larger.
        negative: float64 (M,) scores, ascending.

    Returns:
        A function of weights (P, b) and (M, b) that returns (b,); NaN where a side has no weight.
    """
    below = torch.searchsorted(negative, positive)
    through = torch.searchsorted(negative, positive, right=True)

    def statistic(positive_weights: Tensor, negative_weights: Tensor) -> Tensor:
        mass = cumulative(negative_weights)
        wins = mass[below].add_(mass[through])
        if wins.requires_grad:
            wins = wins * positive_weights
        else:
            wins.mul_(positive_weights)
        return wins.sum(0) / (2 * positive_weights.sum(0) * mass[-1])

    return statistic
