"""Proportions: score intervals, effective counts of clustered samples, and the worst of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import beta, norm, t
from torch import Tensor

from robustlab.core.errors import ConfigError
from robustlab.metrics.base import Direction, Estimate

FEW_CLUSTERS = 30


def wilson(successes: float, n: float, *, confidence: float = 0.95, alpha_divisor: float = 1.0) -> tuple[float, float]:
    """Return the score interval of a proportion.

    Args:
        successes: Count in [0, n]; real-valued for effective counts.
        n: Trials, at least 0; real-valued for effective counts.
        confidence: Coverage in (0, 1).
        alpha_divisor: The error probability is divided by it (Bonferroni).

    Returns:
        Lower and upper end in [0, 1]; NaN when n is 0.

    References:
        Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    if not n > 0:
        return math.nan, math.nan
    z = float(norm.ppf(1 - (1 - confidence) / (2 * alpha_divisor)))
    centre = (successes + z * z / 2) / (n + z * z)
    half = z * math.sqrt(max(successes * (n - successes) / n, 0.0) + z * z / 4) / (n + z * z)
    # rounding must not lift the ends off 0 and 1
    low = 0.0 if successes <= 0 else max(0.0, centre - half)
    return low, 1.0 if successes >= n else min(1.0, centre + half)


def clopper_pearson(successes: float, n: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a proportion, which covers at least as often as it says; arguments as in ``wilson``.

    References:
        Clopper and Pearson, The use of confidence or fiducial limits illustrated in the case of the binomial, 1934.
    """
    if not n > 0:
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    low = 0.0 if successes <= 0 else float(beta.ppf(tail, successes, n - successes + 1))
    return low, 1.0 if successes >= n else float(beta.isf(tail, successes + 1, n - successes))


def jeffreys(successes: float, n: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the equal-tailed Jeffreys interval of a proportion, 0 and 1 at the ends; arguments as in ``wilson``.

    For far tails, such as corrected ones: Wilson's upper end of a share of .95 of 60 errs 3.4 times as often as it says
    at a level of .025 / 30, this one .9 times.

    References:
        Brown, Cai and DasGupta, Interval estimation for a binomial proportion, 2001.
    """
    if not n > 0:
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    low = 0.0 if successes <= 0 else float(beta.ppf(tail, successes + 0.5, n - successes + 0.5))
    return low, 1.0 if successes >= n else float(beta.isf(tail, successes + 0.5, n - successes + 0.5))


def mover(parts: Sequence[Estimate], *, bounds: tuple[float, float] = (-1.0, 1.0)) -> tuple[float, float]:
    """Return the interval of a mean of independent quantities from their own intervals.

    Args:
        parts: Their estimates, each with an interval.
        bounds: Valid range of the mean.

    References:
        Zou and Donner, Construction of confidence limits about effect measures: a general approach, 2008.
    """
    value = sum(part.value for part in parts) / len(parts)
    down = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / len(parts)
    up = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / len(parts)
    return max(bounds[0], value - down), min(bounds[1], value + up)


def unit_count(clusters: Tensor | None, rows: Tensor) -> int:
    """Return how many independent units the rows (bool (N,)) hold: clusters, or samples without clusters."""
    return int(rows.sum()) if clusters is None else len(torch.unique(clusters[rows]))


def effective_count(hits: Tensor, clusters: Tensor | None, *, confidence: float = 0.95) -> tuple[float, int]:
    """Return (effective n, units) of a proportion: n over the design effect, which is at least 1.

    The design effect is the cluster-robust variance G / (G - 1) sum_g (sum_{i in g} (v_i - v))^2 / n^2 over the
    binomial one. Fewer than 30 clusters shrink n by (z / t)^2. Where no variance can be seen (share 0 or 1, or one
    cluster) the effective n is the number of clusters.

    Args:
        hits: bool or float (n,), 1 for success.
        clusters: int64 (n,) codes, or None for independent samples.
        confidence: Coverage of the interval to be made, in (0, 1).

    References:
        Korn and Graubard, Confidence intervals for proportions with small expected number of positive counts
        estimated from survey data, 1998.
    """
    n = len(hits)
    if clusters is None or n == 0:
        return float(n), n
    values = hits.to(torch.float64)
    codes, inverse = torch.unique(clusters, return_inverse=True)
    units = len(codes)
    share = float(values.mean())
    if units == 1 or not 0 < share < 1:
        return float(units), units
    sums = values.new_zeros(units).index_add_(0, inverse, values - share)
    variance = units / (units - 1) * float((sums * sums).sum()) / n**2
    binomial = share * (1 - share)
    count = min(float(n), binomial / variance) if variance > binomial / n else float(n)
    if units < FEW_CLUSTERS:
        tail = (1 + confidence) / 2
        count *= float(norm.ppf(tail) / t.ppf(tail, units - 1)) ** 2
    return count, units


def proportion(
    hits: Tensor, clusters: Tensor | None, *, confidence: float = 0.95, samples: int | None = None, note: str = ""
) -> Estimate:
    """Return the share of hits with a Wilson interval, at the effective n where samples are clustered.

    Args:
        hits: bool (n,).
        clusters: int64 (n,) codes of the unit, or None for independent samples.
        confidence: Coverage in (0, 1).
        samples: Samples that entered, where they are not the hits themselves (several decisions a sample).
        note: Added to the method text.
    """
    count = len(hits) if samples is None else samples
    if len(hits) == 0:
        return Estimate.undefined("no_samples")
    effective, units = effective_count(hits, clusters, confidence=confidence)
    share = float(hits.to(torch.float64).mean())
    low, high = wilson(share * effective, effective, confidence=confidence)
    method = "wilson" if clusters is None else "wilson at effective n = n / design effect"
    return Estimate(share, low, high, count, units, f"{method}{note}", effective_n=effective)


@dataclass(frozen=True)
class Proportion:
    """A proportion of one condition.

    Args:
        key: Name of the condition.
        successes: Counted events, in units of ``effective_n``.
        effective_n: Trials, or effective trials of clustered samples.
    """

    key: str
    successes: float
    effective_n: float


def worst_of(
    conditions: Sequence[Proportion], *, direction: Direction, confidence: float = 0.95
) -> tuple[str, Estimate]:
    """Return the condition with the worst proportion and an interval that allows for its having been picked.

    All K intervals hold at once with the stated confidence (Jeffreys at alpha / K; Wilson for one condition), hence
    also the picked one. Undefined conditions (NaN, or no trials) are passed over but count in K. Where the predictions
    are at hand ``worst_condition`` is narrower.

    Args:
        conditions: At least one proportion; the first one wins a tie.
        direction: ``"higher"`` or ``"lower"`` is better.
        confidence: Simultaneous coverage in (0, 1).

    Raises:
        ConfigError: No condition, or no direction.
    """
    if not conditions or direction == "none":
        raise ConfigError(
            "worst_of",
            "at least one condition, and a direction 'higher' or 'lower'",
            f"{len(conditions)} conditions, direction {direction!r}",
            "Pass the conditions of one metric.",
        )
    defined = [item for item in conditions if item.effective_n > 0 and not math.isnan(item.successes)]
    if not defined:
        return conditions[0].key, Estimate.undefined("no_samples")
    pick = min if direction == "higher" else max
    worst = pick(defined, key=lambda item: item.successes / item.effective_n)
    count = len(conditions)
    ends, name = (wilson, "wilson") if count == 1 else (jeffreys, "jeffreys")
    low, high = ends(worst.successes, worst.effective_n, confidence=1 - (1 - confidence) / count)
    units = round(worst.effective_n)
    method = f"{name}, Bonferroni over {count} conditions"
    return worst.key, Estimate(
        worst.successes / worst.effective_n, low, high, units, units, method, effective_n=worst.effective_n
    )
