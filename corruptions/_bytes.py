"""Work on 8-bit images: look-up tables, and codecs image by image over the processor's cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def look_up(pixels: Tensor, table: Tensor) -> Tensor:
    """Return ``table[pixel]`` of every pixel.

    Args:
        pixels: uint8 (N, C, H, W).
        table: uint8 (256,) for all images, or (N, 256), one row each.

    Returns:
        uint8 (N, C, H, W), contiguous.
    """
    if pixels.device.type == "cpu":
        import cv2

        out = torch.empty_like(pixels, memory_format=torch.contiguous_format)
        source, target = pixels.contiguous().numpy(), out.numpy()
        rows = table.contiguous().numpy()
        if rows.ndim == 1:
            # one call with many rows, since OpenCV shares rows out among its threads
            cv2.LUT(source.reshape(-1, source.shape[-1]), rows, dst=target.reshape(-1, source.shape[-1]))
        else:
            for image, row, place in zip(source, rows, target, strict=True):
                cv2.LUT(image.reshape(1, -1), row, dst=place.reshape(1, -1))
        return out
    flat = pixels.reshape(len(pixels), -1).to(torch.int64)
    if table.ndim == 1:
        return table.index_select(0, flat.view(-1)).view(pixels.shape)
    return table.gather(1, flat).view(pixels.shape)


def each_image(function: Callable[[Pixels], Pixels], pixels: Tensor) -> Tensor:
    """Return the images after a function that takes and returns one uint8 image, (H, W, 3), or (H, W) for one channel.

    It runs on as many threads as torch uses, so it should be one that releases the interpreter's lock (Pillow, OpenCV).
    Images of other channel counts are taken as grey ones, channel by channel.

    Args:
        function: Of one image, keeping its shape; must not change it in place.
        pixels: uint8 (N, C, H, W); fastest where memory holds (N, H, W, C).

    Returns:
        uint8 (N, C, H, W) on the same device, laid out in memory as the images were.
    """
    count, channels, height, width = pixels.shape
    held = pixels.cpu()
    if channels == 3:
        images = held.permute(0, 2, 3, 1).contiguous().numpy()
    else:
        images = held.contiguous().reshape(count * channels, height, width).numpy()
    out = np.empty_like(images)

    def work(start: int, stop: int) -> None:
        for place in range(start, stop):
            out[place] = function(images[place])

    threads = min(torch.get_num_threads(), len(images))
    if threads == 1:
        work(0, len(images))
    else:
        bounds = [len(images) * part // threads for part in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, bounds[:-1], bounds[1:]))
    done = torch.from_numpy(out)
    if channels == 3:
        done = done.permute(0, 3, 1, 2)
        if pixels.is_contiguous():
            done = done.contiguous()
    return done.reshape(pixels.shape).to(pixels.device)
