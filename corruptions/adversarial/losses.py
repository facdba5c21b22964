"""Margins and losses of attacks, one value a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.core.errors import ConfigError
from robustlab.core.types import Task

LossName = Literal["ce", "dlr", "margin"]
LOSSES: tuple[LossName, ...] = ("ce", "dlr", "margin")
_TINY = 1e-12


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
    value = signed(logits, labels).amin(1) if task == "multilabel" else _gap(logits, labels)
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
        return -signed(logits, labels).amin(1)
    with torch.no_grad():
        error = logits.softmax(1) - F.one_hot(labels, logits.shape[1])
        saturated = error.abs().amax(1, keepdim=True) < torch.finfo(torch.float32).eps
        spread = logits.std(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        scale = torch.where(saturated, spread, 1.0)
    return F.cross_entropy(logits / scale, labels, reduction="none")


def cross_entropy(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Return the plain cross-entropy, float (N,), as the reference ensemble takes it; of labels their sum.

    Args:
        logits: float (N, C).
        labels: int64 (N,), or (N, C) in {0, 1, -1} for multi-label.
        task: Task of the model.
    """
    if task == "multilabel":
        return F.softplus(-signed(logits, labels)).sum(1)
    return F.cross_entropy(logits, labels, reduction="none")


def minus_margin(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Return minus the margin, float (N,), also where logits are not finite."""
    return -signed(logits, labels).amin(1) if task == "multilabel" else -_gap(logits, labels)


def dlr(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Return the difference of logits ratio, -(z_y - max_{c != y} z_c) / (z_(1) - z_(3)), float (N,), for C >= 3.

    References:
        F. Croce, M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks", 2020, 2003.01690.
    """
    del task
    ranked = logits.sort(1).values
    own = logits.gather(1, labels[:, None]).squeeze(1)
    # the reference sorts all logits and takes the second where the first is the label's own
    first = logits.argsort(1)[:, -1] == labels
    other = torch.where(first, ranked[:, -2], ranked[:, -1])
    return -(own - other) / (ranked[:, -1] - ranked[:, -3] + _TINY)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2) for targets t, float (N,), and -(z_y - z_t) below 4 classes.

    With three classes z_(1) - z_(3) has been proposed for the denominator. Then the loss is -1 and its gradient 0 as
    long as the target is the least likely class. The scale of the logits does not matter to a search that compares a
    sample's losses with each other and takes steps of a given length.

    Args:
        logits: float (N, C).
        labels: int64 (N,).
        targets: int64 (N,).
    """
    own, aim = (logits.gather(1, which[:, None]).squeeze(1) for which in (labels, targets))
    if logits.shape[1] < 4:
        return -(own - aim)
    ranked = logits.sort(1).values
    return -(own - aim) / (ranked[:, -1] - 0.5 * (ranked[:, -3] + ranked[:, -4]) + _TINY)


_LEAST = 1e-300  # a threshold of 0 would be infinitely far away


def decided_at(logits: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """Return logits (N, L) moved so that each label is decided where its logit crosses 0.

    Args:
        logits: float (N, L).
        thresholds: Probability at which each label is decided; empty for one half.
    """
    if not thresholds:
        return logits
    return logits - torch.tensor(thresholds, dtype=torch.float64).logit(_LEAST).to(logits.device, logits.dtype)


def loss_named(name: LossName, task: Task, num_classes: int, who: str) -> Callable[[Tensor, Tensor, Task], Tensor]:
    """Return a loss by name.

    Raises:
        ConfigError: It is not defined for this task or number of classes.
    """
    if name == "dlr" and (task == "multilabel" or num_classes < 3):
        got = "several labels" if task == "multilabel" else f"{num_classes} classes"
        raise ConfigError(
            who, "three classes or more for loss='dlr'", got, "Use loss='margin', which has the same direction there."
        )
    return {"ce": cross_entropy, "dlr": dlr, "margin": minus_margin}[name]


def _gap(logits: Tensor, labels: Tensor) -> Tensor:
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def signed(logits: Tensor, labels: Tensor) -> Tensor:
    """Return logits times +1 or -1 for present or absent labels, infinity for labels that were not annotated (N, C)."""
    return torch.where(labels < 0, torch.inf, logits * (2 * labels - 1))
