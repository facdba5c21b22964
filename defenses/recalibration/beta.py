"""Beta calibration: log p and log(1 - p) with a weight each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.core.registry import DEFENSES
from robustlab.core.types import Task

from .base import Recalibration
from .columns import from_log_odds, log_odds, outcomes, prepared
from .solvers import logistic, note_separated


@DEFENSES.register("beta-calibration")
class BetaCalibration(Recalibration):
    """sigma(a log p - b log(1 - p) + c) with a, b >= 0: of class 1 of two, of every label, or of each class.

    Of more than two classes each is mapped against the rest, and the results are scaled to sum to 1.

    Args:
        model: The model to recalibrate; it is not changed.

    References:
        Kull, Silva Filho, Flach 2017, Beta calibration, AISTATS (PMLR 54).
    """

    def learn(self, logits: Tensor, labels: Tensor) -> None:
        self.keep({"coefficients": fit_beta(logits, labels, self.task)})

    def calibrate(self, logits: Tensor) -> Tensor:
        a, b, c = self.numbers("coefficients", logits).unbind(1)
        odds = log_odds(logits, self.task)
        return from_log_odds(a * F.logsigmoid(odds) - b * F.logsigmoid(-odds) + c, self.task)


def fit_beta(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Return a, b and c of minimal mean negative log-likelihood with a, b >= 0.

    Where the free optimum has a negative weight, the best of the fits without a, without b and without both that has
    none is taken, which is the constrained optimum, as the loss is convex.

    Args:
        logits: float (N, C); rows with NaN or infinity are left out.
        labels: int64 (N,), or (N, C) in {0, 1, -1} for multi-label.
        task: Task of the model.

    Returns:
        float64 (M, 3): one row for two classes, one a label or class otherwise. Where outcomes can be separated without
        error the optimum is infinite, and a steep but finite map comes back.

    Raises:
        LabelError: An outcome never occurs, no row is left, or labels are out of range.
    """
    who = "fit_beta"
    z, y = prepared(logits, labels, task, who)
    happened, annotated = (values.T for values in outcomes(y, task, z.shape[1]))
    odds = log_odds(z, task).T
    features = torch.stack([F.logsigmoid(odds), -F.logsigmoid(-odds), torch.ones_like(odds)], 2)
    found, _ = logistic(features, happened, annotated)
    wrong = (found[:, :2] < 0).any(1)
    if bool(wrong.any()):
        found[wrong] = _bounded(features[wrong], happened[wrong], annotated[wrong])
    right = ((features @ found[..., None]).squeeze(2) > 0) == (happened > 0)
    note_separated((right | (annotated == 0)).T, who)
    return found


def _bounded(features: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the best coefficients (B, 3) of those with a = 0, b = 0 or both."""
    fits, losses = [], []
    for kept in ((0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.0, 0.0, 1.0)):
        fit, loss = logistic(features * features.new_tensor(kept), target, weight)
        fits.append(fit)
        losses.append(torch.where((fit[:, :2] >= 0).all(1), loss, torch.inf))
    best = torch.stack(losses).argmin(0)
    return torch.stack(fits)[best, torch.arange(len(best), device=best.device)]
