"""A unit of work: a chunk of samples under all its conditions, decoded once, drawn once a shift."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F

from robustlab.core.errors import ConfigError
from robustlab.core.model import Model
from robustlab.core.shift import ShiftContext, as_stored, luma, quantize
from robustlab.core.source import Source
from robustlab.core.types import Batch, ImageSpec, ModelOutputs

from .cache import Answers, Shelf
from .plan import CLEAN, Plan

logger = logging.getLogger("robustlab")

TRIES = 3
"""How often a unit is tried before it is given up."""


@dataclass(frozen=True, eq=False)
class Job:
    """One source under all its conditions: all that a process must know besides the model.

    Args:
        source: The data.
        plan: Conditions; clean is always run.
        spec: Meaning of the pixels after the source has been adapted to the in-distribution data.
        seed: Seed of the draws.
        chunk: Exact number of samples of every forward pass.
        shelf: Where answers are kept, or None.
    """

    source: Source
    plan: Plan
    spec: ImageSpec
    seed: int
    chunk: int
    shelf: Shelf | None

    def starts(self) -> range:
        """Return the first sample of every unit."""
        return range(0, len(self.source), self.chunk)

    def count(self, start: int) -> int:
        """Return the number of samples of a unit."""
        return min(self.chunk, len(self.source) - start)


@dataclass(frozen=True)
class Unit:
    """A chunk of samples and the conditions that are still to be run on it.

    Args:
        start: Position of the first sample.
        wanted: Condition keys, in the order of the plan.
    """

    start: int
    wanted: tuple[str, ...]


@dataclass(eq=False)
class UnitResult:
    """What became of a unit.

    Args:
        start: Position of its first sample.
        answers: Condition key to answers.
        broken: Shift label to the error that one of its conditions raised.
        error: Why the unit as a whole could not be run; empty if it was.
        out_of_memory: The error was a lack of memory.
        unkept: Why answers could not be written to the cache; empty if they were.
    """

    start: int
    answers: dict[str, Answers] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    error: str = ""
    out_of_memory: bool = False
    unkept: str = ""


def run_units(
    job: Job,
    model: Model,
    units: Sequence[Unit],
    done: Callable[[UnitResult], None],
    tick: Callable[[], object] | None = None,
) -> None:
    """Run units one after the other and report each as soon as its answers are on the CPU.

    A shift that failed once is left out of the later units. A unit that raises is tried again from where it stood.
    Running out of memory ends the run with a result that says so.

    Args:
        job: What is run.
        model: On its device.
        units: In any order.
        done: Takes each result.
        tick: Called after every forward pass.
    """
    outbox = _Outbox(job.shelf, model.device, done)
    broken: dict[str, str] = {}
    with _Reader(job, model.device, [unit.start for unit in units]) as reader:
        for unit in units:
            result = UnitResult(unit.start)
            for attempt in range(1, TRIES + 1):
                result.error = ""
                try:
                    batch = reader.read(unit.start) if attempt == 1 else reader.read_now(unit.start)
                    left = Unit(unit.start, tuple(key for key in unit.wanted if key not in result.answers))
                    for key, outputs in answers_of(job, model, left, batch, broken):
                        outbox.add(result, key, outputs.head(job.count(unit.start)))
                        if tick is not None:
                            tick()
                    break
                except (Exception, SystemExit) as error:  # other people's code may call sys.exit
                    result.error = f"{type(error).__name__}: {error}"
                    result.out_of_memory = is_out_of_memory(error)
                    if result.out_of_memory:
                        break
                    logger.warning("samples from %d on failed (try %d of %d): %s", unit.start, attempt, TRIES, error)
            result.broken = dict(broken)
            outbox.close(result)
            if result.out_of_memory:
                break
    outbox.flush()


def answers_of(
    job: Job, model: Model, unit: Unit, batch: Batch, broken: dict[str, str]
) -> Iterator[tuple[str, ModelOutputs]]:
    """Iterate over (condition key, outputs of the padded batch); shifts that fail are added to ``broken``."""
    if CLEAN.key in unit.wanted:
        yield CLEAN.key, model.predict(batch)
    ctx = ShiftContext(seed=job.seed, spec=job.spec, model=model, thresholds=job.plan.thresholds)
    for sweep in job.plan.sweeps:
        label = sweep.conditions[0].label
        left = [condition for condition in sweep.conditions if condition.key in unit.wanted]
        for attempt in range(1, TRIES + 1):
            if not left or label in broken:
                break
            try:
                draws = sweep.shift.prepare(batch, ctx)
                while left:
                    shifted = sweep.shift.perform(batch, draws, left[0].severity, ctx)
                    yield left[0].key, model.predict(shifted.replace(as_stored(sweep.shift, shifted.images, job.spec)))
                    left.pop(0)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                logger.warning("%s failed (try %d of %d): %s", label, attempt, TRIES, error)
                if attempt == TRIES:
                    broken[label] = f"{type(error).__name__}: {error}"


class _Outbox:
    """Brings answers to the CPU and into the cache.

    On a GPU the copies of one unit run while the next one is computed, so the loop never waits for the device; on a CPU
    every answer is kept at once.
    """

    def __init__(self, shelf: Shelf | None, device: torch.device, done: Callable[[UnitResult], None]) -> None:
        self.shelf = shelf
        self.device = device
        self.later = device.type == "cuda"
        self.done = done
        self._waiting: list[tuple[UnitResult, torch.cuda.Event]] = []

    def add(self, result: UnitResult, key: str, outputs: ModelOutputs) -> None:
        # a copy to the CPU that does not block lands in pinned memory
        logits = outputs.logits.detach().to("cpu", torch.float32, non_blocking=self.later)
        scores = {
            name: value.detach().to("cpu", torch.promote_types(value.dtype, torch.float32), non_blocking=self.later)
            for name, value in outputs.scores.items()
        }
        result.answers[key] = Answers(logits, scores)
        if not self.later:
            self._keep(result, key)

    def close(self, result: UnitResult) -> None:
        if not self.later:
            self.done(result)
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))  # the copies' stream, also on a GPU that is not current
        self._waiting.append((result, event))
        if len(self._waiting) > 1:
            self._send()

    def flush(self) -> None:
        while self._waiting:
            self._send()

    def _send(self) -> None:
        result, event = self._waiting.pop(0)
        event.synchronize()
        for key in result.answers:
            self._keep(result, key)
        self.done(result)

    def _keep(self, result: UnitResult, key: str) -> None:
        if self.shelf is None or result.unkept:
            return
        try:
            self.shelf.write(key, result.start, result.answers[key])
        except OSError as error:
            result.unkept = f"{type(error).__name__}: {error}"


class _Reader:
    """Reads chunks; where a source allows it, the next one is decoded while the model works on this one."""

    def __init__(self, job: Job, device: torch.device, starts: Sequence[int]) -> None:
        self.job = job
        self.device = device
        self.after = dict(pairwise(starts))
        ahead = job.source.thread_safe and (not job.source.in_memory or device.type == "cuda")
        self.pool = ThreadPoolExecutor(1, "robustlab-read") if ahead and len(starts) > 1 else None
        self.coming: dict[int, Future[Batch]] = {}

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def read(self, start: int) -> Batch:
        """Return a chunk on the device, padded to its full size, and begin to read the one after it."""
        coming = self.coming.pop(start, None)
        batch = self._load(start) if coming is None else coming.result()
        if self.pool is not None and start in self.after:
            following = self.after[start]
            self.coming[following] = self.pool.submit(self._load, following)
        return self._adapt(batch)

    def read_now(self, start: int) -> Batch:
        """Return a chunk, read in this thread."""
        return self._adapt(self._load(start))

    def _load(self, start: int) -> Batch:
        count = self.job.count(start)
        index = [*range(start, start + count), *[start + count - 1] * (self.job.chunk - count)]
        batch = self.job.source.read(index)
        if self.device.type == "cuda":
            return batch.replace(batch.images.pin_memory())
        return batch

    def _adapt(self, batch: Batch) -> Batch:
        return adapt(batch.to(self.device), self.job.source.info.spec, self.job.spec)


def adapt(batch: Batch, source: ImageSpec, target: ImageSpec) -> Batch:
    """Bring a foreign set's images to the channels, size and bit depth of the in-distribution data."""
    if source == target:
        return batch
    images = batch.images
    if source.channels != target.channels:
        if source.channels == 1:
            images = images.expand(-1, target.channels, -1, -1)
        elif target.channels == 1 and source.channels == 3:
            images = luma(images)
        else:
            raise ConfigError(
                "evaluate_under_shift",
                f"OOD images with 1, 3 or {target.channels} channels",
                f"{source.channels}",
                "Convert them before.",
            )
    if source.size != target.size:
        images = F.interpolate(images, size=target.size, mode="bilinear", align_corners=False, antialias=True)
    return batch.replace(quantize(images.clamp(0, 1), target))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def all_units(job: Job) -> list[Unit]:
    """Return the units of a job, each with all conditions."""
    keys = tuple(condition.key for condition in job.plan.conditions)
    return [Unit(start, keys) for start in job.starts()]
