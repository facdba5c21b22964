"""Scores of ensembles: how far the members disagree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustlab.core.detector import Detector, Needs
from robustlab.core.errors import ModelError
from robustlab.core.registry import DETECTORS
from robustlab.core.types import ModelOutputs
from robustlab.metrics.uncertainty import disagreement, mutual_information


def _members(name: str, outputs: ModelOutputs) -> Tensor:
    if outputs.members is None:
        raise ModelError(name, "outputs with members", "none", "Use an ensemble, e.g. DeepEnsemble.")
    return outputs.members


@DETECTORS.register("mutual-information")
@dataclass(frozen=True)
class MutualInformation(Detector):
    """Entropy of the mean prediction less the mean entropy of the members: what they do not agree on, in nats.

    References:
        Houlsby, Huszar, Ghahramani, Lengyel 2011, arXiv:1112.5745; Depeweg et al. 2018, arXiv:1710.07283.
    """

    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.MEMBERS})

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float64 (N,), 0 or more."""
        score, _ = mutual_information(_members("mutual-information", outputs))
        return score


@DETECTORS.register("disagreement")
@dataclass(frozen=True)
class Disagreement(Detector):
    """Share of pairs of members with different answers."""

    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.MEMBERS})

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float64 (N,) from 0 to 1; NaN for one member."""
        return disagreement(_members("disagreement", outputs))
