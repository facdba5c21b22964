"""What compositions ask of their parts: checks of arguments, merged parameters, reasons to skip."""

from __future__ import annotations

import math
from collections.abc import Sequence

from robustlab.core.errors import ConfigError, KindError, RangeError, ShapeError
from robustlab.core.shift import Shift
from robustlab.core.types import ImageSpec


def checked_probability(who: str, p: object) -> float:
    """Return a probability as float.

    Raises:
        KindError: It is not a number.
        RangeError: It lies outside [0, 1].
    """
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise KindError(who, "p as a number from 0 to 1", repr(p), "p is a probability, e.g. 0.5.")
    if not 0 <= p <= 1:
        raise RangeError(who, "p from 0 to 1", f"{p}", "p is a probability.")
    return float(p)


def checked_shifts(who: str, shifts: object) -> tuple[Shift, ...]:
    """Return a list of shifts as a tuple.

    Raises:
        KindError: Something is not a shift.
        ConfigError: The list is empty.
    """
    if not isinstance(shifts, Sequence) or isinstance(shifts, str):
        raise KindError(who, "a list of shifts", type(shifts).__name__, f"Write {who}([GaussianNoise(), JPEG()]).")
    for shift in shifts:
        if not isinstance(shift, Shift):
            hint = "Make an instance: add ()." if isinstance(shift, type) else "Look a name up with robustlab.resolve."
            raise KindError(who, "shifts", repr(shift), hint)
    if not shifts:
        raise ConfigError(who, "at least one shift", "none", "For the clean image use severity=0.")
    return tuple(shifts)


def checked_weights(weights: object, count: int) -> tuple[float, ...]:
    """Return the weights of ``count`` shifts as floats.

    Raises:
        KindError: They are not numbers.
        RangeError: One is not positive.
        ShapeError: There are more or fewer than shifts.
    """
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        raise KindError("OneOf", "weights as a list of numbers", repr(weights), "Give each shift one, e.g. (3, 1).")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise KindError("OneOf", "weights as numbers", repr(weight), "Give each shift one, e.g. (3, 1).")
        if not (weight > 0 and math.isfinite(weight)):
            raise RangeError("OneOf", "positive weights", f"{weight}", "Leave out a shift that is never wanted.")
    if len(weights) != count:
        raise ShapeError("OneOf", f"{count} weights, one a shift", f"{len(weights)}", "Give each shift one.")
    return tuple(float(weight) for weight in weights)


def merged_parameters(shifts: Sequence[Shift], severity: float) -> dict[str, tuple[float, str]]:
    """Return all parameters, named ``position.label.parameter`` with positions from 1."""
    return {
        f"{place}.{shift.label}.{name}": value
        for place, shift in enumerate(shifts, start=1)
        for name, value in shift.parameters(severity).items()
    }


def first_reason(shifts: Sequence[Shift], spec: ImageSpec) -> str | None:
    """Return the label of the first shift that does not apply to such images, and why, or None."""
    reasons = ((shift.label, shift.skip_reason(spec)) for shift in shifts)
    return next((f"{label} {reason}" for label, reason in reasons if reason is not None), None)
