"""All forward passes of an evaluation: its data sets in turn, one chunk size, here or elsewhere."""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Mapping
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from robustlab.core.errors import ConfigError, ModelError, RobustlabWarning
from robustlab.core.source import Source
from robustlab.data.predictions import SavedPredictions
from robustlab.metrics import fit_thresholds
from robustlab.metrics.store import PredictionStore

from .cache import writer
from .executors import Crew, precision
from .inputs import Inputs
from .plan import CLEAN, Plan
from .preflight import Preflight
from .run import Arena, Bar, Pass, first_chunk, forward_passes, predict_source, progress_bar
from .saved import saved_pass, val_condition
from .transport import pack
from .units import Job, is_out_of_memory

logger = logging.getLogger("robustlab")


@dataclass(frozen=True, eq=False)
class Predictions:
    """Every forward pass of an evaluation, done.

    Args:
        main: Predictions on the test data.
        val: On the validation data.
        ood: On foreign data, by name, then by condition; without labels.
        failures: What could not be run, and why.
    """

    main: Pass
    val: PredictionStore | None
    ood: Mapping[str, Mapping[str, PredictionStore]]
    failures: Mapping[str, str]


def predict_all(
    inputs: Inputs,
    preflight: Preflight,
    executor: Executor | None,
    *,
    seed: int,
    cluster: str | None,
    batch_size: int | None,
    progress: bool,
) -> tuple[Predictions, int | None]:
    """Run everything that the cache does not hold; start again with half the chunk when memory runs out.

    Returns:
        The predictions, and the number of samples of every forward pass; None where answers were looked up.
    """
    if isinstance(inputs.model, SavedPredictions):
        return _look_up(inputs, inputs.model, cluster), None
    if executor is not None and getattr(inputs.model, "order_dependent", False):
        raise ConfigError(
            "executor",
            "a model whose answers do not depend on the order of the data",
            f"{inputs.model.model_name}, which adapts as it goes",
            "Leave executor= out.",
        )
    chunk = batch_size or _known_chunk(inputs, preflight) or first_chunk(inputs.source, inputs.model.device)
    while True:
        passes = [(len(inputs.source), len(inputs.plan.conditions))]
        passes += [(len(source), len(inputs.plan.on_foreign.conditions)) for source in inputs.ood.values()]
        passes += [(len(inputs.val), 1)] if inputs.val else []
        try:
            with ExitStack() as stack:
                bar = stack.enter_context(progress_bar(forward_passes(passes, chunk), progress))
                run = _Run(inputs, preflight, seed, cluster, chunk, bar, stack, executor)
                return run.all(), chunk
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if batch_size is not None or chunk <= 2:
                raise ModelError(
                    f"model {inputs.model.model_name!r}",
                    f"memory for forward passes of {chunk} samples",
                    str(error),
                    "Pass a smaller batch_size=, or leave it out to have one found.",
                ) from error
            logger.warning("memory ran out at %d samples a pass: trying %d", chunk, chunk // 2)
        chunk = max(2, chunk // 2)
        _remember_chunk(inputs, preflight, chunk)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _known_chunk(inputs: Inputs, preflight: Preflight) -> int | None:
    """Return the chunk that fitted into memory in an earlier run, whose answers are kept."""
    chunks = {} if preflight.entry is None else preflight.entry.known.get("chunks", {})
    found = chunks.get(inputs.source.content_fingerprint())
    return found if isinstance(found, int) and found >= 2 else None


def _remember_chunk(inputs: Inputs, preflight: Preflight, chunk: int) -> None:
    if preflight.entry is None:
        return
    known = preflight.entry.known
    try:
        chunks = {**known.get("chunks", {}), inputs.source.content_fingerprint(): chunk}
        preflight.entry.remember({**known, "chunks": chunks})
    except OSError as error:
        logger.warning("cache: the chunk size could not be kept: %s", error)


def _look_up(inputs: Inputs, saved: SavedPredictions, cluster: str | None) -> Predictions:
    """Take every answer from saved predictions."""
    arena = Arena()
    only_clean = Plan((), ())

    def look(source: Source, plan: Plan, unit: str | None, place: str) -> Pass:
        return saved_pass(saved, source, plan, detectors=inputs.detectors, cluster=unit, arena=arena, stands_for=place)

    val = None
    if inputs.val is not None:
        place = val_condition(saved, inputs.val, inputs.source)
        val = look(inputs.val, only_clean, None, place).stores[CLEAN.key]
    foreign = {
        name: look(source, only_clean, cluster if cluster in source.info.groups else None, f"ood:{name}")
        for name, source in inputs.ood.items()
    }
    main = look(inputs.source, inputs.plan, cluster, CLEAN.key)
    return Predictions(main, val, {name: _unlabelled(done) for name, done in foreign.items()}, {})


def _unlabelled(done: Pass) -> dict[str, PredictionStore]:
    return {key: replace(store, labels=None) for key, store in done.stores.items()}


def aimed(plan: Plan, val: PredictionStore | None) -> Plan:
    """Return the plan with what attacks on several labels aim at."""
    attacked = any(condition.kind == "attack" for condition in plan.conditions)
    if val is None or val.task != "multilabel" or val.labels is None or not attacked:
        return plan
    return replace(plan, thresholds=tuple(0.5 if math.isnan(t) else t for t in fit_thresholds(val).tolist()))


class _Run:
    """One attempt, at one chunk size."""

    def __init__(
        self,
        inputs: Inputs,
        preflight: Preflight,
        seed: int,
        cluster: str | None,
        chunk: int,
        bar: Bar,
        stack: ExitStack,
        executor: Executor | None,
    ) -> None:
        self.inputs = inputs
        self.entry = preflight.entry
        self.seed = seed
        self.cluster = cluster
        self.chunk = chunk
        self.bar = bar
        self.warned = False
        self.arena = Arena(None if self.entry is None else self.entry.folder)
        self.crew: Crew | None = None
        if executor is not None:
            self.crew = stack.enter_context(Crew(executor))
            beside = None if self.entry is None else self.entry.folder
            place = tempfile.TemporaryDirectory(prefix=".arrays-", suffix=f".{writer()}.part", dir=beside)
            self.spills = Path(stack.enter_context(place))
            self.checked = False

    def all(self) -> Predictions:
        """Run the test data under every condition, then validation and foreign data as they are."""
        inputs = self.inputs
        only_clean = Plan((), ())
        failures: dict[str, str] = {}
        val = None
        # first, as attacks on several labels aim at the thresholds that are fitted on it
        if inputs.val is not None:
            done = self._one(inputs.val, only_clean, None)
            val = done.stores[CLEAN.key]
            failures |= {f"val: {name}": text for name, text in done.failures.items()}
        main = self._one(inputs.source, aimed(inputs.plan, val), self.cluster)
        failures = {**main.failures, **failures}
        foreign: dict[str, dict[str, PredictionStore]] = {}
        for name, source in inputs.ood.items():
            unit = self.cluster if self.cluster in source.info.groups else None
            try:
                done = self._one(source, inputs.plan.on_foreign, unit)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                logger.warning("OOD set %s failed: %s", name, error)
                failures[f"ood:{name}"] = f"{type(error).__name__}: {error}"
                continue
            foreign[name] = _unlabelled(done)
            failures |= {f"ood:{name}: {place}": text for place, text in done.failures.items()}
        return Predictions(main, val, foreign, failures)

    def _one(self, source: Source, plan: Plan, cluster: str | None) -> Pass:
        spec = self.inputs.source.info.spec
        shelf = None
        if self.entry is not None:
            shelf = self.entry.shelf(source, spec, plan, chunk=self.chunk, seed=self.seed)
        job = Job(source, plan, spec, self.seed, self.chunk, shelf)
        done = predict_source(
            self.inputs.model,
            job,
            detectors=self.inputs.detectors,
            cluster=cluster,
            arena=self.arena,
            elsewhere=None if self.crew is None else (self.crew, lambda: self._packed(job)),
            bar=self.bar,
        )
        if done.unkept and not self.warned:
            self.warned = True
            warnings.warn(
                f"cache: answers can no longer be kept ({done.unkept}); the evaluation goes on, and what was kept "
                "stays good. Free some space before the next run.",
                RobustlabWarning,
                stacklevel=6,
            )
        return done

    def _packed(self, job: Job) -> bytes:
        """Return the job as a message; the first one is tried out in a worker."""
        inputs, crew = self.inputs, self.crew
        if crew is None:
            raise ValueError("no executor")
        model = pack(inputs.travels, self.spills, f"model {inputs.model.model_name!r}")
        data = pack(job, self.spills, f"data {job.source.info.name!r} and shifts")
        message = pack((model, data, str(inputs.model.device), precision()), self.spills, "job")
        if not self.checked and inputs.probed is not None:
            first, outputs = inputs.probed
            crew.check(message, pack(first.to("cpu"), self.spills, "images"), outputs.logits)
            self.checked = True
        return message
