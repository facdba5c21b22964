"""Elastic deformation as published."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from corruptions._bytes import blocks
from corruptions._checks import check_levels
from corruptions.geometry import moved_boxes
from robustlab.core.corruption import Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng
from robustlab.core.shift import from_bytes
from robustlab.core.types import Batch

from ._scipy import continued, gaussian, scipy_kernel
from .base import Reference
from .glass import take

_DENSE = 24  # reach from which a Gaussian is a product with one matrix instead of a sum over taps


def inverse_affine(jitter: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the map from output to input pixels, float64 (N, 2, 3), of the affinity that moves three corners.

    The corners are those of a square of two thirds of the shorter side. Its centre is (H // 2, W // 2), which the
    source takes for (x, y), so it lies off the centre of images that are not square.

    Args:
        jitter: float32 (N, 3, 2), (x, y) by which the corners at (+, +), (+, -) and (-, -) move, in pixels.
        size: (H, W), at least 3 each.
    """
    centre, half = (size[0] // 2, size[1] // 2), min(size) // 3
    corners = [[centre[0] + i * half, centre[1] + j * half] for i, j in ((1, 1), (1, -1), (-1, -1))]
    moved = (jitter + torch.tensor(corners, dtype=torch.float32, device=jitter.device)).to(torch.float64)
    by_y = (moved[:, 0] - moved[:, 1]) / (2 * half)
    by_x = (moved[:, 1] - moved[:, 2]) / (2 * half)
    start = moved[:, 1] - by_x * corners[1][0] - by_y * corners[1][1]
    scale = by_x[:, 0] * by_y[:, 1] - by_y[:, 0] * by_x[:, 1]
    scale = torch.where(scale == 0, scale, 1 / scale)
    forth = torch.stack((by_y[:, 1], -by_y[:, 0], -by_x[:, 1], by_x[:, 0]), dim=1).mul(scale[:, None]).view(-1, 2, 2)
    back = -(forth * start[:, None, :]).sum(2, keepdim=True)
    return torch.cat((forth, back), dim=2)


def warp_affine(images: Tensor, inverse: Tensor) -> Tensor:
    """Return OpenCV's ``warpAffine``, bilinear, mirrored about the edge pixels (reflect-101).

    Coordinates are rounded to 1/32 px by way of 1/1024 px, as OpenCV did when the benchmarks were published and up to
    its version 4; version 5 no longer rounds.

    Args:
        images: float32 (N, C, H, W).
        inverse: float64 (N, 2, 3), from output to input (x, y).
    """
    height, width = images.shape[2:]
    down = torch.arange(height, dtype=torch.float64, device=images.device)[:, None]
    right = torch.arange(width, dtype=torch.float64, device=images.device)
    row, column = (
        (_fixed(part[:, 1] * down + part[:, 2]) + _fixed(part[:, 0] * right)).add_(16).bitwise_right_shift_(5)
        for part in (inverse[:, 1, :, None, None], inverse[:, 0, :, None, None])
    )
    fy, fx = ((part & 31).to(torch.float32).mul_(1 / 32) for part in (row, column))
    starts = ((part >> 5).clamp_(-32768, 32766).to(torch.float32) for part in (row, column))
    rows, columns = (
        [_edged(start, size), _edged(start + 1, size)] for start, size in zip(starts, (height, width), strict=True)
    )
    shares = [y * x for y in (1 - fy, fy) for x in (1 - fx, fx)]
    out = torch.empty_like(images)
    places = _places(rows, columns, width)
    for channel in range(images.shape[1]):  # one at a time: what lies between stays in a processor's cache
        a, b, c, d = (part.mul_(share) for part, share in zip(_at(images, channel, places), shares, strict=True))
        out[:, channel] = a.add_(b).add_(c).add_(d)
    return out


def _fixed(place: Tensor) -> Tensor:
    return (place * 1024).round_().clamp_(-(2.0**29), 2.0**29).to(torch.int32)


def _folded(place: Tensor, period: int) -> Tensor:
    """Return whole float32 numbers modulo ``period``; integers have no fast remainder."""
    whole = torch.div(place, torch.full((), float(period), device=place.device)).floor_()
    return place - whole.mul_(period)


def _edged(place: Tensor, size: int) -> Tensor:
    """Return int32 pixels at whole numbers, mirrored about the middles of the first and the last one."""
    period = max(1, 2 * (size - 1))
    place = _folded(place, period)
    return torch.minimum(place, period - place).to(torch.int32)


def _mirrored(place: Tensor, size: int) -> Tensor:
    """Return int32 pixels at whole numbers, mirrored about the image's border."""
    place = _folded(place, 2 * size)
    return torch.minimum(place, 2 * size - 1 - place).to(torch.int32)


def _places(rows: list[Tensor], columns: list[Tensor], width: int) -> list[Tensor]:
    """Return int32 (N, H W) places in memory of every pair of a row and a column."""
    lines = [row * width for row in rows]
    return [(line + column).flatten(1) for line in lines for column in columns]


def _at(images: Tensor, channel: int, places: list[Tensor]) -> list[Tensor]:
    flat = images[:, channel : channel + 1].flatten(2)
    return [take(flat, place).view(len(images), *images.shape[2:]) for place in places]


def displaced(images: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Return SciPy's ``map_coordinates(order=1, mode="reflect")`` at (y + dy, x + dx), float32.

    Args:
        images: float32 (N, C, H, W).
        dx: float32 (N, H, W), in pixels.
        dy: float32 (N, H, W), in pixels.
    """
    height, width = images.shape[2:]
    down = torch.arange(height, dtype=torch.float32, device=images.device)[:, None]
    right = torch.arange(width, dtype=torch.float32, device=images.device)
    taps, parts = [], []
    for shift, start, size in ((dy, down, height), (dx, right, width)):
        whole = shift.floor()
        parts.append((shift - whole).to(torch.float64))
        first = whole.add_(start)
        taps.append([_mirrored(first, size), _mirrored(first + 1, size)])
    fy, fx = parts
    out = torch.empty_like(images)
    places = _places(taps[0], taps[1], width)
    for channel in range(images.shape[1]):
        a, b, c, d = (part.to(torch.float64) for part in _at(images, channel, places))
        a.add_(b.sub_(a).mul_(fx))
        c.add_(d.sub_(c).mul_(fx))
        out[:, channel] = a.add_(c.sub_(a).mul_(fy))
    return out


@lru_cache(maxsize=16)
def _gaussian_matrix(size: int, sigma: float, truncate: float) -> Tensor:
    """Return float64 (size, size): the Gaussian along an axis that is mirrored about its border."""
    weights = scipy_kernel(sigma, truncate)
    reach = len(weights) // 2
    place = continued(size, reach, "reflect").numpy()
    matrix: np.ndarray[tuple[int, int], np.dtype[np.float64]] = np.zeros((size, size))
    rows = np.arange(size)
    for away in range(-reach, reach + 1):
        np.add.at(matrix, (rows, place[rows + reach + away]), weights[reach + away])
    return torch.from_numpy(matrix)


def smoothed_noise(noise: Tensor, sigma: float, alpha: float) -> Tensor:
    """Return alpha times the noise after a Gaussian cut at 3 sigma, mirrored about the border; float32 (N, H, W).

    Args:
        noise: float32 (N, H, W).
        sigma: In pixels.
        alpha: Factor.
    """
    fine = noise.to(torch.float64)
    kernel = scipy_kernel(sigma, 3.0)
    if len(kernel) // 2 >= _DENSE:
        tall, wide = (_gaussian_matrix(size, sigma, 3.0).to(noise.device) for size in noise.shape[1:])
        fine = torch.stack([tall @ plane @ wide.T for plane in fine])
    elif noise.device.type == "cpu":
        # the same sum in another order of float64 additions, several times as fast
        planes = fine.numpy()
        fine = torch.from_numpy(
            np.stack([cv2.sepFilter2D(p, cv2.CV_64F, kernel, kernel, borderType=cv2.BORDER_REFLECT) for p in planes])
        )
    else:
        fine = gaussian(fine, sigma, 3.0, "reflect")
    return fine.mul_(alpha).to(torch.float32)


def noise_of(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return two float32 tensors, uniform on (-1, 1) in steps of 2^-15, made of the halves of int32 ``bits``."""
    upper, lower = ((half & 0xFFFF).to(torch.float32).sub_(32767.5).mul_(2.0**-15) for half in (bits >> 16, bits))
    return upper, lower


def elastic_transform(pixels: Tensor, jitter: Tensor | None, dx: Tensor, dy: Tensor) -> Tensor:
    """Return uint8 images after the affinity and the displacement; the scaled result is truncated.

    Args:
        pixels: uint8 (N, C, H, W).
        jitter: float32 (N, 3, 2), see ``inverse_affine``; None for no affinity.
        dx: float32 (N, H, W), in pixels.
        dy: float32 (N, H, W), in pixels.
    """
    images = from_bytes(pixels.contiguous())
    if jitter is not None:
        images = warp_affine(images, inverse_affine(jitter, (images.shape[2], images.shape[3])))
    return displaced(images, dx, dy).clamp_(0, 1).mul_(255).to(torch.uint8)


def elastic_masks(masks: Tensor, inverse: Tensor | None, dx: Tensor, dy: Tensor) -> Tensor:
    """Return masks (N, H, W) of any type that go where ``elastic_transform`` takes the image; nearest pixel.

    Args:
        masks: As many as images.
        inverse: See ``inverse_affine``; None for no affinity.
        dx: float32 (N, H, W), in pixels.
        dy: float32 (N, H, W), in pixels.
    """
    height, width = masks.shape[1:]
    down = torch.arange(height, dtype=torch.float64, device=masks.device)[:, None]
    right = torch.arange(width, dtype=torch.float64, device=masks.device)
    y, x = _reflected(down + dy, height), _reflected(right + dx, width)
    if inverse is not None:
        x, y = (part[:, 0] * x + part[:, 1] * y + part[:, 2] for part in inverse[..., None, None].unbind(1))
    row, column = (_edged(part.round().to(torch.float32), size) for part, size in ((y, height), (x, width)))
    return masks.flatten(1).gather(1, (row * width + column).to(torch.int64).flatten(1)).view(masks.shape)


def _reflected(place: Tensor, size: int) -> Tensor:
    """Return float64 places mirrored about the image's border, half a pixel beyond the first and the last middle."""
    place = (place + 0.5).remainder(2 * size)
    return torch.minimum(place, 2 * size - place) - 0.5


def _forth(inverse: Tensor) -> Tensor:
    """Return where points (x, y), counted from the image's corner, go; float32 (N, 2, 3), of ``inverse_affine``."""
    back, start = inverse[:, :, :2], inverse[:, :, 2:]
    a, b, c, d = back.flatten(1).unbind(1)
    scale = a * d - b * c
    scale = torch.where(scale == 0, scale, 1 / scale)
    turned = torch.stack((d, -b, -c, a), dim=1).mul(scale[:, None]).view(-1, 2, 2)
    # the inverse counts from the middle of the first pixel
    moved = 0.5 - (turned * (start.transpose(1, 2) + 0.5)).sum(2, keepdim=True)
    return torch.cat((turned, moved), dim=2).to(torch.float32)


@CORRUPTIONS.register("ref:elastic")
@dataclass(frozen=True)
class RefElastic(Reference):
    """Elastic transform of ImageNet-C: a random affinity, then a random displacement smoothed by a Gaussian.

    The first two levels are mostly a strong affinity and the last three a fine-grained displacement, so that harm does
    not rise steadily. Masks (nearest pixel) and boxes move with the image. With no affinity, ``alpha`` = 12.5 * 0.005 H
    and ``sigma`` = 0.01 H it is severity 1 of the operator that imagecorruptions has under the same name.

    Args:
        alpha: Factor of the smoothed noise in [-1, 1], in pixels, 0 to 100000.
        sigma: Of the Gaussian, in pixels, 0 to 10000.
        affine: Farthest move of each of three corners along each axis, in pixels, 0 to 10000.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "geometry"
    stage: ClassVar[str] = "subject"
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    seen_in: ClassVar[tuple[str, ...] | None] = ("oct", "histology")
    min_size: ClassVar[int] = 3
    alike: ClassVar[bool] = True
    alpha: Levels = Levels((244 * 2, 244 * 2, 244 * 0.05, 244 * 0.07, 244 * 0.12), identity=0.0, unit="px")
    sigma: Levels = Levels((244 * 0.7, 244 * 0.08, 244 * 0.01, 244 * 0.01, 244 * 0.01), identity=0.0, unit="px")
    affine: Levels = Levels((244 * 0.1, 244 * 0.2, 244 * 0.02, 244 * 0.02, 244 * 0.02), identity=0.0, unit="px")

    def __post_init__(self) -> None:
        check_levels(self, "alpha", self.alpha, 0, 1e5)
        check_levels(self, "sigma", self.sigma, 0, 1e4)
        check_levels(self, "affine", self.affine, 0, 1e4)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        return {
            "corners": rng.uniform("corners", (3, 2)).mul_(2).sub_(1),
            "noise": rng.bits("noise", shape[1] * shape[2]).view(len(rng), *shape[1:]),
        }

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        out = torch.empty_like(pixels, memory_format=torch.contiguous_format)
        for part in blocks(pixels):
            out[part] = elastic_transform(pixels[part], *self._motion(draws, values, part))
        return out

    def move_labels(self, batch: Batch, draws: Draws, values: Mapping[str, float]) -> Batch:
        jitter, dx, dy = self._motion(draws, values, slice(None))
        size = (batch.images.shape[2], batch.images.shape[3])
        inverse = None if jitter is None else inverse_affine(jitter, size)
        masks, boxes = batch.masks, batch.boxes
        if masks is not None:
            masks = elastic_masks(masks, inverse, dx, dy)
        if boxes is not None:
            boxes = moved_boxes(boxes, torch.stack((dy, dx), dim=1), None if inverse is None else _forth(inverse))
        return dataclasses.replace(batch, masks=masks, boxes=boxes)

    @staticmethod
    def _motion(draws: Draws, values: Mapping[str, float], part: slice) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return the jitter and the displacements dx, dy of some images, as ``elastic_transform`` takes them."""
        jitter = draws["corners"][part] * values["affine"] if values["affine"] else None
        dx, dy = (smoothed_noise(half, values["sigma"], values["alpha"]) for half in noise_of(draws["noise"][part]))
        return jitter, dx, dy
