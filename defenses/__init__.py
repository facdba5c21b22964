"""Defences and detectors; importing this package registers them."""

from __future__ import annotations

from .detectors import MSP, Energy
from .ensembles import DeepEnsemble
from .recalibration import TemperatureScaling

__all__ = ["MSP", "DeepEnsemble", "Energy", "TemperatureScaling"]
