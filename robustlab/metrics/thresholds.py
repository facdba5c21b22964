"""Decisions: thresholds fitted on validation data, and what each sample is called with them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustlab.core.errors import ConfigError

from .base import Context, Frozen
from .store import PredictionStore


def labels_of(store: PredictionStore) -> Tensor:
    """Return the labels.

    Raises:
        ConfigError: The store has none.
    """
    if store.labels is None:
        raise ConfigError("metrics", "labelled predictions", "a store without labels", "Use the OOD metrics instead.")
    return store.labels


def fit_thresholds(store: PredictionStore) -> Tensor:
    """Return the thresholds on the positive probability with the largest Youden index.

    A case is positive at or above its threshold, which lies midway between adjacent observed probabilities (below the
    lowest one: midway to 0). Counts are compared as integers; of equal optima the lowest threshold, which has the
    higher sensitivity, is taken.

    Args:
        store: Clean, labelled validation predictions.

    Returns:
        float64 (1,) for two classes, (L,) for multi-label, (0,) for more classes and for answers without
        probabilities; NaN for a label without both classes.

    References:
        Youden, Index for rating diagnostic tests, 1950.
    """
    labels = labels_of(store)
    if store.task != "multilabel":
        columns = [(store.probs[:, 1], labels)] if store.positive_class and not store.answers_only else []
    else:
        columns = list(zip(store.probs.unbind(1), labels.unbind(1), strict=True))
    thresholds = [_youden(p[known], y[known]) for p, y in columns for known in [store.finite & (y >= 0)]]
    return torch.tensor(thresholds, dtype=torch.float64, device=store.logits.device)


def _youden(scores: Tensor, truth: Tensor) -> float:
    levels, inverse = torch.unique(scores, return_inverse=True)
    positives, negatives = (torch.bincount(inverse[truth == wanted], minlength=len(levels)) for wanted in (1, 0))
    p, n = int(positives.sum()), int(negatives.sum())
    if p == 0 or n == 0:
        return math.nan
    # true and false positives at or above each level
    hits, alarms = (counts.flip(0).cumsum(0).flip(0) for counts in (positives, negatives))
    index = hits * n - alarms * p
    best = int((index == index.max()).nonzero()[0])
    below = float(levels[best - 1]) if best else 0.0
    return (below + float(levels[best])) / 2


@dataclass(frozen=True, eq=False)
class Decisions:
    """Multi-label decisions.

    Args:
        correct: bool (N, L); false for rows that are not finite.
        annotated: bool (N, L).
        rule: Text for the method column.
    """

    correct: Tensor
    annotated: Tensor
    rule: str


def decide_labels(store: PredictionStore, frozen: Frozen) -> Decisions:
    """Decide every label at its frozen threshold, at 0.5 where there is none."""
    labels = labels_of(store)
    if frozen.thresholds is None:
        thresholds, rule = store.probs.new_full((store.num_classes,), 0.5), "at 0.5"
    else:
        missing = torch.isnan(frozen.thresholds)
        thresholds = torch.where(missing, 0.5, frozen.thresholds)
        rule = "at frozen thresholds" + (f", 0.5 for {int(missing.sum())} labels" if bool(missing.any()) else "")
    correct = (store.probs >= thresholds) == (labels == 1)
    return Decisions(correct & store.finite[:, None], labels >= 0, rule)


@dataclass(frozen=True, eq=False)
class Calls:
    """One class or label against the rest, at the frozen threshold.

    A row that is not finite is called neither positive nor negative.

    Args:
        target: Name of the class or label, empty where there is one positive class.
        positive: bool (N,), rows of the class.
        negative: bool (N,), rows not of it; rows without annotation are neither.
        called: bool (N,), called positive.
        cleared: bool (N,), called negative.
        reason: Why there is no decision; empty where there is one.
        note: Text for the method column.
    """

    target: str
    positive: Tensor
    negative: Tensor
    called: Tensor
    cleared: Tensor
    reason: str = ""
    note: str = ""


def calls(store: PredictionStore, context: Context) -> list[Calls]:
    """Return the decisions that sensitivity and its relatives count.

    The positive class of two and every label at the frozen threshold; every one of several classes by argmax; of
    answers without probabilities the answer itself, for which no validation data are needed.
    """
    labels, finite = labels_of(store), store.finite
    if store.task != "multilabel" and (store.answers_only or not store.positive_class):
        classes = (1,) if store.positive_class else range(store.num_classes)
        note = "; of the answers given" if store.positive_class else ""
        return [
            Calls(
                "" if store.positive_class else context.target(index),
                labels == index,
                labels != index,
                store.predicted == index,
                finite & (store.predicted != index),
                note=note,
            )
            for index in classes
        ]
    if store.positive_class:
        columns = [("", store.probs[:, 1], labels)]
    else:
        columns = [(context.target(i), store.probs[:, i], labels[:, i]) for i in range(store.num_classes)]
    frozen = context.frozen.thresholds
    thresholds = [math.nan] * len(columns) if frozen is None else frozen.tolist()
    made = []
    for (target, p, y), threshold in zip(columns, thresholds, strict=True):
        if math.isnan(threshold):
            none = torch.zeros_like(finite)
            reason = "no_val" if frozen is None else "val_single_class"
            made.append(Calls(target, y == 1, y == 0, none, none, reason))
        else:
            called, note = p >= threshold, f"; threshold {threshold:.4g} frozen on val"
            made.append(Calls(target, y == 1, y == 0, called & finite, ~called & finite, note=note))
    return made
