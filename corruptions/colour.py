"""Colour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng
from robustlab.core.shift import from_bytes

from ._bytes import by_blocks
from ._checks import check_levels

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@CORRUPTIONS.register("saturation")
@dataclass(frozen=True)
class Saturation(Corruption):
    """Stronger or weaker colours, Y + k (x - Y) about the luma Y, with k = f or 1 / f, drawn for each image.

    Computed as x + (k - 1)(x - Y) with x - Y as a weighted sum of differences between channels, so that grey and white
    pixels keep their value to the last bit.

    Args:
        factor: f, at least 1.
    """

    family: ClassVar[str] = "staining"
    stage: ClassVar[str] = "processing"
    channels: ClassVar[tuple[int, ...] | None] = (3,)
    seen_in: ClassVar[tuple[str, ...] | None] = ("histology", "microscopy", "dermoscopy", "fundus", "endoscopy")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    factor: Levels = Levels((1.25, 1.5, 1.9, 2.4, 3.0), identity=1.0, unit="x colourfulness", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "factor", self.factor, 1)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        return {"sign": rng.sign("sign", (1, 1, 1))}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        factor = values["factor"]
        change = torch.where(draws["sign"] > 0, factor - 1, 1 / factor - 1).to(torch.float32)
        out = torch.empty_like(images)
        planes = [images[:, channel : channel + 1] for channel in range(3)]
        for channel, plane in enumerate(planes):
            first, second = (other for other in range(3) if other != channel)
            chroma = (plane - planes[first]).mul_(_LUMA[first])
            chroma.add_((plane - planes[second]).mul_(_LUMA[second]))
            out[:, channel : channel + 1] = chroma.mul_(change).add_(plane)
        return out

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        return by_blocks(
            lambda part, block: self.apply(from_bytes(part), {"sign": draws["sign"][block]}, values), pixels
        )
