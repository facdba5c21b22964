"""Pure functions from a report to what text and HTML show: verdict, headline, worst conditions, curves, OOD, groups."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

from robustlab.metrics.stats import condition_verdict

from . import words
from .report import Report
from .rows import Row

APART = ("silent-failure-rate", "referred-share")  # shown elsewhere on the page
HEADLINE = ("accuracy", "balanced-accuracy", "sensitivity", "specificity", "auroc", "brier", "nll", "ece", "ece-null")
ID_VS = "ID vs "
WORST = ("worst", "worst plausible")
_MOST_TARGETS = 4
_MOST_HEADLINES = 10

Index = Mapping[tuple[str, str, float, str], list[Row]]


@dataclass(frozen=True)
class Condition:
    """One thing that was done to the data; ``key`` is its name in rows, manifest and predictions."""

    key: str
    shift: str
    kind: str
    severity: float
    amount: float
    unit: str

    @property
    def where(self) -> str:
        """The amount in physical units, or the severity where there is none."""
        return words.amount(self.amount, self.unit, self.kind) or f"severity {self.severity:.3g}"

    @property
    def label(self) -> str:
        """E.g. "poisson-noise at 60 photons"."""
        return self.shift if self.shift == "clean" else f"{self.shift} at {self.where}"


@dataclass(frozen=True)
class Verdict:
    """The sentence that stands first, its two numbers, and what else was found."""

    sentence: str
    clean: Row | None
    worst: Row | None
    condition: Condition | None
    findings: tuple[str, ...]


@dataclass(frozen=True)
class HeadlineRow:
    """A metric on clean data and, where there is one, under the worst plausible condition for accuracy."""

    title: str
    clean: Row
    worst: Row | None


@dataclass(frozen=True)
class Drop:
    """How far accuracy falls under one condition, with the verdict word."""

    condition: Condition
    accuracy: Row | None
    drop: Row
    word: str


@dataclass(frozen=True)
class Point:
    """One severity of a curve."""

    condition: Condition
    accuracy: Row | None
    silent: Row | None


@dataclass(frozen=True)
class Curve:
    """One shift over its severities; the first point is clean."""

    shift: str
    kind: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Over:
    """A metric of several conditions: one row a shift, or one for all of them."""

    metric: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Claim:
    """A known answer: an estimate beside the truth of the generator."""

    claim: str
    where: str
    estimate: float
    low: float
    high: float
    truth: float
    verdict: str
    right: bool


@dataclass(frozen=True)
class Difference:
    """How another model differs from this one on the same data."""

    other: str
    metric: str
    value: float
    low: float
    high: float
    verdict: str


def index(rows: Iterable[Row]) -> Index:
    """Return rows by (metric, shift, severity, group)."""
    table: dict[tuple[str, str, float, str], list[Row]] = {}
    for row in rows:
        severity = 0.0 if row.shift in WORST else round(row.severity, 6)
        table.setdefault((row.metric, row.shift, severity, row.group), []).append(row)
    return table


def pick(table: Index, metric: str, shift: str = "clean", severity: float = 0.0, group: str = "") -> Row | None:
    """Return the row of a number, the one over all targets where there are several; None where there is none."""
    found = table.get((metric, shift, round(severity, 6), group), [])
    return next((row for row in found if not row.target), found[0] if found else None)


def defined(row: Row | None) -> bool:
    """Return whether a row exists and has a value."""
    return row is not None and not math.isnan(row.value)


def settings(report: Report) -> Mapping[str, Any]:
    """Return the manifest's settings."""
    return report.manifest.get("settings") or {}


def margin(report: Report) -> float:
    """Return the fall in accuracy from which a condition counts as breaking the model."""
    value = settings(report).get("margin")
    return 0.02 if value is None else float(value)


def conditions(report: Report) -> dict[str, Condition]:
    """Return the conditions by key, from the manifest and, where it is silent, from the rows."""
    found: dict[str, Condition] = {}
    for entry in report.manifest.get("conditions") or []:
        found[entry["key"]] = Condition(
            entry["key"],
            entry.get("shift", entry["key"]),
            entry.get("kind", "corruption"),
            float(entry.get("severity") or 0),
            as_float(entry.get("amount")),
            entry.get("unit") or "",
        )
    seen = {(condition.shift, round(condition.severity, 6)) for condition in found.values()}
    for row in report.rows:
        if row.shift in WORST or is_ood(row) or is_over(row):
            continue
        key = "clean" if row.shift == "clean" else f"{row.shift}@{row.severity:g}"
        place = (row.shift, round(row.severity, 6))
        if place not in seen:
            seen.add(place)
            kind = "clean" if key == "clean" else "corruption"
            found[key] = Condition(key, row.shift, kind, row.severity, row.amount, row.unit)
    return found


