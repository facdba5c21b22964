"""Shifts: corruptions, attacks, their compositions and suites; importing the package registers all of them."""

from __future__ import annotations

from . import adversarial, reference
from .adversarial import *  # noqa: F403 - its __all__ is re-exported below
from .artifacts import AirBubbles, BurnedInText, DarkCorners, Debris
from .blur import DefocusBlur, GaussianBlur
from .bridges import (
    FromAlbumentations,
    FromMONAI,
    FromTorchIO,
    FromTorchvision,
    as_albumentations,
    as_torchvision,
)
from .colour import Saturation
from .compose import ByScanner, Compose, OneOf, SomeOf, Sometimes
from .compression import JPEG
from .contrast import Brightness, ContrastGain, ContrastLoss, Gamma
from .fixed_pattern import FixedPattern
from .geometry import Elastic
from .glass import GlassBlur
from .motion import MotionBlur
from .noise import GaussianNoise, ImpulseNoise, PoissonNoise, SpeckleNoise
from .reference import *  # noqa: F403 - its __all__ is re-exported below
from .resolution import DownUpSampling, Pixelate
from .staining import StainShift
from .stored import Stored, stored_suite
from .suites import cifar_10_c, imagenet_c, standard, tiny_imagenet_c
from .zoom import ZoomBlur

__all__ = [
    "JPEG",
    "AirBubbles",
    "Brightness",
    "BurnedInText",
    "ByScanner",
    "Compose",
    "ContrastGain",
    "ContrastLoss",
    "DarkCorners",
    "Debris",
    "DefocusBlur",
    "DownUpSampling",
    "Elastic",
    "FixedPattern",
    "FromAlbumentations",
    "FromMONAI",
    "FromTorchIO",
    "FromTorchvision",
    "Gamma",
    "GaussianBlur",
    "GaussianNoise",
    "GlassBlur",
    "ImpulseNoise",
    "MotionBlur",
    "OneOf",
    "Pixelate",
    "PoissonNoise",
    "Saturation",
    "SomeOf",
    "Sometimes",
    "SpeckleNoise",
    "StainShift",
    "Stored",
    "ZoomBlur",
    "as_albumentations",
    "as_torchvision",
    "cifar_10_c",
    "imagenet_c",
    "standard",
    "stored_suite",
    "tiny_imagenet_c",
]
__all__ += adversarial.__all__
__all__ += reference.__all__
