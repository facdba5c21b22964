"""Dirichlet calibration: a full matrix on log-probabilities, off-diagonal entries and biases held small."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robustlab.core.errors import ConfigError, RangeError
from robustlab.core.model import Model
from robustlab.core.registry import DEFENSES
from robustlab.core.types import Task

from .base import Recalibration
from .columns import prepared
from .solvers import RIDGE, Curved, newton_cg, note_separated
from .temperature import fit_temperature


@DEFENSES.register("dirichlet")
class DirichletCalibration(Recalibration):
    """softmax(W log p + b) with off-diagonal and intercept regularisation (ODIR); answers may change.

    Args:
        model: A binary or multiclass model; it is not changed. ``BetaCalibration`` serves multi-label ones.
        reg_lambda: Weight of the mean squared off-diagonal entry of W, 0 or more.
        reg_mu: Weight of the mean squared entry of b, 0 or more.

    Raises:
        RangeError: A weight is negative.

    References:
        Kull, Perello-Nieto, Kängsepp et al. 2019, arXiv:1910.12656.
    """

    def __init__(self, model: Model | nn.Module, *, reg_lambda: float = 1e-3, reg_mu: float = 1e-3) -> None:
        _check_weights("DirichletCalibration", reg_lambda, reg_mu)
        super().__init__(model)
        self.reg_lambda = float(reg_lambda)
        self.reg_mu = float(reg_mu)

    def options(self) -> Mapping[str, Any]:
        return {"reg_lambda": self.reg_lambda, "reg_mu": self.reg_mu}

    def learn(self, logits: Tensor, labels: Tensor) -> None:
        weight, bias = fit_dirichlet(logits, labels, self.task, reg_lambda=self.reg_lambda, reg_mu=self.reg_mu)
        self.keep({"weight": weight, "bias": bias})

    def calibrate(self, logits: Tensor) -> Tensor:
        mapped = torch.log_softmax(logits, 1) @ self.numbers("weight", logits).T + self.numbers("bias", logits)
        return torch.log_softmax(mapped, 1)


def fit_dirichlet(
    logits: Tensor, labels: Tensor, task: Task, *, reg_lambda: float = 1e-3, reg_mu: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Return W and b that minimise the regularised mean negative log-likelihood of softmax(W log p + b).

    The penalty is reg_lambda mean_{i != j} W_ij^2 + reg_mu mean_j b_j^2. Newton's method with conjugate
    gradients, from the best temperature: W = I / T and b = 0.

    Args:
        logits: float (N, C); rows with NaN or infinity are left out.
        labels: int64 (N,).
        task: Task of the model.
        reg_lambda: Weight of the off-diagonal penalty.
        reg_mu: Weight of the bias penalty.

    Returns:
        W, float64 (C, C), and b, float64 (C,).

    Raises:
        ConfigError: The task is multi-label.
        RangeError: A weight is negative.
        LabelError: A class never occurs, no row is left, or labels are out of range.
    """
    who = "fit_dirichlet"
    _check_weights(who, reg_lambda, reg_mu)
    if task == "multilabel":
        raise ConfigError(who, "classes that exclude each other", "a multi-label model", "Use BetaCalibration.")
    z, y = prepared(logits, labels, task, who)
    classes = z.shape[1]
    log_p = torch.log_softmax(z, 1)
    size = log_p.square().mean(0).sqrt()
    size = torch.where(size > 0, size, 1.0)
    x = torch.cat([log_p / size, torch.ones_like(log_p[:, :1])], 1)
    hits = torch.nn.functional.one_hot(y, classes).to(torch.float64)
    start = torch.cat([torch.diag(size / fit_temperature(z, y, task)), torch.zeros_like(size)[:, None]], 1)
    off = (1 - torch.eye(classes, dtype=z.dtype, device=z.device)) / size.square()
    off = off * reg_lambda / (classes * (classes - 1))
    penalty = torch.cat([off, torch.full_like(start[:, -1:], reg_mu / classes)], 1)
    scales, axes = torch.linalg.eigh(x.T @ x / len(x))

    def function(point: Tensor) -> Curved:
        log_q, away = torch.log_softmax(x @ point.T, 1), point - start
        q = log_q.exp()
        value = (penalty * point.square()).sum() + RIDGE / 2 * away.square().sum() - (log_q * hits).sum(1).mean()
        gradient = (q - hits).T @ x / len(x) + 2 * penalty * point + RIDGE * away
        # the second derivative is about mean q (1 - q) of each class times the second moments of x
        size_of = (q * (1 - q)).mean(0)[:, None] * scales.clamp_min(0) + 2 * penalty.mean(1, keepdim=True) + RIDGE

        def product(matrix: Tensor) -> Tensor:
            moved = q * (x @ matrix.T)
            moved = moved - q * moved.sum(1, keepdim=True)
            return moved.T @ x / len(x) + (2 * penalty + RIDGE) * matrix

        return Curved(float(value), gradient, product, lambda matrix: (matrix @ axes / size_of) @ axes.T)

    found = newton_cg(function, start)
    note_separated((x @ found.T).argmax(1) == y, who)
    return found[:, :-1] / size, found[:, -1].clone()


def _check_weights(who: str, *weights: float) -> None:
    if not all(weight >= 0 and math.isfinite(weight) for weight in weights):
        raise RangeError(who, "reg_lambda and reg_mu of at least 0", f"{weights}", "1e-3 is a good start.")
