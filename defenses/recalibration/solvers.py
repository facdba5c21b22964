"""Maximum likelihood of convex models: Newton's method with a line search, in float64."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("robustlab")

RIDGE = 1e-10
"""Weight of the squared length, in standardised units, that keeps the optimum on separable data finite."""

_STOP = 1e-18
_STEPS, _HALVINGS, _PRODUCTS = 100, 60, 1000
_SLACK = 1e-14


class Local(NamedTuple):
    """Values (B,), gradients (B, P) and second derivatives (B, P, P) of B convex functions at a point (B, P)."""

    value: Tensor
    gradient: Tensor
    curvature: Tensor


def newton(function: Callable[[Tensor], Local], start: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise B strictly convex functions side by side by Newton's method with backtracking.

    Args:
        function: Its values and derivatives at a point float64 (B, P).
        start: float64 (B, P).

    Returns:
        The minimisers (B, P) and the values there (B,).
    """
    point, here = start, function(start)
    for _ in range(_STEPS):
        step = torch.linalg.solve(here.curvature, here.gradient[..., None]).squeeze(-1)
        decrement = (here.gradient * step).sum(-1)
        scale = torch.ones_like(decrement)
        trial, there = point, here
        for _ in range(_HALVINGS):
            trial = point - scale[:, None] * step
            there = function(trial)
            enough = here.value - 1e-4 * scale * decrement + _SLACK * (1 + here.value.abs())
            short = ~(there.value <= enough)
            if not bool(short.any()):
                break
            scale = torch.where(short, scale / 2, scale)
        point, here = trial, there
        if bool((decrement <= _STOP).all()):
            break
    return point, here.value


class Curved(NamedTuple):
    """Value, gradient and second derivative of a convex function of a matrix.

    Args:
        value: The value.
        gradient: Of the shape of the point.
        product: The second derivative times a matrix.
        precondition: About the inverse of ``product``, symmetric and positive.
    """

    value: float
    gradient: Tensor
    product: Callable[[Tensor], Tensor]
    precondition: Callable[[Tensor], Tensor]


def newton_cg(function: Callable[[Tensor], Curved], start: Tensor) -> Tensor:
    """Minimise a strictly convex function of many numbers by Newton's method with conjugate gradients.

    Args:
        function: Its value and derivatives at a point, of the shape of ``start``.
        start: float64, of any shape.

    References:
        Nocedal, Wright 2006, Numerical Optimization, algorithm 7.1.
    """
    point, here = start, function(start)
    for _ in range(_STEPS):
        step = _conjugate(here)
        decrement, scale = float((here.gradient * step).sum()), 1.0
        trial, there = point, here
        for _ in range(_HALVINGS):
            trial = point - scale * step
            there = function(trial)
            if there.value <= here.value - 1e-4 * scale * decrement + _SLACK * (1 + abs(here.value)):
                break
            scale /= 2
        point, here = trial, there
        if decrement <= _STOP:
            break
    return point


def _conjugate(local: Curved) -> Tensor:
    """Solve ``product(step) = gradient``, the more exactly the smaller the gradient."""
    rest = local.gradient
    step, direction = torch.zeros_like(rest), local.precondition(rest)
    first = size = float((rest * direction).sum())
    for _ in range(min(_PRODUCTS, 10 * rest.numel())):
        if size <= max(first * min(1e-2, first), 1e-26):
            break
        image = local.product(direction)
        length = size / float((direction * image).sum())
        step, rest = step + length * direction, rest - length * image
        scaled = local.precondition(rest)
        size, before = float((rest * scaled).sum()), size
        direction = scaled + size / before * direction
    return step


def note_separated(right: Tensor, who: str) -> None:
    """Log that a map gets every sample right, so that a steeper one would fit better without end.

    Args:
        right: bool (N,) or (N, M), a problem a column; samples that do not count are right.
        who: Name used in the message.
    """
    if bool(right.all(0).any()):
        logger.warning("%s: val is separated without error; the map is as steep as its safeguard lets it", who)


def logistic(features: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Fit B logistic regressions without penalty, by iteratively reweighted least squares.

    Minimises the mean of log(1 + e^(x theta)) - y x theta plus ``RIDGE`` / 2 times the squared length of theta, with
    each feature scaled to a root mean square of 1. The ridge moves estimates by some 1e-8 and decides only what the
    data leave open: separable data, and features that are constant or depend on each other.

    Args:
        features: float64 (B, N, P); a feature that is 0 throughout gets the coefficient 0.
        target: float64 (B, N), 0 or 1.
        weight: float64 (B, N), not all 0 in a row.

    Returns:
        Coefficients (B, P) and the losses (B,) in nats.
    """
    share = weight / weight.sum(1, keepdim=True)
    size = (share[..., None] * features.square()).sum(1).sqrt()
    size = torch.where(size > 0, size, 1.0)
    x = features / size[:, None]
    ridge = RIDGE * torch.eye(x.shape[2], dtype=x.dtype, device=x.device)

    def function(point: Tensor) -> Local:
        margin = (x @ point[..., None]).squeeze(-1)
        p = torch.sigmoid(margin)
        gain = share * F.logsigmoid(torch.where(target > 0.5, margin, -margin))
        value = RIDGE / 2 * point.square().sum(1) - gain.sum(1)
        gradient = ((share * (p - target))[:, None] @ x).squeeze(1) + RIDGE * point
        # p (1 - p) from both sides, as 1 - p has no digits left where p is near 1
        spread = share * p * torch.sigmoid(-margin)
        return Local(value, gradient, x.mT @ (x * spread[..., None]) + ridge)

    point, value = newton(function, torch.zeros_like(size))
    return point / size, value
