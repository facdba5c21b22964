"""Artefacts of MedMNIST-C on 8-bit pixels: stain deposits, bubbles, black corners and characters.

Pixel parameters are those of the source, for images of 224 px, and are used as they are at any size. Where the source
draws a whole number, so does this: a severity between two published ones rounds its limits to the nearest whole number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from corruptions._checks import check_levels
from robustlab.core.corruption import Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng

from .base import Reference

_MOST_BLOTS = 16
_MOST_BUBBLES = 32
_MOST_WORDS = 16
_MOST_LETTERS = 10
_FEWEST_BUBBLES = 7
_EDGE = 10  # px that blots and words keep from the border
_RIM = 2  # px
_INSIDE, _RING = 100, 130  # of 255, opacity of a white bubble
_MARGIN = 12  # px around a word for what hangs over its box

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def pick(bits: Tensor, count: Tensor | int) -> Tensor:
    """Return int64 uniform on 0 .. ``count`` - 1, made of int32 random bits."""
    return ((bits.to(torch.int64) & 0xFFFFFFFF) * count) >> 32


def _whole(value: float) -> int:
    return int(value + 0.5)


# Shares of ink in the source's masks of 24 and of 32 px, so that as much is hidden; the shapes are our own.
_SHARES = {
    24: (0.54, 0.62, 0.60, 0.78, 0.75, 0.60, 0.74, 0.48, 0.55, 0.59),
    32: (0.54, 0.61, 0.55, 0.58, 0.57, 0.54, 0.59, 0.51, 0.47, 0.47),
}


@lru_cache(maxsize=16)
def blot_masks(size: int) -> Mask:
    """Return ten masks of ink blots, bool (10, ``size``, ``size``): noisy star shapes with set shares of ink.

    Args:
        size: 24 to 32 px.
    """
    rng = SampleRng.make(0, "blot-masks", torch.arange(len(_SHARES[24])))
    waves = rng.uniform("waves", (5, 2)).double().numpy()
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    angle, far = np.arctan2(axis[:, None], axis[None, :]), np.hypot(axis[:, None], axis[None, :])
    weight = (size - 24) / 8
    masks = np.zeros((len(waves), size, size), dtype=np.bool_)
    grain = rng.normal("grain", (32, 32)).double().numpy()[:, :size, :size]
    for mask, wave, fine, small, large in zip(masks, waves, grain, _SHARES[24], _SHARES[32], strict=True):
        share = small + weight * (large - small)
        # a blot that nearly fills its square is round
        lobes = (0.9 - share) * sum(
            size_of * np.cos((order + 2) * angle + 2 * math.pi * turn) / (order + 1) ** 0.5
            for order, (size_of, turn) in enumerate(wave)
        )
        height = far / (1 + 0.8 * lobes) + 0.05 * fine
        first = np.argsort(height.round(6), axis=None, kind="stable")[: _whole(share * size * size)]
        mask.reshape(-1)[first] = True
    return masks


@CORRUPTIONS.register("ref:stain-deposit")
@dataclass(frozen=True)
class RefStainDeposit(Reference):
    """Black ink blots at random places, as in MedMNIST-C.

    One to ``blots`` of them (exactly one where ``blots`` is 1), each one of ten masks, at least 10 px from the border.
    The masks are our own design with the source's shares of ink, since its masks are a third party's drawings.

    Args:
        blots: Largest number of blots, up to 16.
        size: Side of the masks, 24 to 32 px. The source meant five sizes, but an index fault leaves two of them.

    References:
        F. Di Salvo, S. Doerrich, C. Ledig, "MedMNIST-C", 2024, 2406.17536.
    """

    family: ClassVar[str] = "artifacts"
    stage: ClassVar[str] = "subject"
    min_size: ClassVar[int] = 52
    seen_in: ClassVar[tuple[str, ...] | None] = ("histology", "microscopy")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    alike: ClassVar[bool] = True

    blots: Levels = Levels((1, 2, 3, 4, 5), identity=0.0, unit="blots at most")
    size: Levels = Levels((24, 24, 24, 24, 32), identity=24.0, unit="px")

    def __post_init__(self) -> None:
        check_levels(self, "blots", self.blots, 0, _MOST_BLOTS)
        check_levels(self, "size", self.size, 24, 32)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        return {"number": rng.bits("number", 1), "blots": rng.bits("blots", 3 * _MOST_BLOTS).view(-1, _MOST_BLOTS, 3)}

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        most, size = _whole(values["blots"]), _whole(values["size"])
        height, width = pixels.shape[2:]
        number = 1 + pick(draws["number"], most) if most > 1 else torch.full_like(draws["number"], most)
        bits = draws["blots"][:, :most]
        masks = torch.from_numpy(blot_masks(size))
        which = pick(bits[..., 0], len(masks))
        left = _EDGE + pick(bits[..., 1], width - size - 2 * _EDGE + 1)
        top = _EDGE + pick(bits[..., 2], height - size - 2 * _EDGE + 1)
        drawn = _blots_each if pixels.device.type == "cpu" else _blots_together
        return drawn(_held(pixels), masks.to(pixels.device), number[:, 0], which, left, top)


def _blots_together(pixels: Tensor, masks: Tensor, number: Tensor, which: Tensor, left: Tensor, top: Tensor) -> Tensor:
    count, _, height, width = pixels.shape
    cells = torch.arange(masks.shape[1], device=pixels.device)
    place = (top[..., None, None] + cells[:, None]) * width + left[..., None, None] + cells
    drawn = torch.arange(which.shape[1], device=pixels.device) < number[:, None]
    # what is not inked goes to a spare cell behind the image
    place = torch.where(masks[which] & drawn[..., None, None], place, height * width).view(count, -1)
    clear = pixels.new_ones(count, height * width + 1).scatter_(1, place, 0)
    return pixels * clear[:, :-1].view(count, 1, height, width)


def _blots_each(pixels: Tensor, masks: Tensor, number: Tensor, which: Tensor, left: Tensor, top: Tensor) -> Tensor:
    out = pixels.clone()
    size = masks.shape[1]
    inks = masks.to(torch.uint8).numpy()
    rows = zip(number.tolist(), which.tolist(), left.tolist(), top.tolist(), strict=True)
    for planes, (blots, kinds, lefts, tops) in zip(_planes(out), rows, strict=True):
        for plane in planes:
            black = np.zeros((size, size, *plane.shape[2:]), np.uint8)
            for kind, x, y in zip(kinds[:blots], lefts[:blots], tops[:blots], strict=True):
                cv2.copyTo(black, inks[kind], plane[y : y + size, x : x + size])
    return out


def _last(pixels: Tensor) -> bool:
    """Return whether memory holds (N, H, W, C) with several channels."""
    return pixels.shape[1] > 1 and pixels.is_contiguous(memory_format=torch.channels_last)


def _held(pixels: Tensor) -> Tensor:
    """Return the pixels in memory as (N, C, H, W) or (N, H, W, C), as they are if they are one of the two."""
    return pixels if _last(pixels) else pixels.contiguous()


def _planes(pixels: Tensor) -> list[list[Pixels]]:
    """Return views of each image that OpenCV can write to: one (H, W, C), or several (H, W), as memory holds them."""
    array = pixels.numpy()
    if _last(pixels):
        return [[image] for image in array.transpose(0, 2, 3, 1)]
    return [list(image) for image in array]


@lru_cache(maxsize=64)
def disc_half_widths(radius: int) -> tuple[int, ...]:
    """Return how far a filled circle reaches sideways in the rows 0 .. ``radius`` from its centre, as Pillow draws it.

    Its outline walks from (radius, 0) to (0, radius) over the neighbour that is nearest to the circle.
    """
    x, y = radius, 0
    reach = {0: radius}
    while y < radius:
        steps = [(x, y + 1), (x - 1, y + 1), (x - 1, y)]
        x, y = min((step for step in steps if step[0] >= 0), key=lambda p: abs(p[0] ** 2 + p[1] ** 2 - radius**2))
        reach.setdefault(y, x)
    return tuple(reach[row] for row in range(radius + 1))


@lru_cache(maxsize=8)
def bubble_stamps(largest: int) -> Pixels:
    """Return the opacities, of 255, of a bubble of each radius, uint8 (R + 1, S, S) with S = 2 (R + 2) + 1."""
    reach = largest + _RIM
    stamps = np.zeros((largest + 1, 2 * reach + 1, 2 * reach + 1), dtype=np.uint8)
    for radius, stamp in enumerate(stamps):
        for size, value in ((radius + _RIM, _RING), (radius, _INSIDE)):
            for row, half in enumerate(disc_half_widths(size)):
                for y in (reach - row, reach + row):
                    stamp[y, reach - half : reach + half + 1] = value
    return stamps


def whiten(pixels: Tensor, opacity: Tensor) -> Tensor:
    """Return pixels under a white layer, blended as Pillow does: t = 128 + p (255 - a) + 255 a, (t + t >> 8) >> 8.

    Args:
        pixels: uint8 (N, C, H, W).
        opacity: uint8 (N, 1, H, W), of 255.
    """
    given = opacity.to(torch.int32)
    total = pixels * (255 - given) + (255 * given + 128)
    return total.add_(total >> 8).bitwise_right_shift_(8).to(torch.uint8)


@CORRUPTIONS.register("ref:bubble")
@dataclass(frozen=True)
class RefBubble(Reference):
    """White half-transparent discs with a ring of 2 px, as in MedMNIST-C.

    7 to ``count`` discs of radius 3 to ``radius``, wholly inside square images; later ones replace earlier ones. The
    source takes the height for the width and the other way round, so that in other images they may leave the frame.
    Between severities 0 and 1, which the source does not have, the lower limits fall with the upper ones.

    Args:
        radius: Largest radius, 3 to 17 px.
        count: Largest number, 7 to 32; below 7 the source does not run.

    References:
        F. Di Salvo, S. Doerrich, C. Ledig, "MedMNIST-C", 2024, 2406.17536.
    """

    family: ClassVar[str] = "artifacts"
    stage: ClassVar[str] = "subject"
    min_size: ClassVar[int] = 34
    seen_in: ClassVar[tuple[str, ...] | None] = ("histology", "microscopy")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    alike: ClassVar[bool] = True

    radius: Levels = Levels((7, 10, 12, 15, 17), identity=0.0, unit="px at most")
    count: Levels = Levels((15, 15, 15, 20, 25), identity=0.0, unit="bubbles at most")

    def __post_init__(self) -> None:
        check_levels(self, "radius", self.radius, 3, self.min_size // 2)
        check_levels(self, "count", self.count, _FEWEST_BUBBLES, _MOST_BUBBLES)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        bubbles = rng.bits("bubbles", 3 * _MOST_BUBBLES).view(-1, _MOST_BUBBLES, 3)
        return {"number": rng.bits("number", 1), "bubbles": bubbles}

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        most, largest = _whole(values["count"]), _whole(values["radius"])
        fewest, smallest = min(_FEWEST_BUBBLES, most), min(3, largest)
        height, width = pixels.shape[2:]
        number = fewest + pick(draws["number"], most - fewest + 1)
        bits = draws["bubbles"][:, :most]
        radius = smallest + pick(bits[..., 0], largest - smallest + 1)
        x = radius + pick(bits[..., 1], height - 2 * radius + 1)
        y = radius + pick(bits[..., 2], width - 2 * radius + 1)
        drawn = _bubbles_each if pixels.device.type == "cpu" else _bubbles_together
        return drawn(_held(pixels), torch.from_numpy(bubble_stamps(largest)), number[:, 0], radius, x, y)


def _bubbles_together(pixels: Tensor, stamps: Tensor, number: Tensor, radius: Tensor, x: Tensor, y: Tensor) -> Tensor:
    height, width = pixels.shape[2:]
    # centres lie up to the longer side from either border, and a ring reaches past both
    side = max(height, width) + 2 * _RIM + 1
    outside = -4 * side * side
    stamps = stamps.to(x.device)
    cells = torch.arange(stamps.shape[1], device=x.device) - stamps.shape[1] // 2
    offset = torch.where(stamps > 0, cells[:, None] * side + cells, outside).flatten(1)
    centre = (y + _RIM) * side + x + _RIM
    centre = torch.where(torch.arange(x.shape[1], device=x.device) < number[:, None], centre, outside)
    layer = torch.zeros(len(x), side * side, dtype=torch.uint8, device=x.device)
    for bubble in range(x.shape[1]):
        # the corner of the canvas takes what is no part of a bubble; it is cut off below
        place = (offset[radius[:, bubble]] + centre[:, bubble, None]).clamp_(min=0)
        layer.scatter_(1, place, stamps[radius[:, bubble]].flatten(1))
    return whiten(pixels, layer.view(-1, 1, side, side)[:, :, _RIM : _RIM + height, _RIM : _RIM + width])


def _bubbles_each(pixels: Tensor, stamps: Tensor, number: Tensor, radius: Tensor, x: Tensor, y: Tensor) -> Tensor:
    height, width = pixels.shape[2:]
    kinds = stamps.numpy()
    drawn = [np.ascontiguousarray(kind > 0).view(np.uint8) for kind in kinds]
    reach, span = kinds.shape[1] // 2, kinds.shape[1]
    side = max(height, width) + 2 * reach
    canvas = np.empty((side, side), np.uint8)
    out = torch.empty_like(pixels)
    rows = zip(number.tolist(), radius.tolist(), x.tolist(), y.tolist(), strict=True)
    for source, target, (bubbles, radii, xs, ys) in zip(_planes(pixels), _planes(out), rows, strict=True):
        canvas.fill(0)
        for kind, left, top in zip(radii[:bubbles], xs[:bubbles], ys[:bubbles], strict=True):
            cv2.copyTo(kinds[kind], drawn[kind], canvas[top : top + span, left : left + span])
        layer = canvas[reach : reach + height, reach : reach + width]
        for plane, place in zip(source, target, strict=True):
            opacity = layer if plane.ndim == 2 else cv2.merge([layer] * plane.shape[2])
            # p + (255 - p) a / 255, rounded, is what ``whiten`` does in whole numbers: no value lies half-way
            cv2.add(plane, cv2.multiply(cv2.bitwise_not(plane), opacity, scale=1 / 255), dst=place)
    return out


@lru_cache(maxsize=32)
def _disc_mask(height: int, width: int, radius: int) -> Tensor:
    canvas = np.zeros((height, width), np.uint8)
    cv2.circle(canvas, (width // 2, height // 2), radius, (1,), thickness=-1)
    return torch.from_numpy(canvas)


@CORRUPTIONS.register("ref:black-corner")
@dataclass(frozen=True)
class RefBlackCorner(Reference):
    """Everything outside a centred disc is black, as in MedMNIST-C.

    Args:
        radius: Of the disc, as a share of half the shorter side; the disc is OpenCV's. The published values are in the
            wrong order: severity 4 takes more away than severity 5.

    References:
        F. Di Salvo, S. Doerrich, C. Ledig, "MedMNIST-C", 2024, 2406.17536.
    """

    family: ClassVar[str] = "artifacts"
    stage: ClassVar[str] = "optics"
    seen_in: ClassVar[tuple[str, ...] | None] = ("dermoscopy", "endoscopy", "fundus")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    alike: ClassVar[bool] = True

    radius: Levels = Levels((1.10, 1.05, 1.00, 0.90, 0.95), identity=math.inf, unit="of half the shorter side")

    def __post_init__(self) -> None:
        check_levels(self, "radius", self.radius, 0)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        height, width = pixels.shape[2:]
        # width // 2 from one border, the rest from the other: the shorter one is the floor
        radius = int(min(height // 2, width // 2) * min(values["radius"], 4.0 + height + width))
        mask = _disc_mask(height, width, min(radius, height + width)).expand(1, *pixels.shape[1:])
        # laid out like the images, so that the product runs straight through memory
        layout = torch.channels_last if _last(pixels) else torch.contiguous_format
        return pixels * mask.to(pixels.device).contiguous(memory_format=layout)


@CORRUPTIONS.register("ref:characters")
@dataclass(frozen=True)
class RefCharacters(Reference):
    """Words of small random letters in random colours, as in MedMNIST-C.

    1 to ``words`` words of 3 to ``letters`` lower-case letters, in OpenCV's duplex font one pixel thick, at a scale of
    0.14 to ``scale`` in steps of 0.01. They are drawn by the installed OpenCV, on the CPU.

    Args:
        words: Largest number of words, up to 16.
        letters: Largest length of a word, 3 to 10.
        scale: Largest scale of the font, 0.14 to 1.

    References:
        F. Di Salvo, S. Doerrich, C. Ledig, "MedMNIST-C", 2024, 2406.17536.
    """

    family: ClassVar[str] = "artifacts"
    stage: ClassVar[str] = "overlay"
    min_size: ClassVar[int] = 10 + 8 * _MOST_LETTERS
    seen_in: ClassVar[tuple[str, ...] | None] = ("xray", "ultrasound", "dermoscopy")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"

    words: Levels = Levels((1, 2, 3, 4, 6), identity=0.0, unit="words at most")
    letters: Levels = Levels((6, 7, 8, 9, 10), identity=3.0, unit="letters at most")
    scale: Levels = Levels((0.14, 0.15, 0.16, 0.17, 0.18), identity=0.14, unit="of the font's size")

    def __post_init__(self) -> None:
        check_levels(self, "words", self.words, 0, _MOST_WORDS)
        check_levels(self, "letters", self.letters, 3, _MOST_LETTERS)
        check_levels(self, "scale", self.scale, 0.14, 1)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        words = rng.bits("words", 7 * _MOST_WORDS).view(-1, _MOST_WORDS, 7)
        letters = rng.bits("letters", _MOST_WORDS * _MOST_LETTERS).view(-1, _MOST_WORDS, _MOST_LETTERS)
        return {"number": rng.bits("number", 1), "words": words, "letters": letters}

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        most = _whole(values["words"])
        height, width = pixels.shape[2:]
        number = (1 + pick(draws["number"][:, 0], most) if most else draws["number"][:, 0] * 0).tolist()
        bits = draws["words"][:, :most]
        length = 3 + pick(bits[..., 0], _whole(values["letters"]) - 2)
        # the source cuts off, but a product such as 0.29 * 100 must not lose a step on the way
        size = 14 + pick(bits[..., 1], int(values["scale"] * 100 + 1e-9) - 13)
        x = _EDGE + pick(bits[..., 2], width - 8 * length - _EDGE + 1)
        y = _EDGE + pick(bits[..., 3], height - 2 * _EDGE + 1)
        words = torch.cat([torch.stack([length, size, x, y], -1), pick(bits[..., 4:], 256)], -1).tolist()
        letters = pick(draws["letters"][:, :most], 26).tolist()
        out = _held(pixels.cpu()).clone()
        for planes, count, numbers, rows in zip(_planes(out), number, words, letters, strict=True):
            for (long, hundredths, left, base, *colour), row in zip(numbers[:count], rows[:count], strict=True):
                text = "".join(chr(ord("a") + letter) for letter in row[:long])
                _write(planes, text, (left, base), hundredths / 100.0, (colour[0], colour[1], colour[2]))
        return out.to(pixels.device)


def _write(planes: list[Pixels], text: str, place: tuple[int, int], scale: float, colour: tuple[int, int, int]) -> None:
    """Write a word into one image, as ``_planes`` gives it, in place."""
    font, thickness = cv2.FONT_HERSHEY_DUPLEX, 1
    if len(planes) == 1:
        cv2.putText(planes[0], text, place, font, scale, colour, thickness, cv2.LINE_AA)
        return
    # OpenCV wants the channels last; only the part around the word is turned
    (width, height), below = cv2.getTextSize(text, font, scale, thickness)
    x, y = place
    left, top = max(0, x - _MARGIN), max(0, y - height - _MARGIN)
    parts = [plane[top : y + below + _MARGIN, left : x + width + _MARGIN] for plane in planes]
    canvas = cv2.merge(parts)
    cv2.putText(canvas, text, (x - left, y - top), font, scale, colour, thickness, cv2.LINE_AA)
    for channel, part in enumerate(parts):
        part[:] = canvas[..., channel]
