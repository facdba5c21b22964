"""What calibration metrics look at: probabilities of events that happened or not, and the bins that they fall in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .classification import labels_of
from .store import PredictionStore

BINS = 15
_EDGE = 1e-6  # float32 logits put a probability such as 3/10 this far beside its value
_TIE = 1e-12  # float64 rounding puts equal probabilities this far apart
_ROWS = 1 << 14


@dataclass(frozen=True, eq=False)
class Forecasts:
    """Probabilities of one event and whether it happened.

    Args:
        p: float64 (N,), 0 in rows that do not enter.
        happened: bool (N,).
        entered: bool (N,), finite and annotated rows.
    """

    p: Tensor
    happened: Tensor
    entered: Tensor

    @property
    def n(self) -> Tensor:
        """int64 (), rows that enter."""
        return self.entered.sum()

    @property
    def gap(self) -> Tensor:
        """float64 (N,), p minus the event; 0 in rows that do not enter."""
        gap = self.p - self.happened.to(torch.float64)
        return gap if bool(self.entered.all()) else gap.mul_(self.entered)


def _usable(store: PredictionStore) -> Tensor:
    return torch.zeros_like(store.finite) if store.answers_only else store.finite


def forecasts(store: PredictionStore) -> list[Forecasts]:
    """Return what ECE looks at: the positive class of two, the answer's confidence of several, or every label.

    Of answers without probabilities no row enters.
    """
    if store.task == "multilabel":
        return class_forecasts(store)
    if store.positive_class:
        entered, p = _usable(store), torch.sigmoid(store.log_odds[:, 1])
        return [Forecasts(torch.where(entered, p, 0), labels_of(store) == 1, entered)]
    return [answer_forecasts(store)]


def notion(store: PredictionStore) -> str:
    """Return in words which probabilities ``forecasts`` takes of classes."""
    return "positive class" if store.positive_class else "answer's confidence"


def answer_forecasts(store: PredictionStore) -> Forecasts:
    """Return the answer's confidence, and whether the answer was right. Not for multi-label."""
    entered, (answer, sure) = _usable(store), store.answers
    return Forecasts(torch.where(entered, sure, 0), answer == labels_of(store), entered)


def class_forecasts(store: PredictionStore) -> list[Forecasts]:
    """Return the probability of every class, or of every label for multi-label."""
    labels, entered = labels_of(store), _usable(store)
    if store.task == "multilabel":
        known = entered[:, None] & (labels >= 0)
        p = torch.where(known, torch.sigmoid(store.logits.to(torch.float64)), 0).T.contiguous()
        return [Forecasts(p[k], labels[:, k] == 1, known[:, k]) for k in range(store.num_classes)]
    p = torch.empty((store.num_classes, len(store)), dtype=torch.float64, device=store.logits.device)
    for rows, powers, _ in exponentials(store):
        torch.div(powers, powers.sum(0), out=p[:, rows])
    if not bool(entered.all()):
        p.masked_fill_(~entered, 0)
    return [Forecasts(p[k], labels == k, entered) for k in range(store.num_classes)]


def exponentials(store: PredictionStore) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (rows, float64 (C, n) exp(z - max z), float64 (n,) max z), as many rows at once as stay in a core's cache.

    Classes come first, so that sums over them run along contiguous rows.
    """
    step = max(1, _ROWS * 10 // max(store.num_classes, 1))
    for start in range(0, len(store), step):
        rows = slice(start, min(start + step, len(store)))
        z = store.logits[rows].T.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        top = z.amax(0)
        yield rows, z.sub_(top).exp_(), top


def bin_index(p: Tensor, bins: int = BINS) -> Tensor:
    """Return int64 indices of equal-width bins (a, b], with 0 in the first one; the only bin rule of the library.

    A probability up to 1e-6 above an edge counts as on it, so that shares of votes (k / M), which float32 logits cannot
    hold exactly, fall in one bin.

    Args:
        p: float64 probabilities.
        bins: Number of bins.
    """
    return (p - _EDGE).mul_(bins).ceil_().to(torch.int64).sub_(1).clamp_(0, bins - 1)


def equal_mass_index(item: Forecasts, bins: int = BINS) -> Tensor:
    """Return int64 (N,) indices of bins that hold about equally many forecasts; equal probabilities are never parted.

    The target boundaries are the ranks ceil(m N / M); a group of equal probabilities goes to the bin that holds its
    middle rank. Probabilities within 1e-12 are equal.
    """
    values = item.p[item.entered]
    if not len(values):
        return torch.zeros_like(item.p, dtype=torch.int64)
    # NumPy sorts several times faster than torch on a CPU
    ordered = torch.from_numpy(np.sort(values.numpy())) if values.device.type == "cpu" else values.sort().values
    n = len(ordered)
    first = torch.cat([torch.ones_like(ordered[:1], dtype=torch.bool), ordered.diff() > _TIE]).nonzero()[:, 0]
    last = torch.cat([first[1:], first.new_tensor([n])])
    ranks = (torch.arange(1, bins + 1, device=first.device) * n + bins - 1) // bins
    # ranks count from 1: the middle one of first + 1, ..., last, doubled to stay whole
    place = torch.searchsorted(2 * ranks, first + 1 + last)
    # the upper end of every bin: the last value of the last group in it or below
    groups = torch.searchsorted(place, torch.arange(bins - 1, device=first.device), right=True)
    ends = torch.where(groups > 0, ordered[last[(groups - 1).clamp_min(0)] - 1], -torch.inf)
    return torch.searchsorted(ends, item.p).mul_(item.entered)


def binned_sums(weights: Tensor, index: Tensor, values: Tensor, bins: int) -> Tensor:
    """Return float64 (bins, b): the weighted sums of ``values`` (N,) in each bin, for weights (N, b).

    For many weights, and off the CPU, a matrix product with the one-hot bins, a few rows at a time: deterministic on
    every device.
    """
    if weights.shape[1] == 1:
        return bin_totals(index, values * weights[:, 0], bins)[:, None]
    total = weights.new_zeros((bins, weights.shape[1]))
    for start in range(0, len(index), _ROWS):
        rows = slice(start, start + _ROWS)
        table = values.new_zeros((bins, len(index[rows]))).scatter_(0, index[rows][None], values[rows][None])
        total += table @ weights[rows]
    return total


def bin_totals(index: Tensor, values: Tensor, bins: int) -> Tensor:
    """Return float64 (bins,): the sums of ``values`` (N,) in each bin, the same on every run on any device."""
    if values.device.type == "cpu" or not len(values):
        return torch.bincount(index, values, bins)
    # fixed point: whole numbers add up to one total in any order, which floats on a GPU do not; no sum leaves int64
    scale = torch.exp2(torch.floor(61 - torch.log2(values.abs().amax().clamp_min(2.0**-900) * len(values))))
    whole = torch.zeros(bins, dtype=torch.int64, device=values.device)
    whole.index_add_(0, index, (values * scale).round_().to(torch.int64))
    return whole.to(torch.float64) / scale
