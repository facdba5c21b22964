"""evaluate_under_shift: the one call."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from robustlab.core.attack import Attack
from robustlab.core.detector import Detector
from robustlab.core.shift import Shift
from robustlab.data.predictions import SavedPredictions
from robustlab.metrics import Resampler, fit_frozen
from robustlab.metrics.base import Context, Frozen
from robustlab.metrics.store import PredictionStore
from robustlab.report.report import Report
from robustlab.report.rows import Row

from .checklist import check_trust, checklists
from .engine import Predictions, aimed, predict_all
from .gallery import confusing_pictures, make_gallery
from .inputs import Inputs, check_numbers, check_places, class_names_of, load_inputs
from .leaks import check_untuned
from .manifest import make_manifest
from .plan import CLEAN
from .preflight import examine, fit_detectors, with_scores
from .saved import saved_notes, unparsed_sentences
from .score import (
    Subject,
    absent_rows,
    alarm_rows,
    condition_rows,
    hiding_rows,
    ood_rows,
    summary_rows,
    worst_rows,
)
from .worst import with_worst_attacks


def evaluate_under_shift(
    model: Any,
    data: Any,
    *,
    val: Any = None,
    shifts: str | Shift | Sequence[str | Shift] = "standard",
    severities: Sequence[float] = (1, 2, 3, 4, 5),
    attacks: str | Attack | Sequence[str | Attack] = (),
    trust: int | None = None,
    ood: Mapping[str, Any] | None = None,
    detectors: Sequence[str | Detector] = ("msp", "energy"),
    fit: Any = None,
    metrics: str | Sequence[str] = "default",
    groups: Sequence[str] = (),
    cluster: str | None = None,
    referral: float = 0.1,
    plausible: float = 3.0,
    margin: float = 0.02,
    seed: int = 0,
    replicates: int = 1000,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    cache: str | Path | None = None,
    executor: Executor | None = None,
    gallery: bool = False,
    progress: bool = True,
) -> Report:
    """Evaluate a model on clean data and under shifts, attacks and foreign inputs, with an interval on every number.

    Args:
        model: A ``torch.nn.Module`` or callable (see ``wrap`` for what is assumed), a wrapped model, a defence, a
            ``ModelSpec``, or what ``load_predictions`` returned: its conditions then replace ``shifts``,
            ``severities`` and ``attacks``, and nothing is run.
        data: Labelled test data: anything ``load_data`` takes.
        val: Clean labelled validation data: freezes decision and referral thresholds. Without it the silent-failure
            rate and sensitivity/specificity are NaN with that reason.
        shifts: A suite name, a corruption name, a ``Shift``, or several of them.
        severities: Numbers in (0, 5] at which every shift is run.
        attacks: Attacks, each run at its own budgets. Where several share a budget, a row "worst attack" takes for each
            sample the one that comes closest to a wrong answer. A ``DetectorAttack`` is run on the ``ood`` sets, whose
            images then hide, or on the data, which then raise alarms.
        trust: Right samples on which the checklist runs that tells how far to trust the attacks, some 500 gradients
            each; an eighth of the data, 10 to 64, if None; 0 for no checklist.
        ood: Name (``near/...``, ``far/...``) to data the model was never meant for.
        detectors: OOD scores; the first that is not ``"msp"`` also refers cases in the silent-failure rate.
        fit: In-distribution training data for detectors that need fitting.
        metrics: ``"default"``, ``"all"``, or names.
        groups: Columns by which accuracy-type metrics are repeated.
        cluster: Column of ``data`` with the independent unit, e.g. ``"patient"``: intervals resample units, not images.
        referral: Share of validation cases that confidence and detector may refer to a human, in (0, 1).
        plausible: Severities up to this one count as plausible for the worst plausible shift.
        margin: Drop of accuracy that matters, as a share; decides between *breaks*, *worse* and *holds*.
        seed: Seed of every draw, including the bootstrap.
        replicates: Bootstrap replicates.
        batch_size: Samples of every forward pass; found automatically (halved when memory runs out) if None.
        device: Where to run; the model's device if None.
        cache: Folder that keeps the model's answers. An evaluation that was stopped goes on where it stood, and what
            was run before is not run again; may be shared by processes, and be the report's own folder.
        executor: Where to run: a ``ProcessPool``, or any ``concurrent.futures.Executor``; this process if None.
        gallery: Put example pictures into the report; not for saved predictions.
        progress: Show a progress bar.

    Returns:
        A ``Report``: rows, manifest, predictions, and views of them.

    Raises:
        RobustlabError: Something does not fit; the message says who, what was expected, what came, and what to do.
            Conditions and samples that fail later are listed in the report instead.
    """
    started = time.time()
    check_numbers(
        {"referral": referral, "plausible": plausible, "margin": margin},
        {"seed": seed, "replicates": replicates, "batch_size": batch_size},
    )
    check_places(cache, executor)
    check_trust(trust)
    inputs = load_inputs(
        model,
        data,
        val=val,
        fit=fit,
        ood=ood,
        shifts=shifts,
        severities=severities,
        attacks=attacks,
        detectors=detectors,
        metrics=metrics,
        groups=groups,
        cluster=cluster,
        device=device,
        executor=executor,
    )
    check_untuned(inputs.detectors, inputs.source, inputs.ood)
    preflight = examine(inputs, cache, cluster)
    fit_detectors(inputs.detectors, inputs.model, inputs.training)
    passes, kept = with_scores(inputs, preflight)
    predictions, chunk = predict_all(
        passes, kept, executor, seed=seed, cluster=cluster, batch_size=batch_size, progress=progress
    )
    plan, stores = aimed(inputs.plan, predictions.val), predictions.main.stores
    steady = preflight.capabilities.deterministic
    if steady:  # of single passes of a random model, the worst counts lucky draws
        plan, stores = with_worst_attacks(plan, stores, inputs.source.info.spec)
    inputs = replace(inputs, plan=plan)
    predictions = replace(predictions, main=replace(predictions.main, stores=stores))

    flag = next((name for name in inputs.detectors if name != "msp"), next(iter(inputs.detectors), ""))
    if flag and inputs.detectors[flag].skip_reason(inputs.model) is not None:
        flag = next((n for n, d in inputs.detectors.items() if d.skip_reason(inputs.model) is None), "")
    frozen = (
        Frozen(referral=referral) if predictions.val is None else fit_frozen(replace(predictions.val), referral, flag)
    )
    context = Context(
        resampler=Resampler(seed=seed, replicates=replicates), frozen=frozen, class_names=class_names_of(inputs)
    )
    rows = _score(inputs, predictions, context, plausible, steady=steady)
    manifest = make_manifest(
        model=inputs.model,
        capabilities=preflight.capabilities,
        diagnosis=preflight.diagnosis,
        notes=[*_notes(inputs, predictions), *([] if steady else _on_random_models(inputs))],
        source=inputs.source,
        val=inputs.val,
        ood=inputs.ood,
        plan=inputs.plan,
        trust=[]
        if isinstance(inputs.model, SavedPredictions)
        else checklists(inputs.model, inputs.source, inputs.plan, trust, seed, preflight.entry),
        failures=predictions.failures,
        stores=predictions.main.stores,
        frozen=frozen,
        cluster=cluster,
        chunk=chunk,
        seed=seed,
        started=started,
        settings={
            "referral": referral,
            "plausible": plausible,
            "margin": margin,
            "severities": [float(s) for s in severities],
            "detectors": list(inputs.detectors),
            "metrics": list(inputs.metrics) if inputs.metrics is not None else "default",
            "groups": list(inputs.groups),
            "cluster": cluster,
            "confidence_level": 0.95,
            "replicates": replicates,
        },
    )
    stores = {**predictions.main.stores, **_foreign(predictions)}
    report = Report(rows=tuple(rows), manifest=manifest, predictions=stores)
    if gallery and not isinstance(inputs.model, SavedPredictions):
        pictures = make_gallery(inputs.source, inputs.plan, inputs.model, seed, predictions.main.stores)
        report = replace(report, gallery=(*pictures, *confusing_pictures(report, inputs.source, inputs.ood)))
    return report


def _foreign(predictions: Predictions) -> dict[str, PredictionStore]:
    """Return the predictions on foreign data by the names that they have in a report."""
    return {
        f"ood:{name}" if key == CLEAN.key else f"ood:{name}@{key}": store
        for name, stores in predictions.ood.items()
        for key, store in stores.items()
    }


def _on_random_models(inputs: Inputs) -> list[str]:
    """Return what a report on attacks says where the model is random."""
    if all(condition.kind != "attack" for condition in inputs.plan.conditions):
        return []
    return [
        "Random answers under attack: every condition is one pass, so a row counts lucky draws of the model, and the "
        "worst of several attacks and smallest budgets are left out; judge what an attack found on fresh draws."
    ]


def _notes(inputs: Inputs, predictions: Predictions) -> list[str]:
    """Return what a report on saved predictions has to say about them."""
    if not isinstance(inputs.model, SavedPredictions):
        return []
    notes = saved_notes(inputs.model, inputs.source, inputs.plan, inputs.val, inputs.ood)
    return [*unparsed_sentences(predictions.main.stores), *notes]


def _score(inputs: Inputs, predictions: Predictions, context: Context, plausible: float, *, steady: bool) -> list[Row]:
    stores = predictions.main.stores
    clean = stores[CLEAN.key]
    subject = Subject(inputs.model.model_name, inputs.source.info.name)
    rows: list[Row] = []
    for condition in inputs.plan.conditions:
        if condition.key in stores and condition.kind != "detector attack":
            rows += condition_rows(
                subject, condition, stores[condition.key], clean, context, inputs.metrics, inputs.source, inputs.groups
            )
    shifted = [condition for condition in inputs.plan.conditions if condition.kind == "corruption"]
    likely = [condition for condition in shifted if condition.severity <= plausible]
    rows += worst_rows(subject, likely, stores, context, "worst plausible")
    rows += worst_rows(subject, shifted, stores, context, "worst")
    attacked = [condition for condition in inputs.plan.conditions if condition.kind == "attack"]
    rows += summary_rows(subject, shifted, attacked if steady else [], stores, context, inputs.metrics)
    for name, foreign in predictions.ood.items():
        rows += ood_rows(subject, name, foreign[CLEAN.key], clean, context, inputs.metrics)
    hiding = inputs.plan.on_foreign.conditions[1:]
    alarms = [condition for condition in inputs.plan.conditions if condition.kind == "detector attack"]
    rows += hiding_rows(subject, hiding, predictions.ood, clean, context, inputs.metrics)
    rows += alarm_rows(subject, alarms, stores, predictions.ood, context, inputs.metrics)
    return rows + absent_rows(
        subject,
        inputs.metrics,
        rows,
        groups=bool(inputs.groups),
        ood=bool(predictions.ood),
        shifted=bool(shifted),
        attacked=bool(attacked),
    )
