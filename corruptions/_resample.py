"""Separable resampling by weighted sums of image rows.

Sums run in a fixed order, one tap after the other, so that a sample's result depends on neither the
batch nor a matrix library. Bytes are averaged in integers as Pillow does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from robustlab.core.shift import from_bytes, to_bytes

from ._bytes import Pixels, each_image_into

Floats = np.ndarray[Any, np.dtype[np.float32]]
_Index = np.ndarray[Any, np.dtype[np.intp]]
_PRECISION = 22  # bits of Pillow's weights for 8-bit images


@dataclass(frozen=True, eq=False)
class Taps:
    """Output row j is the sum over k of ``weight[k, j]`` times input row ``index[k, j]``.

    Args:
        index: int64 (K, rows).
        weight: float32 (K, rows).
    """

    index: Tensor
    weight: Tensor

    @staticmethod
    def of(matrix: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> Taps:
        """Return the taps of a (rows out, rows in) matrix whose non-zeros are contiguous in each row."""
        nonzero = matrix > 0
        first = nonzero.argmax(axis=1)
        width = int(nonzero.sum(axis=1).max())
        index = np.minimum(first[None, :] + np.arange(width)[:, None], matrix.shape[1] - 1)
        weight = np.take_along_axis(matrix.T, index, axis=0)
        weight[first[None, :] + np.arange(width)[:, None] >= matrix.shape[1]] = 0
        return Taps(torch.from_numpy(index), torch.from_numpy(weight.astype(np.float32)))

    @cached_property
    def steps(self) -> tuple[tuple[slice | _Index, Floats], ...]:
        """The taps for arrays: for each, rows (a slice where they are evenly spaced) and weights (rows, 1)."""
        return tuple(
            (_as_slice(rows), weights[:, None])
            for rows, weights in zip(self.index.numpy(), self.weight.numpy(), strict=True)
        )

    def write(self, values: Floats, out: Floats, term: Floats) -> Floats:
        """Write the rows of one image (H, ...) to ``out`` (rows, ...), with the bits of ``rows``; ``term`` is scratch.

        All are contiguous.
        """
        flat, total, part = (array.reshape(len(array), -1) for array in (values, out, term))
        for place, (rows, weights) in enumerate(self.steps):
            target = part if place else total
            if isinstance(rows, slice):
                np.multiply(flat[rows], weights, out=target)
            else:
                np.take(flat, rows, axis=0, out=target, mode="clip")
                np.multiply(target, weights, out=target)
            if place:
                np.add(total, part, out=total)
        return out

    def rows(self, images: Tensor) -> Tensor:
        """Return (N, C, rows, W) of images (N, C, H, W)."""
        index, weight = self.index.to(images.device), self.weight.to(images.device)
        if len(index) == 1:
            return images.index_select(2, index[0])
        total: Tensor | None = None
        for rows, weights in zip(index, weight, strict=True):
            term = images.index_select(2, rows).mul_(weights[:, None])
            total = term if total is None else total.add_(term)
        assert total is not None  # noqa: S101 - at least one tap, for the type checkers
        return total


def _as_slice(rows: _Index) -> slice | _Index:
    step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
    even = step > 0 and bool((np.diff(rows) == step).all())
    return slice(int(rows[0]), int(rows[-1]) + 1, step) if even else rows


@lru_cache(maxsize=64)
def area_down(size: int, pitch: float) -> Taps:
    """Return averages over cells of ``pitch`` pixels laid from the first edge; the last cell may be cut."""
    count = max(1, math.ceil(size / pitch - 1e-9))
    low = np.arange(count)[:, None] * pitch
    high = np.minimum(low + pitch, size)
    pixels = np.arange(size)[None, :]
    overlap = np.clip(np.minimum(high, pixels + 1) - np.maximum(low, pixels), 0, None)
    return Taps.of(overlap / overlap.sum(axis=1, keepdims=True))


@lru_cache(maxsize=64)
def linear_up(size: int, pitch: float) -> Taps:
    """Return linear interpolation between the centres of the cells of ``area_down``."""
    count = max(1, math.ceil(size / pitch - 1e-9))
    position = np.clip((np.arange(size) + 0.5) / pitch - 0.5, 0, count - 1)
    weight = 1 - np.abs(position[:, None] - np.arange(count)[None, :])
    return Taps.of(np.clip(weight, 0, None))


@lru_cache(maxsize=64)
def box_members(size: int, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """Return, as (count, size), which of ``size`` rows Pillow's BOX filter averages into each of ``count``."""
    scale = size / count
    support = 0.5 * max(scale, 1.0)
    centre = (np.arange(count)[:, None] + 0.5) * scale
    low = np.maximum(np.floor(centre - support + 0.5), 0)
    high = np.minimum(np.floor(centre + support + 0.5), size)
    pixels = np.arange(size)[None, :]
    place = (pixels - centre + 0.5) / max(scale, 1.0)
    members: np.ndarray[tuple[int, int], np.dtype[np.bool_]] = (
        (pixels >= low) & (pixels < high) & (place > -0.5) & (place <= 0.5)
    )
    return members


