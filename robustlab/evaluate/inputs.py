"""The arguments of an evaluation, loaded and checked: everything that can be refused is refused here."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from corruptions.adversarial import DetectorAttack
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
from robustlab.core.model import Model, wrap
from robustlab.core.registry import DETECTORS, METRICS
from robustlab.core.shift import Shift
from robustlab.core.source import Source
from robustlab.core.types import Batch, ModelOutputs
from robustlab.data import load_data
from robustlab.data.predictions import SavedPredictions

from .executors import ProcessPool
from .modelspec import ModelSpec
from .plan import Plan, Sweep, as_items, instance_hint, make_plan, next_label, resolve_attacks, resolve_shifts
from .saved import saved_plan
from .units import is_out_of_memory

logger = logging.getLogger("robustlab")


@dataclass(frozen=True, eq=False)
class Inputs:
    """Arguments after loading and checking.

    Args:
        model: The model, on its device.
        travels: What is sent to other processes in its place: the model itself, or its specification.
        probed: Up to eight samples on the model's device, and its outputs for them; None for saved predictions.
        was_training: The network came in training mode.
        source: The test data.
        val: Validation data.
        training: In-distribution data that detectors are fitted on.
        ood: Name to foreign data.
        plan: Conditions.
        detectors: Scorer name to detector.
        metrics: Names, or None for the default set.
        groups: Columns.
    """

    model: Model
    travels: Any
    probed: tuple[Batch, ModelOutputs] | None
    was_training: bool
    source: Source
    val: Source | None
    training: Source | None
    ood: Mapping[str, Source]
    plan: Plan
    detectors: Mapping[str, Detector]
    metrics: tuple[str, ...] | None
    groups: tuple[str, ...]


def check_numbers(reals: Mapping[str, float], integers: Mapping[str, int | None]) -> None:
    """Refuse numbers that make no sense; arguments are name to value.

    Raises:
        KindError: No number.
        RangeError: Out of range.
    """
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


def check_places(cache: object, executor: object) -> None:
    """Refuse what is no folder and no executor.

    Raises:
        KindError: One of them is of another kind.
    """
    if cache is not None and not isinstance(cache, (str, Path)):
        raise KindError("evaluate_under_shift", "cache as a folder", f"{cache!r}", "For example cache='runs/a'.")
    if executor is not None and not isinstance(executor, Executor):
        raise KindError(
            "evaluate_under_shift",
            "executor as a concurrent.futures.Executor",
            instance_hint(executor, f"{executor!r}"),
            "For example robustlab.ProcessPool(4), or client.get_executor() of a Dask client.",
        )


def load_inputs(
    model: Any,
    data: Any,
    *,
    val: Any,
    fit: Any,
    ood: Mapping[str, Any] | None,
    shifts: str | Shift | Sequence[str | Shift],
    severities: Sequence[float],
    attacks: str | Attack | Sequence[str | Attack],
    detectors: Sequence[str | Detector],
    metrics: str | Sequence[str],
    groups: Sequence[str],
    cluster: str | None,
    device: str | torch.device | None,
    executor: Executor | None,
) -> Inputs:
    """Turn the user's arguments into checked objects; they are those of ``evaluate_under_shift``."""
    groups = as_items(groups, str, "groups as column names", "For example groups=('sex', 'site').")
    training = None if fit is None else load_data(fit, split="train")
    source = load_data(data)
    if source.info.labels is None or source.info.task is None:
        raise ConfigError(
            "evaluate_under_shift", "labelled data", "data without labels", "Pass labels to load_data(..., labels=...)."
        )
    asked = resolve_attacks(attacks)
    if isinstance(model, SavedPredictions):
        model = model.bind(source)
        plan = saved_plan(model, asked)
    else:
        plan = make_plan(resolve_shifts(shifts), severities, asked, source.info.spec)
    chosen = resolve_detectors(detectors)
    names = _metric_names(metrics)
    source.refresh()
    for column in (*groups, *([cluster] if cluster else [])):
        source.column(column)
    if isinstance(model, ModelSpec) and model.task is None:
        model = dataclasses.replace(model, task=source.info.task)
    built = model.build() if isinstance(model, ModelSpec) else model
    wrapped = built if isinstance(built, Model) else wrap(built, task=source.info.task)
    device = _device_of(executor, device)
    move(wrapped, device, "evaluate_under_shift")
    was_training = any(module.training for root in wrapped.modules() for module in root.modules())
    probed = None
    if not isinstance(wrapped, SavedPredictions):
        first = source.read(range(min(8, len(source)))).to(wrapped.device)
        check_images(first.images, f"data {source.info.name!r}")
        probed = first, _try_model(wrapped, first)
    _check_fit(wrapped, source)
    validation = None if val is None else load_data(val, split="val")
    if validation is not None:
        validation.refresh()
        _check_labelled(validation, wrapped, "val")
        if validation.fingerprint() == source.fingerprint():
            warnings.warn(
                f"val and data are the same ({source.info.name!r}): thresholds fitted on test data flatter the model. "
                "Pass other data as val=.",
                RobustlabWarning,
                stacklevel=4,
            )
    _check_class_names(wrapped, source, validation)
    if ood is not None and not isinstance(ood, Mapping):
        raise KindError(
            "evaluate_under_shift",
            "ood as a mapping from a name to data",
            type(ood).__name__,
            "For example ood={'near/site-b': b, 'far/photos': photos}.",
        )
    foreign = {name: load_data(other) for name, other in (ood or {}).items()}
    for other in foreign.values():
        other.refresh()
    return Inputs(
        model=wrapped,
        travels=model if isinstance(model, ModelSpec) else wrapped,
        probed=probed,
        was_training=was_training,
        source=source,
        val=validation,
        training=training,
        ood=foreign,
        plan=_attackable(plan, wrapped, foreign),
        detectors=chosen,
        metrics=names,
        groups=tuple(groups),
    )


