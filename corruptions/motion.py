"""Motion during the exposure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import cv2
import torch
from torch import Tensor

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng

from ._checks import check_levels
from .blur import Floats, Image, image_by_image, to_levels, to_units

Taps = tuple[list[int], list[int], list[float]]

_SMALLEST = 1e-9  # weights below are left out: of a sum of at most 1, less than a float32 digit


def line_taps(angle: Tensor, length: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the offsets (down, right), int64 (N, K), and float64 weights (N, K) of centred lines.

    The image is interpolated linearly between whole steps along the axis nearer to the line, and linearly across, and
    its mean along the line is taken. Weights therefore move smoothly with length and angle, tap k and its mirror image
    weigh the same (the centroid stays), and both axes agree on the diagonal, where they change places.

    Args:
        angle: (N,), degrees from the horizontal, upwards.
        length: Of the line, in pixels, above 0.
    """
    theta = angle.to(torch.float64) * (math.pi / 180)
    right, down = torch.cos(theta), -torch.sin(theta)
    steep = down.abs() > right.abs()
    along, across = torch.where(steep, down, right), torch.where(steep, right, down)
    # half the line, in steps; far shorter lines would lose their digits below
    half = (along.abs() * (length / 2)).clamp_min(1e-6)[:, None]
    reach = math.ceil(length / 2 + 1) - 1
    step = torch.arange(-reach, reach + 1, dtype=torch.float64, device=angle.device)[None, :]
    weight = (_ramp(half - step) - _ramp(-half - step)) / (2 * half)
    place = step * (across / along)[:, None]
    floor = place.floor()
    part = place - floor
    steps = step.expand_as(floor)
    long, short = torch.cat([steps, steps], 1), torch.cat([floor, floor + 1], 1)
    weight = torch.cat([weight * (1 - part), weight * part], 1)
    rows, columns = torch.where(steep[:, None], long, short), torch.where(steep[:, None], short, long)
    return rows.to(torch.int64), columns.to(torch.int64), weight


def _ramp(z: Tensor) -> Tensor:
    """Integral of the hat 1 - |x| from -1 to z."""
    z = z.clamp(-1, 1)
    return torch.where(z < 0, (z + 1) ** 2 / 2, 1 - (1 - z) ** 2 / 2)


def mean_along(image: Floats, taps: Taps, out: Floats) -> Floats:
    """Return float32 sums over taps of ``weight`` times the image shifted by (``row``, ``column``), borders repeated.

    Args:
        image: float32 (H, W) or (H, W, 3).
        taps: Of the pixels that are read: offsets downwards, offsets to the right, weights; the smallest are left out.
        out: Where the sums go; may be the image itself.
    """
    rows, columns, weights = taps
    height, width = image.shape[:2]
    top, left = max(0, -min(rows)), max(0, -min(columns))
    bottom, right = max(0, max(rows)), max(0, max(columns))
    padded = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_REPLICATE)
    out.fill(0)
    for row, column, weight in zip(rows, columns, weights, strict=True):
        if weight > _SMALLEST:
            part = padded[top + row : top + row + height, left + column : left + column + width]
            cv2.scaleAdd(part, weight, out, dst=out)
    return out


def gather_along(images: Tensor, rows: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """Return such sums for a batch on any device: images (N, C, H, W), taps (N, K), each tap one gather.

    Products and sums are rounded one by one in the images' dtype, and no tap is left out, so that float32 results
    differ from those of ``mean_along`` in the last digits.
    """
    count, channels, height, width = images.shape
    flat = images.reshape(count, channels, height * width)
    down = torch.arange(height, device=images.device)[None, :, None]
    right = torch.arange(width, device=images.device)[None, None, :]
    weights = weights.to(images.dtype)
    total = torch.zeros_like(flat)
    for tap in range(rows.shape[1]):
        row = (down + rows[:, tap, None, None]).clamp_(0, height - 1)
        column = (right + columns[:, tap, None, None]).clamp_(0, width - 1)
        index = (row * width + column).reshape(count, 1, -1).expand(-1, channels, -1)
        total.add_(flat.gather(2, index).mul_(weights[:, tap, None, None]))
    return total.reshape(images.shape)


@CORRUPTIONS.register("motion-blur")
@dataclass(frozen=True)
class MotionBlur(Corruption):
    """Steady motion during the exposure: the mean of the image along a straight line, in a direction that is drawn.

    The line is centred on the pixel, so that contents get longer and do not move; borders are repeated.

    Args:
        length: Of the line, in percent of the image height.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "blur"
    stage: ClassVar[str] = "subject"
    seen_in: ClassVar[tuple[str, ...] | None] = ("xray", "ultrasound", "fundus", "dermoscopy", "endoscopy", "histology")
    length: Levels = Levels((1.6, 2.6, 4.2, 6.4, 9.5), identity=0.0, unit="% of image height", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "length", self.length, 0, 100)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        return {"angle": rng.uniform("angle") * 180}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        length = values["length"] / 100 * images.shape[2]
        if length == 0:
            return images
        rows, columns, weights = line_taps(draws["angle"], length)
        if images.device.type != "cpu":
            return gather_along(images, rows, columns, weights)
        taps = _each(rows, columns, weights)
        return image_by_image(lambda place, image, scratch: mean_along(image, taps[place], scratch), images)

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        if pixels.device.type != "cpu" or values["length"] == 0:
            return super().apply_bytes(pixels, draws, values)
        taps = _each(*line_taps(draws["angle"], values["length"] / 100 * pixels.shape[2]))

        def blurred(place: int, image: Image, scratch: Floats) -> Image:
            return to_levels(mean_along(to_units(image, scratch), taps[place], scratch))

        return image_by_image(blurred, pixels)


def _each(rows: Tensor, columns: Tensor, weights: Tensor) -> list[Taps]:
    return list(zip(rows.tolist(), columns.tolist(), weights.tolist(), strict=True))
