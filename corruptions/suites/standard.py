"""Named sets of shifts."""

from __future__ import annotations

from corruptions.blur import DefocusBlur
from corruptions.compression import JPEG
from corruptions.contrast import Brightness, ContrastLoss, Gamma
from corruptions.motion import MotionBlur
from corruptions.noise import GaussianNoise, PoissonNoise
from corruptions.resolution import DownUpSampling, Pixelate
from corruptions.staining import StainShift
from robustlab.core.registry import SUITES
from robustlab.core.shift import Shift


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
        Brightness(),
        Gamma(),
        DefocusBlur(),
        MotionBlur(),
        JPEG(),
    )
