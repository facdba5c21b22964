"""The plan of an evaluation: which conditions are run, and which do not apply and why."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from robustlab.core.attack import Attack
from robustlab.core.checks import check_severity
from robustlab.core.errors import ConfigError, KindError, UnknownNameError
from robustlab.core.registry import ATTACKS, CORRUPTIONS, SUITES
from robustlab.core.shift import Shift
from robustlab.core.spec import fingerprint, to_dict
from robustlab.core.types import ImageSpec

Kind = Literal["clean", "corruption", "attack", "detector attack", "ood"]


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
        identity: Value of the first parameter at severity 0, which may be infinite; NaN if it has none.
    """

    key: str
    kind: Kind
    label: str
    severity: float = 0.0
    amount: float = float("nan")
    unit: str = ""
    parameters: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    identity: float = float("nan")


@dataclass(frozen=True, eq=False)
class Sweep:
    """One shift with its conditions, in the order of severity; draws are made once for all of them."""

    shift: Shift
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """All that will be run on a source.

    Args:
        sweeps: Shifts and attacks with their conditions.
        skipped: (what, why) of everything that does not apply.
        derived: Conditions that follow from the answers under others.
        thresholds: Probability at which each label of a multi-label task is decided, which attacks aim at; empty for
            one half.
        hiding: Attacks by which foreign images hide from a detector, which are run on OOD sets alone.
    """

    sweeps: tuple[Sweep, ...]
    skipped: tuple[tuple[str, str], ...]
    derived: tuple[Condition, ...] = ()
    thresholds: tuple[float, ...] = ()
    hiding: tuple[Sweep, ...] = ()

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Clean first, then every condition of every sweep, and what follows from them."""
        return (CLEAN, *(condition for sweep in self.sweeps for condition in sweep.conditions), *self.derived)

    @property
    def on_foreign(self) -> Plan:
        """What is run on OOD sets."""
        return Plan(self.hiding, ())


CLEAN = Condition(key="clean", kind="clean", label="clean")


def as_items(value: object, single: type[Any] | tuple[type[Any], ...], expected: str, fix: str) -> tuple[Any, ...]:
    """Return one thing or several things as a tuple.

    Args:
        value: What a user passed. A class counts as one thing, so that the check of each thing names it.
        single: Kinds of which one alone is meant.
        expected: What would have been accepted.
        fix: What to do.

    Raises:
        KindError: Neither one thing nor several.
    """
    kinds = single if isinstance(single, tuple) else (single,)
    if isinstance(value, (*kinds, type)):
        return (value,)
    if not isinstance(value, Iterable):
        raise KindError("evaluate_under_shift", expected, f"{value!r}", fix)
    return tuple(value)


def instance_hint(item: object, otherwise: str) -> str:
    """Return what to do about a thing of the wrong kind: classes lack their brackets."""
    return f"Make an instance: {item.__name__}()." if isinstance(item, type) else otherwise


def resolve_shifts(shifts: str | Shift | Sequence[str | Shift]) -> tuple[Shift, ...]:
    """Turn names of suites and corruptions, shifts, or a mix of them into shifts.

    Raises:
        UnknownNameError: A name is neither a suite nor a corruption.
        KindError: An element is neither a name nor a shift.
    """
    expected = "shifts as names or Shift objects"
    found: list[Shift] = []
    for item in as_items(shifts, (str, Shift), expected, "For example shifts='standard', or () for none."):
        if isinstance(item, Shift):
            found.append(item)
        elif isinstance(item, str):
            found.extend(_named(item))
        else:
            hint = "Wrap a transform of another library in corruptions.FromAlbumentations, or register a corruption."
            raise KindError("evaluate_under_shift", expected, f"{item!r}", instance_hint(item, hint))
    return tuple(found)


def _named(name: str) -> tuple[Shift, ...]:
    if name in SUITES:
        return SUITES.get(name)()
    if name in CORRUPTIONS or name in CORRUPTIONS.failures:
        return (CORRUPTIONS.get(name)(),)
    have = (*SUITES.names(), *CORRUPTIONS.names())
    close = difflib.get_close_matches(name, have, n=3, cutoff=0.5)
    raise UnknownNameError(
        "shifts",
        "the name of a suite or a corruption",
        repr(name),
        (f"Did you mean {' or '.join(map(repr, close))}? " if close else "")
        + "'robustlab list suites' and 'robustlab list corruptions' show all of them.",
    )


def resolve_attacks(attacks: str | Attack | Sequence[str | Attack]) -> tuple[Attack, ...]:
    """Turn attack names and objects into attacks, and check their budgets."""
    expected = "attacks as names or Attack objects"
    found: list[Attack] = []
    for item in as_items(attacks, (str, Shift), expected, "For example attacks=PGD(), or () for none."):
        attack = ATTACKS.get(item)() if isinstance(item, str) else item
        if not isinstance(attack, Attack):
            hint = "Corruptions belong into shifts=." if isinstance(item, Shift) else "Look at robustlab.Attack."
            raise KindError("evaluate_under_shift", expected, f"{item!r}", instance_hint(item, hint))
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
    several = as_items(severities, (), "severities as a sequence of numbers", f"Pass severities=({severities!r},).")
    wanted = [check_severity(severity, "evaluate_under_shift") for severity in several]
    if shifts and (not wanted or len(set(wanted)) != len(wanted) or min(wanted) == 0):
        raise ConfigError(
            "evaluate_under_shift",
            "severities as different numbers above 0",
            f"{tuple(severities)}",
            "The clean row (severity 0) is always there.",
        )
    sweeps: list[Sweep] = []
    hiding: list[Sweep] = []
    skipped: list[tuple[str, str]] = []
    taken: set[str] = set()
    for shift in (*shifts, *attacks):
        reason = shift.skip_reason(spec)
        if reason is not None:
            skipped.append((shift.label, reason))
            continue
        label = shift.label
        while label in taken:
            label = next_label(label)
        taken.add(label)
        points = [severity for severity, _ in shift.budgets] if isinstance(shift, Attack) else sorted(wanted)
        made = Sweep(shift, _telling(tuple(_condition(shift, label, severity, spec) for severity in points)))
        (hiding if isinstance(shift, Attack) and shift.goal == "hide" else sweeps).append(made)
    return Plan(tuple(sweeps), tuple(skipped), hiding=tuple(hiding))


def next_label(label: str) -> str:
    """Return a label that follows one that is taken: "pgd#2" after "pgd"."""
    stem, _, number = label.partition("#")
    return f"{stem}#{int(number or 1) + 1}"


def _telling(conditions: tuple[Condition, ...]) -> tuple[Condition, ...]:
    """Leave the amount out where it does not tell severities apart, as in published tables of several parameters."""
    amounts = [condition.amount for condition in conditions]
    if len(set(amounts)) == len(amounts) and all(condition.unit != "severity" for condition in conditions):
        return conditions
    nothing = float("nan")
    return tuple(dataclasses.replace(item, amount=nothing, unit="", identity=nothing) for item in conditions)


def _condition(shift: Shift, label: str, severity: float, spec: ImageSpec) -> Condition:
    parameters = dict(shift.parameters(severity))
    amount, unit = _first(parameters)
    identity, _ = _first(shift.parameters(0.0))
    if isinstance(shift, Attack) and shift.norm == "linf":
        factor = spec.native(1.0) if shift.units == "unit" else 1.0
        amount, identity, unit = factor * amount, factor * identity, spec.unit
    kind: Kind = "corruption"
    if isinstance(shift, Attack):
        kind = "attack" if shift.goal == "answer" else "detector attack"
    return Condition(f"{label}@{severity:g}", kind, label, severity, amount, unit, parameters, identity)


def _first(parameters: Mapping[str, tuple[float, str]]) -> tuple[float, str]:
    """Return value and unit of the first parameter; NaN without one."""
    return next(iter(parameters.values()), (float("nan"), ""))


def describe(shift: Shift) -> tuple[object, str]:
    """Return a shift's dictionary and fingerprint; for shifts without a JSON form their repr and an empty string."""
    try:
        return to_dict(shift), fingerprint(shift)
    except KindError:
        return repr(shift), ""
