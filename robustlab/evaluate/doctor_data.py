"""The checks of data: numbers of classes, class names, shared patients, shared images, contradictory labels."""

from __future__ import annotations

import torch
from torch import Tensor

from robustlab.core.source import Source

from .diagnosis import Finding, Outcome
from .doctor_rules import never_occurring
from .overlap import SMALLEST, Overlap, find_contradictions, find_overlap

MEMORY_IMAGES = 20_000
DECODED_IMAGES = 2_000
_EXAMPLES = 5
_UNIT_NAMES = ("patient", "patient_id", "subject", "subject_id")


def data_outcomes(
    source: Source,
    *,
    val: Source | None,
    train: Source | None,
    cluster: str | None,
    num_classes: int | None,
    thorough: bool,
) -> list[tuple[str, Outcome]]:
    """Return (check, outcome) pairs; arguments as in ``examine_data``."""
    outcomes: list[tuple[str, Outcome]] = [("class-count", check_class_count(source, num_classes))]
    limit = None if thorough else _limit(source)
    outcomes.append(("contradictory-labels", _contradictions(source, limit)))
    if limit is not None and limit < len(source):
        outcomes.append(("contradictory-labels", _sampled(limit, source, "the data")))
    for role, other in (("train", train), ("val", val)):
        if other is None:
            reason = f"no {'training' if role == 'train' else 'validation'} data given"
            outcomes += [(f"{check}-{role}", reason) for check in ("patient-overlap", "image-overlap")]
            continue
        outcomes.append(("class-names", _class_names(source, other, role)))
        outcomes.append((f"patient-overlap-{role}", check_units(source, other, cluster, role)))
        outcomes += _images(source, other, role, thorough)
    return outcomes


def check_class_count(source: Source, num_classes: int | None) -> Outcome:
    """Compare the labels with the number of outputs.

    Labels out of range, and numbers of names that differ, are certain. Classes that never occur are reported where even
    a class a tenth as frequent as in an even split would have occurred at 99.9 % (see ``never_occurring``); a label set
    of two classes is always a misfit for more outputs, unless the data names as many.
    """
    labels, names = source.info.labels, source.info.class_names
    if labels is None or num_classes is None:
        return "the data has no labels" if labels is None else "the number of outputs is not known"
    if labels.ndim == 2:
        if labels.shape[1] == num_classes:
            return None
        text = f"The labels have {labels.shape[1]} columns and the model has {num_classes} outputs."
        return Finding("class-count", text, "Give the network one output a label, or choose the columns it answers.")
    if not len(labels):
        return "the data is empty"
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        out = int(((labels < 0) | (labels >= num_classes)).sum())
        text = f"The model has {num_classes} outputs; of {len(labels)} labels, {low} to {high}, {out} are out of range."
        off = "They seem to start at 1: subtract 1." if low == 1 and high == num_classes else "Check the last layer."
        return Finding("class-count", text, off)
    if names is not None and len(names) != num_classes:
        text = f"The data has {len(names)} classes ({', '.join(names)}) and the model has {num_classes} outputs."
        spare = " One more output may be a background class." if len(names) == num_classes - 1 else ""
        return Finding("class-count", text, f"Give the network one output a class.{spare}")
    if source.info.task == "binary" and num_classes > 2:
        text = f"The labels are 0 and 1 only ({len(labels)} of them) and the model has {num_classes} outputs."
        return Finding(
            "class-count", text, "Give the network two outputs; for a part of more classes load with task='multiclass'."
        )
    missing = never_occurring(labels, num_classes)
    if not missing:
        return None
    shown = ", ".join(map(str, missing[:_EXAMPLES])) + ", ..." * (len(missing) > _EXAMPLES)
    text = f"Of the model's {num_classes} classes {len(missing)} never occur among {len(labels)} labels: {shown}."
    return Finding(
        "class-count",
        text,
        "Check that the data is complete and that the network has no background class, which would move all labels.",
    )


def _class_names(source: Source, other: Source, role: str) -> Outcome:
    mine, theirs = source.info.class_names, other.info.class_names
    if mine is None or theirs is None:
        return "the classes have no names"
    if mine == theirs:
        return None
    text = f"The classes of data are {', '.join(mine)}; those of {role} are {', '.join(theirs)}."
    return Finding("class-names", text, "Pass the same class_names= to load_data for every split.")


