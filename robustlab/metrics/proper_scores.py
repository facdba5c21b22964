"""Proper scores: NLL, the Brier score and its exact decomposition over bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from robustlab.core.registry import METRICS

from .base import Context
from .binned import Binned, Surrogate, square_factor, unit_codes
from .classification import labels_of
from .forecasts import BINS, bin_index, binned_sums, class_forecasts, exponentials
from .smooth import Part, SmoothMetric
from .stats import Bounds, ratio
from .store import PredictionStore


def _annotated(store: PredictionStore) -> Tensor:
    """Return bool (N, 1), or (N, L) for multi-label: decisions that can be scored."""
    finite = store.finite[:, None]
    return finite & (labels_of(store) >= 0) if store.task == "multilabel" else finite


def _mean_loss(store: PredictionStore, losses: Tensor, bounds: Bounds, context: Context) -> Mapping[str, Part]:
    """Return the mean loss (N,); for multi-label (N, L) of every label over its annotated rows, and their mean."""
    entered = _annotated(store)
    losses = losses if losses.ndim == 2 else losses[:, None]
    used = entered.any(0)
    rows = entered.any(1)
    if not bool(entered.all()):
        losses = torch.where(entered, losses, 0)
    top, mass = losses.T.contiguous(), entered.T.to(torch.float64)
    whole = ratio(top[used], mass[used]) if bool(used.any()) else None
    out = {"": Part(whole, rows, note=defined(int(used.sum()), len(used)), bounds=bounds)}
    for k, some in enumerate(used.tolist() if store.task == "multilabel" else ()):
        statistic = ratio(top[k : k + 1], mass[k : k + 1]) if some else None
        out[context.target(k)] = Part(statistic, entered[:, k], bounds=bounds)
    return out


def defined(count: int, total: int) -> str:
    """Return what the method text says of labels that were left out."""
    return "" if count == total else f"; mean of {count} of {total} defined"


@METRICS.register("nll")
class NegativeLogLikelihood(SmoothMetric):
    """Mean of -log p(label) in nats, from logits in float64; for multi-label the mean over labels."""

    title = "NLL"
    direction = "lower"
    bounds = (0.0, float("inf"))

    def parts(self, store: PredictionStore, context: Context) -> Mapping[str, Part]:
        labels = labels_of(store)
        if store.task == "multilabel":
            # log(1 - sigmoid(z)) = logsigmoid(-z)
            losses = -functional.logsigmoid(torch.where(labels == 1, 1, -1) * store.logits.to(torch.float64))
            return _mean_loss(store, losses, self.bounds, context)
        losses = torch.empty(len(store), dtype=torch.float64, device=store.logits.device)
        for rows, powers, top in exponentials(store):
            true = store.logits[rows].gather(1, labels[rows, None])[:, 0]
            losses[rows] = torch.log(powers.sum(0)) + (top - true)
        return _mean_loss(store, losses, self.bounds, context)


@METRICS.register("brier")
class Brier(SmoothMetric):
    """Mean of sum_k (p_k - y_k)^2, in [0, 2]; for multi-label the mean over labels of (p - y)^2, in [0, 1].

    References:
        Brier, Verification of forecasts expressed in terms of probability, 1950.
    """

    default = True
    title = "Brier score"
    direction = "lower"

    def parts(self, store: PredictionStore, context: Context) -> Mapping[str, Part]:
        labels = labels_of(store)
        if store.task == "multilabel":
            losses = (torch.sigmoid(store.logits.to(torch.float64)) - (labels == 1).to(torch.float64)).square()
            return _mean_loss(store, losses, (0.0, 1.0), context)
        losses = torch.empty(len(store), dtype=torch.float64, device=store.logits.device)
        for rows, powers, _ in exponentials(store):
            p = powers.div_(powers.sum(0))
            truth = labels[None, rows]
            p.scatter_(0, truth, p.gather(0, truth).sub_(1))
            torch.sum(p.square_(), 0, out=losses[rows])
        return _mean_loss(store, losses, (0.0, 2.0), context)


@dataclass(frozen=True, eq=False)
class BrierDecomposition:
    """brier = reliability - resolution + uncertainty + within_variance - within_covariance, exactly.

    Args:
        brier: The score, as ``brier`` reports it.
        reliability: sum_m (n_m / N) (mean p - frequency)^2; 0 is best.
        resolution: sum_m (n_m / N) (frequency - prevalence)^2; larger is better.
        uncertainty: prevalence (1 - prevalence).
        within_variance: sum_m (n_m / N) var_m(p).
        within_covariance: 2 sum_m (n_m / N) cov_m(p, y).
    """

    brier: float
    reliability: float
    resolution: float
    uncertainty: float
    within_variance: float
    within_covariance: float


def brier_decomposition(store: PredictionStore, bins: int = BINS) -> BrierDecomposition:
    """Return the parts of the Brier score over equal-width bins, added over classes, or averaged over labels.

    Args:
        store: Labelled predictions; NaN throughout where none can be scored.
        bins: Number of bins.

    References:
        Murphy, A new vector partition of the probability score, 1973; Stephenson, Coelho and Jolliffe, Two extra
        components in the Brier score decomposition, 2008.
    """
    made = []
    for item in class_forecasts(store):
        index, mass = bin_index(item.p, bins), item.entered.to(torch.float64)[:, None]
        happened = item.happened.to(torch.float64)
        ones = torch.ones_like(happened)
        n, p, y, pp, py = (
            binned_sums(mass, index, values, bins)[:, 0]
            for values in (ones, item.p, happened, item.p.square(), item.p * happened)
        )
        total, size = n.sum(), n.clamp_min(1)
        base = y.sum() / total
        parts = [
            pp.sum() - 2 * py.sum() + y.sum(),
            ((p - y).square() / size).sum(),
            (n * (y / size - base).square()).sum(),
            base * (1 - base) * total,
            (pp - p.square() / size).sum(),
            2 * (py - p * y / size).sum(),
        ]
        made.append(torch.stack(parts) / total)
    table = torch.stack(made)
    whole = table.nanmean(0) if store.task == "multilabel" else table.sum(0)
    return BrierDecomposition(*whole.tolist())


class _BrierPart(SmoothMetric):
    """A part of the decomposition over 15 equal-width bins, added over classes or averaged over labels."""

    def parts(self, store: PredictionStore, context: Context) -> Mapping[str, Part]:
        units = unit_codes(store.clusters)
        items = [Binned.equal_width(item, units) for item in class_forecasts(store)]
        used = [item for item in items if bool(item.item.entered.any())]
        rows = _annotated(store).any(1)
        if not used:
            return {"": Part(None, rows)}
        scale = 1 / len(used) if store.task == "multilabel" else 1.0
        statistic = Surrogate(
            lambda weights: scale * torch.stack([self.value(item, weights) for item in used]).sum(0),
            lambda: scale * torch.stack([self.influence(item) for item in used]).sum(0),
        )
        note = self.note(used, scale) + defined(len(used), len(items))
        return {"": Part(statistic, rows, note=note, bounds=(0.0, 1.0 if store.task == "multilabel" else 2.0))}

    def value(self, item: Binned, weights: Tensor) -> Tensor:
        """Return (b,), the part of one class."""
        raise NotImplementedError

    def influence(self, item: Binned) -> Tensor:
        """Return (N,), its influence values."""
        raise NotImplementedError

    def note(self, used: Sequence[Binned], scale: float) -> str:
        """Return what the method text says besides."""
        del used, scale
        return ""


def _shares(item: Binned, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return ((M, b) weight of each bin, at least 1e-300, (b,) weight of all)."""
    count = binned_sums(weights, item.index, item.mass, item.bins)
    return count.clamp_min(1e-300), count.sum(0)


