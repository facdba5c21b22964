"""Corruption: a shift with a draw/apply split and physical parameters at five severities."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, final

import torch
from torch import Tensor

from .errors import ConfigError
from .levels import Levels
from .rng import SampleRng
from .shift import Shift, ShiftContext, from_bytes, to_bytes
from .types import Batch, ImageSpec, modality_tag

_BLOCK = 1 << 17  # pixels worked on at once on the CPU: 512 KB as float32, which stays in a core's cache

Draws = Mapping[str, Tensor]

STAGES = (
    "subject",
    "optics",
    "sampling",
    "photons",
    "electronics",
    "exposure",
    "processing",
    "display",
    "overlay",
    "compression",
    "transport",
)
"""What happens to an image from the patient to the screen, in order; nothing can happen before what made its input."""


class Corruption(Shift):
    """A change that acquisition, processing or storage makes to images.

    Subclasses are frozen dataclasses; each field of type ``Levels`` is a physical parameter, the first of which is the
    amount that reports print. They implement ``apply``, and ``draw`` where something is random.

    ``mode`` is ``"physical"``, or ``"reference"`` for published operators with their source's own rounding and faults.
    ``stage`` says where in the making of an image it acts, one of ``STAGES``. ``domain`` is what its formula works on:
    display values or optical density. ``modalities`` names those for which it is made (None: any), ``seen_in`` those
    where it is met, for lists. ``min_size`` is the shortest side that it can work on.
    ``keyed_by`` is ``"device"`` where the draws belong to the scanner: all its images share them, in any epoch.
    ``gradual`` is False where the slightest severity is a visible step already, as saving through a codec is.
    """

    family: ClassVar[str] = "other"
    mode: ClassVar[Literal["physical", "reference"]] = "physical"
    stage: ClassVar[str] = ""
    domain: ClassVar[Literal["display", "optical density"]] = "display"
    channels: ClassVar[tuple[int, ...] | None] = None
    min_size: ClassVar[int] = 1
    modalities: ClassVar[tuple[str, ...] | None] = None
    seen_in: ClassVar[tuple[str, ...] | None] = None
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "safe"
    keyed_by: ClassVar[Literal["sample", "device"]] = "sample"
    gradual: ClassVar[bool] = True

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        """Return random tensors (N, ...) for images of ``shape`` (C, H, W); may not depend on pixels or severity.

        By default nothing is random.
        """
        del rng, shape
        return {}

    @abstractmethod
    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        """Return changed images, float32 (N, C, H, W); values outside [0, 1] are clipped afterwards.

        Args:
            images: float32 (N, C, H, W) in [0, 1]; must not be changed in place.
            draws: What ``draw`` returned.
            values: Parameter name to physical value.
        """

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        """Return changed uint8 images (N, C, H, W) of uint8 images; by default ``apply``, rounded half to even.

        Override it where bytes have a faster way to the same result.
        """
        pixels = pixels.contiguous()  # sums over strided planes are several times slower
        out = torch.empty_like(pixels)
        # a few images at a time: what lies between stays in the processor's cache
        step = max(1, _BLOCK // max(1, pixels[0].numel())) if pixels.device.type == "cpu" else len(pixels)
        for start in range(0, len(pixels), step):
            block = slice(start, start + step)
            part = {name: value[block] for name, value in draws.items()}
            out[block] = to_bytes(self.apply(from_bytes(pixels[block]), part, values))
        return out

    def move_labels(self, batch: Batch, draws: Draws, values: Mapping[str, float]) -> Batch:
        """Return the batch with masks and boxes where the content of the images goes; by default nothing moves."""
        del draws, values
        return batch

    @classmethod
    def at(cls, **values: float) -> Self:
        """Return the corruption with parameters fixed to physical values at every severity above 0.

        Raises:
            ConfigError: A name is not a parameter of this corruption.
        """
        plain = cls()
        levels = plain.levels()
        for name in values:
            if name not in levels:
                raise ConfigError(
                    f"{cls.__name__}.at", f"parameters among {', '.join(levels)}", repr(name), "Check the spelling."
                )
        return dataclasses.replace(plain, **{name: levels[name].fix(value) for name, value in values.items()})  # type: ignore[type-var]

    def levels(self) -> dict[str, Levels]:
        """Return parameter name to its levels."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name: value for field in fields if isinstance(value := getattr(self, field.name), Levels)}

    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        return {name: (levels.at(severity), levels.unit) for name, levels in self.levels().items()}

    @property
    def stages(self) -> tuple[str, ...]:
        return (self.stage,) if self.stage else ()

    @property
    def takes_bytes(self) -> bool:
        return True

    def skip_reason(self, spec: ImageSpec) -> str | None:
        if min(spec.size) < self.min_size:
            return f"needs at least {self.min_size} px along each side, the images are {spec.size[0]} x {spec.size[1]}"
        if self.channels is not None and spec.channels not in self.channels:
            wanted = " or ".join(map(str, self.channels))
            return f"needs {wanted} channels, the images have {spec.channels}"
        made_for = map(modality_tag, self.modalities or ())
        if self.modalities is not None and spec.modality is not None and spec.modality not in made_for:
            return f"made for {', '.join(self.modalities)}, the images are {spec.modality}"
        return None

    @final
    def prepare(self, batch: Batch, ctx: ShiftContext) -> Any:
        _, channels, height, width = batch.images.shape
        shape = (channels, height, width)
        if self.keyed_by == "sample":
            return self.draw(ctx.rng(self.name, self.version, batch.ids), shape)
        # few scanners take many images: the draws of each are made once
        keys, places = ctx.devices(batch.ids)
        draws = self.draw(ctx.still().rng(self.name, self.version, keys), shape)
        if len(keys) == 1:
            return {name: value.expand(len(places), *value.shape[1:]) for name, value in draws.items()}
        return {name: value.index_select(0, places) for name, value in draws.items()}

    @final
    def perform(self, batch: Batch, draws: Any, severity: float, ctx: ShiftContext) -> Batch:
        del ctx
        self._check(batch.images)
        values = {name: levels.at(severity) for name, levels in self.levels().items()}
        if batch.masks is not None or batch.boxes is not None:
            batch = self.move_labels(batch, draws, values)
        if batch.images.dtype == torch.uint8:
            return batch.replace(self.apply_bytes(batch.images, draws, values))
        images = batch.images.to(torch.float32)
        if self.storable:
            # what came before in a chain may have left [0, 1]
            changed = self.apply(images.clamp(0, 1), draws, values).clamp(0, 1)
        else:
            changed = self.apply(images, draws, values)
        return batch.replace(changed.to(batch.images.dtype))

    def _check(self, images: Tensor) -> None:
        _, channels, height, width = images.shape
        wanted, got = "", ""
        if self.channels is not None and channels not in self.channels:
            wanted, got = f"images with {' or '.join(map(str, self.channels))} channels", f"{channels}"
        elif min(height, width) < self.min_size:
            wanted, got = f"images of at least {self.min_size} x {self.min_size} px", f"{height} x {width}"
        if wanted:
            raise ConfigError(self.label, wanted, got, "Leave this corruption out for such images.")
