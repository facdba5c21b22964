"""Detectors that look at the logits only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.core.detector import Detector, Needs
from robustlab.core.errors import RangeError
from robustlab.core.registry import DETECTORS
from robustlab.core.types import ModelOutputs


@DETECTORS.register("msp")
@dataclass(frozen=True)
class MSP(Detector):
    """Maximum softmax probability, written as the log-odds against the answer so that confident samples do not tie.

    Classes: log sum_{c != y} exp(z_c - z_y) with y the answer, which is log((1 - p) / p) for p the largest softmax
    probability: the same order as -p. Multi-label: -max_l z_l, minus the largest log-odds of any label, the same
    order as minus the largest sigmoid (MaxLogit). An image without any finding thus looks unfamiliar to it; prefer
    other detectors where such images are common.

    References:
        Hendrycks, Gimpel 2017, arXiv:1610.02136. Multi-label: Hendrycks, Basart, Mazeika et al. 2022,
        arXiv:1911.11132.
    """

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float64 (N,); NaN in rows with NaN or infinite logits."""
        logits = outputs.logits.to(torch.float64)
        best = logits.amax(1, keepdim=True)
        if outputs.task == "multilabel":
            score = -best.squeeze(1)
        else:
            answer = logits.argmax(1, keepdim=True)
            score = torch.logsumexp((logits - best).scatter(1, answer, -torch.inf), 1)
        return torch.where(torch.isfinite(logits).all(1), score, torch.nan)


@DETECTORS.register("energy")
@dataclass(frozen=True)
class Energy(Detector):
    """Energy -T log sum_c exp(z_c / T); for multi-label the joint energy -T sum_l softplus(z_l / T).

    Undefined for models that return probabilities, as it needs the offset of the logits.

    Args:
        temperature: T, above 0.

    Raises:
        RangeError: T is not positive.

    References:
        Liu, Wang, Owens, Li 2020, arXiv:2010.03759. Multi-label: Wang, Liu, Bocchieri, Li 2021, arXiv:2109.14162.
    """

    temperature: float = 1.0

    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.LOGITS, Needs.OFFSET})

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise RangeError("Energy", "a positive temperature", f"{self.temperature}", "1 is the usual value.")

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float64 (N,); NaN in rows with NaN or infinite logits."""
        logits = outputs.logits.to(torch.float64)
        scaled = logits / self.temperature
        total = F.softplus(scaled).sum(1) if outputs.task == "multilabel" else torch.logsumexp(scaled, 1)
        return torch.where(torch.isfinite(logits).all(1), -self.temperature * total, torch.nan)
