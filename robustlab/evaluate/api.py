"""evaluate_under_shift: the one call."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from robustlab.core.attack import Attack
from robustlab.core.checks import check_images, check_labels
from robustlab.core.detector import Detector
from robustlab.core.errors import (
    ConfigError,
    KindError,
    LabelError,
    ModelError,
    RangeError,
    RobustlabError,
    RobustlabWarning,
)
from robustlab.core.model import Capabilities, Model, probe, wrap
from robustlab.core.registry import DETECTORS, METRICS
from robustlab.core.shift import Shift
from robustlab.core.source import Source
from robustlab.core.types import Batch
from robustlab.data import load_data
from robustlab.metrics import Resampler, fit_frozen
from robustlab.metrics.base import Context, Frozen
from robustlab.metrics.store import PredictionStore
from robustlab.report.report import Picture, Report
from robustlab.report.rows import Row

from .gallery import make_gallery
from .manifest import make_manifest
from .plan import CLEAN, Plan, as_items, instance_hint, make_plan, resolve_attacks, resolve_shifts, without_attacks
from .run import Bar, Pass, adapt, first_chunk, forward_passes, is_out_of_memory, predict_source, progress_bar
from .score import Subject, condition_rows, ood_rows, worst_rows

logger = logging.getLogger("robustlab")


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Arguments after loading and checking."""

    model: Model
    source: Source
    val: Source | None
    ood: Mapping[str, Source]
    plan: Plan
    detectors: Mapping[str, Detector]
    metrics: tuple[str, ...] | None
    groups: tuple[str, ...]
    capabilities: Capabilities


@dataclass(frozen=True, eq=False)
class _Predictions:
    """Every forward pass of an evaluation, done."""

    main: Pass
    val: PredictionStore | None
    ood: Mapping[str, PredictionStore]
    failures: Mapping[str, str]


def evaluate_under_shift(
    model: Any,
    data: Any,
    *,
    val: Any = None,
    shifts: str | Shift | Sequence[str | Shift] = "standard",
    severities: Sequence[float] = (1, 2, 3, 4, 5),
    attacks: str | Attack | Sequence[str | Attack] = (),
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
    gallery: bool = False,
    progress: bool = True,
) -> Report:
    """Evaluate a model on clean data and under shifts, attacks and foreign inputs, with an interval on every number.

    Args:
        model: A ``torch.nn.Module`` or callable (see ``wrap`` for what is assumed), a wrapped model, or a defence.
        data: Labelled test data: anything ``load_data`` takes.
        val: Clean labelled validation data: freezes decision and referral thresholds. Without it the silent-failure
            rate and sensitivity/specificity are NaN with that reason.
        shifts: A suite name, a corruption name, a ``Shift``, or several of them.
        severities: Numbers in (0, 5] at which every shift is run.
        attacks: Attacks, each run at its own budgets.
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
        gallery: Put example pictures into the report.
        progress: Show a progress bar.

    Returns:
        A ``Report``: rows, manifest, predictions, and views of them.

    Raises:
        RobustlabError: Something does not fit; the message says who, what was expected, what came, and what to do.
            Conditions that fail later are listed in the report instead.
    """
    started = time.time()
    _check_numbers(
        {"referral": referral, "plausible": plausible, "margin": margin},
        {"seed": seed, "replicates": replicates, "batch_size": batch_size},
    )
    groups = as_items(groups, str, "groups as column names", "For example groups=('sex', 'site').")
    training = None if fit is None else load_data(fit, split="train")
    inputs = _load(model, data, val, ood, shifts, severities, attacks, detectors, metrics, groups, cluster, device)
    if training is not None:
        for detector in inputs.detectors.values():
            detector.fit(inputs.model, training)
    chunk = batch_size or first_chunk(inputs.source, inputs.model.device)
    predictions, chunk = _predict(
        inputs, seed=seed, chunk=max(2, chunk), cluster=cluster, progress=progress, auto=batch_size is None
    )

    flag = next((name for name in inputs.detectors if name != "msp"), next(iter(inputs.detectors), ""))
    if flag and inputs.detectors[flag].skip_reason(inputs.model) is not None:
        flag = next((n for n, d in inputs.detectors.items() if d.skip_reason(inputs.model) is None), "")
    frozen = Frozen(referral=referral) if predictions.val is None else fit_frozen(predictions.val, referral, flag)
    context = Context(
        resampler=Resampler(seed=seed, replicates=replicates), frozen=frozen, class_names=_class_names(inputs)
    )
    rows = _score(inputs, predictions, context, plausible)
    manifest = make_manifest(
        model=inputs.model,
        capabilities=inputs.capabilities,
        source=inputs.source,
        val=inputs.val,
        ood=inputs.ood,
        plan=inputs.plan,
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
            "groups": list(groups),
            "cluster": cluster,
            "confidence_level": 0.95,
            "replicates": replicates,
        },
    )
    pictures: tuple[Picture, ...] = (
        make_gallery(inputs.source, inputs.plan, inputs.model, seed, predictions.failures) if gallery else ()
    )
    stores = {**predictions.main.stores, **{f"ood:{name}": store for name, store in predictions.ood.items()}}
    return Report(rows=tuple(rows), manifest=manifest, predictions=stores, gallery=pictures)


