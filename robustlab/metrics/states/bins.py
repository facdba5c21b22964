"""Sums over probabilities in equal-width bins: calibration errors, reliability curve, Brier score and its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustlab.metrics.forecasts import BINS, bin_index

from .base import UNIT, Places, State, blocks, check_rows, columns, zeros

_SLACK = 1e-6  # float32 softmax, or a mean of them, may end this far outside [0, 1]


@dataclass(frozen=True, eq=False)
class BrierParts:
    """The exact decomposition Brier = reliability - resolution + uncertainty + within_variance - within_covariance.

    All are float64 (G, C). The last two vanish where the probabilities of a bin are one value.

    References:
        Murphy, A new vector partition of the probability score, 1973; Stephenson, Coelho and Jolliffe, Two extra
        components in the Brier score decomposition, 2008.
    """

    reliability: Tensor
    resolution: Tensor
    uncertainty: Tensor
    within_variance: Tensor
    within_covariance: Tensor


@dataclass(eq=False, kw_only=True)
class Bins(State):
    """Counts and sums of the probabilities of an event in the bins of ``bin_index``, apart for both outcomes.

    Sums hold round(2^32 p) and round(2^32 p^2): a value to 1.2e-10, at most 2^31 - 1 rows.

    Args:
        counts: int64 (G, C, M, 2), forecasts; the last index is the outcome.
        p: int64 (G, C, M, 2), sums of p in fixed point.
        squares: int64 (G, C, M, 2), sums of p^2 in fixed point.
        refused: int64 (), probabilities, events or groups outside their range.
        rows: Rows seen.
    """

    counts: Tensor
    p: Tensor
    squares: Tensor
    sums: ClassVar[tuple[str, ...]] = ("counts", "p", "squares")

    @staticmethod
    def empty(bins: int = BINS, *, channels: int = 1, groups: int = 1, device: torch.device | str = "cpu") -> Bins:
        """Return a state without rows."""
        counts, p, squares = (zeros((groups, channels, bins, 2), device) for _ in range(3))
        return Bins(counts=counts, p=p, squares=squares, refused=zeros((), device))

    def update(self, p: Tensor, happened: Tensor, groups: Tensor | None = None) -> None:
        """Add rows.

        Args:
            p: Floating (N,) or (N, C) probabilities in [0, 1]; NaN does not enter.
            happened: bool or integer of the same shape, 1 where the event happened, 0 where not; -1 does not enter.
            groups: int64 (N,) in [0, G), -1 for rows that do not enter; group 0 without it.
        """
        count, channels, bins, _ = self.counts.shape
        p, happened = columns("Bins", p, happened, channels)
        check_rows("Bins", len(p), groups)
        self.count_rows(len(p))
        first = torch.arange(channels, device=p.device) * bins
        for block in blocks(len(p), channels, p.device):
            given, y = p[block].to(torch.float64), happened[block].to(torch.int64)
            value = given.nan_to_num().clamp_(0, 1)
            refuse = ((given - value).abs() > _SLACK) | (y < -1) | (y > 1)
            cell = (bin_index(value, bins) + first) * 2 + y
            group = None if groups is None else groups[block]
            shape, skip = (count, channels * bins * 2), torch.isnan(given) | (y == -1)
            places = Places.find(cell, group, shape, skip, refuse, self.refused)
            places.add_counts(self.counts)
            places.add_fixed(self.p, value)
            places.add_fixed(self.squares, value.square_())

    def brier(self) -> Tensor:
        """Return float64 (G, C), the mean of (p - y)^2; of two classes half of the metric ``brier``."""
        n, hits, _, squares, products = self._totals()
        return (squares - 2 * products + hits).sum(2) / n.sum(2)

    def gaps(self) -> Tensor:
        """Return float64 (G, C, M), (S_m - H_m) / N: positive where a bin promises too much; NaN without rows."""
        n, hits, p, _, _ = self._totals()
        return (p - hits) / n.sum(2, keepdim=True)

    def ece(self) -> Tensor:
        """Return float64 (G, C), the expected calibration error (1/N) sum_m |S_m - H_m|."""
        return self.gaps().abs().sum(2)

    def ece_null(self) -> Tensor:
        """Return float64 (G, C), the expected ECE of calibrated, independent forecasts, as the metric ``ece-null``."""
        n, _, p, squares, _ = self._totals()
        return math.sqrt(2 / math.pi) * (p - squares).clamp_min(0).sqrt().sum(2) / n.sum(2)

    def mce(self, min_count: int = 10) -> Tensor:
        """Return float64 (G, C), the largest |S_m - H_m| / n_m of bins with ``min_count`` forecasts; NaN without any.

        Args:
            min_count: At least 1.
        """
        n, hits, p, _, _ = self._totals()
        gap = torch.where(n >= max(min_count, 1), (p - hits).abs() / n, -math.inf).amax(2)
        return torch.where(gap >= 0, gap, math.nan)

    def reliability(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (mean p, share of events, count) of each bin, (G, C, M): two float64, NaN in empty bins, and int64."""
        n, hits, p, _, _ = self._totals()
        return p / n, hits / n, self.counts.sum(3)

    def decomposition(self) -> BrierParts:
        """Return the parts of ``brier``, exact for any bins; NaN without rows."""
        n, hits, p, squares, products = self._totals()
        total, some = n.sum(2), n.clamp_min(1)
        base = hits.sum(2, keepdim=True) / total[..., None]
        mean_p, mean_y = p / some, hits / some
        return BrierParts(
            reliability=(n * (mean_p - mean_y).square()).sum(2) / total,
            resolution=(n * (mean_y - base).square()).sum(2) / total,
            uncertainty=(base * (1 - base))[..., 0],
            within_variance=(squares - p * mean_p).sum(2) / total,
            within_covariance=2 * (products - p * mean_y).sum(2) / total,
        )

    def _totals(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return float64 (G, C, M): n, events, sums of p, p^2 and p y."""
        self.check()
        whole = (self.counts.sum(3), self.counts[..., 1])
        steps = (self.p.sum(3), self.squares.sum(3), self.p[..., 1])
        n, hits = (item.to(torch.float64) for item in whole)
        p, squares, products = (item.to(torch.float64) / UNIT for item in steps)
        return n, hits, p, squares, products

    def _accepted(self) -> str:
        return f"probabilities in [0, 1], events in -1, 0, 1, groups from -1 to {len(self.counts) - 1}"
