"""Lossy compression."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng

from ._checks import check_levels


def jpeg(image: np.ndarray[Any, np.dtype[np.uint8]], quality: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a uint8 image (H, W) or (H, W, 3) after JPEG at libjpeg ``quality`` 1 to 100, 4:2:0 for colour."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality, subsampling=2)
    return np.asarray(Image.open(buffer))


@CORRUPTIONS.register("jpeg")
@dataclass(frozen=True)
class JPEG(Corruption):
    """JPEG compression by Pillow on 8-bit pixels; colour as 4:2:0, any other number of channels as grey images each.

    Args:
        quality: libjpeg quality, 1 to 100, rounded to an integer.

    References:
        G. K. Wallace, "The JPEG still picture compression standard", 1992.
    """

    family: ClassVar[str] = "compression"
    quality: Levels = Levels((50, 30, 20, 13, 8), identity=100.0, unit="libjpeg quality", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "quality", self.quality, 1, 100)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del rng, shape
        return {}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        quality = min(100, max(1, round(values["quality"])))
        pixels = (images * 255).round_().to("cpu", torch.uint8)
        if images.shape[1] == 3:
            coded = np.stack([jpeg(image, quality) for image in pixels.permute(0, 2, 3, 1).contiguous().numpy()])
            stored = torch.from_numpy(coded).permute(0, 3, 1, 2).contiguous()
        else:
            planes = pixels.flatten(0, 1).numpy()
            stored = torch.from_numpy(np.stack([jpeg(plane, quality) for plane in planes])).reshape(pixels.shape)
        return stored.to(images.device, torch.float32).div_(255)
