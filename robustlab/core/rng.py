"""Random numbers that depend only on keys, never on batch, order, device or global state.

Every value is an integer hash of (sample key, stream label, element index): two lowbias32 rounds (C. Wellons, "Hash
Prospector", 2018, public domain constants) over a golden-ratio counter. Only 32-bit integer operations are used, so CPU
and CUDA, eager and compiled, give the same bits. Normals are read from a table of 65,536 quantiles (unit variance,
largest magnitude 4.32).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from .errors import DuplicateNameError

_BLOCK = 1 << 17  # hashes worked on at once on the CPU: 512 KB, which stays in a core's cache


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


_GOLDEN = _signed(0x9E3779B9, 32)
_M1, _M2 = _signed(0x7FEB352D, 32), _signed(0x846CA68B, 32)
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


@lru_cache(maxsize=32)
def _counter(count: int, device: torch.device) -> Tensor:
    x = torch.arange(count, dtype=torch.int32, device=device).mul_(_GOLDEN)
    return _mix32_(x, torch.empty_like(x))


@lru_cache(maxsize=8)
def _normal_table(device: torch.device) -> Tensor:
    half = [NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)]
    scale = math.sqrt(sum(z * z for z in half) / len(half))
    # multiples of 2^-16 are exact in float32 and hide last-digit differences between maths libraries
    upper = [round(z / scale * 65536) / 65536 for z in half]
    return torch.tensor([-z for z in reversed(upper)] + upper, dtype=torch.float32, device=device)


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
        return SampleRng(_mix64(_mix64(ids) ^ stable_hash(seed, stream, epoch, step)))

    def __len__(self) -> int:
        return len(self.keys)

    def child(self, label: str | int) -> SampleRng:
        """Return an independent generator for a part of the work."""
        return SampleRng(_mix64(self.keys ^ stable_hash("child", label)))

    def select(self, index: Tensor) -> SampleRng:
        """Return the generator of the samples at ``index``."""
        return SampleRng(self.keys.index_select(0, index))

    def bits(self, label: str, count: int) -> Tensor:
        """Return int32 (N, count) uniform over all 2^32 values."""
        words = _mix64(self.keys ^ stable_hash("draw", label))
        low = words.to(torch.int32)[:, None]
        high = (words >> 32).to(torch.int32)[:, None]
        out = torch.empty((len(words), count), dtype=torch.int32, device=words.device)
        rows = max(1, _BLOCK // max(count, 1)) if words.device.type == "cpu" else max(len(words), 1)
        spare = torch.empty((min(rows, len(words)), count), dtype=torch.int32, device=words.device)
        counter = _counter(count, words.device)
        for start in range(0, len(words), rows):
            block = out[start : start + rows]
            scratch = spare[: len(block)]
            torch.bitwise_xor(counter, low[start : start + rows], out=block)
            _mix32_(block, scratch).add_(high[start : start + rows])
            _mix32_(block, scratch)
        return out

    def uniform(self, label: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return float32 (N, *shape), uniform on [0, 1) in steps of 2^-24."""
        bits = self.bits(label, math.prod(shape))
        bits.bitwise_right_shift_(8).bitwise_and_((1 << 24) - 1)
        return bits.to(torch.float32).mul_(2.0**-24).reshape(len(self), *shape)

    def normal(self, label: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return float32 (N, *shape), standard normal from the quantile table."""
        return self._halves(label, math.prod(shape), _normal_table(self.keys.device)).reshape(len(self), *shape)

    def quantiles(self, label: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return float32 (N, *shape), uniform on the 65,536 cell centres (i + 1/2) / 65536.

        With the same label, ``normal`` is the normal quantile of these values.
        """
        centres = _cell_centres(self.keys.device)
        return self._halves(label, math.prod(shape), centres).reshape(len(self), *shape)

    def integers(self, label: str, below: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Return int64 (N, *shape), uniform on 0 .. below - 1 (bias below 2^-32 * below)."""
        bits = self.bits(label, math.prod(shape)).to(torch.int64) & 0xFFFFFFFF
        return ((bits * below) >> 32).reshape(len(self), *shape)

    def sign(self, label: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return float32 (N, *shape) of -1 and 1 with equal probability."""
        return self.integers(label, 2, shape).to(torch.float32).mul_(2).sub_(1)

    def _halves(self, label: str, count: int, table: Tensor) -> Tensor:
        """Look up two table entries per hash: the low halves fill the front of each row, the high halves the rest."""
        half = (count + 1) // 2
        bits = self.bits(label, half)
        out = torch.empty((len(bits), count), dtype=torch.float32, device=bits.device)
        rows = max(1, _BLOCK // max(half, 1)) if bits.device.type == "cpu" else max(len(bits), 1)
        for start in range(0, len(bits), rows):
            block = bits[start : start + rows]
            index = block & 0xFFFF
            out[start : start + rows, :half] = table.index_select(0, index.view(-1)).view(index.shape)
            index = block.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
            out[start : start + rows, half:] = table.index_select(0, index.view(-1)).view(index.shape)[
                :, : count - half
            ]
        return out


@lru_cache(maxsize=8)
def _cell_centres(device: torch.device) -> Tensor:
    return ((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536).to(torch.float32).to(device)