@lru_cache(maxsize=64)
def box_resize(size: int, count: int) -> Taps:
    """Return Pillow's BOX filter from ``size`` to ``count`` rows."""
    inside = box_members(size, count)
    return Taps.of(inside / inside.sum(axis=1, keepdims=True))


def resample(images: Tensor, down: tuple[Taps, Taps], up: tuple[Taps, Taps]) -> Tensor:
    """Return images resampled down and up again, along height and width (the taps' order)."""
    small = down[0].rows(images).transpose(2, 3).contiguous()
    return up[0].rows(up[1].rows(down[1].rows(small)).transpose(2, 3).contiguous())


def _shrinker(shape: tuple[int, ...], down: tuple[Taps, Taps]) -> Callable[[Pixels], Floats]:
    """Return a function that resamples uint8 images of a shape, (H, W) or (H, W, 3), down, each as floats in [0, 1].

    Its results lie on their side, (columns, rows) or (columns, rows, 3), in memory that the next call writes to again:
    fresh memory would cost more than the sums.
    """
    _, width, *colours = shape
    rows, columns = (len(taps.index[0]) for taps in down)
    units = np.empty(shape, np.float32)
    low, term = np.empty((2, rows, width, *colours), np.float32)
    turned = np.empty((width, rows, *colours), np.float32)
    small, part = np.empty((2, columns, rows, *colours), np.float32)

    def shrink(image: Pixels) -> Floats:
        np.divide(image, np.float32(255), out=units, dtype=np.float32)
        cv2.transpose(down[0].write(units, low, term), dst=turned)
        return down[1].write(turned, small, part)

    return shrink


def _shape(pixels: Tensor) -> tuple[int, ...]:
    """Return the shape of the arrays that ``each_image_into`` hands out."""
    return (*pixels.shape[2:], 3) if pixels.shape[1] == 3 else tuple(pixels.shape[2:])


def resample_bytes(pixels: Tensor, down: tuple[Taps, Taps], up: tuple[Taps, Taps]) -> Tensor:
    """Return ``to_bytes(resample(from_bytes(pixels), down, up))``, image by image on the CPU."""
    if pixels.device.type != "cpu":
        return to_bytes(resample(from_bytes(pixels), down, up))
    _, width, *colours = shape = _shape(pixels)
    rows = len(down[0].index[0])

    def make() -> Callable[[Pixels, Pixels], None]:
        shrink = _shrinker(shape, down)
        wide, term = np.empty((2, width, rows, *colours), np.float32)
        turned = np.empty((rows, width, *colours), np.float32)
        full, part = np.empty((2, *shape), np.float32)

        def change(image: Pixels, out: Pixels) -> None:
            cv2.transpose(up[1].write(shrink(image), wide, term), dst=turned)
            # means of means leave [0, 1] by less than what rounding takes away
            cv2.convertScaleAbs(up[0].write(turned, full, part), dst=out, alpha=255)

        return change

    return each_image_into(make, pixels)


def pixelate_bytes(pixels: Tensor, down: tuple[Taps, Taps]) -> Tensor:
    """Return ``nearest`` of bytes resampled down, which are rounded once: copies of what is rounded are as good."""
    if pixels.device.type != "cpu":
        small = down[1].rows(down[0].rows(from_bytes(pixels)).transpose(2, 3).contiguous()).transpose(2, 3)
        return nearest(to_bytes(small), *pixels.shape[2:])

    def make() -> Callable[[Pixels, Pixels], None]:
        shrink = _shrinker(_shape(pixels), down)
        return lambda image, out: _enlarge(_array(cv2.convertScaleAbs(shrink(image), alpha=255)), out)

    return each_image_into(make, pixels)


