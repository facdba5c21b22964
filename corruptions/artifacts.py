"""Things in the way of the image: debris, air bubbles, a field stop and burned-in text.

All sizes are relative to the image. A greater severity grows the same objects and adds others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng

from ._checks import check_levels
from ._shapes import GLYPHS, disc_radius, discs, glyphs, knots, share_each, smooth_field, threshold
from .blur import disc_blur

_COARSE = 0.9  # weight of the coarse detail of debris, of unit variance in all
_MOST_BUBBLES = 16
_WHOLE = 1.1  # a field stop of this share of half the diagonal, with its offset and edge, hides nothing
_LINES = 4  # lines of text in each corner
_LONGEST = 8  # letters of a word


def _scale(height: int, width: int) -> float:
    return math.sqrt(height * width)


@CORRUPTIONS.register("debris")
@dataclass(frozen=True)
class Debris(Corruption):
    """Dark debris or deposits of stain on a slide or a lens: x (1 - a_c m), a blot's opacity a_c in its shape m.

    The blots are where a smooth Gaussian field with detail at two scales exceeds a threshold, which falls as ``cover``
    rises, so blots grow and new ones appear. On colour images they are brownish.

    Args:
        cover: Share of the image under debris, in expectation over draws; 0 to 60 %.
    """

    family: ClassVar[str] = "artifacts"
    stage: ClassVar[str] = "subject"
    seen_in: ClassVar[tuple[str, ...] | None] = ("histology", "microscopy")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"

    cover: Levels = Levels((0.5, 1.5, 3.5, 7.0, 12.0), identity=0.0, unit="% of the image area")

    def __post_init__(self) -> None:
        check_levels(self, "cover", self.cover, 0, 60)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        _, height, width = shape
        draws = {"opacity": rng.uniform("opacity", (1, 1, 1))}
        for name, pitch in _pitches(height, width).items():
            draws[name] = rng.normal(name, (knots(height, pitch), knots(width, pitch)))
        return draws

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        _, channels, height, width = images.shape
        pitches = _pitches(height, width)
        field = smooth_field(draws["coarse"], (height, width), pitches["coarse"]).mul_(_COARSE)
        field += smooth_field(draws["fine"], (height, width), pitches["fine"]).mul_(math.sqrt(1 - _COARSE**2))
        # the field climbs about 2 in a coarse pitch at a blot's edge, so this is an edge of about 1.5 px
        ramp = min(1.0, 3.0 / pitches["coarse"])
        shape = field.sub_(threshold(values["cover"] / 100, ramp)).div_(ramp).clamp_(0, 1)[:, None]
        tint = torch.tensor(
            (0.9, 1.0, 1.06) if channels == 3 else (1.0,), dtype=torch.float32, device=images.device
        ).view(1, -1, 1, 1)
        opacity = (0.7 + 0.2 * draws["opacity"]) * tint
        return images * (1 - opacity * shape)


def _pitches(height: int, width: int) -> dict[str, float]:
    scale = _scale(height, width)
    return {"coarse": max(1.0, 0.075 * scale), "fine": max(1.0, 0.022 * scale)}


@CORRUPTIONS.register("air-bubbles")
@dataclass(frozen=True)
class AirBubbles(Corruption):
    """Air bubbles under a coverslip or in immersion gel.

    The inside is out of focus and brighter; light is bent away from the rim, which is dark, into a bright ring just
    inside it. Up to 16 discs at independent places, which merge where they touch; they grow with ``cover``, and their
    number with its root.

    Args:
        cover: Share of the image under bubbles, in expectation over draws; 0 to 60 %.
    """

    family: ClassVar[str] = "artifacts"
    stage: ClassVar[str] = "subject"
    seen_in: ClassVar[tuple[str, ...] | None] = ("histology", "microscopy", "dermoscopy")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"

    cover: Levels = Levels((1.0, 3.0, 6.0, 11.0, 18.0), identity=0.0, unit="% of the image area")

    def __post_init__(self) -> None:
        check_levels(self, "cover", self.cover, 0, 60)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        place = rng.uniform("place", (2, _MOST_BUBBLES))
        return {"y": place[:, 0], "x": place[:, 1], "size": rng.uniform("size", (_MOST_BUBBLES,))}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        height, width = images.shape[2:]
        scale = _scale(height, width)
        depth = bubble_depth(draws, values["cover"] / 100, (height, width))
        inside = (depth + 0.5).clamp_(0, 1)[:, None]
        rim = max(0.8, 0.009 * scale)
        dark = _bump(depth, 0.6 * rim, rim)[:, None]
        bright = _bump(depth, 2.4 * rim, 1.4 * rim)[:, None]
        soft = disc_blur(images, 0.012 * scale)
        gain = (1 - 0.6 * dark) * inside
        # x + m ((b + (1 - b) g) (1 - d) - x) with few passes over all channels
        lift = gain * (0.18 + 0.5 * bright)
        return images * (1 - inside) + soft * (gain - lift) + lift


def bubble_depth(draws: Draws, cover: float, size: tuple[int, int]) -> Tensor:
    """Return how deep each pixel lies inside a bubble, in px, negative outside; it rises with ``cover``.

    Args:
        draws: Of ``AirBubbles``.
        cover: Expected share of the image in bubbles, counting pixels by clamp(depth + 1/2, 0, 1).
        size: (height, width).

    Returns:
        float32 (N, height, width).
    """
    height, width = size
    number = min(float(_MOST_BUBBLES), 30 * math.sqrt(cover))
    used = max(1, math.ceil(number))
    born = (number - torch.arange(used, dtype=torch.float64, device=draws["size"].device)).clamp(0, 1)
    # many small ones and few large ones, of mean area one
    area = 0.15 + 2.55 * draws["size"][:, :used].double().square()
    radius = disc_radius(share_each(cover, number) * height * width * area * born).to(torch.float32)
    return discs(draws["y"][:, :used] * height, draws["x"][:, :used] * width, radius, size).neg_()


def _bump(depth: Tensor, centre: float, half: float) -> Tensor:
    """Return a smooth hump of height 1 at ``centre``, 0 from ``half`` away on."""
    away = ((depth - centre) / half).square_().clamp_(max=1)
    return (1 - away).square_()


@CORRUPTIONS.register("dark-corners")
@dataclass(frozen=True)
class DarkCorners(Corruption):
    """A circular field stop, as of a dermoscope or an endoscope: dark outside a disc, with a soft edge.

    The edge, a smooth step 8 % of half the diagonal wide, is the stop's blurred image. The disc is off centre by up to
    4 % of half the diagonal.

    Args:
        radius: Of the disc, as a share of half the image's diagonal; 0 to 1.1. On square images 0.71 is the disc that
            touches the sides.
    """

    family: ClassVar[str] = "artifacts"
    stage: ClassVar[str] = "optics"
    seen_in: ClassVar[tuple[str, ...] | None] = ("dermoscopy", "endoscopy", "fundus")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"

    radius: Levels = Levels((0.92, 0.85, 0.78, 0.71, 0.64), identity=_WHOLE, unit="of half the diagonal")

    def __post_init__(self) -> None:
        check_levels(self, "radius", self.radius, 0, _WHOLE)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        # uniform on a square inside the circle of the stated offset
        return {"offset": (rng.uniform("offset", (2,)) - 0.5) * (2 * 0.04 / math.sqrt(2))}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        height, width = images.shape[2:]
        half = math.hypot(height, width) / 2
        y, x = (
            (torch.arange(extent, dtype=torch.float32, device=images.device) + (0.5 - extent / 2)) / half
            - draws["offset"][:, axis, None]
            for axis, extent in enumerate((height, width))
        )
        away = (y.square()[:, :, None] + x.square()[:, None, :]).sqrt_()
        lit = ((values["radius"] + 0.04 - away) / 0.08).clamp_(0, 1)
        return images * (lit * lit * (3 - 2 * lit))[:, None]


@CORRUPTIONS.register("burned-in-text")
@dataclass(frozen=True)
class BurnedInText(Corruption):
    """Words of random capitals and digits written into the image, in lines at its corners.

    Light letters with a dark surround, as consoles write them, 4 % of the image height high. The text depends on the
    sample's id and the seed only, never on its label: text that went with the label would be a leak, not a shift.

    Args:
        words: Number of words of 3 to 8 letters, 0 to 16; a part of a word is a faint one.
    """

    family: ClassVar[str] = "artifacts"
    stage: ClassVar[str] = "overlay"
    seen_in: ClassVar[tuple[str, ...] | None] = ("xray", "ultrasound", "dermoscopy")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"

    words: Levels = Levels((2, 4, 7, 11, 16), identity=0.0, unit="words")

    def __post_init__(self) -> None:
        check_levels(self, "words", self.words, 0, 4 * _LINES)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        return {
            "corner": rng.uniform("corner", (4,)),
            "length": rng.integers("length", _LONGEST - 2, (4 * _LINES,)) + 3,
            "letters": rng.integers("letters", GLYPHS, (4 * _LINES, _LONGEST)),
            "light": rng.uniform("light", (1, 1, 1)),
        }

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        height, width = images.shape[2:]
        cell = (max(1, round(0.07 * height)), max(1, round(0.037 * height)))
        rows, columns = max(1, height // cell[0]), max(1, width // cell[1])
        letters, strength = _page(draws, values["words"], rows, columns)
        ink, surround = (
            _laid_out(table.to(images.device)[letters] * strength[..., None, None], (height, width))
            for table in glyphs(cell)
        )
        light = (0.85 + 0.15 * draws["light"]) * ink
        return images * ((1 - 0.85 * surround) * (1 - ink)) + light


def _page(draws: Draws, words: float, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the letter, int64 (N, rows, columns), in each cell of a page and its strength, float32, in [0, 1].

    Words go to the four corners in turn, in lines from the border inwards. No cell is written to twice.
    """
    count, used = len(draws["corner"]), min(math.ceil(words), 4 * _LINES)
    word = torch.arange(used, device=draws["corner"].device)
    corner = draws["corner"].argsort(dim=1, stable=True)[:, word % 4]
    line, length = word // 4, draws["length"][:, :used]
    letter = torch.arange(_LONGEST, device=word.device)
    row = torch.where(corner < 2, line, rows - 1 - line)[..., None]
    left = (corner % 2 == 0)[..., None]
    column = torch.where(left, letter, columns - length[..., None] + letter)
    fits = (row < (rows + 1) // 2) == (corner < 2)[..., None]
    fits = fits & (row >= 0) & (row < rows) & (letter < length[..., None])
    fits = fits & ((column < (columns + 1) // 2) == left) & (column >= 0) & (column < columns)
    # what does not fit goes to a spare cell behind the page
    place = torch.where(fits, row * columns + column, rows * columns).flatten(1)
    spare = rows * columns + 1
    letters = torch.full((count, spare), GLYPHS, device=word.device).scatter_(
        1, place, draws["letters"][:, :used].flatten(1)
    )
    faint = (words - word).clamp(0, 1).to(torch.float32)[None, :, None].expand(count, -1, _LONGEST).flatten(1)
    strength = torch.zeros((count, spare), dtype=torch.float32, device=word.device).scatter_(1, place, faint)
    return letters[:, :-1].view(count, rows, columns), strength[:, :-1].view(count, rows, columns)


def _laid_out(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a page (N, 1, H, W) of cells (N, rows, columns, h, w), cut or filled up with zeros at its far sides."""
    page = cells.transpose(2, 3).flatten(1, 2).flatten(2)[:, None, : size[0], : size[1]]
    return pad(page, (0, size[1] - page.shape[3], 0, size[0] - page.shape[2]))
