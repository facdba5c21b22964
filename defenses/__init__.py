"""Defences and detectors; importing this package registers them."""

from __future__ import annotations

from .detectors import MSP, Energy
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
    "MSP",
    "BetaCalibration",
    "DeepEnsemble",
    "DirichletCalibration",
    "Energy",
    "HistogramBinning",
    "IsotonicCalibration",
    "PlattScaling",
    "TemperatureScaling",
    "VectorScaling",
]
