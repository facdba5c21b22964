"""Two independent sides of scores, and the intervals of what separates them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.stats import norm, t
from torch import Tensor

from .stats import cumulative, effective_count, linear_interval, rank_probability, spread, unit_sums, wilson

PairStatistic = Callable[[Tensor, Tensor], Tensor]
"""Maps float64 weights (M, b) of the negative and (P, b) of the positive side to values (b,)."""
Ends = tuple[float, float, str, str]
"""Low, high, method, reason."""

_TARGET = 19, 20  # share of the positives to be caught, as integers, so that counts are compared exactly
_LEAST_RATE = 0.3  # where the window that the slope of the ROC curve is read from may begin


@dataclass(frozen=True, eq=False)
class Side:
    """Scores of one side, those that are not NaN.

    Args:
        scores: float (n,), infinities allowed.
        clusters: int64 (n,) codes of the unit, or None for independent samples.
        units: Independent units.
    """

    scores: Tensor
    clusters: Tensor | None
    units: int

    @cached_property
    def ordered(self) -> Tensor:
        """The scores, ascending."""
        if self.scores.device.type == "cpu":
            return torch.from_numpy(np.sort(self.scores.numpy()))
        return torch.sort(self.scores).values

    @cached_property
    def rows(self) -> Tensor:
        """int64 (n,), the rows in the order of ``ordered``, up to equal scores."""
        return torch.argsort(self.scores)

    def threshold(self, count: int) -> Tensor:
        """Return the highest score that at least ``count`` of the scores reach."""
        rank = len(self.scores) - count
        if "ordered" not in self.__dict__ and self.scores.device.type == "cpu":
            return torch.from_numpy(np.partition(self.scores.numpy(), rank))[rank]
        return self.ordered[rank]

    @cached_property
    def turned(self) -> Side:
        """The negated scores."""
        return Side(-self.scores, self.clusters, self.units)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two sides; scores of the positive one should be larger."""

    negative: Side
    positive: Side

    @cached_property
    def below(self) -> Tensor:
        """int64 (P,): how many negatives lie strictly below each positive, in ascending order."""
        return torch.searchsorted(self.negative.ordered, self.positive.ordered)

    @cached_property
    def first(self) -> Tensor:
        """int64 (P,): how many positives lie strictly below each positive, in ascending order."""
        scores = self.positive.ordered
        index = torch.arange(len(scores), device=scores.device)
        index[1:] *= scores[1:] != scores[:-1]
        return index.cummax(0).values

    def rank_probability(self) -> float:
        """Return P(positive > negative) + P(equal) / 2, from whole numbers."""
        negatives, positives = self.negative.ordered, self.positive.ordered
        tied = negatives[self.below.clamp_max(len(negatives) - 1)] == positives
        tied &= self.below < len(negatives)
        through = torch.searchsorted(negatives, positives[tied], right=True)
        wins = 2 * int(self.below.sum()) + int((through - self.below[tied]).sum())
        return wins / (2 * len(negatives) * len(positives))

    @cached_property
    def turned(self) -> Pair:
        """The same with the other side as the positive one."""
        return Pair(self.positive.turned, self.negative.turned)


def average_precision(pair: Pair) -> PairStatistic:
    """Return the statistic: mean over positives of the precision at their score, equal scores entering together.

    This is the step-wise sum of (R_k - R_(k-1)) P_k over distinct thresholds, not the trapezoid.
    """
    below, first = pair.below, pair.first

    def statistic(negative: Tensor, positive: Tensor) -> Tensor:
        weights = positive[pair.positive.rows]
        caught, accused = cumulative(weights), cumulative(negative[pair.negative.rows])
        hits, alarms = caught[-1] - caught[first], accused[-1] - accused[below]
        return (weights * hits / (hits + alarms)).sum(0) / caught[-1]

    return statistic


def accepted_first(pair: Pair, right: Tensor) -> PairStatistic:
    """Return the statistic: P(right and negative < positive) + P(right and equal) / 2, over all negatives."""
    area = rank_probability(pair.positive.ordered, pair.negative.ordered)
    weight = right.to(torch.float64)[:, None]

    def statistic(negative: Tensor, positive: Tensor) -> Tensor:
        answered = negative * weight
        ranked = area(positive[pair.positive.rows], answered[pair.negative.rows])
        return ranked * answered.sum(0) / negative.sum(0)

    return statistic


