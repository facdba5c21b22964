"""Poisson quantiles, and finite tables of photon noise on 8-bit pixels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from robustlab.core.rng import cell_centres, normal_table
from robustlab.core.shift import from_bytes, to_bytes

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


_SMALL = 8.0  # mean count below which the distribution is summed, above which it is expanded
_LARGEST_U = 1 - 2.0**-17
_BLOCK = 1 << 17  # elements worked on at once on the CPU: 512 KB, which stays in a core's cache


def poisson_quantile(mean: Tensor, u: Tensor, z: Tensor) -> Tensor:
    """Return Poisson quantiles F^-1(u; mean).

    Means below 8 are summed from the bottom. Above, the Cornish-Fisher expansion in the normal quantile z

        mean + sqrt(mean) z + (2 + z^2) / 6 - (2 z + z^3) / (72 sqrt(mean)) + (-16 + 7 z^2 + 3 z^4) / (810 mean)

    is rounded down; over the 65,536 cell centres it differs, by one count, from the exact quantile for at most 6 in
    10,000 draws (at mean 8; 2 in 10,000 from 16 to 400).

    Args:
        mean: float32, at least 0.
        u: float32 cell centres of ``SampleRng.quantiles``, same shape.
        z: float32 normal quantiles of ``u``, same shape.

    Returns:
        float32 counts, same shape.

    References:
        M. B. Giles, "Algorithm 955: approximation of the inverse Poisson cumulative distribution function", ACM
        Transactions on Mathematical Software 42, 2016.
    """
    if mean.device.type != "cpu":
        return torch.where(mean < _SMALL, _summed(mean.clamp_max(_SMALL), u), _expanded(mean.clamp_min(_SMALL), z))
    flat, u, z = mean.reshape(-1), u.reshape(-1), z.reshape(-1)
    out = torch.empty_like(flat)
    for start in range(0, len(flat), _BLOCK):
        block = slice(start, start + _BLOCK)
        rows = (flat[block] < _SMALL).nonzero().squeeze(1)
        if len(rows) < len(flat[block]):
            out[block] = _expanded(flat[block].clamp_min(_SMALL), z[block])
        if len(rows):
            out[block][rows] = _summed(flat[block][rows], u[block][rows])
    return out.reshape(mean.shape)


def _expanded(mean: Tensor, z: Tensor) -> Tensor:
    root, square = mean.sqrt(), z * z
    count = (root * z).add_(mean)
    count.add_((square + 2).mul_(1 / 6))
    count.sub_((square + 2).mul_(z).div_(root).mul_(1 / 72))
    count.add_((square * 3).add_(7).mul_(square).sub_(16).div_(mean).mul_(1 / 810))
    return count.floor_().clamp_min_(0)


def _summed(mean: Tensor, u: Tensor) -> Tensor:
    probability = torch.exp(-mean)
    total = probability.clone()
    count = (total < u).to(torch.float32)
    below = torch.empty_like(total)
    for k in range(1, _most_counts()):
        probability.mul_(mean).mul_(1 / k)
        total.add_(probability)
        torch.lt(total, u, out=below)
        count.add_(below)
    return count


def _most_counts() -> int:
    """Return the largest quantile there is below the switch to the expansion."""
    term = total = 2.718281828459045**-_SMALL
    k = 0
    while total < _LARGEST_U:
        k += 1
        term *= _SMALL / k
        total += term
    return k


_TABLE_COST = 1 << 20
"""Values that are sampled by ``poisson_quantile`` in about the time that a table of quantiles takes to make."""

_MOST_PHOTONS = 1e4  # with more, single precision does not tell neighbouring quantiles apart


@lru_cache(maxsize=256)
def _asked(photons: float) -> list[int]:
    del photons
    return [0]


def quantile_table(photons: float, count: int) -> tuple[Array, Array] | None:
    """Return the table for ``sample_quantiles`` of this dose, or None where it does not pay.

    It pays when more than a million values have been asked for at this dose: severities of a report do, one of many
    random doses does not.

    Args:
        photons: Mean count of a white pixel, above 0.
        count: Values to be sampled now.
    """
    asked = _asked(photons)
    asked[0] += count
    return _quantile_table(photons) if asked[0] > _TABLE_COST and photons <= _MOST_PHOTONS else None


@lru_cache(maxsize=1)
def _cells() -> Array:
    """Return uint8 (65536,): the cell, equally wide in normal quantiles, in which each of the uniform numbers lies."""
    z = normal_table(torch.device("cpu")).numpy().astype(np.float64)
    cells: Array = np.minimum((z - z[0]) * (_COLUMNS / (z[-1] - z[0])), _COLUMNS - 1).astype(np.uint8)
    return cells


@lru_cache(maxsize=256)
def _quantile_table(photons: float) -> tuple[Array, Array] | None:
    """Return the cells, and int32 (65536,) of entries, read at 256 q + cell; None if one cell holds three results.

    An entry is the lowest result in the cell, the highest in the next byte, and in the upper half the first uniform
    number that has the highest.
    """
    cells = _cells()
    every = np.arange(_COLUMNS)
    edges = np.searchsorted(cells, every, "left"), np.searchsorted(cells, every, "right") - 1
    low, high = (np.broadcast_to(edge.clip(0, 65535), (256, _COLUMNS)).copy() for edge in edges)
    own, other = _stored_quantiles(low, photons), _stored_quantiles(high, photons)
    # low has the lowest result and high another one, until nothing lies between
    while np.any((high - low > 1) & (own != other)):
        middle = (low + high) // 2
        same = _stored_quantiles(middle, photons) == own
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    if not np.array_equal(_stored_quantiles(high, photons), other):
        return None
    entries = own + (other.astype(np.int64) << 8) + (high << 16)
    return cells, entries.astype(np.uint32).view(np.int32).reshape(-1)


def _stored_quantiles(places: Array, photons: float) -> Array:
    """Return uint8 (256, n), the stored result of each grey level with these of the 65,536 uniform numbers."""
    cpu = torch.device("cpu")
    index = torch.from_numpy(places)
    levels = from_bytes(torch.arange(256, dtype=torch.uint8))[:, None].expand(index.shape)
    counts = poisson_quantile(levels * photons, cell_centres(cpu)[index], normal_table(cpu)[index])
    stored: Array = to_bytes(counts.div_(photons)).numpy()
    return stored
