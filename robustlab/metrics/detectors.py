"""Several scores and several foreign sets at once: paired differences of AUROC, and means over sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Estimate
from .stats import linear_interval, placements, spread, unit_sums
from .store import PredictionStore


@dataclass(frozen=True, eq=False)
class Areas:
    """AUROC of one score on one foreign set, as influence values of both sides.

    Args:
        area: The value.
        inside: float64 (M,) deviations of the in-distribution images, which sum to 0, over M.
        outside: float64 (P,) deviations of the foreign ones, over P.
        inside_clusters: int64 (M,) units, or None.
        outside_clusters: int64 (P,) units, or None.
    """

    area: float
    inside: Tensor
    outside: Tensor
    inside_clusters: Tensor | None
    outside_clusters: Tensor | None


def areas_of(reference: PredictionStore, foreign: PredictionStore, scorer: str) -> Areas | str:
    """Return the AUROC of a score, or why there is none: images without a score leave out no others.

    The deviations of an image without a score are 0, so that those of several scores add up image by image.

    Args:
        reference: In-distribution predictions.
        foreign: Foreign ones.
        scorer: Name of the score.
    """
    if scorer not in reference.scores or scorer not in foreign.scores:
        return "no_samples"
    sides = [store.scores[scorer] for store in (reference, foreign)]
    known = [~torch.isnan(values) for values in sides]
    if not all(bool(rows.any()) for rows in known):
        return {**reference.score_reasons, **foreign.score_reasons}.get(scorer, "no_samples")
    scores = torch.cat([values[rows].to(torch.float64) for values, rows in zip(sides, known, strict=True)])
    positive = torch.arange(len(scores), device=scores.device) >= int(known[0].sum())
    above, below = placements(scores, positive)
    area = float(above.mean()) if above.shape[1] < below.shape[1] else float(below.mean())
    made = []
    for values, rows in ((below[0], known[0]), (above[0], known[1])):
        influence = values.new_zeros(len(rows))
        influence[rows] = (values - values.mean()) / len(values)
        made.append(influence)
    return Areas(area, made[0], made[1], reference.clusters, foreign.clusters)


def mean_area(parts: Sequence[Areas], *, confidence: float = 0.95) -> Estimate:
    """Return the unweighted mean of AUROCs on several foreign sets against the same in-distribution images.

    The in-distribution images stand in every set, so their deviations are added image by image; those of the foreign
    sets are independent.
    """
    inside = torch.stack([part.inside for part in parts]).mean(0)
    value = sum(part.area for part in parts) / len(parts)
    outside = [(part.outside / len(parts), part.outside_clusters) for part in parts]
    return _estimate(
        value, (inside, parts[0].inside_clusters), outside, confidence, (0.0, 1.0), f"mean of {len(parts)}"
    )


def area_difference(first: Sequence[Areas], second: Sequence[Areas], *, confidence: float = 0.95) -> Estimate:
    """Return the AUROC of a second score less that of a first, each the mean over the same foreign sets, paired.

    Two scores that rank all pairs alike differ by exactly 0, with the interval [0, 0].
    """
    count = len(first)
    inside = torch.stack([b.inside - a.inside for a, b in zip(first, second, strict=True)]).mean(0)
    value = (sum(b.area for b in second) - sum(a.area for a in first)) / count
    outside = [((b.outside - a.outside) / count, b.outside_clusters) for a, b in zip(first, second, strict=True)]
    if value == 0 and not bool(inside.any()) and not any(bool(part.any()) for part, _ in outside):
        n = len(inside) + sum(len(part) for part, _ in outside)
        return Estimate(0.0, 0.0, 0.0, n, n, "identical ranks")
    bounds = (-math.inf, math.inf)
    return _estimate(value, (inside, first[0].inside_clusters), outside, confidence, bounds, "paired difference")


def _estimate(
    value: float,
    inside: tuple[Tensor, Tensor | None],
    outside: Sequence[tuple[Tensor, Tensor | None]],
    confidence: float,
    bounds: tuple[float, float],
    what: str,
) -> Estimate:
    sides = [inside, *outside]
    n = sum(len(values) for values, _ in sides)
    units = sum(len(values) if codes is None else len(torch.unique(codes)) for values, codes in sides)
    method = f"influence values, {what}" + ("" if all(codes is None for _, codes in sides) else ", over clusters")
    if any((len(values) if codes is None else len(torch.unique(codes))) < 2 for values, codes in sides):
        return Estimate(value, math.nan, math.nan, n, units, method, "too_few_units")
    parts = [spread(unit_sums(values, codes, torch.ones_like(values, dtype=torch.bool))) for values, codes in sides]
    variances = [error**2 for error, _ in parts]
    total = sum(variances)
    if not total > 0 or not bounds[0] < value < bounds[1]:
        return Estimate(value, math.nan, math.nan, n, units, method, "no_variance")
    freedom = total**2 / sum(part**2 / df for part, (_, df) in zip(variances, parts, strict=True))
    low, high = linear_interval(value, math.sqrt(total), freedom, confidence=confidence, bounds=bounds)
    return Estimate(value, low, high, n, units, method)
