"""Loss of resolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS

from ._checks import check_levels
from ._resample import Taps, area_down, box_resize, linear_up, pixelate_bytes, resample, resample_bytes


@CORRUPTIONS.register("down-up-sampling")
@dataclass(frozen=True)
class DownUpSampling(Corruption):
    """A coarser detector: averages over square cells of ``factor`` pixels, interpolated linearly back to the old grid.

    Cells are laid from the upper left corner and ``factor`` may be any real number. Averages over whole cells suppress
    aliasing, though not all of it, and the contents stay in place, except that a last cell cut off by the border moves
    what is there by up to half a cell.

    Args:
        factor: Side of a cell, in pixels of the original.
    """

    family: ClassVar[str] = "resolution"
    stage: ClassVar[str] = "sampling"
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    factor: Levels = Levels((1.5, 2, 3, 4, 6), identity=1.0, unit="x pixel size", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "factor", self.factor, 1)

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        return resample(images, *_cells(images, values["factor"]))

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        return resample_bytes(pixels, *_cells(pixels, values["factor"]))


def _cells(images: Tensor, factor: float) -> tuple[tuple[Taps, Taps], tuple[Taps, Taps]]:
    """Return the taps down to cells of ``factor`` pixels and up again, along height and width."""
    height, width, pitch = *images.shape[2:], max(factor, 1.0)
    down = area_down(height, pitch), area_down(width, pitch)
    return down, (linear_up(height, pitch), linear_up(width, pitch))


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
    stage: ClassVar[str] = "display"
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    factor: Levels = Levels((0.6, 0.45, 0.33, 0.25, 0.18), identity=1.0, unit="of pixels per side", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "factor", self.factor, 1e-6, 1)

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        height, width = images.shape[2:]
        rows, columns = counts(images, values["factor"])
        down = box_resize(height, rows), box_resize(width, columns)
        return resample(images, down, (box_resize(rows, height), box_resize(columns, width)))

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        height, width = pixels.shape[2:]
        rows, columns = counts(pixels, values["factor"])
        return pixelate_bytes(pixels, (box_resize(height, rows), box_resize(width, columns)))


def counts(images: Tensor, factor: float) -> tuple[int, int]:
    """Return the rows and columns that are left: floor(factor size), at least 1."""
    height, width = (min(size, max(1, int(size * factor))) for size in images.shape[2:])
    return height, width