def _check_numbers(reals: Mapping[str, float], integers: Mapping[str, int | None]) -> None:
    who = "evaluate_under_shift"
    for values, kinds, words in ((reals, (int, float), "a number"), (integers, int, "a whole number")):
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, kinds):
                if name == "batch_size" and value is None:
                    continue
                raise KindError(who, f"{name} as {words}", f"{value!r}", "Leave it out for the default.")
    referral, plausible, margin = reals["referral"], reals["plausible"], reals["margin"]
    replicates, batch_size = integers["replicates"], integers["batch_size"]
    if not 0 < referral < 1:
        raise RangeError(who, "referral as a share between 0 and 1", f"{referral}", "10 % is 0.1.")
    if not 0 < plausible <= 5:
        raise RangeError(who, "plausible as a severity in (0, 5]", f"{plausible}", "3 is the default.")
    if not 0 <= margin < 1:
        raise RangeError(who, "margin as a share in [0, 1)", f"{margin}", "Two points are 0.02.")
    if replicates is not None and replicates < 100:
        raise RangeError(who, "at least 100 bootstrap replicates", f"{replicates}", "1000 is the default.")
    if batch_size is not None and batch_size < 2:
        raise RangeError(
            who, "a batch size of at least 2", f"{batch_size}", "Single-image passes use other kernels than batches."
        )


def _load(
    model: Any,
    data: Any,
    val: Any,
    ood: Mapping[str, Any] | None,
    shifts: str | Shift | Sequence[str | Shift],
    severities: Sequence[float],
    attacks: str | Attack | Sequence[str | Attack],
    detectors: Sequence[str | Detector],
    metrics: str | Sequence[str],
    groups: Sequence[str],
    cluster: str | None,
    device: str | torch.device | None,
) -> _Inputs:
    """Turn the user's arguments into checked objects; everything that can be refused is refused here."""
    source = load_data(data)
    if source.info.labels is None or source.info.task is None:
        raise ConfigError(
            "evaluate_under_shift", "labelled data", "data without labels", "Pass labels to load_data(..., labels=...)."
        )
    plan = make_plan(resolve_shifts(shifts), severities, resolve_attacks(attacks), source.info.spec)
    chosen = resolve_detectors(detectors)
    names = _metric_names(metrics)
    for column in (*groups, *([cluster] if cluster else [])):
        source.column(column)
    wrapped = model if isinstance(model, Model) else wrap(model, task=source.info.task)
    _move(wrapped, device)
    first = source.read(range(min(8, len(source)))).to(wrapped.device)
    check_images(first.images, f"data {source.info.name!r}")
    _try_model(wrapped, first, source)
    validation = None if val is None else load_data(val, split="val")
    if validation is not None:
        _check_labelled(validation, wrapped, "val")
        if validation.fingerprint() == source.fingerprint():
            warnings.warn(
                f"val and data are the same ({source.info.name!r}): thresholds fitted on test data flatter the model. "
                "Pass other data as val=.",
                RobustlabWarning,
                stacklevel=4,
            )
    _check_class_names(wrapped, source, validation)
    if wrapped.task == "multilabel":
        plan = without_attacks(plan)
    if ood is not None and not isinstance(ood, Mapping):
        raise KindError(
            "evaluate_under_shift",
            "ood as a mapping from a name to data",
            type(ood).__name__,
            "For example ood={'near/site-b': b, 'far/photos': photos}.",
        )
    others = {name: load_data(foreign) for name, foreign in (ood or {}).items()}
    capabilities = probe(wrapped, first)
    return _Inputs(wrapped, source, validation, others, plan, chosen, names, tuple(groups), capabilities)


