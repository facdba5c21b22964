"""Pure functions from a report to its group tables and the gaps between groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from .report import Report
from .rows import Row
from .views import defined

GROUP_METRICS = ("accuracy", "sensitivity", "specificity", "silent-failure-rate")


@dataclass(frozen=True)
class Gap:
    """Difference between the best and the worst level of a group column for one metric."""

    metric: str
    best: str
    worst: str
    value: float
    low: float
    high: float

    @property
    def word(self) -> str:
        """Whether the interval leaves out zero."""
        return "gap" if self.low > 0 else "no decision"


@dataclass(frozen=True)
class GroupTable:
    """One group column: level name to metric to row, the gap of each metric, and metrics of the differences."""

    column: str
    levels: Mapping[str, Mapping[str, Row]]
    gaps: tuple[Gap, ...]
    between: tuple[Row, ...]


def groups(report: Report) -> list[GroupTable]:
    """Return the group columns on clean data with the gap between the best and the worst level."""
    columns: dict[str, dict[str, dict[str, Row]]] = {}
    for row in report.rows:
        if "=" in row.group and row.shift == "clean" and row.metric in GROUP_METRICS and not row.target:
            column, _, level = row.group.partition("=")
            columns.setdefault(column, {}).setdefault(level, {}).setdefault(row.metric, row)
    between: dict[str, list[Row]] = {}
    for row in report.rows:
        if row.group and "=" not in row.group and row.shift == "clean":
            between.setdefault(row.group, []).append(row)
    return [
        GroupTable(
            column,
            levels,
            tuple(gap for m in GROUP_METRICS if (gap := _gap(m, levels)) is not None),
            tuple(between.get(column, [])),
        )
        for column, levels in columns.items()
    ]


def _gap(metric: str, levels: Mapping[str, Mapping[str, Row]]) -> Gap | None:
    """Return best minus worst with Newcombe's interval for independent groups, widened for having been picked.

    The interval is ``d - sqrt((x - x_low)^2 + (y_high - y)^2)`` to ``d + sqrt((x_high - x)^2 + (y - y_low)^2)``, its
    sides scaled by z(1 - 0.025 / pairs) / z(0.975) for the number of pairs of levels.

    References:
        R. Newcombe (1998), Interval estimation for the difference between independent proportions, method 10.
    """
    rows = {level: row for level, found in levels.items() if defined(row := found.get(metric)) and row is not None}
    if len(rows) < 2:
        return None
    ordered = sorted(rows, key=lambda level: rows[level].value)
    if next(iter(rows.values())).direction == "lower":
        ordered.reverse()
    best, worst = ordered[-1], ordered[0]
    high, low = sorted((rows[best], rows[worst]), key=lambda row: -row.value)
    pairs = len(rows) * (len(rows) - 1) / 2
    scale = NormalDist().inv_cdf(1 - 0.025 / pairs) / NormalDist().inv_cdf(0.975)
    value = high.value - low.value
    down = scale * math.hypot(high.value - high.low, low.high - low.value)
    up = scale * math.hypot(high.high - high.value, low.value - low.low)
    return Gap(metric, best, worst, value, value - down, min(value + up, 1.0))
