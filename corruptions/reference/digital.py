"""JPEG and pixelation as published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from corruptions._bytes import each_image_into
from corruptions._checks import check_levels
from corruptions._resample import box_blocks, box_down, nearest
from corruptions.compression import compress
from corruptions.resolution import counts
from robustlab.core.corruption import Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS

from .base import Reference


@CORRUPTIONS.register("ref:jpeg")
@dataclass(frozen=True)
class RefJPEG(Reference):
    """JPEG by Pillow with its defaults (4:2:0 chroma), as in ImageNet-C and MedMNIST-C.

    Args:
        quality: libjpeg quality, 1 to 100, rounded to an integer. Levels of ImageNet-C at 224 px.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
        F. Di Salvo et al., "MedMNIST-C: comprehensive benchmark and improved classifier robustness by simulating
        realistic image corruptions", 2024, 2406.17536.
    """

    family: ClassVar[str] = "compression"
    stage: ClassVar[str] = "compression"
    alike: ClassVar[bool] = True
    quality: Levels = Levels((25, 18, 15, 10, 7), identity=100.0, unit="libjpeg quality", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "quality", self.quality, 1, 100)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        return compress(pixels, values["quality"])


@CORRUPTIONS.register("ref:pixelate")
@dataclass(frozen=True)
class RefPixelate(Reference):
    """Pillow's BOX filter down to int(factor W) x int(factor H) pixels and up again, with 8-bit rounding in between.

    As in ImageNet-C and MedMNIST-C. The filter runs along rows first, as Pillow's does; only for images about twice as
    high as wide or more do its latest versions start with columns. Where the sources would ask for an image without
    pixels and fail, one pixel is left.

    Args:
        factor: Pixels left along each side, of the original count. Levels of ImageNet-C at 224 px.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
        F. Di Salvo et al., "MedMNIST-C: comprehensive benchmark and improved classifier robustness by simulating
        realistic image corruptions", 2024, 2406.17536.
    """

    family: ClassVar[str] = "resolution"
    stage: ClassVar[str] = "display"
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    alike: ClassVar[bool] = True
    factor: Levels = Levels((0.6, 0.5, 0.4, 0.3, 0.25), identity=1.0, unit="of pixels per side", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "factor", self.factor, 1e-6, 1)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        rows, columns = counts(pixels, values["factor"])
        if pixels.device.type == "cpu":
            return each_image_into(lambda: partial(box_blocks, height=rows, width=columns), pixels)
        return nearest(box_down(pixels, rows, columns), *pixels.shape[2:])
