"""The smallest tested budget that fools each sample, from the predictions of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from robustlab.metrics.base import ConditionStore, Frozen
from robustlab.metrics.minimal_budget import budgets_of

from . import views

if TYPE_CHECKING:
    from .report import Report

COLUMNS = ("attack", "sample", "unit", "holds_at", "falls_at")


def minimal_budgets(report: Report) -> dict[str, list[Any]]:
    """Return the columns that ``Report.minimal_budgets`` describes."""
    table: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    clean = report.predictions.get("clean")
    capabilities = (report.manifest.get("model") or {}).get("capabilities") or {}
    if clean is None or clean.labels is None or capabilities.get("deterministic") is False:
        return table  # of a random model single passes fall by chance
    attacks: dict[str, list[ConditionStore]] = {}
    for key, item in views.conditions(report).items():
        store = report.predictions.get(key)
        if item.kind == "attack" and store is not None and not math.isnan(item.amount):
            made = ConditionStore(key, item.shift, item.severity, item.amount, item.unit, store, item.kind)
            attacks.setdefault(item.shift, []).append(made)
    frozen = _frozen(report.manifest)
    for name, items in attacks.items():
        items.sort(key=lambda item: item.amount)
        budgets = budgets_of(clean, items, frozen)
        rows = budgets.entered.nonzero().squeeze(1)
        table["attack"] += [name] * len(rows)
        table["sample"] += clean.keys[rows].tolist()
        table["unit"] += [items[0].unit] * len(rows)
        table["holds_at"] += budgets.holds_at[rows].tolist()
        table["falls_at"] += budgets.falls_at[rows].tolist()
    return table


def _frozen(manifest: Mapping[str, Any]) -> Frozen:
    stored = (manifest.get("frozen") or {}).get("thresholds")
    if stored is None:
        return Frozen()
    return Frozen(thresholds=torch.tensor([math.nan if t is None else t for t in stored], dtype=torch.float64))