def _check_class_names(model: Model, source: Source, validation: Source | None) -> None:
    """Refuse names in another order: indices would then mean other classes without anything looking wrong."""
    wanted = source.info.class_names
    others = (("val", validation.info.class_names if validation else None), ("the model", model.class_names))
    for who, names in others:
        if wanted is not None and names is not None and tuple(names) != tuple(wanted):
            raise LabelError(
                f"data {source.info.name!r}",
                f"the classes of {who}, in that order: {', '.join(names)}",
                ", ".join(wanted),
                "Pass the same class_names= to load_data for every split (a folder without one class numbers the "
                "others anew).",
            )


def _move(model: Model, device: str | torch.device | None) -> None:
    if device is None:
        return
    try:
        model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for a device
        if is_out_of_memory(error):
            raise
        here = "'cpu' or 'cuda'" if torch.cuda.is_available() else "'cpu'"
        raise ConfigError("evaluate_under_shift", f"device {here}", f"{device!r}: {error}", "Leave it out.") from error


def _try_model(model: Model, first: Batch, source: Source) -> None:
    """Run the model on a few images, so that a misfit shows before hours are spent."""
    shape = tuple(first.images.shape)
    try:
        model.predict(first)
    except Exception as error:  # a network may fail in any way
        if isinstance(error, (RobustlabError, Warning)) or is_out_of_memory(error):
            raise
        raise ModelError(
            f"model {model.model_name!r}",
            f"a forward pass on images of shape {shape}",
            f"{type(error).__name__}: {error}",
            "Tell wrap() what the network takes, e.g. size=224 or channels=3.",
        ) from error
    multilabel = source.info.task == "multilabel"
    if multilabel != (model.task == "multilabel"):
        raise ConfigError(
            f"model {model.model_name!r}",
            f"task {source.info.task!r}, as the labels of {source.info.name!r} have shape "
            f"{tuple(source.info.labels.shape) if source.info.labels is not None else ()}",
            f"task {model.task!r}",
            f"Pass task={source.info.task!r} to wrap(), or other labels.",
        )
    _check_labelled(source, model, "data")
    if source.info.task == "binary" and model.num_classes > 2:
        raise LabelError(
            f"data {source.info.name!r}",
            f"labels of {model.num_classes} classes, as the model has {model.num_classes} outputs",
            "labels 0 and 1 only",
            "Give the network two outputs (on the command line --arg num_classes=2); if the labels are a part of more "
            "classes, say so with load_data(..., task='multiclass').",
        )


def _check_labelled(source: Source, model: Model, role: str) -> None:
    labels = source.info.labels
    if labels is None:
        raise ConfigError(
            "evaluate_under_shift", f"labelled {role}", "no labels", "Pass labels to load_data(..., labels=...)."
        )
    check_labels(
        labels,
        task=model.task,
        num_classes=model.num_classes,
        count=len(source),
        who=f"{role} {source.info.name!r}",
    )


def resolve_detectors(detectors: Sequence[str | Detector]) -> dict[str, Detector]:
    """Turn detector names and objects into a mapping from name to detector."""
    expected = "detectors as names or Detector objects"
    found: dict[str, Detector] = {}
    for item in as_items(detectors, (str, Detector), expected, "For example detectors=('msp', 'energy')."):
        detector = DETECTORS.get(item)() if isinstance(item, str) else item
        if not isinstance(detector, Detector):
            raise KindError("evaluate_under_shift", expected, f"{item!r}", instance_hint(item, "For example 'energy'."))
        if not detector.name or detector.name in found:
            raise ConfigError(
                "evaluate_under_shift",
                "detectors with different names",
                f"{detector.name or 'an unnamed one'!r}{' twice' if detector.name in found else ''}",
                "Register the class under a name of its own: @robustlab.register_detector('vendor:name').",
            )
        found[detector.name] = detector
    return found


