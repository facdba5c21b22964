"""Transforms of other libraries as shifts, and shifts as transforms of other libraries.

A transform of albumentations, torchvision, MONAI or TorchIO draws from a stream, so what it does to an image depends on
all images before. As a shift it is seeded for each sample from the sample's key. Only images pass through: a transform
that moves them leaves masks and boxes where they were.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import random
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor

from robustlab.core.checks import check_severity
from robustlab.core.errors import ConfigError, KindError, MissingExtraError, RangeError, ShapeError
from robustlab.core.rng import stable_hash
from robustlab.core.shift import Shift, ShiftContext, from_bytes, to_bytes
from robustlab.core.types import Batch, ImageSpec
from robustlab.data.torch_data import same_random_state

from ._parts import checked_probability

_SEEDS = 0x7FFFFFFF


def _library(who: str, name: str) -> Any:
    """Import a library.

    Raises:
        MissingExtraError: It is not installed.
    """
    # albumentations asks the network for a newer version at import unless told not to
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _missing(who, name) from error


def _missing(who: str, name: str) -> MissingExtraError:
    package = name.partition(".")[0]
    return MissingExtraError(who, f"the package {package}", "no such package", f"Run: pip install {package}")


def _set_global_state(seed: int) -> None:
    random.seed(seed)
    np.random.set_state(np.random.RandomState(seed).get_state())  # noqa: NPY002
    torch.random.set_rng_state(torch.Generator().manual_seed(seed).get_state())


@dataclass(frozen=True)
class _Bridge(Shift):
    """What the bridges share: each sample is transformed alone, by a copy that is seeded from the sample's key.

    The global random state of Python, NumPy and torch has the same seed meanwhile, and is put back afterwards.
    """

    opaque: ClassVar[bool] = True
    package: ClassVar[str] = ""
    example: ClassVar[str] = ""

    transform: Any
    name: str = ""  # type: ignore[misc]  # pyright: ignore[reportIncompatibleVariableOverride] - one class, many transforms
    version: int = 1  # type: ignore[misc]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        who, package = type(self).__name__, self.package.partition(".")[0]
        if isinstance(self.transform, type) or not callable(self.transform):
            raise KindError(
                who,
                f"a transform of {package}, or a function from severity to one",
                repr(self.transform),
                f"Pass e.g. {self.example}.",
            )
        if importlib.util.find_spec(package) is None:
            raise _missing(who, package)
        object.__setattr__(self, "_named", bool(self.name))
        if not self.name:
            kind = getattr(self.transform, "__name__", type(self.transform).__name__).strip("<>")
            kebab = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", "-", kind).lower()
            object.__setattr__(self, "name", f"{package}:{kebab}")

    @property
    def cacheable(self) -> bool:
        return bool(getattr(self, "_named", False))

    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        return {"severity": (severity, "severity")}

    @final
    def prepare(self, batch: Batch, ctx: ShiftContext) -> Tensor:
        return ctx.rng(self.name, self.version, batch.ids).integers("seed", _SEEDS).cpu()

    @final
    def perform(self, batch: Batch, draws: Tensor, severity: float, ctx: ShiftContext) -> Batch:
        del ctx
        images = batch.images
        reason = self._refusal(images.shape[1])
        if reason:
            raise ShapeError(repr(self), f"images of {reason}", f"{images.shape[1]}", "Leave this shift out.")
        given = self._given(images.detach()).cpu()
        with same_random_state():  # which the user's function may change, too
            transform = self._at(severity)
            done = []
            for image, seed in zip(given, draws.tolist(), strict=True):
                _set_global_state(seed)
                self._seed(transform, seed)
                done.append(self._kept(self._apply(transform, image.clone()), image))
        changed = torch.stack(done)
        plain = from_bytes(changed) if changed.dtype == torch.uint8 else changed.clamp(0, 1)
        return batch.replace(plain.to(images.device, images.dtype))

    def _at(self, severity: float) -> Any:
        """Return a copy of the transform at a severity: seeding must not reach the caller's own pipeline."""
        kinds = self._kinds()
        made = self.transform if isinstance(self.transform, kinds) else self.transform(severity)
        if not isinstance(made, kinds):
            package = self.package.partition(".")[0]
            raise KindError(self.name, f"a transform of {package} from the function", repr(made), self.example)
        return copy.deepcopy(made)

    def _kept(self, changed: Any, image: Tensor) -> Tensor:
        """Return a result as a plain tensor of the image's shape and kind of numbers."""
        plain = torch.from_numpy(np.ascontiguousarray(changed)) if isinstance(changed, np.ndarray) else changed
        if not isinstance(plain, Tensor):
            raise KindError(self.name, "an image from the transform", type(changed).__name__, f"Use {self.example}.")
        plain = plain.as_subclass(Tensor).detach().cpu()
        floats = image.is_floating_point()
        if plain.shape != image.shape or (plain.dtype != image.dtype and not (floats and plain.is_floating_point())):
            raise ShapeError(
                self.name,
                f"a transform that keeps {_kind(image)}",
                _kind(plain),
                "Leave out crops, resizes and conversions such as Normalize or ToTensor.",
            )
        return plain.to(image.dtype)

    def _refusal(self, channels: int) -> str:
        """Return how many channels images should have instead; empty if these will do."""
        del channels
        return ""

    @abstractmethod
    def _kinds(self) -> tuple[type, ...]:
        """Return the classes of transforms, as opposed to functions that return one."""

    @abstractmethod
    def _given(self, images: Tensor) -> Tensor:
        """Return images as the library takes them one by one, uint8 or float32."""

    @abstractmethod
    def _apply(self, transform: Any, image: Tensor) -> Any:
        """Return one image transformed; the seeds are set."""

    def _seed(self, transform: Any, seed: int) -> None:
        """Seed the generators that the transform has of its own."""


