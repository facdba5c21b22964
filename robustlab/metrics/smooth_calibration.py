"""Smooth calibration error (smECE): the gaps smoothed by a reflected Gaussian whose width is the error itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from robustlab.core.registry import METRICS

from .base import Context
from .binned import Binned, Surrogate, absolute_variance, pooled_shrinkage, unit_codes
from .forecasts import Forecasts, forecasts
from .proper_scores import defined
from .smooth import Part, SmoothMetric
from .store import PredictionStore

CELLS = 4096
_FIXED = 2.0**32
_STEPS = 30
_STEP = 1e-3  # of the logarithm of the width, for the derivative


def _places(p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the grid point below each probability and the share that goes to the next one."""
    scaled = p * CELLS
    below = scaled.floor().clamp(0, CELLS - 1)
    return below.to(torch.int64), scaled - below


def on_grid(p: Tensor, values: Tensor) -> Tensor:
    """Return float64 (b, 4097): ``values`` (N, b) at ``p`` (N,), divided linearly between two grid points."""
    below, share = _places(p)
    grid = values.new_zeros((CELLS + 1, values.shape[1]))
    grid.index_add_(0, below, values * (1 - share)[:, None])
    grid.index_add_(0, below + 1, values * share[:, None])
    return grid.T


def smoothed(grid: Tensor, width: Tensor) -> Tensor:
    """Return float64 (b, 4097): the density of masses (b, 4097) after smoothing by the Gaussian reflected at 0 and 1.

    Args:
        grid: Masses at the grid points.
        width: float64 (b,), standard deviation.
    """
    # a mass at an end coincides with its mirror image
    whole = torch.cat([2 * grid[:, :1], grid[:, 1:-1], 2 * grid[:, -1:], grid[:, 1:-1].flip(1)], 1)
    waves = torch.arange(CELLS + 1, dtype=torch.float64, device=grid.device) * math.pi
    damping = torch.exp(-(waves * width[:, None]).square() / 2)
    density: Tensor = torch.fft.irfft(torch.fft.rfft(whole) * damping, n=2 * CELLS)
    return density[:, : CELLS + 1] * CELLS


def _integral(values: Tensor) -> Tensor:
    return (values.sum(1) - (values[:, 0] + values[:, -1]) / 2) / CELLS


def error_at(residual: Tensor, width: Tensor) -> Tensor:
    """Return (b,), the integral of |smoothed residuals|, of residuals (b, 4097) divided by N."""
    return _integral(smoothed(residual, width).abs())


