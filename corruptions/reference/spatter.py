"""ImageNet-C's spatter in reference mode: drops of water or splashes of mud on the lens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from corruptions._bytes import blocks, in_threads
from corruptions._checks import check_levels
from robustlab.core.corruption import Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng
from robustlab.core.shift import from_bytes

from ._scipy import scipy_kernel
from .base import Reference

_WATER = (175 / 255, 238 / 255, 238 / 255)
_MUD = (63 / 255, 42 / 255, 20 / 255)
_ONE = np.ones(1)

Plane = np.ndarray[Any, np.dtype[Any]]


def smooth(plane: Plane, sigma: float) -> Plane:
    """Return a plane after a Gaussian cut at four sigma, edges repeated, as scikit-image's and SciPy's.

    Sums run in float64; float32 planes are rounded after each axis, as there. At sigma 0 nothing happens.

    Args:
        plane: float64 or float32 (H, W).
        sigma: In pixels.
    """
    kernel = scipy_kernel(sigma)
    if len(kernel) == 1:
        return plane
    for across, down in ((_ONE, kernel), (kernel, _ONE)):
        smoothed = cv2.sepFilter2D(plane, cv2.CV_64F, across, down, borderType=cv2.BORDER_REPLICATE)
        plane = smoothed.astype(plane.dtype, copy=False)
    return plane


def water(liquid: Plane, strength: float) -> Plane:
    """Return how much light drops of water add, before their colour.

    The thresholded liquid, cut to 8 bits (above 1 it wraps, as in the source), is multiplied by an embossed map of
    the distance to its edges, and scaled so that the brightest place has ``strength``. Without any liquid the source
    divides 0 by 0; here nothing is added.

    Args:
        liquid: float64 (H, W), 0 where there is none.
        strength: At the brightest place, of full range.

    Returns:
        float32 (H, W).
    """
    level = (liquid * 255).astype(np.int64).astype(np.uint8)
    distance = cv2.distanceTransform(255 - cv2.Canny(level, 50, 150), cv2.DIST_L2, 5)
    distance = cv2.blur(np.minimum(distance, np.float32(20)), (3, 3)).astype(np.uint8)
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    distance = cv2.filter2D(cv2.equalizeHist(distance), cv2.CV_8U, emboss)
    light = level * cv2.blur(distance, (3, 3)).astype(np.float32)
    top = light.max()
    added: Plane = light / top * np.float32(strength) if top > 0 else light
    return added


def mud(liquid: Plane, threshold: float, sigma: float) -> Plane:
    """Return the opacity of mud: where liquid exceeds the threshold, blurred, and 0 below 0.8.

    Args:
        liquid: float64 (H, W), 0 where there is none.
        threshold: Of the liquid.
        sigma: Of the blur, in pixels.

    Returns:
        float32 (H, W).
    """
    opacity = smooth((liquid > threshold).astype(np.float32), sigma)
    opacity[opacity < 0.8] = 0
    return opacity


def _each(function: Callable[[Plane], Plane], planes: Tensor) -> Tensor:
    """Return float32 planes of a function of each, by ``in_threads``."""
    held = planes.cpu().numpy()
    out = np.empty(held.shape, np.float32)

    def work(start: int, stop: int) -> None:
        for place in range(start, stop):
            out[place] = function(held[place])

    in_threads(work, len(held), held[0].size)
    return torch.from_numpy(out).to(planes.device)


@CORRUPTIONS.register("ref:spatter")
@dataclass(frozen=True)
class RefSpatter(Reference):
    """Spatter of ImageNet-C (one of its extra corruptions): drops of water, or splashes of mud.

    A plane of noise N(mean, std) is smoothed by a Gaussian and set to 0 below the threshold. Water (``mud`` below 0.5):
    out = trunc(255 clip(x + w colour)), pale turquoise, w of ``water``. Mud: out = trunc(255 clip((1 - m) x + m
    colour)), brown, m of ``mud``. All in float32. The 224, 64 and 32 px generators are the same operator with other
    levels. The layer does not depend on the image; it is made on the CPU, also for images on an accelerator, since
    OpenCV and SciPy make it.

    Args:
        mean: Of the noise, of full range.
        std: Of the noise, of full range.
        sigma: Of the Gaussian, in pixels.
        threshold: Below which there is no liquid, of full range.
        strength: For water the light of the brightest place, of full range; for mud the blur of its edge, in pixels.
        mud: 0 for water, 1 for mud; between levels, whichever is nearer.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "weather"
    stage: ClassVar[str] = "subject"
    seen_in: ClassVar[tuple[str, ...] | None] = ()
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    mean: Levels = Levels((0.65, 0.65, 0.65, 0.65, 0.67), identity=0.65, unit="of full range")
    std: Levels = Levels((0.3, 0.3, 0.3, 0.3, 0.4), identity=0.3, unit="of full range")
    sigma: Levels = Levels((4, 3, 2, 1, 1), identity=4.0, unit="px")
    threshold: Levels = Levels((0.69, 0.68, 0.68, 0.65, 0.65), identity=0.69, unit="of full range")
    strength: Levels = Levels((0.6, 0.6, 0.5, 1.5, 1.5), identity=0.0, unit="of full range, or px")
    mud: Levels = Levels((0, 0, 0, 1, 1), identity=0.0, unit="0 water, 1 mud")

    def __post_init__(self) -> None:
        for parameter, low, high in (
            ("mean", 0, 100),
            ("std", 0, 100),
            ("sigma", 0, 100),
            ("threshold", 0, 100),
            ("strength", 0, 100),
            ("mud", 0, 1),
        ):
            check_levels(self, parameter, getattr(self, parameter), low, high)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        return {"layer": rng.normal("layer", shape[1:])}

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        threshold, strength, muddy = values["threshold"], values["strength"], values["mud"] >= 0.5

        def layer(noise: Plane) -> Plane:
            liquid = smooth(noise.astype(np.float64) * values["std"] + values["mean"], values["sigma"])
            liquid[liquid < threshold] = 0
            return mud(liquid, threshold, strength) if muddy else water(liquid, strength)

        cover = _each(layer, draws["layer"])
        out = torch.empty_like(pixels, memory_format=torch.contiguous_format)
        for block in blocks(cover):
            for channel, colour in enumerate(_MUD if muddy else _WATER):
                plane = from_bytes(pixels[block, channel].contiguous())
                if muddy:
                    plane.mul_(1 - cover[block])
                plane.add_(cover[block] * colour)
                out[block, channel] = plane.clamp_(0, 1).mul_(255).to(torch.uint8)
        return out
