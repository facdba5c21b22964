"""What is found out about a model before hours are spent on it; a cache remembers it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from robustlab.core.detector import Detector
from robustlab.core.errors import ConfigError, DataFileError
from robustlab.core.model import Capabilities, Model, probe
from robustlab.core.source import Source
from robustlab.core.spec import array_fingerprint

from .cache import ModelEntry, find_model, model_key, open_cache
from .diagnosis import Diagnosis
from .doctor import examine_data, examine_model
from .inputs import Inputs
from .modelspec import ModelSpec
from .saved import SAVED_CAPABILITIES
from .scoring import AFTERWARDS, ScoringModel, ScoringSpec
from .units import is_out_of_memory

logger = logging.getLogger("robustlab")

_FAILED = "images could not be read, or memory ran out"


@dataclass(frozen=True, eq=False)
class Preflight:
    """What is known of a model before the evaluation.

    Args:
        capabilities: What was measured.
        diagnosis: What the doctor found.
        entry: The model's entry in the cache; None where no answers are kept.
    """

    capabilities: Capabilities
    diagnosis: Diagnosis
    entry: ModelEntry | None


def examine(inputs: Inputs, cache: str | Path | None, cluster: str | None) -> Preflight:
    """Measure and examine a model, or recall what an earlier run found of the same one.

    Raises:
        DataFileError: The cache cannot be written.
    """
    model = inputs.model
    data = _attempt(
        "overlap",
        lambda: examine_data(
            inputs.source,
            val=inputs.val,
            train=inputs.training,
            cluster=cluster,
            num_classes=model.num_classes,
            thorough=False,
        ),
    )
    if inputs.probed is None:
        return Preflight(SAVED_CAPABILITIES, data, None)
    first, outputs = inputs.probed
    root = None if cache is None else open_cache(cache)
    key = None if root is None else model_key(model, first.images)
    entry = None if root is None or key is None else find_model(root, key, outputs, new=False)
    known = {} if entry is None else entry.known
    examined = "" if key is None else _examined(inputs)
    if entry is not None and {"capabilities", "diagnosis"} <= known.keys() and known.get("examined") == examined:
        diagnosis = Diagnosis.from_dict(known["diagnosis"])
        return Preflight(Capabilities(**known["capabilities"]), data.merged(diagnosis), entry)
    capabilities = probe(model, first)
    diagnosis = _attempt(
        "forward-pass",
        lambda: examine_model(model, inputs.source, capabilities, was_training=inputs.was_training, thorough=False),
    )
    keeps = capabilities.deterministic and not getattr(model, "order_dependent", False)
    if root is None or key is None or not keeps:
        if root is not None and not keeps:
            logger.warning("cache: %s answers differently each time, or by order: nothing is kept", model.model_name)
        return Preflight(capabilities, data.merged(diagnosis), None)
    entry = entry or find_model(root, key, outputs, new=True)
    if entry is not None:
        facts = {
            **known,
            "model": model.model_name,
            "settings": {name: repr(value) for name, value in model.settings().items()},
            "capabilities": asdict(capabilities),
            "diagnosis": diagnosis.to_dict(),
            # what could not be looked at is looked at again
            "examined": "" if _FAILED in (reason for _, reason in diagnosis.skipped) else examined,
        }
        try:
            entry.remember(facts)
        except OSError as error:
            raise DataFileError(
                f"cache={str(cache)!r}", "a folder that can be written", str(error), "Choose another."
            ) from error
        entry = replace(entry, known=facts)
    return Preflight(capabilities, data.merged(diagnosis), entry)


def fit_detectors(detectors: Mapping[str, Detector], model: Model, training: Source | None) -> None:
    """Fit every detector that the model suits.

    Raises:
        ConfigError: A detector learns from data, there are none, and it has not been fitted before.
    """
    for name, detector in detectors.items():
        if detector.skip_reason(model) is not None:
            continue
        if training is not None:
            detector.fit(model, training)
        elif detector.learns and not detector.is_fitted:
            raise ConfigError(
                f"detector {name!r}",
                "in-distribution training data",
                "fit=None",
                "Pass fit=train (data the model was trained on, not val and not the test data), or a fitted detector.",
            )


def with_scores(inputs: Inputs, preflight: Preflight) -> tuple[Inputs, Preflight]:
    """Return what the forward passes are to be run with, where detectors see more than logits."""
    inside = {
        name: detector
        for name, detector in inputs.detectors.items()
        if not detector.needs <= AFTERWARDS and detector.skip_reason(inputs.model) is None
    }
    if not inside or inputs.probed is None:
        return inputs, preflight
    model = ScoringModel(inputs.model, inside)
    travels = ScoringSpec(inputs.travels, inside) if isinstance(inputs.travels, ModelSpec) else model
    first, _ = inputs.probed
    outputs = model.predict(first)
    entry = preflight.entry
    if entry is not None:
        key = model_key(model, first.images)
        entry = None if key is None else find_model(entry.folder.parent, key, outputs, new=True)
    found = replace(inputs, model=model, travels=travels, probed=(first, outputs))
    return found, replace(preflight, entry=entry)


def _examined(inputs: Inputs) -> str:
    """Return a hash of what decides the diagnosis besides the model."""
    labels = inputs.source.info.labels
    seen = "" if labels is None else array_fingerprint([("", labels)])
    return f"{inputs.source.content_fingerprint()} {seen} {inputs.was_training}"


def _attempt(check: str, call: Callable[[], Diagnosis]) -> Diagnosis:
    """Examine; images that cannot be read and a memory too small are no reason to stop an evaluation here."""
    try:
        return call()
    except Exception as error:
        if not isinstance(error, OSError) and not is_out_of_memory(error):
            raise
        logger.warning("the doctor could not look at everything: %s", error)
        return Diagnosis(skipped=((check, _FAILED),))
