"""From drawn label vectors to probabilities, votes and how sure each image is."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from robustlab.core.errors import ConfigError, LabelError, RangeError
from robustlab.metrics.forecasts import bin_index, bin_totals

Readout = Literal["mean", "mapped-mean", "mean-of-mapped", "mapped-twice"]
"""``"mean"``: the clipped mean, the consistent estimator (R0). ``"mapped-mean"``: as the paper writes it (R1).
``"mean-of-mapped"``: the mean of mapped samples (R2). ``"mapped-twice"``: that mapped again, as the released code's
calibration error (R3)."""

Objective = Literal["ece", "nll"]

_BINS = 10
_RANGE = (1e-2, 1e2)
_GRID = 401


def mapped(vectors: Tensor, iota: float) -> Tensor:
    """Return softmax(-(y - 1)^2 / iota) over the classes.

    Args:
        vectors: float (..., A).
        iota: Width of the map, above 0.

    Raises:
        RangeError: ``iota`` is not positive.
    """
    if not iota > 0:
        raise RangeError("iota", "a positive number", f"{iota}", "fit_iota finds one on validation samples.")
    return F.softmax(-(vectors - 1).square() / iota, -1)


def probabilities(samples: Tensor, readout: Readout = "mapped-mean", iota: float = 0.25) -> Tensor:
    """Return the probabilities of the classes, float (B, A).

    Args:
        samples: Drawn label vectors, float (B, S, A), of all members.
        readout: See ``Readout``.
        iota: Width of the map; not used by ``"mean"``.

    Raises:
        ConfigError: There is no such readout.
    """
    if readout == "mean":
        clipped = samples.mean(1).clamp_min(0)
        total = clipped.sum(-1, keepdim=True)
        return torch.where(total > 0, clipped / torch.where(total > 0, total, 1), 1 / samples.shape[-1])
    if readout == "mapped-mean":
        return mapped(samples.mean(1), iota)
    if readout == "mean-of-mapped":
        return mapped(samples, iota).mean(1)
    if readout == "mapped-twice":
        return mapped(mapped(samples, iota).mean(1), iota)
    raise ConfigError("readout", f"one of {', '.join(get_args(Readout))}", repr(readout), "The paper's is mapped-mean.")


def votes(samples: Tensor) -> Tensor:
    """Return the share of drawn vectors that are largest at each class, float (B, A); ties go to the lowest class.

    The class with most votes, the lowest of several, is the released code's answer.
    """
    return F.one_hot(_first_largest(samples), samples.shape[-1]).to(samples.dtype).mean(1)


def _first_largest(values: Tensor) -> Tensor:
    # argmax may return any of several largest values, so the lowest class is given the largest number
    falling = torch.arange(values.shape[-1], 0, -1, device=values.device)
    return ((values == values.amax(-1, keepdim=True)) * falling).argmax(-1)


def interval_width(samples: Tensor) -> Tensor:
    """Return the distance of the 2.5 and 97.5 % quantiles of the draws, class by class, float (B, A) (CPIW)."""
    ends = torch.quantile(samples, torch.tensor([0.025, 0.975]).to(samples), dim=1)
    return ends[1] - ends[0]


def scaled_variance(samples: Tensor) -> Tensor:
    """Return four times the variance of the draws, class by class, float (B, A): at most 1 inside [0, 1] (CNPV)."""
    variance: Tensor = samples.var(1, correction=0)
    return 4 * variance


def fit_iota(
    samples: Tensor, labels: Tensor, *, readout: Readout = "mapped-mean", objective: Objective = "ece"
) -> float:
    """Return the width of the map that calibrates validation samples best.

    Samples are drawn once and kept, so that the objective is no random number: 401 widths from 0.01 to 100 on a
    logarithmic grid, and for ``"nll"`` the minimum between the neighbours of the best.

    Args:
        samples: Drawn label vectors, float (B, S, A).
        labels: int64 (B,).
        readout: See ``Readout``; ``"mean"`` has no width.
        objective: ``"ece"``, the calibration error in 10 bins as in the paper, or ``"nll"``.

    Raises:
        ConfigError: The readout has no width, or there is no such objective.
        LabelError: Not one label for each image.
    """
    if readout == "mean" or objective not in get_args(Objective):
        got = f"readout={readout!r}, objective={objective!r}"
        raise ConfigError("fit_iota", "a readout that maps, and objective 'ece' or 'nll'", got, "Choose others.")
    if labels.shape != samples.shape[:1] or len(labels) == 0:
        got = f"{tuple(labels.shape)} labels for {tuple(samples.shape)} samples"
        raise LabelError("fit_iota", "one label for each image", got, "Pass labels of shape (B,).")
    wide = samples.to(torch.float64)

    def loss(log_iota: float) -> float:
        probs = probabilities(wide, readout, float(np.exp(log_iota)))
        if objective == "ece":
            return _calibration_error(probs, labels)
        return float(F.nll_loss(probs.clamp_min(torch.finfo(probs.dtype).tiny).log(), labels))

    grid = np.linspace(math.log(_RANGE[0]), math.log(_RANGE[1]), _GRID)
    values = np.array([loss(point) for point in grid])
    best = int(values.argmin())
    if objective == "nll":
        around = grid[max(0, best - 1)], grid[min(_GRID - 1, best + 1)]
        return float(np.exp(minimize_scalar(loss, bounds=around, method="bounded").x))
    return float(np.exp(grid[best]))


def _calibration_error(probs: Tensor, labels: Tensor) -> float:
    """Return the expected calibration error of the answer in 10 bins of equal width."""
    confidence, answer = probs.max(1)
    gaps = (answer == labels).to(confidence.dtype) - confidence
    return float(bin_totals(bin_index(confidence, _BINS), gaps, _BINS).abs().sum() / len(labels))
