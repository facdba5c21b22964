"""Random numbers that depend only on keys, never on batch, order, device or global state.

Every value is an integer hash of (sample key, stream label, element index): two lowbias32 rounds (C. Wellons, "Hash
Prospector", 2018, public domain constants) over a golden-ratio counter. Only 32-bit integer operations are used, so CPU
and CUDA, eager and compiled, give the same bits. Normals are read from a table of 65,536 quantiles (unit variance,
largest magnitude 4.32).

``SampleRng.stream`` gives the 64 bits per sample from which a draw is made, for those who make its values only while
they use them: ``in_blocks`` on the CPU, a block at a time in a core's cache and on as many threads as torch uses, or
``stream_bits`` and ``stream_halves`` on other devices.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import DuplicateNameError
from .threads import scratch, share

BLOCK = 5 << 15  # hashes worked on at once on the CPU: 640 KB; smaller blocks let threads queue for the interpreter

Words = np.ndarray[Any, np.dtype[np.uint32]]
Work = Callable[[slice, slice, Words], None]


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


_GOLDEN = _signed(0x9E3779B9, 32)
_M1, _M2 = _signed(0x7FEB352D, 32), _signed(0x846CA68B, 32)
_U1, _U2 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)
_S1, _S2, _S3 = (_signed(v, 64) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def stable_hash(*parts: str | int) -> int:
    """Return a signed 64-bit hash of strings and integers, the same in every process and on every platform."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"), 64)


def hash_ids(names: Iterable[str]) -> Tensor:
    """Hash string ids to int64.

    Raises:
        DuplicateNameError: Two names are equal or share a hash.
    """
    seen: dict[int, str] = {}
    for name in names:
        code = stable_hash(name)
        if code in seen:
            raise DuplicateNameError(
                "hash_ids", "ids that are all different", f"{seen[code]!r} and {name!r}", "Make the ids unique."
            )
        seen[code] = name
    return torch.tensor(list(seen), dtype=torch.int64)


