"""What images of a site look like, in a few numbers each: noise, sharpness, grey levels, colour."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_STEP = 1 / 255  # of a stored grey level; what is below it cannot be told from rounding
_BANDS = 4
_SHARES = (0.01, 0.1, 0.5, 0.9, 0.99)
_RARE = 1e-3
_BLANK = 1 / 255  # darkest transmission


def image_statistics(images: Tensor) -> Tensor:
    """Return numbers of each image, float64 (N, P).

    The level of the noise is the median size of the finest diagonal details, which edges hardly reach (Donoho,
    Johnstone 1994); sharpness is the power in octaves of spatial frequency (Burt, Adelson 1983); grey levels are
    quantiles, deviation, and shares at the ends of the range; colour, of three channels, is optical density by channel
    and its ratios. All but the quantiles are logarithms.

    Args:
        images: float (N, C, H, W) in [0, 1].

    References:
        Donoho, Johnstone, Ideal spatial adaptation by wavelet shrinkage, 1994; Burt, Adelson, The Laplacian pyramid as
        a compact image code, 1983.
    """
    grey = images.mean(1, keepdim=True)
    found = [_noise(images), *_bands(grey), *_levels(grey)]
    if images.shape[1] == 3:
        logs = torch.log(-torch.log(images.clamp_min(_BLANK)).mean((2, 3)) + _STEP)
        spread = torch.log(images.flatten(2).std(2) + _STEP)
        found += [*logs.T, logs[:, 0] - logs[:, 1], logs[:, 2] - logs[:, 1], *spread.T]
    return torch.stack([value.to(torch.float64) for value in found], 1)


def _noise(images: Tensor) -> Tensor:
    """Return the log of the noise level, (N,): of diagonal Haar details, which have the noise's own deviation."""
    height, width = (size // 2 * 2 for size in images.shape[2:])
    x = images[..., :height, :width]
    details = (x[..., ::2, ::2] - x[..., 1::2, ::2] - x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 2
    level = details.abs().flatten(2).median(2).values.mean(1) / 0.6745
    return torch.log(level + 0.5 * _STEP)


def _bands(grey: Tensor) -> list[Tensor]:
    """Return the log power of each octave, finest first, (N,) each."""
    found = []
    for _ in range(_BANDS):
        if min(grey.shape[2:]) < 4:
            break
        coarse = F.avg_pool2d(grey, 2)
        fine = grey - F.interpolate(coarse, size=grey.shape[2:], mode="bilinear", align_corners=False)
        found.append(torch.log(fine.square().mean((1, 2, 3)) + (0.5 * _STEP) ** 2))
        grey = coarse
    return found


def _levels(grey: Tensor) -> list[Tensor]:
    flat = grey.flatten(1)
    ordered = flat.sort(1).values
    places = [min(ordered.shape[1] - 1, math.floor(share * ordered.shape[1])) for share in _SHARES]
    ends = [(flat <= 0.5 * _STEP), (flat >= 1 - 0.5 * _STEP)]
    shares = [torch.log(end.to(torch.float64).mean(1) + _RARE) for end in ends]
    return [torch.log(flat.std(1) + _STEP), *(ordered[:, place] for place in places), *shares]
