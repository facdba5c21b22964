"""Pure functions from a report to what text and HTML show of attacks on detectors."""

from __future__ import annotations

from dataclasses import dataclass

from . import ood_views, views
from .report import Report
from .rows import Row

KIND = "detector attack"


@dataclass(frozen=True)
class Duel:
    """One score on one OOD set, while foreign images hide or known ones raise an alarm."""

    condition: views.Condition
    name: str
    scorer: str
    clean: Row | None
    attacked: Row


@dataclass(frozen=True)
class Passed:
    """The share of attacked images that is passed on to a person, beside that of the images as they are."""

    condition: views.Condition
    name: str
    clean: Row | None
    attacked: Row


def duels(report: Report) -> list[Duel]:
    """Return AUROC of every score, in the order of the rows."""
    known = _conditions(report)
    before = {(line.name, line.scorer): line.rows.get("auroc-ood") for line in ood_views.ood(report)}
    found = []
    for row in report.rows:
        condition = known.get((row.shift, round(row.severity, 6)))
        if condition is not None and row.metric == "auroc-ood":
            name = row.data.removeprefix(views.ID_VS)
            found.append(Duel(condition, name, row.scorer, before.get((name, row.scorer)), row))
    return found


def passed(report: Report) -> list[Passed]:
    """Return referred shares, in the order of the rows."""
    known = _conditions(report)
    rows = [row for row in report.rows if row.metric == "referred-share" and not row.group]
    before = {row.data: row for row in rows if row.shift == "clean"}
    return [
        Passed(condition, row.data.removeprefix(views.ID_VS), before.get(row.data), row)
        for row in rows
        if (condition := known.get((row.shift, round(row.severity, 6)))) is not None
    ]


def _conditions(report: Report) -> dict[tuple[str, float], views.Condition]:
    every = views.conditions(report).values()
    return {(item.shift, round(item.severity, 6)): item for item in every if item.kind == KIND}
