"""Scanner noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng, cell_centres, normal_table, on_tensors, stream_bits, stream_looked_up

from ._checks import check_levels
from ._poisson import poisson_quantile, quantile_table
from ._words import add_rounded_noise, changed_as_floats, sample_quantiles, whole_salt_and_pepper


def _normal(stream: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return float32 images of this shape, what ``SampleRng.normal`` returns for the stream's label."""
    return stream_looked_up(stream, math.prod(shape[1:]), normal_table(stream.device)).reshape(shape)


@CORRUPTIONS.register("gaussian-noise")
@dataclass(frozen=True)
class GaussianNoise(Corruption):
    """Additive white Gaussian noise of an amplifier, x + sigma z, independent for every pixel and channel.

    Args:
        sigma: Standard deviation, of full range.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "noise"
    stage: ClassVar[str] = "electronics"
    sigma: Levels = Levels((0.03, 0.06, 0.10, 0.16, 0.25), identity=0.0, unit="of full range", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "sigma", self.sigma, 0)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        return {"z": rng.stream("z")}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        return torch.add(images, _normal(draws["z"], images.shape), alpha=values["sigma"])

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        if pixels.device.type != "cpu":
            return super().apply_bytes(pixels, draws, values)
        return add_rounded_noise(pixels, draws["z"], values["sigma"])


@CORRUPTIONS.register("speckle-noise")
@dataclass(frozen=True)
class SpeckleNoise(Corruption):
    """Multiplicative white Gaussian noise, x (1 + sigma z), independent for every pixel and channel.

    It is the common crude model of speckle. Speckle of real ultrasound and OCT is correlated over the width of the
    beam, follows a Rayleigh or gamma law, and is seen after logarithmic compression.

    Args:
        sigma: Standard deviation, of the pixel's value.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "noise"
    stage: ClassVar[str] = "photons"
    seen_in: ClassVar[tuple[str, ...] | None] = ("ultrasound", "oct")
    sigma: Levels = Levels((0.08, 0.14, 0.22, 0.35, 0.55), identity=0.0, unit="of the value", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "sigma", self.sigma, 0)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        return {"z": rng.stream("z")}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        # one rounding a step, so that memory layout, which picks the loop, changes no bit
        return _normal(draws["z"], images.shape).mul_(values["sigma"]).add_(1).mul_(images)

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        if pixels.device.type != "cpu":
            return super().apply_bytes(pixels, draws, values)
        sigma = values["sigma"]
        return changed_as_floats(pixels, draws["z"], lambda x, z: x.mul_(z.mul_(sigma).add_(1)))


@CORRUPTIONS.register("impulse-noise")
@dataclass(frozen=True)
class ImpulseNoise(Corruption):
    """Salt and pepper: a share of the pixels becomes black or white, with equal probability, in all channels together.

    A dead or hot sensor element, or a pixel lost in an old converter or in transmission. The pixels hit at a lower
    severity are among those hit at a higher one.

    Args:
        amount: Share of the pixels that are hit, 0 to 1.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "noise"
    stage: ClassVar[str] = "electronics"
    seen_in: ClassVar[tuple[str, ...] | None] = ("xray", "endoscopy", "microscopy")
    amount: Levels = Levels((0.005, 0.01, 0.025, 0.06, 0.14), identity=0.0, unit="of pixels", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "amount", self.amount, 0, 1)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        return {"u": rng.stream("u")}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        pepper, salt = _ends(draws["u"], images, values["amount"])
        return images.masked_fill(pepper, 0).masked_fill_(salt, 1)

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        if on_tensors(draws["u"]):
            pepper, salt = _ends(draws["u"], pixels, values["amount"])
            return pixels.masked_fill(pepper, 0).masked_fill_(salt, 255)
        first, last = _bounds(values["amount"])
        return whole_salt_and_pepper(pixels, draws["u"], first << 8, (last << 8) - 1)


def _bounds(amount: float) -> tuple[int, int]:
    """Return the numbers of 24 bits below which a pixel becomes black, and from which on it becomes white."""
    share = np.float32(amount / 2), np.float32(1 - amount / 2)
    return math.ceil(float(share[0]) * 2**24), math.ceil(float(share[1]) * 2**24)


def _ends(stream: Tensor, images: Tensor, amount: float) -> tuple[Tensor, Tensor]:
    bits = stream_bits(stream, math.prod(images.shape[2:])).view(len(images), 1, *images.shape[2:])
    first, last = _bounds(amount)
    u = bits.bitwise_right_shift_(8).bitwise_and_((1 << 24) - 1)
    return u < first, u >= last


@CORRUPTIONS.register("poisson-noise")
@dataclass(frozen=True)
class PoissonNoise(Corruption):
    """Quantum noise of counted photons, K / photons with K ~ Poisson(photons x), of variance x / photons.

    The same uniform number is kept for each pixel at every dose, so that severities are paired.

    Args:
        photons: Mean count of a white pixel.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "noise"
    stage: ClassVar[str] = "photons"
    seen_in: ClassVar[tuple[str, ...] | None] = ("xray", "ct", "fundus", "dermoscopy", "endoscopy", "microscopy")
    photons: Levels = Levels((400, 150, 60, 25, 10), identity=float("inf"), unit="photons at white", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "photons", self.photons, 1e-3)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        return {"count": rng.stream("count")}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        stream, photons = draws["count"], values["photons"]
        count = math.prod(images.shape[1:])
        u = stream_looked_up(stream, count, cell_centres(stream.device)).view(images.shape)
        return poisson_quantile(images * photons, u, _normal(stream, images.shape)).div_(photons)

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        stream, photons = draws["count"], values["photons"]
        if on_tensors(stream) or (table := quantile_table(photons, pixels.numel())) is None:
            return super().apply_bytes(pixels, draws, values)
        return sample_quantiles(pixels, stream, *table)