@lru_cache(maxsize=64)
def _nearest_rows(size: int, count: int) -> _Index:
    """Return which of ``size`` rows Pillow's BOX filter copies to each of ``count``, at least as many."""
    places: _Index = box_members(size, count).argmax(1)
    return places


def nearest(small: Tensor, height: int, width: int) -> Tensor:
    """Return images enlarged by Pillow's BOX filter, which copies the nearest pixel."""
    rows, columns = (
        torch.from_numpy(_nearest_rows(count, size)).to(small.device)
        for count, size in ((small.shape[2], height), (small.shape[3], width))
    )
    return small.index_select(3, columns).index_select(2, rows)


def _enlarge(side: Pixels, out: Pixels) -> None:
    """Write ``nearest`` of one image that lies on its side, (w, h) or (w, h, 3), to ``out``, (H, W) or (H, W, 3)."""
    columns, rows = _nearest_rows(len(side), out.shape[1]), _nearest_rows(side.shape[1], len(out))
    np.take(cv2.transpose(np.take(side, columns, axis=0)), rows, axis=0, out=out, mode="clip")


def _array(image: Any) -> Pixels:
    return np.asarray(image, dtype=np.uint8)


@lru_cache(maxsize=64)
def _box_weights(size: int, count: int) -> tuple[Tensor, Tensor]:
    """Return row indices and Pillow's fixed-point weights, int64 and int32 (K, count); weight 0 beyond a row's end."""
    inside = box_members(size, count)
    first, width = inside.argmax(1), inside.sum(1)
    taps = np.arange(int(width.max()))[:, None]
    weight = np.where(taps < width, np.floor(0.5 + (1 << _PRECISION) * (1.0 / width)), 0)
    return torch.from_numpy(np.minimum(first + taps, size - 1)), torch.from_numpy(weight.astype(np.int32))


def _box_pass(pixels: Tensor, count: int, axis: int) -> Tensor:
    size = pixels.shape[axis]
    if size == count:
        return pixels
    index, weight = (each.to(pixels.device) for each in _box_weights(size, count))
    shape = [1] * pixels.ndim
    shape[axis] = count
    total = torch.full((), 1 << (_PRECISION - 1), dtype=torch.int32, device=pixels.device)
    for rows, weights in zip(index, weight, strict=True):
        total = total + pixels.index_select(axis, rows).to(torch.int32) * weights.view(shape)
    return (total >> _PRECISION).clamp_(max=255).to(torch.uint8)


def box_down(pixels: Tensor, height: int, width: int) -> Tensor:
    """Return uint8 images made smaller as by Pillow's BOX filter: along rows, rounded, then columns, rounded."""
    return _box_pass(_box_pass(pixels, width, 3), height, 2)


@lru_cache(maxsize=64)
def _box_groups(size: int, count: int) -> tuple[tuple[int, _Index, _Index], ...]:
    """Return, for each number of rows that are averaged, (that number, the rows made so, their first rows)."""
    inside = box_members(size, count)
    first, width = inside.argmax(1), inside.sum(1)
    return tuple((int(k), np.flatnonzero(width == k), first[width == k]) for k in np.unique(width))


def _box_rows(image: Pixels, count: int) -> Pixels:
    """Return ``box_down`` of the rows of one image (size, ...) by sums of whole rows, which processors do best."""
    size = len(image)
    if size == count:
        return image
    groups = _box_groups(size, count)
    out = np.empty((count, *image.shape[1:]), dtype=np.uint8)
    for taps, made, first in groups:
        if taps == 1:
            out[made] = image[first]
            continue
        total: np.ndarray[Any, Any] = image[first].astype(np.uint16 if taps < 257 else np.uint32)
        for tap in range(1, taps):
            total += image[first + tap]
        if taps & (taps - 1) == 0 and taps < 257:
            total += taps // 2
            total >>= taps.bit_length() - 1
        else:
            wide = total.astype(np.uint32)
            wide *= int(0.5 + (1 << _PRECISION) * (1.0 / taps))
            wide += 1 << (_PRECISION - 1)
            wide >>= _PRECISION
            total = np.minimum(wide, 255)
        out[made] = total
    return out


def box_blocks(image: Pixels, out: Pixels, *, height: int, width: int) -> None:
    """Write one uint8 image (H, W) or (H, W, 3) after Pillow's BOX filter down to a size and up again to ``out``."""
    narrow = _array(cv2.transpose(_box_rows(_array(cv2.transpose(image)), width)))
    _enlarge(_array(cv2.transpose(_box_rows(narrow, height))), out)
