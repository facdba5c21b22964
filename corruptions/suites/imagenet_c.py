"""ImageNet-C, Tiny ImageNet-C and CIFAR-10-C: fifteen corruptions each, and four extra ones.

The numbers are those of the three published generators. What is published beside them is named where it matters: the
frost pictures are photographs that robustlab does not ship (see ``RefFrost``).

References:
    D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from corruptions.reference.base import Reference
from corruptions.reference.blur import RefDefocusBlur, RefGaussianBlur
from corruptions.reference.digital import RefJPEG, RefPixelate
from corruptions.reference.geometry import RefElastic
from corruptions.reference.glass import RefGlassBlur
from corruptions.reference.motion import RefMotionBlur
from corruptions.reference.noise import RefGaussianNoise, RefImpulseNoise, RefShotNoise, RefSpeckleNoise
from corruptions.reference.spatter import RefSpatter
from corruptions.reference.tone import RefHSVBrightness, RefMeanContrast, RefSaturate
from corruptions.reference.weather import RefFog, RefFrost, RefSnow
from corruptions.reference.zoom import RefZoomBlur
from robustlab.core.registry import SUITES
from robustlab.core.shift import Shift

from ._tables import Table, make

Size = Literal[224, 64, 32]

_MAIN: Mapping[str, tuple[type[Reference], Mapping[Size, Table]]] = {
    "gaussian_noise": (
        RefGaussianNoise,
        {
            224: {"sigma": (0.08, 0.12, 0.18, 0.26, 0.38)},
            64: {"sigma": (0.04, 0.08, 0.12, 0.15, 0.18)},
            32: {"sigma": (0.04, 0.06, 0.08, 0.09, 0.10)},
        },
    ),
    "shot_noise": (
        RefShotNoise,
        {
            224: {"photons": (60, 25, 12, 5, 3)},
            64: {"photons": (250, 100, 50, 30, 15)},
            32: {"photons": (500, 250, 100, 75, 50)},
        },
    ),
    "impulse_noise": (
        RefImpulseNoise,
        {
            224: {"amount": (0.03, 0.06, 0.09, 0.17, 0.27)},
            64: {"amount": (0.01, 0.02, 0.05, 0.08, 0.14)},
            32: {"amount": (0.01, 0.02, 0.03, 0.05, 0.07)},
        },
    ),
    "defocus_blur": (
        RefDefocusBlur,
        {
            224: {"radius": (3, 4, 6, 8, 10), "alias": (0.1, 0.5, 0.5, 0.5, 0.5)},
            64: {"radius": (0.5, 1, 1.5, 2.5, 3), "alias": (0.6, 0.1, 0.1, 0.01, 0.1)},
            32: {"radius": (0.3, 0.4, 0.5, 1, 1.5), "alias": (0.4, 0.5, 0.6, 0.2, 0.1)},
        },
    ),
    "glass_blur": (
        RefGlassBlur,
        {
            224: {"sigma": (0.7, 0.9, 1, 1.1, 1.5), "reach": (1, 2, 2, 3, 4), "iterations": (2, 1, 3, 2, 2)},
            64: {"sigma": (0.1, 0.5, 0.6, 0.7, 0.9), "reach": (1, 1, 1, 2, 2), "iterations": (1, 1, 2, 1, 2)},
            32: {"sigma": (0.05, 0.25, 0.4, 0.25, 0.4), "reach": (1, 1, 1, 1, 1), "iterations": (1, 1, 1, 2, 2)},
        },
    ),
    "motion_blur": (
        RefMotionBlur,
        {
            224: {"radius": (10, 15, 15, 15, 20), "sigma": (3, 5, 8, 12, 15)},
            64: {"radius": (10, 10, 10, 10, 12), "sigma": (1, 1.5, 2, 2.5, 3)},
            32: {"radius": (6, 6, 6, 8, 9), "sigma": (1, 1.5, 2, 2, 2.5)},
        },
    ),
    "zoom_blur": (
        RefZoomBlur,
        {
            224: {"stop": (1.11, 1.16, 1.21, 1.26, 1.31), "step": (0.01, 0.01, 0.02, 0.02, 0.03)},
            64: {"stop": (1.06, 1.11, 1.16, 1.21, 1.26), "step": (0.01, 0.01, 0.01, 0.01, 0.01)},
            32: {"stop": (1.06, 1.11, 1.16, 1.21, 1.26), "step": (0.01, 0.01, 0.01, 0.01, 0.01)},
        },
    ),
    "snow": (
        RefSnow,
        {
            224: {
                "mean": (0.1, 0.2, 0.55, 0.55, 0.55),
                "std": (0.3, 0.3, 0.3, 0.3, 0.3),
                "zoom": (3, 2, 4, 4.5, 2.5),
                "threshold": (0.5, 0.5, 0.9, 0.85, 0.85),
                "radius": (10, 12, 12, 12, 12),
                "sigma": (4, 4, 8, 8, 12),
                "mix": (0.8, 0.7, 0.7, 0.65, 0.55),
            },
            64: {
                "mean": (0.1, 0.1, 0.15, 0.25, 0.3),
                "std": (0.2, 0.2, 0.3, 0.3, 0.3),
                "zoom": (1, 1, 1.75, 2.25, 1.25),
                "threshold": (0.6, 0.5, 0.55, 0.6, 0.65),
                "radius": (8, 10, 10, 12, 14),
                "sigma": (3, 4, 4, 6, 12),
                "mix": (0.8, 0.8, 0.7, 0.65, 0.6),
            },
            32: {
                "mean": (0.1, 0.1, 0.15, 0.25, 0.3),
                "std": (0.2, 0.2, 0.3, 0.3, 0.3),
                "zoom": (1, 1, 1.75, 2.25, 1.25),
                "threshold": (0.6, 0.5, 0.55, 0.6, 0.65),
                "radius": (8, 10, 10, 12, 14),
                "sigma": (3, 4, 4, 6, 12),
                "mix": (0.95, 0.9, 0.9, 0.85, 0.8),
            },
        },
    ),
    "frost": (
        RefFrost,
        {
            224: {"image_share": (1, 0.8, 0.7, 0.65, 0.6), "frost_share": (0.4, 0.6, 0.7, 0.7, 0.75)},
            64: {"image_share": (1, 0.9, 0.8, 0.75, 0.7), "frost_share": (0.3, 0.4, 0.45, 0.5, 0.55)},
            32: {"image_share": (1, 1, 0.9, 0.85, 0.75), "frost_share": (0.2, 0.3, 0.4, 0.4, 0.45)},
        },
    ),
    "fog": (
        RefFog,
        {
            224: {"amount": (1.5, 2, 2.5, 2.5, 3), "decay": (2, 2, 1.7, 1.5, 1.4)},
            64: {"amount": (0.4, 0.7, 1, 1.5, 2), "decay": (3, 3, 2.5, 2, 1.75)},
            32: {"amount": (0.2, 0.5, 0.75, 1, 1.5), "decay": (3, 3, 2.5, 2, 1.75)},
        },
    ),
    "brightness": (
        RefHSVBrightness,
        {
            224: {"offset": (0.1, 0.2, 0.3, 0.4, 0.5)},
            64: {"offset": (0.1, 0.2, 0.3, 0.4, 0.5)},
            32: {"offset": (0.05, 0.1, 0.15, 0.2, 0.3)},
        },
    ),
    "contrast": (
        RefMeanContrast,
        {
            224: {"factor": (0.4, 0.3, 0.2, 0.1, 0.05)},
            64: {"factor": (0.4, 0.3, 0.2, 0.1, 0.05)},
            32: {"factor": (0.75, 0.5, 0.4, 0.3, 0.15)},
        },
    ),
    "elastic_transform": (
        RefElastic,
        {
            # the 224 px generator has 244 where 224 was meant
            224: {
                "alpha": (244 * 2, 244 * 2, 244 * 0.05, 244 * 0.07, 244 * 0.12),
                "sigma": (244 * 0.7, 244 * 0.08, 244 * 0.01, 244 * 0.01, 244 * 0.01),
                "affine": (244 * 0.1, 244 * 0.2, 244 * 0.02, 244 * 0.02, 244 * 0.02),
            },
            64: {
                "alpha": (0, 64 * 0.05, 64 * 0.1, 64 * 0.1, 64 * 0.16),
                "sigma": (0, 64 * 0.3, 64 * 0.08, 64 * 0.03, 64 * 0.03),
                "affine": (64 * 0.08, 64 * 0.06, 64 * 0.06, 64 * 0.03, 64 * 0.02),
            },
            32: {
                "alpha": (0, 32 * 0.05, 32 * 0.08, 32 * 0.1, 32 * 0.1),
                "sigma": (0, 32 * 0.2, 32 * 0.06, 32 * 0.04, 32 * 0.03),
                "affine": (32 * 0.08, 32 * 0.07, 32 * 0.06, 32 * 0.05, 32 * 0.03),
            },
        },
    ),
    "pixelate": (
        RefPixelate,
        {
            224: {"factor": (0.6, 0.5, 0.4, 0.3, 0.25)},
            64: {"factor": (0.9, 0.8, 0.7, 0.6, 0.5)},
            32: {"factor": (0.95, 0.9, 0.85, 0.75, 0.65)},
        },
    ),
    "jpeg_compression": (
        RefJPEG,
        {
            224: {"quality": (25, 18, 15, 10, 7)},
            64: {"quality": (65, 58, 50, 40, 25)},
            32: {"quality": (80, 65, 58, 50, 40)},
        },
    ),
}

_EXTRA: Mapping[str, tuple[type[Reference], Mapping[Size, Table]]] = {
    "speckle_noise": (
        RefSpeckleNoise,
        {
            224: {"sigma": (0.15, 0.2, 0.35, 0.45, 0.6)},
            64: {"sigma": (0.15, 0.2, 0.25, 0.3, 0.35)},
            32: {"sigma": (0.06, 0.1, 0.12, 0.16, 0.2)},
        },
    ),
    "gaussian_blur": (
        RefGaussianBlur,
        {
            224: {"sigma": (1, 2, 3, 4, 6)},
            64: {"sigma": (0.5, 0.75, 1, 1.25, 1.5)},
            32: {"sigma": (0.4, 0.6, 0.7, 0.8, 1)},
        },
    ),
    "spatter": (
        RefSpatter,
        {
            224: {
                "mean": (0.65, 0.65, 0.65, 0.65, 0.67),
                "std": (0.3, 0.3, 0.3, 0.3, 0.4),
                "sigma": (4, 3, 2, 1, 1),
                "threshold": (0.69, 0.68, 0.68, 0.65, 0.65),
                "strength": (0.6, 0.6, 0.5, 1.5, 1.5),
                "mud": (0, 0, 0, 1, 1),
            },
            64: {
                "mean": (0.62, 0.65, 0.65, 0.65, 0.65),
                "std": (0.1, 0.1, 0.3, 0.1, 0.1),
                "sigma": (0.7, 0.8, 1, 0.7, 0.5),
                "threshold": (0.7, 0.7, 0.69, 0.68, 0.67),
                "strength": (0.6, 0.6, 0.6, 0.6, 0.6),
                "mud": (0, 0, 0, 1, 1),
            },
            32: {
                "mean": (0.62, 0.65, 0.65, 0.65, 0.65),
                "std": (0.1, 0.1, 0.3, 0.1, 0.1),
                "sigma": (0.7, 0.8, 1, 0.7, 0.5),
                "threshold": (0.7, 0.7, 0.69, 0.69, 0.68),
                "strength": (0.5, 0.5, 0.5, 0.6, 0.6),
                "mud": (0, 0, 0, 1, 1),
            },
        },
    ),
    "saturate": (
        RefSaturate,
        {
            224: {"gain": (0.3, 0.1, 2, 5, 20), "offset": (0, 0, 0, 0.1, 0.2)},
            64: {"gain": (0.3, 0.1, 2, 5, 30), "offset": (0, 0, 0, 0.1, 0.2)},
            32: {"gain": (0.3, 0.1, 1.5, 2, 2.5), "offset": (0, 0, 0, 0.1, 0.2)},
        },
    ),
}


_FROST_SCALE: Mapping[Size, float] = {224: 1.0, 64: 0.3, 32: 0.2}


def _suite(
    operators: Mapping[str, tuple[type[Reference], Mapping[Size, Table]]], size: Size, textures: str = ""
) -> tuple[Shift, ...]:
    shifts = []
    for name, (kind, tables) in operators.items():
        shift = make(kind, name, tables[size], size)
        if isinstance(shift, RefFrost):
            shift = dataclasses.replace(shift, scale=_FROST_SCALE[size], textures=textures)
        shifts.append(shift)
    return tuple(shifts)


@SUITES.register("imagenet-c")
def imagenet_c(textures: str = "") -> tuple[Shift, ...]:
    """Return the 15 corruptions of ImageNet-C, made for 224 x 224 px.

    Args:
        textures: Folder with the published frost pictures, which are not part of this package; without it, frost is
            drawn, and is the one corruption that only resembles the published one.
    """
    return _suite(_MAIN, 224, textures)


@SUITES.register("imagenet-c-extra")
def imagenet_c_extra() -> tuple[Shift, ...]:
    """Return the 4 extra corruptions of ImageNet-C, made for 224 x 224 px."""
    return _suite(_EXTRA, 224)


@SUITES.register("tiny-imagenet-c")
def tiny_imagenet_c(textures: str = "") -> tuple[Shift, ...]:
    """Return the 15 corruptions of Tiny ImageNet-C, made for 64 x 64 px.

    Args:
        textures: Folder with the published frost pictures; without it, frost is drawn.
    """
    return _suite(_MAIN, 64, textures)


@SUITES.register("tiny-imagenet-c-extra")
def tiny_imagenet_c_extra() -> tuple[Shift, ...]:
    """Return the 4 extra corruptions of Tiny ImageNet-C, made for 64 x 64 px."""
    return _suite(_EXTRA, 64)


@SUITES.register("cifar-10-c")
def cifar_10_c(textures: str = "") -> tuple[Shift, ...]:
    """Return the 15 corruptions of CIFAR-10-C, made for 32 x 32 px.

    Args:
        textures: Folder with the published frost pictures; without it, frost is drawn.
    """
    return _suite(_MAIN, 32, textures)


@SUITES.register("cifar-10-c-extra")
def cifar_10_c_extra() -> tuple[Shift, ...]:
    """Return the 4 extra corruptions of CIFAR-10-C, made for 32 x 32 px."""
    return _suite(_EXTRA, 32)
