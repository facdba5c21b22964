"""doctor: likely mistakes in how a model and its data were put together, found before numbers are believed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from robustlab.core.errors import DataFileError, ModelError
from robustlab.core.model import Capabilities, Model, probe, wrap
from robustlab.core.source import Source
from robustlab.data import load_data
from robustlab.data.predictions import SavedPredictions

from .diagnosis import Diagnosis as Diagnosis
from .diagnosis import Finding as Finding
from .diagnosis import Outcome
from .doctor_checks import (
    check_capabilities,
    check_label_offset,
    check_majority,
    check_normalisation,
    check_output_kind,
    check_outputs,
    check_train_mode,
)
from .doctor_data import data_outcomes
from .doctor_passes import Evidence, tolerant
from .inputs import move
from .modelspec import ModelSpec
from .units import is_out_of_memory

_MODE_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
_SPOIL_ANSWERS = ("double-normalisation", "missing-normalisation", "probabilities-as-logits", "labels-off-by-one")


def doctor(
    model: Any,
    data: Any,
    *,
    val: Any = None,
    train: Any = None,
    cluster: str | None = None,
    device: str | torch.device | None = None,
) -> Diagnosis:
    """Look for likely mistakes in a model and its data: wrong preprocessing, labels, outputs, and overlapping sets.

    Looked for are: mean and std applied twice or not at all; labels off by one class; a network in training mode;
    probabilities taken for logits and the reverse; answers that depend on the batch, or differ from pass to pass;
    numbers of classes that do not fit; images or patients shared with ``train`` or ``val``; equal images with different
    labels; a model that always gives one answer. What an evaluation would refuse becomes a finding here. Up to 512
    images of each set go through the network, twice where mean and std are declared.

    Args:
        model: A module, a callable, a wrapped model, a ``ModelSpec`` or a defence; moved to ``device`` in place.
        data: The test data: anything ``load_data`` takes; most checks need labels.
        val: Validation data; searched for the images of ``data``.
        train: Training data, likewise.
        cluster: Column with the independent unit, e.g. ``"patient"``; no unit of ``data`` may occur in the others.
        device: Where to run; the model's device if None.

    Returns:
        Findings, checks that passed, and checks that could not be made, with reasons.

    Raises:
        RobustlabError: The data or the model cannot be loaded, or a column or device does not exist.
    """
    source = load_data(data)
    validation = None if val is None else load_data(val, split="val")
    training = None if train is None else load_data(train, split="train")
    if cluster is not None:
        source.column(cluster)
    wrapped = _as_model(model, source)
    if isinstance(wrapped, SavedPredictions):
        seen = Diagnosis.of([("forward-pass", "saved predictions cannot be run on images")])
        names, count = wrapped.class_names, None
    else:
        move(wrapped, device, "doctor")
        was_training = _is_training(wrapped)
        with _eval_mode(wrapped):
            capabilities, count = _probe(wrapped, source)
            seen = examine_model(wrapped, source, capabilities, was_training=was_training, thorough=True)
            for role, other in (("val", validation), ("train", training)):  # where mistakes may show more
                if other is not None and other.info.labels is not None:
                    also = examine_model(wrapped, other, None, was_training=False, thorough=True)
                    seen = seen.merged(also.new(seen, role))
        names = wrapped.class_names
    found = examine_data(source, val=validation, train=training, cluster=cluster, num_classes=count, thorough=True)
    return seen.merged(_check_names(names, source)).merged(found)


def examine_model(
    model: Model, source: Source, capabilities: Capabilities | None, *, was_training: bool, thorough: bool
) -> Diagnosis:
    """Make the checks that need forward passes.

    A model at which nothing looks suspicious makes one pass over at most 32 samples, and one over at most 16 with
    another normalisation where mean and std are declared or stated; only where these look suspicious up to 256 samples
    decide. Every statistical rule errs with a probability of at most 0.001 (see ``doctor_rules``).

    Args:
        model: The model, on its device; one that runs on images.
        source: The data.
        capabilities: What ``probe`` measured, or None.
        was_training: The network was in training mode when it was passed.
        thorough: Look at up to 512 samples at once, and at every alternative.
    """
    with _eval_mode(model):
        evidence = Evidence(model, source, thorough=thorough)
        training = check_train_mode(was_training, _mode_layers(model))
        try:
            outcomes = _model_outcomes(evidence, capabilities)
        except Exception as error:  # a network may fail in any way
            if isinstance(error, DataFileError) or is_out_of_memory(error):
                raise
            shape = (source.info.spec.channels, *source.info.spec.size)
            outcomes = [("forward-pass", _failed(error, shape))]
    return Diagnosis.of([("train-mode", training), *outcomes])


def examine_data(
    source: Source,
    *,
    val: Source | None,
    train: Source | None,
    cluster: str | None,
    num_classes: int | None,
    thorough: bool,
) -> Diagnosis:
    """Make the checks that need no forward pass: numbers of classes, class names, and overlap between sets.

    Args:
        source: The test data.
        val: Validation data, or None.
        train: Training data, or None.
        cluster: Column with the independent unit, or None.
        num_classes: Outputs of the model, or None.
        thorough: Search all images. Otherwise up to 20,000 of a set in memory and 2,000 of one that decodes its images
            when read, evenly spread; what was left out is among the skipped.
    """
    return Diagnosis.of(
        data_outcomes(source, val=val, train=train, cluster=cluster, num_classes=num_classes, thorough=thorough)
    )


def _as_model(model: Any, source: Source) -> Model:
    if isinstance(model, ModelSpec):
        return dataclasses.replace(model, task=model.task or source.info.task).build()
    return model if isinstance(model, Model) else wrap(model, task=source.info.task)


def _model_outcomes(evidence: Evidence, capabilities: Capabilities | None) -> list[tuple[str, Outcome]]:
    first = evidence.first  # fails here if the network fails at all
    outcomes: list[tuple[str, Outcome]] = [("forward-pass", None)]
    if not bool(torch.isfinite(first.raw).any()):
        text = f"None of the outputs for {len(first.raw)} images is finite."
        return [("forward-pass", Finding("forward-pass", text, "Check the weights and the preprocessing."))]
    task = evidence.source.info.task
    outcomes += check_output_kind(evidence)
    outcomes += check_capabilities(evidence, capabilities)
    outcomes.append(("class-count", check_outputs(evidence, _declared_classes(evidence.model))))
    if task is not None and (task == "multilabel") != (evidence.model.task == "multilabel"):
        text = f"The model's task is {evidence.model.task} and the labels are {task}."
        outcomes.append(
            ("class-count", Finding("class-count", text, f"Pass task={task!r} to wrap(), or other labels."))
        )
    outcomes += check_normalisation(evidence)
    outcomes.append(("labels-off-by-one", check_label_offset(evidence)))
    causes = [outcome.check for _, outcome in outcomes if isinstance(outcome, Finding)]
    causes = [check for check in causes if check in _SPOIL_ANSWERS]
    spoilt = f"the answers suffer from {causes[0]}" if causes else None
    outcomes.append(("majority-class", spoilt or check_majority(evidence)))
    return outcomes


def _declared_classes(model: Model) -> int | None:
    try:
        return model.num_classes
    except ModelError:  # not declared, and not run yet
        return None


def _failed(error: Exception, shape: tuple[int, ...]) -> Finding:
    text = " ".join(str(error).split())[:300]
    return Finding(
        "forward-pass",
        f"The network failed on images of shape {shape}: {type(error).__name__}: {text}",
        "Tell wrap() what the network takes, e.g. size=224 or channels=3.",
    )


def _probe(model: Model, source: Source) -> tuple[Capabilities | None, int | None]:
    """Return what can be measured of the model and its number of outputs; nothing where it fails."""
    view = tolerant(model)
    try:
        first = source.read(range(min(8, len(source)))).to(view.device)
        return probe(view, first), view.num_classes
    except Exception as error:  # a network may fail in any way; the examination reports it
        if isinstance(error, DataFileError) or is_out_of_memory(error):
            raise
        return None, None


def _check_names(names: tuple[str, ...] | None, source: Source) -> Diagnosis:
    wanted = source.info.class_names
    if names is None or wanted is None:
        return Diagnosis()
    if tuple(names) == tuple(wanted):
        return Diagnosis.of([("class-names", None)])
    text = f"The model's classes are {', '.join(names)}; those of the data are {', '.join(wanted)}."
    return Diagnosis.of(
        [("class-names", Finding("class-names", text, "Pass the same class_names= to both, in order."))]
    )


def _is_training(model: Model) -> bool:
    return any(module.training for root in model.modules() for module in root.modules())


def _mode_layers(model: Model) -> tuple[str, ...]:
    layers = {type(m).__name__ for root in model.modules() for m in root.modules() if isinstance(m, _MODE_LAYERS)}
    return tuple(sorted(layers))


@contextmanager
def _eval_mode(model: Model) -> Iterator[None]:
    """Put every submodule in eval mode and restore each flag afterwards; a finding takes the place of the warning."""
    training = [module for root in model.modules() for module in root.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
