"""A report as plain text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TypeVar

from . import confusing, detection_views, group_views, ood_views, views, words
from .report import Report
from .rows import Row

_WIDTH = 100

_Item = TypeVar("_Item", detection_views.Duel, detection_views.Passed)


def summary(report: Report) -> str:
    """Return the verdict, the headline table, the five worst conditions and what was not tested."""
    return "\n\n".join(block for block in map("\n".join, _blocks(report)) if block)


def _blocks(report: Report) -> Iterable[list[str]]:
    manifest = report.manifest
    model, data = manifest.get("model") or {}, manifest.get("data") or {}
    verdict = views.verdict(report)
    yield [f"{model.get('name', 'model')} on {data.get('name', 'data')}", *_wrap(verdict.sentence)]
    yield [line for finding in verdict.findings for line in _wrap(finding)]
    yield list(_silent(report, verdict))
    yield list(_headline(report))
    yield list(_worst(report))
    yield list(_over(report))
    yield list(_trust(report))
    yield list(_ood(report))
    yield list(_against(report))
    yield list(_confusing(report))
    yield list(_detection(report))
    yield list(_groups(report))
    yield list(_truth(report))
    doubts = [line for sentence in views.doubts(report) for line in _wrap(sentence, "- ")]
    yield ["The doctor doubts the set-up, and with it every number here", *doubts] if doubts else []
    gaps = views.not_tested(report)
    lines = [line for sentence in gaps for line in _wrap(sentence, "- ")]
    yield ["Not tested", *(lines or ["  not recorded"])]
    failures = manifest.get("failures") or []
    notes = [line for note in data.get("notes") or [] for line in _wrap(str(note), "- ")]
    yield ["Notes on the data", *notes] if notes else []
    if failures:
        lines = [line for item in failures for line in _wrap(f"{item['condition']}: {item['error']}", "- ")]
        yield ["Failed; run again to try these once more", *lines]


def _silent(report: Report, verdict: views.Verdict) -> Iterable[str]:
    noun = words.units(report.manifest)
    yield f"Silent failures per 1,000 {noun} (95 % interval)"
    for name, row in (("clean", verdict.clean), ("worst plausible", verdict.worst)):
        if row is None:
            yield f"  {name:<28}{words.DASH} (not computed)"
        else:
            place = f"  {verdict.condition.label}" if row is verdict.worst and verdict.condition else ""
            yield f"  {name:<28}{words.estimate(row):<32}  {_count(row, noun)}{place}"


def _headline(report: Report) -> Iterable[str]:
    for title, lines in (("Clean data", views.headline(report)), ("Further metrics", views.further(report))):
        if lines:
            yield f"{title} (95 % interval)"
        for line in lines:
            yield f"  {line.title[:37]:<38}{words.estimate(line.clean):<32}  n={line.clean.n:,}"


def _worst(report: Report) -> Iterable[str]:
    found = views.drops(report)[:5]
    if found:
        yield "Worst conditions: fall in accuracy, percentage points (95 % interval)"
    for item in found:
        low, high = words.points(item.drop.low), words.points(item.drop.high)
        change = f"{words.points(item.drop.value)} ({low} to {high})"
        yield f"  {item.condition.label[:45]:<46}{change:<22}n={item.drop.n:<8,}{item.word}"


def _over(report: Report) -> Iterable[str]:
    for item in views.over_conditions(report):
        yield f"{words.title(item.metric)} (95 % interval)"
        for row in item.rows:
            name = f"{row.shift} ({row.target})" if row.target else row.shift
            yield f"  {name[:45]:<46}{words.measured(row):<40}  n={row.n:,}"


def _trust(report: Report) -> Iterable[str]:
    for item in views.trust(report):
        yield f"How far to trust the attacks ({item.budget})"
        for check in item.checks:
            yield from _wrap(f"{str(check['status']).upper()} {check['name']}: {check['finding']}", "- ")
        yield from _wrap(f"passed: {', '.join(item.passed) or 'none'}", "- ")


def _ood(report: Report) -> Iterable[str]:
    lines = [(line, line.rows["auroc-ood"]) for line in ood_views.ood(report) if "auroc-ood" in line.rows]
    if lines:
        yield "Unfamiliar inputs: AUROC of the scores (95 % interval)"
    for line, row in lines:
        surer = "surer on these than on the data" if row.high < 0.5 else ""
        yield f"  {f'{line.name}, {line.scorer}'[:45]:<46}{words.estimate(row):<32}  n={row.n:,}  {surer}".rstrip()


def _against(report: Report) -> Iterable[str]:
    found = [item for item in ood_views.against_first(report) if item.name.endswith("/*")]
    if found:
        yield f"Scores against {found[0].first}: difference of AUROC over each group of sets (95 % interval)"
    for item in found:
        low, high = words.decimal(item.row.low, "+"), words.decimal(item.row.high, "+")
        change = f"{words.decimal(item.row.value, '+')} ({low} to {high})"
        yield f"  {f'{item.name}, {item.scorer}'[:45]:<46}{change:<28}n={item.row.n:<8,}{item.word}"


def _confusing(report: Report) -> Iterable[str]:
    found = confusing.of_the_best(report, 3)
    if found:
        yield "Most confusing for the best score: hashed id, and of the other side the share beyond it"
    for item in found:
        samples = ", ".join(f"{sample.name} ({100 * sample.share:.0f} %)" for sample in item.samples)
        yield f"  {f'{item.data} {item.kind} to {item.scorer}'[:45]:<46}{samples}"


def _detection(report: Report) -> Iterable[str]:
    duels, passed = _largest(detection_views.duels(report)), _largest(detection_views.passed(report))
    if duels or passed:
        yield "Attacks on the detectors at their largest budgets (95 % interval)"
    for item in duels:
        name = f"{item.condition.label}: {item.name}, {item.scorer}"
        before = "" if item.clean is None else f"from {words.number('auroc-ood', item.clean.value)}"
        yield f"  {name[:61]:<62}AUROC {words.estimate(item.attacked)} {before}  n={item.attacked.n:,}"
    for share in passed:
        name = f"{share.condition.label}: {share.name}"
        before = "" if share.clean is None else f"from {words.number('referred-share', share.clean.value)}"
        yield f"  {name[:61]:<62}referred {words.estimate(share.attacked)} {before}  n={share.attacked.n:,}"


def _largest(items: Sequence[_Item]) -> list[_Item]:
    """Leave all but the largest budget of each attack to the page."""
    most: dict[str, float] = {}
    for item in items:
        shift, severity = item.condition.shift, item.condition.severity
        most[shift] = max(severity, most.get(shift, 0.0))
    return [item for item in items if item.condition.severity == most[item.condition.shift]]


def _groups(report: Report) -> Iterable[str]:
    for table in group_views.groups(report):
        yield f"Groups of {table.column}: best minus worst, percentage points (95 % interval)"
        for gap in table.gaps:
            change = f"{words.points(gap.value)} ({words.points(gap.low)} to {words.points(gap.high)})"
            name = f"{words.title(gap.metric)}, {gap.best} against {gap.worst}"
            first, second = (table.levels[level][gap.metric].n for level in (gap.best, gap.worst))
            yield f"  {name[:45]:<46}{change:<22}n={first:,} and {second:,}  {gap.word}"


def _truth(report: Report) -> Iterable[str]:
    claims = views.claims(report)
    if claims:
        yield "Known answers: estimate beside truth"
    for claim in claims:
        number = f"{words.decimal(claim.estimate)} ({words.decimal(claim.low)} to {words.decimal(claim.high)})"
        truth = f"truth {words.decimal(claim.truth)}"
        mark = "right" if claim.right else "WRONG"
        yield f"  {claim.claim[:45]:<46}{number:<26}{truth:<14}{claim.verdict:<13}{mark}"


def _count(row: Row, noun: str) -> str:
    return f"n={row.n:,} {noun}" if row.n == row.n_units else f"n={row.n:,} images ({row.n_units:,} {noun})"


def _wrap(text: str, bullet: str = "") -> list[str]:
    indent = "  " if bullet else ""
    return textwrap.wrap(text, _WIDTH, initial_indent=indent + bullet, subsequent_indent=indent + " " * len(bullet))
