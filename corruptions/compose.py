"""Shifts made of shifts: one after the other, or chosen for each sample."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, final

import torch
from torch import Tensor

from robustlab.core.corruption import STAGES, Corruption
from robustlab.core.errors import ConfigError, KindError, RangeError, RobustlabWarning, UnknownNameError
from robustlab.core.registry import COMBINATORS
from robustlab.core.shift import Shift, ShiftContext, from_bytes, to_bytes
from robustlab.core.types import Batch, ImageSpec

from ._parts import checked_probability, checked_shifts, checked_weights, first_reason, merged_parameters

Branches = list[tuple[int, Tensor, Any]]
"""Position of each part that is needed, the samples that get it, and its draws for them."""


@COMBINATORS.register("compose")
@dataclass(frozen=True)
class Compose(Shift):
    """Shifts one after the other, all at the same severity, with independent draws.

    Draws are keyed by position: equal parts are independent, and one that is added at the end changes no other. The
    order is kept as given; one that cannot happen in the making of an image (see ``Shift.stages``), such as noise
    before blur, is warned of. Bytes become floats once, before the first part, and are rounded once, after the last;
    parts in reference mode round for themselves.

    Args:
        shifts: Corruptions, attacks and other shifts, in order of application.

    Raises:
        KindError: Something is not a shift.
        ConfigError: The list is empty.
    """

    shifts: Sequence[Shift]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shifts", checked_shifts("Compose", self.shifts))
        late = [shift.label for shift in self.shifts[1:] if getattr(shift, "ignores_pixels", False)]
        if late:
            raise ConfigError(
                "Compose",
                "a stored set in the first place, since it ignores the pixels it is given",
                late[0],
                "Move it.",
            )
        clash = _clash(self.shifts)
        if clash is not None:
            warnings.warn(_order_message(self.shifts, *clash), RobustlabWarning, stacklevel=3)

    @property
    def label(self) -> str:
        return "+".join(shift.label for shift in self.shifts)

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(stage for shift in self.shifts for stage in shift.stages)

    @property
    def storable(self) -> bool:
        return self.shifts[-1].storable

    @property
    def takes_bytes(self) -> bool:
        return True

    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        return merged_parameters(self.shifts, severity)

    def skip_reason(self, spec: ImageSpec) -> str | None:
        return first_reason(self.shifts, spec)

    @final
    def prepare(self, batch: Batch, ctx: ShiftContext) -> Any:
        return [shift.prepare(batch, ctx.child(place)) for place, shift in enumerate(self.shifts)]

    @final
    def perform(self, batch: Batch, draws: Any, severity: float, ctx: ShiftContext) -> Batch:
        whole, last = batch.images.dtype == torch.uint8, len(self.shifts) - 1
        for place, (shift, drawn) in enumerate(zip(self.shifts, draws, strict=True)):
            # what rounds for itself, and what comes last, makes the same of bytes, and faster
            stays = shift.takes_bytes and (place == last or _rounds(shift))
            if batch.images.dtype == torch.uint8 and not stays:
                batch = batch.replace(from_bytes(batch.images))
            batch = shift.perform(batch, drawn, severity, ctx.child(place))
        return _as_before(batch, whole)


@COMBINATORS.register("one-of")
@dataclass(frozen=True)
class OneOf(Shift):
    """One shift for each sample, chosen by its key; only the chosen one is computed.

    Args:
        shifts: Corruptions, attacks and other shifts to choose from.
        weights: How often each is chosen, as positive numbers of any sum; equally often if None.

    Raises:
        KindError: Something is not a shift, or a weight no number.
        ConfigError: The list is empty.
        ShapeError: There are more or fewer weights than shifts.
        RangeError: A weight is not positive.
    """

    shifts: Sequence[Shift]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shifts", checked_shifts("OneOf", self.shifts))
        if self.weights is not None:
            object.__setattr__(self, "weights", checked_weights(self.weights, len(self.shifts)))

    @property
    def label(self) -> str:
        return "|".join(shift.label for shift in self.shifts)

    @property
    def stages(self) -> tuple[str, ...]:
        return _all_stages(self.shifts)

    @property
    def storable(self) -> bool:
        return all(shift.storable for shift in self.shifts)

    @property
    def takes_bytes(self) -> bool:
        return True

    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        return merged_parameters(self.shifts, severity)

    def skip_reason(self, spec: ImageSpec) -> str | None:
        return first_reason(self.shifts, spec)

    @final
    def prepare(self, batch: Batch, ctx: ShiftContext) -> Any:
        rng, count = ctx.rng(self.name, self.version, batch.ids), len(self.shifts)
        if self.weights is None:
            branch = rng.integers("branch", count).cpu()
        else:
            total = math.fsum(self.weights)
            ends = torch.tensor([math.fsum(self.weights[: place + 1]) / total for place in range(count - 1)])
            branch = torch.searchsorted(ends, rng.uniform("branch").cpu(), right=True)
        return _prepare(self.shifts, branch[:, None] == torch.arange(count), batch, ctx)

    @final
    def perform(self, batch: Batch, draws: Any, severity: float, ctx: ShiftContext) -> Batch:
        return _perform(self.shifts, draws, batch, severity, ctx)


@COMBINATORS.register("some-of")
@dataclass(frozen=True)
class SomeOf(Shift):
    """Several different shifts for each sample, chosen by its key, each set as often as any other, applied in order.

    Args:
        shifts: Corruptions, attacks and other shifts to choose from; those chosen are applied in this order.
        count: How many each sample gets, from 1 to all of them.

    Raises:
        KindError: Something is not a shift, or ``count`` no integer.
        ConfigError: The list is empty.
        RangeError: There are fewer shifts than ``count``, or it is below 1.
    """

    shifts: Sequence[Shift]
    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "shifts", checked_shifts("SomeOf", self.shifts))
        if isinstance(self.count, bool) or not isinstance(self.count, int):
            raise KindError("SomeOf", "count as an integer", repr(self.count), "Write SomeOf([...], count=2).")
        if not 1 <= self.count <= len(self.shifts):
            raise RangeError(
                "SomeOf", f"count from 1 to {len(self.shifts)}", f"{self.count}", "Each shift is used at most once."
            )
        clash = _clash(self.shifts) if self.count > 1 else None
        if clash is not None:
            warnings.warn(_order_message(self.shifts, *clash, who="SomeOf"), RobustlabWarning, stacklevel=3)

    @property
    def label(self) -> str:
        return f"{self.count}of({'|'.join(shift.label for shift in self.shifts)})"

    @property
    def stages(self) -> tuple[str, ...]:
        return _all_stages(self.shifts)

    @property
    def storable(self) -> bool:
        return all(shift.storable for shift in self.shifts[self.count - 1 :])  # any of these may come last

    @property
    def takes_bytes(self) -> bool:
        return True

    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        return merged_parameters(self.shifts, severity)

    def skip_reason(self, spec: ImageSpec) -> str | None:
        return first_reason(self.shifts, spec)

    @final
    def prepare(self, batch: Batch, ctx: ShiftContext) -> Any:
        rng, total = ctx.rng(self.name, self.version, batch.ids), len(self.shifts)
        order = torch.sort(rng.uniform("order", (total,)).cpu(), dim=1, stable=True).indices
        chosen = torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, : self.count], value=True)
        return _prepare(self.shifts, chosen, batch, ctx)

    @final
    def perform(self, batch: Batch, draws: Any, severity: float, ctx: ShiftContext) -> Batch:
        whole = batch.images.dtype == torch.uint8
        if whole and self.count > 1 and not _rounds(self):
            batch = batch.replace(from_bytes(batch.images))
        return _as_before(_perform(self.shifts, draws, batch, severity, ctx), whole)


@COMBINATORS.register("sometimes")
@dataclass(frozen=True)
class Sometimes(Shift):
    """A shift for some samples, chosen by their keys; the others stay as they are and cost nothing.

    Args:
        shift: A corruption, attack or other shift.
        p: Probability with which a sample gets it, from 0 to 1.

    Raises:
        KindError: ``shift`` is not a shift, or ``p`` no number.
        RangeError: ``p`` leaves [0, 1].
    """

    shift: Shift
    p: float

    def __post_init__(self) -> None:
        checked_shifts("Sometimes", [self.shift])
        object.__setattr__(self, "p", checked_probability("Sometimes", self.p))

    @property
    def label(self) -> str:
        inner = self.shift.label
        return f"({inner})?{self.p:g}" if "+" in inner or "|" in inner else f"{inner}?{self.p:g}"

    @property
    def stages(self) -> tuple[str, ...]:
        return self.shift.stages

    @property
    def storable(self) -> bool:
        return self.shift.storable

    @property
    def takes_bytes(self) -> bool:
        return True

    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        return {**merged_parameters([self.shift], severity), "p": (self.p, "probability")}

    def skip_reason(self, spec: ImageSpec) -> str | None:
        return first_reason([self.shift], spec)

    @final
    def prepare(self, batch: Batch, ctx: ShiftContext) -> Any:
        chance = ctx.rng(self.name, self.version, batch.ids).uniform("chance").cpu()
        return _prepare([self.shift], (chance.double() < self.p)[:, None], batch, ctx)

    @final
    def perform(self, batch: Batch, draws: Any, severity: float, ctx: ShiftContext) -> Batch:
        return _perform([self.shift], draws, batch, severity, ctx)


@COMBINATORS.register("by-scanner")
@dataclass(frozen=True)
class ByScanner(Shift):
    """A shift whose device noise (see ``FixedPattern``) is keyed by a group column: images of one scanner share it.

    Images without an entry in the column share a pattern, too.

    Args:
        shift: A corruption, or a composition with one in it.
        column: Group column of the data that names the scanner, site or device.

    Raises:
        KindError: ``shift`` is not a shift, or ``column`` no string.
    """

    shift: Shift
    column: str = "scanner"

    def __post_init__(self) -> None:
        checked_shifts("ByScanner", [self.shift])
        if not isinstance(self.column, str):
            raise KindError("ByScanner", "the name of a group column", repr(self.column), "For example 'scanner'.")
        if isinstance(self.shift, Corruption) and self.shift.keyed_by != "device":
            expected = "a corruption whose draws belong to the scanner, such as FixedPattern"
            raise ConfigError("ByScanner", expected, self.shift.label, "Use it without ByScanner: it has no scanner.")

    @property
    def label(self) -> str:
        return self.shift.label

    @property
    def stages(self) -> tuple[str, ...]:
        return self.shift.stages

    @property
    def storable(self) -> bool:
        return self.shift.storable

    @property
    def takes_bytes(self) -> bool:
        return self.shift.takes_bytes

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        return self.shift.parameters(severity)

    def skip_reason(self, spec: ImageSpec) -> str | None:
        return self.shift.skip_reason(spec)

    @final
    def prepare(self, batch: Batch, ctx: ShiftContext) -> Any:
        return self.shift.prepare(batch, self._keyed(batch, ctx))

    @final
    def perform(self, batch: Batch, draws: Any, severity: float, ctx: ShiftContext) -> Batch:
        return self.shift.perform(batch, draws, severity, self._keyed(batch, ctx))

    def _keyed(self, batch: Batch, ctx: ShiftContext) -> ShiftContext:
        if self.column not in batch.groups:
            have = ", ".join(batch.groups) or "none at all"
            raise UnknownNameError(
                f"ByScanner({self.shift.label})",
                f"a group column among: {have}",
                repr(self.column),
                "Pass the column to load_data(..., groups={...}).",
            )
        return dataclasses.replace(ctx, device_keys=batch.groups[self.column])


def _all_stages(shifts: Sequence[Shift]) -> tuple[str, ...]:
    found = {stage for shift in shifts for stage in shift.stages}
    return tuple(stage for stage in STAGES if stage in found)


def _span(shift: Shift) -> tuple[int, int] | None:
    """Return the places in ``STAGES`` that a shift's first stage has at most, and its last at least; None if unknown.

    Of a choice, the part decides that leaves the most freedom: what cannot happen, can happen with none of its parts.
    """
    if isinstance(shift, (Sometimes, ByScanner)):
        return _span(shift.shift)
    if isinstance(shift, (OneOf, SomeOf)):
        spans = [_span(part) for part in shift.shifts]
        known = [span for span in spans if span is not None]
        return (max(span[0] for span in known), min(span[1] for span in known)) if len(known) == len(spans) else None
    places = [STAGES.index(stage) for stage in shift.stages if stage in STAGES]
    if isinstance(shift, Compose):
        places = [place for part in shift.shifts for place in _span(part) or ()]
    return (min(places), max(places)) if places else None


def _clash(shifts: Sequence[Shift]) -> tuple[int, int] | None:
    """Return the first two positions whose shifts cannot happen in this order."""
    known = [(place, span) for place, shift in enumerate(shifts) if (span := _span(shift)) is not None]
    return next(((one, two) for (one, before), (two, after) in combinations(known, 2) if before[1] > after[0]), None)


def _order_message(shifts: Sequence[Shift], one: int, two: int, who: str = "Compose") -> str:
    before, after = _span(shifts[one]) or (0, 0), _span(shifts[two]) or (0, 0)
    late, early = STAGES[before[1]], STAGES[after[0]]
    parts: list[tuple[int, Shift]] = []
    for leaf in _leaves(shifts):
        span = _span(leaf)  # a part of unknown stage stays behind the one it was given after
        parts.append((span[0] if span is not None else parts[-1][0] if parts else 0, leaf))
    ordered = [leaf for _, leaf in sorted(parts, key=lambda part: part[0])]
    way = (
        f"the possible order is {', '.join(leaf.label for leaf in ordered)}"
        if _clash(ordered) is None
        else "no order of the parts is possible, since one of them spans several stages"
    )
    return (
        f"{who}: {shifts[one].label} ({late}) stands before {shifts[two].label} ({early}), but {early} comes first in "
        f"the making of an image; {way}. The given order is kept."
    )


def _leaves(shifts: Sequence[Shift]) -> list[Shift]:
    return [leaf for shift in shifts for leaf in (_leaves(shift.shifts) if isinstance(shift, Compose) else [shift])]


def _rounds(shift: Shift) -> bool:
    """Tell whether results are bytes anyhow, so that bytes may go in."""
    if isinstance(shift, (Compose, OneOf, SomeOf)):
        return all(_rounds(part) for part in shift.shifts)
    if isinstance(shift, (Sometimes, ByScanner)):
        return _rounds(shift.shift)
    return isinstance(shift, Corruption) and shift.mode == "reference" and shift.storable


def _as_before(batch: Batch, whole: bool) -> Batch:
    return batch.replace(to_bytes(batch.images)) if whole and batch.images.dtype != torch.uint8 else batch


def _prepare(shifts: Sequence[Shift], chosen: Tensor, batch: Batch, ctx: ShiftContext) -> Branches:
    """Return the draws of each part for the samples that get it.

    Args:
        shifts: P parts.
        chosen: bool (N, P), on the CPU.
        batch: N samples.
        ctx: Their context.
    """
    branches: Branches = []
    for place, shift in enumerate(shifts):
        index = chosen[:, place].nonzero().squeeze(1).to(batch.images.device)
        if len(index):
            branches.append((place, index, shift.prepare(batch.select(index), ctx.child(place).select(index))))
    return branches


def _perform(shifts: Sequence[Shift], branches: Branches, batch: Batch, severity: float, ctx: ShiftContext) -> Batch:
    """Return the batch after each part has worked on its samples, one part after the other."""
    if not branches:
        return batch
    images, masks = batch.images.clone(), None if batch.masks is None else batch.masks.clone()
    boxes = None if batch.boxes is None else list(batch.boxes)
    for place, index, drawn in branches:
        now = dataclasses.replace(batch, images=images, masks=masks, boxes=None if boxes is None else tuple(boxes))
        before = now.select(index)
        after = _run(shifts[place], before, drawn, severity, ctx.child(place).select(index))
        images.index_copy_(0, index, after.images)
        if masks is not None and after.masks is not None and after.masks is not before.masks:
            masks.index_copy_(0, index, after.masks)
        if boxes is not None and after.boxes is not None and after.boxes is not before.boxes:
            for where, box in zip(index.tolist(), after.boxes, strict=True):
                boxes[where] = box
    return dataclasses.replace(batch, images=images, masks=masks, boxes=None if boxes is None else tuple(boxes))


def _run(shift: Shift, batch: Batch, drawn: Any, severity: float, ctx: ShiftContext) -> Batch:
    if batch.images.dtype != torch.uint8 or shift.takes_bytes:
        return shift.perform(batch, drawn, severity, ctx)
    done = shift.perform(batch.replace(from_bytes(batch.images)), drawn, severity, ctx)
    return done.replace(to_bytes(done.images))