def _attackable(plan: Plan, model: Model, foreign: Mapping[str, Source]) -> Plan:
    """Return the plan without attacks on detectors that the model does not suit, and without hiding of nothing."""
    skipped = list(plan.skipped)

    def kept(sweeps: Sequence[Sweep]) -> tuple[Sweep, ...]:
        found = []
        for sweep in sweeps:
            attack = sweep.shift
            reason = attack.resolved().skip_reason(model) if isinstance(attack, DetectorAttack) else None
            if sweep in plan.hiding and not foreign:
                reason = "there is no OOD set whose images could hide (ood=)"
            if reason is None:
                found.append(sweep)
            else:
                skipped.append((sweep.conditions[0].label, reason))
        return tuple(found)

    sweeps, hiding = kept(plan.sweeps), kept(plan.hiding)
    return dataclasses.replace(plan, sweeps=sweeps, hiding=hiding, skipped=tuple(skipped))


def _device_of(executor: Executor | None, device: str | torch.device | None) -> str | torch.device | None:
    """Return where to run; a pool with devices decides, and none may contradict it."""
    if not isinstance(executor, ProcessPool) or not executor.devices:
        return device
    kinds = {torch.device(name).type for name in executor.devices}
    if device is not None:
        kinds.add(torch.device(device).type)
    if len(kinds) > 1:
        raise ConfigError(
            "evaluate_under_shift",
            "one kind of device, since the last bits of answers differ between kinds",
            " and ".join(sorted(kinds)),
            "Leave device= out and give the pool devices of one kind.",
        )
    return executor.devices[0] if device is None else device


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


def move(model: Model, device: str | torch.device | None, who: str) -> None:
    """Move a model to a device, in place; None leaves it where it is.

    Raises:
        ConfigError: There is no such device.
    """
    if device is None:
        return
    try:
        model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for a device
        if is_out_of_memory(error):
            raise
        here = "'cpu' or 'cuda'" if torch.cuda.is_available() else "'cpu'"
        raise ConfigError(who, f"device {here}", f"{device!r}: {error}", "Leave it out.") from error


def _try_model(model: Model, first: Batch) -> ModelOutputs:
    """Return the model's outputs for a few images, so that a misfit shows before hours are spent."""
    shape = tuple(first.images.shape)
    try:
        return model.predict(first)
    except Exception as error:  # a network may fail in any way
        if isinstance(error, (RobustlabError, Warning)) or is_out_of_memory(error):
            raise
        raise ModelError(
            f"model {model.model_name!r}",
            f"a forward pass on images of shape {shape}",
            f"{type(error).__name__}: {error}",
            "Tell wrap() what the network takes, e.g. size=224 or channels=3.",
        ) from error


def _check_fit(model: Model, source: Source) -> None:
    """Refuse labels that the model cannot answer."""
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
        if not detector.name:
            raise ConfigError(
                "evaluate_under_shift",
                "detectors with names",
                f"{type(detector).__name__} without one",
                "Register the class under a name of its own: @robustlab.register_detector('vendor:name').",
            )
        if detector in found.values():
            raise ConfigError(
                "evaluate_under_shift", "different detectors", f"{detector.name!r} twice", "Leave one of them out."
            )
        name = detector.name
        while name in found:
            name = next_label(name)
        found[name] = detector
    return found


def _metric_names(metrics: str | Sequence[str]) -> tuple[str, ...] | None:
    """Return the names, each once, with ``"default"`` and ``"all"`` spelt out; None for the default set alone."""
    if metrics == "default":
        return None
    expected, fix = "metrics as 'default', 'all' or names", "For example metrics=('accuracy', 'ece')."
    found: list[str] = []
    for name in as_items(metrics, str, expected, fix):
        if not isinstance(name, str):
            raise KindError("evaluate_under_shift", expected, f"{name!r}", fix)
        if name in ("default", "all"):
            found += [known for known, item in METRICS.items() if name == "all" or item.default]
        else:
            found.append(METRICS.get(name).name)
    return tuple(dict.fromkeys(found))


def class_names_of(inputs: Inputs) -> tuple[str, ...] | None:
    """Return the names of the model's outputs, or None where there are none that fit."""
    names = inputs.model.class_names or inputs.source.info.class_names
    if names is not None and len(names) != inputs.model.num_classes:
        logger.warning("class names ignored: %d names for %d classes", len(names), inputs.model.num_classes)
        return None
    return names
