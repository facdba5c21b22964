"""Shift: anything that maps (batch, severity, context) to a batch of the same shape and dtype."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor

from .checks import check_images, check_seed, check_severity
from .errors import KindError, ShapeError
from .rng import SampleRng, content_ids
from .types import Batch, ImageSpec

if TYPE_CHECKING:
    from .model import Model


@dataclass(frozen=True)
class ShiftContext:
    """Everything a shift may depend on besides the batch and the severity.

    Args:
        seed: The user's seed.
        epoch: Epoch of a training augmentation.
        step: Step inside an epoch.
        spec: What the pixel values mean; None when unknown.
        model: The model under attack; None for corruptions.
        device_keys: int64 (N,) keys of the scanner that took each image, for noise that belongs to a device; None when
            unknown: one scanner then took all of them.
        path: Position in a tree of composed shifts.
        thresholds: For attacks on several labels, the probability at which each label is decided; empty for one half.
    """

    seed: int = 0
    epoch: int = 0
    step: int = 0
    spec: ImageSpec | None = None
    model: Model | None = None
    device_keys: Tensor | None = None
    path: tuple[str, ...] = field(default=())
    thresholds: tuple[float, ...] = field(default=())

    def child(self, label: str | int) -> ShiftContext:
        """Return the context of a part of a composed shift."""
        return dataclasses.replace(self, path=(*self.path, str(label)))

    def select(self, index: Tensor) -> ShiftContext:
        """Return the context of the samples at ``index``."""
        if self.device_keys is None:
            return self
        here = index.to(self.device_keys.device)
        return dataclasses.replace(self, device_keys=self.device_keys.index_select(0, here))

    def still(self) -> ShiftContext:
        """Return the context of what does not change from epoch to epoch and step to step."""
        return dataclasses.replace(self, epoch=0, step=0)

    def devices(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys of the scanners of some samples, int64 (D,), and the place of each sample's among them.

        Args:
            ids: int64 (N,) sample ids; only their number and device matter.

        Raises:
            ShapeError: The context has keys for another number of samples.
        """
        if self.device_keys is None:
            return ids.new_zeros(1), torch.zeros_like(ids)
        if self.device_keys.shape != ids.shape:
            got = f"shape {tuple(self.device_keys.shape)}"
            raise ShapeError("ShiftContext", f"{len(ids)} device keys, one a sample", got, "Give each image its key.")
        keys, places = torch.unique(self.device_keys.to(ids.device), return_inverse=True)
        return keys, places

    def rng(self, name: str, version: int, ids: Tensor) -> SampleRng:
        """Return the keyed generator of a named, versioned shift at this place for these samples."""
        stream = "/".join((*self.path, name, str(version)))
        return SampleRng.make(self.seed, stream, ids, epoch=self.epoch, step=self.step)


