"""Temperature scaling: one number for all logits."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from defenses.storage import read_config, restore_models, save_models
from robustlab.core.checks import check_labels
from robustlab.core.errors import ConfigError, LabelError
from robustlab.core.model import Model
from robustlab.core.registry import DEFENSES
from robustlab.core.types import Task

from .base import Recalibration

logger = logging.getLogger("robustlab")

_BRACKET = 6.0
_STOP = 1e-8


@DEFENSES.register("temperature")
class TemperatureScaling(Recalibration):
    """Logits divided by one number, fitted on clean validation data; answers stay as they are.

    Args:
        model: The model to recalibrate; it is not changed. A bare module counts as multiclass with logits.
        temperature: The number, if it is known already; None until ``fit``.

    References:
        Guo, Pleiss, Sun, Weinberger 2017, arXiv:1706.04599.
    """

    def __init__(self, model: Model | nn.Module, *, temperature: float | None = None) -> None:
        if temperature is not None and not (temperature > 0 and math.isfinite(temperature)):
            raise ConfigError(
                "TemperatureScaling", "a positive temperature", f"{temperature}", "Leave it out and call fit()."
            )
        super().__init__(model)
        self.temperature = temperature

    @property
    def has_offset(self) -> bool:  # type: ignore[override]
        """Whether the model inside returns logits with their offset."""
        return self.base.has_offset

    @property
    def is_fitted(self) -> bool:
        """Whether there is a temperature."""
        return self.temperature is not None

    def options(self) -> Mapping[str, Any]:
        return {"temperature": self.temperature}

    def learn(self, logits: Tensor, labels: Tensor) -> None:
        self.temperature = fit_temperature(logits, labels, self.task)
        logger.info("%s: temperature %.6g", self.model_name, self.temperature)

    def calibrate(self, logits: Tensor) -> Tensor:
        return logits / self.temperature  # type: ignore[operator]  # checked by the caller

    def _mapped(self, logits: Tensor) -> Tensor:
        """Divide in the logits' own precision: whatever is not finite stays so."""
        return self.calibrate(logits)

    def save(self, folder: str | Path) -> Path:
        self._require_fit("Call fit(None, val) first.")
        config = {"defense": self.name, "version": self.version, "temperature": self.temperature}
        return save_models(folder, [self.base], config)

    @classmethod
    def load(cls, folder: str | Path, *, model: Model | nn.Module) -> Self:
        config = read_config(folder, cls.name, cls.version)
        defense = cls(model, temperature=config["temperature"])
        restore_models(folder, [defense.base], config)
        return defense


def fit_temperature(logits: Tensor, labels: Tensor, task: Task) -> float:
    """Return the T that minimises the mean negative log-likelihood of logits / T.

    Newton's method in u = log(1 / T), kept in a bracket of [-6, 6] by bisection, in float64. With beta = e^u the first
    derivative is beta mean(E_q z - z_y) and the second beta^2 mean(Var_q z) plus the first. For multi-label one
    temperature serves all labels: the mean runs over annotated (sample, label) pairs and q is the sigmoid.

    Args:
        logits: float (N, C); rows with NaN or infinity are left out.
        labels: int64 (N,), or (N, C) in {0, 1, -1} for multi-label.
        task: Task of the model.

    Returns:
        T between e^-6 and e^6; an end of the bracket where the optimum lies outside, e.g. where every answer is right.

    Raises:
        LabelError: No row is left, or labels are out of range.
    """
    who = "fit_temperature"
    check_labels(labels, task=task, num_classes=logits.shape[1], count=len(logits), who=who)
    finite = torch.isfinite(logits).all(1)
    z, y = logits[finite].to(torch.float64), labels[finite]
    if task == "multilabel":
        known = y >= 0
        # a label is a two-class problem with logits (0, z)
        z, y = torch.stack([torch.zeros_like(z[known]), z[known]], 1), y[known]
    if len(z) == 0:
        raise LabelError(who, "labelled samples with finite logits", "none", "Look at the model's outputs on val.")
    low, high, u = -_BRACKET, _BRACKET, 0.0
    for end in (low, high):
        if _slope(z, y, end)[0] * end <= 0:
            logger.warning("%s: the best temperature lies beyond %.4g", who, math.exp(-end))
            return math.exp(-end)
    for _ in range(100):
        first, second = _slope(z, y, u)
        low, high = (low, u) if first > 0 else (u, high)
        target = u - first / second if second > 0 else math.inf
        if not low <= target <= high:
            target = (low + high) / 2
        done = abs(target - u) < _STOP
        u = target
        if done:
            break
    return math.exp(-u)


def _slope(z: Tensor, y: Tensor, u: float) -> tuple[float, float]:
    """Return the first and second derivative of the mean negative log-likelihood of e^u z with respect to u."""
    beta = math.exp(u)
    q = torch.softmax(beta * z, 1)
    mean = (q * z).sum(1, keepdim=True)
    first = beta * (mean.squeeze(1) - z.gather(1, y[:, None]).squeeze(1)).mean().item()
    return first, beta * beta * (q * (z - mean).square()).sum(1).mean().item() + first
