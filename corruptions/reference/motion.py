"""Motion blur as published."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from corruptions._checks import check_levels
from corruptions.blur import Floats, Image, Kernel, image_by_image
from corruptions.motion import gather_along, mean_along
from robustlab.core.corruption import Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng

from .base import Reference
from .blur import in_doubt

_SIXTEEN = 257  # an 8-bit level among the 16-bit levels of ImageMagick


@lru_cache(maxsize=64)
def magick_weights(radius: float, sigma: float) -> Kernel:
    """Return the weights of ImageMagick's motion blur: half a Gaussian, 2 ceil(radius) + 1 steps from its peak on."""
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(steps**2) / (2.0 * sigma * sigma)) / (math.sqrt(2 * math.pi) * sigma)
    kernel: Kernel = weights / np.cumsum(weights)[-1]
    return kernel


def magick_offsets(angle: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the offsets (down, right), int64 (N, count), of the pixels that ImageMagick reads.

    They are worked out on the CPU, since another last digit of a sine, as on CUDA, could pick another pixel.

    Args:
        angle: (N,), degrees, downwards from the horizontal.
        count: Steps, the first of which is the pixel itself.
    """
    theta = angle.to("cpu", torch.float64) * (math.pi / 180)
    down, right = count * torch.sin(theta), count * torch.cos(theta)
    steps = torch.arange(count, dtype=torch.float64)
    length = torch.hypot(down, right)[:, None]
    rows, columns = (
        torch.ceil(steps * each[:, None] / length - 0.5).to(torch.int64).to(angle.device) for each in (down, right)
    )
    return rows, columns


def _stored(sums: Tensor) -> Tensor:
    """Return bytes of float64 sums of 16-bit levels: rounded to 16 bits, and truncated to 8."""
    return torch.floor(sums + 0.5).to(torch.int64).floor_divide_(_SIXTEEN).to(torch.uint8)


def magick_blur_tensor(pixels: Tensor, rows: Tensor, columns: Tensor, weights: Kernel) -> Tensor:
    """Return the blurred images on any device, from float64 sums over whole images."""
    shares = torch.from_numpy(weights).to(pixels.device).expand(len(pixels), -1)
    return _stored(gather_along(pixels.to(torch.float64).mul_(_SIXTEEN), rows, columns, shares))


def _magick_blur(image: Image, rows: list[int], columns: list[int], weights: Kernel, scratch: Floats) -> Image:
    """Return the blurred image; pixels that float32 leaves in doubt are summed again in float64."""
    np.copyto(scratch, image)
    total = mean_along(scratch, (rows, columns, weights.tolist()), scratch)
    # 8-bit levels are reached from half a 16-bit level below; a float32 sum loses at most half a digit for each tap
    out, places = in_doubt(total, 2e-5 + len(rows) * 2.0**-17, 0.5 / _SIXTEEN)
    if len(places):
        height, width = image.shape[:2]
        row, column, plane = np.unravel_index(places, (height, width, image.size // (height * width)))
        down = np.clip(row + np.array(rows)[:, None], 0, height - 1)
        right = np.clip(column + np.array(columns)[:, None], 0, width - 1)
        values = image.reshape(height, width, -1)[down, right, plane].astype(np.float64) * _SIXTEEN
        # cumulated, since a plain sum may be taken in another order
        sums = np.cumsum(weights[:, None] * values, axis=0)[-1]
        out.reshape(-1)[places] = _stored(torch.from_numpy(sums)).numpy()
    return out


@CORRUPTIONS.register("ref:motion-blur")
@dataclass(frozen=True)
class RefMotionBlur(Reference):
    """Motion blur of ImageNet-C and MedMNIST-C: ImageMagick's, which looks to one side and so shifts the contents.

    The angle is uniform on -45 to 45 degrees. Pixels i = 0 ... 2 ceil(radius) steps away weigh exp(-i^2 / 2 sigma^2),
    borders are repeated, and sums are rounded to 16 bits and then truncated to 8.

    Args:
        radius: Half the number of steps, in pixels.
        sigma: Standard deviation of the weights, in pixels.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "blur"
    stage: ClassVar[str] = "subject"
    seen_in: ClassVar[tuple[str, ...] | None] = ("ultrasound", "fundus", "dermoscopy", "endoscopy", "histology", "oct")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    alike: ClassVar[bool] = True
    radius: Levels = Levels((10, 15, 15, 15, 20), identity=0.0, unit="px")
    sigma: Levels = Levels((3, 5, 8, 12, 15), identity=0.0, unit="px")

    def __post_init__(self) -> None:
        check_levels(self, "radius", self.radius, 0, 500)
        check_levels(self, "sigma", self.sigma, 0, 1000)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        return {"angle": rng.uniform("angle") * 90 - 45}

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        weights = magick_weights(values["radius"], max(values["sigma"], 1e-12))
        rows, columns = magick_offsets(draws["angle"], len(weights))
        if pixels.device.type != "cpu":
            return magick_blur_tensor(pixels, rows, columns, weights)
        down, right = rows.tolist(), columns.tolist()

        def blurred(place: int, image: Image, scratch: Floats) -> Image:
            return _magick_blur(image, down[place], right[place], weights, scratch)

        return image_by_image(blurred, pixels)
