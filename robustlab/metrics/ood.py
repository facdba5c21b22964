"""Out-of-distribution detection: every score of a store against the clean in-distribution reference.

Scores are larger for what looks more out of distribution. AUROC has no orientation; the metrics that have one carry the
positive class in their name: ``ood-pos`` or ``id-pos``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from robustlab.core.errors import ConfigError
from robustlab.core.registry import METRICS
from robustlab.core.rng import hashed, stable_hash

from .base import Context, Estimate, Metric, MetricValue
from .classification import pair_bounds
from .selective import wrong_answers
from .separation import (
    Ends,
    Pair,
    Side,
    accepted_first,
    average_precision,
    false_positive_ends,
    linear_ends,
    most_favourable,
    rate_above,
)
from .stats import unit_count, wilson
from .store import PredictionStore


class _Separation(Metric):
    """How well the scores of a store tell it from the clean reference; ID and OOD units are independent."""

    on = "ood"
    from_answers = True  # a score without logits brings its own reason

    @abstractmethod
    def value(self, pair: Pair, right: Tensor) -> float:
        """Return the value; ID is the negative side of the pair, ``right`` are its right answers, bool (M,)."""

    @abstractmethod
    def ends(self, pair: Pair, right: Tensor, value: float, confidence: float) -> Ends:
        """Return the interval."""

    def lacks(self, reference: PredictionStore) -> str:
        """Return why nothing is defined with this reference; empty where it is."""
        del reference
        return ""

    def answers(self, reference: PredictionStore, context: Context) -> Tensor:
        """Return bool (M,), the right answers, where the metric uses them."""
        del context
        return torch.ones_like(reference.ids, dtype=torch.bool)

    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        reference = self._reference(context)
        found = []
        for scorer, pair, known in _pairs(store, reference):
            sides = (pair.negative, pair.positive)
            n, units = sum(len(side.scores) for side in sides), sum(side.units for side in sides)
            reason = self.lacks(reference)
            if 0 in (side.units for side in sides):
                reason = {**reference.score_reasons, **store.score_reasons}.get(scorer, "no_samples")
            if reason:
                estimate = Estimate.undefined(reason, n=n, n_units=units)
            else:
                right = self.answers(reference, context)[known]
                value = self.value(pair, right)
                low, high, method, why = self.ends(pair, right, value, context.resampler.confidence)
                estimate = Estimate(value, low, high, n, units, method, why)
            found.append(MetricValue(self.name, estimate, self.direction, scorer=scorer))
        return found

    def point(self, store: PredictionStore, context: Context) -> Mapping[str, float]:
        reference = self._reference(context)
        return {
            scorer: self.value(pair, self.answers(reference, context)[known])
            for scorer, pair, known in _pairs(store, reference)
            if len(pair.negative.scores) and len(pair.positive.scores) and not self.lacks(reference)
        }

    def _reference(self, context: Context) -> PredictionStore:
        if context.reference is None:
            raise ConfigError(
                self.name, "a context with a reference", "none", "Pass the clean in-distribution predictions."
            )
        return context.reference


def _pairs(store: PredictionStore, reference: PredictionStore) -> Iterator[tuple[str, Pair, Tensor]]:
    """Yield (scorer, ID and OOD scores, known rows of the reference) of every score that both have."""
    for scorer in store.scores:
        if scorer not in reference.scores:
            continue
        inside, outside = (_score(side, scorer) for side in (reference, store))
        kind = torch.promote_types(inside.dtype, outside.dtype)
        known = [~torch.isnan(values) for values in (inside, outside)]
        sides = [
            _side(values.to(kind), rows, part.clusters)
            for values, rows, part in zip((inside, outside), known, (reference, store), strict=True)
        ]
        yield scorer, Pair(sides[0], sides[1]), known[0]


def _score(store: PredictionStore, scorer: str) -> Tensor:
    """Return a score in float32 or float64: half precision would not be sorted fast, whole numbers not be negated."""
    values = store.scores[scorer]
    return values if values.dtype == torch.float64 else values.to(torch.float32)


def _side(values: Tensor, rows: Tensor, clusters: Tensor | None) -> Side:
    units = unit_count(clusters, rows)
    if bool(rows.all()):
        return Side(values, clusters, units)
    return Side(values[rows], None if clusters is None else clusters[rows], units)


@METRICS.register("auroc-ood")
class OodAuroc(_Separation):
    """P(score of OOD > score of ID), ties counted half; the same for either orientation.

    At exactly 0 or 1, where influence values vanish, Wilson holds for the disjoint pairs of one unit from each side.
    """

    default = True
    title = "OOD AUROC"

    def value(self, pair: Pair, right: Tensor) -> float:
        return pair.rank_probability()

    def ends(self, pair: Pair, right: Tensor, value: float, confidence: float) -> Ends:
        if value in (0.0, 1.0):
            low, high = pair_bounds(value, pair.negative.units, pair.positive.units, confidence)
            return low, high, "wilson on disjoint pairs", ""
        return linear_ends(pair, accepted_first(pair, right), confidence)


@METRICS.register("oscr")
class Oscr(_Separation):
    """Open-set classification rate: P(answer on ID is right, and its score is below that of OOD), ties counted half.

    It is the area of the rate of right, accepted answers on ID against the rate of accepted OOD, at most the accuracy.
    The reference needs labels. For multi-label an answer is right when every annotated label is.

    References:
        Dhamija et al., Reducing network agnostophobia, 2018, arXiv 1811.04110.
    """

    title = "OSCR"

    def lacks(self, reference: PredictionStore) -> str:
        return "no_labels" if reference.labels is None else ""

    def answers(self, reference: PredictionStore, context: Context) -> Tensor:
        wrong, _ = wrong_answers(reference, context.frozen)
        return ~wrong

    def value(self, pair: Pair, right: Tensor) -> float:
        answered = pair.negative.scores[right]
        if len(answered) == 0:
            return 0.0
        share = Pair(Side(answered, None, len(answered)), pair.positive).rank_probability()
        return share * len(answered) / len(right)

    def ends(self, pair: Pair, right: Tensor, value: float, confidence: float) -> Ends:
        if not bool(right.any()):
            return math.nan, math.nan, "no right answer", "no_variance"
        return linear_ends(pair, accepted_first(pair, right), confidence)


class _AveragePrecision(_Separation):
    """Step-wise average precision; it depends on the ratio of the sides, which the method states."""

    def oriented(self, pair: Pair) -> Pair:
        """Return the pair with the positive class on the positive side."""
        return pair

    def value(self, pair: Pair, right: Tensor) -> float:
        pair = self.oriented(pair)
        hits = len(pair.positive.scores) - pair.first
        alarms = len(pair.negative.scores) - pair.below
        return float((hits / (hits + alarms).to(torch.float64)).mean())

    def ends(self, pair: Pair, right: Tensor, value: float, confidence: float) -> Ends:
        turned = self.oriented(pair)
        low, high, method, reason = linear_ends(turned, average_precision(turned), confidence)
        return low, high, f"{method}; OOD:ID {len(pair.positive.scores)}:{len(pair.negative.scores)}", reason


@METRICS.register("aupr-ood-pos")
class AuprOodPositive(_AveragePrecision):
    """Average precision of finding OOD, the sum of (R_k - R_(k-1)) P_k over distinct scores from the top."""

    title = "AUPR (OOD positive)"


@METRICS.register("aupr-id-pos")
class AuprIdPositive(_AveragePrecision):
    """Average precision of finding ID, the sum of (R_k - R_(k-1)) P_k over distinct scores from the bottom."""

    title = "AUPR (ID positive)"

    def oriented(self, pair: Pair) -> Pair:
        return pair.turned


class _FalsePositives(_Separation):
    """Share of the negatives at or above the highest observed score that at least 95 % of the positives reach.

    Equal scores are flagged together; nothing is interpolated.
    """

    direction = "lower"

    def oriented(self, pair: Pair) -> Pair:
        """Return the pair with the positive class on the positive side."""
        return pair

    def value(self, pair: Pair, right: Tensor) -> float:
        pair = self.oriented(pair)
        threshold = pair.positive.threshold(most_favourable(pair))
        return int((pair.negative.scores >= threshold).sum()) / len(pair.negative.scores)

    def ends(self, pair: Pair, right: Tensor, value: float, confidence: float) -> Ends:
        return false_positive_ends(self.oriented(pair), value, confidence)


@METRICS.register("fpr95-ood-pos")
class Fpr95OodPositive(_FalsePositives):
    """Share of ID flagged when 95 % of OOD are caught (OOD is the positive class)."""

    title = "FPR95 (OOD positive)"


@METRICS.register("fpr95-id-pos")
class Fpr95IdPositive(_FalsePositives):
    """Share of OOD accepted when 95 % of ID are accepted (ID is the positive class)."""

    title = "FPR95 (ID positive)"

    def oriented(self, pair: Pair) -> Pair:
        return pair.turned


@METRICS.register("detection-error")
class DetectionError(_Separation):
    """Smallest (FNR + FPR) / 2 over all thresholds, both classes counting the same; at most 0.5.

    The interval holds the best threshold fixed and combines the Wilson intervals of both rates by MOVER.

    References:
        Liang et al., Enhancing the reliability of out-of-distribution image detection in neural networks, 2018, arXiv
        1706.02690; Zou and Donner, Construction of confidence limits about effect measures: a general approach, 2008.
    """

    title = "Detection error"
    direction = "lower"

    def _errors(self, pair: Pair) -> Tensor:
        """Return int64 (P,), P M (FNR + FPR) with the threshold at each OOD score: no rounding decides between them."""
        count, total = len(pair.positive.scores), len(pair.negative.scores)
        return pair.first * total + (total - pair.below) * count

    def value(self, pair: Pair, right: Tensor) -> float:
        count, total = len(pair.positive.scores), len(pair.negative.scores)
        return min(int(self._errors(pair).min()), total * count) / (2 * total * count)

    def ends(self, pair: Pair, right: Tensor, value: float, confidence: float) -> Ends:
        threshold = pair.positive.ordered[int(self._errors(pair).argmin())]
        low = high = 0.0
        for side, missed in ((pair.negative, False), (pair.positive, True)):
            rate, effective = rate_above(side, threshold, confidence)
            rate = 1 - rate if missed else rate
            ends = wilson(rate * effective, effective, confidence=confidence)
            low, high = low + (rate - ends[0]) ** 2, high + (ends[1] - rate) ** 2
        method = "wilson a side at the best threshold, combined by MOVER"
        return max(0.0, value - math.sqrt(low) / 2), min(0.5, value + math.sqrt(high) / 2), method, ""


def full_spectrum(clean: PredictionStore, shifted: Sequence[PredictionStore]) -> PredictionStore:
    """Return clean and covariate-shifted ID predictions pooled into one reference, for full-spectrum OOD detection.

    Ids are made distinct. Clusters are kept; without them the copies of one sample form a unit, because a sample and
    its shifted versions are not independent. Scores, groups and labels that all have are kept.

    Args:
        clean: Clean ID predictions.
        shifted: The same model on covariate-shifted ID data, of the same or of other samples.

    Raises:
        ConfigError: Task, classes or kind of answers differ, or only some have clusters.

    References:
        Yang et al., Full-spectrum out-of-distribution detection, 2022, arXiv 2204.05306.
    """
    parts = [clean, *shifted]
    for what, values in (
        ("one task", {part.task for part in parts}),
        ("one number of classes", {part.num_classes for part in parts}),
        ("answers of one kind", {part.answers_only for part in parts}),
        ("clusters everywhere or nowhere", {part.clusters is not None for part in parts}),
    ):
        if len(values) > 1:
            got = ", ".join(sorted(map(str, values)))
            raise ConfigError("full_spectrum", what, got, "Pool predictions of one model on one task.")
    labels = [part.labels for part in parts if part.labels is not None]
    clusters = [part.keys if part.clusters is None else part.clusters for part in parts]
    names = [name for name in clean.scores if all(name in part.scores for part in parts)]
    columns = [name for name in clean.groups if all(name in part.groups for part in parts)]
    return PredictionStore(
        ids=torch.cat([hashed(part.keys ^ stable_hash("part", index)) for index, part in enumerate(parts)]),
        logits=torch.cat([part.logits for part in parts]),
        labels=torch.cat(labels) if len(labels) == len(parts) else None,
        task=clean.task,
        scores={name: torch.cat([part.scores[name] for part in parts]) for name in names},
        score_reasons={name: reason for part in parts for name, reason in part.score_reasons.items()},
        groups={name: torch.cat([part.groups[name] for part in parts]) for name in columns},
        clusters=torch.cat(clusters),
        pseudonyms=True,
        answers_only=clean.answers_only,
    )
