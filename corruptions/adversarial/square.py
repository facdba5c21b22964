"""Square: random search with square windows, which needs a model's outputs only, in L-infinity and L2."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustlab.core.errors import RangeError
from robustlab.core.registry import ATTACKS
from robustlab.core.rng import SampleRng

from .base import Search
from .oracle import Oracle
from .steps import TINY, lengths

HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Proposals after which the share of pixels in a window is halved."""

_BLOCK = 64  # proposals drawn at once; samples are dropped between blocks
_TILES = 5


@ATTACKS.register("square")
@dataclass(frozen=True)
class Square(Search):
    """Score-based, untargeted random search: change a square window, and keep the change if the margin falls.

    L-infinity: from vertical stripes of +eps and -eps in each channel; a proposal sets a window to +eps or -eps, for
    each channel by itself. L2: from tiles of a pyramid and its negative side by side; a proposal empties one window and
    gives its length, and what the budget has left, to another, where the pattern is added. Windows cover the share p of
    the image, which begins at ``p_init`` and is halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000
    proposals, whatever ``queries`` is.

    The authors' code draws one window, and in L-infinity one set of signs, for a whole batch; here each sample has its
    own, so its result does not depend on the batch. The range of their windows excludes its end, so that no window ever
    reaches the last row and column of an image; here all places are equally likely, which finds more on small images,
    unless ``edges`` is False.
    Where the sides of an image differ, tiles are as large as the shorter side allows; images below 5 pixels start from
    stripes in L2 as well.

    Args:
        queries: Proposals, each of one forward pass; the start takes one more.
        p_init: Share of the pixels in the first windows, above 0 and at most 1.
        edges: Windows reach the last row and column; False for the authors' range.

    Raises:
        RangeError: Numbers make no sense.

    References:
        M. Andriushchenko, F. Croce, N. Flammarion, M. Hein, "Square attack: a query-efficient black-box adversarial
        attack via random search", 2020, 1912.00049.
    """

    access: ClassVar[str] = "scores"

    queries: int = 5000
    p_init: float = 0.8
    edges: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("queries", self.queries, "The reference ensemble takes 5000.")
        if not 0 < self.p_init <= 1:
            raise RangeError("Square", "p_init above 0, at most 1", f"{self.p_init}", "The reference uses 0.8.")

    def search(self, oracle: Oracle, rng: SampleRng, rows: Tensor, start: Tensor | None, *, stop: bool) -> None:
        walk = (_Flat if oracle.norm == "linf" else _Round)(oracle, rows, rng, start)
        walk.edges = self.edges
        for first in range(0, self.queries, _BLOCK):
            if stop:
                walk.drop()
            if not len(walk.rows):
                return
            places = range(first, min(first + _BLOCK, self.queries))
            height, width = oracle.clean.shape[2:]
            walk.block(first // _BLOCK, [walk.side(share_after(at, self.p_init), height, width) for at in places])


def share_after(proposals: int, p_init: float) -> float:
    """Return the share of pixels in a window, after a number of proposals."""
    halvings = sum(proposals > after for after in HALVED_AFTER)
    return math.ldexp(p_init, -halvings)


class _Walk(ABC):
    """The search of the samples at ``rows``; one row of state for each.

    Attributes:
        images: float (n, C, H, W), from which the search goes on.
        best: float (n,), their margins.
    """

    state: ClassVar[tuple[str, ...]] = ("rows", "clean", "images", "best")
    edges: bool = True

    def __init__(self, oracle: Oracle, rows: Tensor, rng: SampleRng, start: Tensor | None) -> None:
        self.oracle = oracle
        self.rows = rows
        self.rng = rng
        self.clean = oracle.clean[rows]
        first = self.first(rng.child("start").select(rows)) if start is None else start
        self.best = torch.full_like(first[:, 0, 0, 0], torch.inf)
        self.images = first
        self.take(first)

    @staticmethod
    @abstractmethod
    def side(share: float, height: int, width: int) -> int:
        """Return the side of a window that covers a share of the pixels."""

    @abstractmethod
    def first(self, rng: SampleRng) -> Tensor:
        """Return where the search starts, float (n, C, H, W)."""

    @abstractmethod
    def block(self, number: int, sides: list[int]) -> None:
        """Make one proposal with a window of each of the sides, from the draws of this number."""

    def take(self, images: Tensor) -> None:
        """Ask the model, and go on from the images whose margin is smaller."""
        now = self.oracle.margins(images, self.rows)
        # false for NaN; the reference also takes every margin of 0 or less, but it stops there
        better = now < self.best
        self.best = torch.where(better, now, self.best)
        self.images = torch.where(better.view(-1, 1, 1, 1), images, self.images)

    def drop(self) -> None:
        """Leave samples alone that are wrong; this waits for the device."""
        left = (~self.oracle.wrong(self.rows)).nonzero().squeeze(1)
        if len(left) < len(self.rows):
            for name in self.state:
                setattr(self, name, getattr(self, name)[left])

    def corners(self, rng: SampleRng, label: str, sides: list[int]) -> tuple[Tensor, Tensor]:
        """Return top rows and left columns of windows, int64 (n, K) each, every place equally likely."""
        size = torch.tensor(sides, device=self.clean.device)
        drawn = rng.uniform(label, (2, _BLOCK))[:, :, : len(sides)]
        places = (self.clean.shape[2 + axis] - size + self.edges for axis in (0, 1))
        top, left = ((drawn[:, axis] * count.clamp_min(1)).long() for axis, count in enumerate(places))
        return top, left


class _Flat(_Walk):
    """L-infinity."""

    state = (*_Walk.state, "lower", "upper")

    def __init__(self, oracle: Oracle, rows: Tensor, rng: SampleRng, start: Tensor | None) -> None:
        ends = (oracle.clean[rows] + sign * oracle.eps for sign in (-1, 1))
        self.lower, self.upper = (oracle.project(end, rows) for end in ends)
        super().__init__(oracle, rows, rng, start)

    def first(self, rng: SampleRng) -> Tensor:
        _, channels, _, width = self.clean.shape
        return torch.where(rng.sign("stripes", (channels, 1, width)) > 0, self.upper, self.lower)

    @staticmethod
    def side(share: float, height: int, width: int) -> int:
        return min(max(round(math.sqrt(share * height * width)), 1), height, width)

    def block(self, number: int, sides: list[int]) -> None:
        rng = self.rng.child(number).select(self.rows)
        rises = rng.integers("rises", 2, (_BLOCK, self.clean.shape[1], 1, 1)) > 0
        size = torch.tensor(sides, device=self.clean.device)[:, None]
        inside = []
        for axis, corner in enumerate(self.corners(rng, "window", sides)):
            place = torch.arange(self.clean.shape[2 + axis], device=self.clean.device) - corner[:, :, None]
            inside.append((place >= 0) & (place < size))
        down, across = inside
        for i in range(len(sides)):
            window = down[:, i, None, :, None] & across[:, i, None, None, :]
            # adding 2 eps and clipping to the ball, as the reference does, is to go to its end
            self.take(torch.where(window, torch.where(rises[:, i], self.upper, self.lower), self.images))


class _Round(_Walk):
    """L2."""

    def first(self, rng: SampleRng) -> Tensor:
        count, channels, height, width = self.clean.shape
        side = min(height, width) // _TILES
        if side == 0:
            return self._placed(rng.sign("stripes", (channels, 1, width)).to(self.clean).expand(self.clean.shape))
        down, across = height // side, width // side
        tile = pattern(side, self.clean)
        turned = (rng.integers("turned", 2, (1, down, across)) > 0)[..., None, None]
        signs = rng.sign("signs", (channels, down, across))[..., None, None]
        tiles = (torch.where(turned, tile.T, tile) * signs).transpose(3, 4)
        delta = torch.zeros_like(self.clean)
        top, left = (height - down * side) // 2, (width - across * side) // 2
        middle = delta[:, :, top : top + down * side, left : left + across * side]
        middle.copy_(tiles.reshape(count, channels, down * side, across * side))
        return self._placed(delta)

    @staticmethod
    def side(share: float, height: int, width: int) -> int:
        side = max(round(math.sqrt(share * height * width)), 3)
        return min(side + (side % 2 == 0), height, width)

    def block(self, number: int, sides: list[int]) -> None:
        rng = self.rng.child(number).select(self.rows)
        windows = [self.corners(rng, label, sides) for label in ("filled", "emptied")]
        signs = rng.sign("signs", (_BLOCK, self.clean.shape[1], 1)).to(self.clean.dtype)
        turned = rng.integers("turned", 2, (_BLOCK, 1, 1)) > 0
        patterns = {side: pattern(side, self.clean) for side in set(sides)}
        for i, side in enumerate(sides):
            filled, emptied = (self._places(top[:, i], left[:, i], side) for top, left in windows)
            shape = torch.where(turned[:, i], patterns[side].T.flatten(), patterns[side].flatten()) * signs[:, i]
            self.take(self._moved(filled, emptied, shape))

    def _places(self, top: Tensor, left: Tensor, side: int) -> Tensor:
        """Return the places of the pixels of windows in flat images, int64 (n, C, side * side)."""
        _, channels, _, width = self.clean.shape
        steps = torch.arange(side, device=top.device)
        places = (top[:, None, None] + steps[:, None]) * width + left[:, None, None] + steps
        return places.flatten(1)[:, None].expand(-1, channels, -1)

    def _moved(self, filled: Tensor, emptied: Tensor, shape: Tensor) -> Tensor:
        """Return images where one window has got the length of both, and what the budget has left."""
        delta = (self.images - self.clean).flatten(2)
        spare = (self.oracle.eps**2 - (delta**2).sum((1, 2), keepdim=True)).clamp_min(0) / delta.shape[1]
        old = delta.gather(2, filled)
        own = (old**2).sum(2, keepdim=True)
        delta = delta.scatter(2, filled, 0.0)
        other = (delta.gather(2, emptied) ** 2).sum(2, keepdim=True)
        new = shape + old / (own.sqrt() + TINY)
        new = new / (new.norm(dim=2, keepdim=True) + TINY) * (spare + own + other).sqrt()
        return self._placed(delta.scatter(2, emptied, 0.0).scatter(2, filled, new).view(self.clean.shape))

    def _placed(self, delta: Tensor) -> Tensor:
        """Return images at the distance eps, where the box allows it, in the direction of ``delta``."""
        if self.oracle.mask is not None:
            delta = delta * self.oracle.mask[self.rows]
        return (self.clean + delta / (lengths(delta, "l2") + TINY) * self.oracle.eps).clamp(0, 1)


def pattern(side: int, like: Tensor) -> Tensor:
    """Return the pattern of an L2 window, (side, side), of unit length: a pyramid above one of opposite sign.

    Each is a sum of nested rectangles k = 0, 1, ... of 2 k + 1 pixels around the middle, of height 1 / (k + 1)^2.
    """
    half = side // 2
    both = torch.cat((_pyramid(half, side), -_pyramid(side - half, side)))
    unit: Tensor = both / both.norm()
    return unit.to(like)


def _pyramid(height: int, width: int) -> Tensor:
    steps = 1.0 / torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** 2
    heights = steps.flip(0).cumsum(0).flip(0)
    down, across = ((torch.arange(size) - size // 2).abs() for size in (height, width))
    values: Tensor = heights[torch.maximum(down[:, None], across)]
    unit: Tensor = values / values.norm().clamp_min(TINY)
    return unit