def linear_ends(pair: Pair, statistic: PairStatistic, confidence: float) -> Ends:
    """Return the interval of a smooth statistic between 0 and 1 of two independent sides, each clustered or not.

    The variances of the influence values of both sides add up (for AUROC this is DeLong's, or Obuchowski's with
    clusters), with Welch's degrees of freedom, on the logit scale.

    References:
        DeLong et al., Comparing the areas under two or more correlated receiver operating characteristic curves, 1988;
        Obuchowski, Nonparametric analysis of clustered ROC curve data, 1997.
    """
    sides = (pair.negative, pair.positive)
    with torch.enable_grad():
        weights = [
            torch.ones((len(side.scores), 1), dtype=torch.float64, device=side.scores.device, requires_grad=True)
            for side in sides
        ]
        value = statistic(weights[0], weights[1])[0]
        changes = torch.autograd.grad(value, weights)
    kinds = ["samples" if side.clusters is None else "clusters" for side in sides]
    names = kinds[0] if kinds[0] == kinds[1] else "samples and clusters"
    method = f"influence values over ID and OOD {names} apart"
    if min(side.units for side in sides) < 2:
        return math.nan, math.nan, method, "too_few_units"
    parts = [
        spread(unit_sums(change[:, 0], side.clusters, torch.ones_like(side.scores, dtype=torch.bool)))
        for change, side in zip(changes, sides, strict=True)
    ]
    variances = [error**2 for error, _ in parts]
    total, point = sum(variances), float(value.detach())
    if total == 0 or not 0 < point < 1:
        return math.nan, math.nan, method, "no_variance"
    freedom = total**2 / sum(part**2 / df for part, (_, df) in zip(variances, parts, strict=True))
    low, high = linear_interval(point, math.sqrt(total), freedom, confidence=confidence, bounds=(0.0, 1.0))
    return low, high, method, ""


def rate_above(side: Side, threshold: Tensor, confidence: float) -> tuple[float, float]:
    """Return the share of a side at or above a threshold, and its effective n."""
    hits = side.scores >= threshold
    return float(hits.to(torch.float64).mean()), effective_count(hits, side.clusters, confidence=confidence)[0]


def most_favourable(pair: Pair) -> int:
    """Return how many positives have to be caught: the smallest number that is at least 95 %, compared as integers."""
    return -(-len(pair.positive.scores) * _TARGET[0] // _TARGET[1])


def false_positive_ends(pair: Pair, value: float, confidence: float) -> Ends:
    """Return the interval of the share of negatives flagged when 95 % of the positives are caught.

    It allows for the threshold being estimated: on the probit scale, where the ROC curve is nearly straight, it adds
    the binomial variances of both sides, the positives' times the squared slope of the curve about 95 %, and is centred
    where the curve passes 95 % (the k-th of P positives stands for k / (P + 1)), which the value need not be. At 0 and
    1 it is no shorter than Wilson's for the rate alone.

    References:
        Greenhouse and Mantel, The evaluation of diagnostic tests, 1950; Hsieh and Turnbull, Nonparametric and
        semiparametric estimation of the receiver operating characteristic curve, 1996.
    """
    kinds = {"samples" if side.clusters is None else "clusters" for side in (pair.negative, pair.positive)}
    method = f"probit interval for rate and threshold over {' and '.join(sorted(kinds))}"
    if min(pair.negative.units, pair.positive.units) < 2:
        return math.nan, math.nan, method, "too_few_units"
    count, total = len(pair.positive.scores), len(pair.negative.scores)
    target = _TARGET[0] / _TARGET[1]
    caught = most_favourable(pair)
    line = pair.positive.ordered[count - caught]
    rate, effective = rate_above(pair.negative, line, confidence)
    _, kept = rate_above(pair.positive, line, confidence)
    noise = math.sqrt(target * (1 - target) / kept)
    start = min(count - 1, max(1, round(max(_LEAST_RATE, target - 3 * noise) * (count + 1))))
    stop = min(count, max(start + 1, round((target + 3 * noise) * (count + 1))))

    def place(index: int) -> tuple[float, float]:
        alarms = int((pair.negative.scores >= pair.positive.ordered[count - index]).sum())
        return float(norm.ppf(index / (count + 1))), float(norm.ppf((alarms + 0.5) / (total + 1)))

    (x0, y0), (x, y), (x1, y1) = (place(index) for index in (start, caught, stop))
    slope = max(0.0, (y1 - y0) / (x1 - x0))
    aim = float(norm.ppf(target))
    centre = y + slope * (aim - x)
    share = float(norm.cdf(centre))
    variance = share * (1 - share) / effective / float(norm.pdf(centre)) ** 2
    variance += (slope * noise / float(norm.pdf(aim))) ** 2
    # few clusters are allowed for by the effective count
    freedom = pair.positive.units - 1 if pair.positive.clusters is None else math.inf
    half = float(t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(variance)
    low, high = float(norm.cdf(centre - half)), float(norm.cdf(centre + half))
    if value in (0.0, 1.0):
        ends = wilson(rate * effective, effective, confidence=confidence)
        low, high = min(low, ends[0]), max(high, ends[1])
    return low, high, method, ""
