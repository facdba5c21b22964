"""Published corruptions in reference mode; the suites ``imagenet-c`` and ``medmnist-c/...`` are made of them."""

from __future__ import annotations

from .artifacts import RefBlackCorner, RefBubble, RefCharacters, RefStainDeposit
from .base import Reference
from .blur import RefDefocusBlur, RefGaussianBlur, RefTorchvisionBlur
from .digital import RefJPEG, RefPixelate
from .geometry import RefElastic
from .glass import RefGlassBlur
from .ladine import RefLadineContrast, RefLadineNoise, RefLadineResolution
from .motion import RefMotionBlur
from .noise import RefGaussianNoise, RefImpulseNoise, RefShotNoise, RefSpeckleNoise
from .spatter import RefSpatter
from .tone import RefBrightness, RefContrast, RefGamma, RefHSVBrightness, RefMeanContrast, RefSaturate
from .weather import RefFog, RefFrost, RefSnow
from .zoom import RefZoomBlur

__all__ = [
    "RefBlackCorner",
    "RefBrightness",
    "RefBubble",
    "RefCharacters",
    "RefContrast",
    "RefDefocusBlur",
    "RefElastic",
    "RefFog",
    "RefFrost",
    "RefGamma",
    "RefGaussianBlur",
    "RefGaussianNoise",
    "RefGlassBlur",
    "RefHSVBrightness",
    "RefImpulseNoise",
    "RefJPEG",
    "RefLadineContrast",
    "RefLadineNoise",
    "RefLadineResolution",
    "RefMeanContrast",
    "RefMotionBlur",
    "RefPixelate",
    "RefSaturate",
    "RefShotNoise",
    "RefSnow",
    "RefSpatter",
    "RefSpeckleNoise",
    "RefStainDeposit",
    "RefTorchvisionBlur",
    "RefZoomBlur",
    "Reference",
]
