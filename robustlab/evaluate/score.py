"""From predictions to the rows of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scipy.stats import norm, t

from robustlab.core.registry import METRICS
from robustlab.core.source import Source
from robustlab.metrics import compute
from robustlab.metrics.base import (
    AnyMetric,
    ConditionMetric,
    Conditions,
    ConditionStore,
    Context,
    Direction,
    Estimate,
    GroupMetric,
    MetricValue,
)
from robustlab.metrics.selective import ReferredShare
from robustlab.metrics.stats import FEW_CLUSTERS, Proportion, paired_difference, worst_of
from robustlab.metrics.store import PredictionStore
from robustlab.report.rows import Row

from .plan import CLEAN, Condition, Kind

GROUP_METRICS = ("accuracy", "sensitivity", "specificity", "silent-failure-rate")
WORST_METRICS = ("accuracy", "silent-failure-rate")
ALL_SHIFTS = "all shifts"


@dataclass(frozen=True)
class Subject:
    """Names that all rows of one evaluation share."""

    model: str
    data: str


def make_row(
    subject: Subject,
    condition: Condition,
    metric: str,
    estimate: Estimate,
    direction: Direction,
    *,
    group: str = "",
    target: str = "",
    scorer: str = "",
    data: str = "",
) -> Row:
    """Return one row."""
    return Row(
        model=subject.model,
        data=data or subject.data,
        shift=condition.label,
        severity=condition.severity,
        amount=condition.amount,
        unit=condition.unit,
        group=group,
        target=target,
        scorer=scorer,
        metric=metric,
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        n=estimate.n,
        n_units=estimate.n_units,
        method=estimate.method,
        reason=estimate.reason,
        direction=direction,
    )


def chosen_metrics(metrics: Sequence[str] | None) -> list[type[AnyMetric]]:
    """Return the metrics of these names; the default set for None."""
    if metrics is None:
        return [item for _, item in METRICS.items() if item.default]
    return [METRICS.get(name) for name in metrics]


def _rows(
    subject: Subject, condition: Condition, values: Sequence[MetricValue], group: str = "", data: str = ""
) -> list[Row]:
    return [
        make_row(
            subject,
            condition,
            value.metric,
            value.estimate,
            value.direction,
            group=group,
            target=value.target,
            scorer=value.scorer,
            data=data,
        )
        for value in values
    ]


def condition_rows(
    subject: Subject,
    condition: Condition,
    store: PredictionStore,
    clean: PredictionStore,
    context: Context,
    metrics: Sequence[str] | None,
    source: Source,
    groups: Sequence[str],
) -> list[Row]:
    """Return all rows of one condition: metrics, the paired drop against clean, and the same by group."""
    store = replace(store)  # probabilities and the like, which a store keeps once made, go when this condition is done
    rows = _rows(subject, condition, compute(store, context, metrics))
    if condition.key != CLEAN.key and store.labels is not None:
        drop = paired_difference(store, clean, "accuracy", context)
        rows.append(make_row(subject, condition, "accuracy-drop", drop, "lower"))
    names = [name for name in GROUP_METRICS if metrics is None or name in metrics]
    between = [item() for item in chosen_metrics(metrics) if issubclass(item, GroupMetric)]
    for column in groups:
        codes = store.groups[column]
        if store.labels is not None:
            for item in between:
                values = item.compute(store, codes, source.info.group_levels[column], context)
                rows += _rows(subject, condition, values, group=column)
        for code, level in enumerate(source.info.group_levels[column]):
            part = store.select(codes == code)
            rows += _rows(subject, condition, compute(part, context, names), group=f"{column}={level}")
        if bool((codes < 0).any()):
            rows += _rows(
                subject, condition, compute(store.select(codes < 0), context, names), group=f"{column}=missing"
            )
    return rows


def worst_rows(
    subject: Subject,
    conditions: Sequence[Condition],
    stores: Mapping[str, PredictionStore],
    context: Context,
    label: str,
) -> list[Row]:
    """Return the worst of several conditions for accuracy and silent failures, corrected for having been picked."""
    rows: list[Row] = []
    for metric in WORST_METRICS:
        direction = METRICS.get(metric).direction
        present = [condition for condition in conditions if condition.key in stores]
        found = {c.key: compute(replace(stores[c.key]), context, [metric])[0].estimate for c in present}
        if not any(estimate.effective_n > 0 for estimate in found.values()):
            place = Condition(key=label, kind="corruption", label=label)
            nothing = next(iter(found.values()), Estimate.undefined("no_conditions"))
            rows.append(make_row(subject, place, metric, nothing, direction))
            continue
        counts = {key: _corrected_n(estimate, len(found)) for key, estimate in found.items()}
        proportions = [Proportion(key, found[key].value * count, count) for key, count in counts.items()]
        key, worst = worst_of(proportions, direction=direction)
        chosen = next(condition for condition in present if condition.key == key)
        method = f"{worst.method}; effective n {counts[key]:.4g}"
        estimate = replace(worst, n=found[key].n, n_units=found[key].n_units, method=method)
        rows.append(make_row(subject, replace(chosen, label=label), metric, estimate, direction, target=key))
    return rows


def summary_rows(
    subject: Subject,
    shifted: Sequence[Condition],
    attacked: Sequence[Condition],
    stores: Mapping[str, PredictionStore],
    context: Context,
    metrics: Sequence[str] | None,
) -> list[Row]:
    """Return the rows of metrics over several conditions: one a shift, or one under the label "all shifts".

    Numbers over all shifts are of the corruptions: an attack is a shift of another kind, and the worst of several is
    none of its own.
    """
    chosen = [item() for item in chosen_metrics(metrics) if issubclass(item, ConditionMetric)]
    if not chosen or stores[CLEAN.key].labels is None:
        return []
    rows: list[Row] = []
    for metric in chosen:
        wanted = [*shifted, *attacked] if metric.each_shift else shifted
        present = [condition for condition in wanted if condition.key in stores]
        if not present:
            continue
        kinds: dict[str, Kind] = {condition.label: condition.kind for condition in present}
        # copies: what a store derives and keeps goes with the metric
        over = Conditions(
            replace(stores[CLEAN.key]),
            tuple(
                ConditionStore(c.key, c.label, c.severity, c.amount, c.unit, replace(stores[c.key]), c.kind, c.identity)
                for c in present
            ),
        )
        for value in metric.compute(over, context):
            label = value.shift or ALL_SHIFTS
            place = Condition(key=label, kind=kinds.get(label, "corruption"), label=label, unit=value.unit)
            rows.append(make_row(subject, place, value.metric, value.estimate, value.direction, target=value.target))
    return rows


def _corrected_n(estimate: Estimate, count: int) -> float:
    """Return the effective n for an interval at alpha / ``count``.

    Below 30 clusters the effective n holds the factor (z / t)^2 of the 95 % interval; further out in the tails t is
    further from z.
    """
    units = estimate.n_units
    if units >= FEW_CLUSTERS or units < 2 or estimate.n == units:
        return estimate.effective_n
    tails = (0.975, 1 - 0.025 / count)
    plain, corrected = (float(norm.ppf(tail) / t.ppf(tail, units - 1)) for tail in tails)
    return estimate.effective_n * (corrected / plain) ** 2


def absent_rows(
    subject: Subject,
    metrics: Sequence[str] | None,
    rows: Sequence[Row],
    *,
    groups: bool,
    ood: bool,
    shifted: bool,
    attacked: bool,
) -> list[Row]:
    """Return a row with a reason for every metric that was asked for by name and has no row.

    Args:
        subject: Names.
        metrics: What was asked for; None, and all metrics there are, ask for whatever applies.
        rows: All other rows.
        groups: Whether group columns were named.
        ood: Whether OOD sets were passed.
        shifted: Whether any corruption was run.
        attacked: Whether any attack was run.
    """
    if metrics is None or len(metrics) == len(METRICS.names()):
        return []
    have = {row.metric for row in rows}
    lacking = {
        "groups": "" if groups else "no_groups",
        "ood": "" if ood else "no_ood_set",
        "conditions": "" if shifted or attacked else "no_conditions",
        "attacks": "" if attacked else "no_attack",
    }
    found = []
    for name in metrics:
        item = METRICS.get(name)
        if name not in have:
            nothing = Estimate.undefined(lacking.get(item.on, "") or "not_for_this_task")
            found.append(make_row(subject, CLEAN, name, nothing, item.direction))
    return found


def ood_rows(
    subject: Subject,
    name: str,
    store: PredictionStore,
    clean: PredictionStore,
    context: Context,
    metrics: Sequence[str] | None,
    condition: Condition = CLEAN,
) -> list[Row]:
    """Return detection metrics of one OOD set against in-distribution data, one of them attacked under a condition."""
    against = Context(
        resampler=context.resampler, frozen=context.frozen, reference=clean, class_names=context.class_names
    )
    return _rows(subject, condition, compute(store, against, metrics), data=f"ID vs {name}")


def hiding_rows(
    subject: Subject,
    conditions: Sequence[Condition],
    ood: Mapping[str, Mapping[str, PredictionStore]],
    clean: PredictionStore,
    context: Context,
    metrics: Sequence[str] | None,
) -> list[Row]:
    """Return detection metrics of foreign images that hide, and the share of them that is still referred."""
    rows: list[Row] = []
    for name, stores in ood.items():
        present = [condition for condition in conditions if condition.key in stores]
        for condition in (CLEAN, *present) if present else ():
            store = stores[condition.key]
            if condition.key != CLEAN.key:
                rows += ood_rows(subject, name, store, clean, context, metrics, condition)
            rows += _rows(subject, condition, _referred(store, context, metrics), data=f"ID vs {name}")
    return rows


def alarm_rows(
    subject: Subject,
    conditions: Sequence[Condition],
    stores: Mapping[str, PredictionStore],
    ood: Mapping[str, Mapping[str, PredictionStore]],
    context: Context,
    metrics: Sequence[str] | None,
) -> list[Row]:
    """Return the referred share of attacked in-distribution images, and how they are told from every foreign set."""
    rows: list[Row] = []
    for condition in conditions:
        if condition.key in stores:
            store = stores[condition.key]
            rows += _rows(subject, condition, _referred(store, context, metrics))
            for name, foreign in ood.items():
                rows += ood_rows(subject, name, foreign[CLEAN.key], store, context, metrics, condition)
    return rows


def _referred(store: PredictionStore, context: Context, metrics: Sequence[str] | None) -> list[MetricValue]:
    return ReferredShare().compute(store, context) if metrics is None or ReferredShare.name in metrics else []