def word(row: Row, limit: float) -> str:
    """Return breaks, worse, holds or no decision for a drop."""
    if math.isnan(row.low) or math.isnan(row.high):
        return "no decision"
    return str(condition_verdict(row.low, row.high, limit))


def drops(report: Report) -> list[Drop]:
    """Return the conditions with the largest fall in accuracy first; undefined ones last."""
    table, known, limit = index(report.rows), conditions(report), margin(report)
    found = []
    for condition in known.values():
        row = pick(table, "accuracy-drop", condition.shift, condition.severity)
        if row is not None and condition.kind != "clean":
            accuracy = pick(table, "accuracy", condition.shift, condition.severity)
            found.append(Drop(condition, accuracy, row, word(row, limit)))
    return sorted(found, key=lambda d: (math.isnan(d.drop.value), -d.drop.value if defined(d.drop) else 0.0))


def verdict(report: Report) -> Verdict:
    """Return the sentence that a clinician reads first, with its numbers."""
    table, known = index(report.rows), conditions(report)
    clean = pick(table, "silent-failure-rate")
    worst = pick(table, "silent-failure-rate", "worst plausible")
    condition = None if worst is None else known.get(worst.target)
    if defined(clean):
        sentence = _silent_sentence(report, clean, worst, condition)
    else:
        sentence = _fallback_sentence(report, table, clean)
    return Verdict(sentence, clean, worst, condition, tuple(_findings(report)))


def headline(report: Report) -> list[HeadlineRow]:
    """Return the metrics on clean data for the first page: the well-known ones, and others while there is room."""
    first, others = _on_clean(report, HEADLINE), _on_clean(report, _others(report))
    return first + others[: max(0, _MOST_HEADLINES - len(first))]


def further(report: Report) -> list[HeadlineRow]:
    """Return the metrics on clean data that ``headline`` has no room for."""
    lines = _on_clean(report, (*HEADLINE, *_others(report)))
    return lines[len(headline(report)) :]


def _others(report: Report) -> list[str]:
    shown = (*HEADLINE, *APART)
    rows = (row for row in report.rows if row.shift == "clean" and not row.group and not is_ood(row))
    return list(dict.fromkeys(row.metric for row in rows if row.metric not in shown))


def _on_clean(report: Report, metrics: Sequence[str]) -> list[HeadlineRow]:
    """Return metrics on clean data, each beside its value under the worst plausible condition."""
    table, known = index(report.rows), conditions(report)
    bad = worst_plausible(table, known)
    lines = []
    for metric in metrics:
        rows = table.get((metric, "clean", 0.0, ""), [])
        rows = [row for row in rows if not row.target] or rows
        more = len(rows) - _MOST_TARGETS
        for row in rows[:_MOST_TARGETS]:
            shifted = [] if bad is None else table.get((metric, bad.shift, round(bad.severity, 6), ""), [])
            other = next((r for r in shifted if (r.target, r.scorer) == (row.target, row.scorer)), None)
            name = words.title(metric) + _detail(report, row)
            if more > 0 and row is rows[_MOST_TARGETS - 1]:
                name += f", {more} more in rows.csv"
            lines.append(HeadlineRow(name, row, other))
    return lines


def _detail(report: Report, row: Row) -> str:
    """Return which class a number is of, of how many it is the mean, or the frozen threshold that it stands at."""
    mean = re.search(r"mean of (\d+) of (\d+) defined", row.method)
    if mean:
        return f" (mean of {mean[1]} of {mean[2]})"
    if row.target:
        return f" ({row.target})"
    thresholds = (report.manifest.get("frozen") or {}).get("thresholds") or []
    if row.metric in ("sensitivity", "specificity") and len(thresholds) == 1 and thresholds[0] is not None:
        return f" at {thresholds[0]:.3g}, set on val"
    return ""


