"""The loop: what the cache holds is read, the rest is run here or by an executor, and becomes one store a condition."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from robustlab.core.detector import Detector
from robustlab.core.errors import DataFileError, ModelError
from robustlab.core.model import Model
from robustlab.core.source import Source
from robustlab.core.types import ModelOutputs
from robustlab.metrics.store import PredictionStore

from .cache import Answers
from .executors import Crew
from .units import Job, Unit, UnitResult, all_units, run_units

logger = logging.getLogger("robustlab")

MEMORY_BYTES = 1 << 30
"""Predictions beyond this size lie in a file that is mapped into memory."""

_ROWS = 1 << 16  # rows a detector scores at once


class Bar(Protocol):
    """What is used of a progress bar."""

    def update(self, n: float = 1) -> object:
        """Move by ``n``."""
        ...


@contextmanager
def progress_bar(total: int, show: bool) -> Iterator[Bar]:
    """Show a bar that moves by one a forward pass."""
    with tqdm(total=total, disable=not show, desc="robustlab", unit="pass") as bar:
        yield bar


@dataclass(frozen=True, eq=False)
class Pass:
    """Predictions of one source under all its conditions.

    Args:
        stores: Condition key to predictions; failed conditions are missing.
        failures: Condition label, or a range of samples, to the error text.
        unkept: Why answers could not be written to the cache; empty if they were.
    """

    stores: Mapping[str, PredictionStore]
    failures: Mapping[str, str]
    unkept: str = ""


class ChunkTooLargeError(MemoryError):
    """A forward pass did not fit into memory, here or in a worker."""


class Arena:
    """Arrays for predictions: in memory up to a budget, beyond it in files without a name that vanish by themselves.

    Args:
        folder: Where the files lie; the system's place for temporary files if None.
        budget: Bytes kept in memory.
    """

    def __init__(self, folder: Path | None = None, budget: int = MEMORY_BYTES) -> None:
        self.folder = folder
        self.left = budget

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a new array with any content."""
        size = prod(shape) * dtype.itemsize
        if size <= self.left or size == 0:
            self.left -= size
            return torch.empty(shape, dtype=dtype)
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                _reserve(file.fileno(), size)
                raw = np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,))
        except OSError as error:
            raise DataFileError(
                str(self.folder or tempfile.gettempdir()),
                f"{size >> 20} MiB of space for predictions that do not fit into memory",
                str(error),
                "Free some space, or name a cache= on a larger disk.",
            ) from error
        return torch.from_numpy(raw).view(dtype).reshape(shape)


def _reserve(file: int, size: int) -> None:
    """Claim the space now: a full disk is an error here, but would kill the process at a later write to the map."""
    import os

    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


class _Table:
    """The answers of one job, put in their rows as they come."""

    def __init__(self, job: Job, arena: Arena, bar: Bar | None) -> None:
        self.job = job
        self.arena = arena
        self.bar = bar
        self.logits: dict[str, Tensor] = {}
        self.scores: dict[str, dict[str, Tensor]] = {}
        self.broken: dict[str, tuple[int, str]] = {}
        self.lost: dict[int, str] = {}
        self.unkept = ""

    def put(self, key: str, start: int, answers: Answers) -> None:
        """Put the answers of one shard in place."""
        stop = start + len(answers)
        if key not in self.logits:
            shape = (len(self.job.source), answers.logits.shape[1])
            self.logits[key] = self.arena.empty(shape, torch.float32)
            self.scores[key] = {}
        self.logits[key][start:stop] = answers.logits
        for name, values in answers.scores.items():
            if name not in self.scores[key]:
                self.scores[key][name] = self.arena.empty((len(self.job.source),), values.dtype)
            self.scores[key][name][start:stop] = values

    def take(self, result: UnitResult) -> None:
        """Put the result of a unit in place, or note what went wrong.

        Raises:
            ChunkTooLargeError: The unit did not fit into memory.
        """
        if result.out_of_memory:
            raise ChunkTooLargeError(result.error)
        for key, answers in result.answers.items():
            self.put(key, result.start, answers)
        for label, text in result.broken.items():
            # every process may meet a shift's error in another unit: the first one in the data is told
            self.broken[label] = min(self.broken.get(label, (result.start, text)), (result.start, text))
        if result.error:
            self.lost[result.start] = result.error
        if result.unkept and not self.unkept:
            self.unkept = result.unkept
            logger.warning("cache: answers can no longer be kept (%s); the evaluation goes on", result.unkept)

    def rest(self, unit: Unit) -> Unit | None:
        """Read what the cache holds of a unit; return what is still to be run, or None."""
        shelf = self.job.shelf
        left = []
        for key in unit.wanted:
            found = None if shelf is None else shelf.read(key, unit.start, self.job.count(unit.start))
            if found is None:
                left.append(key)
            else:
                self.put(key, unit.start, found)
                self.tick()
        return Unit(unit.start, tuple(left)) if left else None

    def tick(self) -> None:
        """Move the progress bar by one forward pass."""
        if self.bar is not None:
            self.bar.update()


