"""Lossy compression."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

import cv2
import numpy as np
from PIL import Image
from torch import Tensor

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.shift import from_bytes, to_bytes

from ._bytes import Pixels, each_image
from ._checks import check_levels
from ._jpeg import round_trip


def jpeg(image: Pixels, quality: int) -> Pixels:
    """Return a uint8 image (H, W) or (H, W, 3) after JPEG at libjpeg ``quality`` 1 to 100, 4:2:0 for colour."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality, subsampling=2)
    return np.asarray(Image.open(buffer))


def _opencv_jpeg(image: Pixels, quality: int) -> Pixels:
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    if image.ndim == 2:
        return np.asarray(cv2.imdecode(cv2.imencode(".jpg", image, options)[1], cv2.IMREAD_GRAYSCALE))
    coded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1]
    decoded = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR))
    return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), dtype=np.uint8)


@lru_cache(maxsize=1)
def _opencv_is_pillow() -> bool:
    """Return whether OpenCV's JPEG gives Pillow's pixels: wheels of both hold libjpeg-turbo, other builds may not.

    OpenCV spends less around the codec, so that an image takes about half as long.
    """
    noise = np.random.default_rng(0).integers(0, 256, (43, 59, 3), dtype=np.uint8)
    ramp = (np.indices((43, 59)).sum(0)[..., None] * np.array([1, 2, 3])).astype(np.uint8)
    return all(
        np.array_equal(jpeg(image, quality), _opencv_jpeg(image, quality))
        for colour in (noise, ramp)
        for image in (colour, colour[..., 0].copy())
        for quality in (5, 40, 90)
    )


def compress(pixels: Tensor, quality: float) -> Tensor:
    """Return uint8 images (N, C, H, W) after JPEG: the pixels that Pillow decodes, on any device.

    Args:
        pixels: uint8; 3 channels are coded as colour, others as grey images each.
        quality: libjpeg quality, rounded to an integer from 1 to 100.
    """
    whole = min(100, max(1, round(quality)))
    if pixels.device.type != "cpu":
        return round_trip(pixels, whole)
    return each_image(partial(_opencv_jpeg if _opencv_is_pillow() else jpeg, quality=whole), pixels)


@CORRUPTIONS.register("jpeg")
@dataclass(frozen=True)
class JPEG(Corruption):
    """JPEG of 8-bit pixels, as by Pillow; colour as 4:2:0, any other number of channels as grey images each.

    Args:
        quality: libjpeg quality, 1 to 100, rounded to an integer.

    References:
        G. K. Wallace, "The JPEG still picture compression standard", 1992.
    """

    family: ClassVar[str] = "compression"
    stage: ClassVar[str] = "compression"
    gradual: ClassVar[bool] = False
    quality: Levels = Levels((50, 30, 20, 13, 8), identity=100.0, unit="libjpeg quality", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "quality", self.quality, 1, 100)

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        return from_bytes(self.apply_bytes(to_bytes(images), draws, values))

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        return compress(pixels, values["quality"])
