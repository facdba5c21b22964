"""MedMNIST-C: 131 pairs of a data set and a corruption, made for the 224 x 224 px sets.

References:
    F. Di Salvo et al., "MedMNIST-C: comprehensive benchmark and improved classifier robustness by simulating realistic
    image corruptions", 2024, 2406.17536; parameters of medmnistc 0.1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from corruptions.reference.artifacts import RefBlackCorner, RefBubble, RefCharacters, RefStainDeposit
from corruptions.reference.base import Reference
from corruptions.reference.blur import RefDefocusBlur, RefTorchvisionBlur
from corruptions.reference.digital import RefJPEG, RefPixelate
from corruptions.reference.motion import RefMotionBlur
from corruptions.reference.noise import RefGaussianNoise, RefImpulseNoise, RefShotNoise, RefSpeckleNoise
from corruptions.reference.tone import RefBrightness, RefContrast, RefGamma, RefSaturate
from corruptions.reference.zoom import RefZoomBlur
from robustlab.core.registry import SUITES
from robustlab.core.shift import Shift

from ._tables import Table, make

_ORGANS = "organa organc organs"
DATASETS = tuple(f"path blood derma retina tissue oct breast chest pneumonia {_ORGANS}".split())

# published name -> operator, [(data sets, severities)]; the order is that of the published package
_PAIRS: Mapping[str, tuple[type[Reference], list[tuple[str, Table]]]] = {
    "pixelate": (
        RefPixelate,
        [
            ("path", {"factor": (0.8, 0.6, 0.4, 0.3, 0.25)}),
            ("blood", {"factor": (0.6, 0.5, 0.4, 0.3, 0.25)}),
            ("derma", {"factor": (0.7, 0.5, 0.4, 0.3, 0.25)}),
            ("retina", {"factor": (0.8, 0.6, 0.5, 0.4, 0.35)}),
            ("tissue", {"factor": (0.4, 0.3, 0.2, 0.15, 0.1)}),
            ("oct breast chest", {"factor": (0.3, 0.25, 0.2, 0.15, 0.1)}),
            ("pneumonia", {"factor": (0.8, 0.7, 0.6, 0.5, 0.4)}),
            (_ORGANS, {"factor": (0.7, 0.6, 0.5, 0.4, 0.35)}),
        ],
    ),
    "jpeg_compression": (
        RefJPEG,
        [
            (f"path blood breast chest pneumonia {_ORGANS}", {"quality": (50, 30, 15, 10, 7)}),
            ("derma", {"quality": (30, 20, 15, 10, 7)}),
            ("retina", {"quality": (30, 25, 20, 10, 5)}),
            ("tissue", {"quality": (25, 20, 15, 10, 7)}),
            ("oct", {"quality": (30, 15, 10, 7, 5)}),
        ],
    ),
    "gaussian_noise": (
        RefGaussianNoise,
        [
            ("derma chest", {"sigma": (0.04, 0.08, 0.12, 0.18, 0.26)}),
            (f"retina {_ORGANS}", {"sigma": (0.04, 0.08, 0.12, 0.16, 0.2)}),
            ("pneumonia", {"sigma": (0.04, 0.05, 0.06, 0.07, 0.08)}),
        ],
    ),
    "speckle_noise": (
        RefSpeckleNoise,
        [
            ("derma chest", {"sigma": (0.05, 0.15, 0.2, 0.35, 0.45)}),
            ("retina breast", {"sigma": (0.1, 0.15, 0.2, 0.25, 0.3)}),
            ("oct", {"sigma": (0.15, 0.3, 0.4, 0.5, 0.6)}),
            ("pneumonia", {"sigma": (0.05, 0.07, 0.1, 0.15, 0.2)}),
            (_ORGANS, {"sigma": (0.05, 0.1, 0.2, 0.3, 0.4)}),
        ],
    ),
    "impulse_noise": (
        RefImpulseNoise,
        [
            ("derma chest", {"amount": (0.01, 0.03, 0.06, 0.09, 0.17)}),
            ("tissue", {"amount": (0.01, 0.015, 0.02, 0.025, 0.03)}),
            ("pneumonia", {"amount": (0.005, 0.01, 0.013, 0.017, 0.02)}),
            (_ORGANS, {"amount": (0.01, 0.02, 0.03, 0.05, 0.08)}),
        ],
    ),
    "shot_noise": (
        RefShotNoise,
        [
            ("derma chest", {"photons": (60, 25, 18, 10, 5)}),
            ("pneumonia", {"photons": (300, 200, 150, 100, 80)}),
            (_ORGANS, {"photons": (200, 100, 50, 25, 15)}),
        ],
    ),
    "defocus_blur": (
        RefDefocusBlur,
        [
            ("path", {"radius": (3, 4, 5, 6, 7), "alias": (0.1, 0.1, 0.2, 0.2, 0.3)}),
            ("blood", {"radius": (2, 3, 4, 5, 6), "alias": (0.01, 0.1, 0.1, 0.1, 0.1)}),
            # the published table of retina has a sixth pair, (9, 0.6), that its data sets do not use
            ("derma retina", {"radius": (4, 5, 6, 7, 8), "alias": (0.1, 0.2, 0.3, 0.4, 0.5)}),
            ("oct", {"radius": (0.5, 1, 1.5, 2, 2.5), "alias": (0.6, 0.5, 0.1, 0.5, 0.1)}),
        ],
    ),
    "motion_blur": (
        RefMotionBlur,
        [
            ("path", {"radius": (5, 10, 15, 15, 15), "sigma": (5, 5, 5, 8, 12)}),
            ("blood", {"radius": (3, 5, 10, 10, 10), "sigma": (3, 5, 5, 7, 9)}),
            ("derma", {"radius": (10, 15, 15, 15, 20), "sigma": (5, 5, 8, 12, 15)}),
            ("retina", {"radius": (8, 15, 15, 15, 20), "sigma": (5, 5, 8, 12, 15)}),
            ("oct", {"radius": (10, 15, 15, 15, 20), "sigma": (3, 5, 8, 12, 15)}),
            ("breast", {"radius": (5, 9, 9, 13, 17), "sigma": (5, 7, 10, 10, 12)}),
        ],
    ),
    "zoom_blur": (
        RefZoomBlur,
        [("derma", {"stop": (1.11, 1.16, 1.21, 1.26, 1.31), "step": (0.01, 0.01, 0.02, 0.02, 0.03)})],
    ),
    "gaussian_blur": (
        RefTorchvisionBlur,
        [
            ("tissue", {"kernel": (13, 15, 17, 21, 25)}),
            # the published tables of chest and pneumonia have a sixth kernel, 13, that the data sets do not use
            ("chest pneumonia", {"kernel": (3, 5, 7, 9, 11)}),
            (_ORGANS, {"kernel": (11, 13, 15, 17, 21)}),
        ],
    ),
    "brightness_up": (
        RefBrightness,
        [
            ("path", {"factor": (1.1, 1.15, 1.2, 1.22, 1.25)}),
            ("blood", {"factor": (1.1, 1.2, 1.3, 1.35, 1.4)}),
            ("derma chest pneumonia", {"factor": (1.1, 1.2, 1.3, 1.4, 1.5)}),
            ("tissue", {"factor": (1.3, 1.4, 1.5, 1.6, 1.7)}),
            ("breast", {"factor": (1.4, 1.5, 1.6, 1.8, 2.0)}),
            (_ORGANS, {"factor": (1.2, 1.3, 1.4, 1.5, 1.6)}),
        ],
    ),
    "brightness_down": (
        RefBrightness,
        [
            ("path", {"factor": (0.85, 0.8, 0.75, 0.72, 0.7)}),
            ("blood derma retina chest pneumonia", {"factor": (0.9, 0.8, 0.7, 0.6, 0.5)}),
            ("tissue", {"factor": (0.8, 0.7, 0.6, 0.5, 0.4)}),
            ("breast", {"factor": (0.55, 0.5, 0.45, 0.4, 0.3)}),
            (_ORGANS, {"factor": (0.8, 0.75, 0.7, 0.65, 0.6)}),
        ],
    ),
    "contrast_up": (
        RefContrast,
        [
            ("path derma tissue chest pneumonia", {"factor": (1.1, 1.2, 1.3, 1.4, 1.6)}),
            ("blood", {"factor": (1.1, 1.15, 1.2, 1.25, 1.3)}),
            (_ORGANS, {"factor": (1.3, 1.4, 1.6, 1.7, 1.8)}),
        ],
    ),
    "contrast_down": (
        RefContrast,
        [
            (f"path {_ORGANS}", {"factor": (0.8, 0.7, 0.6, 0.55, 0.5)}),
            ("blood", {"factor": (0.9, 0.8, 0.7, 0.6, 0.5)}),
            ("derma", {"factor": (0.8, 0.7, 0.6, 0.5, 0.4)}),
            ("retina tissue breast chest pneumonia", {"factor": (0.9, 0.8, 0.7, 0.6, 0.4)}),
            ("oct", {"factor": (0.6, 0.4, 0.3, 0.2, 0.15)}),
        ],
    ),
    "saturate": (
        RefSaturate,
        [
            ("path", {"gain": (1, 1, 1, 1, 1), "offset": (0.05, 0.1, 0.15, 0.2, 0.25)}),
            ("blood", {"gain": (1, 1, 1, 1, 1), "offset": (0.05, 0.1, 0.15, 0.17, 0.2)}),
        ],
    ),
    "gamma_corr_up": (
        RefGamma,
        [
            ("chest pneumonia", {"gamma": (1.1, 1.2, 1.3, 1.4, 1.6)}),
            (_ORGANS, {"gamma": (1.3, 1.4, 1.6, 1.8, 2.0)}),
        ],
    ),
    "gamma_corr_down": (RefGamma, [(f"chest pneumonia {_ORGANS}", {"gamma": (0.9, 0.8, 0.7, 0.6, 0.4)})]),
    "stain_deposit": (
        RefStainDeposit,
        [
            ("path", {"blots": (1, 2, 3, 4, 5), "size": (24, 24, 24, 24, 32)}),
            ("blood", {"blots": (1, 2, 3, 3, 3), "size": (24, 24, 24, 24, 32)}),
        ],
    ),
    "bubble": (
        RefBubble,
        [
            ("path", {"radius": (7, 10, 12, 15, 17), "count": (15, 15, 15, 20, 25)}),
            ("blood", {"radius": (5, 7, 10, 12, 15), "count": (10, 10, 10, 12, 12)}),
        ],
    ),
    # severities 4 and 5 are in this order in the published table
    "black_corner": (RefBlackCorner, [("derma", {"radius": (1.1, 1.05, 1.0, 0.9, 0.95)})]),
    "characters": (
        RefCharacters,
        [
            (
                "derma",
                {
                    "words": (1, 2, 3, 4, 6),
                    "letters": (6, 7, 8, 9, 10),
                    "scale": (0.14, 0.15, 0.16, 0.17, 0.18),
                },
            )
        ],
    ),
}


def _pairs(dataset: str) -> tuple[Shift, ...]:
    return tuple(
        make(kind, name, table)
        for name, (kind, rows) in _PAIRS.items()
        for datasets, table in rows
        if dataset in datasets.split()
    )


def _suite(dataset: str) -> Callable[[], tuple[Shift, ...]]:
    def suite() -> tuple[Shift, ...]:
        return _pairs(dataset)

    suite.__doc__ = f"Return the {len(_pairs(dataset))} corruptions of MedMNIST-C for {dataset}mnist, for 224 x 224 px."
    suite.__qualname__ = f"medmnist_c.{dataset}mnist"
    return suite


for _dataset in DATASETS:
    SUITES.register(f"medmnist-c/{_dataset}mnist")(_suite(_dataset))
