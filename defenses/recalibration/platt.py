"""Platt scaling: slope and intercept of the log-odds."""

from __future__ import annotations

import torch
from torch import Tensor

from robustlab.core.errors import ConfigError
from robustlab.core.registry import DEFENSES
from robustlab.core.types import Task

from .base import Recalibration
from .columns import from_log_odds, log_odds, outcomes, prepared
from .solvers import logistic, note_separated


@DEFENSES.register("platt")
class PlattScaling(Recalibration):
    """sigma(a l + b) of the log-odds l of two classes, or with an a and b for every label.

    Keeps the ranks of scores where a is positive, but may move answers across one half. For more than two classes
    ``VectorScaling`` is the counterpart.

    Args:
        model: A binary or multi-label model; it is not changed.

    References:
        Platt 1999, Probabilistic outputs for support vector machines; here without smoothed targets.
    """

    @property
    def has_offset(self) -> bool:  # type: ignore[override]
        """Whether multi-label logits have one; of two classes log-probabilities are returned."""
        return self.task == "multilabel" and self.base.has_offset

    def learn(self, logits: Tensor, labels: Tensor) -> None:
        slope, intercept = fit_platt(logits, labels, self.task)
        self.keep({"slope": slope, "intercept": intercept})

    def calibrate(self, logits: Tensor) -> Tensor:
        slope, intercept = self.numbers("slope", logits), self.numbers("intercept", logits)
        return from_log_odds(log_odds(logits, self.task) * slope + intercept, self.task)


def fit_platt(logits: Tensor, labels: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Return the slopes a and intercepts b that minimise the mean negative log-likelihood of sigma(a l + b).

    Args:
        logits: float (N, 2), or (N, C) for multi-label; rows with NaN or infinity are left out.
        labels: int64 (N,), or (N, C) in {0, 1, -1} for multi-label.
        task: Task of the model.

    Returns:
        a and b, float64 (M,): one for two classes, one a label for multi-label. Where outcomes can be separated without
        error the optimum is infinite, and a steep but finite map comes back.

    Raises:
        ConfigError: More than two classes.
        LabelError: An outcome never occurs, no row is left, or labels are out of range.
    """
    who = "fit_platt"
    if task != "multilabel" and logits.shape[1] != 2:
        raise ConfigError(
            who, "two classes, or a multi-label model", f"{logits.shape[1]} classes", "Use VectorScaling."
        )
    z, y = prepared(logits, labels, task, who)
    happened, annotated = outcomes(y, task, z.shape[1])
    odds = log_odds(z, task)
    features = torch.stack([odds.T, torch.ones_like(odds.T)], 2)
    found, _ = logistic(features, happened.T, annotated.T)
    right = ((features @ found[..., None]).squeeze(2).T > 0) == (happened > 0)
    note_separated(right | (annotated == 0), who)
    return found[:, 0], found[:, 1]
