"""SciPy's Gaussian filter and the geometry of its zoom, which several published operators call."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from corruptions.blur import Kernel

Values = np.ndarray[Any, np.dtype[Any]]


@lru_cache(maxsize=64)
def scipy_kernel(sigma: float, truncate: float = 4.0) -> Kernel:
    """Return the weights of SciPy's Gaussian, float64 (2 R + 1,), R = int(truncate sigma + 1/2).

    Args:
        sigma: In pixels, at least 0.
        truncate: Reach of the kernel, in sigma.
    """
    reach = int(truncate * sigma + 0.5)
    weights = np.exp(-0.5 / (sigma * sigma) * np.arange(-reach, reach + 1) ** 2) if reach else np.ones(1)
    kernel: Kernel = weights / weights.sum()
    return kernel


def fold(values: Values, kernel: Kernel) -> Values:
    """Return weighted sums along axis 1, of length 2 R + 1, in the order of SciPy: centre first, then outer to inner.

    Products and sums are rounded one by one.
    """
    reach = len(kernel) // 2
    total: Values = values[:, reach] * kernel[reach]
    for place in range(reach):
        total += (values[:, place] + values[:, 2 * reach - place]) * kernel[place]
    return total


def continued(size: int, reach: int, mode: Literal["nearest", "reflect"]) -> Tensor:
    """Return int64 (size + 2 reach,): the pixel at each place, edges repeated or reflected about the border."""
    places = np.arange(-reach, size + reach)
    if mode == "nearest":
        return torch.from_numpy(places.clip(0, size - 1))
    places %= 2 * size
    return torch.from_numpy(np.minimum(places, 2 * size - 1 - places))


def gaussian(planes: Tensor, sigma: float, truncate: float, mode: Literal["nearest", "reflect"]) -> Tensor:
    """Return SciPy's ``gaussian_filter`` along the last two axes, with the bits of SciPy on any device.

    Terms are added in the order of ``fold``. At sigma 0 the planes themselves are returned.

    Args:
        planes: float64 (..., H, W).
        sigma: In pixels, at least 0.
        truncate: Reach of the kernel, in sigma.
        mode: What lies outside: the ``"nearest"`` pixel, or the image mirrored about its border.
    """
    kernel = scipy_kernel(sigma, truncate).tolist()
    reach = len(kernel) // 2
    if reach == 0:
        return planes
    for axis in (-2, -1):
        size = planes.shape[axis]
        wide = planes.index_select(axis, continued(size, reach, mode).to(planes.device))
        total = wide.narrow(axis, reach, size) * kernel[reach]
        term = torch.empty_like(total)
        for place in range(reach):
            torch.add(wide.narrow(axis, place, size), wide.narrow(axis, 2 * reach - place, size), out=term)
            total.add_(term.mul_(kernel[place]))
        planes = total
    return planes


def centre_crop(size: int, zoom: float) -> tuple[int, int, int, int]:
    """Return how the sources magnify one axis: the crop's first pixel and length, its grown length, and what is cut.

    The central ceil(size / zoom) pixels grow to a rounded number of pixels, of which as many are trimmed in front as
    leave the middle ``size``.
    """
    crop = math.ceil(size / zoom)
    grown = round(crop * zoom)
    return (size - crop) // 2, crop, grown, (grown - size) // 2
