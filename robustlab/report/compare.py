"""Paired comparison of two reports on the same data, condition by condition."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from robustlab.core.errors import ConfigError, KindError, UnknownNameError
from robustlab.core.registry import METRICS
from robustlab.metrics.base import Context, Frozen
from robustlab.metrics.stats import Resampler, compare_metric
from robustlab.metrics.stats.compare import IDENTICAL as SAME
from robustlab.metrics.stats.compare import roughly
from robustlab.metrics.store import PredictionStore

from . import words
from .report import Report

if TYPE_CHECKING:
    import pandas as pd

IDENTICAL = "no decision (identical predictions)"
_TAIL_DRAWS = 400  # replicates a condition, so that a corrected tail still holds about ten of them
_MOST_REPLICATES = 20_000


@dataclass(frozen=True)
class ComparisonRow:
    """The difference of two models under one condition.

    Args:
        condition: Condition key, or ``"worst of K: KEY"``.
        metric: Metric name.
        target: Class or label, or empty.
        difference: Metric of the second report minus that of the first.
        low: Lower end of its interval.
        high: Upper end.
        n: Samples that entered.
        n_units: Independent units that entered.
        verdict: ``"better"`` or ``"worse"`` (the second against the first), or words that begin with ``"no decision"``.
        method: How the interval was made.
        reason: Why something is undefined; empty otherwise.
        units_to_decide: Independent units that would show a difference of the observed size with 80 % power; infinite
            where it is 0, NaN without an interval.
    """

    condition: str
    metric: str
    target: str
    difference: float
    low: float
    high: float
    n: int
    n_units: int
    verdict: str
    method: str
    reason: str
    units_to_decide: float


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found: one row a condition, and the worst one corrected for having been picked."""

    first: str
    second: str
    metric: str
    rows: tuple[ComparisonRow, ...]
    worst: ComparisonRow | None
    missing: tuple[str, ...]

    def summary(self) -> str:
        """Return the differences as plain text for a terminal."""
        lines = [f"{self.second} against {self.first}: {words.title(self.metric)}, paired by sample (95 % interval)"]
        for row in (*self.rows, *((self.worst,) if self.worst is not None else ())):
            number = f"{row.difference:+.4f} ({row.low:+.4f} to {row.high:+.4f})"
            if math.isnan(row.difference):
                number = f"{words.DASH} ({words.reason(row.reason)})"
            verdict = row.verdict if row.verdict in ("better", "worse") else f"{row.verdict} at n = {row.n:,}"
            if verdict != row.verdict and math.isfinite(row.units_to_decide):
                verdict += f"; about {roughly(row.units_to_decide)} would decide a difference of this size"
            lines.append(f"  {row.condition[:45]:<46}{number:<34}n={row.n:<8,}{verdict}")
        if self.missing:
            lines.append(f"Not compared, because only one report has predictions: {words.listed(list(self.missing))}.")
        return "\n".join(lines)

    def to_frame(self) -> pd.DataFrame:
        """Return the rows as a data frame, the worst one last."""
        import pandas as pd

        rows = [*self.rows, *((self.worst,) if self.worst is not None else ())]
        names = [field.name for field in fields(ComparisonRow)]
        return pd.DataFrame([[getattr(row, name) for name in names] for row in rows], columns=names)


def compare(a: Report, b: Report, metric: str = "accuracy", target: str = "") -> Comparison:
    """Compare two models on the same data under the conditions that both reports hold predictions for.

    Args:
        a: Report of the first model.
        b: Report of the second model; differences are second minus first.
        metric: A metric with a direction.
        target: Class or label, for metrics that have several.

    Raises:
        KindError: Something is not a Report.
        ConfigError: The data differ, or the metric has no direction.
        UnknownNameError: The reports hold no predictions for a common condition.
    """
    for report in (a, b):
        if not isinstance(report, Report):
            raise KindError("compare", "two reports", f"{report!r}", "Load saved ones first: Report.load(folder).")
    _check_data(a, b)
    direction = METRICS.get(metric).direction
    if direction == "none":
        raise ConfigError("compare", "a metric with a direction", repr(metric), "Use e.g. 'accuracy'.")
    usable = [
        {k for k, store in r.predictions.items() if store.labels is not None and k not in _on_detectors(r)}
        for r in (a, b)
    ]
    keys = [key for key in a.predictions if key in usable[0] & usable[1]]
    if not keys:
        raise UnknownNameError(
            "compare",
            "predictions of both reports for a common condition",
            f"{len(usable[0])} and {len(usable[1])} conditions with predictions, none in common",
            "Evaluate both models with the same shifts, and load the folders that Report.save wrote.",
        )
    contexts = _context(a), _context(b)
    rows = tuple(_row(key, a.predictions[key], b.predictions[key], metric, target, contexts) for key in keys)
    missing = tuple(sorted(usable[0] ^ usable[1]))
    worst = _worst(a, b, rows, metric, target) if len(rows) > 1 else None
    return Comparison(_name(a), _name(b), metric, rows, worst, missing)