@METRICS.register("brier-reliability")
class BrierReliability(_BrierPart):
    """Miscalibration part of the Brier score: sum_m (n_m / N) (mean p - frequency)^2, over classes.

    The interval covers the expected value at this n, which is sum_m V_m / (n_m N), V_m the sum of p (1 - p), for a
    calibrated model; the method text gives it.
    """

    title = "Brier score: reliability"
    direction = "lower"

    def value(self, item: Binned, weights: Tensor) -> Tensor:
        count, total = _shares(item, weights)
        return (binned_sums(weights, item.index, item.gap, item.bins).square() / count).sum(0) / total

    def influence(self, item: Binned) -> Tensor:
        return squared_influence(item)

    def note(self, used: Sequence[Binned], scale: float) -> str:
        null = [(item.null_variance / item.counts.clamp_min(1)).sum() / item.item.n for item in used]
        return f"; expected {scale * float(torch.stack(null).sum()):.3g} if perfectly calibrated"


def squared_influence(item: Binned) -> Tensor:
    """Return (N,), the influence values of sum_m D_m^2 / (n_m N)."""
    size = item.counts.clamp_min(1)
    mean = item.sums / size
    rest = item.gap - mean[item.index] * item.mass
    variance = item.spread(rest)
    # around the bin's mean gap d, D^2 / n moves by 2 d (r - d) + d^2; the noise in d^2 does not grow with n
    slope = square_factor(item.sums, variance, item.shrinkage) / size
    level = item.shrinkage * mean.square()
    moved = slope[item.index] * rest + level[item.index] * item.mass
    return (moved - item.mass * (moved.sum() / item.item.n)) / item.item.n


@METRICS.register("brier-resolution")
class BrierResolution(_BrierPart):
    """Discrimination part of the Brier score: sum_m (n_m / N) (frequency - prevalence)^2, over classes."""

    title = "Brier score: resolution"

    def value(self, item: Binned, weights: Tensor) -> Tensor:
        count, total = _shares(item, weights)
        events = binned_sums(weights, item.index, item.item.happened * item.mass, item.bins)
        return (events.square() / count).sum(0) / total - (events.sum(0) / total).square()

    def influence(self, item: Binned) -> Tensor:
        n, size = item.item.n, item.counts.clamp_min(1)
        happened = item.item.happened * item.mass
        rate = item.total(happened) / size
        base = happened.sum() / n
        value = (rate.square() * item.counts).sum() / n - base.square()
        apart = (rate - base)[item.index]
        moved = 2 * apart * (happened - rate[item.index]) + apart.square()
        return item.mass * (moved - value) / n
