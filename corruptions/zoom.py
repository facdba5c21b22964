"""Blur by motion along the line of sight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.shift import from_bytes, to_bytes

from ._bytes import BLOCK, blocks
from ._checks import check_levels

_SPACING = 14  # pixels of the longer side for each zoom: at zoom 1.3 the corners of two layers lie 1.6 px apart


def zoom_mean(images: Tensor, zoom: float) -> Tensor:
    """Return the mean over zooms z from 1 to ``zoom`` of the image enlarged z times about its centre.

    Layers are interpolated bilinearly, at the midpoints of equal steps of z, as many as the longer side has 14 px but
    at least 16. The centre of every layer is the centre of the image, whatever its shape.

    Args:
        images: float32 (N, C, H, W).
        zoom: Largest zoom factor, at least 1.
    """
    height, width = images.shape[2:]
    layers = max(16, math.ceil(max(height, width) / _SPACING))
    device = images.device
    down, right = (
        (torch.arange(size, dtype=torch.float32, device=device) * 2 + (1 - size)) / size for size in (height, width)
    )
    total = torch.zeros(images.shape, dtype=torch.float32, device=device)
    source = images.contiguous()
    for layer in range(layers):
        scale = 1 / (1 + (zoom - 1) * (layer + 0.5) / layers)
        rows, columns = (down * scale)[:, None].expand(height, width), (right * scale).expand(height, width)
        grid = torch.stack((columns, rows), dim=2)
        total.add_(
            grid_sample(
                source,
                grid.expand(len(images), -1, -1, -1),
                mode="bilinear",
                padding_mode="border",
                align_corners=False,
            )
        )
    return total.mul_(1 / layers)


def _blocks(images: Tensor) -> Iterator[slice]:
    """Yield larger blocks than elsewhere, since the images of a block share each grid."""
    return blocks(images, 4 * BLOCK)


@CORRUPTIONS.register("zoom-blur")
@dataclass(frozen=True)
class ZoomBlur(Corruption):
    """A camera that moves towards the subject during the exposure: the mean over all zoom factors from 1 to ``zoom``.

    The centre stays sharp and is blurred less than the border.

    Args:
        zoom: Largest zoom factor, 1 to 4.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "blur"
    stage: ClassVar[str] = "subject"
    seen_in: ClassVar[tuple[str, ...] | None] = ("dermoscopy",)
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    zoom: Levels = Levels((1.04, 1.08, 1.13, 1.20, 1.30), identity=1.0, unit="x largest zoom")

    def __post_init__(self) -> None:
        check_levels(self, "zoom", self.zoom, 1, 4)

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        out = torch.empty_like(images, memory_format=torch.contiguous_format)
        for part in _blocks(images):
            out[part] = zoom_mean(images[part], values["zoom"])
        return out

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        out = torch.empty_like(pixels, memory_format=torch.contiguous_format)
        for part in _blocks(pixels):
            out[part] = to_bytes(zoom_mean(from_bytes(pixels[part]), values["zoom"]))
        return out
