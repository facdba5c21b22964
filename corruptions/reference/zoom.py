"""Zoom blur as published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from corruptions._bytes import blocks
from corruptions._checks import check_levels
from robustlab.core.corruption import Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.shift import from_bytes

from ._scipy import centre_crop
from .base import Reference

_HALF = 1 << 28  # float64 has 29 more bits than float32; the middle between two float32 numbers has the first one set


class _Line:
    """SciPy's linear interpolation of ``size`` pixels at ``count`` places from the first to the last, in float64."""

    def __init__(self, size: int, count: int, device: torch.device) -> None:
        pitch = (size - 1) / (count - 1) if count > 1 else 1.0
        place = torch.arange(count, dtype=torch.float64, device=device) * pitch
        floor = place.floor()
        self.low = floor.to(torch.int64).clamp_max_(size - 1)
        self.high = (self.low + 1).clamp_max_(size - 1)
        self.before = 1 - (place - floor)
        self.after = 1 - self.before  # not place - floor: the weights are to sum to one
        self.past = (count - 1) * pitch > size - 1
        """Rounding takes the last place past the last pixel; SciPy writes zeros there."""


def _summed(
    corners: tuple[Tensor, Tensor, Tensor, Tensor], rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the bilinear sum in SciPy's order of operations."""
    total = torch.zeros((), dtype=torch.float64, device=corners[0].device)
    for place, corner in enumerate(corners):
        total = total + corner * rows[place >> 1] * columns[place & 1]
    return total


def _zoomed(crop: Tensor, row: _Line, column: _Line) -> Tensor:
    """Return float32 (N, C, rows, columns) in SciPy's order of operations."""
    lines = [crop.index_select(2, place) for place in (row.low, row.high)]
    corners = [line.index_select(3, place) for line in lines for place in (column.low, column.high)]
    a, b, c, d = corners
    weights = (row.before[:, None], row.after[:, None]), (column.before, column.after)
    return _summed((a, b, c, d), *weights).to(torch.float32)


def _zoomed_fast(crop: Tensor, row: _Line, column: _Line) -> Tensor:
    """Return the same by torch's interpolation, whose order of operations differs in the last bit of float64.

    That bit decides only where a value lies next to the middle between two float32 numbers (1 in 100,000, since
    weights are fractions with small denominators); those are computed again.
    """
    size = len(row.low), len(column.low)
    grown = interpolate(crop, size=size, mode="bilinear", align_corners=True)
    doubt = (grown.view(torch.int64) - (_HALF - 16)).bitwise_and_(2 * _HALF - 1) < 32
    out = grown.to(torch.float32)
    if bool(doubt.any()):
        n, c, i, j = doubt.nonzero(as_tuple=True)
        at = [crop[n, c, line[i], place[j]] for line in (row.low, row.high) for place in (column.low, column.high)]
        weights = (row.before[i], row.after[i]), (column.before[j], column.after[j])
        out[n, c, i, j] = _summed((at[0], at[1], at[2], at[3]), *weights).to(torch.float32)
    return out


def clipped_zoom(images: Tensor, zoom: float) -> Tensor:
    """Return SciPy's ``zoom(order=1)`` of the centre crop of ceil(size / zoom) pixels, trimmed to the old size.

    Output pixel k of n lies at k (m - 1) / (n - 1) of the m pixels of the crop.

    Args:
        images: float64 (N, C, H, W).
        zoom: At least 1.

    Returns:
        float32 (N, C, H, W).
    """
    (top, high, tall, over), (left, broad, wide, beside) = (centre_crop(size, zoom) for size in images.shape[2:])
    crop = images[:, :, top : top + high, left : left + broad]
    row, column = _Line(high, tall, images.device), _Line(broad, wide, images.device)
    grown = (_zoomed_fast if images.device.type == "cpu" else _zoomed)(crop, row, column)
    if row.past:
        grown[:, :, -1] = 0
    if column.past:
        grown[:, :, :, -1] = 0
    height, width = images.shape[2:]
    return grown[:, :, over : over + height, beside : beside + width]


def zoom_blur(pixels: Tensor, zooms: list[float]) -> Tensor:
    """Return the mean of the image and of all zoomed ones, which holds the image itself twice, as uint8.

    Layers are computed in float64 and added in float32 one after the other, as SciPy and NumPy do; the scaled mean is
    truncated.

    Args:
        pixels: uint8 (N, C, H, W).
        zooms: Zoom factors, each at least 1.
    """
    images = from_bytes(pixels.contiguous())
    fine = images.to(torch.float64, memory_format=torch.channels_last)
    total = torch.zeros_like(images)
    for zoom in zooms:
        total.add_(images if zoom == 1 else clipped_zoom(fine, zoom))
    # a tensor, since CUDA would multiply by the reciprocal of a Python number
    mean = total.add_(images).div_(torch.full((), float(len(zooms) + 1), device=total.device))
    return mean.clamp_(0, 1).mul_(255).to(torch.uint8)


@CORRUPTIONS.register("ref:zoom-blur")
@dataclass(frozen=True)
class RefZoomBlur(Reference):
    """Zoom blur of ImageNet-C and MedMNIST-C: the mean over zooms 1, 1 + step, ... below ``stop``, and the image again.

    The zooms are those of ``numpy.arange(1, stop, step)``, whose rounding may add one at the end. Images that are not
    square are cropped along each axis, as in imagecorruptions.

    Args:
        stop: End of the zoom factors, 1 to 10.
        step: Between zoom factors, 0.001 to 1.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "blur"
    stage: ClassVar[str] = "subject"
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    seen_in: ClassVar[tuple[str, ...] | None] = ("dermoscopy",)
    alike: ClassVar[bool] = True
    stop: Levels = Levels((1.11, 1.16, 1.21, 1.26, 1.31), identity=1.0, unit="x, end of zoom factors")
    step: Levels = Levels((0.01, 0.01, 0.02, 0.02, 0.03), identity=0.01, unit="x, between zoom factors")

    def __post_init__(self) -> None:
        check_levels(self, "stop", self.stop, 1, 10)
        check_levels(self, "step", self.step, 1e-3, 1)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        zooms: list[float] = np.arange(1, values["stop"], values["step"]).tolist()
        out = torch.empty_like(pixels, memory_format=torch.contiguous_format)
        for part in blocks(pixels):
            out[part] = zoom_blur(pixels[part], zooms)
        return out
