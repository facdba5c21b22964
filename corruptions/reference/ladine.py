"""The shifts of LaDiNE's evaluation, on float images that are neither clipped nor rounded afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from corruptions._checks import check_levels
from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng


class LadineShift(Corruption):
    """A shift applied to the float tensor that the network gets, which no file holds."""

    mode: ClassVar[Literal["physical", "reference"]] = "reference"

    @property
    def storable(self) -> bool:
        return False


@CORRUPTIONS.register("ref:ladine-noise")
@dataclass(frozen=True)
class RefLadineNoise(LadineShift):
    """Gaussian noise x + sigma z that is not clipped, so that pixels leave [0, 1], independent for every channel.

    Images of one channel get one field; the published code repeats grey images to three channels first.

    Args:
        sigma: Standard deviation, of full range; 0.5 and 1.0 in the published tables, 0.1 in its figures.

    References:
        X. Shen et al., "Improving robustness and reliability in medical image classification with latent-guided
        diffusion and nested-ensembles", 2023, 2310.15952.
    """

    family: ClassVar[str] = "noise"
    stage: ClassVar[str] = "electronics"
    seen_in: ClassVar[tuple[str, ...] | None] = ("xray", "dermoscopy")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    sigma: Levels = Levels((0.1, 0.2, 0.35, 0.5, 1.0), identity=0.0, unit="of full range", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "sigma", self.sigma, 0)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        return {"z": rng.normal("z", shape)}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        return torch.add(images, draws["z"], alpha=values["sigma"])


@CORRUPTIONS.register("ref:ladine-resolution")
@dataclass(frozen=True)
class RefLadineResolution(LadineShift):
    """Bilinear interpolation down to floor(H / w) x floor(W / w) without antialiasing, and bilinear up again.

    Args:
        factor: w; 4 in the published tables, 8 in its figures.

    References:
        X. Shen et al., 2023, 2310.15952.
    """

    family: ClassVar[str] = "resolution"
    stage: ClassVar[str] = "sampling"
    seen_in: ClassVar[tuple[str, ...] | None] = ("xray", "dermoscopy")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    factor: Levels = Levels((2, 3, 4, 6, 8), identity=1.0, unit="x pixel size", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "factor", self.factor, 1)

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        height, width = images.shape[2:]
        small = (max(1, int(height / values["factor"])), max(1, int(width / values["factor"])))
        # one plane at a time: for three channels torch sums in another order with one thread than with two
        planes = images.reshape(-1, 1, height, width)
        down = interpolate(planes, small, mode="bilinear", align_corners=False)
        return interpolate(down, (height, width), mode="bilinear", align_corners=False).view(images.shape)


@CORRUPTIONS.register("ref:ladine-contrast")
@dataclass(frozen=True)
class RefLadineContrast(LadineShift):
    """Contrast r (x - m) + m about the mean m of all pixels and channels of an image, clipped to [0, 1].

    The paper has a mean for each channel, its code one for all; this is the code.

    Args:
        factor: r; 0.7 in the published tables.

    References:
        X. Shen et al., 2023, 2310.15952.
    """

    family: ClassVar[str] = "contrast"
    stage: ClassVar[str] = "processing"
    seen_in: ClassVar[tuple[str, ...] | None] = ("xray", "dermoscopy")
    factor: Levels = Levels((0.9, 0.8, 0.7, 0.6, 0.5), identity=1.0, unit="of original contrast")

    def __post_init__(self) -> None:
        check_levels(self, "factor", self.factor, 0, 1)

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        # float64 sums of 8-bit pixels are exact, hence the same in any order and batch
        mean = images.flatten(1).to(torch.float64).sum(1).div_(images[0].numel()).to(torch.float32)[:, None, None, None]
        return (images - mean).mul_(values["factor"]).add_(mean).clamp_(0, 1)
