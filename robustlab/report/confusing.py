"""The most confusing samples: foreign ones that look known to a score, and known ones that look foreign."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from robustlab.metrics.store import PredictionStore

from . import ood_views

if TYPE_CHECKING:
    from .report import Report

COLUMNS = ("scorer", "kind", "data", "sample", "row", "score", "share")
Kind = Literal["looks known", "looks foreign"]


@dataclass(frozen=True)
class Sample:
    """One sample.

    Args:
        key: Its hashed id (``PredictionStore.keys``).
        row: Its place in the predictions of its set.
        score: Its score.
        share: Of one that looks known, the share of known samples that look stranger; of one that looks foreign, the
            share of all foreign samples that look more familiar. Equal scores count half.
    """

    key: int
    row: int
    score: float
    share: float

    @property
    def name(self) -> str:
        """The hashed id as 16 hexadecimal digits."""
        return f"{self.key & (1 << 64) - 1:016x}"


@dataclass(frozen=True)
class Confusing:
    """What one score gets most wrong in one set, the most confusing sample first."""

    scorer: str
    kind: Kind
    data: str
    samples: tuple[Sample, ...]

    @property
    def words(self) -> str:
        """What ``share`` is of."""
        return "of the known look stranger" if self.kind == "looks known" else "of the foreign look more familiar"


def most_confusing(report: Report, count: int = 5) -> list[Confusing]:
    """Return, for every score, the samples of each foreign set that look most known, then the opposite.

    Needs the predictions, which ``save`` keeps. Scores that are not finite are left out.

    Args:
        report: The report.
        count: Samples of each set.
    """
    clean = report.predictions.get("clean")
    foreign = {
        name: report.predictions[f"ood:{name}"]
        for name in dict.fromkeys(line.name for line in ood_views.ood(report))
        if f"ood:{name}" in report.predictions
    }
    if clean is None or not foreign:
        return []
    own = str((report.manifest.get("data") or {}).get("name", "data"))
    found = []
    for scorer, known in clean.scores.items():
        inside = _sorted(known)
        sets = {name: store for name, store in foreign.items() if scorer in store.scores}
        outside = _sorted(torch.cat([store.scores[scorer].to(torch.float64) for store in sets.values()] or [known[:0]]))
        if not len(inside) or not len(outside):
            continue
        for name, store in sets.items():
            samples = _extreme(store, scorer, count, inside, known=True)
            found.append(Confusing(scorer, "looks known", name, samples))
        samples = _extreme(clean, scorer, count, outside, known=False)
        found.append(Confusing(scorer, "looks foreign", own, samples))
    return found


def table(report: Report, count: int) -> dict[str, list[Any]]:
    """Return the columns that ``Report.most_confusing`` describes."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for item in most_confusing(report, count):
        for sample in item.samples:
            values = (item.scorer, item.kind, item.data, sample.key, sample.row, sample.score, sample.share)
            for name, value in zip(COLUMNS, values, strict=True):
                columns[name].append(value)
    return columns


def best_scorers(report: Report) -> dict[str, str]:
    """Return the score with the highest AUROC on each foreign set whose predictions are there."""
    best: dict[str, tuple[float, str]] = {}
    for line in ood_views.ood(report):
        row = line.rows.get("auroc-ood")
        if f"ood:{line.name}" not in report.predictions or row is None or math.isnan(row.value):
            continue
        if row.value > best.get(line.name, (-1.0, ""))[0]:
            best[line.name] = (row.value, line.scorer)
    return {name: scorer for name, (_, scorer) in best.items()}


def of_the_best(report: Report, count: int) -> list[Confusing]:
    """Return what confuses the best score of each foreign set most, on that set and on the data."""
    best = best_scorers(report)
    return [
        item
        for item in most_confusing(report, count)
        if (item.scorer in best.values() if item.kind == "looks foreign" else best.get(item.data) == item.scorer)
    ]


def _sorted(scores: Tensor) -> Tensor:
    return torch.sort(scores[torch.isfinite(scores)].to(torch.float64)).values


def _extreme(store: PredictionStore, scorer: str, count: int, others: Tensor, *, known: bool) -> tuple[Sample, ...]:
    """Return the lowest scores of a set, or the highest, beside the sorted scores of the other side."""
    scores = store.scores[scorer].to(torch.float64)
    rows = torch.isfinite(scores).nonzero()[:, 0]
    rows = rows[torch.argsort(scores[rows], descending=not known, stable=True)][:count]
    values = scores[rows]
    below = torch.searchsorted(others, values) + torch.searchsorted(others, values, right=True)
    share = below.to(torch.float64) / (2 * len(others))
    share = 1 - share if known else share
    columns = (store.keys[rows], rows, values, share)
    return tuple(Sample(*values) for values in zip(*(column.tolist() for column in columns), strict=True))
