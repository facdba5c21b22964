"""Sums of gaps in bins as normal variables: what their absolute values and squares vary by, and their null level.

In a bin with the sum of gaps D, which is about normal with variance V, the mean of |D| is biased away from 0 and its
variance lies between (1 - 2 / pi) V, where the model is calibrated, and V. Influence values of a metric that adds up
|D| or D^2 are therefore those of D times a factor that gives them that variance, and intervals made from them cover the
expected value of the metric at this number of samples, bias included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .base import Statistic
from .forecasts import BINS, Forecasts, bin_index, bin_totals


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A statistic whose derivatives at weights of 1 are given.

    Args:
        value: The statistic.
        influence: Returns float64 (N,), its derivatives; called only where they are needed.
    """

    value: Statistic
    influence: Callable[[], Tensor]

    def __call__(self, weights: Tensor) -> Tensor:
        with torch.no_grad():
            value = self.value(weights.detach())
        if not weights.requires_grad:
            return value
        change = self.influence() @ weights
        return value + (change - change.detach())


def unit_codes(clusters: Tensor | None) -> Tensor | None:
    """Return int64 (N,) codes 0, 1, ... of the clusters, or None."""
    return None if clusters is None else torch.unique(clusters, return_inverse=True)[1]


@dataclass(frozen=True, eq=False)
class Binned:
    """Forecasts in bins.

    Args:
        item: The forecasts.
        index: int64 (N,) bins.
        bins: Number of bins M.
        units: int64 (N,) codes of independent units, 0, 1, ...; None for independent samples.
    """

    item: Forecasts
    index: Tensor
    bins: int
    units: Tensor | None = None

    @staticmethod
    def equal_width(item: Forecasts, units: Tensor | None) -> Binned:
        """Return forecasts in 15 bins of equal width."""
        return Binned(item, bin_index(item.p), BINS, units)

    @cached_property
    def gap(self) -> Tensor:
        """float64 (N,), p minus the event."""
        return self.item.gap

    @cached_property
    def mass(self) -> Tensor:
        """float64 (N,), 1 in rows that enter."""
        return self.item.entered.to(torch.float64)

    @cached_property
    def counts(self) -> Tensor:
        """float64 (M,), forecasts."""
        if bool(self.item.entered.all()):
            return torch.bincount(self.index, minlength=self.bins).to(torch.float64)
        return self.total(self.mass)

    @cached_property
    def sums(self) -> Tensor:
        """float64 (M,), sum of gaps."""
        return self.total(self.gap)

    @cached_property
    def binomial(self) -> Tensor:
        """float64 (M,), sum of p (1 - p): the variance of the gaps of a calibrated model, of independent samples."""
        return self.total(self.item.p * (1 - self.item.p) * self.mass)

    def total(self, values: Tensor) -> Tensor:
        """Return float64 (M,), the sum in each bin."""
        return bin_totals(self.index, values, self.bins)

    @cached_property
    def _cells(self) -> tuple[Tensor, Tensor]:
        """(int64 (N,) cell, int64 (C,) bin of each cell): the pairs of unit and bin that occur."""
        units = torch.arange(len(self.index), device=self.index.device) if self.units is None else self.units
        pairs, cell = torch.unique(units * self.bins + self.index, return_inverse=True)
        return cell, pairs % self.bins

    def spread(self, values: Tensor) -> Tensor:
        """Return float64 (M,): sum over units of the squared sum of a unit's ``values`` (N,) in the bin."""
        if self.units is None:
            return self.total(values.square())
        cell, bins = self._cells
        return bin_totals(bins, bin_totals(cell, values, len(bins)).square(), self.bins)

    @cached_property
    def variance(self) -> Tensor:
        """float64 (M,): variance of the sum of gaps over samples of units, at a fixed number of forecasts."""
        n = self.item.n.to(torch.float64)
        mean = self.sums / n
        if self.units is None:
            return (self.spread(self.gap) - self.sums * mean).clamp_min(0) * n / (n - 1).clamp_min(1)
        cell, bins = self._cells
        rows = bin_totals(self.units, self.mass, int(self.units.max()) + 1)
        totals = bin_totals(cell, self.gap, len(bins))
        held = bin_totals(bins, totals * self._unit_sizes(rows), self.bins)
        total = bin_totals(bins, totals.square(), self.bins) - 2 * mean * held + mean.square() * rows.square().sum()
        count = (rows > 0).sum()
        return total.clamp_min(0) * count / (count - 1).clamp_min(1)

    def _unit_sizes(self, rows: Tensor) -> Tensor:
        """Return float64 (C,): the forecasts of each cell's unit in all bins."""
        cell, bins = self._cells
        out = rows.new_zeros(len(bins))
        out[cell] = rows[self.units]
        return out

    @cached_property
    def design_effect(self) -> Tensor:
        """float64 (), at least 1: how much more gaps within bins vary because units hold several samples."""
        if self.units is None:
            return torch.ones_like(self.sums[0])
        rest = self.gap - (self.sums / self.counts.clamp_min(1))[self.index] * self.mass
        alone = rest.square().sum()
        return torch.where(alone > 0, self.spread(rest).sum() / alone.clamp_min(1e-300), 1.0).clamp_min(1.0)

    def design_influence(self) -> Tensor:
        """Return float64 (N,), the influence values of the design effect."""
        if self.units is None or not bool(self.design_effect > 1):
            return torch.zeros_like(self.gap)
        rest = self.gap - (self.sums / self.counts.clamp_min(1))[self.index] * self.mass
        cell, bins = self._cells
        together = rest * bin_totals(cell, rest, len(bins))[cell]
        return (together - self.design_effect * rest.square()) / rest.square().sum()

    @cached_property
    def shrinkage(self) -> Tensor:
        """float64 (), the share of the squared sums of gaps that is not noise."""
        return pooled_shrinkage(self.sums, self.null_variance)

    @property
    def null_variance(self) -> Tensor:
        """float64 (M,): variance of the sum of gaps of a calibrated model."""
        return self.binomial * self.design_effect

    def null_error(self) -> Tensor:
        """Return float64 (): expected ECE of a calibrated model, sum_m sqrt(2 V_m / pi) / N."""
        return math.sqrt(2 / math.pi) * self.null_variance.sqrt().sum() / self.item.n


