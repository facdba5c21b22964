"""Frost for ``ref:frost``: the published pictures where a folder has them, else pictures of our own drawing."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from robustlab.core.errors import DataFileError
from robustlab.core.rng import SampleRng

PUBLISHED = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
"""The pictures that the published code draws from; it names a sixth, which is never drawn."""

Picture = np.ndarray[Any, np.dtype[np.uint8]]
Plane = np.ndarray[Any, np.dtype[np.float64]]

_HEIGHT, _WIDTH = 512, 768
# red, green and blue mean, and standard deviation, near those of the published pictures
_LOOKS = (
    ((100.0, 148.0, 165.0), 20.0),
    ((201.0, 206.0, 214.0), 22.0),
    ((196.0, 204.0, 216.0), 22.0),
    ((138.0, 152.0, 165.0), 29.0),
    ((112.0, 123.0, 135.0), 43.0),
)


def content_of(folder: str) -> str:
    """Return a hash of the published pictures' bytes, 32 hexadecimal digits; empty where one of them is missing."""
    paths = [Path(folder) / name for name in PUBLISHED]
    if not folder or not all(path.is_file() for path in paths):
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(hashlib.blake2b(path.read_bytes()).digest())
    return digest.hexdigest()


@lru_cache(maxsize=4)
def pictures(folder: str) -> tuple[Picture, ...]:
    """Return five frost pictures, uint8 (H, W, 3) RGB.

    Args:
        folder: Where the published pictures lie; an empty string stands for our own.

    Raises:
        DataFileError: The folder, or one of its five pictures, is missing or cannot be read.
    """
    if not folder:
        return tuple(_drawn(number) for number in range(len(_LOOKS)))
    found = []
    for name in PUBLISHED:
        path = Path(folder) / name
        picture = cv2.imread(str(path)) if path.is_file() else None
        if picture is None:
            raise DataFileError(
                "RefFrost",
                f"textures as a folder with the pictures {', '.join(PUBLISHED)}",
                f"no readable {name} in {folder!r}",
                "Copy ImageNet-C's frost pictures there, or leave textures empty for robustlab's own frost.",
            )
        found.append(np.ascontiguousarray(picture[..., ::-1]))
    return tuple(found)


@lru_cache(maxsize=4)
def stacked(folder: str, scale: float, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the five pictures, scaled, and larger than an image by a pixel or more.

    A picture that is too small after scaling, where the published code fails, is enlarged by the least factor that
    makes it ten per cent larger than the image, with cubic interpolation.

    Args:
        folder: As in ``pictures``.
        scale: Factor of both sides.
        height: Of the image.
        width: Of the image.

    Returns:
        uint8 (5, 3, H, W), the pictures in the upper left corners, and their sides, int64 (5, 2).
    """
    scaled = []
    for picture in pictures(folder):
        fit = picture if scale == 1 else cv2.resize(picture, (0, 0), fx=scale, fy=scale)
        if fit.shape[0] <= height or fit.shape[1] <= width:
            factor = 1.1 * max((height + 1) / picture.shape[0], (width + 1) / picture.shape[1])
            size = (math.ceil(picture.shape[1] * factor), math.ceil(picture.shape[0] * factor))
            fit = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)
        scaled.append(fit)
    sides = torch.tensor([picture.shape[:2] for picture in scaled])
    stack = torch.zeros((len(scaled), 3, *sides.amax(0).tolist()), dtype=torch.uint8)
    for place, picture in zip(stack, scaled, strict=True):
        place[:, : picture.shape[0], : picture.shape[1]] = torch.from_numpy(picture).permute(2, 0, 1)
    return stack, sides


@lru_cache(maxsize=4)
def stacked_on(device: torch.device, folder: str, scale: float, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return what ``stacked`` does, on a device, where it is kept for the next batch."""
    stack, sides = stacked(folder, scale, height, width)
    return stack.to(device), sides.to(device)


def _drawn(number: int) -> Picture:
    """Return a picture of frost on a window pane, drawn from noise and branching crystals."""
    rng = SampleRng.make(0, "frost", torch.tensor([number]))
    haze: Plane = np.zeros((_HEIGHT, _WIDTH))
    for cells in (4, 9, 19, 40, 85, 180):
        haze += _ridges(rng, cells) / cells**0.7
    needles = _needles(rng)
    grain = np.asarray(rng.uniform("grain", (_HEIGHT, _WIDTH))[0].numpy(), dtype=np.float64)
    ice = _standard(haze) + 1.1 * _standard(needles) + 0.15 * _standard(grain)
    means, deviation = _LOOKS[number]
    ice = np.clip(_standard(ice), -2.5, 2.5) * deviation
    # thick ice scatters white, thin ice leaves the colour of what lies behind
    colour = np.asarray(means) + ice[..., None] * np.asarray((1.06, 1.0, 0.94))
    picture: Picture = np.clip(np.rint(colour), 0, 255).astype(np.uint8)
    return picture


def _standard(plane: Plane) -> Plane:
    standard: Plane = (plane - plane.mean()) / plane.std()
    return standard


def _ridges(rng: SampleRng, cells: int) -> Plane:
    """Return ridged noise, 1 - |2 v - 1| of smooth noise v on a lattice of ``cells`` to the height."""
    columns = cells * _WIDTH // _HEIGHT
    lattice = rng.uniform(f"ridges-{cells}", (cells + 1, columns + 1))[0].numpy().astype(np.float64)
    for axis, (size, count) in enumerate(((_HEIGHT, cells), (_WIDTH, columns))):
        place = np.arange(size) * (count / size)
        low = np.floor(place).astype(np.int64)
        share = place - low
        share = (share * share * (3 - 2 * share)).reshape((-1, 1) if axis == 0 else (1, -1))
        lattice = lattice.take(low, axis) * (1 - share) + lattice.take(low + 1, axis) * share
    return 1 - np.abs(2 * lattice - 1)


def _needles(rng: SampleRng) -> Plane:
    """Return crystals: streaks with side branches at 60 degrees, and branches on those, brightest along the stems."""
    count = 110
    start = rng.uniform("start", (count, 2))[0].numpy().astype(np.float64) * (_HEIGHT, _WIDTH)
    angle = rng.uniform("angle", (count,))[0].numpy().astype(np.float64) * math.tau
    length = 25 + 150 * rng.uniform("length", (count,))[0].numpy().astype(np.float64) ** 2
    plane: Plane = np.zeros((_HEIGHT, _WIDTH))
    light = 1.0
    for _ in range(3):
        step = np.stack((np.sin(angle), np.cos(angle)), 1)
        share = np.arange(0, 1, 1 / math.ceil(length.max()))
        points = start[:, None] + step[:, None] * (length[:, None] * share)[..., None]
        row, column = np.rint(points).astype(np.int64).transpose(2, 0, 1)
        bright = np.broadcast_to(light * (1 - 0.8 * share), row.shape)
        np.maximum.at(plane, (row % _HEIGHT, column % _WIDTH), bright)
        knots = np.arange(12) * 0.075 + 0.08
        start = (start[:, None] + step[:, None] * (length[:, None] * knots)[..., None]).reshape(-1, 2)
        start = np.concatenate((start, start))
        angle = np.repeat(angle, len(knots))
        angle = np.concatenate((angle - math.pi / 3, angle + math.pi / 3))
        length = np.tile((length[:, None] * (1 - knots) * 0.32).reshape(-1), 2)
        light *= 0.75
    soft = plane
    for axis in (0, 1):
        soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
    return np.maximum(plane * 0.8, soft)