def worst_plausible(table: Index, known: Mapping[str, Condition]) -> Condition | None:
    """Return the plausible condition under which accuracy is lowest."""
    row = pick(table, "accuracy", "worst plausible") or pick(table, "silent-failure-rate", "worst plausible")
    return None if row is None else known.get(row.target)


def curves(report: Report) -> list[Curve]:
    """Return one curve a shift or attack, the one that falls furthest first."""
    table, known = index(report.rows), conditions(report)
    start = Point(
        Condition("clean", "clean", "clean", 0.0, math.nan, ""),
        pick(table, "accuracy"),
        pick(table, "silent-failure-rate"),
    )
    shifts: dict[str, list[Point]] = {}
    for condition in known.values():
        if condition.kind in ("corruption", "attack"):
            accuracy = pick(table, "accuracy", condition.shift, condition.severity)
            silent = pick(table, "silent-failure-rate", condition.shift, condition.severity)
            shifts.setdefault(condition.shift, []).append(Point(condition, accuracy, silent))
    found = [
        Curve(
            name,
            points[0].condition.kind,
            (start, *sorted(points, key=lambda p: (p.condition.severity, p.condition.key))),
        )
        for name, points in shifts.items()
    ]

    def lowest(curve: Curve) -> float:
        values = [p.accuracy.value for p in curve.points[1:] if p.accuracy is not None and defined(p.accuracy)]
        return min(values, default=math.inf)

    return sorted(found, key=lowest)


def is_ood(row: Row) -> bool:
    """Return whether a row is about a set that is out of distribution."""
    return row.data.startswith(ID_VS)


def over_conditions(report: Report) -> list[Over]:
    """Return the metrics of several conditions, failure thresholds first."""
    found: dict[str, list[Row]] = {}
    for row in report.rows:
        if is_over(row):
            found.setdefault(row.metric, []).append(row)
    names = sorted(found, key=lambda name: name != "failure-threshold")
    return [Over(name, tuple(found[name])) for name in names]


def is_over(row: Row) -> bool:
    """Return whether a row sums up several severities."""
    return row.severity == 0 and row.shift != "clean" and row.shift not in WORST


def claims(report: Report) -> list[Claim]:
    """Return the known answers."""
    return [
        Claim(
            str(item.get("claim", "")),
            str(item.get("where") or ""),
            as_float(item.get("estimate")),
            as_float(item.get("low")),
            as_float(item.get("high")),
            as_float(item.get("truth")),
            str(item.get("verdict") or ""),
            bool(item.get("right")),
        )
        for item in report.manifest.get("truth") or []
    ]


def compared(report: Report) -> list[Difference]:
    """Return the comparisons with other models."""
    return [
        Difference(
            str(item.get("other", "")),
            str(item.get("metric") or "accuracy"),
            as_float(item.get("difference")),
            as_float(item.get("low")),
            as_float(item.get("high")),
            str(item.get("verdict") or "no decision"),
        )
        for item in report.manifest.get("compared") or []
    ]


def as_float(value: Any) -> float:
    """Return a number of the manifest; NaN where it is null."""
    return math.nan if value is None else float(value)


def doubts(report: Report) -> list[str]:
    """Return what the doctor found wrong with model and data, and what to do, as sentences."""
    found = (report.manifest.get("doctor") or {}).get("findings") or []
    return [f"{finding['text']} {finding['fix']}" for finding in found]


@dataclass(frozen=True)
class Trust:
    """How far to trust adversarial numbers of one norm: the checklist, what speaks against them first."""

    budget: str
    passed: tuple[str, ...]
    checks: tuple[Mapping[str, Any], ...]


def trust(report: Report) -> list[Trust]:
    """Return the checklists of the attacks; passed items by name only, the others whole."""
    order = ("failed", "warned", "not automatable", "skipped")
    found = []
    for item in report.manifest.get("trust") or []:
        checks = sorted(
            (check for check in item["checks"] if check["status"] in order), key=lambda c: order.index(c["status"])
        )
        passed = tuple(str(check["name"]) for check in item["checks"] if check["status"] == "passed")
        found.append(Trust(f"{item['norm']}, {item['budget']}", passed, tuple(checks)))
    return found


