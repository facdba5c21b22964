"""Margins and losses of attacks, one value a sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.core.types import Task


def margin(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Return how far each sample is from a wrong answer; below 0 the answer is wrong.

    m = z_y - max_{c != y} z_c for classes. For multi-label m = min_l s_l z_l over the annotated labels, with s_l = 1
    where the label is present and -1 where it is absent, so one flipped decision is enough.

    Args:
        logits: float (N, C).
        labels: int64 (N,), or (N, C) in {0, 1, -1} for multi-label.
        task: Task of the model.

    Returns:
        float (N,); NaN where any logit is NaN or infinite, infinity where no label is annotated.
    """
    if task == "multilabel":
        value = _signed(logits, labels).amin(1)
    else:
        own = logits.gather(1, labels[:, None]).squeeze(1)
        value = own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return torch.where(torch.isfinite(logits).all(1), value, torch.nan)


def attack_loss(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Return the loss that an attack raises, float (N,); its gradient does not vanish for confident models.

    Classes: cross-entropy. Its gradient with respect to the logits is p - onehot(y); in rows where that is below the
    resolution of float32 for every class (an overconfident, right answer) the logits are first divided by their
    standard deviation over the classes, a constant for the gradient. Two-class directions do not change by it.
    Multi-label: minus the margin, so that each step works on the label that is closest to flipping, whatever the scale
    of the logits; hinges summed over all labels spend the budget on labels that cannot be flipped.

    Args:
        logits: float (N, C).
        labels: int64 (N,), or (N, C) in {0, 1, -1} for multi-label.
        task: Task of the model.
    """
    if task == "multilabel":
        return -_signed(logits, labels).amin(1)
    with torch.no_grad():
        error = logits.softmax(1) - F.one_hot(labels, logits.shape[1])
        saturated = error.abs().amax(1, keepdim=True) < torch.finfo(torch.float32).eps
        spread = logits.std(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        scale = torch.where(saturated, spread, 1.0)
    return F.cross_entropy(logits / scale, labels, reduction="none")


def _signed(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits times +1 or -1 for present or absent labels; infinity for labels that were not annotated."""
    return torch.where(labels < 0, torch.inf, logits * (2 * labels - 1))
