"""Tests of paired differences, and p-values of several of them at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.stats import binom
from torch import Tensor

from robustlab.core.errors import ConfigError, RangeError, ShapeError
from robustlab.core.rng import SampleRng
from robustlab.metrics.base import Context
from robustlab.metrics.store import PredictionStore

from .bootstrap import units_of
from .compare import comparable, matched

_WORD = 32  # draws in one word of random bits
_BLOCK = 32 * _WORD  # draws a stream label; fixed, so that a draw does not depend on the number of draws
_ROWS = 1 << 12
_CHUNK = 1 << 21
_EQUAL = 1e-12  # sums of the same numbers in another order differ by rounding, and count as equal


def mcnemar(gains: int, losses: int, *, kind: Literal["mid-p", "exact"] = "mid-p") -> float:
    """Return the two-sided p-value of McNemar's test: are gains and losses equally likely?

    ``"exact"`` is 2 P(X <= min(gains, losses)) with X binomial(gains + losses, 1/2), at most 1; ``"mid-p"`` takes
    P(X = min) off it. For independent samples; with clusters use ``sign_flip_test``.

    Args:
        gains: Samples that only the second model answers right, at least 0.
        losses: Samples that only the first one answers right, at least 0.
        kind: The exact test never errs more often than it says; mid-p has more power and errs about as often.

    Raises:
        RangeError: A count is negative.

    References:
        McNemar, Note on the sampling error of the difference between correlated proportions or percentages, 1947;
        Fagerland, Lydersen and Laake, The McNemar test for binary matched-pairs data, 2013.
    """
    if gains < 0 or losses < 0:
        raise RangeError("mcnemar", "counts of at least 0", f"{gains} and {losses}", "Pass the discordant counts.")
    least, total = min(gains, losses), gains + losses
    if total == 0:
        return 1.0
    p = 2 * float(binom.cdf(least, total, 0.5))
    return min(1.0, p if kind == "exact" else p - float(binom.pmf(least, total, 0.5)))


@dataclass(frozen=True)
class SignFlipTest:
    """What ``sign_flip_test`` found for each of K differences.

    Args:
        p: Two-sided p-values.
        adjusted: p-values that allow for all K together.
        n_units: Units whose signs were drawn.
        draws: Number of draws.
    """

    p: tuple[float, ...]
    adjusted: tuple[float, ...]
    n_units: int
    draws: int


def sign_flip_test(gains: Tensor, units: Tensor, *, seed: int = 0, draws: int = 10_000) -> SignFlipTest:
    """Test whether the means of K paired differences are 0, by flipping the signs of whole units.

    p = (1 + draws at least as extreme) / (1 + draws). The adjusted ones are step-down max-T: each draw flips the units
    of all K differences together, so what hangs together between them is kept, and |sum| / root of the sum of squares
    is compared with the largest one of the differences that are not more extreme. Draws depend on (seed, draw, unit)
    alone. Differences of 0 throughout have p = 1.

    Args:
        gains: float (N,) or (N, K), the second minus the first, of a metric that is a mean over samples.
        units: int64 (N,) codes of the independent units, such as ``units_of(store)``.
        seed: Seed of the draws.
        draws: Number of draws, at least 1.

    Raises:
        ShapeError: Rows and units do not match.
        RangeError: A difference is not finite, or there is no draw.

    References:
        Westfall and Young, Resampling-based multiple testing, 1993.
    """
    gains = gains[:, None] if gains.ndim == 1 else gains
    _check_draws("sign_flip_test", draws)
    if len(gains) != len(units):
        raise ShapeError("sign_flip_test", f"{len(gains)} units", f"{len(units)}", "Give the unit of every row.")
    if not bool(torch.isfinite(gains).all()):
        raise RangeError("sign_flip_test", "finite differences", "NaN or infinity", "Leave out undefined samples.")
    codes, inverse = torch.unique(units, return_inverse=True)
    sums = gains.new_zeros((len(codes), gains.shape[1]), dtype=torch.float64)
    sums.index_add_(0, inverse, gains.to(torch.float64))
    scale = sums.square().sum(0).sqrt()
    sums = torch.where(scale > 0, sums / scale, 0.0)
    seen = sums.sum(0).abs()
    tolerance = _EQUAL * sums.abs().sum(0)
    order = torch.argsort(seen, descending=True, stable=True)
    hits, joint = torch.zeros_like(seen), torch.zeros_like(seen)
    rng = SampleRng.make(seed, "sign flip", codes)
    for first in range(0, draws, _BLOCK):
        drawn = _flipped_sums(rng, sums, first, min(_BLOCK, draws - first)).abs()
        hits += (drawn >= seen - tolerance).sum(0)
        # the largest of each difference and all less extreme ones
        largest = drawn[:, order].flip(1).cummax(1).values.flip(1)
        joint[order] += (largest >= (seen - tolerance)[order]).sum(0)
    p, raw = ((1 + count) / (1 + draws) for count in (hits, joint))
    adjusted = torch.empty_like(raw)
    adjusted[order] = raw[order].cummax(0).values
    return SignFlipTest(tuple(p.tolist()), tuple(adjusted.tolist()), len(codes), draws)


def _check_draws(who: str, draws: int) -> None:
    if draws < 1:
        raise RangeError(who, "at least 1 draw", f"{draws}", "The usual number is 10,000.")


def _flipped_sums(rng: SampleRng, sums: Tensor, first: int, count: int) -> Tensor:
    """Return float64 (count, K): the totals of unit sums (U, K) under draws ``first`` and on, a block at most."""
    out = sums.new_zeros((count, sums.shape[1]))
    for start in range(0, len(sums), _ROWS):
        rows = slice(start, start + _ROWS)
        flips = torch.cat(list(_flips(SampleRng(rng.keys[rows]), first, count)), 1).to(torch.float64)
        out += (1 - 2 * flips).T @ sums[rows]
    return out


def _flips(rng: SampleRng, first: int, count: int) -> Iterator[Tensor]:
    """Yield bool (U, up to 32), which units are flipped in each draw, from ``first`` on, a block at most."""
    words = rng.bits(f"block {first}", -(-count // _WORD))
    places = torch.arange(_WORD, dtype=torch.int32, device=words.device)
    for index in range(words.shape[1]):
        bits = (words[:, index, None] >> places) & 1
        yield bits[:, : count - index * _WORD].to(torch.bool)


def permutation_test(
    a: PredictionStore,
    b: PredictionStore,
    metric: str,
    context: Context,
    *,
    target: str = "",
    seed: int = 0,
    draws: int = 10_000,
) -> float:
    """Return the two-sided p-value of a metric's difference, by swapping the two models' answers to whole units.

    p = (1 + draws at least as extreme) / (1 + draws); NaN where the metric is undefined. Draws in which a side is
    undefined count as extreme. Both models have the operating points of the one context. Metrics that leave out rows
    which are not finite are compared on the rows that are finite on both sides.

    Args:
        a: Predictions of one model.
        b: Predictions of the other one; samples are matched by id.
        metric: Registered name of a metric on labels.
        context: Operating points.
        target: Class or label, for metrics that have one value each.
        seed: Seed of the draws, which depend on (seed, draw, unit) alone.
        draws: Number of draws, at least 1.

    Raises:
        ConfigError: The ids differ or repeat, or the metric cannot be compared, or depends on the number of samples.
        LabelError: The two hold different labels for the same ids.
        RangeError: There is no draw.
    """
    _check_draws("permutation_test", draws)
    item = comparable(metric)
    b = matched(a, b)
    if (a.answers_only or b.answers_only) and not item.from_answers:
        return math.nan
    both = a.finite & b.finite
    if not item.keeps_broken and not bool(both.all()):
        a, b = a.select(both), b.select(both)
    codes, inverse = torch.unique(units_of(a), return_inverse=True)
    statistic = item.statistics(_together(a, b, inverse), context).get(target)
    if statistic is None:
        return math.nan
    own = torch.arange(2, device=a.ids.device).repeat_interleave(len(a)) == 0
    inside = statistic(torch.stack([own, ~own], 1).to(torch.float64)).tolist()
    alone = [item.point(store, context).get(target, math.nan) for store in (a, b)]
    if not all(
        math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-6)
        for x, y in zip(inside, alone, strict=True)
        if not math.isnan(x) and not math.isnan(y)
    ):
        raise ConfigError(
            "permutation_test",
            "a metric that depends on the weights of samples alone",
            f"{metric!r}, which also depends on their number or on bins that they decide",
            "Use compare_metric.",
        )

    def difference(flips: Tensor) -> Tensor:
        own = (~flips).to(torch.float64)
        swapped = 1 - own
        return statistic(torch.cat([swapped, own])) - statistic(torch.cat([own, swapped]))

    seen = abs(float(difference(torch.zeros((len(a), 1), dtype=torch.bool, device=a.ids.device))[0]))
    if math.isnan(seen):
        return math.nan
    rng, hits = SampleRng.make(seed, "sign flip", codes), 0
    width = min(_WORD, max(1, _CHUNK // max(len(a), 1)))
    for first in range(0, draws, _BLOCK):
        for flips in _flips(rng, first, min(_BLOCK, draws - first)):
            rows = flips[inverse]
            for start in range(0, rows.shape[1], width):
                drawn = difference(rows[:, start : start + width]).abs()
                hits += int((~(drawn < seen - _EQUAL)).sum())
    return (1 + hits) / (1 + draws)


def _together(a: PredictionStore, b: PredictionStore, units: Tensor) -> PredictionStore:
    """Return the rows of both as one store, in which each unit exists twice."""
    if a.logits.shape != b.logits.shape:
        raise ConfigError(
            "permutation_test",
            "two models with the same classes",
            f"{a.num_classes} and {b.num_classes}",
            "Map the answers to common classes first.",
        )
    labels = None if a.labels is None or b.labels is None else torch.cat([a.labels, b.labels])
    return PredictionStore(
        ids=torch.cat([a.ids, b.ids]),
        logits=torch.cat([a.logits, b.logits]),
        labels=labels,
        task=a.task,
        scores={name: torch.cat([a.scores[name], b.scores[name]]) for name in a.scores if name in b.scores},
        clusters=None if a.clusters is None else torch.cat([units, units + len(units)]),
        pseudonyms=a.pseudonyms,
        answers_only=a.answers_only or b.answers_only,
    )


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted for all of one family: max over j <= i of min(1, (m - j + 1) p_(j)), ascending.

    Undefined ones (NaN) stay so, but count in the family.

    Args:
        p: p-values in [0, 1].

    Raises:
        RangeError: One lies outside.

    References:
        Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    if any(not (math.isnan(value) or 0 <= value <= 1) for value in p):
        raise RangeError("holm", "p-values from 0 to 1", f"{list(p)}", "Pass p-values, not statistics.")
    out, reached = [math.nan] * len(p), 0.0
    defined = [index for index, value in enumerate(p) if not math.isnan(value)]
    for rank, index in enumerate(sorted(defined, key=lambda index: p[index])):
        reached = max(reached, min(1.0, (len(p) - rank) * p[index]))
        out[index] = reached
    return out
