"""Units of work on other processes: any ``concurrent.futures.Executor``, and a process pool that outlives workers."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from typing import Any, ParamSpec, TypeVar

import cv2
import torch

from robustlab.core.errors import ConfigError, ModelError, RangeError
from robustlab.core.model import Model

from .modelspec import ModelSpec
from .scoring import ScoringSpec
from .transport import unpack
from .units import TRIES, Job, Unit, UnitResult, run_units

logger = logging.getLogger("robustlab")

_GROUP_BYTES = 1 << 24
"""Answers that a worker returns at once."""

P = ParamSpec("P")
T = TypeVar("T")

_DEVICE: list[str] = []
"""In a worker of a pool with devices: the one that it owns."""

_MODELS: dict[bytes, Model] = {}
_JOBS: dict[bytes, Job] = {}
"""In a worker: the model and the job at hand, by their messages; one of each, since memory is scarce."""

_LOCK = threading.Lock()


class ProcessPool(Executor):
    """Processes of this machine that are replaced when they die.

    Workers are spawned, so a script that uses them needs the usual ``if __name__ == "__main__":``. They start when the
    first work is submitted and stop at ``shutdown`` or at the end of a ``with`` block.

    Args:
        workers: Number of processes; one a device, or one a CPU core, if not given.
        devices: One device a worker, e.g. ``("cuda:0", "cuda:1")``; ``"cuda"`` stands for every GPU of the machine.
            The model's own device if not given.
        threads: CPU threads of each worker; the cores are shared out evenly if not given.

    Raises:
        ConfigError: Devices that do not exist, or another number of workers than of devices.
        RangeError: Fewer than one worker or thread.
    """

    def __init__(
        self, workers: int | None = None, *, devices: Sequence[str] | str | None = None, threads: int | None = None
    ) -> None:
        self.devices = _devices(devices)
        cores = os.cpu_count() or 1
        self.workers = workers if workers is not None else len(self.devices) or cores
        self.threads = threads if threads is not None else max(1, cores // max(1, self.workers))
        if self.workers < 1 or self.threads < 1:
            raise RangeError(
                "ProcessPool", "at least one worker and thread", f"{workers} and {threads}", "Leave them out."
            )
        if self.devices and self.workers != len(self.devices):
            raise ConfigError(
                "ProcessPool",
                f"one worker a device, {len(self.devices)}",
                f"{self.workers} workers",
                "Leave workers= out; several workers may share a device if it is named several times.",
            )
        self._inner: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function in a worker; a pool whose worker died is started anew."""
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            try:
                return self._pool().submit(fn, *args, **kwargs)
            except BrokenExecutor:
                logger.warning("a worker process died: starting new ones")
                self._drop()
                return self._pool().submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop the workers."""
        with self._lock:
            self._closed = True
            if self._inner is not None:
                self._inner.shutdown(wait, cancel_futures=cancel_futures)
                self._inner = None

    def _pool(self) -> ProcessPoolExecutor:
        if self._inner is None:
            context = multiprocessing.get_context("spawn")
            places = context.SimpleQueue()
            for device in self.devices:
                places.put(device)
            self._inner = ProcessPoolExecutor(
                self.workers, mp_context=context, initializer=_begin, initargs=(places, self.threads)
            )
        return self._inner

    def _drop(self) -> None:
        if self._inner is not None:
            self._inner.shutdown(wait=False, cancel_futures=True)
            self._inner = None


def _devices(devices: Sequence[str] | str | None) -> tuple[str, ...]:
    if devices is None:
        return ()
    here = tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    named = here if devices == "cuda" else (devices,) if isinstance(devices, str) else tuple(devices)
    odd = [name for name in named if name != "cpu" and name not in here]
    if odd or not named:
        raise ConfigError(
            "ProcessPool",
            f"devices among {', '.join(('cpu', *here))}",
            ", ".join(odd) or f"{devices!r}, of which there are none",
            "Leave devices= out to use the model's device.",
        )
    return named


def _begin(places: Any, threads: int) -> None:
    """Set up a worker: its device, its share of the cores, and its end when the process that started it is gone."""
    threading.Thread(target=_end_with_parent, daemon=True, name="robustlab-parent").start()
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    if not places.empty():
        device = places.get()
        _DEVICE[:] = [device]
        if device.startswith("cuda"):
            torch.cuda.set_device(device)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # nobody is left to take an answer, and what is finished lies in the cache


def work(message: bytes, units: tuple[Unit, ...]) -> list[UnitResult]:
    """Run units in a worker; the job is unpacked once a process."""
    with _LOCK:  # executors may have several threads in one process, and a model is not made for that
        job, model = _held(message)
        results: list[UnitResult] = []
        run_units(job, model, units, results.append)
    return results


def check_worker(message: bytes, batch: bytes) -> Any:
    """Return a worker's answers to a packed batch of probe images, as an array."""
    with _LOCK:
        _, model = _held(message)
        return model.predict(unpack(batch).to(model.device)).logits.to("cpu", torch.float32).numpy()


def _held(message: bytes) -> tuple[Job, Model]:
    packed, data, device, settings = unpack(message)
    if packed not in _MODELS:
        _MODELS.clear()
        model = unpack(packed)
        if isinstance(model, (ModelSpec, ScoringSpec)):
            model = model.build()
        _MODELS[packed] = model.to(_DEVICE[0] if _DEVICE else device)
    set_precision(settings)
    if data not in _JOBS:
        _JOBS.clear()
        _JOBS[data] = unpack(data)
    return _JOBS[data], _MODELS[packed]


def precision() -> tuple[str, bool, bool, bool]:
    """Return torch's settings that decide the last bits of a forward pass, for the workers."""
    cudnn = torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic


def set_precision(settings: tuple[str, bool, bool, bool]) -> None:
    """Apply what ``precision`` returned in another process."""
    cudnn = torch.backends.cudnn
    torch.set_float32_matmul_precision(settings[0])
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = settings[1:]


def _workers_of(executor: Executor) -> int:
    """Return how many units an executor can run at a time."""
    stated = getattr(executor, "workers", None) or getattr(executor, "_max_workers", None)
    if isinstance(stated, int) and stated > 0:
        return stated
    client: Any = getattr(executor, "_client", None)  # Dask's
    threads = client.nthreads() if hasattr(client, "nthreads") else {}
    return max(1, sum(threads.values())) if threads else 8


class Crew:
    """An executor with the number of its workers; units whose worker died are run again.

    Args:
        executor: Any executor of the standard library's kind.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.workers = _workers_of(executor)
        self._own: ProcessPool | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        if self._own is not None:
            self._own.shutdown(cancel_futures=True)

    def check(self, message: bytes, batch: bytes, logits: torch.Tensor) -> None:
        """See that a worker can run the model and gives the same answers, before anything is left to it.

        Raises:
            ConfigError: It cannot, or it does not.
        """
        try:
            future = self._submit(check_worker, message, batch)
            found = torch.from_numpy(future.result())
            if found.shape != logits.shape:
                raise ModelError("worker", f"{tuple(logits.shape)} logits", f"{tuple(found.shape)}", "")
        except (BrokenExecutor, CancelledError) as error:
            raise ConfigError(
                "executor",
                "workers that start",
                f"{type(error).__name__}: {error}".rstrip("."),
                "Workers import the script, so it must be a file whose work is guarded by: if __name__ == '__main__':",
            ) from error
        except Exception as error:  # whatever the worker's own code raised
            raise ConfigError(
                "executor",
                "workers that can run the model",
                f"{type(error).__name__}: {error}",
                "Modules and functions must be importable there: define them in a file, not at a prompt, and give all "
                "workers the same packages.",
            ) from error
        if not torch.allclose(found, logits.detach().cpu().float(), rtol=1e-4, atol=1e-4, equal_nan=True):
            raise ConfigError(
                "executor",
                "workers whose model answers as it does here",
                f"answers that differ by up to {float((found - logits.detach().cpu()).abs().max()):.3g}",
                "Give the workers the same weights, code and torch version; a random model needs executor=None.",
            )

    def run(
        self,
        message: bytes,
        units: Sequence[Unit],
        done: Callable[[UnitResult], None],
        rest: Callable[[Unit], Unit | None],
        unit_bytes: int,
    ) -> None:
        """Run units wherever there is room.

        Args:
            message: A packed job.
            units: What to run.
            done: Takes each result, also of units that were given up.
            rest: Takes a unit whose worker died and returns what of it the cache does not hold yet, or None.
            unit_bytes: Size of one unit's answers, which come back together with those of its group.
        """
        size = max(1, min(_GROUP_BYTES // max(1, unit_bytes), -(-len(units) // (4 * self.workers))))
        fresh = deque(tuple(units[i : i + size]) for i in range(0, len(units), size))
        suspects: deque[tuple[Unit, ...]] = deque()
        deaths: Counter[int] = Counter()
        flying: dict[Future[list[UnitResult]], tuple[Unit, ...]] = {}
        try:
            while fresh or suspects or flying:
                # whoever was in flight when a worker died flies again alone, so that the guilty unit is known
                while not suspects and fresh and len(flying) < 2 * self.workers:
                    group = fresh.popleft()
                    flying[self._submit(work, message, group)] = group
                if suspects and not flying:
                    group = suspects.popleft()
                    flying[self._submit(work, message, group)] = group
                alone = len(flying) == 1
                finished, _ = wait(flying, return_when=FIRST_COMPLETED)
                for future in finished:
                    group = flying.pop(future)
                    try:
                        results = future.result()
                    except (Exception, CancelledError) as error:
                        suspects.extend(self._again(group, error, alone, deaths, done, rest))
                        continue
                    for result in results:
                        done(result)
        finally:
            for future in flying:
                future.cancel()

    def _again(
        self,
        group: tuple[Unit, ...],
        error: BaseException,
        alone: bool,
        deaths: Counter[int],
        done: Callable[[UnitResult], None],
        rest: Callable[[Unit], Unit | None],
    ) -> list[tuple[Unit, ...]]:
        """Return the groups that are to be tried again after a worker died."""
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        logger.warning("a worker was lost (%s): its %d units are tried again", text, len(group))
        left = [unit for unit in map(rest, group) if unit is not None]
        if not alone:
            return [tuple(left)] if left else []
        if len(left) > 1:
            return [(unit,) for unit in left]
        for unit in left:
            deaths[unit.start] += 1
            if deaths[unit.start] >= TRIES:
                done(UnitResult(unit.start, error=f"the worker died {TRIES} times ({text})"))
                return []
        return [tuple(left)] if left else []

    def _submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        try:
            return self.executor.submit(fn, *args, **kwargs)
        except BrokenExecutor as error:
            if not isinstance(self.executor, ProcessPoolExecutor):
                raise ConfigError(
                    "executor",
                    "one that outlives its workers",
                    f"{type(error).__name__}: {error}",
                    "Start it anew and evaluate again; with cache= what was run is kept.",
                ) from error
            logger.warning("the executor broke and cannot start again: going on with ProcessPool(%d)", self.workers)
            self.executor = self._own = ProcessPool(self.workers)
            return self.executor.submit(fn, *args, **kwargs)
        except RuntimeError as error:
            raise ConfigError(
                "executor", "one that takes work", f"{type(error).__name__}: {error}", "Pass one that is not shut down."
            ) from error
