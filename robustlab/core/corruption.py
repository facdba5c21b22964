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
from .shift import Shift, ShiftContext
from .types import Batch, ImageSpec

Draws = Mapping[str, Tensor]


class Corruption(Shift):
    """A change that acquisition, processing or storage makes to images.

    Subclasses are frozen dataclasses; each field of type ``Levels`` is a physical parameter, the first of which is the
    amount that reports print. They implement ``draw`` and ``apply``.
    """

    family: ClassVar[str] = "other"
    channels: ClassVar[tuple[int, ...] | None] = None
    modalities: ClassVar[tuple[str, ...] | None] = None
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "safe"

    @abstractmethod
    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        """Return random tensors (N, ...) for images of ``shape`` (C, H, W); may not depend on pixels or severity."""

    @abstractmethod
    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        """Return changed images, float32 (N, C, H, W); values outside [0, 1] are clipped afterwards.

        Args:
            images: float32 (N, C, H, W) in [0, 1]; must not be changed in place.
            draws: What ``draw`` returned.
            values: Parameter name to physical value.
        """

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

    def skip_reason(self, spec: ImageSpec) -> str | None:
        if self.channels is not None and spec.channels not in self.channels:
            wanted = " or ".join(map(str, self.channels))
            return f"needs {wanted} channels, the images have {spec.channels}"
        if self.modalities is not None and spec.modality is not None and spec.modality not in self.modalities:
            return f"made for {', '.join(self.modalities)}, the images are {spec.modality}"
        return None

    @final
    def prepare(self, batch: Batch, ctx: ShiftContext) -> Any:
        _, channels, height, width = batch.images.shape
        return self.draw(ctx.rng(self.name, self.version, batch.ids), (channels, height, width))

    @final
    def perform(self, batch: Batch, draws: Any, severity: float, ctx: ShiftContext) -> Batch:
        del ctx
        if self.channels is not None and batch.images.shape[1] not in self.channels:
            raise ConfigError(
                repr(self),
                f"images with {' or '.join(map(str, self.channels))} channels",
                f"{batch.images.shape[1]}",
                "Leave this corruption out for such images.",
            )
        values = {name: levels.at(severity) for name, levels in self.levels().items()}
        images = batch.images.to(torch.float32)
        changed = self.apply(images, draws, values).clamp(0, 1)
        return batch.replace(changed.to(batch.images.dtype))
