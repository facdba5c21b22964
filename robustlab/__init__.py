"""robustlab: stress tests for torch image models, medical images first.

Names are loaded at first use (PEP 562), so ``import robustlab`` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "robustlab.core.attack": ("Attack", "AttackResult"),
    "robustlab.core.corruption": ("Corruption",),
    "robustlab.core.defense": ("Defense",),
    "robustlab.core.detector": ("Detector",),
    "robustlab.core.errors": ("RobustlabError", "RobustlabWarning"),
    "robustlab.core.levels": ("Levels",),
    "robustlab.core.model": ("Model", "wrap"),
    "robustlab.core.registry": (
        "register_attack",
        "register_corruption",
        "register_defense",
        "register_detector",
        "register_metric",
        "resolve",
    ),
    "robustlab.core.rng": ("SampleRng",),
    "robustlab.core.shift": ("Shift", "ShiftContext"),
    "robustlab.core.source": ("Source",),
    "robustlab.core.types": ("Batch", "ImageSpec", "ModelOutputs"),
    "robustlab.data": ("SavedPredictions", "load_data", "load_predictions", "write_corrupted"),
    "robustlab.evaluate": ("ModelSpec", "ProcessPool", "evaluate_under_shift"),
    "robustlab.evaluate.diagnosis": ("Diagnosis", "Finding"),
    "robustlab.evaluate.doctor": ("doctor",),
    "robustlab.evaluate.drift": ("Drift", "has_moved"),
    "robustlab.evaluate.locate": ("Location", "locate"),
    "robustlab.evaluate.ood": ("ood_report",),
    "robustlab.evaluate.tuning": ("tune",),
    "robustlab.metrics.store": ("PredictionStore",),
    "robustlab.report.compare": ("compare",),
    "robustlab.report.report": ("Report",),
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Attack",
    "AttackResult",
    "Batch",
    "Corruption",
    "Defense",
    "Detector",
    "Diagnosis",
    "Drift",
    "Finding",
    "ImageSpec",
    "Levels",
    "Location",
    "Model",
    "ModelOutputs",
    "ModelSpec",
    "PredictionStore",
    "ProcessPool",
    "Report",
    "RobustlabError",
    "RobustlabWarning",
    "SampleRng",
    "SavedPredictions",
    "Shift",
    "ShiftContext",
    "Source",
    "__version__",
    "compare",
    "doctor",
    "evaluate_under_shift",
    "has_moved",
    "load_data",
    "load_predictions",
    "locate",
    "ood_report",
    "register_attack",
    "register_corruption",
    "register_defense",
    "register_detector",
    "register_metric",
    "resolve",
    "tune",
    "wrap",
    "write_corrupted",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'robustlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)


if TYPE_CHECKING:
    from robustlab.core.attack import Attack as Attack
    from robustlab.core.attack import AttackResult as AttackResult
    from robustlab.core.corruption import Corruption as Corruption
    from robustlab.core.defense import Defense as Defense
    from robustlab.core.detector import Detector as Detector
    from robustlab.core.errors import RobustlabError as RobustlabError
    from robustlab.core.errors import RobustlabWarning as RobustlabWarning
    from robustlab.core.levels import Levels as Levels
    from robustlab.core.model import Model as Model
    from robustlab.core.model import wrap as wrap
    from robustlab.core.registry import register_attack as register_attack
    from robustlab.core.registry import register_corruption as register_corruption
    from robustlab.core.registry import register_defense as register_defense
    from robustlab.core.registry import register_detector as register_detector
    from robustlab.core.registry import register_metric as register_metric
    from robustlab.core.registry import resolve as resolve
    from robustlab.core.rng import SampleRng as SampleRng
    from robustlab.core.shift import Shift as Shift
    from robustlab.core.shift import ShiftContext as ShiftContext
    from robustlab.core.source import Source as Source
    from robustlab.core.types import Batch as Batch
    from robustlab.core.types import ImageSpec as ImageSpec
    from robustlab.core.types import ModelOutputs as ModelOutputs
    from robustlab.data import SavedPredictions as SavedPredictions
    from robustlab.data import load_data as load_data
    from robustlab.data import load_predictions as load_predictions
    from robustlab.data import write_corrupted as write_corrupted
    from robustlab.evaluate import ModelSpec as ModelSpec
    from robustlab.evaluate import ProcessPool as ProcessPool
    from robustlab.evaluate import evaluate_under_shift as evaluate_under_shift
    from robustlab.evaluate.diagnosis import Diagnosis as Diagnosis
    from robustlab.evaluate.diagnosis import Finding as Finding
    from robustlab.evaluate.doctor import doctor as doctor
    from robustlab.evaluate.drift import Drift as Drift
    from robustlab.evaluate.drift import has_moved as has_moved
    from robustlab.evaluate.locate import Location as Location
    from robustlab.evaluate.locate import locate as locate
    from robustlab.evaluate.ood import ood_report as ood_report
    from robustlab.evaluate.tuning import tune as tune
    from robustlab.metrics.store import PredictionStore as PredictionStore
    from robustlab.report.compare import compare as compare
    from robustlab.report.report import Report as Report
