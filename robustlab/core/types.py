"""The nouns that travel through the library: image specification, batch and model outputs."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .errors import KindError, RangeError, RobustlabWarning, ShapeError

Task = Literal["binary", "multiclass", "multilabel"]
OutputKind = Literal["logits", "log_probs", "probs"]

TASKS: tuple[Task, ...] = ("binary", "multiclass", "multilabel")
OUTPUTS: tuple[OutputKind, ...] = ("logits", "log_probs", "probs")

MODALITIES = (
    "ct",
    "dermoscopy",
    "endoscopy",
    "fundus",
    "histology",
    "microscopy",
    "mr",
    "oct",
    "photo",
    "ultrasound",
    "xray",
)
"""Modality tags that shifts and lists know; others may be used, and are met by what is tied to no modality."""

_ALIASES = {"mri": "mr"}


def modality_tag(tag: str) -> str:
    """Return a modality tag as it is compared: lower case, without spaces around it, aliases replaced."""
    plain = tag.strip().casefold()
    return _ALIASES.get(plain, plain)


def like_modality(tag: str) -> str:
    """Return a hint of what an unknown tag may mean, e.g. ``"Did you mean 'xray'? "``; empty if nothing is close."""
    close = difflib.get_close_matches(modality_tag(tag), (*MODALITIES, *_ALIASES), n=1)
    return f"Did you mean {modality_tag(close[0])!r}? " if close else ""


@dataclass(frozen=True)
class ImageSpec:
    """What the pixel values of a source mean.

    Images travel as float32 in [0, 1]; ``range`` and ``unit`` say what 0 and 1 are in the source.

    Args:
        channels: Number of channels.
        size: (height, width) in pixels.
        range: Native value of 0 and of 1, in ``unit``.
        unit: Name of the native unit, e.g. ``"grey level"`` or ``"HU"``.
        bits: Bits a stored pixel has; None for floating point sources. 8-bit sources are re-quantised after a shift.
        modality: Tag such as ``"xray"`` or ``"histology"``, in any case (see ``MODALITIES``); shifts may be tied to it.
            Any other tag is kept, with a warning.
    """

    channels: int
    size: tuple[int, int]
    range: tuple[float, float] = (0.0, 255.0)
    unit: str = "grey level"
    bits: int | None = 8
    modality: str | None = None

    def __post_init__(self) -> None:
        if self.channels < 1 or min(self.size) < 1:
            raise ShapeError(
                "ImageSpec",
                "at least one channel and one pixel",
                f"channels={self.channels}, size={self.size}",
                "Check the array layout: (N, H, W) or (N, H, W, C) in files, (N, C, H, W) in tensors.",
            )
        if not self.range[0] < self.range[1]:
            raise RangeError("ImageSpec", "range=(low, high) with low < high", f"{self.range}", "Swap the two.")
        if self.modality is not None:
            object.__setattr__(self, "modality", self._known(self.modality))

    @staticmethod
    def _known(given: object) -> str:
        if not isinstance(given, str):
            raise KindError("ImageSpec", "modality as a string", f"{given!r}", f"Known are {', '.join(MODALITIES)}.")
        tag = modality_tag(given)
        if tag not in MODALITIES:
            warnings.warn(
                f"ImageSpec: {given!r} is no modality that our shifts know, so those made for another are left out. "
                f"{like_modality(given)}Known are {', '.join(MODALITIES)}.",
                RobustlabWarning,
                stacklevel=4,
            )
        return tag

    def native(self, amount: float) -> float:
        """Return a difference on the [0, 1] scale in native units."""
        return amount * (self.range[1] - self.range[0])


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples of a source.

    Args:
        images: float (N, C, H, W) in [0, 1].
        labels: int64 (N,), or (N, L) in {0, 1, -1} for multi-label (-1: not annotated), or None.
        ids: int64 (N,), stable over shuffling and subsetting.
        groups: Column name to int64 codes (N,); -1 means missing.
        masks: (N, H, W) integer masks, or None.
        boxes: One (K, 4) tensor of pixel boxes (x0, y0, x1, y1) per sample, or None.
        spacing: (N, 2) millimetres per pixel (row, column), or None.
        present: (N, modalities) bool, or None.
        tables: Further per-sample columns, (N, ...), or None.
    """

    images: Tensor
    labels: Tensor | None
    ids: Tensor
    groups: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Tensor | None = None
    boxes: tuple[Tensor, ...] | None = None
    spacing: Tensor | None = None
    present: Tensor | None = None
    tables: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4:
            raise ShapeError(
                "Batch",
                "images of shape (N, C, H, W)",
                f"shape {tuple(self.images.shape)}",
                "Add the missing axis, e.g. images[:, None] for grey images.",
            )
        if self.ids.shape != self.images.shape[:1]:
            raise ShapeError(
                "Batch", f"{len(self.images)} ids", f"shape {tuple(self.ids.shape)}", "Give every image one id."
            )

    def __len__(self) -> int:
        return len(self.images)

    def replace(self, images: Tensor) -> Batch:
        """Return the same samples with other pixels."""
        return dataclasses.replace(self, images=images)

    def select(self, index: Tensor) -> Batch:
        """Return the samples at ``index`` (int64 (M,), on the images' device)."""

        def take(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.index_select(0, index)

        return Batch(
            images=self.images.index_select(0, index),
            labels=take(self.labels),
            ids=self.ids.index_select(0, index),
            groups={name: codes.index_select(0, index) for name, codes in self.groups.items()},
            masks=take(self.masks),
            boxes=None if self.boxes is None else tuple(self.boxes[i] for i in index.tolist()),
            spacing=take(self.spacing),
            present=take(self.present),
            tables=None if self.tables is None else {k: v.index_select(0, index) for k, v in self.tables.items()},
        )

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every tensor on ``device``."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        return Batch(
            images=self.images.to(device, non_blocking=True),
            labels=move(self.labels),
            ids=self.ids.to(device, non_blocking=True),
            groups={name: codes.to(device, non_blocking=True) for name, codes in self.groups.items()},
            masks=move(self.masks),
            boxes=None if self.boxes is None else tuple(box.to(device) for box in self.boxes),
            spacing=move(self.spacing),
            present=move(self.present),
            tables=None if self.tables is None else {k: v.to(device) for k, v in self.tables.items()},
        )


@dataclass(frozen=True, eq=False)
class ModelOutputs:
    """What one forward pass yields.

    Args:
        logits: float32 (N, C). For ensembles and stochastic models the log of the mean probability. For multi-label
            models one logit per label.
        features: Tap name to (N, D).
        members: (S, N, C) log-probabilities of ensemble members, or None.
        scores: Score name to (N,), e.g. a defence's own OOD score; larger means more out of distribution.
        task: Task of the model; says whether ``logits`` compete (softmax) or stand alone (one sigmoid a label).
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    members: Tensor | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    task: Task = "multiclass"

    def __len__(self) -> int:
        return len(self.logits)

    def head(self, count: int) -> ModelOutputs:
        """Return the outputs of the first ``count`` samples (drops the padding of a last chunk)."""
        if count == len(self.logits):
            return self
        return ModelOutputs(
            logits=self.logits[:count],
            features={name: value[:count] for name, value in self.features.items()},
            members=None if self.members is None else self.members[:, :count],
            scores={name: value[:count] for name, value in self.scores.items()},
            task=self.task,
        )