def hashed(ids: Tensor) -> Tensor:
    """Return int64 (N,) pseudonyms of ids, for files and pages that leave the machine.

    The same id has the same pseudonym everywhere, so saved predictions of two models can be paired. The input is added
    last (Davies and Meyer), so the mixing cannot be run backwards; someone who can list all possible ids can still
    hash them and compare.

    Args:
        ids: int64 (N,).
    """
    return _mix64(_mix64(ids ^ stable_hash("pseudonym", 1)) ^ stable_hash("pseudonym", 2)) + ids


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64 finaliser (Steele, Lea, Flood 2014) on int64 with wrap-around."""
    x = x + _S1
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _S2
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _S3
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _mix32_(x: Tensor, spare: Tensor) -> Tensor:
    """lowbias32 in place on int32; ``spare`` is scratch of the same shape."""
    for shift, factor in ((16, _M1), (15, _M2), (16, None)):
        torch.bitwise_right_shift(x, shift, out=spare)
        spare.bitwise_and_((1 << (32 - shift)) - 1)
        x.bitwise_xor_(spare)
        if factor is not None:
            x.mul_(factor)
    return x


def _mix32_words(x: Words, spare: Words) -> None:
    """``_mix32_`` on unsigned numbers, whose shifts need no mask."""
    for shift, factor in ((16, _U1), (15, _U2), (16, None)):
        np.right_shift(x, shift, out=spare)
        np.bitwise_xor(x, spare, out=x)
        if factor is not None:
            np.multiply(x, factor, out=x)


def _mixed_places(count: int, device: torch.device) -> Tensor:
    x = torch.arange(count, dtype=torch.int32, device=device).mul_(_GOLDEN)
    return _mix32_(x, torch.empty_like(x))


_counter = lru_cache(maxsize=4)(_mixed_places)  # as large as an image


@lru_cache(maxsize=8)
def normal_table(device: torch.device) -> Tensor:
    """Return float32 (65536,): the standard normal numbers of ``SampleRng.normal``, rising."""
    half = [NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)]
    scale = math.sqrt(sum(z * z for z in half) / len(half))
    # multiples of 2^-16 are exact in float32 and hide last-digit differences between maths libraries
    upper = [round(z / scale * 65536) / 65536 for z in half]
    return torch.tensor([-z for z in reversed(upper)] + upper, dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def cell_centres(device: torch.device) -> Tensor:
    """Return float32 (65536,): the uniform numbers of ``SampleRng.quantiles``, rising."""
    return ((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536).to(torch.float32).to(device)


@lru_cache(maxsize=8)
def normal_q12_table(device: torch.device) -> Tensor:
    """Return int16 (65536,): the standard normal numbers in units of 2^-12, rising."""
    return (normal_table(device) * 4096).round().to(torch.int16)


def in_blocks(stream: Tensor, count: int, make: Callable[[int], Work]) -> None:
    """Give the words of a stream to a function, a block at a time, on as many threads as torch uses.

    Args:
        stream: int64 (N,) of ``SampleRng.stream``, on the CPU.
        count: Words per sample.
        make: Called once in each thread with the largest number of words in a block, for scratch; what it returns is
            called with (rows, columns, words): the samples and the places in them that the block covers, and its
            contiguous words (rows, columns), which it may change. It should release the interpreter's lock (NumPy,
            OpenCV) and write where no other block does.
    """
    total = len(stream)
    if not total or not count:
        return
    low = stream.to(torch.int32).numpy().view(np.uint32)[:, None]
    high = (stream >> 32).to(torch.int32).numpy().view(np.uint32)[:, None]
    counter = _counter(count, stream.device).numpy().view(np.uint32)
    parts = -(-count // BLOCK)
    width = -(-count // parts)
    rows = min(total, max(1, BLOCK // count))
    blocks = [(first, start) for first in range(0, total, rows) for start in range(0, count, width)]
    left = iter(blocks)

    def run() -> None:
        work = make(rows * width)
        buffers = scratch("rng.words", 2 * rows * width, np.uint32).reshape(2, -1)
        for first, start in left:
            samples = slice(first, min(first + rows, total))
            places = slice(start, min(start + width, count))
            shape = (samples.stop - samples.start, places.stop - places.start)
            words, spare = buffers[:, : shape[0] * shape[1]].reshape(2, *shape)
            np.bitwise_xor(counter[places], low[samples], out=words)
            _mix32_words(words, spare)
            np.add(words, high[samples], out=words)
            _mix32_words(words, spare)
            work(samples, places, words)

    # waking a thread costs as much as a block
    share(run, max(1, min(torch.get_num_threads(), len(blocks) // 2)))


def on_tensors(stream: Tensor) -> bool:
    """Return whether a stream is to be worked on with tensors, not ``in_blocks``: off the CPU, or being compiled."""
    return stream.device.type != "cpu" or torch.compiler.is_compiling()


def stream_bits(stream: Tensor, count: int) -> Tensor:
    """Return int32 (N, count), the words of a stream, uniform over all 2^32 values."""
    if on_tensors(stream):
        # the compiler warns about caches
        counter = _mixed_places if torch.compiler.is_compiling() else _counter
        bits = counter(count, stream.device) ^ stream.to(torch.int32)[:, None]
        _mix32_(bits, torch.empty_like(bits)).add_((stream >> 32).to(torch.int32)[:, None])
        return _mix32_(bits, torch.empty_like(bits))
    out = torch.empty((len(stream), count), dtype=torch.int32)
    target = out.numpy().view(np.uint32)

    def make(size: int) -> Work:
        del size
        return lambda rows, columns, words: np.copyto(target[rows, columns], words)

    in_blocks(stream, count, make)
    return out


def stream_halves(stream: Tensor, count: int) -> Tensor:
    """Return int32 (N, count), uniform on 0 .. 65535: the low half of the first word, its high half, and so on."""
    bits = stream_bits(stream, (count + 1) // 2)
    pairs = torch.stack((bits & 0xFFFF, (bits >> 16) & 0xFFFF), dim=2)
    return pairs.reshape(len(stream), -1)[:, :count]


def stream_looked_up(stream: Tensor, count: int, table: Tensor) -> Tensor:
    """Return (N, count), two table entries per word: the low halves fill the front of each row, the high ones the rest.

    Args:
        stream: int64 (N,) of ``SampleRng.stream``.
        count: Values per sample.
        table: (65536,), on the stream's device.
    """
    half = (count + 1) // 2
    out = torch.empty((len(stream), count), dtype=table.dtype, device=stream.device)
    if on_tensors(stream):
        bits = stream_bits(stream, half)
        out[:, :half] = table[bits & 0xFFFF]
        out[:, half:] = table[(bits >> 16) & 0xFFFF][:, : count - half]
        return out
    entries, target = table.numpy(), out.numpy()

    def make(size: int) -> Work:
        index, found = scratch("rng.index", size, np.intp), scratch("rng.found", size, entries.dtype)

        def work(rows: slice, columns: slice, words: Words) -> None:
            halves = words.view(np.uint16).reshape(*words.shape, 2)
            places, values = (array[: words.size].reshape(words.shape) for array in (index, found))
            for part in (0, 1):
                np.copyto(places, halves[:, :, part])
                entries.take(places, out=values, mode="clip")
                into = target[rows, part * half + columns.start : min(part * half + columns.stop, count)]
                np.copyto(into, values[:, : into.shape[1]])

        return work

    in_blocks(stream, half, make)
    return out


def content_ids(images: Tensor) -> Tensor:
    """Return int64 (N,) ids made of the pixels, for callers that have no ids.

    Args:
        images: float (N, C, H, W).
    """
    bits = images.detach().to(torch.float32).contiguous().view(torch.int32).reshape(len(images), -1)
    mixed = bits ^ _counter(bits.shape[1], images.device)
    _mix32_(mixed, torch.empty_like(mixed))
    return _mix64(mixed.to(torch.int64).sum(1))


@dataclass(frozen=True, eq=False)
class SampleRng:
    """Random numbers for the samples of one batch.

    Args:
        keys: int64 (N,), one key per sample; results live on its device.
    """

    keys: Tensor

    @staticmethod
    def make(seed: int, stream: str, ids: Tensor, *, epoch: int = 0, step: int = 0) -> SampleRng:
        """Return the generator of (seed, stream, epoch, step) for the samples ``ids`` (int64 (N,))."""
        # the hash tells kinds of numbers apart, and NumPy's integers are meant as integers
        numbers = operator.index(seed), operator.index(epoch), operator.index(step)
        return SampleRng(_mix64(_mix64(ids) ^ stable_hash(numbers[0], stream, numbers[1], numbers[2])))

    def __len__(self) -> int:
        return len(self.keys)

    def child(self, label: str | int) -> SampleRng:
        """Return an independent generator for a part of the work."""
        return SampleRng(_mix64(self.keys ^ stable_hash("child", label)))

    def select(self, index: Tensor) -> SampleRng:
        """Return the generator of the samples at ``index``."""
        return SampleRng(self.keys.index_select(0, index))

    def stream(self, label: str) -> Tensor:
        """Return int64 (N,), all that the draw of this label is made of; see the functions on streams."""
        return _mix64(self.keys ^ stable_hash("draw", label))

    def bits(self, label: str, count: int) -> Tensor:
        """Return int32 (N, count) uniform over all 2^32 values."""
        return stream_bits(self.stream(label), count)

    def uniform(self, label: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return float32 (N, *shape), uniform on [0, 1) in steps of 2^-24."""
        bits = self.bits(label, math.prod(shape))
        bits.bitwise_right_shift_(8).bitwise_and_((1 << 24) - 1)
        return bits.to(torch.float32).mul_(2.0**-24).reshape(len(self), *shape)

    def normal(self, label: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return float32 (N, *shape), standard normal from the quantile table."""
        table = normal_table(self.keys.device)
        return stream_looked_up(self.stream(label), math.prod(shape), table).reshape(len(self), *shape)

    def normal_q12(self, label: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return int16 (N, *shape), ``normal`` in units of 2^-12 (at most 2^-13 from it)."""
        table = normal_q12_table(self.keys.device)
        return stream_looked_up(self.stream(label), math.prod(shape), table).reshape(len(self), *shape)

    def halves(self, label: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return int32 (N, *shape), uniform on 0 .. 65535."""
        return stream_halves(self.stream(label), math.prod(shape)).reshape(len(self), *shape)

    def quantiles(self, label: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return float32 (N, *shape), uniform on the 65,536 cell centres (i + 1/2) / 65536.

        With the same label, ``normal`` is the normal quantile of these values.
        """
        centres = cell_centres(self.keys.device)
        return stream_looked_up(self.stream(label), math.prod(shape), centres).reshape(len(self), *shape)

    def integers(self, label: str, below: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Return int64 (N, *shape), uniform on 0 .. below - 1 (bias below 2^-32 * below)."""
        bits = self.bits(label, math.prod(shape)).to(torch.int64) & 0xFFFFFFFF
        return ((bits * below) >> 32).reshape(len(self), *shape)

    def sign(self, label: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return float32 (N, *shape) of -1 and 1 with equal probability."""
        return self.integers(label, 2, shape).to(torch.float32).mul_(2).sub_(1)
