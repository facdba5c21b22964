"""Histogram binning: the frequency in each of some bins with equally many samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustlab.core.errors import RangeError
from robustlab.core.model import Model
from robustlab.core.registry import DEFENSES
from robustlab.core.types import Task

from .base import Recalibration
from .columns import from_frequencies, log_odds, outcomes, prepared, table


@DEFENSES.register("histogram-binning")
class HistogramBinning(Recalibration):
    """The frequency in the bin of the log-odds: of class 1 of two, of every label, or of each class.

    Bins hold equally many validation samples, as far as ties allow. Of more than two classes each is mapped against
    the rest, and the results are scaled to sum to 1. Bins make ties, so ranks and AUROC may change.

    Args:
        model: The model to recalibrate; it is not changed.
        bins: Number of bins, at least 1; fewer where there are fewer distinct log-odds.

    Raises:
        RangeError: ``bins`` is below 1.

    References:
        Zadrozny, Elkan 2001, Obtaining calibrated probability estimates from decision trees and naive Bayesian
        classifiers, ICML.
    """

    flat: ClassVar[bool] = True

    def __init__(self, model: Model | nn.Module, *, bins: int = 15) -> None:
        _check_bins("HistogramBinning", bins)
        super().__init__(model)
        self.bins = bins

    def options(self) -> Mapping[str, Any]:
        return {"bins": self.bins}

    def learn(self, logits: Tensor, labels: Tensor) -> None:
        edges, values, count = fit_histogram(logits, labels, self.task, bins=self.bins)
        self.keep({"edges": edges, "values": values, "count": count})

    def calibrate(self, logits: Tensor) -> Tensor:
        index = bins_of(log_odds(logits, self.task), self.numbers("edges", logits))
        p = self.numbers("values", logits).gather(1, index.T).T
        mapped, unseen = from_frequencies(p, self.numbers("count", logits), logits, self.task)
        self.note(unseen)
        return mapped


def bins_of(x: Tensor, edges: Tensor) -> Tensor:
    """Return int64 (N, M) bins (a, b] of values (N, M), for inner edges (M, Q); the rule of fit and transform."""
    return torch.searchsorted(edges, x.T.contiguous()).T


def fit_histogram(logits: Tensor, labels: Tensor, task: Task, *, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Return bins of equally many samples and the frequency of the event in each.

    Edges lie halfway between two distinct log-odds, so no bin is empty, ties stay together, and a last bit of a logit
    moves no validation sample.

    Args:
        logits: float (N, C); rows with NaN or infinity are left out.
        labels: int64 (N,), or (N, C) in {0, 1, -1} for multi-label.
        task: Task of the model.
        bins: Number of bins.

    Returns:
        Inner edges, float64 (M, Q), infinite at the end of short rows; frequencies, float64 (M, Q + 1); the number of
        samples, float64 (M,). M = 1 for two classes, one a label or class otherwise.

    Raises:
        RangeError: ``bins`` is below 1.
        LabelError: An outcome never occurs, no row is left, or labels are out of range.
    """
    who = "fit_histogram"
    _check_bins(who, bins)
    z, y = prepared(logits, labels, task, who)
    happened, annotated = outcomes(y, task, z.shape[1])
    odds = log_odds(z, task)
    columns = [odds[annotated[:, k] > 0, k] for k in range(odds.shape[1])]
    edges = table([_edges(column, bins) for column in columns], fill=torch.inf)
    index = bins_of(odds, edges)
    size, hits = (
        torch.zeros(edges.shape[0], edges.shape[1] + 1, dtype=torch.float64, device=z.device).scatter_add_(
            1, index.T, values.T
        )
        for values in (annotated, happened)
    )
    return edges, hits / size.clamp_min(1), annotated.sum(0)


def _edges(values: Tensor, bins: int) -> Tensor:
    """Return the distinct edges that cut values (n,) into parts of about n / bins."""
    rising = values.sort().values
    count = len(rising)
    cuts = torch.arange(1, bins, device=values.device) * count // bins
    below = rising[(cuts[cuts > 0] - 1)]
    after = torch.searchsorted(rising, below, right=True)
    inside = after < count
    edges: Tensor = torch.unique((below[inside] + rising[after[inside]]) / 2)
    return edges


def _check_bins(who: str, bins: int) -> None:
    if bins < 1:
        raise RangeError(who, "at least 1 bin", f"{bins}", "15 bins are usual.")
