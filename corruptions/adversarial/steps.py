"""Starts and directions in L-infinity and L2 balls."""

from __future__ import annotations

import torch
from torch import Tensor

from robustlab.core.attack import Norm, project
from robustlab.core.rng import SampleRng

TINY = 1e-12


def lengths(values: Tensor, norm: Norm) -> Tensor:
    """Return the norm of each sample of (N, ...), as (N, 1, 1, 1)."""
    flat = values.flatten(1)
    size = flat.abs().amax(1) if norm == "linf" else (flat**2).sum(1).sqrt()
    return size.view(-1, 1, 1, 1)


def random_start(rng: SampleRng, clean: Tensor, eps: float, norm: Norm) -> Tensor:
    """Return points drawn uniformly in the ball around ``clean`` (N, C, H, W), then moved into [0, 1]."""
    shape = tuple(clean.shape[1:])
    if norm == "linf":
        delta = (2 * rng.uniform("start", shape) - 1) * eps
    else:
        normal = rng.normal("direction", shape)
        length = normal.flatten(1).norm(dim=1).clamp_min(TINY)
        radius = rng.uniform("radius").pow(1.0 / clean[0].numel()) * eps
        delta = normal * (radius / length).view(-1, 1, 1, 1)
    return project(clean + delta, clean, eps, norm)


def surface_start(rng: SampleRng, clean: Tensor, eps: float, norm: Norm) -> Tensor:
    """Return random points on the sphere around ``clean``, moved into [0, 1], as the reference of APGD starts."""
    shape = tuple(clean.shape[1:])
    drawn = 2 * rng.uniform("start", shape) - 1 if norm == "linf" else rng.normal("direction", shape)
    return (clean + eps * (drawn / (lengths(drawn, norm) + TINY)).to(clean.dtype)).clamp(0, 1)


def direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Return the steepest direction of unit length in the norm."""
    if norm == "linf":
        return gradient.sign()
    # scaled by the largest entry first: squares of tiny gradients would underflow to 0
    tiny = torch.finfo(gradient.dtype).tiny
    scaled = gradient / gradient.flatten(1).abs().amax(1).clamp_min(tiny).view(-1, 1, 1, 1)
    unit: Tensor = scaled / scaled.flatten(1).norm(dim=1).clamp_min(TINY).view(-1, 1, 1, 1)
    return unit
