"""Metrics of every group of a store, and which groups are large enough to be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustlab.core.errors import ConfigError, ShapeError
from robustlab.core.registry import METRICS

from .base import Context, Estimate, Metric, MetricValue
from .stats import unit_count
from .store import PredictionStore
from .thresholds import labels_of

LEAST_SAMPLES = 50
LEAST_OF_CLASS = 10


@dataclass(frozen=True)
class GroupRow:
    """One metric of one group.

    Args:
        level: Name of the group.
        value: The metric within it.
        excluded: Why the group takes no part in differences, e.g. ``"group_too_small"``; empty where it does.
    """

    level: str
    value: MetricValue
    excluded: str = ""


def group_table(
    store: PredictionStore, codes: Tensor, levels: Sequence[str], context: Context, metrics: Sequence[str]
) -> list[GroupRow]:
    """Return metrics of every group, and of the samples without one as ``"missing"`` where there are any.

    Groups of any size are listed, also empty ones: undefined values are NaN with their reason.

    Args:
        store: Labelled predictions.
        codes: int64 (N,) group of every sample, -1 for missing.
        levels: Names of the groups.
        context: Operating points and resampler.
        metrics: Registered names of metrics on labels.

    Raises:
        UnknownNameError: No such metric.
        ConfigError: A metric that is not one of labels.
        ShapeError: Not one code a sample, or codes without a name.
    """
    check_groups(store, codes, levels)
    items = [label_metric(name) for name in metrics]
    reasons = size_reasons(store, codes, len(levels))
    rows = []
    for code, level in [*enumerate(levels), *([(-1, "missing")] if bool((codes < 0).any()) else [])]:
        part = store.select(codes == code)
        why = "missing" if code < 0 else reasons[code]
        for item in items:
            if part.answers_only and not item.from_answers:
                nothing = Estimate.undefined("answers_only", n=len(part), n_units=all_units(part))
                values = [MetricValue(item.name, nothing, item.direction)]
            else:
                values = item.compute(part, context)
            rows += [GroupRow(level, value, why) for value in values]
    return rows


def label_metric(name: str) -> Metric:
    """Return a metric on labels by name."""
    item = METRICS.get(name)
    if not issubclass(item, Metric) or item.on != "labels":
        raise ConfigError("group_table", "metrics on labels", repr(name), "Use e.g. 'accuracy'.")
    return item()


def check_groups(store: PredictionStore, codes: Tensor, levels: Sequence[str]) -> None:
    """Raise a ShapeError where codes, samples and names do not fit."""
    if codes.shape != (len(store),):
        raise ShapeError("groups", f"{len(store)} group codes", f"{tuple(codes.shape)}", "Give one code a sample.")
    if len(codes) and int(codes.max()) >= len(levels):
        raise ShapeError(
            "groups", f"codes below {len(levels)}, the number of names", f"{int(codes.max())}", "Name every group."
        )
    if len(codes) and int(codes.min()) < -1:
        raise ShapeError("groups", "codes from -1 (missing) on", f"{int(codes.min())}", "Give missing groups -1.")


def all_units(store: PredictionStore) -> int:
    """Return the number of independent units of a store."""
    return unit_count(store.clusters, torch.ones_like(store.ids, dtype=torch.bool))


def size_reasons(store: PredictionStore, codes: Tensor, count: int) -> list[str]:
    """Return, for every of ``count`` groups, why it is too small to be compared; empty where it is not.

    At least 50 samples, and for two classes at least 10 of each.
    """
    kept = codes >= 0
    sizes = torch.bincount(codes[kept], minlength=count)
    enough = sizes >= LEAST_SAMPLES
    if store.positive_class:
        positive = torch.bincount(codes[kept & (labels_of(store) == 1)], minlength=count)
        enough &= (positive >= LEAST_OF_CLASS) & (sizes - positive >= LEAST_OF_CLASS)
    return [
        "" if fine else "group_too_small" if size else "no_samples"
        for fine, size in zip(enough.tolist(), sizes.tolist(), strict=True)
    ]
