"""Work on bytes with the words of a random stream.

The functions of reference mode take integers only, so every device and number of threads agrees. Each stands twice: on
tensors, for other devices and the compiler, and on blocks of NumPy arrays, which is several times faster on the CPU.
Where one word serves two pixels, its low half is the first one's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlab.core.rng import Words, in_blocks, normal_q12_table, normal_table, on_tensors, stream_bits, stream_halves
from robustlab.core.threads import scratch

from ._bytes import empty_like, planar

Array = np.ndarray[Any, Any]
Change = Callable[[Array, Array, Array], None]
"""Of pixels (rows, columns) and a place of that shape for the result, both uint8, and the words of the block."""

_SERIAL = 1 << 15  # torch shares longer ones out among its own threads, and here there are threads already
_UNSURE = 1 << 14  # no noise is so large, and with a grey level added it stays in 16 bits
_MARGIN = 2.5e-4  # of a level
_TABLE_COST = 1 << 19  # values on which a table of rounded noise saves what it takes to make
_Q12_LARGEST = 17695  # the largest of the normal quantiles, 4.32, in units of 2^-12


def look_up_halves(index: Array, table: Array, out: Array) -> None:
    """Write ``table[index]`` to ``out``; index uint16, table (65536,), out contiguous, of the shape of index."""
    places = scratch("words.places", index.size, np.intp).reshape(index.shape)
    np.copyto(places, index)  # ``take`` would do so in new memory
    table.take(places, out=out, mode="clip")


def changed_in_blocks(pixels: Tensor, stream: Tensor, per_word: int, make: Callable[[int], Change]) -> Tensor:
    """Return uint8 images that were changed block by block.

    Args:
        pixels: uint8 (N, C, H, W), on the CPU.
        stream: int64 (N,) of ``SampleRng.stream``.
        per_word: Pixels that one word serves, 1 or 2.
        make: Called once in each thread with the largest number of pixels in a block, for scratch.
    """
    source = planar(pixels)
    out = empty_like(source)
    count = math.prod(source.shape[1:])
    given, target = source.reshape(len(source), -1).numpy(), out.reshape(len(out), -1).numpy()

    def make_work(size: int) -> Callable[[slice, slice, Words], None]:
        change = make(size * per_word)

        def work(rows: slice, columns: slice, words: Words) -> None:
            place = slice(columns.start * per_word, min(columns.stop * per_word, count))
            change(given[rows, place], target[rows, place], words)

        return work

    in_blocks(stream, -(-count // per_word), make_work)
    return out


def changed_in_halves(pixels: Tensor, stream: Tensor, make: Callable[[int], Change]) -> Tensor:
    """Return uint8 images that were changed block by block, each value with its half of a word, as in ``looked_up``.

    Args:
        pixels: uint8 (N, C, H, W), on the CPU.
        stream: int64 (N,) of ``SampleRng.stream``.
        make: Called once in each thread with the largest number of pixels in a block, for scratch; the words that its
            function is given are the halves, uint16, in the order of ``SampleRng.normal``.
    """
    source = planar(pixels)
    out = empty_like(source)
    count = math.prod(source.shape[1:])
    half = (count + 1) // 2
    given, target = source.reshape(len(source), -1).numpy(), out.reshape(len(out), -1).numpy()

    def make_work(size: int) -> Callable[[slice, slice, Words], None]:
        change = make(2 * size)

        def work(rows: slice, columns: slice, words: Words) -> None:
            halves = words.view(np.uint16).reshape(*words.shape, 2).swapaxes(1, 2)
            if count == 2 * half:
                source, out = (array.reshape(len(array), 2, half)[rows, :, columns] for array in (given, target))
                change(source, out, halves)
                return
            for part in (0, 1):
                place = slice(part * half + columns.start, min(part * half + columns.stop, count))
                pixel = given[rows, place]
                change(pixel, target[rows, place], halves[:, part, : pixel.shape[1]])

        return work

    in_blocks(stream, half, make_work)
    return out


def changed_as_floats(pixels: Tensor, stream: Tensor, change: Callable[[Tensor, Tensor], object]) -> Tensor:
    """Return uint8 images that were changed as float images, and rounded half to even, all in cache.

    Args:
        pixels: uint8 (N, C, H, W), on the CPU.
        stream: int64 (N,) of ``SampleRng.stream``.
        change: Of float32 values in [0, 1], which it changes in place, and of their standard normal numbers, those of
            ``SampleRng.normal``; it is called with parts of images.
    """
    table = normal_table(torch.device("cpu")).numpy()

    def make(size: int) -> Change:
        normal, value = scratch("words.normal", size, np.float32), scratch("words.value", size, np.float32)

        def work(pixel: Array, out: Array, halves: Array) -> None:
            flat = slice(pixel.size)
            look_up_halves(halves, table, normal[flat].reshape(pixel.shape))
            np.copyto(value[flat].reshape(pixel.shape), pixel)
            rounded_change(value[flat], normal[flat], change)
            np.copyto(out, value[flat].reshape(pixel.shape), casting="unsafe")

        return work

    return changed_in_halves(pixels, stream, make)


def rounded_change(value: Array, normal: Array, change: Callable[[Tensor, Tensor], object]) -> None:
    """Change grey levels, float32 (n,), as ``change`` of ``changed_as_floats`` says, and round them, in place."""
    np.divide(value, np.float32(255), out=value)
    x, z = torch.from_numpy(value), torch.from_numpy(normal)
    for start in range(0, len(value), _SERIAL):
        piece = slice(start, start + _SERIAL)
        change(x[piece], z[piece])
    np.clip(value, np.float32(0), np.float32(1), out=value)
    np.multiply(value, np.float32(255), out=value)
    np.rint(value, out=value)


@lru_cache(maxsize=256)
def _asked(sigma: float) -> list[int]:
    """Return how many values have been asked for at this sigma, to be counted on."""
    del sigma
    return [0]


@lru_cache(maxsize=256)
def _rounded_noise(sigma: float) -> Array:
    """Return int16 (65536,): 255 sigma z of each normal quantile z, rounded, or ``_UNSURE`` where that is near a half.

    A grey level is a whole number, so where 255 sigma z is not near a half, the rounding errors of the sum as float32,
    below 1e-4 of a level between black and white, do not decide to which level it goes.
    """
    noise = normal_table(torch.device("cpu")).numpy().astype(np.float64) * (255 * sigma)
    unsure = np.abs(np.abs(noise - np.floor(noise)) - 0.5) < _MARGIN
    return np.where(unsure & (np.abs(noise) < 256), _UNSURE, np.rint(noise).clip(-256, 256)).astype(np.int16)


def add_rounded_noise(pixels: Tensor, stream: Tensor, sigma: float) -> Tensor:
    """Return ``changed_as_floats`` with x + sigma z, which for most values is the sum of two whole numbers.

    Args:
        pixels: uint8 (N, C, H, W), on the CPU.
        stream: int64 (N,) of ``SampleRng.stream``.
        sigma: At least 0.
    """

    def change_floats(x: Tensor, z: Tensor) -> None:
        torch.add(x, z, alpha=sigma, out=x)

    asked = _asked(sigma)
    asked[0] += pixels.numel()
    if asked[0] <= _TABLE_COST:
        return changed_as_floats(pixels, stream, change_floats)
    table, normals = _rounded_noise(sigma), normal_table(torch.device("cpu")).numpy()

    def make(size: int) -> Change:
        sums, flags = scratch("words.sums", size, np.int16), scratch("words.flags", size, np.bool_)

        def change(source: Array, out: Array, halves: Array) -> None:
            noise = sums[: source.size].reshape(source.shape)
            look_up_halves(halves, table, noise)
            found = flags[: source.size]
            np.greater(noise.reshape(-1), _UNSURE - 1, out=found)
            unsure = np.unravel_index(found.nonzero()[0], source.shape)  # many times as fast as that of several axes
            _clipped_sum(noise, source, out)
            value = source[unsure].astype(np.float32)
            rounded_change(value, normals[halves[unsure]], change_floats)
            out[unsure] = value

        return change

    return changed_in_halves(pixels, stream, make)


def _clipped_sum(noise: Array, pixels: Array, out: Array) -> None:
    np.add(noise, pixels, out=noise)
    np.clip(noise, noise.dtype.type(0), noise.dtype.type(255), out=noise)
    np.copyto(out, noise, casting="unsafe")


@lru_cache(maxsize=64)
def gaussian_table(sigma: float, device: torch.device) -> Tensor:
    """Return int16 (65536,): floor(255 sigma z) of each normal quantile z, which clipping leaves at most 256 long."""
    noise = np.floor(normal_table(torch.device("cpu")).numpy().astype(np.float64) * (255 * sigma))
    return torch.from_numpy(noise.clip(-256, 256).astype(np.int16)).to(device)


def add_noise(pixels: Tensor, stream: Tensor, table: Tensor) -> Tensor:
    """Return clip(q + table[u]) of each pixel q, u uniform on 0 .. 65535.

    With ``gaussian_table`` that is floor(255 clip(q / 255 + sigma z)).

    Args:
        pixels: uint8 (N, C, H, W).
        stream: int64 (N,) of ``SampleRng.stream``.
        table: int16 (65536,), on the device of the pixels.
    """
    if on_tensors(stream):
        halves = stream_halves(stream, math.prod(pixels.shape[1:]))
        noise = table.index_select(0, halves.reshape(-1)).view(pixels.shape)
        return noise.add(pixels).clamp_(0, 255).to(torch.uint8)
    entries = table.numpy()

    def make(size: int) -> Change:
        sums = scratch("words.sums", size, np.int16)

        def change(source: Array, out: Array, words: Words) -> None:
            noise = sums[: 2 * words.size]
            look_up_halves(words.view(np.uint16).reshape(-1), entries, noise)
            _clipped_sum(noise.reshape(len(words), -1)[:, : source.shape[1]], source, out)

        return change

    return changed_in_blocks(pixels, stream, 2, make)


@lru_cache(maxsize=64)
def speckle_scale(sigma: float, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Return the table, scale and shift of ``add_scaled_noise`` for multiplicative noise of this standard deviation.

    They are the normal numbers in units of 2^-12, and round(q sigma 2^k) of each grey level q with the largest k up to
    12 that leaves room for the product.
    """
    k = 12
    while 255 * sigma * 2**k + 1 > (2**31 - 1) / _Q12_LARGEST:
        k -= 1
    scale = torch.from_numpy(np.rint(np.arange(256) * (sigma * 2.0**k)).astype(np.int32)).to(device)
    return normal_q12_table(device).to(torch.int32), scale, k + 12