def _on_detectors(report: Report) -> set[str]:
    """Return the conditions whose answers say nothing of accuracy: there a detector was attacked."""
    return {entry["key"] for entry in report.manifest.get("conditions") or [] if entry.get("kind") == "detector attack"}


def _worst(a: Report, b: Report, rows: tuple[ComparisonRow, ...], metric: str, target: str) -> ComparisonRow | None:
    """Return the condition that is worst for the second model, its interval at confidence 1 - alpha / K."""
    sign = 1 if METRICS.get(metric).direction == "higher" else -1
    defined = [row for row in rows if not math.isnan(row.difference)]
    if not defined:
        return None
    key = min(defined, key=lambda row: sign * row.difference).condition
    count = len(rows)
    contexts = _context(a, count), _context(b, count)
    row = _row(key, a.predictions[key], b.predictions[key], metric, target, contexts)
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    values["condition"] = f"worst of {count}: {key}"
    values["method"] = f"{row.method}, Bonferroni over {count} conditions"
    return ComparisonRow(**values)


def _row(
    key: str, a: PredictionStore, b: PredictionStore, metric: str, target: str, contexts: tuple[Context, Context]
) -> ComparisonRow:
    made = compare_metric(a, b, metric, contexts[0], context_b=contexts[1], target=target)
    estimate, verdict = made.difference, str(made.decision)
    if estimate.method.startswith(SAME):
        verdict = IDENTICAL
    return ComparisonRow(
        key,
        metric,
        target,
        estimate.value,
        estimate.low,
        estimate.high,
        estimate.n,
        estimate.n_units,
        verdict,
        estimate.method,
        estimate.reason,
        made.units_to_decide,
    )


def _context(report: Report, divisor: int = 1) -> Context:
    """Return the metric context of a report, its error probability divided by ``divisor``."""
    settings: Mapping[str, Any] = report.manifest.get("settings") or {}
    frozen: Mapping[str, Any] = report.manifest.get("frozen") or {}
    data: Mapping[str, Any] = report.manifest.get("data") or {}
    thresholds = frozen.get("thresholds")
    replicates = int(settings.get("replicates") or 1000)
    if divisor > 1:
        replicates = min(max(replicates, _TAIL_DRAWS * divisor), _MOST_REPLICATES)
    level = float(settings.get("confidence_level") or 0.95)
    names = data.get("class_names")
    return Context(
        resampler=Resampler(seed=0, replicates=replicates, confidence=1 - (1 - level) / divisor),
        frozen=Frozen(
            thresholds=None
            if thresholds is None
            else torch.tensor([math.nan if v is None else float(v) for v in thresholds], dtype=torch.float64),
            confidence=_number(frozen.get("confidence")),
            detector=str(frozen.get("detector") or ""),
            score=_number(frozen.get("score")),
            referral=float(frozen.get("referral") or settings.get("referral") or 0.1),
        ),
        class_names=None if names is None else tuple(map(str, names)),
    )


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def _check_data(a: Report, b: Report) -> None:
    first, second = ((r.manifest.get("data") or {}) for r in (a, b))
    if first.get("fingerprint") != second.get("fingerprint"):
        raise ConfigError(
            "compare",
            "two reports on the same data",
            f"{first.get('name')!r} ({str(first.get('fingerprint'))[:8]}) and {second.get('name')!r} "
            f"({str(second.get('fingerprint'))[:8]})",
            "Evaluate both models on one data set; a difference between data sets says nothing about the models.",
        )


def _name(report: Report) -> str:
    return str((report.manifest.get("model") or {}).get("name") or "model")
