"""Calibration: NLL, Brier, ECE with its expected value under perfect calibration, and the reliability curve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as functional
from scipy.stats import binom
from torch import Tensor

from robustlab.core.registry import METRICS

from .base import Context, Direction, Metric, MetricValue, Statistic
from .classification import labels_of
from .stats import Bounds, IntervalKind, bootstrap, macro, proportion, ratio, rowwise
from .store import PredictionStore

BINS = 15
_EDGE = 1e-6  # float32 logits put a probability such as 3/10 this far beside its value
_ROWS = 1 << 14


@dataclass(frozen=True, eq=False)
class Forecasts:
    """Probabilities of one event and whether it happened.

    Args:
        p: float64 (N,), 0 in rows that do not enter.
        happened: bool (N,).
        entered: bool (N,), finite and annotated rows.
    """

    p: Tensor
    happened: Tensor
    entered: Tensor


def forecasts(store: PredictionStore) -> list[Forecasts]:
    """Return what ECE looks at: the positive class of two, the answer's confidence of several, or every label.

    Of answers without probabilities no row enters.
    """
    labels = labels_of(store)
    finite = torch.zeros_like(store.finite) if store.answers_only else store.finite
    if store.task == "multilabel":
        made = [(p, y == 1, finite & (y >= 0)) for p, y in zip(store.probs.unbind(1), labels.unbind(1), strict=True)]
    elif store.positive_class:
        made = [(store.probs[:, 1], labels == 1, finite)]
    else:
        made = [(rowwise(store, lambda part: part.probs.amax(1)), store.predicted == labels, finite)]
    return [Forecasts(torch.where(entered, p, 0), happened, entered) for p, happened, entered in made]


def bin_index(p: Tensor, bins: int = BINS) -> Tensor:
    """Return int64 indices of equal-width bins (a, b], with 0 in the first one; the only bin rule of the library.

    A probability up to 1e-6 above an edge counts as on it, so that shares of votes (k / M), which float32 logits cannot
    hold exactly, fall in one bin.

    Args:
        p: float64 probabilities.
        bins: Number of bins.
    """
    return (torch.ceil((p - _EDGE) * bins).to(torch.int64) - 1).clamp(0, bins - 1)


def binned_sums(weights: Tensor, index: Tensor, values: Tensor, bins: int) -> Tensor:
    """Return float64 (bins, b): the weighted sums of ``values`` (N,) in each bin, for weights (N, b).

    A matrix product with the one-hot bins, a few rows at a time: deterministic on every device.
    """
    total = weights.new_zeros((bins, weights.shape[1]))
    for start in range(0, len(index), _ROWS):
        rows = slice(start, start + _ROWS)
        table = values.new_zeros((bins, len(index[rows]))).scatter_(0, index[rows][None], values[rows][None])
        total += table @ weights[rows]
    return total


def _expected_error(item: Forecasts) -> Statistic:
    index, mass = bin_index(item.p), item.entered.to(torch.float64)
    gap = (item.p - item.happened.to(torch.float64)) * mass
    return lambda weights: binned_sums(weights, index, gap, BINS).abs().sum(0) / (mass @ weights)


def _null_error(item: Forecasts) -> Statistic:
    index, mass = bin_index(item.p), item.entered.to(torch.float64)
    spread = item.p * (1 - item.p) * mass

    def statistic(weights: Tensor) -> Tensor:
        variance = binned_sums(weights, index, spread, BINS)
        return math.sqrt(2 / math.pi) * variance.clamp_min(0).sqrt().sum(0) / (mass @ weights)

    return statistic


def _mean_loss(store: PredictionStore, losses: Tensor) -> Statistic | None:
    """Return the mean loss (N,), or for multi-label (N, L) the mean over labels of the mean over annotated rows."""
    entered = store.finite[:, None]
    if store.task == "multilabel":
        entered = entered & (labels_of(store) >= 0)
    losses = losses if losses.ndim == 2 else losses[:, None]
    used = entered.any(0)
    if not bool(used.any()):
        return None
    return ratio(torch.where(entered, losses, 0)[:, used].T.contiguous(), entered[:, used].T.to(torch.float64))


def _squared_error(store: PredictionStore) -> Tensor:
    truth = functional.one_hot(labels_of(store), store.num_classes).to(torch.float64)
    return (store.probs - truth).square().sum(1)


def _undefined(weights: Tensor) -> Tensor:
    return weights.new_full(weights.shape[1:], math.nan)


class _Sampled(Metric):
    """A calibration metric with one value and a bootstrap interval."""

    direction: ClassVar[Direction] = "lower"
    kind: ClassVar[IntervalKind] = "percentile"
    bounds: ClassVar[Bounds] = (0.0, math.inf)

    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        entered = store.finite
        if store.task == "multilabel":
            entered = entered & (labels_of(store) >= 0).any(1)
        statistic = self.statistics(store, context).get("", _undefined)
        estimate = bootstrap(store, statistic, context.resampler, entered, kind=self.kind, bounds=self.bounds)
        return [MetricValue(self.name, estimate, self.direction)]


@METRICS.register("nll")
class NegativeLogLikelihood(_Sampled):
    """Mean of -log p(label) in nats, from logits in float64; for multi-label the mean over labels."""

    title = "NLL"

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        labels = labels_of(store)
        if store.task == "multilabel":
            # log(1 - sigmoid(z)) = logsigmoid(-z)
            losses = -functional.logsigmoid(torch.where(labels == 1, 1, -1) * store.logits.to(torch.float64))
        else:
            losses = rowwise(store, lambda part: -part.log_probs.gather(1, labels_of(part)[:, None])[:, 0])
        statistic = _mean_loss(store, losses)
        return {} if statistic is None else {"": statistic}


@METRICS.register("brier")
class Brier(_Sampled):
    """Mean of sum_k (p_k - y_k)^2, in [0, 2]; for multi-label the mean over labels of (p - y)^2, in [0, 1].

    References:
        Brier, Verification of forecasts expressed in terms of probability, 1950.
    """

    title = "Brier score"

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        labels = labels_of(store)
        if store.task == "multilabel":
            losses = (store.probs - (labels == 1).to(torch.float64)).square()
        else:
            losses = rowwise(store, _squared_error)
        statistic = _mean_loss(store, losses)
        return {} if statistic is None else {"": statistic}


@METRICS.register("ece")
class ExpectedCalibrationError(_Sampled):
    """ECE over 15 equal-width bins: (1/N) sum_m |S_m - H_m| with S the sum of p and H the events in a bin.

    Of the positive class for two classes, of the answer's confidence for more, macro over labels for multi-label. The
    interval is reflected about the estimate, because replicates carry the sampling bias twice.

    References:
        Guo et al., On calibration of modern neural networks, 2017, arXiv:1706.04599.
    """

    title = f"ECE ({BINS} bins)"
    kind = "reflected"
    bounds = (0.0, 1.0)

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        parts = [_expected_error(item) for item in forecasts(store) if bool(item.entered.any())]
        return {"": macro(parts)} if parts else {}


@METRICS.register("ece-null")
class NullCalibrationError(_Sampled):
    """Expected ECE of a perfectly calibrated model with the same probabilities, for independent samples.

    E0 = (1/N) sum_m sqrt(2/pi) sqrt(sum_{i in m} p_i (1 - p_i)), by the normal approximation in each bin.
    """

    title = "ECE if perfectly calibrated"
    direction = "none"

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        parts = [_null_error(item) for item in forecasts(store) if bool(item.entered.any())]
        return {"": macro(parts)} if parts else {}


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability curve, one entry a bin, NaN in empty bins.

    Args:
        mean_p: float64 (M,), mean probability.
        frequency: float64 (M,), share of events.
        n: int64 (M,), forecasts.
        low: float64 (M,), lower Wilson end of the frequency (at the effective n of clustered samples).
        high: float64 (M,), upper end.
        band_low: float64 (M,), lower end of the frequencies expected under perfect calibration (binomial at mean p).
        band_high: float64 (M,), upper end.
    """

    mean_p: Tensor
    frequency: Tensor
    n: Tensor
    low: Tensor
    high: Tensor
    band_low: Tensor
    band_high: Tensor


