"""Calibration: binned errors, each with its expected value under perfect calibration, and the test of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from robustlab.core.registry import METRICS
from robustlab.core.rng import SampleRng

from .base import Context, Direction, Statistic
from .binned import Binned, Surrogate, absolute_factor, largest, unit_codes
from .clinical_calibration import CalibrationIntercept, CalibrationSlope
from .forecasts import (
    BINS,
    answer_forecasts,
    bin_index,
    binned_sums,
    class_forecasts,
    equal_mass_index,
    forecasts,
    notion,
)
from .proper_scores import (
    Brier,
    BrierDecomposition,
    BrierReliability,
    BrierResolution,
    NegativeLogLikelihood,
    brier_decomposition,
    defined,
    squared_influence,
)
from .reliability import Reliability, reliability
from .smooth import Part, SmoothMetric
from .smooth_calibration import CalibrationGrid, SmoothCalibrationError
from .store import PredictionStore

__all__ = [
    "Brier",
    "BrierDecomposition",
    "BrierReliability",
    "BrierResolution",
    "CalibrationGrid",
    "CalibrationIntercept",
    "CalibrationSlope",
    "ClasswiseCalibrationError",
    "DebiasedCalibrationError",
    "EqualMassCalibrationError",
    "ExcessCalibrationError",
    "ExpectedCalibrationError",
    "MaximumCalibrationError",
    "NegativeLogLikelihood",
    "NullCalibrationError",
    "Reliability",
    "SmoothCalibrationError",
    "TopLabelCalibrationError",
    "bin_index",
    "brier_decomposition",
    "calibration_test",
    "reliability",
]

LEAST = 10  # forecasts of a bin that may decide the maximum error
DRAWS = 1000

Values = Callable[[Binned, Tensor], Tensor]
Influences = Callable[[Binned], Tensor]


def _mean(items: Sequence[Binned], value: Values, influence: Influences) -> Statistic:
    """Return the mean over classes or labels of a statistic of each."""
    return Surrogate(
        lambda weights: torch.stack([value(item, weights) for item in items]).mean(0),
        lambda: torch.stack([influence(item) for item in items]).mean(0),
    )


def _error(item: Binned, weights: Tensor) -> Tensor:
    """Return (b,): sum_m |D_m| / N."""
    return binned_sums(weights, item.index, item.gap, item.bins).abs().sum(0) / (item.mass @ weights)


def _error_influence(item: Binned) -> Tensor:
    factor = absolute_factor(item.sums, item.variance)
    n = item.item.n
    return (factor[item.index] * item.gap - item.mass * ((factor * item.sums).sum() / n)) / n


def _null(item: Binned, weights: Tensor) -> Tensor:
    """Return (b,): sum_m sqrt(2 V_m / pi) / N, V_m scaled to the number of samples that there are."""
    spread = binned_sums(weights, item.index, item.item.p * (1 - item.item.p) * item.mass, item.bins)
    count = item.item.n.to(torch.float64) * (item.mass @ weights)
    return (2 / math.pi * item.design_effect * spread.clamp_min(0) / count).sqrt().sum(0)


def _null_influence(item: Binned) -> Tensor:
    """Return what leaving a row out changes: in bins of few rows the root is far from linear."""
    each = item.item.p * (1 - item.item.p) * item.mass
    whole = item.binomial[item.index]
    moved = (whole.sqrt() - (whole - each).clamp_min(0).sqrt()) * (2 / math.pi * item.design_effect).sqrt()
    # the design effect was estimated too
    effect = item.design_influence() * (item.null_error() / (2 * item.design_effect))
    return (moved - item.mass * (moved.sum() / item.item.n)) / item.item.n + effect


class _BinnedError(SmoothMetric):
    """An error over bins, for multi-label of every label and its mean; the method text gives the null level."""

    direction: ClassVar[Direction] = "lower"
    none_left: ClassVar[str] = "no_samples"
    """Why rows that entered may leave nothing to compute."""

    def usable(self, item: Binned) -> bool:
        """Return whether the error of a label is defined."""
        return bool(item.item.entered.any())

    def binned(self, store: PredictionStore) -> list[Binned]:
        """Return the forecasts of every label or class in their bins; empty where the metric does not apply."""
        units = unit_codes(store.clusters)
        return [Binned.equal_width(item, units) for item in forecasts(store)]

    def value(self, item: Binned, weights: Tensor) -> Tensor:
        """Return (b,), the error of one label."""
        return _error(item, weights)

    def plain(self, item: Binned) -> Tensor:
        """Return (), the error of one label at weights of 1."""
        return item.sums.abs().sum() / item.item.n

    def influence(self, item: Binned) -> Tensor:
        """Return (N,), its influence values."""
        return _error_influence(item)

    def note(self, items: Sequence[Binned]) -> str:
        """Return what the method text says besides."""
        null = float(torch.stack([item.null_error() for item in items]).mean())
        return f"; expected {null:.3g} if perfectly calibrated"

    def notion(self, store: PredictionStore) -> str:
        """Return which probabilities are looked at."""
        return "" if store.task == "multilabel" else f"; of the {notion(store)}"

    def parts(self, store: PredictionStore, context: Context) -> Mapping[str, Part]:
        out = {}
        for target, items in self._targets(store, context).items():
            used = [item for item in items if self.usable(item)]
            entered = torch.stack([item.item.entered for item in items]).any(0)
            reason = self.none_left if bool(entered.any()) else "no_samples"
            note = self.notion(store) + self.note(used) + defined(len(used), len(items)) if used else ""
            out[target] = Part(_mean(used, self.value, self.influence) if used else None, entered, reason, note)
        return out

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        found = self._usable_targets(store, context)
        return {target: _mean(used, self.value, self.influence) for target, used in found.items()}

    def point(self, store: PredictionStore, context: Context) -> Mapping[str, float]:
        found = self._usable_targets(store, context)
        return {
            target: float(torch.stack([self.plain(item) for item in used]).mean()) for target, used in found.items()
        }

    def _usable_targets(self, store: PredictionStore, context: Context) -> dict[str, list[Binned]]:
        found = {
            target: [item for item in items if self.usable(item)]
            for target, items in self._targets(store, context).items()
        }
        return {target: used for target, used in found.items() if used}

    def _targets(self, store: PredictionStore, context: Context) -> dict[str, list[Binned]]:
        """Return the items that each target is the mean of; nothing where the metric does not apply."""
        items = self.binned(store)
        if not items:
            return {}
        labels = items if store.task == "multilabel" else []
        return {"": items} | {context.target(index): [item] for index, item in enumerate(labels)}


@METRICS.register("ece")
class ExpectedCalibrationError(_BinnedError):
    """ECE over 15 equal-width bins: (1/N) sum_m |S_m - H_m| with S the sum of p and H the events in a bin.

    Of the positive class for two classes, of the answer's confidence for more (which is another quantity: the method
    text says which), of every label and their mean for multi-label. The interval covers the expected value of this
    estimate at this n, which lies above 0 for a calibrated model too (``ece-null``).

    References:
        Guo et al., On calibration of modern neural networks, 2017, arXiv:1706.04599.
    """

    default = True
    title = f"ECE ({BINS} bins)"


@METRICS.register("ece-null")
class NullCalibrationError(_BinnedError):
    """Expected ECE of a perfectly calibrated model with the same probabilities.

    E0 = (1/N) sum_m sqrt(2/pi) sqrt(V_m), V_m = sum_{i in m} p_i (1 - p_i), by the normal approximation in each bin.
    Where samples are clustered, V_m is multiplied by the design effect of the gaps within bins.
    """

    default = True
    title = "ECE if perfectly calibrated"
    direction = "none"

    def value(self, item: Binned, weights: Tensor) -> Tensor:
        return _null(item, weights)

    def plain(self, item: Binned) -> Tensor:
        return item.null_error()

    def influence(self, item: Binned) -> Tensor:
        return _null_influence(item)

    def note(self, items: Sequence[Binned]) -> str:
        return "" if items[0].units is None else "; at the design effect of the clusters"


@METRICS.register("ece-excess")
class ExcessCalibrationError(_BinnedError):
    """``ece`` minus ``ece-null``: about 0 for a calibrated model at any n.

    The interval covers the expected value of the difference; the method text gives the p-value of ``calibration_test``.
    """

    title = "ECE above its null value"
    bounds = (-math.inf, math.inf)

    def value(self, item: Binned, weights: Tensor) -> Tensor:
        return _error(item, weights) - _null(item, weights)

    def plain(self, item: Binned) -> Tensor:
        return super().plain(item) - item.null_error()

    def influence(self, item: Binned) -> Tensor:
        return _error_influence(item) - _null_influence(item)

    def parts(self, store: PredictionStore, context: Context) -> Mapping[str, Part]:
        made = dict(super().parts(store, context))
        for target, part in made.items():
            if part.statistic is not None and not target:
                note = f"; p = {calibration_test(store, context):.3g} of perfect calibration"
                made[target] = Part(part.statistic, part.entered, note=part.note + note)
        return made

    def note(self, items: Sequence[Binned]) -> str:
        return ""


@METRICS.register("ece-equal-mass")
class EqualMassCalibrationError(_BinnedError):
    """ECE over 15 bins of about equally many forecasts, of what ``ece`` looks at; equal probabilities are never parted.

    The interval covers the expected value of this estimate at this n.

    References:
        Nguyen and O'Connor, Posterior calibration and exploratory analysis for natural language processing models,
        2015, arXiv:1508.05154.
    """

    title = f"ECE ({BINS} equal-mass bins)"

    def binned(self, store: PredictionStore) -> list[Binned]:
        units = unit_codes(store.clusters)
        return [Binned(item, equal_mass_index(item), BINS, units) for item in forecasts(store)]


@METRICS.register("ece-classwise")
class ClasswiseCalibrationError(_BinnedError):
    """Mean over all classes of the ECE of (p_k, label is k), over 15 equal-width bins.

    Classes without samples count: their probabilities should be near 0. The method text gives the mean weighted by
    prevalence too, since the plain mean tends to 0 with many rare classes. Not for multi-label, where it is ``ece``.
    The interval covers the expected value of this estimate at this n.

    References:
        Kull et al., Beyond temperature scaling, 2019, arXiv:1910.12656.
    """

    title = "Class-wise ECE"

    def binned(self, store: PredictionStore) -> list[Binned]:
        if store.task == "multilabel":
            return []
        units = unit_codes(store.clusters)
        return [Binned.equal_width(item, units) for item in class_forecasts(store)]

    def notion(self, store: PredictionStore) -> str:
        return ""

    def note(self, items: Sequence[Binned]) -> str:
        errors = torch.stack([item.sums.abs().sum() / item.item.n for item in items])
        share = torch.stack([(item.item.happened & item.item.entered).sum() / item.item.n for item in items])
        return f"{super().note(items)}; {float(errors @ share.to(torch.float64)):.3g} weighted by prevalence"


@METRICS.register("ece-top-label")
class TopLabelCalibrationError(_BinnedError):
    """ECE of the answer's confidence within each predicted class, weighted by the class's share of the answers.

    Over 15 equal-width bins; not for multi-label. The interval covers the expected value of this estimate at this n.

    References:
        Gupta and Ramdas, Top-label calibration and multiclass-to-binary reductions, 2022, arXiv:2107.08353.
    """

    title = "Top-label ECE"

    def binned(self, store: PredictionStore) -> list[Binned]:
        if store.task == "multilabel":
            return []
        item = answer_forecasts(store)  # also of two classes
        index = store.predicted.clamp_min(0) * BINS + bin_index(item.p)
        return [Binned(item, index, BINS * store.num_classes, unit_codes(store.clusters))]

    def notion(self, store: PredictionStore) -> str:
        return ""


@METRICS.register("ece-debiased")
class DebiasedCalibrationError(_BinnedError):
    """Squared calibration error without its sampling bias: the square, which may be negative, is the value.

    sum_m (n_m/N) [(mean p - a_m)^2 - a_m (1 - a_m) / (n_m - 1)], a_m the share of events, over 15 equal-width bins of
    what ``ece`` looks at; no correction in bins of one. Its expectation is 0 for a calibrated model, of independent
    samples. The method text gives the root, 0 for a negative square.

    References:
        Kumar, Liang and Ma, Verified uncertainty calibration, 2019, arXiv:1909.10155.
    """

    title = "Debiased squared calibration error"
    bounds = (-math.inf, math.inf)

    def value(self, item: Binned, weights: Tensor) -> Tensor:
        mass = item.mass @ weights
        scale = item.item.n / mass
        happened = item.item.happened * item.mass
        n, gap, events = (
            binned_sums(weights, item.index, values, item.bins) * scale for values in (item.mass, item.gap, happened)
        )
        bias = torch.where(n > 1.5, events * (n - events) / (n - 1).clamp_min(0.5), 0.0)
        return ((gap.square() - bias) / n.clamp_min(1e-300)).sum(0) / item.item.n

    def plain(self, item: Binned) -> Tensor:
        return self.value(item, torch.ones_like(item.mass)[:, None])[0]

    def influence(self, item: Binned) -> Tensor:
        return squared_influence(item)

    def note(self, items: Sequence[Binned]) -> str:
        square = float(torch.stack([self.plain(item) for item in items]).mean())
        return f"; root {math.sqrt(max(square, 0)):.3g}; expected 0 if perfectly calibrated"


@METRICS.register("mce")
class MaximumCalibrationError(_BinnedError):
    """Largest |mean p - share of events| over the equal-width bins that hold at least 10 forecasts.

    Of what ``ece`` looks at, macro over labels for multi-label. The interval covers the expected value of this
    estimate at this n, with bins taken as independent.
    """

    title = f"MCE ({BINS} bins, n >= {LEAST})"
    none_left: ClassVar[str] = "below_min_count"

    def usable(self, item: Binned) -> bool:
        return bool((item.counts >= LEAST).any())

    def value(self, item: Binned, weights: Tensor) -> Tensor:
        count = binned_sums(weights, item.index, item.mass, item.bins)
        gap = binned_sums(weights, item.index, item.gap, item.bins).abs() / count.clamp_min(1e-300)
        enough = count * (item.item.n / (item.mass @ weights)) >= LEAST - 1e-6
        found = torch.where(enough, gap, -1.0).amax(0)
        return torch.where(found < 0, math.nan, found)

    def plain(self, item: Binned) -> Tensor:
        enough = item.counts >= LEAST
        return (item.sums[enough].abs() / item.counts[enough]).amax()

    def influence(self, item: Binned) -> Tensor:
        enough = item.counts >= LEAST
        size = item.counts.clamp_min(1)
        mean = item.sums / size
        top = torch.where(enough, mean.abs(), -1.0).argmax()
        rest = torch.where(item.index == top, item.gap - mean[top] * item.mass, 0.0)
        own = item.spread(item.gap - mean[item.index] * item.mass) / size.square()
        _, spread = largest(mean[enough] * item.shrinkage.sqrt(), own[enough])
        factor = torch.where(own[top] > 0, (spread / own[top].clamp_min(1e-300)).sqrt(), 1.0)
        return torch.where(mean[top] < 0, -factor, factor) * rest / size[top]

    def note(self, items: Sequence[Binned]) -> str:
        nulls = []
        for item in items:
            enough = item.counts >= LEAST
            spread = (item.null_variance / item.counts.clamp_min(1).square())[enough]
            nulls.append(largest(torch.zeros_like(spread), spread)[0])
        return f"; expected {float(torch.stack(nulls).mean()):.3g} if perfectly calibrated"


def calibration_test(store: PredictionStore, context: Context) -> float:
    """Return the p-value of perfect calibration: the share of 1000 simulated calibrated models with as large an ECE.

    The sums of gaps in bins are drawn as normal numbers with the variances V_m = sum p (1 - p). Where a row holds
    several labels or samples are clustered, they are drawn with the covariance of the sums over rows or clusters.

    Args:
        store: Labelled predictions.
        context: Its resampler's seed decides the draws.

    Returns:
        (1 + number at least as large) / 1001; NaN where no row enters.
    """
    units = unit_codes(store.clusters)
    items = [Binned.equal_width(item, units) for item in forecasts(store)]
    used = [item for item in items if bool(item.item.entered.any())]
    if not used:
        return math.nan
    scale = torch.cat([(1 / (len(used) * item.item.n)).expand(item.bins) for item in used])
    observed = float((torch.cat([item.sums for item in used]).abs() * scale).sum())
    ids = torch.arange(DRAWS, device=store.ids.device)
    normal = SampleRng.make(context.resampler.seed, "calibration test", ids).normal("gaps", (len(scale),))
    drawn = normal.to(torch.float64) @ _null_root(used)
    null = (drawn.abs() * scale).sum(1)
    # rounding must not hide a tie
    return (1 + int((null >= observed * (1 - 1e-12)).sum())) / (DRAWS + 1)


def _null_root(items: Sequence[Binned]) -> Tensor:
    """Return a square root R (B, B) of the covariance R^T R of the sums of gaps of calibrated models, all bins."""
    variance = torch.cat([item.binomial for item in items])
    if len(items) == 1 and items[0].units is None:
        return torch.diag(variance.sqrt())
    units = items[0].units
    codes = torch.arange(len(items[0].gap), device=variance.device) if units is None else units
    total = variance.new_zeros((len(variance), len(variance)))
    count, step = int(codes.max()) + 1, max(1, (1 << 22) // len(variance))
    order = torch.argsort(codes, stable=True)
    ends = torch.searchsorted(codes[order], torch.arange(0, count + step, step, device=codes.device)).tolist()
    for block, (start, stop) in enumerate(pairwise(ends)):
        rows = order[start:stop]
        sums = total.new_zeros((step, len(variance)))
        at = 0
        for item in items:
            sums.index_put_((codes[rows] - block * step, at + item.index[rows]), item.gap[rows], accumulate=True)
            at += item.bins
        total += sums.T @ sums
    if units is None:
        # independent rows: the variances are known, the correlations between labels are those that were seen
        change = torch.where(total.diagonal() > 0, (variance / total.diagonal().clamp_min(1e-300)).sqrt(), 0.0)
        total = total * change[:, None] * change
    values, vectors = torch.linalg.eigh(total)
    root: Tensor = values.clamp_min(0).sqrt()[:, None] * vectors.T
    return root
