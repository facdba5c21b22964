"""Detectors that compare probabilities with those of in-distribution data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.core.detector import Folds, Needs
from robustlab.core.errors import ConfigError
from robustlab.core.model import Model
from robustlab.core.registry import DETECTORS
from robustlab.core.types import ModelOutputs

from .base import Learning, undefined

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
            logits = outputs.logits.to(torch.float64)
            probs = logits[torch.isfinite(logits).all(1)].softmax(1)
            if not len(total):
                total = probs.new_zeros(probs.shape[1], probs.shape[1])
                count = probs.new_zeros(probs.shape[1])
            answer = probs.argmax(1)
            total.index_add_(0, answer, probs)
            count += torch.bincount(answer, minlength=len(count))
        if not len(total):
            raise ConfigError("kl-matching", "in-distribution data", "no samples", "Pass some.")
        templates = torch.where(
            count[:, None] > 0, total / count[:, None].clamp_min(1), torch.eye(len(count)).to(total)
        )
        return {"templates": templates}

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float64 (N,), 0 or more; NaN in rows with NaN or infinite logits."""
        logits = outputs.logits.to(torch.float64)
        finite = torch.isfinite(logits).all(1)
        log_probs = F.log_softmax(torch.where(finite[:, None], logits, 0), 1)
        probs = log_probs.exp()
        templates = self.numbers("templates", probs).log().clamp_min(_NEVER)
        own = (probs * log_probs).sum(1, keepdim=True)
        return undefined((own - probs @ templates.T).amin(1), logits)
