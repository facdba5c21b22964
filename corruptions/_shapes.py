"""Shapes drawn on the pixel grid: smooth fields, discs and glyphs, with edges one pixel wide.

Only additions, products, minima, square roots and look-ups touch whole images, so that a sample's bits depend on
neither its batch nor its place in memory.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

_NORMAL = NormalDist()


@lru_cache(maxsize=64)
def _spline(size: int, pitch: float) -> tuple[Tensor, Tensor]:
    """Return int64 (size, 4) places and float32 (size, 4) weights of cubic B-splines with unit sum of squares."""
    position = (torch.arange(size, dtype=torch.float64) + 0.5) / pitch
    place = position.floor()
    t = position - place
    cubic = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    weights = torch.stack(cubic, 1)
    weights = weights / weights.square().sum(1, keepdim=True).sqrt()
    return place.to(torch.int64)[:, None] + torch.arange(4), weights.to(torch.float32)


def knots(size: int, pitch: float) -> int:
    """Return how many random values ``smooth_field`` needs along an axis of ``size`` px."""
    return int((size - 0.5) / pitch) + 4


def smooth_field(values: Tensor, size: tuple[int, int], pitch: float) -> Tensor:
    """Return a smooth random field of which every pixel has the variance of ``values``.

    A cubic B-spline whose weights are scaled to a unit sum of squares, so that independent standard normals give
    pixels that are exactly standard normal.

    Args:
        values: float32 (N, knots(height, pitch), knots(width, pitch)).
        size: (height, width) in px.
        pitch: Distance of the knots, in px.

    Returns:
        float32 (N, height, width).
    """
    (rows, row_weights), (columns, column_weights) = (_spline(extent, pitch) for extent in size)
    rows, row_weights, columns, column_weights = (
        each.to(values.device) for each in (rows, row_weights, columns, column_weights)
    )
    # whole rows are copied in both passes, which is faster than picking single values
    tall = values.mT.contiguous()
    wide = values.new_zeros(len(values), size[1], values.shape[1])
    for tap in range(4):
        wide += tall.index_select(1, columns[:, tap]).mul_(column_weights[:, tap, None])
    wide = wide.mT.contiguous()
    field = values.new_zeros(len(values), *size)
    for tap in range(4):
        field += wide.index_select(1, rows[:, tap]).mul_(row_weights[:, tap, None])
    return field


@lru_cache(maxsize=64)
def threshold(cover: float, ramp: float) -> float:
    """Return t such that clamp((z - t) / ramp, 0, 1) has the mean ``cover`` for standard normal z.

    With H(t) = phi(t) - t (1 - Phi(t)) the mean is (H(t) - H(t + ramp)) / ramp.
    """

    def tail(t: float) -> float:
        return _NORMAL.pdf(t) - t * _NORMAL.cdf(-t)

    low, high = -12.0 - ramp, 12.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (tail(middle) - tail(middle + ramp)) / ramp > cover else (low, middle)
    return (low + high) / 2


@lru_cache(maxsize=64)
def share_each(cover: float, number: float) -> float:
    """Return the share e of the image that one object covers if ``number`` independent ones cover ``cover`` together.

    1 - cover = (1 - e)^m (1 - r e), where m is the whole part of ``number`` and r the rest.
    """
    whole = math.floor(number)
    low, high = 0.0, 1.0
    for _ in range(60):
        e = (low + high) / 2
        low, high = (e, high) if (1 - e) ** whole * (1 - (number - whole) * e) > 1 - cover else (low, e)
    return (low + high) / 2


def disc_radius(area: Tensor) -> Tensor:
    """Return radii r such that clamp(1/2 + r - d, 0, 1), d the distance to the centre, sums to ``area`` pixels.

    pi (r^2 + 1/12) for r above 1/2, and a cone of radius r + 1/2 below; a disc of no area has r = -1/2.

    Args:
        area: float64, in px.
    """
    large = (area / math.pi - 1 / 12).clamp(min=0).sqrt()
    small = (3 / math.pi * area).pow(1 / 3) - 0.5
    return torch.where(area > math.pi / 3, large, small)


def discs(y: Tensor, x: Tensor, radius: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the signed distance to the nearest of some discs, in px, negative inside.

    The image is taken as a torus: what leaves it on one side comes in at the other, so that every pixel is covered
    with the same probability.

    Args:
        y: float32 (N, K) centres, in px.
        x: float32 (N, K).
        radius: float32 (N, K), in px.
        size: (height, width).

    Returns:
        float32 (N, height, width).
    """
    height, width = size

    def squares(centre: Tensor, extent: int) -> Tensor:
        far = (torch.arange(extent, dtype=torch.float32, device=centre.device) + 0.5 - centre[..., None]).abs_()
        return torch.minimum(far, extent - far).square_()

    rows, columns = squares(y, height), squares(x, width)
    nearest = y.new_full((len(y), height, width), math.inf)
    for disc in range(radius.shape[1]):
        apart = (rows[:, disc, :, None] + columns[:, disc, None, :]).sqrt_().sub_(radius[:, disc, None, None])
        torch.minimum(nearest, apart, out=nearest)
    return nearest


