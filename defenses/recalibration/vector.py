"""Vector scaling: one slope and one intercept a class."""

from __future__ import annotations

import torch
from torch import Tensor

from robustlab.core.errors import ConfigError
from robustlab.core.registry import DEFENSES
from robustlab.core.types import Task

from .base import Recalibration
from .columns import prepared
from .solvers import RIDGE, Local, newton, note_separated
from .temperature import fit_temperature


@DEFENSES.register("vector-scaling")
class VectorScaling(Recalibration):
    """softmax(w * z + b) with a weight and a bias for every class; answers may change.

    Unlike temperature scaling it depends on the offset of each row of logits: of a model that returns probabilities
    the logits are log p.

    Args:
        model: A binary or multiclass model; it is not changed. ``PlattScaling`` serves multi-label ones.

    References:
        Guo, Pleiss, Sun, Weinberger 2017, arXiv:1706.04599.
    """

    @property
    def has_offset(self) -> bool:  # type: ignore[override]
        """Whether the model inside returns logits with their offset."""
        return self.base.has_offset

    def learn(self, logits: Tensor, labels: Tensor) -> None:
        weight, bias = fit_vector(logits, labels, self.task)
        self.keep({"weight": weight, "bias": bias})

    def calibrate(self, logits: Tensor) -> Tensor:
        return logits * self.numbers("weight", logits) + self.numbers("bias", logits)


def fit_vector(logits: Tensor, labels: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Return the weights w and biases b that minimise the mean negative log-likelihood of softmax(w * z + b).

    Newton's method from the best temperature, w = 1 / T and b = 0. What the data leave open stays there: the common
    part of the biases (they sum to 0), weights of constant logits, and the length of w where classes are separable.

    Args:
        logits: float (N, C); rows with NaN or infinity are left out.
        labels: int64 (N,).
        task: Task of the model.

    Returns:
        w and b, float64 (C,).

    Raises:
        ConfigError: The task is multi-label.
        LabelError: A class never occurs, no row is left, or labels are out of range.
    """
    who = "fit_vector"
    if task == "multilabel":
        raise ConfigError(who, "classes that exclude each other", "a multi-label model", "Use PlattScaling.")
    z, y = prepared(logits, labels, task, who)
    classes = z.shape[1]
    size = z.square().mean(0).sqrt()
    size = torch.where(size > 0, size, 1.0)
    x = z / size
    hits = torch.nn.functional.one_hot(y, classes).to(torch.float64)
    start = torch.cat([size / fit_temperature(z, y, task), torch.zeros_like(size)])

    def function(point: Tensor) -> Local:
        theta = point[0]
        log_q = torch.log_softmax(x * theta[:classes] + theta[classes:], 1)
        q, away = log_q.exp(), theta - start
        value = RIDGE / 2 * away.square().sum() - (log_q * hits).sum(1).mean()
        rest = (q - hits) / len(x)
        gradient = torch.cat([(rest * x).sum(0), rest.sum(0)]) + RIDGE * away
        both = torch.cat([q * x, q], 1)
        cross = torch.diag((q * x).mean(0))
        own = [[torch.diag((q * x * x).mean(0)), cross], [cross, torch.diag(q.mean(0))]]
        curvature = torch.cat([torch.cat(row, 1) for row in own]) - both.T @ both / len(x)
        curvature = curvature + RIDGE * torch.eye(2 * classes, dtype=x.dtype, device=x.device)
        return Local(value[None], gradient[None], curvature[None])

    (theta,), _ = newton(function, start[None])
    weight, bias = theta[:classes] / size, theta[classes:]
    note_separated((z * weight + bias).argmax(1) == y, who)
    return weight, bias
