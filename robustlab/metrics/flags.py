"""Flagging at a threshold that was chosen on validation data: what is detected, what is a false alarm, and failures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from robustlab.core.registry import METRICS

from .base import Context, Estimate, Metric, MetricValue
from .classification import pair_bounds
from .selective import wrong_answers
from .stats import delong, unit_count
from .stats.proportions import proportion
from .store import PredictionStore

FALSE_ALARMS = 1, 20  # share of the validation images that may be flagged, as integers


def fit_flags(store: PredictionStore) -> dict[str, float]:
    """Return, for every score, the lowest threshold at or above which at most 5 % of the validation images lie.

    Equal scores are flagged together, and only where all of them fit, so that the share is never exceeded. NaN scores
    do not count. Infinity, at which nothing is flagged, where there are fewer than 20 images or all scores are equal.

    Args:
        store: Clean validation predictions; labels are not needed.
    """
    found = {}
    for name, scores in store.scores.items():
        known = scores[~torch.isnan(scores)]
        if len(known):
            allowed = len(known) * FALSE_ALARMS[0] // FALSE_ALARMS[1]
            ordered = torch.sort(known, descending=True).values
            # the first that may not be flagged; all above it are
            above = known[known > ordered[allowed]]
            found[name] = float(above.min()) if len(above) else math.inf
    return found


class _Flagged(Metric):
    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        found = []
        for scorer, scores in store.scores.items():
            known = ~torch.isnan(scores) & store.finite
            if scorer not in context.frozen.flags or not bool(known.any()):
                reason = store.score_reasons.get(scorer, "no_samples" if context.frozen.flags else "no_val")
                found.append(MetricValue(self.name, Estimate.undefined(reason), self.direction, scorer=scorer))
                continue
            line = context.frozen.flags[scorer]
            clusters = None if store.clusters is None else store.clusters[known]
            note = f"; score {line:.4g} on val"
            made = proportion(scores[known] >= line, clusters, confidence=context.resampler.confidence, note=note)
            found.append(MetricValue(self.name, made, self.direction, scorer=scorer))
        return found

    def point(self, store: PredictionStore, context: Context) -> Mapping[str, float]:
        return {
            scorer: float((scores[known] >= context.frozen.flags[scorer]).double().mean())
            for scorer, scores in store.scores.items()
            if scorer in context.frozen.flags and bool((known := ~torch.isnan(scores) & store.finite).any())
        }


@METRICS.register("detected")
class Detected(_Flagged):
    """Share of foreign images that a score flags, at the threshold that flags at most 5 % of the validation images."""

    on = "ood"
    from_answers = True  # a score without logits brings its own reason
    title = "Detected at 5 % false alarms"


@METRICS.register("false-alarms")
class FalseAlarms(_Flagged):
    """Share of the evaluated images that a score flags as foreign, at that threshold: 5 % or less where nothing moved.

    Under a shift the same number tells how many images of the right kind would be turned away.
    """

    title = "False alarms"
    direction = "lower"


@METRICS.register("score-failure-auroc")
class ScoreFailureAuroc(Metric):
    """P(score of a wrong answer > score of a right one), ties counted half: does a score also find mistakes?

    With DeLong's interval; at exactly 0 or 1 Wilson holds for the disjoint pairs of one unit from each side.
    """

    title = "AUROC of a score for failures"

    def _sides(self, store: PredictionStore, context: Context) -> Iterator[tuple[str, Tensor, Tensor]]:
        wrong, entered = wrong_answers(store, context.frozen)
        for scorer, scores in store.scores.items():
            yield scorer, wrong, entered & ~torch.isnan(scores) & store.finite

    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        found = []
        confidence = context.resampler.confidence
        for scorer, wrong, rows in self._sides(store, context):
            sides = [unit_count(store.clusters, rows & side) for side in (wrong, ~wrong)]
            if 0 in sides:
                reason = store.score_reasons.get(scorer, "no_errors" if sides[0] == 0 else "no_correct")
                found.append(MetricValue(self.name, Estimate.undefined(reason), self.direction, scorer=scorer))
                continue
            clusters = None if store.clusters is None else store.clusters[rows]
            scores = store.scores[scorer][rows].to(torch.float64)
            made = delong(scores, wrong[rows], clusters).estimate(confidence=confidence)
            if made.value in (0.0, 1.0):
                low, high = pair_bounds(made.value, sides[1], sides[0], confidence)
                made = Estimate(made.value, low, high, made.n, made.n_units, "wilson on disjoint pairs")
            found.append(MetricValue(self.name, made, self.direction, scorer=scorer))
        return found

    def point(self, store: PredictionStore, context: Context) -> Mapping[str, float]:
        found = {}
        for scorer, wrong, rows in self._sides(store, context):
            if bool((rows & wrong).any()) and bool((rows & ~wrong).any()):
                found[scorer] = float(delong(store.scores[scorer][rows].to(torch.float64), wrong[rows]).area[0])
        return found
