"""Loss of resolution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng

from ._checks import check_levels
from ._resample import area_down, box_resize, linear_up, resample


@CORRUPTIONS.register("down-up-sampling")
@dataclass(frozen=True)
class DownUpSampling(Corruption):
    """A coarser detector: averages over square cells of ``factor`` pixels, interpolated linearly back to the old grid.

    Cells are laid from the upper left corner and ``factor`` may be any real number, so that nothing moves and nothing
    aliases.

    Args:
        factor: Side of a cell, in pixels of the original.
    """

    family: ClassVar[str] = "resolution"
    factor: Levels = Levels((1.5, 2, 3, 4, 6), identity=1.0, unit="x pixel size", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "factor", self.factor, 1)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del rng, shape
        return {}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        height, width, pitch = *images.shape[2:], max(values["factor"], 1.0)
        return resample(
            images,
            (area_down(height, pitch), area_down(width, pitch)),
            (linear_up(height, pitch), linear_up(width, pitch)),
        )


@CORRUPTIONS.register("pixelate")
@dataclass(frozen=True)
class Pixelate(Corruption):
    """Visible pixels: Pillow's BOX filter down to floor(factor H) x floor(factor W), at least 1, and BOX up again.

    Args:
        factor: Pixels left along each side, of the original count.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "resolution"
    factor: Levels = Levels((0.6, 0.45, 0.33, 0.25, 0.18), identity=1.0, unit="of pixels per side", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "factor", self.factor, 1e-6, 1)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del rng, shape
        return {}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        sizes = tuple(images.shape[2:])
        counts = tuple(min(size, max(1, math.floor(size * values["factor"]))) for size in sizes)
        down = [box_resize(size, count) for size, count in zip(sizes, counts, strict=True)]
        up = [box_resize(count, size) for size, count in zip(sizes, counts, strict=True)]
        return resample(images, (down[0], down[1]), (up[0], up[1]))
