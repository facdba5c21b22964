"""Selective prediction: what is wrong among the answers that a model is sure of.

Samples are accepted in the order of falling confidence. Equal confidences have no order, so every quantity is its
expectation over all orders within them: after a samples with b errors, a group of c samples with E errors has
b + j E / c errors at its j-th place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from robustlab.core.errors import ShapeError
from robustlab.core.registry import METRICS

from .base import Context, Estimate, Metric, MetricValue, Statistic
from .classification import pair_bounds
from .selective import confidence, wrong_answers
from .smooth import Part, SmoothMetric
from .stats import bootstrap, cumulative, delong, effective_count, rank_probability, unit_count, wilson
from .store import PredictionStore

_FEWEST = 20  # units that an interval of coverage needs
_RISK = 20  # coverage is taken at a risk of 1 / 20
_COVERAGE = 4, 5  # risk is taken at a coverage of 4 / 5


def risk_coverage(confidence: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Return (coverage k / N, mean error of the k surest samples), float64 (N,) each, k = 1 ... N.

    Args:
        confidence: float (N,), larger is surer; infinities allowed.
        error: bool or float (N,), 1 for a wrong answer, or any loss.

    Raises:
        ShapeError: The lengths differ, or a confidence is NaN.
    """
    if confidence.shape != error.shape or confidence.ndim != 1 or bool(torch.isnan(confidence).any()):
        raise ShapeError(
            "risk_coverage",
            "confidence and error of one length, without NaN",
            f"{tuple(confidence.shape)} and {tuple(error.shape)}, {int(torch.isnan(confidence).sum())} NaN",
            "Leave out the samples without a confidence.",
        )
    order = _Order.make(confidence, error.to(torch.float64))
    count = torch.arange(1, len(confidence) + 1, dtype=torch.float64, device=confidence.device)
    return count / len(confidence), order.expected.cumsum(0) / count


def excess_aurc(confidence: Tensor, error: Tensor) -> float:
    """Return AURC less that of the best order of the same errors, at least 0; NaN without samples.

    References:
        Geifman et al., Bias-reduced uncertainty estimation for deep neural classifiers, 2019, arXiv 1805.08206.
    """
    best = risk_coverage(-error.to(torch.float64), error)[1].mean()
    return float((risk_coverage(confidence, error)[1].mean() - best).clamp_min(0.0))


