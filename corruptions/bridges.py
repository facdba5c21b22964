"""albumentations both ways: any of its transforms as a shift, any corruption as one of its transforms."""

from __future__ import annotations

import copy
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor

from robustlab.core.checks import check_severity
from robustlab.core.errors import KindError, RangeError, ShapeError
from robustlab.core.rng import stable_hash
from robustlab.core.shift import Shift, ShiftContext
from robustlab.core.types import Batch, ImageSpec
from robustlab.data.torch_data import same_random_state


def _albumentations() -> Any:
    # albumentations asks the network for a newer version at import unless told not to
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    return albumentations


def _set_global_state(seed: int) -> None:
    random.seed(seed)
    np.random.set_state(np.random.RandomState(seed).get_state())  # noqa: NPY002
    torch.random.set_rng_state(torch.Generator().manual_seed(seed).get_state())


def _set_seed(transform: Any, seed: int) -> None:
    """Seed a transform and, each with a seed of its own, what it is composed of.

    albumentations gives all children the parent's seed, which correlates them: two equal noise stages would add the
    same noise twice.
    """
    transform.set_random_seed(seed)
    for place, child in enumerate(getattr(transform, "transforms", ())):
        _set_seed(child, stable_hash(seed, place) & 0x7FFFFFFF)


@dataclass(frozen=True)
class FromAlbumentations(Shift):
    """Any albumentations transform as a shift.

    Each sample is transformed alone, as uint8 (H, W) or (H, W, 3), by a copy that is seeded from the sample's key;
    the result depends neither on the batch nor on the order of calls. Give the transform ``p=1``, or it will skip
    samples.

    Args:
        transform: An albumentations transform or composition, used at every severity above 0; or a function from
            severity (above 0, at most 5) to one.
        name: Kebab-case name for tables and keys; also stands for the transform in fingerprints. The transform's class
            name if not given; results are then not kept in a cache, which could not tell two such transforms apart.
        version: Raise it when the transform changes: name and version are all that caches can compare.

    Raises:
        KindError: ``transform`` is neither.
    """

    opaque: ClassVar[bool] = True
    transform: Any
    name: str = ""  # type: ignore[misc]  # pyright: ignore[reportIncompatibleVariableOverride] - one class, many transforms
    version: int = 1  # type: ignore[misc]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        if isinstance(self.transform, type) or not callable(self.transform):
            raise KindError(
                "FromAlbumentations",
                "an albumentations transform, or a function from severity to one",
                repr(self.transform),
                "Pass e.g. A.CLAHE(p=1) or lambda severity: A.GaussianBlur(sigma_limit=(severity, severity), p=1).",
            )
        object.__setattr__(self, "_named", bool(self.name))
        if not self.name:
            kind = getattr(self.transform, "__name__", type(self.transform).__name__).strip("<>")
            kebab = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", "-", kind).lower()
            object.__setattr__(self, "name", f"albumentations:{kebab}")

    @property
    def cacheable(self) -> bool:
        return bool(getattr(self, "_named", False))

    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        return {"severity": (severity, "severity")}

    def skip_reason(self, spec: ImageSpec) -> str | None:
        return None if spec.channels in (1, 3) else f"needs 1 or 3 channels, the images have {spec.channels}"

    @final
    def prepare(self, batch: Batch, ctx: ShiftContext) -> Tensor:
        return ctx.rng(self.name, self.version, batch.ids).integers("seed", 0x7FFFFFFF).cpu()

    @final
    def perform(self, batch: Batch, draws: Tensor, severity: float, ctx: ShiftContext) -> Batch:
        del ctx
        images = batch.images
        if images.shape[1] not in (1, 3):
            raise ShapeError(repr(self), "images of 1 or 3 channels", f"{images.shape[1]}", "Leave this shift out.")
        pixels = (images * 255).round_().to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        transform = self._at(severity)
        changed = np.empty_like(pixels)
        with same_random_state():
            for place, seed in enumerate(draws.tolist()):
                changed[place] = self._one(transform, pixels[place], seed)
        stored = torch.from_numpy(changed).permute(0, 3, 1, 2).contiguous().to(images.device, torch.float32)
        return batch.replace(stored.div_(255).to(images.dtype))

    def _at(self, severity: float) -> Any:
        library = _albumentations()
        kinds = (library.BasicTransform, library.BaseCompose)
        made = self.transform if isinstance(self.transform, kinds) else self.transform(severity)
        if not isinstance(made, kinds):
            raise KindError(
                self.name, "an albumentations transform from the function", repr(made), "Return e.g. A.CLAHE(p=1)."
            )
        return copy.deepcopy(made)  # seeding must not reach the caller's own pipeline

    def _one(self, transform: Any, image: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
        grey = image.shape[2] == 1
        _set_global_state(seed)
        _set_seed(transform, seed)
        changed = np.asarray(transform(image=image[..., 0].copy() if grey else image.copy())["image"])
        if grey and changed.ndim == 2:
            changed = changed[..., None]
        if changed.shape != image.shape or changed.dtype != np.uint8:
            raise ShapeError(
                self.name,
                f"a transform that keeps uint8 images of shape {image.shape}",
                f"{changed.dtype} of shape {changed.shape}",
                "Leave out crops, resizes and conversions such as Normalize or ToTensorV2.",
            )
        return changed


def as_albumentations(corruption: Shift, *, severity: float = 3.0, p: float = 0.5) -> Any:
    """Return an ``albumentations.ImageOnlyTransform`` that applies a corruption; use it anywhere in ``A.Compose``.

    Draws come from albumentations' own generator, so its seeds reproduce them. It takes uint8 or float32 in [0, 1], of
    shape (H, W) or (H, W, C), and returns the same.

    Args:
        corruption: Any corruption, or a composition of corruptions.
        severity: 0 to 5.
        p: Probability that an image is changed.

    Raises:
        KindError: ``corruption`` is not a shift.
        RangeError: ``severity`` leaves [0, 5], or ``p`` leaves [0, 1].
    """
    if not isinstance(corruption, Shift):
        raise KindError("as_albumentations", "a corruption", repr(corruption), "Pass e.g. GaussianNoise().")
    severity = check_severity(severity, "as_albumentations")
    if not 0 <= p <= 1:
        raise RangeError("as_albumentations", "p from 0 to 1", f"{p}", "p is a probability.")
    _albumentations()
    from ._albumentations import CorruptionTransform

    return CorruptionTransform(corruption, severity, p)
