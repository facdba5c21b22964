"""Calibration slope and calibration in the large: logistic regression on the log-odds, by Newton steps in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from robustlab.core.registry import METRICS

from .base import Context
from .binned import Surrogate
from .classification import labels_of
from .smooth import Part, SmoothMetric
from .store import PredictionStore

_STEPS = 100
_HALVINGS = 30
_CLOSE = 1e-9


@dataclass(frozen=True, eq=False)
class _Fit:
    """Solutions of a batch of B problems.

    Args:
        theta: float64 (B, q), NaN where the steps did not settle.
        mean: float64 (B, N), fitted probabilities.
        inverse: float64 (B, q, q), inverse Hessian of the negative log-likelihood.
    """

    theta: Tensor
    mean: Tensor
    inverse: Tensor


def _fit(columns: Tensor, offset: Tensor, y: Tensor, weights: Tensor) -> _Fit:
    """Fit logit P(y = 1) = offset + columns theta, a batch of B problems at once.

    Newton steps (iteratively reweighted least squares), halved while the loss, which is convex, would rise.

    Args:
        columns: float64 (B or 1, q, N), of about unit size.
        offset: float64 (B or 1, N).
        y: float64 (B or 1, N), 0 or 1.
        weights: float64 (B, N), not negative.
    """

    def loss_at(theta: Tensor) -> Tensor:
        eta = offset + (theta[:, :, None] * columns).sum(1)
        return (weights * (functional.softplus(eta) - y * eta)).sum(1)

    count = columns.shape[1]
    theta = weights.new_zeros((len(weights), count))
    mean, inverse = weights.clone(), weights.new_zeros((len(weights), count, count))
    loss, settled = loss_at(theta), weights.new_zeros(len(weights), dtype=torch.bool)
    for _ in range(_STEPS):
        mean = torch.sigmoid(offset + (theta[:, :, None] * columns).sum(1))
        score = (columns * (weights * (y - mean))[:, None]).sum(2)
        weighted = columns * (weights * mean * (1 - mean))[:, None]
        inverse = torch.linalg.pinv(weighted @ columns.expand_as(weighted).mT, hermitian=True)
        if bool(settled.all()):
            return _Fit(theta, mean, inverse)
        step = (inverse @ score[:, :, None])[:, :, 0]
        new = loss
        for _ in range(_HALVINGS):
            new = loss_at(theta + step)
            worse = new > loss * (1 + 1e-12) + 1e-12
            if not bool(worse.any()):
                break
            step = torch.where(worse[:, None], step / 2, step)
        theta, loss = theta + step, new
        settled = step.abs().amax(1) <= _CLOSE * (1 + theta.abs().amax(1))
    return _Fit(torch.where(settled[:, None], theta, math.nan), mean, inverse)


@dataclass(frozen=True, eq=False)
class _Problems:
    """The regressions of a store, one for two classes, or one a label.

    Args:
        names: Targets.
        odds: float64 (L, N), 0 in rows that do not enter.
        y: float64 (L, N).
        entered: bool (L, N).
        reasons: Why each has no slope; empty where it has.
    """

    names: tuple[str, ...]
    odds: Tensor
    y: Tensor
    entered: Tensor
    reasons: tuple[str, ...]


def _problems(store: PredictionStore, context: Context) -> _Problems | None:
    labels = labels_of(store)
    if store.task == "multilabel":
        names = tuple(context.target(k) for k in range(store.num_classes))
        odds, y, entered = store.log_odds.T, labels.T == 1, (store.finite[:, None] & (labels >= 0)).T
    elif store.positive_class:
        names = ("",)
        odds, y, entered = store.log_odds[:, 1][None], (labels == 1)[None], store.finite[None]
    else:
        return None
    odds = torch.where(entered, odds, 0)
    if len(store) == 0:
        return _Problems(names, odds, y.to(torch.float64), entered, ("no_samples",) * len(names))
    ends = []
    for happened in (y, ~y):
        rows = entered & happened
        ends += [torch.where(rows, odds, torch.inf).amin(1), torch.where(rows, odds, -torch.inf).amax(1)]
    least, most, least_other, most_other = ends
    flat = (torch.minimum(least, least_other) == torch.maximum(most, most_other)).tolist()
    apart = ((most_other <= least) | (most <= least_other)).tolist()
    held = [(entered & happened).any(1).tolist() for happened in (y, ~y)]
    reasons = tuple(
        _reason(positive, negative, same, separated)
        for positive, negative, same, separated in zip(*held, flat, apart, strict=True)
    )
    return _Problems(names, odds, y.to(torch.float64), entered, reasons)


def _reason(positive: bool, negative: bool, same: bool, separated: bool) -> str:
    if not (positive and negative):
        return "single_class" if positive or negative else "no_samples"
    if same:
        return "no_variance"
    return "separation" if separated else ""


class _Regression(SmoothMetric):
    """A coefficient of the logistic regression on the log-odds."""

    direction = "none"
    bounds = (-math.inf, math.inf)

    def design(self, odds: Tensor, entered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (columns (L, q, N), offset (L, N), what the last coefficient is divided by (L,))."""
        raise NotImplementedError

    def defined(self, reason: str) -> bool:
        """Whether the coefficient exists in spite of the reason."""
        return reason == ""

    def parts(self, store: PredictionStore, context: Context) -> Mapping[str, Part]:
        made = _problems(store, context)
        if made is None:
            return {}
        columns, offset, scale = self.design(made.odds, made.entered)
        mass = made.entered.to(torch.float64)
        good = torch.tensor([self.defined(reason) for reason in made.reasons], device=mass.device)
        rows = torch.cumsum(good, 0).tolist()
        fit = _fit(columns[good], offset[good], made.y[good], mass[good]) if bool(good.any()) else None
        out = {}
        for k, name in enumerate(made.names):
            if fit is None or not self.defined(made.reasons[k]):
                out[name] = Part(None, made.entered[k], made.reasons[k])
                continue
            at = rows[k] - 1
            # dl / dw_i = H^-1 x_i (y_i - mu_i)
            moved = (fit.inverse[at, -1] @ columns[k]) * (made.y[k] - fit.mean[at]) * mass[k] / scale[k]
            statistic = _statistic(columns[k], offset[k], made.y[k], mass[k], scale[k], fit.theta[at, -1], moved)
            out[name] = Part(statistic, made.entered[k], "separation")
        return out


