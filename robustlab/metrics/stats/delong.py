"""DeLong's variance of the area under the ROC curve: of one score, of several on the same samples, and clustered."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustlab.core.errors import RangeError, ShapeError
from robustlab.metrics.base import Estimate

from .linear import linear_interval


def placements(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Return the placement values (K, P) of the positives and (K, M) of the negatives, in the order of the samples.

    A positive's value is the share of negatives below it, a negative's the share of positives above it; equal scores
    count half. Their means both are the area. They take O(N log N).

    Args:
        scores: float (K, N) or (N,), larger for positives; infinite ones are ranked as such.
        positive: bool (N,).

    Raises:
        ShapeError: The samples do not match.
        RangeError: A score is NaN.
    """
    scores = (scores[None] if scores.ndim == 1 else scores).to(torch.float64)
    if scores.shape[1:] != positive.shape:
        raise ShapeError("delong", f"scores (K, {len(positive)})", f"{tuple(scores.shape)}", "Give a column a sample.")
    if bool(torch.isnan(scores).any()):
        raise RangeError("delong", "scores that can be ranked", "NaN", "Leave out samples without a score.")
    high, low = scores[:, positive].contiguous(), scores[:, ~positive].contiguous()
    return _share_below(high, low), 1 - _share_below(low, high)


def _share_below(values: Tensor, others: Tensor) -> Tensor:
    """Return (K, n): the share of ``others`` (K, m) below each value, equal ones counted half."""
    ordered = torch.sort(others, dim=1).values
    below = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    return below.to(torch.float64) / (2 * others.shape[1])


@dataclass(frozen=True, eq=False)
class DeLong:
    """The areas of K scores on the same samples, and what their covariance is made of.

    Args:
        positive: float64 (K, P) placement values of the positives.
        negative: float64 (K, M) placement values of the negatives.
        units: int64 codes 0 .. U - 1 of the unit of each positive (P,) and each negative (M,); None for independent
            samples.
    """

    positive: Tensor
    negative: Tensor
    units: tuple[Tensor, Tensor] | None = None

    @property
    def area(self) -> Tensor:
        """float64 (K,); NaN where a side is empty."""
        # the mean over the shorter side sums fewer rounded numbers; both are the same area
        return self.positive.mean(1) if self.positive.shape[1] < self.negative.shape[1] else self.negative.mean(1)

    @property
    def counts(self) -> tuple[int, int]:
        """Independent units that hold positives, and that hold negatives."""
        if self.units is None:
            return self.positive.shape[1], self.negative.shape[1]
        return len(torch.unique(self.units[0])), len(torch.unique(self.units[1]))

    @property
    def covariance(self) -> Tensor:
        """float64 (K, K) covariance of the areas; NaN with fewer than two units on a side."""
        positive, negative, cross = self._parts(self.positive, self.negative)
        return positive + negative + cross

    def _parts(self, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the covariance (k, k) that comes from positives, from negatives, and from units that hold both."""
        sides = []
        for index, values in enumerate((positive, negative)):
            influence = (values - values.mean(1, keepdim=True)) / values.shape[1]
            if self.units is not None:
                total = 1 + max(int(codes.max()) if len(codes) else 0 for codes in self.units)
                influence = values.new_zeros((len(values), total)).index_add_(1, self.units[index], influence)
            sides.append(influence)
        first, second = (
            side @ side.T * (count / (count - 1) if count > 1 else math.nan)
            for side, count in zip(sides, self.counts, strict=True)
        )
        if self.units is None:
            return first, second, torch.zeros_like(first)
        count = len(torch.unique(torch.cat(self.units)))
        both = sides[0] @ sides[1].T * (count / (count - 1) if count > 1 else math.nan)
        return first, second, both + both.T

    def estimate(self, index: int = 0, *, confidence: float = 0.95) -> Estimate:
        """Return the area of one score with a Student interval of its logit.

        Where the area is exactly 0 or 1 no variance can be seen: the interval is NaN with the reason ``no_variance``.
        """
        value = float(self.area[index])
        return self._interval(value, self.positive[index], self.negative[index], confidence, (0.0, 1.0))

    def difference(self, first: int = 0, second: int = 1, *, confidence: float = 0.95) -> Estimate:
        """Return the area of the second score minus that of the first, with a paired Student interval.

        Two scores that rank all pairs alike differ by exactly 0, with the interval [0, 0].
        """
        positive, negative = (side[second] - side[first] for side in (self.positive, self.negative))
        value = float(self.area[second]) - float(self.area[first])
        made = self._interval(value, positive, negative, confidence, (-math.inf, math.inf))
        if made.reason == "no_variance" and not bool(positive.any()) and not bool(negative.any()):
            return Estimate(0.0, 0.0, 0.0, made.n, made.n_units, "identical ranks")
        return made

    def _interval(
        self, value: float, positive: Tensor, negative: Tensor, confidence: float, bounds: tuple[float, float]
    ) -> Estimate:
        """Return the estimate of a combination of the areas from its placement values (P,) and (M,)."""
        n = len(positive) + len(negative)
        n_units = n if self.units is None else len(torch.unique(torch.cat(self.units)))
        if math.isnan(value):
            missing = "no_samples" if n == 0 else "no_positives" if len(positive) == 0 else "no_negatives"
            return Estimate.undefined(missing, n=n, n_units=n_units)
        method = "delong" if self.units is None else "delong over clusters"
        counts = self.counts
        if min(counts) < 2:
            return Estimate(value, math.nan, math.nan, n, n_units, method, "too_few_units")
        first, second, cross = (float(part) for part in self._parts(positive[None], negative[None]))
        variance = first + second + cross
        if not variance > 0 or not bounds[0] < value < bounds[1]:
            return Estimate(value, math.nan, math.nan, n, n_units, method, "no_variance")
        # Welch's degrees of freedom; clusters that hold both sides tie the two together, and the fewer ones count
        freedom = float(min(counts) - 1)
        if self.units is None:
            freedom = variance**2 / (first**2 / (counts[0] - 1) + second**2 / (counts[1] - 1))
        low, high = linear_interval(value, math.sqrt(variance), freedom, confidence=confidence, bounds=bounds)
        return Estimate(value, low, high, n, n_units, method)


def delong(scores: Tensor, positive: Tensor, clusters: Tensor | None = None) -> DeLong:
    """Return the areas under the ROC curves of K scores on the same samples, with their covariance.

    With V a positive's and W a negative's placement value, cov = cov(V) / P + cov(W) / M, each with P - 1 or M - 1 in
    its denominator. With clusters the deviations are summed within each cluster first, with I / (I - 1) for the I
    clusters that hold that side, and clusters that hold both sides add the covariance of their two sums.

    Args:
        scores: float (K, N) or (N,), larger for positives, without NaN.
        positive: bool (N,).
        clusters: int64 (N,) codes of the unit, or None for independent samples.

    References:
        DeLong, DeLong and Clarke-Pearson, Comparing the areas under two or more correlated receiver operating
        characteristic curves, 1988; Obuchowski, Nonparametric analysis of clustered ROC curve data, 1997; Sun and Xu,
        Fast implementation of DeLong's algorithm, 2014.
    """
    first, second = placements(scores, positive)
    if clusters is None:
        return DeLong(first, second)
    codes = torch.unique(clusters, return_inverse=True)[1]
    return DeLong(first, second, (codes[positive], codes[~positive]))
