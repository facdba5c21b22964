"""Detectors that see more of a model than its logits: their scores are taken in the forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from robustlab.core.detector import Detector, Needs
from robustlab.core.identity import model_identity
from robustlab.core.model import Model
from robustlab.core.spec import canonical_json
from robustlab.core.taps import TappedModel
from robustlab.core.types import Batch, ModelOutputs, Task

from .modelspec import ModelSpec

AFTERWARDS = frozenset({Needs.LOGITS, Needs.OFFSET})
"""What scores can be made of once the answers are there."""


class ScoringModel(Model):
    """A model that also returns the scores of detectors that look at features, members or gradients.

    Args:
        base: The model.
        detectors: Name of the score to fitted detector.
    """

    def __init__(self, base: Model, detectors: Mapping[str, Detector]) -> None:
        self.base = base
        self.detectors = dict(detectors)
        taps = tuple(dict.fromkeys(tap for detector in detectors.values() for tap in detector.taps))
        self.view = TappedModel(base, taps) if taps else base
        self.class_names = base.class_names
        self.has_offset = base.has_offset
        self.answers_only = base.answers_only
        self.model_name = base.model_name
        self.model_id = base.model_id

    @property
    def task(self) -> Task:  # type: ignore[override]
        """Task of the model."""
        return self.base.task

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Classes of the model."""
        return self.base.num_classes

    @property
    def order_dependent(self) -> bool:
        """Whether answers depend on the order of the data."""
        return bool(getattr(self.base, "order_dependent", False))

    def modules(self) -> Sequence[nn.Module]:
        return self.base.modules()

    def settings(self) -> Mapping[str, Any]:
        known = {name: detector_identity(detector) for name, detector in self.detectors.items()}
        return {"scores": known, "base": model_identity(self.base), **self.base.settings()}

    def for_attack(self) -> Model:
        return self.base.for_attack()

    def outputs(self, batch: Batch) -> ModelOutputs:
        outputs = self.view.outputs(batch)
        scores = {name: item.score_in_pass(self.base, batch, outputs) for name, item in self.detectors.items()}
        return dataclasses.replace(outputs, features={}, scores={**outputs.scores, **scores})


@dataclass(frozen=True, eq=False)
class ScoringSpec:
    """A scoring model by name: what a worker builds for itself."""

    base: ModelSpec
    detectors: Mapping[str, Detector]

    def build(self) -> Model:
        """Return the scoring model."""
        return ScoringModel(self.base.build(), self.detectors)


def detector_identity(detector: Detector) -> str:
    """Return a text that differs where configurations, or what was learned, differ."""
    return f"{canonical_json(detector)} {detector.state()}"
