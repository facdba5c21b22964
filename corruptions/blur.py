"""Blur."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng

from ._checks import check_levels

_BLOCK = 1 << 17  # pixels worked on at once on the CPU: 512 KB, which stays in a core's cache


@lru_cache(maxsize=64)
def disc_kernel(radius: float) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return the (2 R + 1, 2 R + 1) weights of the mean, over a disc, of the bilinearly interpolated image.

    The weight of a pixel is the mean of the bilinear hat (1 - |x|)(1 - |y|) over the disc, so the kernel changes
    smoothly from the single pixel at radius 0 on, also below one pixel.

    Args:
        radius: Of the disc, in pixels, above 0.
    """
    reach = math.ceil(radius + 1) - 1
    rings = 16 + 4 * reach
    nodes, weights = np.polynomial.legendre.leggauss(rings)
    r = radius * (nodes + 1) / 2
    angle = (np.arange(8 * rings) + 0.5) * (2 * math.pi / (8 * rings))
    x, y = (r[:, None] * f(angle)[None, :] for f in (np.cos, np.sin))
    share = np.broadcast_to((weights * r)[:, None], x.shape)
    size = 2 * reach + 3
    kernel: np.ndarray[tuple[int, int], np.dtype[np.float64]] = np.zeros((size, size))
    column, row = np.floor(x), np.floor(y)
    for right in (0, 1):
        for below in (0, 1):
            hat = np.abs(1 - right - (x - column)) * np.abs(1 - below - (y - row))
            place = (row.astype(int) + below + reach + 1, column.astype(int) + right + reach + 1)
            np.add.at(kernel, place, share * hat)
    kernel = kernel[1:-1, 1:-1] / kernel.sum()
    kernel = (kernel + kernel[::-1]) / 2
    kernel = (kernel + kernel[:, ::-1]) / 2
    kernel = (kernel + kernel.T) / 2
    far = np.abs(np.arange(-reach, reach + 1)) + 1
    kernel[np.hypot(far[:, None], far[None, :]) <= radius] = 1 / (math.pi * radius * radius)
    kernel /= kernel.sum()
    return kernel


def disc_blur(images: Tensor, radius: float) -> Tensor:
    """Return images blurred by a disc of ``radius`` pixels, borders repeated.

    The kernel is written as nested horizontal boxes shifted up and down, which takes a number of image additions
    proportional to the radius instead of its square, in an order that does not depend on the batch.
    """
    if radius == 0:
        return images
    kernel = disc_kernel(radius)
    reach = len(kernel) // 2
    quarter = kernel[reach:, reach:]
    steps = quarter - np.pad(quarter, ((0, 0), (0, 1)))[:, 1:]
    height, width = images.shape[2:]
    rows = max(1, _BLOCK // (height * width)) if images.device.type == "cpu" else images.shape[0] * images.shape[1]
    planes = images.reshape(-1, height, width)
    out = torch.empty_like(planes)
    for start in range(0, len(planes), rows):
        out[start : start + rows] = _nested_boxes(planes[start : start + rows], steps, reach)
    return out.reshape(images.shape)


def _nested_boxes(planes: Tensor, steps: np.ndarray[tuple[int, int], np.dtype[np.float64]], reach: int) -> Tensor:
    height, width = planes.shape[1:]
    padded = pad(planes[:, None], (reach,) * 4, mode="replicate")[:, 0]
    box = padded[:, :, reach : reach + width].clone()
    total = torch.zeros_like(planes)
    for half in range(reach + 1):
        if half:
            box.add_(padded[:, :, reach - half : reach - half + width])
            box.add_(padded[:, :, reach + half : reach + half + width])
        for shift, weight in enumerate(steps[:, half].tolist()):
            if abs(weight) < 1e-12:
                continue
            term = box[:, reach + shift : reach + shift + height]
            if shift:
                term = term + box[:, reach - shift : reach - shift + height]
            total.add_(term, alpha=weight)
    return total


@CORRUPTIONS.register("defocus-blur")
@dataclass(frozen=True)
class DefocusBlur(Corruption):
    """Defocus: the mean of the image over a disc, the image of a point through an open aperture.

    Args:
        radius: Of the disc, in percent of the image height, so that small and large images lose the same structures.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "blur"
    radius: Levels = Levels((0.6, 1.0, 1.6, 2.4, 3.5), identity=0.0, unit="% of image height", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "radius", self.radius, 0, 50)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del rng, shape
        return {}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        return disc_blur(images, values["radius"] / 100 * images.shape[2])
