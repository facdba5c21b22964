"""Pure functions from a report to what text and HTML show of detectors on foreign sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import views
from .report import Report
from .rows import Row


@dataclass(frozen=True)
class OodLine:
    """One detector on one out-of-distribution set."""

    name: str
    scorer: str
    rows: Mapping[str, Row]


def ood(report: Report) -> list[OodLine]:
    """Return detector results on the OOD sets as they are, in the order of the rows."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in report.rows:
        if views.is_ood(row) and row.shift == "clean" and row.scorer and not (row.group or row.target):
            name = row.data.split(" vs ", 1)[-1]
            found.setdefault((name, row.scorer), {})[row.metric] = row
    return [OodLine(name, scorer, rows) for (name, scorer), rows in found.items()]


def ood_metrics(report: Report) -> list[str]:
    """Return the OOD metrics that were computed, AUROC first."""
    names = dict.fromkeys(
        row.metric
        for row in report.rows
        if views.is_ood(row) and row.shift == "clean" and row.scorer and not (row.group or row.target)
    )
    return sorted(names, key=lambda name: name != "auroc-ood")


@dataclass(frozen=True)
class Against:
    """How a score differs from the first one on a set, paired on the same images, with the verdict word."""

    name: str
    scorer: str
    first: str
    row: Row

    @property
    def word(self) -> str:
        """Better, worse, or no decision inside the noise."""
        if self.row.low > 0:
            return "better"
        return "worse" if self.row.high < 0 else "no decision"


def against_first(report: Report) -> list[Against]:
    """Return the differences of AUROC between scores, in the order of the rows."""
    rows = (row for row in report.rows if row.metric == "auroc-ood-difference")
    return [Against(row.data.removeprefix(views.ID_VS), row.scorer, row.target, row) for row in rows]


def full_spectrum(report: Report) -> list[OodLine]:
    """Return AUROC against clean and corrupted data together, in the order of the rows."""
    rows = (row for row in report.rows if views.is_ood(row) and row.group == "full spectrum")
    return [OodLine(row.data.removeprefix(views.ID_VS), row.scorer, {row.metric: row}) for row in rows]