def add_scaled_noise(pixels: Tensor, stream: Tensor, table: Tensor, scale: Tensor, shift: int) -> Tensor:
    """Return clip(q + floor(scale[q] table[u] / 2^shift)) of each pixel q, u uniform on 0 .. 65535.

    With ``speckle_scale`` that is floor(255 clip(x + x sigma z)), x = q / 255.

    Args:
        pixels: uint8 (N, C, H, W).
        stream: int64 (N,) of ``SampleRng.stream``.
        table: int32 (65536,), on the device of the pixels; no product with ``scale`` may leave 32 bits.
        scale: int32 (256,), on the device of the pixels.
        shift: 0 to 31.
    """
    if on_tensors(stream):
        halves = stream_halves(stream, math.prod(pixels.shape[1:]))
        noise = table.index_select(0, halves.reshape(-1)).view(pixels.shape)
        factor = scale.index_select(0, pixels.reshape(-1).to(torch.int32)).view(pixels.shape)
        return noise.mul_(factor).bitwise_right_shift_(shift).add_(pixels).clamp_(0, 255).to(torch.uint8)
    import cv2

    entries, factors = table.numpy(), scale.numpy()

    def make(size: int) -> Change:
        products, other = scratch("words.products", size, np.int32), scratch("words.factors", size, np.int32)

        def change(source: Array, out: Array, words: Words) -> None:
            noise = products[: 2 * words.size]
            look_up_halves(words.view(np.uint16).reshape(-1), entries, noise)
            noise = noise.reshape(len(words), -1)[:, : source.shape[1]]
            factor = other[: source.size].reshape(source.shape)
            cv2.LUT(source, factors, dst=factor)
            np.multiply(noise, factor, out=noise)
            np.right_shift(noise, shift, out=noise)
            _clipped_sum(noise, source, out)

        return change

    return changed_in_blocks(pixels, stream, 2, make)


