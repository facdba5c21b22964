"""Shifts made of shifts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from robustlab.core.errors import ConfigError, KindError
from robustlab.core.registry import COMBINATORS
from robustlab.core.shift import Shift, ShiftContext
from robustlab.core.types import Batch, ImageSpec


def _checked(who: str, shifts: object) -> tuple[Shift, ...]:
    if not isinstance(shifts, Sequence) or isinstance(shifts, str):
        raise KindError(who, "a list of shifts", type(shifts).__name__, f"Write {who}([GaussianNoise(), JPEG()]).")
    for shift in shifts:
        if not isinstance(shift, Shift):
            hint = "Make an instance: add ()." if isinstance(shift, type) else "Look a name up with robustlab.resolve."
            raise KindError(who, "shifts", repr(shift), hint)
    if not shifts:
        raise ConfigError(who, "at least one shift", "none", "For the clean image use severity=0.")
    return tuple(shifts)


def _merged(shifts: Sequence[Shift], severity: float) -> dict[str, tuple[float, str]]:
    """Return all parameters, named ``position.label.parameter`` with positions from 1."""
    return {
        f"{place}.{shift.label}.{name}": value
        for place, shift in enumerate(shifts, start=1)
        for name, value in shift.parameters(severity).items()
    }


def _first_reason(shifts: Sequence[Shift], spec: ImageSpec) -> str | None:
    reasons = ((shift.label, shift.skip_reason(spec)) for shift in shifts)
    return next((f"{label} {reason}" for label, reason in reasons if reason is not None), None)


@COMBINATORS.register("compose")
@dataclass(frozen=True)
class Compose(Shift):
    """Shifts one after the other, all at the same severity, with independent draws.

    Args:
        shifts: Corruptions, attacks and other shifts, in order of application.

    Raises:
        KindError: Something is not a shift.
        ConfigError: The list is empty.
    """

    shifts: Sequence[Shift]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shifts", _checked("Compose", self.shifts))

    @property
    def label(self) -> str:
        return "+".join(shift.label for shift in self.shifts)

    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        return _merged(self.shifts, severity)

    def skip_reason(self, spec: ImageSpec) -> str | None:
        return _first_reason(self.shifts, spec)

    @final
    def prepare(self, batch: Batch, ctx: ShiftContext) -> Any:
        return [shift.prepare(batch, ctx.child(place)) for place, shift in enumerate(self.shifts)]

    @final
    def perform(self, batch: Batch, draws: Any, severity: float, ctx: ShiftContext) -> Batch:
        for place, (shift, drawn) in enumerate(zip(self.shifts, draws, strict=True)):
            batch = shift.perform(batch, drawn, severity, ctx.child(place))
        return batch


@COMBINATORS.register("one-of")
@dataclass(frozen=True)
class OneOf(Shift):
    """One shift for each sample, chosen with equal probability; only the chosen one is computed.

    Args:
        shifts: Corruptions, attacks and other shifts to choose from.

    Raises:
        KindError: Something is not a shift.
        ConfigError: The list is empty.
    """

    shifts: Sequence[Shift]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shifts", _checked("OneOf", self.shifts))

    @property
    def label(self) -> str:
        return "|".join(shift.label for shift in self.shifts)

    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        return _merged(self.shifts, severity)

    def skip_reason(self, spec: ImageSpec) -> str | None:
        return _first_reason(self.shifts, spec)

    @final
    def prepare(self, batch: Batch, ctx: ShiftContext) -> Any:
        chosen = ctx.rng(self.name, self.version, batch.ids).integers("branch", len(self.shifts)).cpu()
        branches: list[tuple[int, Tensor, Any]] = []
        for place, shift in enumerate(self.shifts):
            index = (chosen == place).nonzero().squeeze(1).to(batch.images.device)
            if len(index):
                branches.append((place, index, shift.prepare(batch.select(index), ctx.child(place).select(index))))
        return branches

    @final
    def perform(self, batch: Batch, draws: Any, severity: float, ctx: ShiftContext) -> Batch:
        images = torch.empty_like(batch.images)
        for place, index, drawn in draws:
            part = self.shifts[place].perform(batch.select(index), drawn, severity, ctx.child(place).select(index))
            images.index_copy_(0, index, part.images)
        return batch.replace(images)