def not_tested(report: Report) -> list[str]:
    """Return what was not tested, as sentences."""
    return [str(sentence) for sentence in report.manifest.get("not_tested") or []]


def _silent_sentence(report: Report, clean: Row | None, worst: Row | None, condition: Condition | None) -> str:
    def count(row: Row | None) -> str:
        return "" if row is None else words.estimate(row)

    start = (
        f"Of 1,000 {words.units(report.manifest)}, about {count(clean)} would be answered wrongly, with confidence and "
        "unflagged, on clean data"
    )
    if worst is None or worst.reason == "no_conditions":
        return f"{start}; no plausible shift was tested."
    if not defined(worst):
        return f"{start}; under shift the rate is undefined ({words.reason(worst.reason)})."
    place = condition.label if condition is not None else worst.target
    return f"{start}; under the worst plausible shift ({place}), about {count(worst)}."


def _fallback_sentence(report: Report, table: Index, silent: Row | None) -> str:
    """Say how accurate the model is, and why there is no silent-failure rate and what to pass for one."""
    if report.manifest.get("val") is None:
        why = "no validation data. Pass val= to freeze the thresholds that decide which cases are referred"
    else:
        why = words.reason(silent.reason) if silent is not None else "it was not asked for"
    accuracy, worst = pick(table, "accuracy"), pick(table, "accuracy", "worst plausible")
    parts = []
    if accuracy is not None and defined(accuracy):
        several = (report.manifest.get("data") or {}).get("task") == "multilabel"
        what = f"{'label decisions on the ' if several else ''}{accuracy.n:,} images"
        text = f"The model answers {words.estimate(accuracy)} of the {what} rightly on clean data"
        if worst is not None and defined(worst):
            condition = conditions(report).get(worst.target)
            place = condition.label if condition is not None else worst.target
            text += f", and {words.estimate(worst)} under the worst plausible shift ({place})"
        parts.append(f"{text}.")
    parts.append(f"How many would be wrong without anybody noticing is undefined: {why}.")
    return " ".join(parts)


def _findings(report: Report) -> Iterable[str]:
    """Yield one sentence on a model that only guesses, one on the plausible shifts, by verdict word, one on attacks."""
    clean = pick(index(report.rows), "balanced-accuracy")
    classes = (report.manifest.get("model") or {}).get("classes")
    task = (report.manifest.get("data") or {}).get("task")
    if clean is not None and classes and task != "multilabel" and clean.low <= 1 / classes:
        yield (
            f"On clean data the model is not shown to beat guessing (balanced accuracy {words.estimate(clean)}), so "
            "that it holds under a shift means little."
        )
    plausible = settings(report).get("plausible")
    limit = 3.0 if plausible is None or not isinstance(plausible, (int, float)) else float(plausible)
    order = ("breaks", "worse", "no decision", "holds")
    found = drops(report)
    by_shift: dict[str, str] = {}
    likely = [item for item in found if item.condition.kind == "corruption" and item.condition.severity <= limit]
    # the sentence picks the worst word of many, so its intervals are widened to hold all at once (Bonferroni)
    scale = NormalDist().inv_cdf(1 - 0.025 / max(len(likely), 1)) / NormalDist().inv_cdf(0.975)
    for item in likely:
        row, name = item.drop, item.condition.shift
        wide = replace(
            row, low=row.value - scale * (row.value - row.low), high=row.value + scale * (row.high - row.value)
        )
        by_shift[name] = min(by_shift.get(name, "holds"), word(wide, margin(report)), key=order.index)
    phrases = {
        "breaks": "Accuracy breaks under {}",
        "worse": "gets worse under {}",
        "holds": "holds under {}",
        "no decision": "no decision on {}",
    }
    parts = [
        phrases[key].format(words.listed(names))
        for key in ("breaks", "worse", "holds", "no decision")
        if (names := [name for name, verdict_word in by_shift.items() if verdict_word == key])
    ]
    if parts:
        text = "; ".join(parts)
        yield f"{text[0].upper()}{text[1:]} (up to severity {limit:g})."
    attack = next((item for item in found if item.condition.kind == "attack"), None)
    if attack is not None and attack.accuracy is not None and defined(attack.accuracy):
        yield f"Under attack ({attack.condition.label}) accuracy is {words.estimate(attack.accuracy)}."