def absolute_factor(value: Tensor, variance: Tensor) -> Tensor:
    """Return what the influence on a normal variable is multiplied by for its absolute value.

    Its square, 1 - exp(-1.2 value^2 / variance), is on average 0.92 to 1.26 times the variance of the absolute value
    over that of the variable, wherever the mean lies; no function of the value has that ratio as its mean exactly.
    """
    share = -torch.expm1(-1.2 * value.square() / variance.clamp_min(1e-300))
    return torch.where(value < 0, -1.0, 1.0) * share.sqrt()


def pooled_shrinkage(value: Tensor, variance: Tensor) -> Tensor:
    """Return float64 () in [0, 1], the share of the squares of normal variables (M,) that is not noise.

    One factor for all: a width that shrinks with every single value would be smallest where the estimate is too low.

    References:
        James and Stein, Estimation with quadratic loss, 1961.
    """
    noisy = variance > 0
    ratio = torch.where(noisy, value.square() / variance.clamp_min(1e-300), 0.0)
    return (1 - noisy.sum() / ratio.sum().clamp_min(1e-300)).clamp(0, 1)


def square_factor(value: Tensor, variance: Tensor, shrinkage: Tensor) -> Tensor:
    """Return what the influence on normal variables (M,) is multiplied by for their squares.

    The variance of a square is 4 mean^2 V + 2 V^2; the squared means are shrunk values.
    """
    size = (4 * shrinkage * value.square() + 2 * variance).sqrt()
    return torch.where(value < 0, -1.0, 1.0) * size


def absolute_variance(mean: Tensor, covariance: Tensor, share: Tensor) -> Tensor:
    """Return the variance of sum_j share_j |X_j| for normal variables with that mean (M,) and covariance (M, M).

    By the Hermite series of |X|: covariances are sums of powers of the correlation. What the first eight leave of the
    variances is put on the tenth.

    References:
        Leone, Nelson and Nottingham, The folded normal distribution, 1961; Price, A useful theorem for nonlinear
        devices having Gaussian inputs, 1958.
    """
    error = covariance.diagonal().clamp_min(1e-300).sqrt()
    ratio = mean / error
    correlation = (covariance / error[:, None] / error).clamp(-1, 1)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    sign = torch.erf(ratio / math.sqrt(2))
    rest = ratio.square() + 1 - (2 * density + ratio * sign).square() - sign.square()
    total, power = torch.outer(sign, sign) * correlation, correlation
    before, hermite, scale = torch.zeros_like(ratio), torch.ones_like(ratio), 1.0
    for k in range(2, 9):
        scale *= k
        power = power * correlation
        part = 2 * density * hermite / math.sqrt(scale)
        total += torch.outer(part, part) * power
        rest = rest - part.square()
        before, hermite = hermite, ratio * hermite - (k - 2) * before
    left = rest.clamp_min(0).sqrt()
    total += torch.outer(left, left) * power * correlation.square()
    return (share * error) @ total @ (share * error)


def largest(mean: Tensor, variance: Tensor, points: int = 4000) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the largest absolute value of independent normal variables (M,), by integration."""
    error = variance.sqrt().clamp_min(1e-12)
    top = float((mean.abs() + 8 * error).max())
    x = torch.linspace(0, top, points, dtype=torch.float64, device=mean.device)[:, None]
    above = 1 - (torch.special.ndtr((x - mean) / error) - torch.special.ndtr((-x - mean) / error)).prod(1)
    first = torch.trapezoid(above, x[:, 0])
    return first, (torch.trapezoid(2 * x[:, 0] * above, x[:, 0]) - first.square()).clamp_min(0)
