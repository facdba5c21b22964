"""The paired Poisson bootstrap: weights that depend on nothing but seed, replicate and unit."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustlab.core.errors import RangeError
from robustlab.core.rng import SampleRng

from .base import Statistic

_BLOCK = 50  # replicates drawn per stream label; fixed, so that a weight does not depend on the number of samples
_ROWS = 1 << 16  # rows hashed at once
_CHUNK = 1 << 21  # weights handed to a statistic at once (16 MB of float64; statistics need a few times that)
_CACHE_BYTES = 1 << 26


class WeightCache:
    """The last few weight matrices of a resampler, at most 64 MB, keyed by the content of the unit codes."""

    def __init__(self) -> None:
        self._items: OrderedDict[tuple[str, bytes, str], Tensor] = OrderedDict()

    @staticmethod
    def key(stream: str, units: Tensor) -> tuple[str, bytes, str]:
        """Return the key of a code tensor: its bytes, not its address."""
        data = units.detach().cpu().contiguous().numpy()
        return stream, hashlib.blake2b(data.tobytes(), digest_size=16).digest(), str(units.device)

    def get(self, key: tuple[str, bytes, str]) -> Tensor | None:
        """Return the stored weights, or None."""
        weights = self._items.get(key)
        if weights is not None:
            self._items.move_to_end(key)
        return weights

    def put(self, key: tuple[str, bytes, str], weights: Tensor) -> None:
        """Store weights and drop the oldest ones beyond the budget."""
        self._items[key] = weights
        while len(self._items) > 1 and sum(item.numel() for item in self._items.values()) > _CACHE_BYTES:
            self._items.popitem(last=False)

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()


@dataclass(frozen=True)
class Resampler:
    """Poisson(1) bootstrap whose weights depend only on (seed, replicate, unit).

    A unit is a sample id, or the cluster code where the store has clusters. Subsets, conditions and models that share
    units therefore share weights: differences are paired, and neither order nor batches matter.

    Args:
        seed: Seed of the weights.
        replicates: Number of replicates, at least 1.
        confidence: Coverage of all intervals, in (0, 1).

    References:
        Chamandy et al., Estimating uncertainty for massive data streams, 2012.
    """

    seed: int = 0
    replicates: int = 1000
    confidence: float = 0.95
    _cache: WeightCache = field(default_factory=WeightCache, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.replicates < 1:
            raise RangeError("Resampler", "at least 1 replicate", f"{self.replicates}", "The usual number is 1000.")
        if not 0 < self.confidence < 1:
            raise RangeError("Resampler", "confidence between 0 and 1", f"{self.confidence}", "The usual one is 0.95.")

    def chunks(self, *sides: Tensor) -> Iterator[list[Tensor]]:
        """Yield the weights of consecutive replicates, one float64 (N, b) a side, in bounded memory.

        Args:
            sides: int64 (N,) sample ids or cluster codes. Each side has weights of its own stream, because the codes of
                two data sets may coincide by chance.
        """
        rows = sum(len(units) for units in sides)
        width = max(1, _CHUNK // max(rows, 1))
        cached = rows * self.replicates <= _CACHE_BYTES
        step = self.replicates if cached else _BLOCK
        for first in range(0, self.replicates, step):
            count = min(step, self.replicates - first)
            blocks = [self._weights(units, f"side {i}", first, count, cached) for i, units in enumerate(sides)]
            for start in range(0, count, width):
                yield [block[:, start : start + width].to(torch.float64) for block in blocks]

    def values(self, statistic: Statistic, units: Tensor) -> Tensor:
        """Return float64 (..., replicates): the statistic, which returns (..., b), under each replicate's weights."""
        return torch.cat([statistic(weights) for (weights,) in self.chunks(units)], -1)

    def _weights(self, units: Tensor, stream: str, first: int, count: int, cached: bool) -> Tensor:
        """Return uint8 (N, count), the weights of replicates first .. first + count - 1 (``first`` begins a block)."""
        key = WeightCache.key(stream, units) if cached else None
        weights = None if key is None else self._cache.get(key)
        if weights is None:
            ends = range(first, first + count, _BLOCK)
            weights = torch.cat([self._draw(units, stream, i, min(_BLOCK, first + count - i)) for i in ends], 1)
            if key is not None:
                self._cache.put(key, weights)
        return weights

    def _draw(self, units: Tensor, stream: str, start: int, count: int) -> Tensor:
        rng = SampleRng.make(self.seed, f"bootstrap {stream}", units)
        out = torch.empty((len(units), count), dtype=torch.uint8, device=units.device)
        steps = _poisson_steps()
        for first in range(0, len(units), _ROWS):
            bits = SampleRng(rng.keys[first : first + _ROWS]).bits(f"block {start}", count)
            block = (bits >= steps[0]).to(torch.uint8)
            for step in steps[1:]:
                block += bits >= step
            out[first : first + _ROWS] = block
        return out


def _poisson_steps() -> list[int]:
    """Return the signed 32-bit values at which the Poisson(1) count rises by one."""
    steps: list[int] = []
    total, mass = 0.0, math.exp(-1)
    while round((total + mass) * 2**32) < 2**32:
        total += mass
        steps.append(round(total * 2**32) - 2**31)
        mass /= len(steps)
    return steps