def _statistic(
    columns: Tensor, offset: Tensor, y: Tensor, mass: Tensor, scale: Tensor, solved: Tensor, moved: Tensor
) -> Surrogate:
    def value(weights: Tensor) -> Tensor:
        if weights.shape[1] == 1 and bool((weights == 1).all()):
            return (solved / scale)[None]
        made = _fit(columns[None], offset[None], y[None], weights.T * mass)
        return made.theta[:, -1] / scale

    return Surrogate(value, lambda: moved)


@METRICS.register("calibration-slope")
class CalibrationSlope(_Regression):
    """Slope b of logit P(y = 1) = a + b l, l the log-odds of the positive class, or of each label.

    1 is right, less is too extreme; a is another number than ``calibration-intercept``. NaN where the classes do not
    overlap (``separation``). Log-odds come from logits, never from saturated probabilities. Not for several classes.

    References:
        Cox, Two further applications of a model for binary regression, 1958; Van Calster et al., Calibration: the
        Achilles heel of predictive analytics, 2019.
    """

    title = "Calibration slope"

    def design(self, odds: Tensor, entered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mass = entered.to(torch.float64)
        count = mass.sum(1).clamp_min(1)
        centre = (odds * mass).sum(1) / count
        rest = (odds - centre[:, None]) * mass
        scale = (rest.square().sum(1) / count).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        return torch.stack([torch.ones_like(rest), rest / scale[:, None]], 1), torch.zeros_like(rest), scale


@METRICS.register("calibration-intercept")
class CalibrationIntercept(_Regression):
    """Intercept a of logit P(y = 1) = a + l with the slope fixed at 1 (calibration in the large); 0 is right.

    l is the log-odds of the positive class, or of each label; positive where events are more frequent than predicted.
    Not for several classes.

    References:
        Cox, Two further applications of a model for binary regression, 1958; Van Calster et al., Calibration: the
        Achilles heel of predictive analytics, 2019.
    """

    title = "Calibration intercept"

    def defined(self, reason: str) -> bool:
        return reason in ("", "separation", "no_variance")

    def design(self, odds: Tensor, entered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ones = torch.ones_like(odds)
        return ones[:, None], odds, odds.new_ones(len(odds))