@dataclass(frozen=True)
class FromAlbumentations(_Bridge):
    """Any albumentations transform as a shift.

    Each sample is transformed alone, as uint8 (H, W) or (H, W, 3), by a copy that is seeded from the sample's key;
    the result depends neither on the batch nor on the order of calls. The parts of a composition get a seed each.
    Give the transform ``p=1``, or it will skip samples. Masks and boxes are left alone.

    Args:
        transform: An albumentations transform or composition, used at every severity above 0; or a function from
            severity (above 0, at most 5) to one.
        name: Kebab-case name for tables and keys; also stands for the transform in fingerprints. The transform's class
            name if not given; results are then not kept in a cache, which could not tell two such transforms apart.
        version: Raise it when the transform changes: name and version are all that caches can compare.

    Raises:
        KindError: ``transform`` is neither.
        MissingExtraError: The library is not installed.
    """

    package: ClassVar[str] = "albumentations"
    example: ClassVar[str] = "A.CLAHE(p=1) or lambda severity: A.GaussianBlur(sigma_limit=(severity, severity), p=1)"

    def skip_reason(self, spec: ImageSpec) -> str | None:
        return None if spec.channels in (1, 3) else f"needs 1 or 3 channels, the images have {spec.channels}"

    def _refusal(self, channels: int) -> str:
        return "" if channels in (1, 3) else "1 or 3 channels"

    def _kinds(self) -> tuple[type, ...]:
        library = _library(type(self).__name__, self.package)
        return library.BasicTransform, library.BaseCompose

    def _given(self, images: Tensor) -> Tensor:
        return to_bytes(images)

    def _seed(self, transform: Any, seed: int) -> None:
        # albumentations gives all children the parent's seed, which correlates them: two equal noise stages would add
        # the same noise twice
        transform.set_random_seed(seed)
        for place, child in enumerate(getattr(transform, "transforms", ())):
            self._seed(child, stable_hash(seed, place) & _SEEDS)

    def _apply(self, transform: Any, image: Tensor) -> Any:
        grey = len(image) == 1
        pixels = (image[0] if grey else image.permute(1, 2, 0)).contiguous().numpy()
        changed = np.asarray(transform(image=pixels)["image"])
        if grey and changed.ndim == 2:
            changed = changed[..., None]
        return np.moveaxis(changed, -1, 0) if changed.ndim == 3 else changed


