"""Recalibration: probabilities made honest on clean validation data."""

from __future__ import annotations

from .base import Recalibration
from .beta import BetaCalibration, fit_beta
from .dirichlet import DirichletCalibration, fit_dirichlet
from .histogram import HistogramBinning, fit_histogram
from .isotonic import IsotonicCalibration, fit_isotonic
from .platt import PlattScaling, fit_platt
from .temperature import TemperatureScaling, fit_temperature
from .vector import VectorScaling, fit_vector

__all__ = [
    "BetaCalibration",
    "DirichletCalibration",
    "HistogramBinning",
    "IsotonicCalibration",
    "PlattScaling",
    "Recalibration",
    "TemperatureScaling",
    "VectorScaling",
    "fit_beta",
    "fit_dirichlet",
    "fit_histogram",
    "fit_isotonic",
    "fit_platt",
    "fit_temperature",
    "fit_vector",
]
