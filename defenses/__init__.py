"""Defences and detectors; importing this package registers them."""

from __future__ import annotations

from . import detectors
from .detectors import *  # noqa: F403 - its own list of names
from .ensembles import DeepEnsemble
from .recalibration import (
    BetaCalibration,
    DirichletCalibration,
    HistogramBinning,
    IsotonicCalibration,
    PlattScaling,
    TemperatureScaling,
    VectorScaling,
)

__all__ = [
    "BetaCalibration",
    "DeepEnsemble",
    "DirichletCalibration",
    "HistogramBinning",
    "IsotonicCalibration",
    "PlattScaling",
    "TemperatureScaling",
    "VectorScaling",
]
__all__ += detectors.__all__