def _metric_names(metrics: str | Sequence[str]) -> tuple[str, ...] | None:
    if metrics == "default":
        return None
    if metrics == "all":
        return tuple(name for name, metric in METRICS.items() if metric.on == "labels")
    names = as_items(metrics, str, "metrics as 'default', 'all' or names", "For example metrics=('accuracy', 'ece').")
    for name in names:
        METRICS.get(name)
    return names


def _class_names(inputs: _Inputs) -> tuple[str, ...] | None:
    names = inputs.model.class_names or inputs.source.info.class_names
    if names is not None and len(names) != inputs.model.num_classes:
        logger.warning("class names ignored: %d names for %d classes", len(names), inputs.model.num_classes)
        return None
    return names


def _predict(
    inputs: _Inputs, *, seed: int, chunk: int, cluster: str | None, progress: bool, auto: bool
) -> tuple[_Predictions, int]:
    """Run all forward passes; start again with half the chunk when memory runs out."""
    while True:
        passes = [(len(inputs.source), len(inputs.plan.conditions))]
        passes += [(len(source), 1) for source in (*inputs.ood.values(), *([inputs.val] if inputs.val else []))]
        total = forward_passes(passes, chunk)
        try:
            with progress_bar(total, progress) as bar:
                return _predict_all(inputs, seed, chunk, cluster, bar), chunk
        except Exception as error:
            if not (auto and is_out_of_memory(error) and chunk > 2):
                raise
            logger.warning("memory ran out at %d samples a pass: trying %d", chunk, chunk // 2)
        chunk = max(2, chunk // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _predict_all(inputs: _Inputs, seed: int, chunk: int, cluster: str | None, bar: Bar) -> _Predictions:
    only_clean = replace(inputs.plan, sweeps=())
    spec = inputs.source.info.spec

    def run(source: Source, plan: Plan, adapter: Callable[[Batch], Batch], unit: str | None) -> Pass:
        return predict_source(
            inputs.model,
            source,
            plan,
            detectors=inputs.detectors,
            seed=seed,
            chunk=chunk,
            cluster=unit,
            adapter=adapter,
            spec=spec,
            bar=bar,
        )

    main = run(inputs.source, inputs.plan, _same, cluster)
    val = None if inputs.val is None else run(inputs.val, only_clean, _adapter(inputs.val, spec), None)
    foreign: dict[str, PredictionStore] = {}
    failures = dict(main.failures)
    for name, source in inputs.ood.items():
        unit = cluster if cluster in source.info.groups else None
        try:
            store = run(source, only_clean, _adapter(source, spec), unit).stores[CLEAN.key]
        except Exception as error:
            if is_out_of_memory(error):
                raise
            logger.warning("OOD set %s failed: %s", name, error)
            failures[f"ood:{name}"] = f"{type(error).__name__}: {error}"
            continue
        foreign[name] = replace(store, labels=None)
    return _Predictions(main, None if val is None else val.stores[CLEAN.key], foreign, failures)


def _same(batch: Batch) -> Batch:
    return batch


def _adapter(source: Source, spec: Any) -> Callable[[Batch], Batch]:
    return lambda batch: adapt(batch, source.info.spec, spec)


def _score(inputs: _Inputs, predictions: _Predictions, context: Context, plausible: float) -> list[Row]:
    stores = predictions.main.stores
    clean = stores[CLEAN.key]
    subject = Subject(inputs.model.model_name, inputs.source.info.name)
    rows: list[Row] = []
    for condition in inputs.plan.conditions:
        if condition.key in stores:
            rows += condition_rows(
                subject, condition, stores[condition.key], clean, context, inputs.metrics, inputs.source, inputs.groups
            )
    shifted = [condition for condition in inputs.plan.conditions if condition.kind == "corruption"]
    likely = [condition for condition in shifted if condition.severity <= plausible]
    rows += worst_rows(subject, likely, stores, context, "worst plausible")
    rows += worst_rows(subject, shifted, stores, context, "worst")
    for name, store in predictions.ood.items():
        rows += ood_rows(subject, name, store, clean, context)
    return rows
