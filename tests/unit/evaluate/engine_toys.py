"""Models, sources and executors for the tests of the engine; workers import them."""

import os
import pickle
import signal
from concurrent.futures import Executor, Future
from pathlib import Path

import torch
from torch import nn

import robustlab
from robustlab.core.source import Source
from tests.contracts.toys import Small, source

SHIFTS = ("gaussian-noise", "gamma", "jpeg")
COUNT, CHUNK = 60, 8


class Dangerous(Source):
    """Kills the process that reads one of its samples, as often as there are marks in a folder."""

    def __init__(self, inner, folder, position, times):
        self.info = inner.info
        self.inner = inner
        self.position = position
        self.folder = Path(folder)
        self.safe = os.getpid()
        for number in range(times):
            (self.folder / f"mark-{number}").touch()

    def pixels(self, index):
        marks = sorted(self.folder.glob("mark-*"))
        if self.position in index and marks and os.getpid() != self.safe:
            marks[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner.pixels(index)


class Unreadable(Source):
    """Fails whenever one of its samples is read as part of a chunk, as a file does that vanished during the run."""

    def __init__(self, inner, position):
        self.info = inner.info
        self.inner = inner
        self.position = position

    def pixels(self, index):
        if self.position in index and len(index) == CHUNK:
            raise OSError("planted: cannot be read")
        return self.inner.pixels(index)


class Hungry(nn.Module):
    """Runs out of memory on more than ``most`` images."""

    def __init__(self, most):
        super().__init__()
        self.inner = Small()
        self.most = most
        self.eval()

    def forward(self, x):
        if len(x) > self.most:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return self.inner(x)


class Pickling(Executor):
    """Runs at once in this process, with everything pickled on the way in and out as between machines."""

    workers = 2

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        call = pickle.loads(pickle.dumps((fn, args, kwargs)))
        try:
            future.set_result(pickle.loads(pickle.dumps(call[0](*call[1], **call[2]))))
        except Exception as error:
            future.set_exception(error)
        return future


def wrapped(net=None):
    return robustlab.wrap(net or Small(), task="multiclass", output="logits", name="net")


def evaluate(model=None, data=None, **options):
    settings = {
        "val": source(count=24, seed=1),
        "ood": {"far/x": source(count=16, seed=2)},
        "shifts": SHIFTS,
        "severities": (1, 5),
        "batch_size": CHUNK,
        "replicates": 100,
        "progress": False,
    }
    return robustlab.evaluate_under_shift(
        wrapped() if model is None else model, source(count=COUNT) if data is None else data, **settings | options
    )


def assert_same(one, two):
    """Two reports are the same bit for bit, apart from times."""
    assert one.predictions.keys() == two.predictions.keys()
    for key, store in one.predictions.items():
        other = two.predictions[key]
        assert torch.equal(store.ids, other.ids), key
        assert torch.equal(store.logits, other.logits), key
        assert store.scores.keys() == other.scores.keys()
        assert all(torch.equal(store.scores[name], other.scores[name]) for name in store.scores), key
    assert repr(one.rows) == repr(two.rows)
    plain = [
        {k: v for k, v in report.manifest.items() if k not in ("created", "wall_seconds")} for report in (one, two)
    ]
    assert plain[0] == plain[1]
