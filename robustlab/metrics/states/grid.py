"""Counts of positives and negatives on a fixed grid of scores: rank metrics between proven ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustlab.core.errors import RangeError

from .base import Places, State, blocks, check_rows, columns, zeros

_OCTAVES = 16  # the signed-log grid resolves sizes from 2^-16 to 2^16
_EPS = 2.0**-52  # more than one rounding of a float64 sum of numbers up to 1 can make


@dataclass(frozen=True, eq=False)
class Bracket:
    """A number that is known to lie between two others.

    Args:
        value: float64 (G, C), the middle; NaN where undefined.
        low: float64 (G, C), proven lower end.
        high: float64 (G, C), proven upper end.
    """

    value: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def between(low: Tensor, high: Tensor) -> Bracket:
        """Return the bracket with its middle."""
        return Bracket((low + high) / 2, low, high)

    @property
    def error(self) -> Tensor:
        """float64 (G, C), how far the exact number can be from ``value``."""
        return (self.high - self.low) / 2


@dataclass(eq=False, kw_only=True)
class Grid(State):
    """Counts of negatives and positives in bins that never change; a larger score never has a lower bin.

    That monotony is all the proofs need: scores in different bins are in the order of their bins, and of scores in one
    bin nothing is known. The end bins reach to infinity.

    Args:
        counts: int64 (G, C, B, 2), by outcome: 0 negative, 1 positive.
        low: Lower end of a grid of equal bins; equal to ``high`` for the signed-log grid.
        high: Its upper end.
        refused: int64 (), outcomes or groups outside their range.
        rows: Rows seen.
    """

    counts: Tensor
    low: float
    high: float
    sums: ClassVar[tuple[str, ...]] = ("counts",)

    @staticmethod
    def signed_log(
        bins: int = 1 << 16, *, channels: int = 1, groups: int = 1, device: torch.device | str = "cpu"
    ) -> Grid:
        """Return an empty grid for scores of any scale: bins in proportion to |score| from 2^-16 to 2^16.

        The edges are float32 numbers with log2(bins) - 6 bits of fraction, so 2^16 bins are at most 0.1 % of the score
        wide.

        Args:
            bins: A power of two from 2^6 to 2^29.
            channels: C.
            groups: G.
            device: Where updates come from.

        Raises:
            RangeError: Another number of bins.
        """
        if bins.bit_count() != 1 or not 6 <= bins.bit_length() - 1 <= 29:
            raise RangeError("Grid.signed_log", "a power of two from 2^6 to 2^29 bins", f"{bins}", "Take 1 << 16.")
        counts = zeros((groups, channels, bins, 2), device)
        return Grid(counts=counts, low=0.0, high=0.0, refused=zeros((), device))

    @staticmethod
    def linear(
        low: float,
        high: float,
        bins: int = 1 << 16,
        *,
        channels: int = 1,
        groups: int = 1,
        device: torch.device | str = "cpu",
    ) -> Grid:
        """Return an empty grid of equal bins between two finite scores, for example -32 and 32 for logits.

        Args:
            low: Scores below it are in the first bin.
            high: Scores from it on are in the last bin.
            bins: At least 3.
            channels: C.
            groups: G.
            device: Where updates come from.

        Raises:
            RangeError: The ends are not in order, or there are too few bins.
        """
        if not (-torch.inf < low < high < torch.inf and bins >= 3):
            raise RangeError("Grid.linear", "finite low < high and 3 bins", f"{low}, {high}, {bins}", "Swap the ends?")
        counts = zeros((groups, channels, bins, 2), device)
        return Grid(counts=counts, low=float(low), high=float(high), refused=zeros((), device))

    def update(self, scores: Tensor, positive: Tensor, groups: Tensor | None = None) -> None:
        """Add rows.

        Args:
            scores: Floating (N,) or (N, C), larger is more positive; infinite is allowed, NaN does not enter.
            positive: bool or integer of the same shape, 1 for positives, 0 for negatives; -1 does not enter.
            groups: int64 (N,) in [0, G), -1 for rows that do not enter; group 0 without it.
        """
        count, channels, bins, _ = self.counts.shape
        scores, positive = columns("Grid", scores, positive, channels)
        check_rows("Grid", len(scores), groups)
        self.count_rows(len(scores))
        first = torch.arange(channels, device=scores.device) * bins
        for block in blocks(len(scores), channels, scores.device):
            score, y = scores[block], positive[block].to(torch.int64)
            cell = (self._bin(score) + first) * 2 + y
            group = None if groups is None else groups[block]
            shape, skip = (count, channels * bins * 2), torch.isnan(score) | (y == -1)
            places = Places.find(cell, group, shape, skip, (y < -1) | (y > 1), self.refused)
            places.add_counts(self.counts)

    def auroc(self) -> Bracket:
        """Return P(positive > negative) + P(equal) / 2; NaN where a side is empty.

        Pairs in different bins are decided; the sum_b p_b n_b pairs within bins may all be lost or all be won. The
        error is at most half of their share, sum_b p_b n_b / (2 P N).
        """
        positives, negatives = self._sides()
        below = negatives.cumsum(2) - negatives
        won, open_ = (positives * below).sum(2), (positives * negatives).sum(2)
        pairs = positives.sum(2) * negatives.sum(2)
        return Bracket.between(_share(won, pairs), _share(won + open_, pairs))

    def fpr95_pos(self) -> Bracket:
        """Return the share of negatives at or above the highest score that 95 % of the positives reach.

        That score lies in the highest bin from which on up 95 % of the positives lie; which of that bin's negatives
        reach it is unknown.
        """
        positives, negatives = self._sides()
        return _false_share(positives.flip(2), negatives.flip(2))

    def fpr95_neg(self) -> Bracket:
        """Return the share of positives at or below the lowest score that 95 % of the negatives do not exceed."""
        positives, negatives = self._sides()
        return _false_share(negatives, positives)

    def average_precision(self) -> Bracket:
        """Return sum over distinct scores of (recall step) x (precision); NaN without positives.

        Let T and F be the positives and negatives above a bin with p and n. At its k-th positive, k to p positives and
        0 to n negatives of the bin are at or above the score, so its precision is at most (T + p) / (T + p + F) and at
        least g(k) = (T + k) / (T + k + F + n). g is concave, hence its mean over k is at least (g(1) + g(p)) / 2.
        """
        positives, negatives = (side.flip(2) for side in self._sides())
        p, n = positives.to(torch.float64), negatives.to(torch.float64)
        through, after = positives.cumsum(2).to(torch.float64), negatives.cumsum(2).to(torch.float64)
        last, first = through / (through + after), (through - p + 1) / (through - p + 1 + after)
        best = through / (through + after - n)
        total = p.sum(2)
        low, high = (torch.where(p > 0, p * share, 0).sum(2) / total for share in ((first + last) / 2, best))
        slack = 4 * _EPS * p.shape[2]
        return Bracket.between((low - slack).clamp_min(0), (high + slack).clamp_max(1))

    def _bin(self, scores: Tensor) -> Tensor:
        """Return int64 bins; NaN gets any."""
        bins = self.counts.shape[2]
        if self.low < self.high:
            step = (bins - 2) / (self.high - self.low)
            place = ((scores.to(torch.float64) - self.low) * step).floor_().nan_to_num_(0.0)
            return place.clamp_(-1, bins - 2).to(torch.int64) + 1
        # the bits of a float32 number grow with its size, exponent first; adding 0 turns -0 into 0
        fraction = bins.bit_length() - 1 - 6
        bits = (scores.to(torch.float32) + 0.0).view(torch.int32)
        size = ((bits & 0x7FFFFFFF) >> (23 - fraction)) - ((127 - _OCTAVES) << fraction) + 1
        size = size.clamp_(0, bins // 2 - 1)
        return torch.where(bits < 0, -1 - size, size).to(torch.int64) + bins // 2

    def _sides(self) -> tuple[Tensor, Tensor]:
        """Return int64 (G, C, B): positives, negatives."""
        self.check()
        return self.counts[..., 1], self.counts[..., 0]

    def _accepted(self) -> str:
        return f"outcomes in -1, 0, 1 and groups from -1 to {len(self.counts) - 1}"


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Return float64 part / whole, rounded once and therefore in the order of the exact quotients; NaN for 0 / 0.

    Both may be beyond 2^53, where float64 would round them before dividing.
    """
    pairs = zip(part.flatten().tolist(), whole.flatten().tolist(), strict=True)
    made = [a / b if b else torch.nan for a, b in pairs]
    return torch.tensor(made, dtype=torch.float64, device=part.device).view_as(part)


def _false_share(kept: Tensor, accused: Tensor) -> Bracket:
    """Return the share of ``accused`` caught with 95 % of ``kept``; bins (G, C, B), first caught first."""
    caught, total, whole = kept.cumsum(2), kept.sum(2), accused.sum(2)
    bin_of = (20 * caught < 19 * total[..., None]).sum(2, keepdim=True).clamp_max(kept.shape[2] - 1)
    through = accused.cumsum(2).gather(2, bin_of)[..., 0]
    before = through - accused.gather(2, bin_of)[..., 0]
    whole = torch.where(total > 0, whole, 0)
    return Bracket.between(_share(before, whole), _share(through, whole))
