"""Severity to physical parameter: five anchors, interpolated in between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from .errors import ConfigError, KindError, RangeError

MAX_SEVERITY = 5.0


@dataclass(frozen=True)
class Levels:
    """A physical parameter at severities 1 to 5.

    Args:
        values: The five anchors, in ``unit``.
        identity: Value that changes nothing (severity 0); may be ``math.inf``.
        unit: Physical unit, e.g. ``"of full range"`` or ``"px"``.
        scale: Interpolation between anchors: ``"linear"`` or ``"log"`` (geometric).
        fixed: The parameter has one value at every severity above 0.
    """

    values: tuple[float, ...]
    identity: float
    unit: str
    scale: Literal["linear", "log"] = "linear"
    fixed: bool = False

    def __post_init__(self) -> None:
        given: tuple[object, ...] = self.values
        for value in given:
            if isinstance(value, bool) or not isinstance(value, Real):
                raise KindError("Levels", "numbers", f"{value!r}", f"Give the value in its unit: {self.unit}.")
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        if len(self.values) != 5:
            raise ConfigError(
                "Levels", "five values, for severities 1 to 5", f"{len(self.values)}", "Use .at() for one fixed value."
            )
        if any(not math.isfinite(value) for value in self.values):
            raise RangeError("Levels", "finite values", f"{self.values}", "Only the identity may be infinite.")
        if self.scale == "log" and not self.fixed and min(self.values) <= 0:
            raise RangeError("Levels", "positive values on a log scale", f"{self.values}", "Use scale='linear'.")

    def at(self, severity: float) -> float:
        """Return the parameter at a severity in [0, 5]; anchors are returned exactly."""
        if severity == 0:
            return self.identity
        if self.fixed:
            return self.values[0]
        if severity < 1:
            if math.isinf(self.identity):
                return self.values[0] / severity
            return self.identity + severity * (self.values[0] - self.identity)
        low = min(int(severity), 4)
        weight = severity - low
        first, second = self.values[low - 1], self.values[low]
        if weight == 0:
            return first
        if weight == 1:
            return second
        if self.scale == "log":
            return float(first * (second / first) ** weight)
        return first + weight * (second - first)

    def fix(self, value: float) -> Levels:
        """Return levels that have ``value`` at every severity above 0."""
        return Levels((value,) * 5, self.identity, self.unit, self.scale, fixed=True)
