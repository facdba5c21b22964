"""Deformation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng
from robustlab.core.types import Batch

from ._checks import check_levels
from ._resample import Taps

_CELLS = 6  # knots of the displacement field along the shorter side
_LARGEST = 2.0  # percent; see displacement()
_ROUNDS = 40  # the inverse is a fixed point; each round shrinks the error by the field's largest slope
_PER_SIDE = 16  # points along each side of a box that are followed


def _knots(size: int, shorter: int) -> int:
    return math.ceil(size * _CELLS / shorter) + 3


@lru_cache(maxsize=64)
def _splines(size: int, shorter: int) -> Taps:
    """Return the cubic B-splines at each of ``size`` pixel centres, scaled to unit sum of squares at each pixel."""
    place = (np.arange(size) + 0.5) * _CELLS / shorter
    away = np.abs(place[:, None] - (np.arange(_knots(size, shorter)) - 1)[None, :])
    near, far = 2 / 3 - away**2 + away**3 / 2, (2 - away).clip(0) ** 3 / 6
    matrix = np.where(away < 1, near, far)
    return Taps.of(matrix / np.sqrt((matrix**2).sum(axis=1, keepdims=True)))


def displacement(knots: Tensor, size: tuple[int, int], amount: float) -> Tensor:
    """Return a smooth random displacement of every pixel, float32 (N, 2, H, W), vertical and horizontal, in pixels.

        d(y, x) = amount S sqrt(3/2) sum_ij k_ij b_i(y) b_j(x),   b = B / |B|

    with S the shorter side, independent k uniform on (-1, 1), and B the cubic B-splines on knots S / 6 apart, scaled so
    that the mean of |d|^2 over the draws is (amount S)^2 at every pixel. With |k| <= 1, the sums of the absolute
    derivatives of both components are below 1 for amounts up to 2 %, so p -> p + d(p) folds nowhere.

    Args:
        knots: float32 (N, 2, rows, columns) in (-1, 1).
        size: (H, W).
        amount: Root mean square displacement, of the shorter side.
    """
    shorter = min(size)
    tall = _splines(size[0], shorter).rows(knots)
    wide = _splines(size[1], shorter).rows(tall.transpose(2, 3).contiguous())
    return wide.transpose(2, 3).contiguous().mul_(amount * shorter * math.sqrt(1.5))


def warp(images: Tensor, shift: Tensor, mode: Literal["bilinear", "nearest"] = "bilinear") -> Tensor:
    """Return images whose pixel at p is the old image at p + shift(p), mirrored at its border.

    Args:
        images: float32 (N, C, H, W); for ``"nearest"`` any type.
        shift: float32 (N, 2, H, W), vertical and horizontal, in pixels.
        mode: Interpolation; masks take ``"nearest"``.
    """
    height, width = images.shape[2:]
    down = torch.arange(height, dtype=torch.float32, device=images.device)[:, None]
    right = torch.arange(width, dtype=torch.float32, device=images.device)
    if mode == "bilinear":
        columns = (shift[:, 1] + right).mul_(2).add_(1 - width).mul_(1 / width)
        rows = (shift[:, 0] + down).mul_(2).add_(1 - height).mul_(1 / height)
        grid = torch.stack((columns, rows), dim=3)
        return grid_sample(images.contiguous(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    row, column = (
        _mirrored((moved + start).round_().to(torch.int64), size)
        for moved, start, size in ((shift[:, 0], down, height), (shift[:, 1], right, width))
    )
    flat = images.flatten(2)
    return flat.gather(2, (row * width + column).flatten(1)[:, None].expand(flat.shape)).view(images.shape)


def _mirrored(index: Tensor, size: int) -> Tensor:
    index = index.remainder(2 * size)
    return torch.minimum(index, 2 * size - 1 - index)


def moved_boxes(boxes: tuple[Tensor, ...], shift: Tensor, affine: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return the bounding boxes, cut at the image, of where ``warp`` takes the outlines of boxes.

    A point q of the old image appears where p + shift(p) = q; this is found by iterating p = q - shift(p).

    Args:
        boxes: One (K, 4) tensor of (x0, y0, x1, y1) per sample, in pixels from the upper left corner of the image.
        shift: float32 (N, 2, H, W), vertical and horizontal, in pixels, without folds.
        affine: float32 (N, 2, 3), where (x, y) goes before that; None: it stays.
    """
    height, width = shift.shape[2:]
    every = torch.cat(boxes).to(torch.float32)
    if not len(every):
        return boxes
    counts = torch.tensor([len(part) for part in boxes], device=shift.device)
    fields = shift.repeat_interleave(counts, dim=0)
    steps = torch.linspace(0, 1, _PER_SIDE, device=shift.device)
    ends = torch.zeros_like(steps), torch.ones_like(steps)
    across, along = torch.cat((steps, steps, *ends)), torch.cat((*ends, steps, steps))
    low, high = every[:, None, :2], every[:, None, 2:]
    outline = low + (high - low) * torch.stack((across, along), dim=1)
    if affine is not None:
        maps = affine.repeat_interleave(counts, dim=0)
        outline = (maps[:, None, :, :2] * outline[:, :, None]).sum(3) + maps[:, None, :, 2]
    scale = torch.tensor([2 / width, 2 / height], device=shift.device)
    point = outline
    for _ in range(_ROUNDS):
        grid = (point * scale - 1)[:, None]
        there = grid_sample(fields, grid, mode="bilinear", padding_mode="border", align_corners=False)
        point = outline - there[:, :, 0].transpose(1, 2).flip(2)
    top = torch.tensor([width, height], dtype=torch.float32, device=shift.device)
    point = torch.minimum(point.clamp_min(0), top)
    found = torch.cat((point.amin(1), point.amax(1)), dim=1)
    parts = torch.split(found, [len(part) for part in boxes])
    return tuple(_as_dtype(part, old.dtype) for part, old in zip(parts, boxes, strict=True))


