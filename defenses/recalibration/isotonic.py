"""Isotonic regression: the rising step function that fits best."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from robustlab.core.registry import DEFENSES
from robustlab.core.types import Task

from .base import Recalibration
from .columns import from_frequencies, log_odds, outcomes, prepared, table


@DEFENSES.register("isotonic")
class IsotonicCalibration(Recalibration):
    """A rising map from log-odds to frequencies: of class 1 of two, of every label, or of each class.

    Of more than two classes each is mapped against the rest, and the results are scaled to sum to 1. Steps make ties,
    so ranks and AUROC may change.

    Args:
        model: The model to recalibrate; it is not changed.

    References:
        Zadrozny, Elkan 2002, Transforming classifier scores into accurate multiclass probability estimates, KDD.
    """

    flat: ClassVar[bool] = True

    def learn(self, logits: Tensor, labels: Tensor) -> None:
        knots, values, count = fit_isotonic(logits, labels, self.task)
        self.keep({"knots": knots, "values": values, "count": count})

    def calibrate(self, logits: Tensor) -> Tensor:
        odds = log_odds(logits, self.task)
        p = interpolate(odds, self.numbers("knots", logits), self.numbers("values", logits))
        mapped, unseen = from_frequencies(p, self.numbers("count", logits), logits, self.task)
        self.note(unseen)
        return mapped


def interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Return piecewise linear functions, constant outside their knots, of each column.

    Args:
        x: float64 (N, M).
        knots: float64 (M, Q), rising; repeated at the end of short rows.
        values: float64 (M, Q).
    """
    columns = x.T.contiguous()
    right = torch.searchsorted(knots, columns).clamp(1, knots.shape[1] - 1)
    low, high = knots.gather(1, right - 1), knots.gather(1, right)
    width = high - low
    share = torch.where(width > 0, (columns - low) / torch.where(width > 0, width, 1.0), 1.0).clamp(0, 1)
    return torch.lerp(values.gather(1, right - 1), values.gather(1, right), share).T


def fit_isotonic(logits: Tensor, labels: Tensor, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rising step functions of the log-odds with the least squared error.

    netcal pools the adjacent violators. It is given the ranks of the log-odds, whose order is all that matters, in
    place of probabilities: those would tie where they round to 1.

    Args:
        logits: float (N, C); rows with NaN or infinity are left out.
        labels: int64 (N,), or (N, C) in {0, 1, -1} for multi-label.
        task: Task of the model.

    Returns:
        Knots and frequencies, float64 (M, Q), the first and last log-odds of every step, and the number of samples,
        float64 (M,); M = 1 for two classes, one a label or class otherwise.

    Raises:
        LabelError: An outcome never occurs, no row is left, or labels are out of range.
    """
    z, y = prepared(logits, labels, task, "fit_isotonic")
    happened, annotated = outcomes(y, task, z.shape[1])
    odds, used = log_odds(z, task), annotated > 0
    fits = [
        _pooled(odds[used[:, k], k].cpu().numpy(), happened[used[:, k], k].cpu().numpy()) for k in range(odds.shape[1])
    ]
    knots, values = (table([torch.from_numpy(fit[i]) for fit in fits]).to(z.device) for i in (0, 1))
    return knots, values, annotated.sum(0)


def _pooled(odds: np.ndarray, happened: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return knots (Q,) and frequencies (Q,) of one column, Q at least 2."""
    from netcal.binning import IsotonicRegression

    levels, rank, count = np.unique(odds, return_inverse=True, return_counts=True)
    place = np.arange(1, len(levels) + 1) / (len(levels) + 1)
    method = IsotonicRegression()
    method.fit(place[rank], happened.astype(np.int64))
    fitted = np.asarray(method.transform(place), dtype=np.float64)
    # equal up to rounding means one step; its frequency is then counted
    first = np.flatnonzero(np.diff(fitted, prepend=-1.0) > 1e-12)
    last = np.append(first[1:], len(levels)) - 1
    hits = np.bincount(rank, weights=happened, minlength=len(levels))
    value = np.add.reduceat(hits, first) / np.add.reduceat(count, first)
    return np.stack([levels[first], levels[last]], 1).ravel(), np.repeat(value, 2)
