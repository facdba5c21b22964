"""Shifts: corruptions, attacks, their compositions and suites; importing the package registers all of them."""

from __future__ import annotations

from . import adversarial
from .adversarial import *  # noqa: F403 - its __all__ is re-exported below
from .blur import DefocusBlur
from .bridges import FromAlbumentations, as_albumentations
from .compose import Compose, OneOf
from .compression import JPEG
from .contrast import ContrastLoss, Gamma
from .noise import GaussianNoise, PoissonNoise
from .resolution import DownUpSampling, Pixelate
from .staining import StainShift
from .suites import standard

__all__ = [
    "JPEG",
    "Compose",
    "ContrastLoss",
    "DefocusBlur",
    "DownUpSampling",
    "FromAlbumentations",
    "Gamma",
    "GaussianNoise",
    "OneOf",
    "Pixelate",
    "PoissonNoise",
    "StainShift",
    "as_albumentations",
    "standard",
]
__all__ += adversarial.__all__