@dataclass(frozen=True, eq=False)
class _Order:
    """Samples by falling confidence, and what is summed over those of equal confidence.

    Args:
        rows: int64 (n,), the samples in order.
        error: float64 (n,), in that order.
        group: int64 (n,) group of equal confidence, or None where there are no ties.
    """

    rows: Tensor
    error: Tensor
    group: Tensor | None

    @staticmethod
    def make(confidence: Tensor, error: Tensor) -> _Order:
        if confidence.device.type == "cpu":
            rows = torch.from_numpy(np.argsort(-confidence.numpy()))
        else:
            rows = torch.argsort(confidence, descending=True)
        ordered = confidence[rows]
        new = ordered[1:] != ordered[:-1]
        group = None if bool(new.all()) else torch.cat([new.new_zeros(1), new]).cumsum(0)
        return _Order(rows, error[rows], group)

    @cached_property
    def expected(self) -> Tensor:
        """float64 (n,): the expected error at each place."""
        if self.group is None:
            return self.error
        size = torch.bincount(self.group)
        return (self.error.new_zeros(len(size)).index_add_(0, self.group, self.error) / size)[self.group]

    def sums(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (weight, weighted errors) of every group, (G, b), and both before it, (G + 1, b)."""
        mass = weights[self.rows]
        wrong = mass * self.error[:, None]
        if self.group is not None:
            empty = mass.new_zeros((int(self.group[-1]) + 1, mass.shape[1]))
            mass, wrong = empty.index_add(0, self.group, mass), empty.index_add(0, self.group, wrong)
        return mass, wrong, cumulative(mass), cumulative(wrong)


def _share(wrong: Tensor, mass: Tensor) -> Tensor:
    return wrong / torch.where(mass > 0, mass, 1.0)


@dataclass(frozen=True, eq=False)
class _Accepted:
    """What the metrics of this module are made of: finite rows with an answer that is right or wrong."""

    sure: Tensor
    wrong: Tensor
    entered: Tensor

    @staticmethod
    def make(store: PredictionStore, context: Context) -> _Accepted:
        wrong, entered = wrong_answers(store, context.frozen)
        return _Accepted(confidence(store), wrong, entered & store.finite)

    @property
    def order(self) -> _Order:
        """The order of the entered samples; its rows count from 0 in the whole store."""
        rows = self.entered.nonzero()[:, 0]
        made = _Order.make(self.sure[rows], self.wrong[rows].to(torch.float64))
        return replace(made, rows=rows[made.rows])


@METRICS.register("aurc")
class Aurc(SmoothMetric):
    """Area under the risk-coverage curve: (1/N) sum over k of the error rate of the k surest answers.

    A group of equal confidence adds E + (b - a E / c) (H_(a+c) - H_a), with H the harmonic numbers.

    References:
        Geifman and El-Yaniv, Selective classification for deep neural networks, 2017, arXiv 1705.08500.
    """

    title = "AURC"
    direction = "lower"

    def parts(self, store: PredictionStore, context: Context) -> Mapping[str, Part]:
        accepted = _Accepted.make(store, context)
        order = accepted.order

        def statistic(weights: Tensor) -> Tensor:
            mass, wrong, before, errors = order.sums(weights)
            steps: Tensor = torch.special.digamma(before + 1).diff(dim=0)
            risks = wrong + (errors[:-1] - before[:-1] * _share(wrong, mass)) * steps
            return risks.sum(0) / before[-1]

        return {"": Part(statistic, accepted.entered)}

    def point(self, store: PredictionStore, context: Context) -> Mapping[str, float]:
        accepted = _Accepted.make(store, context)
        rows = accepted.entered
        return {"": float(risk_coverage(accepted.sure[rows], accepted.wrong[rows])[1].mean())}


@METRICS.register("augrc")
class Augrc(SmoothMetric):
    """Area under the generalised risk-coverage curve: (1/N) sum over k of (errors among the k surest answers) / N.

    It is the mean probability that an answer is accepted and wrong, and equals (1 - AUROC_f) acc (1 - acc) +
    (1 - acc)^2 / 2 + (1 - acc) / (2 N), with AUROC_f of the failures.

    References:
        Traub et al., Overcoming common flaws in the evaluation of selective classification systems, 2024, arXiv
        2407.01032.
    """

    title = "AUGRC"
    direction = "lower"

    def parts(self, store: PredictionStore, context: Context) -> Mapping[str, Part]:
        accepted = _Accepted.make(store, context)
        order = accepted.order

        def statistic(weights: Tensor) -> Tensor:
            mass, wrong, before, errors = order.sums(weights)
            return (errors[:-1] * mass + wrong * (mass + 1) / 2).sum(0) / before[-1].square()

        return {"": Part(statistic, accepted.entered)}

    def point(self, store: PredictionStore, context: Context) -> Mapping[str, float]:
        accepted = _Accepted.make(store, context)
        rows = accepted.entered
        coverage, risk = risk_coverage(accepted.sure[rows], accepted.wrong[rows])
        return {"": float((coverage * risk).mean())}


@METRICS.register("failure-auroc")
class FailureAuroc(SmoothMetric):
    """P(confidence of a right answer > confidence of a wrong one), ties counted half, with DeLong's interval.

    At exactly 0 or 1, Wilson holds for the disjoint pairs of one unit from each side.

    References:
        Hendrycks and Gimpel, A baseline for detecting misclassified and out-of-distribution examples in neural
        networks, 2017, arXiv 1610.02136.
    """

    title = "AUROC of failures"

    def parts(self, store: PredictionStore, context: Context) -> Mapping[str, Part]:
        accepted = _Accepted.make(store, context)
        right, wrong = ((accepted.entered & rows).nonzero()[:, 0] for rows in (~accepted.wrong, accepted.wrong))
        if len(right) == 0 or len(wrong) == 0:
            reason = "no_samples" if len(right) == len(wrong) else "no_correct" if len(wrong) else "no_errors"
            return {"": Part(None, accepted.entered, reason)}
        right, wrong = (rows[torch.argsort(accepted.sure[rows])] for rows in (right, wrong))
        area = rank_probability(accepted.sure[right], accepted.sure[wrong])
        return {"": Part(lambda weights: area(weights[right], weights[wrong]), accepted.entered)}

    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        accepted, confidence = _Accepted.make(store, context), context.resampler.confidence
        (part,) = self.parts(store, context).values()
        if part.statistic is None:
            return super().compute(store, context)
        rows = accepted.entered
        clusters = None if store.clusters is None else store.clusters[rows]
        made = delong(accepted.sure[rows], ~accepted.wrong[rows], clusters).estimate(confidence=confidence)
        value = MetricValue(self.name, made, self.direction)
        if made.value not in (0.0, 1.0):
            return [value]
        sides = [unit_count(store.clusters, accepted.entered & rows) for rows in (~accepted.wrong, accepted.wrong)]
        low, high = pair_bounds(made.value, sides[0], sides[1], confidence)
        return [
            replace(value, estimate=replace(made, low=low, high=high, method="wilson on disjoint pairs", reason=""))
        ]


def _coverage_at_risk(order: _Order) -> Statistic:
    """Return the statistic: the largest share k / N with 20 errors_k <= k, the last crossing; 0 where there is none."""

    def statistic(weights: Tensor) -> Tensor:
        mass, wrong, before, errors = order.sums(weights)
        spare = before - _RISK * errors  # of every error budget, in samples; at least 0 where the risk is met
        # within a group the spare changes by 1 - 20 E / c a place, so the places that meet the risk come first
        places = torch.floor(mass * spare[:-1] / (_RISK * wrong - mass).clamp_min(torch.finfo(mass.dtype).tiny))
        inside = torch.where((spare[:-1] > 0) & (places >= 1), before[:-1] + torch.minimum(places, mass), 0.0)
        reached = torch.where((spare[1:] >= 0) & (before[1:] > 0), before[1:], inside)
        return reached.amax(0) / before[-1]

    return statistic


def _risk_at_coverage(order: _Order) -> Statistic:
    """Return the statistic: the error rate of the ceil(0.8 N) surest answers."""

    def statistic(weights: Tensor) -> Tensor:
        mass, wrong, before, errors = order.sums(weights)
        count = torch.ceil(_COVERAGE[0] * before[-1] / _COVERAGE[1])
        cut = (before[1:] < count).sum(0, keepdim=True).clamp_max(len(mass) - 1)
        within = (count - before.gather(0, cut)[0]) * _share(wrong, mass).gather(0, cut)[0]
        return (errors.gather(0, cut)[0] + within) / count

    return statistic


class _OnTheCurve(Metric):
    """A point of the risk-coverage curve; the threshold is found anew in every replicate."""

    smooth = False

    def at(self, order: _Order) -> Statistic:
        """Return the statistic."""
        raise NotImplementedError

    def estimate(self, store: PredictionStore, accepted: _Accepted, context: Context) -> Estimate:
        """Return value and interval where some samples entered."""
        raise NotImplementedError

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        accepted = _Accepted.make(store, context)
        return {"": self.at(accepted.order)} if bool(accepted.entered.any()) else {}

    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        accepted = _Accepted.make(store, context)
        some = bool(accepted.entered.any())
        estimate = self.estimate(store, accepted, context) if some else Estimate.undefined("no_samples")
        return [MetricValue(self.name, estimate, self.direction)]


@METRICS.register("coverage-at-risk")
class CoverageAtRisk(_OnTheCurve):
    """Largest share of the samples whose surest answers have an error rate of at most 5 %, the last crossing.

    The interval inverts Wilson's: its ends are the last coverages at which the upper, and the lower, bound of the risk
    is at most 5 %; fewer than 73 flawless answers thus show no coverage at all, and fewer than 20 units give no
    interval. Where no coverage has that risk the value is 0, with the reason ``risk_not_met``.
    """

    title = "Coverage at 5 % risk"

    def at(self, order: _Order) -> Statistic:
        return _coverage_at_risk(order)

    def estimate(self, store: PredictionStore, accepted: _Accepted, context: Context) -> Estimate:
        order, level = accepted.order, context.resampler.confidence
        n = len(order.rows)
        clusters = None if store.clusters is None else store.clusters[order.rows]
        effective, units = effective_count(accepted.wrong[order.rows], clusters, confidence=level)
        value = float(self.at(order)(torch.ones((len(store), 1), dtype=torch.float64, device=store.ids.device))[0])
        method = "last crossings of the wilson bounds of the risk; at 5 % risk"
        if units < _FEWEST:
            return Estimate(value, math.nan, math.nan, n, units, method, "too_few_units")
        low, high = _last_below(order.expected.cumsum(0), effective / n, level)
        return Estimate(value, low, high, n, units, method, "" if value > 0 else "risk_not_met")


def _last_below(errors: Tensor, share: float, confidence: float) -> tuple[float, float]:
    """Return the last coverages at which the upper and the lower Wilson bound of the risk are at most 1 / 20.

    Args:
        errors: float64 (n,), among the first 1 ... n.
        share: Effective samples a sample.
        confidence: Coverage in (0, 1).
    """
    square = float(norm.ppf((1 + confidence) / 2)) ** 2
    count = torch.arange(1, len(errors) + 1, dtype=errors.dtype, device=errors.device)
    trials, risk = count * share, errors / count
    half = (square * (trials * risk * (1 - risk) + square / 4)).sqrt()
    centre = trials * risk + square / 2
    met = [_RISK * (centre + side * half) <= trials + square for side in (1, -1)]
    low, high = (float((count * rows).max()) / len(errors) for rows in met)
    return low, high


@METRICS.register("risk-at-coverage")
class RiskAtCoverage(_OnTheCurve):
    """Error rate of the surest 80 % of the answers: ceil(0.8 N) of them, expected over ties at the cut."""

    title = "Risk at 80 % coverage"
    direction = "lower"

    def at(self, order: _Order) -> Statistic:
        return _risk_at_coverage(order)

    def estimate(self, store: PredictionStore, accepted: _Accepted, context: Context) -> Estimate:
        order, level = accepted.order, context.resampler.confidence
        estimate = bootstrap(store, self.at(order), context.resampler, accepted.entered, bounds=(0.0, 1.0))
        if estimate.value not in (0.0, 1.0):
            return replace(estimate, method=f"{estimate.method}; at 80 % coverage")
        rows = order.rows[: -(-len(order.rows) * _COVERAGE[0] // _COVERAGE[1])]
        clusters = None if store.clusters is None else store.clusters[rows]
        effective, _ = effective_count(accepted.wrong[rows], clusters, confidence=level)
        low, high = wilson(estimate.value * effective, effective, confidence=level)
        return replace(estimate, low=low, high=high, method="wilson on the accepted; at 80 % coverage", reason="")