def salt_and_pepper(pixels: Tensor, stream: Tensor, amount: float) -> Tensor:
    """Return pixels of which a share of ``amount``, to the nearest 2^-15, is 0 or 255, with equal probability."""
    each = round(amount * 32768)  # of 65,536: this many at the bottom and at the top
    if on_tensors(stream):
        halves = stream_halves(stream, math.prod(pixels.shape[1:])).view(pixels.shape)
        kept = torch.where(halves < each, 0, pixels)
        return torch.where(halves > 65535 - each, 255, kept).to(torch.uint8)

    def make(size: int) -> Change:
        flags = scratch("words.flags", 2 * size, np.bool_).reshape(2, size)

        def change(source: Array, out: Array, words: Words) -> None:
            halves = words.view(np.uint16)[:, : source.shape[1]]
            salt, pepper = flags[:, : source.size].reshape(2, *source.shape)
            np.greater(halves, 65535 - each, out=salt)
            np.less(halves, each, out=pepper)
            _whiten_and_blacken(source, salt, pepper, out)

        return change

    return changed_in_blocks(pixels, stream, 2, make)


def whole_salt_and_pepper(pixels: Tensor, stream: Tensor, below: int, above: int) -> Tensor:
    """Return pixels that are 0 in all channels where their word is less than ``below``, 255 where more than ``above``.

    Args:
        pixels: uint8 (N, C, H, W), on the CPU.
        stream: int64 (N,) of ``SampleRng.stream``.
        below: 0 to 2^32 - 1.
        above: 0 to 2^32 - 1.
    """
    source = planar(pixels)
    out = empty_like(source)
    given, target = (images.flatten(2).numpy() for images in (source, out))

    def make(size: int) -> Callable[[slice, slice, Words], None]:
        flags = scratch("words.flags", 2 * size, np.bool_).reshape(2, size)

        def work(rows: slice, columns: slice, words: Words) -> None:
            salt, pepper = flags[:, : words.size].reshape(2, len(words), 1, -1)
            np.greater(words[:, None], np.uint32(above), out=salt)
            np.less(words[:, None], np.uint32(below), out=pepper)
            _whiten_and_blacken(given[rows, :, columns], salt, pepper, target[rows, :, columns])

        return work

    in_blocks(stream, given.shape[2], make)
    return out


