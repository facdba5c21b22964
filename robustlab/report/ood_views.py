"""Pure functions from a report to what text and HTML show of detectors on foreign sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Roc:
    """The ROC curve of one score on one set: shares of known and of foreign samples at or above each threshold."""

    scorer: str
    row: Row
    points: tuple[tuple[float, float], ...]


def rocs(report: Report, most: int = 96) -> dict[str, list[Roc]]:
    """Return, for each foreign set, the curves of its scores, the highest AUROC first; needs the predictions.

    Args:
        report: The report.
        most: Points of a curve; of more, those nearest to equal steps along it are taken.
    """
    clean = report.predictions.get("clean")
    found: dict[str, list[Roc]] = {}
    for line in ood(report):
        row, store = line.rows.get("auroc-ood"), report.predictions.get(f"ood:{line.name}")
        if clean is None or store is None or row is None or not views.defined(row):
            continue
        if line.scorer in clean.scores and line.scorer in store.scores:
            points = roc_points(clean.scores[line.scorer], store.scores[line.scorer], most)
            found.setdefault(line.name, []).append(Roc(line.scorer, row, points))
    return {name: sorted(curves, key=lambda curve: -curve.row.value) for name, curves in found.items()}


def roc_points(inside: Tensor, outside: Tensor, most: int = 96) -> tuple[tuple[float, float], ...]:
    """Return (share of known, share of foreign samples flagged) from (0, 0) to (1, 1); NaN scores do not count."""
    sides = [torch.sort(values[~torch.isnan(values)].to(torch.float64)).values for values in (inside, outside)]
    if not all(len(values) for values in sides):
        return ()
    lines = torch.unique(torch.cat(sides)).flip(0)
    x, y = (1 - torch.searchsorted(values, lines) / len(values) for values in sides)
    x, y = (torch.cat((values.new_zeros(1), values)) for values in (x, y))
    if len(x) > most:
        # both shares rise, so their sum tells the way along the curve
        steps = torch.linspace(0, 2, most, dtype=x.dtype)
        kept = torch.unique(torch.searchsorted(x + y, steps).clamp_max(len(x) - 1))
        x, y = x[kept], y[kept]
    return tuple(zip(x.tolist(), y.tolist(), strict=True))
