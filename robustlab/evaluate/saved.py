"""Evaluation of saved predictions: the plan is read from the file, and no forward pass is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch

from robustlab.core.attack import Attack
from robustlab.core.detector import Detector
from robustlab.core.errors import ConfigError, ModelError
from robustlab.core.model import Capabilities
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.shift import Shift, ShiftContext
from robustlab.core.source import Source
from robustlab.core.types import Batch
from robustlab.data.predictions import SavedPredictions
from robustlab.metrics.store import PredictionStore

from .plan import CLEAN, Condition, Plan, Sweep
from .run import Arena, Pass, make_store

SAVED_CAPABILITIES = Capabilities(batch_independent=True, deterministic=True, supports_grad=False)
"""What holds for looking answers up; the model that gave them could not be probed, which ``saved_notes`` says."""

_LISTED = 3  # conditions with unparsed answers that are named one by one


@dataclass(frozen=True)
class RecordedShift(Shift):
    """A change of the data that was made elsewhere, such as another scanner: it has a name and nothing else."""

    title: str

    @property
    def label(self) -> str:
        return self.title

    def prepare(self, batch: Batch, ctx: ShiftContext) -> NoReturn:
        del batch, ctx
        raise ModelError(
            f"shift {self.title!r}", "a shift that can be applied", "one that was recorded", "Evaluate its answers."
        )

    def perform(self, batch: Batch, draws: object, severity: float, ctx: ShiftContext) -> NoReturn:
        del draws, severity
        self.prepare(batch, ctx)

    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        del severity
        return {}


def saved_plan(saved: SavedPredictions, attacks: Sequence[Attack] = ()) -> Plan:
    """Lay out the conditions that a file of saved predictions holds, by label, then severity.

    Labels of registered corruptions get the amounts of their default settings; all others have none.

    Args:
        saved: The answers.
        attacks: Attacks that were asked for, and cannot be run.
    """
    severities: dict[str, list[float]] = {}
    for name in saved.conditions:
        label, at, severity = name.rpartition("@")
        if at and not name.startswith("ood:"):
            severities.setdefault(label, []).append(float(severity))
    skipped = tuple((attack.label, "saved answers cannot be attacked") for attack in attacks)
    return Plan(tuple(_sweep(label, sorted(severities[label])) for label in sorted(severities)), skipped)


def _sweep(label: str, severities: Sequence[float]) -> Sweep:
    shift: Shift = CORRUPTIONS.get(label)() if label in CORRUPTIONS else RecordedShift(label)
    conditions = []
    for severity in severities:
        parameters = dict(shift.parameters(severity))
        amount, unit = next(iter(parameters.values()), (float("nan"), ""))
        identity, _ = next(iter(shift.parameters(0.0).values()), (float("nan"), ""))
        key = f"{label}@{severity:g}"
        conditions.append(Condition(key, "corruption", label, severity, amount, unit, parameters, identity))
    return Sweep(shift, tuple(conditions))


def saved_pass(
    saved: SavedPredictions,
    source: Source,
    plan: Plan,
    *,
    detectors: Mapping[str, Detector],
    cluster: str | None,
    arena: Arena,
    stands_for: str = CLEAN.key,
) -> Pass:
    """Look up a model's answers on a source under every condition of a plan.

    Args:
        saved: The answers, bound to the in-distribution data.
        source: The data.
        plan: Conditions; for validation and OOD data, clean alone.
        detectors: Scorer name to detector; those that need more than the answers give NaN with a reason.
        cluster: Group column of the resampling unit.
        arena: Where scores lie.
        stands_for: What the file calls the plan's clean condition: ``"val"`` (see ``val_condition``) or ``"ood:NAME"``,
            whose labels have no part in the evaluation.

    Raises:
        ConfigError: The file lacks a condition, or a sample under one.
    """
    stores: dict[str, PredictionStore] = {}
    for condition in plan.conditions:
        logits = saved.answers(stands_for if condition.key == CLEAN.key else condition.key, source)
        store = make_store(source, saved, logits, {}, detectors, cluster, arena=arena)
        labels = None if stands_for.startswith("ood:") else store.labels
        stores[condition.key] = replace(store, labels=labels, answers_only=saved.answers_only)
    return Pass(stores, {})


def val_condition(saved: SavedPredictions, val: Source, source: Source) -> str:
    """Return under which condition the answers for the validation data stand: ``"val"``, else ``"clean"``.

    ``"clean"`` is taken only where validation and test data have no id in common, since an answer could otherwise be
    that of another image.

    Raises:
        ConfigError: The answers are not there, or cannot be told from those for the test data.
    """
    if "val" in saved.conditions:
        return "val"
    shared = int(torch.isin(val.info.ids, source.info.ids).sum())
    if shared or not saved.matches(CLEAN.key, val)[0]:
        raise ConfigError(
            f"saved predictions {saved.settings()['file']!r}",
            "answers for the validation data under the condition 'val'",
            f"none; {shared} of {len(val)} ids of val are also ids of data"
            if shared
            else "no such condition, and no id of val under 'clean'",
            "Save the answers for val with the condition 'val', or leave val= out.",
        )
    return CLEAN.key


def unparsed_sentences(stores: Mapping[str, PredictionStore]) -> list[str]:
    """Return sentences on the answers that could not be parsed, for the first page; none where all were.

    Args:
        stores: Condition key to labelled predictions; only classes without probabilities are counted, as numbers that
            are not finite have a sentence of their own.
    """
    counts = {
        key: (int((~store.finite).sum()), len(store))
        for key, store in stores.items()
        if store.answers_only and store.labels is not None
    }
    broken = {key: pair for key, pair in counts.items() if pair[0]}
    clean = [key for key in broken if key == CLEAN.key]
    shifted = sorted((key for key in broken if key != CLEAN.key), key=lambda key: -broken[key][0])
    out = [_unparsed(*broken[key], "on clean data") for key in clean]
    if len(shifted) <= _LISTED:
        return out + [_unparsed(*broken[key], f"under {key}") for key in shifted]
    return [*out, _unparsed(*broken[shifted[0]], f"under {shifted[0]}, the most of {len(shifted)} such conditions")]


def _unparsed(count: int, total: int, where: str) -> str:
    they = "it counts" if count == 1 else "they count"
    return f"Unparsed answers: {count} of {total} answers could not be parsed {where}; {they} as wrong."


def saved_notes(
    saved: SavedPredictions, source: Source, plan: Plan, val: Source | None, ood: Mapping[str, Source]
) -> list[str]:
    """Return sentences on what a report on saved answers cannot know, and on answers that were not used."""
    out = ["Batch independence and determinism of the model: its answers were saved elsewhere, so it was not probed."]
    known = [sweep.conditions[0].label for sweep in plan.sweeps if not isinstance(sweep.shift, RecordedShift)]
    if known:
        out.append(
            f"Amounts of {', '.join(known)}: those of the default settings, as the file does not say which were used."
        )
    place = CLEAN.key if val is None else val_condition(saved, val, source)
    of_val = 0 if val is None or place != CLEAN.key else saved.matches(CLEAN.key, val)[0]
    used = {condition.key: source for condition in plan.conditions}
    used |= {f"ood:{name}": foreign for name, foreign in ood.items()}
    if val is not None and place != CLEAN.key:
        used[place] = val
    extra = {key: saved.matches(key, data)[1] - (of_val if key == CLEAN.key else 0) for key, data in used.items()}
    surplus = [f"{count} under {key!r}" for key, count in extra.items() if count]
    if surplus:
        out.append(f"Answers for samples that are not in the data were ignored: {', '.join(surplus)}.")
    unused = [name for name in saved.conditions if name not in extra]
    if unused:
        out.append(f"Answers under {', '.join(map(repr, unused))} were ignored: no such data were given.")
    return out
