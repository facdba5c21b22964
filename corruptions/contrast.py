"""Contrast, exposure and tone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng
from robustlab.core.shift import from_bytes

from ._bytes import copy_and_sums, every_level, look_up, rounded
from ._checks import check_levels

_UNIT = 31  # every level q / 255 in float32 is a multiple of 2^-31


@lru_cache(maxsize=1)
def _levels_in_units() -> tuple[int, int, Tensor]:
    """Return (factor, offset, rest): level q in float32 is (factor q + offset + rest[q]) 2^-31, rest in 0 to 255."""
    levels = from_bytes(torch.arange(256, dtype=torch.uint8)).to(torch.float64).mul_(2.0**_UNIT).to(torch.int64)
    factor = (1 << _UNIT) // 255
    rest = levels - factor * torch.arange(256)
    offset = int(rest.min())
    return factor, offset, (rest - offset).to(torch.uint8)


def copy_and_means(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return a copy, and the mean of ``from_bytes(pixels)`` over pixels and channels, float32 (N,), of exact sums."""
    factor, offset, rest = _levels_in_units()
    count = pixels[0].numel()
    copy, levels, rests = copy_and_sums(pixels, rest.to(pixels.device))
    total = levels * factor + rests + count * offset
    return copy, total.to(torch.float64).mul_(2.0**-_UNIT).div_(count).to(torch.float32)


def _means(images: Tensor) -> Tensor:
    # float64 sums of 8-bit pixels are exact, hence the same in any order and batch
    return images.flatten(1).to(torch.float64).sum(1).div_(images[0].numel()).to(torch.float32)


def _about(images: Tensor, mean: Tensor, factor: float) -> Tensor:
    mean = mean[:, None, None, None]
    return (images - mean).mul_(factor).add_(mean)


class _AboutMean(Corruption):
    """A factor on the distance from the mean of each image over pixels and channels."""

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del rng, shape
        return {}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        return _about(images, _means(images), values["factor"])

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        copy, mean = copy_and_means(pixels)
        # made by the same formula from the 256 levels, so that rounding is the same to the last digit
        levels = from_bytes(every_level(len(pixels), 1, pixels.device))
        return look_up(copy, rounded(_about(levels, mean, values["factor"])).flatten(1), overwrite=True)


@CORRUPTIONS.register("contrast-loss")
@dataclass(frozen=True)
class ContrastLoss(_AboutMean):
    """Flat contrast, m + f (x - m) about the mean m of each image over pixels and channels.

    Args:
        factor: f, the share of contrast that is left.
    """

    family: ClassVar[str] = "contrast"
    stage: ClassVar[str] = "processing"
    factor: Levels = Levels((0.75, 0.55, 0.4, 0.28, 0.18), identity=1.0, unit="of original contrast", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "factor", self.factor, 0, 1)


@CORRUPTIONS.register("contrast-gain")
@dataclass(frozen=True)
class ContrastGain(_AboutMean):
    """Hard contrast, m + f (x - m) about the mean m of each image: over-processed, with clipped blacks and whites.

    Args:
        factor: f, at least 1.
    """

    family: ClassVar[str] = "contrast"
    stage: ClassVar[str] = "processing"
    factor: Levels = Levels((1.2, 1.4, 1.7, 2.1, 2.6), identity=1.0, unit="x contrast", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "factor", self.factor, 1)


class _EitherWay(Corruption):
    """A tone curve of each pixel alone, and its opposite; which of the two an image gets is drawn."""

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        return {"sign": rng.sign("sign", (1, 1, 1))}

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        up, down = _curves(self, pixels.device, **values)
        return look_up(pixels, torch.where(draws["sign"].view(-1, 1) > 0, up, down))


@lru_cache(maxsize=64)
def _curves(corruption: _EitherWay, device: torch.device, **values: float) -> Tensor:
    """Return what becomes of the 256 levels in either direction, uint8 (2, 256)."""
    signs = torch.tensor((1.0, -1.0), device=device).view(2, 1, 1, 1)
    return rounded(corruption.apply(from_bytes(every_level(2, 1, device)), {"sign": signs}, values)).view(2, 256)


@CORRUPTIONS.register("gamma")
@dataclass(frozen=True)
class Gamma(_EitherWay):
    """A wrong tone curve, x^g or x^(1/g): each image gets darker or brighter, which of the two is drawn.

    Args:
        exponent: g, at least 1; above 1 darkens as x^g and brightens as x^(1/g).
    """

    family: ClassVar[str] = "contrast"
    stage: ClassVar[str] = "processing"
    exponent: Levels = Levels((1.2, 1.45, 1.8, 2.2, 2.8), identity=1.0, unit="exponent", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "exponent", self.exponent, 1)

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        exponent = values["exponent"]
        power = torch.where(draws["sign"] > 0, exponent, 1 / exponent).to(torch.float32)
        # exp and log give the same bits wherever a pixel stands in memory, which pow does not; log 0 = -inf gives 0
        return torch.log(images).mul_(power).exp_()


@CORRUPTIONS.register("brightness")
@dataclass(frozen=True)
class Brightness(_EitherWay):
    """Wrong exposure, x g or x / g: each image gets brighter, clipped at white, or darker; which of the two is drawn.

    Args:
        gain: g, at least 1.
    """

    family: ClassVar[str] = "contrast"
    stage: ClassVar[str] = "exposure"
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    gain: Levels = Levels((1.15, 1.3, 1.5, 1.8, 2.2), identity=1.0, unit="x exposure", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "gain", self.gain, 1)

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        return images * torch.where(draws["sign"] > 0, values["gain"], 1 / values["gain"]).to(torch.float32)
