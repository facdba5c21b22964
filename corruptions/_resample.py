"""Separable resampling by weighted sums of image rows.

Sums run in a fixed order, one tap after the other, so that a sample's result depends on neither the
batch nor a matrix library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


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
def box_resize(size: int, count: int) -> Taps:
    """Return Pillow's BOX filter from ``size`` to ``count`` rows."""
    scale = size / count
    support = 0.5 * max(scale, 1.0)
    centre = (np.arange(count)[:, None] + 0.5) * scale
    low = np.maximum(np.floor(centre - support + 0.5), 0)
    high = np.minimum(np.floor(centre + support + 0.5), size)
    pixels = np.arange(size)[None, :]
    place = (pixels - centre + 0.5) / max(scale, 1.0)
    inside = (pixels >= low) & (pixels < high) & (place > -0.5) & (place <= 0.5)
    return Taps.of(inside / inside.sum(axis=1, keepdims=True))


def resample(images: Tensor, down: tuple[Taps, Taps], up: tuple[Taps, Taps]) -> Tensor:
    """Return images resampled down and up again, along height and width (the taps' order)."""
    small = down[0].rows(images).transpose(2, 3).contiguous()
    return up[0].rows(up[1].rows(down[1].rows(small)).transpose(2, 3).contiguous())