def predict_source(
    model: Model,
    job: Job,
    *,
    detectors: Mapping[str, Detector],
    cluster: str | None,
    arena: Arena,
    elsewhere: tuple[Crew, Callable[[], bytes]] | None = None,
    bar: Bar | None = None,
) -> Pass:
    """Run a model over a source under every condition of a plan.

    Args:
        model: The model, on its device.
        job: What is run.
        detectors: Scorer name to detector.
        cluster: Group column of the resampling unit.
        arena: Where predictions lie.
        elsewhere: The crew that runs the job, and what packs the job for it; None to run it here.
        bar: Progress bar, moved by one a forward pass.

    Raises:
        ChunkTooLargeError: A forward pass did not fit into memory.
        ModelError: Every unit failed.
    """
    table = _Table(job, arena, bar)
    units = _from_cache(job, table)
    if elsewhere is not None and units:
        crew, packed = elsewhere

        def take(result: UnitResult) -> None:
            for _ in result.answers:
                table.tick()
            table.take(result)

        crew.run(packed(), units, take, table.rest, unit_bytes=4 * job.chunk * model.num_classes * len(units[0].wanted))
    else:
        run_units(job, model, units, table.take, table.tick)
    if len(table.lost) == len(job.starts()):
        first = min(table.lost)
        raise ModelError(
            f"model {model.model_name!r} on {job.source.info.name!r}",
            "at least one chunk of images that can be evaluated",
            table.lost[first],
            "No images could be evaluated; the error is that of the first ones.",
        )
    return _stores(table, model, detectors, cluster)


def _from_cache(job: Job, table: _Table) -> list[Unit]:
    """Put what the cache holds in place and return what is left."""
    every = all_units(job)
    if job.shelf is None:
        return every
    finished = job.shelf.finished()
    left = []
    for unit in every:
        have = tuple(key for key in unit.wanted if unit.start in finished.get(key, ()))
        broken = table.rest(Unit(unit.start, have)) if have else None
        missing = {key for key in unit.wanted if key not in have} | set(broken.wanted if broken else ())
        if missing:
            left.append(Unit(unit.start, tuple(key for key in unit.wanted if key in missing)))
    shards = sum(len(unit.wanted) for unit in every)
    logger.info("cache: %d of %d shards were there", shards - sum(len(unit.wanted) for unit in left), shards)
    return left


def _stores(table: _Table, model: Model, detectors: Mapping[str, Detector], cluster: str | None) -> Pass:
    job = table.job
    # in the order of the plan, whichever worker met them first
    labels = dict.fromkeys(condition.label for condition in job.plan.conditions)
    failures = {label: table.broken[label][1] for label in labels if label in table.broken}
    rows = None
    if table.lost:
        keep = torch.ones(len(job.source), dtype=torch.bool)
        for start, text in sorted(table.lost.items()):
            keep[start : start + job.count(start)] = False
            failures[f"samples {start} to {start + job.count(start) - 1}"] = text
        rows = keep.nonzero()[:, 0]
    stores = {}
    for condition in job.plan.conditions:
        if condition.label not in failures:
            logits, scores = table.logits[condition.key], table.scores[condition.key]
            stores[condition.key] = make_store(
                job.source, model, logits, scores, detectors, cluster, arena=table.arena, rows=rows
            )
    return Pass(stores, failures, table.unkept)


def make_store(
    source: Source,
    model: Model,
    logits: Tensor,
    scores: Mapping[str, Tensor],
    detectors: Mapping[str, Detector],
    cluster: str | None,
    *,
    arena: Arena,
    rows: Tensor | None = None,
) -> PredictionStore:
    """Return the predictions of one condition, with the scores of every detector.

    Args:
        source: The data.
        model: What answered.
        logits: float32 (N, C).
        scores: Scores that the model itself returned.
        detectors: Scorer name to detector; those that the model does not suit give NaN with a reason.
        cluster: Group column of the resampling unit.
        arena: Where new scores lie.
        rows: int64 (M,) samples that were answered; None for all.
    """
    later = {name: detector for name, detector in detectors.items() if name not in scores}  # others: in the pass
    reasons = {name: reason for name, d in later.items() if (reason := d.skip_reason(model)) is not None}
    found: dict[str, Tensor] = {}
    for name, detector in later.items():
        if name in reasons:
            found[name] = torch.full((len(logits),), torch.nan)
        else:
            found[name] = _scored(detector, logits, scores, model, arena)
    store = PredictionStore(
        ids=source.info.ids,
        logits=logits,
        labels=source.info.labels,
        task=model.task,
        scores={name: {**found, **scores}[name] for name in (*detectors, *(n for n in scores if n not in detectors))},
        score_reasons=reasons,
        groups=source.info.groups,
        clusters=clusters_of(source, cluster),
    )
    return store if rows is None else store.select(rows)


def _scored(detector: Detector, logits: Tensor, scores: Mapping[str, Tensor], model: Model, arena: Arena) -> Tensor:
    out: Tensor | None = None
    for start in range(0, len(logits), _ROWS):
        part = slice(start, start + _ROWS)
        own = {name: values[part] for name, values in scores.items()}
        values = detector.score(ModelOutputs(logits=logits[part], scores=own, task=model.task))
        if out is None:
            out = arena.empty((len(logits),), values.dtype)
        out[part] = values
    return torch.empty(0) if out is None else out


def clusters_of(source: Source, cluster: str | None) -> Tensor | None:
    """Return the codes of the resampling unit; samples whose unit is unknown stand alone."""
    if cluster is None:
        return None
    codes = source.column(cluster)
    alone = -1 - torch.arange(len(codes))
    return torch.where(codes < 0, alone, codes)


def first_chunk(source: Source, device: torch.device) -> int:
    """Return the chunk to try first: large enough to keep the device busy, small enough to stay in its caches."""
    pixels = source.info.spec.size[0] * source.info.spec.size[1]
    if device.type == "cuda":
        return max(2, min(256, len(source)))
    return max(2, min(64 if pixels <= 96 * 96 else 16, len(source)))


def forward_passes(counts: Sequence[tuple[int, int]], chunk: int) -> int:
    """Return the number of forward passes for (samples, conditions) pairs."""
    return sum(-(-samples // chunk) * conditions for samples, conditions in counts)
