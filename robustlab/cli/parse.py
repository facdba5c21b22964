"""Small parsers shared by the verbs."""

from __future__ import annotations

from fractions import Fraction

from robustlab.core.errors import ConfigError


def parse_severities(text: str) -> tuple[float, ...]:
    """Parse ``"1-5"`` or ``"1,3,5"``.

    Raises:
        ConfigError: Neither form.
    """
    try:
        if "-" in text:
            low, high = text.split("-")
            return tuple(float(value) for value in range(int(low), int(high) + 1))
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            "--severities", "a range such as 1-5 or a list such as 1,3,5", repr(text), "Try 1-5."
        ) from None


def parse_pairs(items: list[str], option: str) -> dict[str, str]:
    """Parse repeated ``name=value`` options.

    Raises:
        ConfigError: No equals sign, or a name twice.
    """
    pairs: dict[str, str] = {}
    for item in items:
        name, sign, value = item.partition("=")
        if not sign or not name or name in pairs:
            raise ConfigError(
                option, "name=value, each name once", repr(item), f"For example {option} far/photos=photos.npz"
            )
        pairs[name] = value
    return pairs


def parse_attack(text: str) -> tuple[str, str, tuple[float, ...]]:
    """Parse ``"pgd:linf:1/255,2/255"`` into name, norm and budgets.

    Raises:
        ConfigError: Another form.
    """
    try:
        name, norm, budgets = text.split(":")
        return name, norm, tuple(float(Fraction(part)) for part in budgets.split(","))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            "--attack",
            "NAME:NORM:BUDGETS such as pgd:linf:1/255,2/255,4/255",
            repr(text),
            "Budgets are on the [0, 1] scale.",
        ) from None
