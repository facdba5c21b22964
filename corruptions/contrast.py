"""Contrast and tone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng

from ._checks import check_levels


@CORRUPTIONS.register("contrast-loss")
@dataclass(frozen=True)
class ContrastLoss(Corruption):
    """Flat contrast, m + f (x - m) about the mean m of each image over pixels and channels.

    Args:
        factor: f, the share of contrast that is left.
    """

    family: ClassVar[str] = "contrast"
    factor: Levels = Levels((0.75, 0.55, 0.4, 0.28, 0.18), identity=1.0, unit="of original contrast", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "factor", self.factor, 0, 1)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del rng, shape
        return {}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        # float64 sums of 8-bit pixels are exact, hence the same in any order and batch
        mean = images.flatten(1).to(torch.float64).sum(1).div_(images[0].numel()).to(torch.float32)[:, None, None, None]
        return (images - mean).mul_(values["factor"]).add_(mean)


@CORRUPTIONS.register("gamma")
@dataclass(frozen=True)
class Gamma(Corruption):
    """A wrong tone curve, x^g or x^(1/g): each image gets darker or brighter, which of the two is drawn.

    Args:
        exponent: g, at least 1; above 1 darkens as x^g and brightens as x^(1/g).
    """

    family: ClassVar[str] = "contrast"
    exponent: Levels = Levels((1.2, 1.45, 1.8, 2.2, 2.8), identity=1.0, unit="exponent", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "exponent", self.exponent, 1)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        return {"sign": rng.sign("sign", (1, 1, 1))}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        exponent = values["exponent"]
        power = torch.where(draws["sign"] > 0, exponent, 1 / exponent)
        # exp and log give the same bits wherever a pixel stands in memory, which pow does not; log 0 = -inf gives 0
        return torch.log(images).mul_(power).exp_()
