"""OOD benchmarks in a line: classes of a labelled set held out as fine-grained foreign data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from robustlab.core.errors import LabelError, RangeError
from robustlab.core.source import Source

from .sources import subset

SPLITS = (0, 1, 2)
"""The usual splits: a score that leads in one of them only does not lead."""


@dataclass(frozen=True)
class HeldOut:
    """A set without some classes, and those.

    Args:
        known: Samples of the classes that stay, labelled 0 .. K - 1 in the order of their old labels.
        foreign: Samples of the held-out classes, without labels.
        classes: Old labels of the classes that were held out, ascending.
    """

    known: Source
    foreign: Source
    classes: tuple[int, ...]


def held_out_classes(num_classes: int, count: int, split: int = 0) -> tuple[int, ...]:
    """Return which classes a split holds out, ascending.

    ``numpy.random.RandomState(split).choice(num_classes, num_classes - count, replace=False)`` are the classes that
    stay, as in the fine-grained benchmark of MixOE.

    Args:
        num_classes: All classes.
        count: Classes to hold out, from 1 to ``num_classes`` - 2.
        split: Seed.

    Raises:
        RangeError: Fewer than two classes would stay, or none would go.

    References:
        Zhang, Inkawhich, Linderman, Chen, Li, Mixture outlier exposure: towards out-of-distribution detection in
        fine-grained environments, 2023, arXiv 2106.03917.
    """
    if not 1 <= count <= num_classes - 2:
        raise RangeError(
            "held_out_classes", f"count from 1 to {num_classes - 2}", f"{count}", "A fifth of the classes is usual."
        )
    kept = np.random.RandomState(split).choice(range(num_classes), num_classes - count, replace=False)
    return tuple(sorted({*range(num_classes)} - {int(value) for value in kept}))


def hold_out(
    data: Source, *, count: int | None = None, split: int = 0, classes: Sequence[int] | None = None
) -> HeldOut:
    """Split a labelled set into known classes and held-out ones.

    Use the same arguments for training, validation and test data: the classes depend on ``split`` alone.

    Args:
        data: Samples with one class each.
        count: Classes to hold out; a fifth of them, at least one, if None.
        split: Which classes: 0, 1, 2 are the usual splits.
        classes: The classes themselves, instead of ``count`` and ``split``.

    Raises:
        LabelError: No labels, several a sample, or a class that does not exist or has no sample.
        RangeError: Fewer than two classes would stay.
    """
    info = data.info
    if info.labels is None or info.labels.ndim != 1:
        raise LabelError("hold_out", "data with one class a sample", "other data", "Load it with labels.")
    total = len(info.class_names) if info.class_names is not None else int(info.labels.max()) + 1
    if classes is None:
        chosen = held_out_classes(total, max(1, total // 5) if count is None else count, split)
    else:
        chosen = tuple(sorted({int(value) for value in classes}))
        if not chosen or chosen[0] < 0 or chosen[-1] >= total or len(chosen) > total - 2:
            raise LabelError("hold_out", f"at most {total - 2} classes from 0 to {total - 1}", f"{chosen}",
                             "At least two classes have to stay.")  # fmt: skip
    away = torch.isin(info.labels, torch.tensor(chosen))
    if not bool(away.any()) or bool(away.all()):
        raise LabelError("hold_out", "samples on both sides", f"{int(away.sum())} of {len(away)} held out",
                         "Choose other classes.")  # fmt: skip
    return HeldOut(_relabelled(subset(data, ~away), chosen, total), _unlabelled(subset(data, away)), chosen)


def _relabelled(source: Source, gone: Sequence[int], total: int) -> Source:
    stay = [label for label in range(total) if label not in gone]
    new = torch.full((total,), -1, dtype=torch.int64)
    new[torch.tensor(stay)] = torch.arange(len(stay))
    info = source.info
    names = None if info.class_names is None else tuple(info.class_names[label] for label in stay)
    labels = None if info.labels is None else new[info.labels]
    source.info = dataclasses.replace(
        info, name=f"{info.name} (known)", labels=labels, class_names=names, posterior=None
    )
    return source


def _unlabelled(source: Source) -> Source:
    info = source.info
    source.info = dataclasses.replace(
        info, name=f"{info.name} (held out)", labels=None, task=None, class_names=None, posterior=None
    )
    return source
