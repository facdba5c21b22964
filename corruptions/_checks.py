"""The check of physical parameters."""

from __future__ import annotations

from robustlab.core.errors import KindError, RangeError
from robustlab.core.levels import Levels


def check_levels(who: object, parameter: str, levels: object, low: float, high: float = float("inf")) -> None:
    """Check that every level of a parameter lies in [``low``, ``high``].

    Raises:
        KindError: A number was given in their place.
        RangeError: One does not.
    """
    if not isinstance(levels, Levels):
        name = type(who).__name__
        raise KindError(
            name,
            f"{parameter} as Levels: one value for each severity",
            f"{levels!r}",
            f"For one fixed value write {name}.at({parameter}={levels!r}).",
        )
    if min(levels.values) < low or max(levels.values) > high:
        upper = f"at most {high:g}" if high < float("inf") else "finite"
        raise RangeError(
            type(who).__name__,
            f"{parameter} at least {low:g} and {upper} ({levels.unit})",
            f"{levels.values[0] if levels.fixed else levels.values}",
            f"{levels.identity:g} changes nothing; move away from it inside the range.",
        )