def check_units(source: Source, other: Source, cluster: str | None, role: str) -> Outcome:
    """Report patients of the data that also occur in another set; they are compared by name, not by code."""
    column = cluster or next((name for name in _UNIT_NAMES if name in source.info.groups), None)
    if column is None or column not in source.info.groups:
        return "no column says which patient an image is of"
    if column not in other.info.groups:
        return f"{role} has no column {column!r}"
    mine, theirs = _units(source, column), _units(other, column)
    shared = sorted(set(mine.values()) & set(theirs.values()))
    if not shared:
        return None
    codes = torch.tensor([code for code, name in mine.items() if name in set(shared)])
    images = int(torch.isin(source.info.groups[column], codes).sum())
    text = (
        f"{len(shared)} of {len(mine)} units of column {column!r} in the data also occur in {role}; they have {images} "
        f"of {len(source)} images."
    )
    return Finding(
        f"patient-overlap-{role}",
        text,
        f"Split by {column}, so that no unit is in two sets. If numbers start again in each set, make them different.",
    )


def _units(source: Source, column: str) -> dict[int, str]:
    """Return code to name of the units that occur."""
    codes = source.info.groups[column]
    levels = source.info.group_levels.get(column, ())
    return {
        code: levels[code] if code < len(levels) else str(code) for code in torch.unique(codes[codes >= 0]).tolist()
    }


def _limit(source: Source) -> int:
    return MEMORY_IMAGES if source.in_memory else DECODED_IMAGES


def _sampled(looked: int, source: Source, what: str) -> str:
    return f"only {looked} of the {len(source)} images of {what} were looked at, evenly spread"


def _contradictions(source: Source, limit: int | None) -> Outcome:
    pairs, looked = find_contradictions(source, limit)
    if source.info.labels is None:
        return "the data has no labels"
    if not len(pairs):
        return None
    text = (
        f"Of {looked} images {len(pairs)} are bit-identical to an earlier one with another label; positions: "
        f"{_shown(pairs[:, 0], pairs[:, 1])}."
    )
    return Finding("contradictory-labels", text, "Drop these images, or correct their labels.")


def _images(source: Source, other: Source, role: str, thorough: bool) -> list[tuple[str, Outcome]]:
    check = f"image-overlap-{role}"
    limits = (None, None) if thorough else (_limit(source), _limit(other))
    found = find_overlap(source, other, limits=limits)
    outcomes: list[tuple[str, Outcome]] = [(check, _overlap_finding(found, source, other, role))]
    for looked, whole, what in ((found.searched[0], source, "the data"), (found.searched[1], other, role)):
        if looked < len(whole):
            outcomes.append((check, _sampled(looked, whole, what)))
    if found.flat:
        outcomes.append((check, f"{found.flat} images of the data have no contrast and were left out"))
    if min(*source.info.spec.size, *other.info.spec.size) < SMALLEST:
        outcomes.append((check, f"images below {SMALLEST} pixels: only bit-identical ones were looked for"))
    return outcomes


def _overlap_finding(found: Overlap, source: Source, other: Source, role: str) -> Outcome:
    if not len(found):
        return None
    exact = int(found.exact.sum())
    order = torch.argsort(found.exact.to(torch.int8), descending=True, stable=True)
    rows, partners = found.rows[order], found.partners[order]
    a, b = source.info.labels, other.info.labels
    differ = ""
    if a is not None and b is not None and a.ndim == b.ndim == 1:
        count = int((a[rows] != b[partners]).sum())
        differ = f"; {count} of the pairs have different labels" if count else ""
    text = (
        f"{len(found)} of {found.searched[0]} images recur in {role} ({found.searched[1]} images): {exact} are "
        f"bit-identical and {len(found) - exact} near-duplicates{differ}. Positions in data and {role}: "
        f"{_shown(rows, partners)}."
    )
    return Finding(
        f"image-overlap-{role}",
        text,
        f"Take these images out of {'data or train' if role == 'train' else 'val'}: what a model has seen before says "
        "nothing about new patients.",
    )


def _shown(rows: Tensor, partners: Tensor) -> str:
    pairs = list(zip(rows.tolist(), partners.tolist(), strict=True))
    return ", ".join(f"{i} and {j}" for i, j in pairs[:_EXAMPLES]) + ", ..." * (len(pairs) > _EXAMPLES)