def _whiten_and_blacken(source: Array, salt: Array, pepper: Array, out: Array) -> None:
    """Write the pixels, 255 where ``salt`` is true, 0 where ``pepper`` is; overwrites both, which are broadcast."""
    # True to 255 for salt; 0 for pepper, 255 elsewhere
    ones, keep = salt.view(np.uint8), pepper.view(np.uint8)
    np.bitwise_or(source, np.negative(ones, out=ones), out=out)
    np.bitwise_and(out, np.subtract(keep, np.uint8(1), out=keep), out=out)


def sample_alias(pixels: Tensor, stream: Tensor, table: Tensor) -> Tensor:
    """Return one draw for each pixel from the law of its grey level.

    A word's top byte picks one of 256 columns; its low half, below the column's threshold, keeps the column's own
    value, else the alias is taken.

    Args:
        pixels: uint8 (N, C, H, W).
        stream: int64 (N,) of ``SampleRng.stream``.
        table: int32 (65536,) of ``_poisson.alias_table``, on the device of the pixels.
    """
    if on_tensors(stream):
        words = stream_bits(stream, math.prod(pixels.shape[1:])).view(pixels.shape)
        column = ((words >> 24) & 255).add_(pixels.to(torch.int32) << 8)
        entry = table.index_select(0, column.reshape(-1)).view(pixels.shape)
        own = (words & 0xFFFF) < ((entry >> 16) & 0xFFFF)
        return torch.where(own, entry, entry >> 8).bitwise_and(255).to(torch.uint8)
    entries = table.numpy()

    def make(size: int) -> Change:
        pick = _picker(entries, size)

        def change(source: Array, out: Array, words: Words) -> None:
            halves = words.view(np.uint16).reshape(*words.shape, 2)
            pick(source, halves.view(np.uint8)[:, :, 3], halves[:, :, 0], out)

        return change

    return changed_in_blocks(pixels, stream, 1, make)


def sample_quantiles(pixels: Tensor, stream: Tensor, cells: Array, entries: Array) -> Tensor:
    """Return a quantile for each pixel of the law of its grey level, at its number of ``SampleRng.quantiles``.

    Args:
        pixels: uint8 (N, C, H, W), on the CPU.
        stream: int64 (N,) of ``SampleRng.stream``.
        cells: uint8 (65536,) of ``_poisson.quantile_table``.
        entries: int32 (65536,) of it.
    """

    def make(size: int) -> Change:
        pick, held = _picker(entries, size), scratch("words.cells", size, np.uint8)

        def change(source: Array, out: Array, halves: Array) -> None:
            cell = held[: source.size].reshape(source.shape)
            look_up_halves(halves, cells, cell)
            pick(source, cell, halves, out)

        return change

    return changed_in_halves(pixels, stream, make)


def _picker(entries: Array, size: int) -> Callable[[Array, Array, Array, Array], None]:
    """Return a function of pixels, columns, uniform numbers and a place for the result, all of one shape.

    It reads the entry at 256 pixel + column: its lowest byte is the result where the number is below the upper half,
    else the next byte is.
    """
    columns, found = scratch("words.columns", size, np.uint16), scratch("words.found", size, np.int32)
    flags, shifts = scratch("words.flags", size, np.bool_), scratch("words.shifts", size, np.uint16)

    def pick(source: Array, column: Array, number: Array, out: Array) -> None:
        index, entry, other, shift = (
            array[: source.size].reshape(source.shape) for array in (columns, found, flags, shifts)
        )
        parts, ends = entry.view(np.uint16).reshape(*source.shape, 2), index.view(np.uint8).reshape(*source.shape, 2)
        np.copyto(ends[..., 0], column)
        np.copyto(ends[..., 1], source)
        look_up_halves(index, entries, entry)
        np.greater_equal(number, parts[..., 1], out=other)
        np.left_shift(other.view(np.uint8), 3, out=shift, dtype=np.uint16)
        np.right_shift(parts[..., 0], shift, out=shift)
        np.copyto(out, shift, casting="unsafe")

    return pick
