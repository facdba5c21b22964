"""Threads for work on the CPU and scratch memory, both kept between calls, as new ones cost a small batch's time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any

import numpy as np


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "robustlab-work")  # it starts them as they are needed


# a forked child has the pool, but none of its threads
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def share(run: Callable[[], None], threads: int) -> None:
    """Call ``run`` in this thread and at the same time in others; return when every call has returned.

    Calls that have not begun when this thread's own is done are dropped: ``run`` takes its work from a place that all
    share, until there is none. So threads that share in turn cannot wait for each other.

    Args:
        run: Should release the interpreter's lock, as NumPy, OpenCV, Pillow and SciPy do.
        threads: Calls at the same time, at least 1.
    """
    others = [_pool().submit(run) for _ in range(threads - 1)]
    try:
        run()
    finally:
        begun = [other for other in others if not other.cancel()]
        wait(begun)
    for other in begun:
        other.result()


class _Local(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}


_local = _Local()


def scratch(label: str, count: int, dtype: Any) -> np.ndarray[Any, Any]:
    """Return an array (count,) of this thread, with any content; the next one of the same label lies in its place."""
    size = count * np.dtype(dtype).itemsize
    held = _local.buffers.get(label)
    if held is None or len(held) < size:
        held = _local.buffers[label] = np.empty(size, np.uint8)
    return held[:size].view(dtype)
