"""The only checks of shapes, ranges and labels."""

from __future__ import annotations

import operator
from numbers import Real
from typing import SupportsIndex

import torch
from torch import Tensor

from .errors import KindError, LabelError, RangeError, ShapeError
from .levels import MAX_SEVERITY
from .types import Task


def check_images(images: Tensor, who: str, *, bytes_too: bool = False) -> None:
    """Check images at an entrance of the library.

    Args:
        images: What a caller gave.
        who: Name used in the message.
        bytes_too: uint8 images are welcome as well.

    Raises:
        KindError: Not a floating point tensor.
        ShapeError: Not (N, C, H, W), or empty.
        RangeError: A pixel is NaN, infinite or outside [0, 1].
    """
    if not isinstance(images, Tensor):
        raise KindError(
            who,
            "a torch tensor of shape (N, C, H, W)",
            type(images).__name__,
            "Convert it, e.g. torch.from_numpy(array).",
        )
    whole = bytes_too and images.dtype == torch.uint8
    if not images.is_floating_point() and not whole:
        raise KindError(
            who,
            "uint8 images or float images in [0, 1]" if bytes_too else "float images in [0, 1]",
            f"{str(images.dtype).removeprefix('torch.')}",
            "Divide 8-bit images by 255: images.float() / 255.",
        )
    if images.ndim != 4:
        hint = "Use images[None] for one image (C, H, W), images[:, None] for grey images (N, H, W)."
        raise ShapeError(
            who,
            "images of shape (N, C, H, W)",
            f"shape {tuple(images.shape)}",
            hint if images.ndim == 3 else "Add the missing axes.",
        )
    if images.shape[3] in (3, 4) and min(images.shape[1:3]) > 4:
        raise ShapeError(
            who,
            "images of shape (N, C, H, W)",
            f"shape {tuple(images.shape)}, which looks like (N, H, W, C)",
            "Use images.permute(0, 3, 1, 2).",
        )
    if images.numel() == 0:
        raise ShapeError(who, "at least one image and pixel", f"shape {tuple(images.shape)}", "The batch is empty.")
    if whole:
        return
    low, high = images.detach().aminmax()
    if not torch.isfinite(low + high):
        raise RangeError(who, "finite pixels", "NaN or infinite pixels", "Repair or drop those images.")
    if low < 0 or high > 1:
        raise RangeError(
            who,
            "pixels in [0, 1]",
            f"[{low.item():.4g}, {high.item():.4g}]",
            "Shifts come before normalisation: put them before Normalize."
            if low < 0 and high < 50
            else "Divide by 255, or pass value_range=(low, high) to load_data.",
        )


def check_labels(labels: Tensor, *, task: Task, num_classes: int, count: int, who: str) -> None:
    """Check labels against the task and the number of classes.

    Args:
        labels: int64 (N,), or (N, L) for multi-label.
        task: The declared task.
        num_classes: Classes of the model, or labels for multi-label.
        count: Number of images.
        who: Name used in the message.

    Raises:
        ShapeError: Wrong number of rows or columns.
        LabelError: A label is out of range.
    """
    if len(labels) != count:
        raise ShapeError(who, f"{count} labels, one an image", f"{len(labels)}", "Check that both come from one split.")
    if task == "multilabel":
        if labels.ndim != 2 or labels.shape[1] != num_classes:
            raise ShapeError(
                who,
                f"multi-label labels of shape (N, {num_classes})",
                f"shape {tuple(labels.shape)}",
                "One column a label, 0 or 1, and -1 where a label was not annotated.",
            )
        if labels.numel() and not bool(((labels >= -1) & (labels <= 1)).all()):
            raise LabelError(who, "labels 0, 1 or -1", f"values up to {int(labels.max())}", "Binarise the labels.")
        return
    if labels.ndim != 1:
        raise ShapeError(
            who,
            "labels of shape (N,)",
            f"shape {tuple(labels.shape)}",
            "Class indices, not one-hot rows; for several labels an image use task='multilabel'.",
        )
    if labels.numel() == 0:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        off = " They seem to start at 1: subtract 1." if low == 1 and high == num_classes else ""
        raise LabelError(
            who,
            f"labels from 0 to {num_classes - 1}, as the model has {num_classes} classes",
            f"labels from {low} to {high}",
            f"Check the class order and the model's number of outputs.{off}",
        )


def check_severity(severity: float, who: str) -> float:
    """Return ``severity`` as float.

    Raises:
        KindError: It is not a number.
        RangeError: It lies outside [0, 5].
    """
    given: object = severity
    if isinstance(given, bool) or not isinstance(given, Real):
        raise KindError(who, "severity as a number from 0 to 5", f"{severity!r}", "Pass e.g. severity=3.")
    if not 0 <= severity <= MAX_SEVERITY:
        raise RangeError(
            who, "severity from 0 to 5", f"{severity}", "0 is the identity, 5 the strongest; .at() sets other values."
        )
    return float(severity)


def check_seed(seed: object, who: str) -> int:
    """Return ``seed`` as a plain int, so that equal numbers draw alike whatever their type.

    Raises:
        KindError: It is no integer.
    """
    if isinstance(seed, SupportsIndex) and not isinstance(seed, bool):
        return operator.index(seed)
    raise KindError(who, "seed as an integer", f"{seed!r}", "Pass e.g. seed=0.")
