"""Training losses by task."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from robustlab.core.types import Task


def task_loss(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Return the mean cross-entropy, or for multi-label the mean binary one over annotated labels.

    Args:
        logits: float (N, C).
        labels: int64 (N,), or (N, C) in {0, 1, -1} for multi-label (-1: not annotated).
        task: Task of the model.
    """
    if task != "multilabel":
        return F.cross_entropy(logits, labels)
    known = labels >= 0
    each = F.binary_cross_entropy_with_logits(logits, labels.clamp_min(0).to(logits.dtype), reduction="none")
    return (each * known).sum() / known.sum().clamp_min(1)
