"""Labels, ids and group columns: from what users have to tensors that travel with the samples."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustlab.core.checks import check_labels
from robustlab.core.errors import ConfigError, DuplicateNameError, KindError, LabelError, ShapeError
from robustlab.core.rng import hash_ids
from robustlab.core.types import TASKS, Task

Array = NDArray[Any]

BINS = 4
MAX_FLOAT_LEVELS = 10


def as_array(values: Any) -> Array:
    """Return a list, tensor or array as a NumPy array."""
    if isinstance(values, Tensor):
        array: Array = values.detach().cpu().numpy()
        return array
    return np.asarray(values)


def encode_ids(ids: Any, count: int, who: str) -> Tensor:
    """Return int64 (N,) ids: integers as they are, strings hashed, positions if there are none.

    Raises:
        ShapeError: Not one id an image.
        KindError: Ids are neither integers nor strings.
        DuplicateNameError: Two ids are equal.
    """
    if ids is None:
        return torch.arange(count, dtype=torch.int64)
    array = as_array(ids)
    if array.shape != (count,):
        raise ShapeError(who, f"{count} ids, one an image", f"shape {array.shape}", "Give every image one id.")
    if array.dtype.kind in "UO" and all(isinstance(item, str) for item in array.tolist()):
        return hash_ids(array.tolist())
    if array.dtype.kind not in "iu":
        raise KindError(who, "ids as integers or strings", f"dtype {array.dtype}", "Use ids=[str(i) for i in ids].")
    codes = torch.from_numpy(array.astype(np.int64))
    values, times = torch.unique(codes, return_counts=True)
    if len(values) != count:
        twice = int(values[times > 1][0])
        raise DuplicateNameError(who, "ids that are all different", f"id {twice} twice", "Make the ids unique.")
    return codes


def encode_labels(
    labels: Any, *, count: int, task: Task | None, class_names: Sequence[str] | None, who: str
) -> tuple[Tensor, Task]:
    """Return labels as int64 (N,), or (N, L) for multi-label, and their task.

    Args:
        labels: Integers (N,), MedMNIST's (N, 1), or (N, L) in {0, 1, -1}.
        count: Number of images.
        task: Declared task; if None, two-dimensional labels are multi-label, and up to two classes are binary.
        class_names: Names of the classes or labels.
        who: Name used in messages.

    Raises:
        ConfigError: ``task`` is misspelt.
        ShapeError: Wrong number of rows or columns.
        LabelError: Strings, floats, one-hot rows, negative labels, or more classes than names.
    """
    if task is not None and task not in TASKS:
        raise ConfigError(who, f"task among {', '.join(TASKS)}", repr(task), "Check the spelling.")
    array = as_array(labels)
    if array.dtype.kind in "USO":
        raise LabelError(
            who,
            "labels as integers from 0",
            f"labels such as {array.reshape(-1)[0]!r}" if array.size else "no labels",
            "Use names, labels = numpy.unique(labels, return_inverse=True) and pass class_names=names.",
        )
    if array.dtype.kind not in "iub":
        raise LabelError(who, "labels as integers from 0", f"dtype {array.dtype}", "Cast them: labels.astype(int).")
    if array.ndim == 2 and array.shape[1] == 1 and task != "multilabel":
        array = array[:, 0]
    if task is None and array.ndim == 2 and len(array) and bool(((array == 1).sum(1) == 1).all() & (array >= 0).all()):
        raise LabelError(
            who,
            "class indices of shape (N,)",
            f"rows of shape {array.shape} with exactly one 1 each (one-hot)",
            "Use labels.argmax(1), or pass task='multilabel' if these are several labels an image.",
        )
    tensor = torch.from_numpy(array.astype(np.int64))
    if task is None:
        classes = len(class_names) if class_names else int(tensor.max()) + 1 if tensor.numel() else 0
        task = "multilabel" if array.ndim == 2 else "binary" if classes <= 2 else "multiclass"
    _check_values(tensor, task=task, count=count, class_names=class_names, who=who)
    return tensor, task


def _check_values(labels: Tensor, *, task: Task, count: int, class_names: Sequence[str] | None, who: str) -> None:
    if task != "multilabel" and labels.ndim == 1 and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0:
            raise LabelError(who, "labels from 0", f"label {low}", "Drop unlabelled images, or pass them apart.")
        if class_names is not None and high >= len(class_names):
            raise LabelError(
                who,
                f"labels from 0 to {len(class_names) - 1}, as there are {len(class_names)} class names",
                f"labels from {low} to {high}",
                "Subtract 1 if they start at 1." if low == 1 else "Name every class in class_names.",
            )
        if task == "binary" and high > 1:
            raise LabelError(who, "labels 0 and 1 for task 'binary'", f"label {high}", "Use task='multiclass'.")
    columns = labels.shape[1] if labels.ndim == 2 else 0
    if task == "multilabel" and class_names is not None and columns and columns != len(class_names):
        raise ShapeError(who, f"{len(class_names)} label columns, one a class name", f"{columns}", "Name every column.")
    highest = int(labels.max()) + 1 if labels.numel() else 1
    check_labels(labels, task=task, num_classes=columns if task == "multilabel" else highest, count=count, who=who)


def encode_groups(
    columns: Mapping[str, Any], *, count: int, who: str, pool: Mapping[str, Array] | None = None
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]], list[str]]:
    """Turn group columns into codes.

    Strings, booleans and integers become one level a value, with "", None, NaN and -1 as missing. Ages, and floats with
    more than ten values, become at most four quantile groups such as "4-33". Integers are never grouped otherwise:
    they may be patients.

    Args:
        columns: Column name to values (N,).
        count: Number of images.
        who: Name used in messages.
        pool: Column name to the values of all splits, from which quantiles are taken.

    Returns:
        Codes, level names and notes for the report.

    Raises:
        ShapeError: A column has the wrong length.
    """
    codes: dict[str, Tensor] = {}
    levels: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    for name, values in columns.items():
        array = as_array(values)
        if array.shape != (count,):
            raise ShapeError(
                f"{who}, group column {name!r}",
                f"{count} values, one an image",
                f"shape {array.shape}",
                "Check that column and images come from one split.",
            )
        array = _plain(array)
        everybody = array if pool is None or name not in pool else _plain(pool[name])
        if _wants_bins(name, everybody):
            names = _quantile_groups(array, everybody)
            groups = sorted({item for item in names if item}, key=natural_key)
            notes.append(f"Column {name!r} was grouped into quantiles: {', '.join(groups)}.")
        else:
            names = [_level(item) for item in array.tolist()]
        ordered = tuple(sorted({item for item in names if item}, key=natural_key))
        index = {item: code for code, item in enumerate(ordered)}
        codes[name] = torch.tensor([index.get(item, -1) for item in names], dtype=torch.int64)
        levels[name] = ordered
    return codes, levels, notes


def natural_key(text: str) -> tuple[tuple[int, float, str], ...]:
    """Sort key that puts "9" before "10" and "4-33" before "34-50"."""
    parts = re.findall(r"\d+(?:\.\d+)?|\D+", text)
    return tuple((0, float(part), "") if part[0].isdigit() else (1, 0.0, part) for part in parts)


def _plain(array: Array) -> Array:
    """Integers that only a missing value had turned into floats become integers again, with -1 for missing."""
    if array.dtype.kind == "O":
        items = [None if _missing(item) else item for item in array.tolist()]
        array = np.array(items, dtype=object)
        present = [item for item in items if item is not None]
        if present and all(isinstance(item, (int, float, np.number)) for item in present):
            array = np.array([np.nan if item is None else item for item in items], dtype=np.float64)
    if array.dtype.kind == "f":
        finite = array[np.isfinite(array)]
        if (finite == np.round(finite)).all():
            return np.where(np.isfinite(array), array, -1).astype(np.int64)
    return array


def _wants_bins(name: str, array: Array) -> bool:
    if array.dtype.kind == "f":
        return len(np.unique(array[np.isfinite(array)])) > MAX_FLOAT_LEVELS
    age = name == "age" or name.endswith("_age")
    return age and array.dtype.kind in "iu" and len(np.unique(array)) > BINS


def _quantile_groups(array: Array, pool: Array) -> list[str]:
    def known(values: Array) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = np.isfinite(values) & (values != -1)
        return mask

    everything = np.unique(np.concatenate([array[known(array)], pool[known(pool)]]))
    counts = pool[known(pool)]
    edges = np.unique(np.quantile(counts, [i / BINS for i in range(1, BINS)], method="inverted_cdf"))
    bins = np.searchsorted(edges, everything, side="left")
    names = {}
    for index in np.unique(bins):
        inside = everything[bins == index]
        names[int(index)] = f"{inside[0]:.4g}-{inside[-1]:.4g}" if len(inside) > 1 else f"{inside[0]:.4g}"
    found = np.searchsorted(edges, array, side="left").tolist()
    return [names[index] if ok else "" for index, ok in zip(found, known(array).tolist(), strict=True)]


def _missing(item: Any) -> bool:
    return (
        item is None or type(item).__name__ in ("NAType", "NaTType") or (isinstance(item, float) and math.isnan(item))
    )


def _level(item: Any) -> str:
    if _missing(item):
        return ""
    if isinstance(item, bool):
        return str(item)
    if isinstance(item, int):
        return "" if item == -1 else str(item)
    return f"{item:.6g}" if isinstance(item, float) else str(item)
