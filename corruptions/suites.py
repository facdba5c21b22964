"""Named sets of shifts."""

from __future__ import annotations

from robustlab.core.registry import SUITES
from robustlab.core.shift import Shift

from .blur import DefocusBlur
from .compression import JPEG
from .contrast import ContrastLoss, Gamma
from .noise import GaussianNoise, PoissonNoise
from .resolution import DownUpSampling, Pixelate
from .staining import StainShift


@SUITES.register("standard")
def standard() -> tuple[Shift, ...]:
    """Return the default suite: scanner noise, loss of resolution, staining, contrast, blur and compression.

    It fits any modality; what does not apply to a set of images (stain on grey ones) says so in ``skip_reason``.
    """
    return (
        GaussianNoise(),
        PoissonNoise(),
        DownUpSampling(),
        Pixelate(),
        StainShift(),
        ContrastLoss(),
        Gamma(),
        DefocusBlur(),
        JPEG(),
    )