@dataclass(frozen=True)
class FromTorchvision(_Bridge):
    """Any torchvision transform (``v2``, or an ``nn.Module``) as a shift.

    Each sample is transformed alone, as a tensor (C, H, W), with torch's global generator seeded from the sample's key
    and put back afterwards; a whole batch would share one set of random parameters. Masks and boxes are left alone.

    Args:
        transform: A transform, composition or module, used at every severity above 0; or a function from severity
            (above 0, at most 5) to one.
        name: As of ``FromAlbumentations``.
        version: As of ``FromAlbumentations``.
        pixels: What the transform takes: ``"uint8"``, or ``"float32"`` in [0, 1], as ``v2.GaussianNoise`` needs.

    Raises:
        KindError: ``transform`` is neither.
        ConfigError: ``pixels`` is misspelt.
        MissingExtraError: The library is not installed.
    """

    package: ClassVar[str] = "torchvision"
    example: ClassVar[str] = "v2.ColorJitter(contrast=0.5) or lambda severity: v2.GaussianBlur(9, sigma=severity)"

    pixels: Literal["uint8", "float32"] = "uint8"

    def __post_init__(self) -> None:
        if self.pixels not in ("uint8", "float32"):
            raise ConfigError(
                "FromTorchvision", "pixels 'uint8' or 'float32'", repr(self.pixels), "Check the spelling."
            )
        super().__post_init__()

    def _kinds(self) -> tuple[type, ...]:
        first = _library(type(self).__name__, "torchvision.transforms")
        return torch.nn.Module, first.Compose

    def _given(self, images: Tensor) -> Tensor:
        return to_bytes(images) if self.pixels == "uint8" else images.to(torch.float32)

    def _apply(self, transform: Any, image: Tensor) -> Any:
        return transform(image)


@dataclass(frozen=True)
class FromMONAI(_Bridge):
    """Any MONAI array transform as a shift.

    Each sample is transformed alone, as a float32 tensor (C, H, W) in [0, 1], by a copy whose random states are seeded
    from the sample's key, each part with a seed of its own; results are clipped to [0, 1]. Give the transform
    ``prob=1``, or it will skip samples. Masks and boxes are left alone.

    Args:
        transform: A MONAI transform or composition, used at every severity above 0; or a function from severity (above
            0, at most 5) to one. Dictionary transforms are not taken.
        name: As of ``FromAlbumentations``.
        version: As of ``FromAlbumentations``.

    Raises:
        KindError: ``transform`` is neither.
        MissingExtraError: The library is not installed.
    """

    package: ClassVar[str] = "monai.transforms"
    example: ClassVar[str] = "RandBiasField(prob=1) or lambda severity: RandRicianNoise(prob=1, std=0.02 * severity)"

    def _kinds(self) -> tuple[type, ...]:
        return (_library(type(self).__name__, self.package).Transform,)

    def _at(self, severity: float) -> Any:
        made = super()._at(severity)
        if isinstance(made, _library(type(self).__name__, self.package).MapTransform):
            got = type(made).__name__
            raise KindError(self.name, "an array transform", f"the dictionary transform {got}", f"Use {self.example}.")
        return made

    def _given(self, images: Tensor) -> Tensor:
        return images.to(torch.float32)

    def _seed(self, transform: Any, seed: int) -> None:
        library = _library(type(self).__name__, self.package)
        # the root seeds what it knows of, each with a seed of its own; anything else would go on drawing from where the
        # last sample left it
        for place, part in enumerate(_parts(transform, library.Transform)):
            if isinstance(part, library.Randomizable):
                part.set_random_state(stable_hash(seed, place) & _SEEDS)
        if isinstance(transform, library.Randomizable):
            transform.set_random_state(seed)

    def _apply(self, transform: Any, image: Tensor) -> Any:
        changed = transform(image)
        return changed.as_tensor() if hasattr(changed, "as_tensor") else changed


@dataclass(frozen=True)
class FromTorchIO(_Bridge):
    """Any TorchIO transform as a shift.

    Each sample is transformed alone, as a float32 tensor (C, H, W, 1) in [0, 1], with torch's global generator seeded
    from the sample's key and put back afterwards; results are clipped to [0, 1]. Masks and boxes are left alone.

    Args:
        transform: A TorchIO transform or composition, used at every severity above 0; or a function from severity
            (above 0, at most 5) to one.
        name: As of ``FromAlbumentations``.
        version: As of ``FromAlbumentations``.

    Raises:
        KindError: ``transform`` is neither.
        MissingExtraError: The library is not installed.
    """

    package: ClassVar[str] = "torchio"
    example: ClassVar[str] = "tio.RandomGhosting() or lambda severity: tio.RandomNoise(std=(0.02 * severity,) * 2)"

    def _kinds(self) -> tuple[type, ...]:
        return (_library(type(self).__name__, self.package).Transform,)

    def _given(self, images: Tensor) -> Tensor:
        return images.to(torch.float32)

    def _apply(self, transform: Any, image: Tensor) -> Any:
        changed = transform(image[..., None])
        flat = isinstance(changed, Tensor) and changed.ndim == 4 and changed.shape[3] == 1
        return changed[..., 0] if flat else changed