def fixed_point(error: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Return the width (b,) in [0, 1] that equals the error at that width, which falls with the width: by bisection."""
    low, high = torch.zeros_like(like), torch.ones_like(like)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        above = error(middle) > middle
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


@dataclass(frozen=True, eq=False)
class CalibrationGrid:
    """What smECE needs of any number of forecasts, in 2^-32 fixed point: merged bit for bit the same in any order.

    Args:
        residual: int64 (4097,), p minus the event at the grid points.
        mass: int64 (4097,), forecasts.
    """

    residual: Tensor
    mass: Tensor

    @staticmethod
    def of(p: Tensor, happened: Tensor) -> CalibrationGrid:
        """Return the state of forecasts.

        Args:
            p: float64 (N,) probabilities.
            happened: bool (N,).
        """
        below, share = _places(p)
        gap = p - happened.to(torch.float64)
        made = []
        for values in (gap, torch.ones_like(gap)):
            grid = torch.zeros(CELLS + 1, dtype=torch.int64, device=p.device)
            for at, part in ((below, values * (1 - share)), (below + 1, values * share)):
                grid.index_add_(0, at, (part * _FIXED).round().to(torch.int64))
            made.append(grid)
        return CalibrationGrid(*made)

    def merge(self, other: CalibrationGrid) -> CalibrationGrid:
        """Return the state of the forecasts of both."""
        return CalibrationGrid(self.residual + other.residual, self.mass + other.mass)

    def error(self, width: float | None = None) -> float:
        """Return the smooth calibration error; NaN without forecasts.

        Args:
            width: Standard deviation of the kernel, in (0, 1]; None for the one that equals the error.
        """
        total = self.mass.sum().to(torch.float64)
        if not bool(total > 0):
            return math.nan
        residual = (self.residual.to(torch.float64) / total)[None]
        chosen = total.new_tensor([width or 0.0])
        if width is None:
            chosen = fixed_point(lambda at: error_at(residual, at), chosen)
        return float(error_at(residual, chosen))


@dataclass(frozen=True, eq=False)
class _Smooth:
    """smECE of one label as a function of weights."""

    item: Forecasts
    units: Tensor | None

    @cached_property
    def mass(self) -> Tensor:
        return self.item.entered.to(torch.float64)

    @cached_property
    def design_effect(self) -> Tensor:
        return Binned.equal_width(self.item, self.units).design_effect

    def value(self, weights: Tensor) -> Tensor:
        """Return (b,)."""
        residual = on_grid(self.item.p, self.item.gap[:, None] * weights) / (self.mass @ weights)[:, None]
        width = fixed_point(lambda at: error_at(residual, at), weights[0])
        return error_at(residual, width)

    def _variance(self, squares: Tensor, width: Tensor) -> Tensor:
        """Return (1, 4097): sum_i K(t, p_i)^2 v_i, for v (1, 4097) on the grid and a width (1,)."""
        t = torch.linspace(0, 1, CELLS + 1, dtype=torch.float64, device=squares.device)
        # a product of two Gaussians of width s is one of width s / sqrt(2): of an image with itself, and of two images
        own = smoothed(squares, width / math.sqrt(2)) / (2 * math.sqrt(math.pi) * width)
        both = torch.zeros_like(own)
        for ends in (t, 1 - t):
            near = torch.exp(-(ends / width).square())
            both += near * (near * squares).sum() / (math.pi * width.square())
        return own + both

    def influence(self) -> Tensor:
        """Return (N,): those of the integral of the residuals' signs, scaled to the variance that absolute values have.

        Near calibration the residuals are noise of either sign, and the integral of their size varies by less than the
        one of the residuals under frozen signs.
        """
        n, gap = self.mass.sum(), self.item.gap
        residual = on_grid(self.item.p, gap[:, None]) / n
        width = fixed_point(lambda at: error_at(residual, at), n[None]).clamp_min(1 / CELLS)
        sign = torch.where(smoothed(residual, width) < 0, -1.0, 1.0)
        # the integral of sign(t) K(t, x) over t, at the forecasts: ends of the grid are half a cell wide
        field = smoothed(torch.cat([sign[:, :1] / 2, sign[:, 1:-1], sign[:, -1:] / 2], 1), width)[0] / CELLS
        below, share = _places(self.item.p)
        moved = (field[below] * (1 - share) + field[below + 1] * share) * gap
        moved = (moved - self.mass * (moved.sum() / n)) / n
        slope = error_at(residual, width * math.exp(_STEP)) - error_at(residual, width * math.exp(-_STEP))
        return moved * self._scale(residual, width) / (1 - slope / (2 * _STEP * width)).clamp_min(1)

    def _scale(self, residual: Tensor, width: Tensor) -> Tensor:
        """Return (), the standard deviation of the integral of absolute residuals over that under frozen signs."""
        n = self.mass.sum()
        points = int((4 / width).ceil().clamp(64, 512))
        places = torch.linspace(0, 1, points + 1, dtype=torch.float64, device=width.device)
        kernel = smoothed(on_grid(places, torch.eye(points + 1, dtype=torch.float64, device=width.device)), width)
        mean = (kernel @ residual.T)[:, 0]
        squares = on_grid(self.item.p, self.item.gap.square()[:, None])
        covariance = (kernel * squares) @ kernel.T / n.square() - torch.outer(mean, mean) / n
        share = torch.full_like(mean, 1 / points)
        share[0] /= 2
        share[-1] /= 2
        frozen = share * torch.where(mean < 0, -1.0, 1.0)
        variance = covariance.diagonal()
        shrink = pooled_shrinkage(mean, variance * self.design_effect).sqrt()
        real = absolute_variance(mean * shrink, covariance * self.design_effect, share) / self.design_effect
        return (real / (frozen @ covariance @ frozen).clamp_min(1e-300)).clamp_max(1).sqrt()

    def null(self) -> Tensor:
        """Return (), the expected value for a calibrated model."""
        n = self.mass.sum()
        binomial = on_grid(self.item.p, (self.item.p * (1 - self.item.p) * self.mass)[:, None])
        scale = 2 / math.pi * self.design_effect / n.square()

        def error(width: Tensor) -> Tensor:
            # a convolution rounds to less than 0 where no forecast is near
            return _integral((scale * self._variance(binomial, width)).clamp_min(0).sqrt())

        return fixed_point(error, n[None])[0]


@METRICS.register("smooth-ece")
class SmoothCalibrationError(SmoothMetric):
    """smECE of what ``ece`` looks at, macro over labels: no bins, and a little change of p changes it a little.

    The integral over t in [0, 1] of |(1/N) sum_i K_s(t, p_i) (p_i - y_i)|, K_s the Gaussian of width s reflected at 0
    and 1, at the s that equals it; on a grid of 4097 points. The interval covers the expected value of this estimate at
    this n (for an over-confident model of a few hundred samples about 90 % of the time), and the method text gives that
    of a calibrated model.

    References:
        Błasiok and Nakkiran, Smooth ECE: principled reliability diagrams via kernel smoothing, 2023, arXiv:2309.12236.
    """

    title = "Smooth ECE"
    direction = "lower"

    def parts(self, store: PredictionStore, context: Context) -> Mapping[str, Part]:
        items = forecasts(store)
        entered = torch.stack([item.entered for item in items]).any(0)
        units = unit_codes(store.clusters)
        used = [_Smooth(item, units) for item in items if bool(item.entered.any())]
        if not used:
            return {"": Part(None, entered)}
        null = float(torch.stack([item.null() for item in used]).mean())
        statistic = Surrogate(
            lambda weights: torch.stack([item.value(weights) for item in used]).mean(0),
            lambda: torch.stack([item.influence() for item in used]).mean(0),
        )
        note = f"; expected {null:.3g} if perfectly calibrated{defined(len(used), len(items))}"
        return {"": Part(statistic, entered, note=note)}