class Shift(ABC):
    """A way in which inputs can change.

    The work is split in two, so that a harness draws once and applies at many severities: ``prepare`` makes everything
    random and does not know the severity; ``perform`` is pure.
    """

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1

    @abstractmethod
    def prepare(self, batch: Batch, ctx: ShiftContext) -> Any:
        """Return the draws for a batch, keyed by (seed, name, version, path, id, epoch, step)."""

    @abstractmethod
    def perform(self, batch: Batch, draws: Any, severity: float, ctx: ShiftContext) -> Batch:
        """Return the shifted batch for draws made by ``prepare``; ``severity`` is above 0."""

    @abstractmethod
    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        """Return parameter name to (value, unit) at a severity; the first one is the amount that reports print."""

    def skip_reason(self, spec: ImageSpec) -> str | None:
        """Return why the shift does not apply to images of this kind, or None."""
        del spec
        return None

    @property
    def label(self) -> str:
        """Short name for tables."""
        return self.name

    @property
    def stages(self) -> tuple[str, ...]:
        """Where in the making of an image it acts, in order (see ``corruption.STAGES``); empty if unknown."""
        return ()

    @property
    def storable(self) -> bool:
        """Results are images in [0, 1] and are rounded to the source's bit depth; others are evaluated as they are."""
        return True

    @property
    def takes_bytes(self) -> bool:
        """``perform`` also takes batches of uint8 images, and returns uint8."""
        return False

    @property
    def columns(self) -> tuple[str, ...]:
        """Group columns of the data that it looks at."""
        return ()

    @property
    def cacheable(self) -> bool:
        """Name, version and fields say all there is to know, so results may be kept between runs."""
        return True

    @final
    def on(self, batch: Batch, severity: float, ctx: ShiftContext) -> Batch:
        """Return the batch at ``severity`` (0 to 5); 0 returns it unchanged, bit for bit."""
        severity = check_severity(severity, self.label)
        if severity == 0:
            return batch
        return self.perform(batch, self.prepare(batch, ctx), severity, ctx)

    @final
    def __call__(self, images: Tensor, severity: float = 3, seed: int = 0, ids: Tensor | None = None) -> Tensor:
        """Return shifted images.

        Args:
            images: (N, C, H, W), uint8, or float in [0, 1].
            severity: 0 (identity) to 5.
            seed: Seed of the draws.
            ids: int64 (N,) stable sample ids; without them, samples are keyed by their pixels.

        Returns:
            Images of the same shape and dtype; uint8 ones are rounded once, at the end.

        Raises:
            KindError: The images are no tensor of bytes or floats, or the ids no tensor of integers.
            ShapeError: The images are not (N, C, H, W).
            RangeError: The pixels leave [0, 1], or the severity leaves [0, 5].
        """
        check_images(images, self.label, bytes_too=True)
        if ids is not None and (not isinstance(ids, Tensor) or ids.dtype != torch.int64):
            hint = "Use torch.tensor(ids) on integers, robustlab.core.rng.hash_ids on strings."
            raise KindError(self.label, "ids as an int64 tensor", f"{ids!r}", hint)
        ctx = ShiftContext(seed=check_seed(seed, self.label))
        whole = images.dtype == torch.uint8
        given = from_bytes(images) if whole and (ids is None or not self.takes_bytes) else images
        keys = content_ids(given) if ids is None else ids.to(images.device)
        if whole and self.takes_bytes:
            given = images
        changed = self.on(Batch(images=given, labels=None, ids=keys), severity, ctx).images
        return to_bytes(changed) if whole and changed.dtype != torch.uint8 else changed


def from_bytes(pixels: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1]: the stored value divided by 255, correctly rounded."""
    # a tensor, since CUDA would multiply by the reciprocal of a Python number and miss the value by a digit
    return pixels.to(torch.float32).div_(torch.full((), 255.0, device=pixels.device))


def to_bytes(images: Tensor) -> Tensor:
    """Return images as uint8, clipped to [0, 1] and rounded half to even."""
    return images.to(torch.float32).clamp(0, 1).mul_(255).round_().to(torch.uint8)


def quantize(images: Tensor, spec: ImageSpec | None) -> Tensor:
    """Return images as a source of this bit depth would store them (round half to even), unchanged for float sources.

    The result equals, bit for bit, writing integers of that depth and reading them back.
    """
    if spec is None or spec.bits is None:
        return images
    top = torch.full((), float((1 << spec.bits) - 1), device=images.device)
    return torch.round(images.to(torch.float32) * top).div_(top)


def as_stored(shift: Shift, images: Tensor, spec: ImageSpec | None) -> Tensor:
    """Return a shift's results as they are evaluated: as a source of this bit depth would store them, where it can."""
    return quantize(images, spec) if shift.storable else images


def luma(images: Tensor) -> Tensor:
    """Return the ITU-R BT.601 luma (N, 1, H, W) of RGB images."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype, device=images.device)
    return (images * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)