def as_albumentations(corruption: Shift, *, severity: float | tuple[float, float] = 3.0, p: float = 0.5) -> Any:
    """Return an ``albumentations.ImageOnlyTransform`` that applies a corruption; use it anywhere in ``A.Compose``.

    Draws come from albumentations' own generator, so its seeds reproduce them. It takes uint8 or float32 in [0, 1], of
    shape (H, W) or (H, W, C), and returns the same. Every image counts as one of a scanner of its own.

    Args:
        corruption: Any corruption, or a composition of corruptions.
        severity: 0 to 5, or (low, high), from which it is drawn for each image.
        p: Probability that an image is changed.

    Raises:
        KindError: ``corruption`` is not a shift, or ``severity`` neither a number nor a pair of numbers.
        RangeError: ``severity`` leaves [0, 5], or ``p`` leaves [0, 1].
    """
    who = "as_albumentations"
    _check_shift(who, corruption)
    low, high = _severities(who, severity)
    chance = checked_probability(who, p)
    _library(who, "albumentations")
    from ._albumentations import CorruptionTransform

    return CorruptionTransform(corruption, (low, high), chance)


def as_torchvision(corruption: Shift, *, severity: float | tuple[float, float] = 3.0, p: float = 0.5) -> Any:
    """Return a ``torchvision.transforms.v2.Transform`` that applies a corruption; use it anywhere in ``v2.Compose``.

    Draws come from torch's global generator, so ``torch.manual_seed`` and the workers of a ``DataLoader`` reproduce
    them. It takes Pillow images (grey or RGB) and tensors, uint8 or float in [0, 1], of shape (..., C, H, W), and
    returns the same; each image of a batch has draws of its own. Place it before normalisation. Labels, masks and boxes
    pass unchanged. Every image counts as one of a scanner of its own.

    Args:
        corruption: Any corruption, or a composition of corruptions.
        severity: 0 to 5, or (low, high), from which it is drawn for each image.
        p: Probability that an image is changed.

    Raises:
        KindError: ``corruption`` is not a shift, or ``severity`` neither a number nor a pair of numbers.
        RangeError: ``severity`` leaves [0, 5], or ``p`` leaves [0, 1].
        MissingExtraError: torchvision is not installed.
    """
    who = "as_torchvision"
    _check_shift(who, corruption)
    low, high = _severities(who, severity)
    chance = checked_probability(who, p)
    _library(who, "torchvision")
    from ._torchvision import CorruptionTransform

    return CorruptionTransform(corruption, (low, high), chance)


def run_keyed(shift: Shift, images: Tensor, severity: float, keys: Tensor) -> Tensor:
    """Return images, uint8 or float (N, C, H, W), under a shift whose draws are keyed by ``keys``, int64 (N,)."""
    ctx = ShiftContext(device_keys=keys)
    whole = images.dtype == torch.uint8
    given = from_bytes(images) if whole and not shift.takes_bytes else images
    changed = shift.on(Batch(given, labels=None, ids=keys), severity, ctx).images
    return to_bytes(changed) if whole and changed.dtype != torch.uint8 else changed


def _check_shift(who: str, corruption: object) -> None:
    if not isinstance(corruption, Shift):
        raise KindError(who, "a corruption", repr(corruption), "Pass e.g. GaussianNoise().")


def _severities(who: str, severity: object) -> tuple[float, float]:
    if not isinstance(severity, (tuple, list)):
        return (check_severity(severity, who),) * 2  # type: ignore[arg-type]
    if len(severity) != 2:
        raise KindError(who, "severity as a number or a pair (low, high)", repr(severity), "Pass e.g. (1, 4).")
    low, high = (check_severity(value, who) for value in severity)
    if low > high:
        raise RangeError(who, "severity=(low, high) with low <= high", f"{severity}", "Swap the two.")
    return low, high


def _parts(root: Any, kind: type) -> Iterator[Any]:
    """Iterate over an object of a kind and those of that kind that it holds, at any depth."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, (list, tuple)):
            waiting.extend(reversed(thing))
        elif isinstance(thing, kind) and id(thing) not in seen:
            seen.add(id(thing))
            yield thing
            waiting.extend(vars(thing).values())


def _kind(image: Tensor) -> str:
    return f"{str(image.dtype).removeprefix('torch.')} images of shape {tuple(image.shape)}"
