"""Blur by scattering in front of the camera."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng

from ._checks import check_levels

_LONGEST = 32766  # side of an image that OpenCV's 16-bit maps can address


def offsets(bits: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Return vertical and horizontal offsets, float32 integers, of round((u - 1/2)(2 reach + 1)) with u uniform.

    For a whole ``reach`` they are uniform on -reach ... reach; in between, the share of pixels that move grows steadily
    from 0 at reach 0. They are symmetric, and none shrinks when ``reach`` grows.

    Args:
        bits: int32, any shape; its upper and lower halves make the two.
        reach: In pixels, at least 0.
    """
    factor = (2 * reach + 1) / 65536
    upper, lower = (
        (half & 0xFFFF).to(torch.float32).sub_(32767.5).mul_(factor).round_() for half in (bits >> 16, bits)
    )
    return upper, lower


def gather(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Return images (N, C, H, W) whose pixel at p is the old one at p + offset, edges repeated.

    Args:
        images: Any type.
        row: float32 integers (N, H, W), vertical offsets.
        column: float32 integers (N, H, W), horizontal offsets.
    """
    height, width = images.shape[2:]
    down = torch.arange(height, dtype=torch.float32, device=images.device)[:, None]
    right = torch.arange(width, dtype=torch.float32, device=images.device)
    source = (row + down).clamp_(0, height - 1).to(torch.int64).mul_(width)
    source.add_((column + right).clamp_(0, width - 1).to(torch.int64))
    flat = images.flatten(2)
    return flat.gather(2, source.flatten(1)[:, None].expand(flat.shape)).view(images.shape)


@CORRUPTIONS.register("glass-blur")
@dataclass(frozen=True)
class GlassBlur(Corruption):
    """A rough surface in front of the lens scatters pixels: each shows the one at a random place near it.

    Nothing is averaged: fine structure is torn up rather than smoothed, and strong levels look grainy. Offsets are
    symmetric and pixels are only read, so content does not drift and none is written over, unlike in the published
    operator (``ref:glass-blur``).

    Args:
        reach: Farthest offset along each axis, in percent of the image height, 0 to 50.
    """

    family: ClassVar[str] = "blur"
    stage: ClassVar[str] = "optics"
    seen_in: ClassVar[tuple[str, ...] | None] = ("endoscopy", "fundus")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    reach: Levels = Levels((0.13, 0.3, 0.6, 1.1, 1.8), identity=0.0, unit="% of image height", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "reach", self.reach, 0, 50)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        return {"bits": rng.bits("offsets", shape[1] * shape[2]).view(len(rng), shape[1], shape[2])}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        return gather(images, *offsets(draws["bits"], values["reach"] / 100 * images.shape[2]))

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        count, channels, height, width = pixels.shape
        reach = values["reach"] / 100 * height
        if pixels.device.type != "cpu" or channels > 4 or max(height, width) > _LONGEST:
            return gather(pixels, *offsets(draws["bits"], reach))
        out = torch.empty((count, height, width, channels), dtype=torch.uint8)
        images, changed = pixels.permute(0, 2, 3, 1), out.numpy()
        places = torch.empty((height, width, 2), dtype=torch.int16)
        down = torch.arange(height, dtype=torch.float32)[:, None]
        right = torch.arange(width, dtype=torch.float32)
        for place in range(count):
            row, column = offsets(draws["bits"][place], reach)
            places[:, :, 0] = column.add_(right)
            places[:, :, 1] = row.add_(down)
            image = images[place].contiguous().numpy()
            shown = cv2.remap(image, places.numpy(), np.empty(0), cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
            changed[place] = shown.reshape(height, width, channels)
        return out.permute(0, 3, 1, 2)
