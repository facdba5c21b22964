"""Detectors that compare probabilities with those of in-distribution data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustlab.core.detector import Folds, Needs
from robustlab.core.errors import ConfigError
from robustlab.core.model import Model
from robustlab.core.registry import DETECTORS
from robustlab.core.types import ModelOutputs

from .base import Learning, block_rows, finite_rows
from .logits import over_classes

_NEVER = -1e4  # log of a probability that was never seen: finite, so that 0 times it is 0


@DETECTORS.register("kl-matching")
@dataclass(frozen=True)
class KLMatching(Learning):
    """Smallest KL divergence of the softmax from the mean softmax of what was answered with each class.

    A class that no in-distribution sample was answered with is represented by its own one-hot vector. Labels are not
    used. Not for several labels.

    References:
        Hendrycks, Basart, Mazeika et al. 2022, arXiv:1911.11132.
    """

    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.LOGITS})

    def skip_reason(self, model: Model) -> str | None:
        if model.task == "multilabel":
            return "needs one class a sample"
        return super().skip_reason(model)

    def learn(self, folds: Folds) -> dict[str, Tensor]:
        total, count = torch.empty(0), torch.empty(0)
        for outputs, _ in folds:
            if outputs.task == "multilabel":
                raise ConfigError("kl-matching", "one class a sample", "several labels", "Use another detector.")
            logits = finite_rows(outputs.logits)[0]
            if not len(total):
                total = torch.zeros(2 * [logits.shape[1]], dtype=torch.float64, device=logits.device)
                count = total.new_zeros(len(total))
            for block in torch.split(logits, block_rows(logits)):
                log_probs, probs = _columns(block.T.to(torch.float64, copy=True, memory_format=torch.contiguous_format))
                answer = log_probs.max(0).indices
                total.index_add_(0, answer, probs.T)
                count += torch.bincount(answer, minlength=len(count))
        if not len(total):
            raise ConfigError("kl-matching", "in-distribution data", "no samples", "Pass some.")
        templates = torch.where(
            count[:, None] > 0, total / count[:, None].clamp_min(1), torch.eye(len(count)).to(total)
        )
        return {"templates": templates}

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float64 (N,), 0 or more; NaN in rows with NaN or infinite logits."""
        templates = self.learned["templates"].to(outputs.logits.device, torch.float64).log().clamp_min(_NEVER)

        def divergence(logits: Tensor) -> Tensor:
            log_probs, probs = _columns(logits)
            return (probs * log_probs).sum(0) - (templates @ probs).amax(0)

        return over_classes(divergence, outputs.logits, torch.float64)


def _columns(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return (log of the softmax, softmax) of logits (C, n)."""
    gaps = logits - logits.amax(0)
    probs = gaps.exp()
    total = probs.sum(0)
    return gaps - total.log(), probs / total
