"""The plan of an evaluation: which conditions are run, and which do not apply and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from robustlab.core.attack import Attack
from robustlab.core.checks import check_severity
from robustlab.core.errors import ConfigError, KindError
from robustlab.core.registry import ATTACKS, CORRUPTIONS, SUITES
from robustlab.core.shift import Shift
from robustlab.core.spec import fingerprint, to_dict
from robustlab.core.types import ImageSpec

Kind = Literal["clean", "corruption", "attack", "ood"]


@dataclass(frozen=True)
class Condition:
    """One row block of the report: a shift at a severity, or clean data.

    Args:
        key: Unique key, e.g. ``"gaussian-noise@3"``.
        kind: What sort of condition it is.
        label: Shift label.
        severity: 0 for clean.
        amount: Value of the shift's first parameter; NaN if it has none.
        unit: Its unit.
        parameters: Parameter name to (value, unit).
    """

    key: str
    kind: Kind
    label: str
    severity: float = 0.0
    amount: float = float("nan")
    unit: str = ""
    parameters: Mapping[str, tuple[float, str]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Sweep:
    """One shift with its conditions, in the order of severity; draws are made once for all of them."""

    shift: Shift
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """All that will be run on the in-distribution data.

    Args:
        sweeps: Shifts and attacks with their conditions.
        skipped: (what, why) of everything that does not apply.
    """

    sweeps: tuple[Sweep, ...]
    skipped: tuple[tuple[str, str], ...]

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Clean first, then every condition of every sweep."""
        return (CLEAN, *(condition for sweep in self.sweeps for condition in sweep.conditions))


CLEAN = Condition(key="clean", kind="clean", label="clean")


def resolve_shifts(shifts: str | Shift | Sequence[str | Shift]) -> tuple[Shift, ...]:
    """Turn names of suites and corruptions, shifts, or a mix of them into shifts.

    Raises:
        UnknownNameError: A name is neither a suite nor a corruption.
        KindError: An element is neither a name nor a shift.
    """
    if isinstance(shifts, (str, Shift)):
        shifts = (shifts,)
    found: list[Shift] = []
    for item in shifts:
        if isinstance(item, Shift):
            found.append(item)
        elif isinstance(item, str):
            found.extend(SUITES.get(item)() if item in SUITES else (CORRUPTIONS.get(item)(),))
        else:
            raise KindError(
                "evaluate_under_shift",
                "shifts as names or Shift objects",
                f"{item!r}",
                "Wrap a transform of another library with robustlab.FromAlbumentations, or register a corruption.",
            )
    return tuple(found)


def resolve_attacks(attacks: str | Attack | Sequence[str | Attack]) -> tuple[Attack, ...]:
    """Turn attack names and objects into attacks, and check their budgets."""
    if isinstance(attacks, (str, Attack)):
        attacks = (attacks,)
    found: list[Attack] = []
    for item in attacks:
        attack = ATTACKS.get(item)() if isinstance(item, str) else item
        if not isinstance(attack, Attack):
            raise KindError(
                "evaluate_under_shift",
                "attacks as names or Attack objects",
                f"{item!r}",
                "Corruptions belong into shifts=.",
            )
        attack.check()
        found.append(attack)
    return tuple(found)


def make_plan(
    shifts: tuple[Shift, ...], severities: Sequence[float], attacks: tuple[Attack, ...], spec: ImageSpec
) -> Plan:
    """Lay out the conditions.

    Args:
        shifts: Shifts, each run at every severity.
        severities: Numbers above 0 and up to 5.
        attacks: Attacks, each run at its own budgets.
        spec: Meaning of the pixels, which decides what applies.

    Raises:
        ConfigError: No severities, or the same severity twice.
        RangeError: A severity outside (0, 5].
    """
    wanted = [check_severity(severity, "evaluate_under_shift") for severity in severities]
    if shifts and (not wanted or len(set(wanted)) != len(wanted) or min(wanted) == 0):
        raise ConfigError(
            "evaluate_under_shift",
            "severities as different numbers above 0",
            f"{tuple(severities)}",
            "The clean row (severity 0) is always there.",
        )
    sweeps: list[Sweep] = []
    skipped: list[tuple[str, str]] = []
    taken: set[str] = set()
    for shift in (*shifts, *attacks):
        reason = shift.skip_reason(spec)
        if reason is not None:
            skipped.append((shift.label, reason))
            continue
        label = shift.label
        while label in taken:
            label = _next_label(label)
        taken.add(label)
        points = [severity for severity, _ in shift.budgets] if isinstance(shift, Attack) else sorted(wanted)
        sweeps.append(Sweep(shift, tuple(_condition(shift, label, severity, spec) for severity in points)))
    return Plan(tuple(sweeps), tuple(skipped))


def _next_label(label: str) -> str:
    stem, _, number = label.partition("#")
    return f"{stem}#{int(number or 1) + 1}"


def _condition(shift: Shift, label: str, severity: float, spec: ImageSpec) -> Condition:
    parameters = dict(shift.parameters(severity))
    amount, unit = next(iter(parameters.values()), (float("nan"), ""))
    if isinstance(shift, Attack) and shift.norm == "linf":
        amount, unit = spec.native(amount), spec.unit
    kind: Kind = "attack" if isinstance(shift, Attack) else "corruption"
    return Condition(f"{label}@{severity:g}", kind, label, severity, amount, unit, parameters)


def describe(shift: Shift) -> tuple[object, str]:
    """Return a shift's dictionary and fingerprint; for shifts without a JSON form their repr and an empty string."""
    try:
        return to_dict(shift), fingerprint(shift)
    except KindError:
        return repr(shift), ""