def _as_dtype(boxes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return boxes in their own kind of numbers; whole pixels are taken so that the box still holds its content."""
    if dtype.is_floating_point:
        return boxes.to(dtype)
    return torch.cat((boxes[:, :2].floor(), boxes[:, 2:].ceil()), dim=1).to(dtype)


@CORRUPTIONS.register("elastic")
@dataclass(frozen=True)
class Elastic(Corruption):
    """Soft tissue pressed or stretched: a smooth random displacement that folds nowhere; masks and boxes move with it.

    It varies over about a sixth of the shorter side, so that small and large images are deformed alike, and is
    bilinear; what enters from outside is the image mirrored at its border.

    Args:
        displacement: Root mean square displacement, in percent of the shorter side, 0 to 2.

    References:
        P. Simard, D. Steinkraus, J. Platt, "Best practices for convolutional neural networks applied to visual document
        analysis", 2003.
    """

    family: ClassVar[str] = "geometry"
    stage: ClassVar[str] = "subject"
    seen_in: ClassVar[tuple[str, ...] | None] = ("oct", "histology")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    displacement: Levels = Levels((0.3, 0.6, 1.0, 1.5, 2.0), identity=0.0, unit="% of shorter side, rms")

    def __post_init__(self) -> None:
        check_levels(self, "displacement", self.displacement, 0, _LARGEST)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        shorter = min(shape[1:])
        rows, columns = (_knots(size, shorter) for size in shape[1:])
        return {"knots": rng.uniform("knots", (2, rows, columns)).mul_(2).sub_(1)}

    def warp(
        self,
        images: Tensor,
        draws: Draws,
        values: Mapping[str, float],
        mode: Literal["bilinear", "nearest"] = "bilinear",
    ) -> Tensor:
        """Return images (N, C, H, W), or masks with ``mode="nearest"``, deformed."""
        return warp(images, self._shift(draws, images.shape[2:], values), mode)

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        return self.warp(images, draws, values)

    def move_labels(self, batch: Batch, draws: Draws, values: Mapping[str, float]) -> Batch:
        shift = self._shift(draws, batch.images.shape[2:], values)
        masks, boxes = batch.masks, batch.boxes
        return dataclasses.replace(
            batch,
            masks=None if masks is None else warp(masks[:, None], shift, "nearest")[:, 0],
            boxes=None if boxes is None else moved_boxes(boxes, shift),
        )

    @staticmethod
    def _shift(draws: Draws, size: torch.Size, values: Mapping[str, float]) -> Tensor:
        return displacement(draws["knots"], (size[0], size[1]), values["displacement"] / 100)