def reliability(store: PredictionStore, bins: int = BINS, *, confidence: float = 0.95) -> Reliability:
    """Return the reliability curve of what ``ece`` looks at; multi-label pools the annotated decisions of all labels.

    Args:
        store: Labelled predictions.
        bins: Number of equal-width bins.
        confidence: Coverage of intervals and band, in (0, 1).

    References:
        Bröcker and Smith, Increasing the reliability of reliability diagrams, 2007.
    """
    made = forecasts(store)
    units = torch.arange(len(store), device=store.ids.device) if store.clusters is None else store.clusters
    p, happened, codes = (
        torch.cat([values[item.entered] for item, values in zip(made, side, strict=True)])
        for side in ([item.p for item in made], [item.happened for item in made], [units] * len(made))
    )
    clusters = None if store.clusters is None and len(made) == 1 else codes
    index = bin_index(p, bins)
    counts = torch.bincount(index, minlength=bins)
    mean_p, frequency = (
        binned_sums(torch.ones_like(p)[:, None], index, values, bins)[:, 0] / counts
        for values in (p, happened.to(torch.float64))
    )
    ends = []
    for m in range(bins):
        rows = index == m
        estimate = proportion(happened[rows], None if clusters is None else clusters[rows], confidence=confidence)
        ends.append((estimate.low, estimate.high))
    low, high = torch.tensor(ends, dtype=torch.float64).T
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    size, centre = counts.cpu().numpy(), mean_p.cpu().numpy()
    band = [torch.from_numpy(binom.ppf(tail, size, centre) / size.clip(1)) for tail in tails]
    return Reliability(mean_p.cpu(), frequency.cpu(), counts.cpu(), low, high, band[0], band[1])
