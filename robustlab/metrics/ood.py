"""Out-of-distribution detection: AUROC and FPR95 of every score, clean in-distribution against OOD predictions."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustlab.core.errors import ConfigError
from robustlab.core.registry import METRICS

from .base import Context, Estimate, Metric, MetricValue
from .classification import pair_bounds
from .stats import Resampler, cumulative, interval, rank_probability, unit_count, units_of, wilson
from .store import PredictionStore

PairStatistic = Callable[[Tensor, Tensor], Tensor]


def false_positive_rate(kept: Tensor, accused: Tensor) -> PairStatistic:
    """Return the statistic: share of ``accused`` at or above the highest observed score that catches 95 % of ``kept``.

    The threshold is the largest score of the kept class, in each replicate anew, that at least 95 % of its weight
    reaches; equal scores are flagged together. Counts are compared as integers.

    Args:
        kept: float64 (P,) scores of the class to be caught, larger is more so; ascending.
        accused: float64 (M,) scores of the other class, ascending.

    Returns:
        A function of weights (P, b) and (M, b) that returns (b,); NaN where a side has no weight.
    """
    kept = kept.flip(0)
    # for each possible threshold, how many of the other class lie strictly below
    below = torch.searchsorted(accused, kept)

    def statistic(kept_weights: Tensor, accused_weights: Tensor) -> Tensor:
        caught = kept_weights.flip(0).cumsum(0)
        first = (20 * caught < 19 * caught[-1]).sum(0)
        mass = cumulative(accused_weights)
        missed = mass.gather(0, below[first][None])[0]
        rate = (mass[-1] - missed) / mass[-1]
        return torch.where(caught[-1] > 0, rate, math.nan)

    return statistic


class _Separation(Metric):
    """How well the scores of a store tell it from the clean reference; ID and OOD units are resampled separately."""

    on = "ood"
    from_answers = True  # a score without logits brings its own reason
    counts: ClassVar[Literal["pairs", "id", "ood"]]

    @abstractmethod
    def statistic(self, inside: Tensor, outside: Tensor) -> PairStatistic:
        """Return the statistic of ascending ID and OOD scores, as a function of ID and OOD weights."""

    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        if context.reference is None:
            raise ConfigError(
                self.name, "a context with a reference", "none", "Pass the clean in-distribution predictions."
            )
        values = []
        for scorer in store.scores:
            if scorer in context.reference.scores:
                estimate = self._estimate(context.reference, store, scorer, context.resampler)
                values.append(MetricValue(self.name, estimate, self.direction, scorer=scorer))
        return values

    def _estimate(
        self, reference: PredictionStore, store: PredictionStore, scorer: str, resampler: Resampler
    ) -> Estimate:
        inside, outside = (side.scores[scorer].to(torch.float64) for side in (reference, store))
        known = [~torch.isnan(side) for side in (inside, outside)]
        n = int(known[0].sum()) + int(known[1].sum())
        units = (unit_count(reference.clusters, known[0]), unit_count(store.clusters, known[1]))
        if 0 in units:
            reasons = {**reference.score_reasons, **store.score_reasons}
            return Estimate.undefined(reasons.get(scorer, "no_samples"), n=n, n_units=sum(units))
        rows = [
            torch.argsort(torch.where(mask, side, math.nan), stable=True)[: int(mask.sum())]
            for side, mask in zip((inside, outside), known, strict=True)
        ]
        statistic = self.statistic(inside[rows[0]], outside[rows[1]])
        ones = [inside.new_ones((len(index), 1)) for index in rows]
        point = float(statistic(ones[0], ones[1])[0])
        if point in (0.0, 1.0):
            low, high, method = self._edge(point, units, resampler.confidence)
            return Estimate(point, low, high, n, sum(units), method)
        method = f"bootstrap over ID and OOD units apart, B={resampler.replicates}"
        if min(units) < 2:
            return Estimate(point, math.nan, math.nan, n, sum(units), method, "too_few_units")
        low, high, reason = interval(
            _replicates(statistic, (reference, store), rows, resampler), point, confidence=resampler.confidence
        )
        return Estimate(point, low, high, n, sum(units), method, reason)

    def _edge(self, point: float, units: tuple[int, int], confidence: float) -> tuple[float, float, str]:
        """Return the interval of an estimate at 0 or 1, where replicates do not vary."""
        if self.counts == "pairs":
            low, high = pair_bounds(point, units[0], units[1], confidence)
            return low, high, "wilson on disjoint pairs"
        count = units[0] if self.counts == "id" else units[1]
        low, high = wilson(point * count, count, confidence=confidence)
        return low, high, f"wilson on {self.counts.upper()} units"


def _replicates(
    statistic: PairStatistic, sides: tuple[PredictionStore, PredictionStore], rows: list[Tensor], resampler: Resampler
) -> Tensor:
    """Return (B,) values; ``rows`` brings each side into the statistic's order."""
    return resampler.values(
        lambda inside, outside: statistic(inside[rows[0]], outside[rows[1]]), *(units_of(side) for side in sides)
    )


@METRICS.register("auroc-ood")
class OodAuroc(_Separation):
    """P(score of OOD > score of ID), ties counted half; the same for either orientation."""

    title = "OOD AUROC"
    counts = "pairs"

    def statistic(self, inside: Tensor, outside: Tensor) -> PairStatistic:
        area = rank_probability(outside, inside)
        return lambda inside_weights, outside_weights: area(outside_weights, inside_weights)


@METRICS.register("fpr95-ood-pos")
class Fpr95OodPositive(_Separation):
    """Share of ID flagged when 95 % of OOD are caught (OOD is the positive class)."""

    title = "FPR95 (OOD positive)"
    direction = "lower"
    counts = "id"

    def statistic(self, inside: Tensor, outside: Tensor) -> PairStatistic:
        rate = false_positive_rate(outside, inside)
        return lambda inside_weights, outside_weights: rate(outside_weights, inside_weights)


@METRICS.register("fpr95-id-pos")
class Fpr95IdPositive(_Separation):
    """Share of OOD accepted when 95 % of ID are accepted (ID is the positive class)."""

    title = "FPR95 (ID positive)"
    direction = "lower"
    counts = "ood"

    def statistic(self, inside: Tensor, outside: Tensor) -> PairStatistic:
        rate = false_positive_rate(-inside.flip(0), -outside.flip(0))
        return lambda inside_weights, outside_weights: rate(inside_weights.flip(0), outside_weights.flip(0))
