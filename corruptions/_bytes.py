"""Work on images: blocks and threads for the CPU; and of 8-bit ones memory layouts, sums, look-up tables, codecs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from robustlab.core.shift import to_bytes
from robustlab.core.threads import share

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

BLOCK = 1 << 17
"""Values worked on at once on the CPU: 512 KB as float32, 1 MB as float64, which stays in a core's cache."""

_WORTH_A_THREAD = 1 << 14  # values of an image


def blocks(images: Tensor, most: int = BLOCK) -> Iterator[slice]:
    """Yield slices of a batch of about ``most`` values each, at least one image; on an accelerator one of all."""
    step = max(1, most // max(1, math.prod(images.shape[1:])) if images.device.type == "cpu" else len(images))
    for start in range(0, len(images), step):
        yield slice(start, start + step)


def pixel_blocks(flat: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of the batch and of the pixels of images (N, C, P) on the CPU, half as large: for several planes."""
    most = BLOCK // 2
    for block in blocks(flat[:, 0], most):
        for start in range(0, flat.shape[2], most):
            yield block, slice(start, start + most)


def in_threads(work: Callable[[int, int], None], count: int, values: int) -> None:
    """Call ``work(start, stop)`` for parts of range(``count``), on as many threads as torch uses.

    Args:
        work: Should release the interpreter's lock, as NumPy, OpenCV, Pillow and SciPy do.
        count: Of images.
        values: Of one image; with small ones the threads would only wait for each other's Python, so one does it all.
    """
    threads = min(torch.get_num_threads(), count) if values >= _WORTH_A_THREAD else 1
    if threads <= 1:
        work(0, count)
        return
    bounds = [count * part // threads for part in range(threads + 1)]
    parts = iter(list(pairwise(bounds)))  # one of a list is handed out whole, also while others ask

    def run() -> None:
        for start, stop in parts:
            work(start, stop)

    share(run, threads)


def empty_like(pixels: Tensor) -> Tensor:
    """Return contiguous uint8 images on the CPU of this shape, for the result; any content."""
    # memory from NumPy comes in huge pages, which are handed out many times as fast as torch's
    return torch.from_numpy(np.empty(tuple(pixels.shape), np.uint8))


def planar(pixels: Tensor) -> Tensor:
    """Return uint8 images (N, C, H, W) with planes contiguous in memory; the same tensor where they are already."""
    if pixels.is_contiguous():
        return pixels
    if pixels.device.type != "cpu" or pixels.shape[1] != 3:
        return pixels.contiguous()

    out = empty_like(pixels)
    images, target = interleaved(pixels), out.numpy()

    def work(start: int, stop: int) -> None:
        # OpenCV takes colours apart with vector instructions, which torch does not
        for image, planes in zip(images[start:stop], target[start:stop], strict=True):
            cv2.split(image, list(planes))

    in_threads(work, len(images), images[0].size)
    return out


def interleaved(pixels: Tensor) -> Pixels:
    """Return uint8 images (N, 3, H, W) on the CPU as an array (N, H, W, 3), contiguous; a view where they are so."""
    images: Pixels = pixels.permute(0, 2, 3, 1).numpy()
    if images.flags.c_contiguous:
        return images
    if not pixels.is_contiguous():
        return np.ascontiguousarray(images)

    out = np.empty_like(images, order="C")
    for image, planes in zip(out, pixels.numpy(), strict=True):
        cv2.merge(list(planes), image)
    return out


def sums(pixels: Tensor) -> Tensor:
    """Return the exact sums of uint8 images over the pixels of each channel, int64 (N, C)."""
    if pixels.device.type != "cpu":
        return pixels.sum((2, 3), dtype=torch.int64)
    count, channels = pixels.shape[:2]
    if channels == 3 and not pixels.is_contiguous():
        totals = [value for image in interleaved(pixels) for value in cv2.sumElems(image)[:3]]
    else:
        planes = pixels.contiguous().numpy().reshape(count * channels, *pixels.shape[2:])
        totals = [cv2.sumElems(plane)[0] for plane in planes]
    return torch.tensor(totals, dtype=torch.float64).to(torch.int64).reshape(count, channels)


def copy_and_sums(pixels: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a copy of uint8 images, and the exact sums of the pixels and of ``table[pixel]`` over each image.

    Args:
        pixels: uint8 (N, C, H, W).
        table: uint8 (256,).

    Returns:
        uint8 (N, C, H, W), laid out in memory as the images were, and twice int64 (N,).
    """
    if pixels.device.type != "cpu":
        return pixels.clone(), sums(pixels).sum(1), sums(look_up(pixels, table)).sum(1)
    images, last = _as_held(pixels)
    out = np.empty_like(images)
    rows = (array.reshape(len(array), array.shape[1], -1) for array in (images, out))
    scratch, entries, totals = np.empty(images[0].size, np.uint8), table.numpy(), np.empty((2, len(images)))
    scratch = scratch.reshape(images.shape[1], -1)
    for place, (image, copy) in enumerate(zip(*rows, strict=True)):
        np.copyto(copy, image)
        totals[0, place] = cv2.sumElems(copy)[0]
        np.copyto(scratch, copy)
        _translate(scratch, entries)
        totals[1, place] = cv2.sumElems(scratch)[0]
    plain, other = torch.from_numpy(totals).to(torch.int64)
    return _from_held(out, last), plain, other


def _as_held(pixels: Tensor) -> tuple[Pixels, bool]:
    """Return images on the CPU as a contiguous array, and whether it is (N, H, W, C), as they are held in memory."""
    last = not pixels.is_contiguous() and pixels.is_contiguous(memory_format=torch.channels_last)
    held = pixels.permute(0, 2, 3, 1) if last else pixels.contiguous()
    return held.numpy(), last


def _from_held(images: Pixels, last: bool) -> Tensor:
    done = torch.from_numpy(images)
    return done.permute(0, 3, 1, 2) if last else done


def look_up(pixels: Tensor, table: Tensor, *, overwrite: bool = False) -> Tensor:
    """Return ``table[pixel]`` of every pixel.

    Args:
        pixels: uint8 (N, C, H, W).
        table: uint8 (256,) for all images, (N, 256), one row each, or (N, C, 256), one for each channel.
        overwrite: Whether the images may be written over.

    Returns:
        uint8 (N, C, H, W); in memory, channels lie last where they did, except for tables by channel.
    """
    if pixels.device.type != "cpu":
        groups = max(1, table[..., 0].numel())
        index = pixels.reshape(groups, -1).to(torch.int64)
        return table.reshape(groups, 256).gather(1, index).view(pixels.shape)
    images, last = _as_held(planar(pixels) if table.ndim == 3 else pixels)
    out = images if overwrite else np.empty_like(images)
    tables = table.reshape(-1, 256).expand(len(images) if table.ndim < 3 else -1, -1).numpy()
    # image by image, and on one thread: that is done sooner than others would start
    flat = (array.reshape(len(tables), -1) for array in (images, out))
    for image, made, row in zip(*flat, tables, strict=True):
        if not overwrite:
            np.copyto(made, image)
        _translate(made, row)
    return _from_held(out, last)


def _translate(values: Pixels, table: Pixels) -> None:
    """Replace each byte of a contiguous array by its entry in the table, in place."""
    import stringzilla  # its vector instructions are several times as fast as OpenCV's loop

    stringzilla.translate(values.reshape(-1).data, np.ascontiguousarray(table).data, inplace=True)


def every_level(count: int, channels: int, device: torch.device) -> Tensor:
    """Return the 256 grey levels as uint8 images (count, channels, 1, 256)."""
    return torch.arange(256, dtype=torch.uint8, device=device).expand(count, channels, 1, 256)


def rounded(units: Tensor) -> Tensor:
    """Return ``to_bytes`` of small tensors: on the CPU by NumPy, as torch wakes its threads to round 2,048 numbers."""
    if units.device.type != "cpu":
        return to_bytes(units)
    levels = units.clamp(0, 1).mul_(255).numpy()
    return torch.from_numpy(np.rint(levels, out=levels).astype(np.uint8))


def by_blocks(function: Callable[[Tensor, slice], Tensor], pixels: Tensor) -> Tensor:
    """Return uint8 images after a function of each pixel's channels alone, in blocks that stay in the cache.

    Args:
        function: Of uint8 (n, C, 1, P) and the slice of the batch that these n images are; returns float32 images of
            that shape, its own to overwrite. May not depend on where a pixel is.
        pixels: uint8 (N, C, H, W).

    Returns:
        uint8 (N, C, H, W), contiguous.
    """
    if pixels.device.type != "cpu":
        return to_bytes(function(pixels, slice(0, len(pixels))))
    count, channels, height, width = pixels.shape
    flat = planar(pixels).reshape(count, channels, height * width)
    out = torch.empty_like(flat)
    for block, part in pixel_blocks(flat):
        out[block, :, part] = function(flat[block, :, None, part], block).clamp_(0, 1).mul_(255).round_()[:, :, 0]
    return out.reshape(pixels.shape)


def each_image(function: Callable[[Pixels], Pixels], pixels: Tensor) -> Tensor:
    """Return the images after a function that takes and returns one uint8 image, as ``each_image_into`` does."""

    def make() -> Callable[[Pixels, Pixels], None]:
        return lambda image, out: np.copyto(out, function(image))

    return each_image_into(make, pixels)


def each_image_into(make: Callable[[], Callable[[Pixels, Pixels], None]], pixels: Tensor) -> Tensor:
    """Return the images after a function of one uint8 image, (H, W, 3), or (H, W) for one channel.

    It runs by ``in_threads``. Images of other channel counts are taken as grey ones, channel by channel.

    Args:
        make: Called once in each thread, for scratch; returns a function of an image, which must not be changed, and of
            a contiguous place of the same shape for the result.
        pixels: uint8 (N, C, H, W); fastest where memory holds (N, H, W, C).

    Returns:
        uint8 (N, C, H, W) on the same device, laid out in memory as the images were.
    """
    count, channels, height, width = pixels.shape
    held = pixels.cpu()
    colour = channels == 3
    images = interleaved(held) if colour else held.contiguous().numpy().reshape(count * channels, height, width)
    out = np.empty_like(images)

    def work(start: int, stop: int) -> None:
        change = make()
        for place in range(start, stop):
            change(images[place], out[place])

    in_threads(work, len(images), images[0].size)
    done = torch.from_numpy(out)
    if colour:
        done = done.permute(0, 3, 1, 2)
        if pixels.is_contiguous():
            done = planar(done)
    return done.reshape(pixels.shape).to(pixels.device)
