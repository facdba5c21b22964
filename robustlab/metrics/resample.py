"""The paired Poisson bootstrap: weights that depend on nothing but seed, replicate and unit."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustlab.core.errors import RangeError
from robustlab.core.rng import SampleRng

_BLOCK = 50  # replicates drawn per stream label; fixed, so that a weight does not depend on the number of samples
_ROWS = 1 << 12  # rows hashed at once: what they take stays in a core's cache
_CHUNK = 1 << 21  # weights handed to a statistic at once (16 MB of float64; statistics need a few times that)
_WHOLE = 1 << 26  # up to so many weights, a chunk may reach across blocks
_CACHE_BYTES = 1 << 27


class WeightCache:
    """Blocks of weights that were drawn, two weights to a byte, at most 128 MB, keyed by the content of the unit codes.

    Blocks of the codes in use never push each other out: where all of them do not fit, those that did are kept and the
    others are drawn again.
    """

    def __init__(self) -> None:
        self._items: OrderedDict[tuple[str, bytes, str], dict[int, Tensor]] = OrderedDict()
        self._bytes = 0

    @staticmethod
    def key(stream: str, units: Tensor) -> tuple[str, bytes, str]:
        """Return the key of a code tensor: its bytes, not its address."""
        data = units.detach().cpu().contiguous().numpy()
        return stream, hashlib.blake2b(data.data, digest_size=16).digest(), str(units.device)

    def get(self, key: tuple[str, bytes, str], first: int) -> Tensor | None:
        """Return the stored block that begins at replicate ``first``, or None."""
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key].get(first)

    def put(self, key: tuple[str, bytes, str], first: int, block: Tensor, in_use: Collection[object]) -> None:
        """Store a block where it fits after dropping the oldest codes that are not in use."""
        while self._bytes + block.numel() > _CACHE_BYTES:
            oldest = next((other for other in self._items if other not in in_use), None)
            if oldest is None:
                return
            self._bytes -= sum(item.numel() for item in self._items.pop(oldest).values())
        self._items.setdefault(key, {})[first] = block
        self._bytes += block.numel()

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

    def chunks(self, *sides: Tensor, reuse: bool = False) -> Iterator[list[Tensor]]:
        """Yield the weights of consecutive replicates, one float64 (N, b) a side, in bounded memory.

        Args:
            sides: int64 (N,) sample ids or cluster codes. Each side has weights of its own stream, because the codes of
                two data sets may coincide by chance.
            reuse: All chunks lie in the same memory: one is gone when the next one comes.
        """
        rows = sum(len(units) for units in sides)
        width = max(1, _CHUNK // max(rows, 1))
        step = self.replicates if rows * self.replicates <= _WHOLE else _BLOCK
        starts = [
            (start, min(start + width, first + step, self.replicates))
            for first in range(0, self.replicates, step)
            for start in range(first, min(first + step, self.replicates), width)
        ]
        streams = [(f"side {i}", units) for i, units in enumerate(sides)]
        keys = [WeightCache.key(stream, units) for stream, units in streams]
        columns = [
            self._columns(units, stream, key, starts, keys, reuse)
            for (stream, units), key in zip(streams, keys, strict=True)
        ]
        yield from map(list, zip(*columns, strict=True))

    def values(self, statistic: Callable[..., Tensor], *sides: Tensor) -> Tensor:
        """Return float64 (..., replicates): a statistic under each replicate's weights.

        Args:
            statistic: Maps weights (N, b), one tensor a side, to values (..., b).
            sides: See ``chunks``.
        """
        # one place for all results and one for all weights: small tensors that stay between the large ones of every
        # chunk would keep the allocator from using that memory again
        out, start = torch.empty(0), 0
        for weights in self.chunks(*sides, reuse=True):
            part = statistic(*weights)
            if start == 0:
                out = part.new_empty((*part.shape[:-1], self.replicates))
            out[..., start : start + part.shape[-1]] = part
            start += part.shape[-1]
        return out

    def _columns(
        self,
        units: Tensor,
        stream: str,
        key: tuple[str, bytes, str],
        ranges: Sequence[tuple[int, int]],
        in_use: Collection[object],
        reuse: bool,
    ) -> Iterator[Tensor]:
        """Yield float64 (N, stop - start), the weights of each range of replicates; ranges ascend."""
        held, block = -1, torch.empty(0)
        width = max(stop - start for start, stop in ranges)
        space = torch.empty(len(units) * width, dtype=torch.float64, device=units.device)
        for start, stop in ranges:
            room = space if reuse else torch.empty_like(space)
            out = room[: len(units) * (stop - start)].view(len(units), stop - start)
            for first in range(start - start % _BLOCK, stop, _BLOCK):
                if first != held:
                    held, block = first, self._block(units, stream, key, first, in_use)
                _unpack(block, min(_BLOCK, self.replicates - first), start - first, out)
            yield out

    def _block(
        self, units: Tensor, stream: str, key: tuple[str, bytes, str], first: int, in_use: Collection[object]
    ) -> Tensor:
        """Return the packed weights of the block of replicates that begins at ``first``."""
        block = self._cache.get(key, first)
        if block is None:
            block = self._draw(units, stream, first, min(_BLOCK, self.replicates - first))
            self._cache.put(key, first, block, in_use)
        return block

    def _draw(self, units: Tensor, stream: str, start: int, count: int) -> Tensor:
        """Return uint8 (N, ceil(count / 2)): replicate j in the low half of byte j, the second half above the first."""
        rng = SampleRng.make(self.seed, f"bootstrap {stream}", units)
        half = (count + 1) // 2
        out = torch.empty((len(units), half), dtype=torch.uint8, device=units.device)
        steps = _poisson_steps()
        for first in range(0, len(units), _ROWS):
            bits = SampleRng(rng.keys[first : first + _ROWS]).bits(f"block {start}", count)
            drawn = torch.zeros(bits.shape, dtype=torch.uint8, device=bits.device)
            reached = torch.empty(bits.shape, dtype=torch.bool, device=bits.device)
            for step in steps:
                drawn += torch.ge(bits, step, out=reached).view(torch.uint8)
            packed = drawn[:, :half]
            packed[:, : count - half] += drawn[:, half:] << 4
            out[first : first + _ROWS] = packed
        return out


def _unpack(block: Tensor, count: int, begin: int, out: Tensor) -> None:
    """Write the replicates of a packed block of ``count`` into ``out``, whose column 0 is replicate ``begin`` of it."""
    half = block.shape[1]
    for base, size, high in ((0, half, False), (half, count - half, True)):
        a, b = max(begin, base), min(begin + out.shape[1], base + size)
        if a < b:
            bits = block[:, a - base : b - base]
            out[:, a - begin : b - begin] = bits >> 4 if high else bits & 15


def _poisson_steps() -> list[int]:
    """Return the signed 32-bit values at which the Poisson(1) count rises by one: twelve, so 4 bits hold it."""
    steps: list[int] = []
    total, mass = 0.0, math.exp(-1)
    while round((total + mass) * 2**32) < 2**32:
        total += mass
        steps.append(round(total * 2**32) - 2**31)
        mass /= len(steps)
    return steps