# Letters and digits as strokes on a grid of 3 x 5 points: each stroke is a run of "xy", y downwards.
_STROKES = {
    "A": "04 02 10 22 24,03 23", "B": "00 04 14 23 12 02,12 21 10 00", "C": "21 10 01 03 14 23",
    "D": "00 04 14 23 21 10 00", "E": "20 00 04 24,02 12", "F": "20 00 04,02 12", "G": "21 10 01 03 14 23 22 12",
    "H": "00 04,20 24,02 22", "I": "00 20,04 24,10 14", "J": "20 23 14 03", "K": "00 04,20 02 24", "L": "00 04 24",
    "M": "04 00 12 20 24", "N": "04 00 24 20", "O": "10 01 03 14 23 21 10", "P": "04 00 10 21 12 02",
    "Q": "10 01 03 14 23 21 10,13 24", "R": "04 00 10 21 12 02,12 24", "S": "21 10 01 12 23 14 03", "T": "00 20,10 14",
    "U": "00 03 14 23 20", "V": "00 14 20", "W": "00 04 12 24 20", "X": "00 24,20 04", "Y": "00 12 20,12 14",
    "Z": "00 20 04 24", "0": "10 01 03 14 23 21 10,21 03", "1": "01 10 14,04 24", "2": "01 10 21 04 24",
    "3": "00 20 12 23 14 03", "4": "14 10 03 23", "5": "20 00 02 12 23 14 03", "6": "20 01 03 14 23 12 02",
    "7": "00 20 14", "8": "10 01 12 23 14 03 12 21 10", "9": "04 23 21 10 01 12 22",
}  # fmt: skip
GLYPHS = len(_STROKES)
_CELL = (7.0, 3.7)  # height and width of a cell in units of the grid; a letter is 4 high and 2 wide


@lru_cache(maxsize=32)
def glyphs(cell: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return ink and surround of each letter and digit in a cell, float32 (GLYPHS + 1, height, width).

    Ink is the share of a pixel within half a stroke's width of a line, the surround that within a wider margin; the
    last one is blank.

    Args:
        cell: (height, width) of a cell, in px.
    """
    height, width = cell
    step_y, step_x = height / _CELL[0], width / _CELL[1]
    # four samples a pixel along each axis, so that cells of a few pixels hold the right amount of ink
    fine = 4
    y = ((torch.arange(height * fine, dtype=torch.float64) + 0.5) / fine / step_y - (_CELL[0] - 4) / 2)[:, None]
    x = ((torch.arange(width * fine, dtype=torch.float64) + 0.5) / fine / step_x - (_CELL[1] - 2) / 2)[None, :]
    distances = []
    for strokes in _STROKES.values():
        nearest = torch.full((height * fine, width * fine), math.inf, dtype=torch.float64)
        for stroke in strokes.split(","):
            points = [(float(point[1]), float(point[0])) for point in stroke.split()]
            for (y0, x0), (y1, x1) in pairwise(points):
                dy, dx = y1 - y0, x1 - x0
                along = (((y - y0) * dy + (x - x0) * dx) / (dy * dy + dx * dx)).clamp(0, 1)
                nearest = torch.minimum(nearest, torch.hypot(y - y0 - along * dy, x - x0 - along * dx))
        distances.append(nearest)
    far = torch.stack([*distances, torch.full_like(distances[0], math.inf)])

    def within(reach: float) -> Tensor:
        # one sample wide, so that the ink does not depend on how strokes lie to the samples
        inside = ((reach - far) * (fine * math.sqrt(step_y * step_x)) + 0.5).clamp_(0, 1).to(torch.float32)
        return inside.view(GLYPHS + 1, height, fine, width, fine).mean((2, 4))

    return within(0.32), within(0.75)
