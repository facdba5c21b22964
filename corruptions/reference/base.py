"""Reference mode: published corruptions on 8-bit pixels, with their source's own rounding and faults."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.shift import from_bytes, to_bytes


@dataclass(frozen=True)
class Reference(Corruption):
    """A published operator: uint8 RGB in, uint8 RGB out, step for step as in its source.

    Grey images go through three equal channels and come back as Pillow's luma, as in MedMNIST-C; for noise that is one
    of its faults (two thirds of the nominal standard deviation are left). Float images are rounded to 8 bits first.

    Args:
        published: Name in the published benchmark, shown in tables in place of the registered one.
        made_for: Side in pixels of the images that the published parameters were chosen for; 0 if unknown.
    """

    mode: ClassVar[Literal["physical", "reference"]] = "reference"
    channels: ClassVar[tuple[int, ...] | None] = (1, 3)
    alike: ClassVar[bool] = False
    """Equal channels stay equal, and each depends on itself only, so that grey images may take one channel."""

    published: str = field(default="", kw_only=True)
    made_for: int = field(default=0, kw_only=True)

    @property
    def label(self) -> str:
        return self.published or self.name

    @abstractmethod
    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        """Return changed pixels.

        Args:
            pixels: uint8 (N, 3, H, W), or (N, 1, H, W) where the channels are ``alike``; of any strides; must not be
                changed in place.
            draws: What ``draw`` returned for the images' own shape, (1, H, W) for grey ones also where ``pixels`` has
                three channels: an operator that is not ``alike`` may not take its number of channels from there.
            values: Parameter name to value.

        Returns:
            uint8, of the same shape.
        """

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        return from_bytes(self.apply_bytes(to_bytes(images), draws, values))

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        if pixels.shape[1] == 3 or self.alike:
            return self.change(pixels, draws, values)
        return grey_of(self.change(pixels.expand(-1, 3, -1, -1), draws, values))


def grey_of(pixels: Tensor) -> Tensor:
    """Return Pillow's luma, uint8 (N, 1, H, W), of uint8 RGB images: (19595 R + 38470 G + 7471 B + 32768) >> 16."""
    red, green, blue = (pixels[:, channel : channel + 1].to(torch.int32) for channel in range(3))
    total = red.mul_(19595).add_(green.mul_(38470)).add_(blue.mul_(7471)).add_(32768)
    return total.bitwise_right_shift_(16).to(torch.uint8)
