"""Noise of ImageNet-C and MedMNIST-C, in integer arithmetic: the same bytes on every device and in any batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from corruptions._checks import check_levels
from corruptions._poisson import alias_table
from corruptions._words import (
    add_noise,
    add_scaled_noise,
    gaussian_table,
    salt_and_pepper,
    sample_alias,
    speckle_scale,
)
from robustlab.core.corruption import Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng

from .base import Reference


class _Streamed(Reference):
    """Noise whose numbers are made while they are used: the draw is 64 bits for each sample."""

    family: ClassVar[str] = "noise"

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        return {"stream": rng.stream("noise")}


@CORRUPTIONS.register("ref:gaussian-noise")
@dataclass(frozen=True)
class RefGaussianNoise(_Streamed):
    """Additive Gaussian noise, floor(255 clip(x + sigma z)), independent for every pixel and channel.

    Args:
        sigma: Standard deviation, of full range, at least 0; by default that of ImageNet-C at 224 px.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
        F. Di Salvo, S. Doerrich, C. Ledig, "MedMNIST-C", 2024, 2406.17536.
    """

    stage: ClassVar[str] = "electronics"
    sigma: Levels = Levels((0.08, 0.12, 0.18, 0.26, 0.38), identity=0.0, unit="of full range")

    def __post_init__(self) -> None:
        check_levels(self, "sigma", self.sigma, 0)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        return add_noise(pixels, draws["stream"], gaussian_table(values["sigma"], pixels.device))


@CORRUPTIONS.register("ref:shot-noise")
@dataclass(frozen=True)
class RefShotNoise(_Streamed):
    """Photon noise, floor(255 min(K / photons, 1)) with K ~ Poisson(photons x), drawn from its exact finite law.

    Args:
        photons: Mean count of a white pixel; by default that of ImageNet-C at 224 px.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
        F. Di Salvo, S. Doerrich, C. Ledig, "MedMNIST-C", 2024, 2406.17536.
    """

    stage: ClassVar[str] = "photons"
    seen_in: ClassVar[tuple[str, ...] | None] = ("xray", "ct", "fundus", "dermoscopy", "endoscopy", "microscopy")
    photons: Levels = Levels((60, 25, 12, 5, 3), identity=float("inf"), unit="photons at white")

    def __post_init__(self) -> None:
        check_levels(self, "photons", self.photons, 1e-3)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        return sample_alias(pixels, draws["stream"], alias_table(values["photons"], pixels.device))


@CORRUPTIONS.register("ref:impulse-noise")
@dataclass(frozen=True)
class RefImpulseNoise(_Streamed):
    """Salt and pepper for every pixel and channel by itself: black or white, with equal probability.

    Colour images get coloured specks. On grey ones the luma of three channels is taken, so that almost no pixel becomes
    quite black or white, but nearly three times as many move.

    Args:
        amount: Share of the values that are changed, 0 to 1; by default that of ImageNet-C at 224 px.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
        F. Di Salvo, S. Doerrich, C. Ledig, "MedMNIST-C", 2024, 2406.17536.
    """

    stage: ClassVar[str] = "electronics"
    seen_in: ClassVar[tuple[str, ...] | None] = ("xray", "endoscopy", "microscopy")
    amount: Levels = Levels((0.03, 0.06, 0.09, 0.17, 0.27), identity=0.0, unit="of values")

    def __post_init__(self) -> None:
        check_levels(self, "amount", self.amount, 0, 1)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        return salt_and_pepper(pixels, draws["stream"], values["amount"])


@CORRUPTIONS.register("ref:speckle-noise")
@dataclass(frozen=True)
class RefSpeckleNoise(_Streamed):
    """Multiplicative Gaussian noise, floor(255 clip(x + x sigma z)), independent for every pixel and channel.

    Args:
        sigma: Standard deviation, of the pixel's value, 0 to 100; by default that of ImageNet-C at 224 px.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
        F. Di Salvo, S. Doerrich, C. Ledig, "MedMNIST-C", 2024, 2406.17536.
    """

    stage: ClassVar[str] = "photons"
    seen_in: ClassVar[tuple[str, ...] | None] = ("ultrasound", "oct")
    sigma: Levels = Levels((0.15, 0.2, 0.35, 0.45, 0.6), identity=0.0, unit="of the value")

    def __post_init__(self) -> None:
        check_levels(self, "sigma", self.sigma, 0, 100)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        return add_scaled_noise(pixels, draws["stream"], *speckle_scale(values["sigma"], pixels.device))
