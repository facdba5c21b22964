"""Exact finite tables of photon noise on 8-bit pixels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

_COLUMNS = 256
_CAPACITY = 1 << 16  # of one column, hence probabilities in units of 2^-24

Array = np.ndarray[Any, Any]


def stored(counts: Array, photons: float) -> Array:
    """Return int64 floor(255 min(K / photons, 1)) of photon counts K, with the rounding of double precision."""
    return (np.clip(counts / photons, 0, 1) * 255).astype(np.int64)


def cumulative(photons: float) -> Array:
    """Return float64 (256, 256): for each grey level q, the probability of a result of at most b = 0 .. 255.

    The result is floor(255 min(K / photons, 1)), K ~ Poisson(photons q / 255); counts above ``photons`` are all white,
    so the law is finite.

    Args:
        photons: Mean count of a white pixel, above 0.
    """
    levels = np.arange(256)
    # the smallest count that is stored as b or more; the formula may miss it by one where K / photons is rounded
    first = np.ceil(levels * (photons / 255))
    first -= stored(np.maximum(first - 1, 0), photons) >= levels
    first = np.maximum(first, 0)
    first += stored(first, photons) < levels
    below = np.append(first[1:] - 1, np.inf)
    mean = levels[:, None] * (photons / 255)
    return np.where(below < 0, 0.0, special.pdtr(np.clip(below, 0, 1e300), mean))


def alias(weights: Array) -> tuple[Array, Array]:
    """Return thresholds and aliases of Walker's method, many laws at once.

    The poorest column is filled up from the richest, until all are full; every column then holds at most two values.

    Args:
        weights: int64 (laws, columns), at least 0, each row with the sum columns * 2^16.

    Returns:
        Weight of the column's own value, below 2^16, and the other value, both int64 (laws, columns).

    References:
        A. J. Walker, "An efficient method for generating discrete random variables with general distributions", ACM
        Transactions on Mathematical Software 3, 1977.
    """
    laws, columns = weights.shape
    row = np.arange(laws)
    left = weights.copy()
    threshold, other = np.zeros_like(weights), np.tile(np.arange(columns), (laws, 1))
    poor = left.copy()  # full columns are put out of the way of both searches
    for _ in range(columns):
        lowest, highest = poor.argmin(1), left.argmax(1)
        weight = left[row, lowest]
        full = weight == _CAPACITY
        threshold[row, lowest] = np.where(full, 0, weight)
        other[row, lowest] = np.where(full, lowest, highest)
        taken = np.where(full, 0, _CAPACITY - weight)
        left[row, highest] -= taken
        poor[row, highest] -= taken
        left[row, lowest] = -1
        poor[row, lowest] = np.iinfo(np.int64).max
    return threshold, other


@lru_cache(maxsize=32)
def alias_table(photons: float, device: torch.device) -> Tensor:
    """Return int32 (65536,), read at 256 q + column: own value, alias in the next byte, threshold in the upper half.

    Probabilities are exact to 2^-24.

    Args:
        photons: Mean count of a white pixel, above 0.
        device: Where the table is to lie.
    """
    edges = np.rint(cumulative(photons) * (_COLUMNS * _CAPACITY)).astype(np.int64)
    threshold, other = alias(np.diff(edges, axis=1, prepend=0))
    entries = np.arange(_COLUMNS) + (other << 8) + (threshold << 16)
    return torch.from_numpy(entries.astype(np.uint32).view(np.int32).reshape(-1).copy()).to(device)
