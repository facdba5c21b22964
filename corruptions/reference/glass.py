"""Glass blur as published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from corruptions._bytes import blocks
from corruptions._checks import check_levels
from robustlab.core.corruption import Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng

from ._scipy import gaussian
from .base import Reference


def take(flat: Tensor, index: Tensor) -> Tensor:
    """Return (N, C, M) of values (N, C, L) at index int32 (N, M), the same for all channels."""
    if len(flat) == 1:  # much faster on the CPU
        return flat[0].index_select(1, index[0])[None]
    return flat.gather(2, index.to(torch.int64)[:, None].expand(-1, flat.shape[1], -1))


def chain_ends(row: Tensor, column: Tensor, reach: int) -> Tensor:
    """Return where each pixel's value comes from after one pass of the published loop.

    The loop runs over the interior from its last pixel to its first and means to exchange each with the pixel at a
    random offset. The exchange assigns through NumPy views, so it only copies: pixel p takes what f(p) = p + offset
    holds at that time, which is f(p)'s original value unless p's turn came after f(p)'s. The source is therefore the
    end of the chain p, f(p), f(f(p)), ..., which goes on while the next pixel is an interior one that comes later in
    memory. Chains are followed all at once by doubling pointers.

    Args:
        row: int32 (N, H, W), vertical offset of each pixel in [-reach, reach).
        column: int32 (N, H, W), horizontal offset.
        reach: Farthest offset; the interior is reach < index <= size - reach along each axis.

    Returns:
        int32 (N, H W), index of the source pixel in its image.

    References:
        W. D. Hillis, G. L. Steele, "Data parallel algorithms", Communications of the ACM 29, 1986 (pointer doubling).
    """
    count, height, width = row.shape
    device = row.device
    here = torch.arange(height * width, dtype=torch.int32, device=device).view(1, height, width)
    inside = slice(reach + 1, height - reach + 1), slice(reach + 1, width - reach + 1)
    source = here.repeat(count, 1, 1)
    source[:, *inside] += row[:, *inside] * width + column[:, *inside]
    inner = torch.zeros(height * width, dtype=torch.bool, device=device)
    inner.view(height, width)[inside] = True
    flat = source.view(count, -1)
    on = inner.index_select(0, flat.view(-1)).view(flat.shape).logical_and_(flat > here.view(1, -1))
    start = torch.arange(count, dtype=torch.int32, device=device)[:, None] * (height * width)
    link = torch.where(on, flat, here.view(1, -1)).add_(start).view(-1)
    most = (height * width).bit_length()
    for _ in range(most):
        further = link.index_select(0, link)
        if device.type == "cpu" and torch.equal(further, link):
            break
        link = further
    return flat.reshape(-1).index_select(0, link).view(flat.shape)


def glass_blur(pixels: Tensor, row: Tensor, column: Tensor, sigma: float, reach: int) -> Tensor:
    """Return uint8 images blurred, displaced pixel by pixel in the published order, and blurred again.

    Args:
        pixels: uint8 (N, C, H, W).
        row: int32 (N, passes, H, W), vertical offset in [-reach, reach) of each pixel in each pass.
        column: int32 (N, passes, H, W), horizontal offset.
        sigma: Of the Gaussian, in pixels.
        reach: Farthest offset.
    """
    # a tensor, since CUDA would multiply by the reciprocal of a Python number
    top = torch.full((), 255.0, dtype=torch.float64, device=pixels.device)
    images = pixels.contiguous().to(torch.float64).div_(top)
    images = _by_channel(images, sigma).mul_(255).trunc_().div_(top)
    source: Tensor | None = None
    for turn in range(row.shape[1]):
        ends = chain_ends(row[:, turn], column[:, turn], reach)
        source = ends if source is None else take(source[:, None], ends)[:, 0]
    if source is not None:
        images = take(images.flatten(2), source).view(images.shape)
    return _by_channel(images, sigma).clamp_(0, 1).mul_(255).to(torch.uint8)


def _by_channel(images: Tensor, sigma: float) -> Tensor:
    """Blur one channel at a time: what lies between stays in a processor's cache."""
    return torch.stack([gaussian(plane, sigma, 4.0, "nearest") for plane in images.unbind(1)], dim=1)


@CORRUPTIONS.register("ref:glass-blur")
@dataclass(frozen=True)
class RefGlassBlur(Reference):
    """Glass blur of ImageNet-C, with its fault: pixels are copied over one another instead of exchanged.

    Most of the source pixels are lost, and since no offset equals +reach, content drifts by one to two pixels down and
    to the right.

    Args:
        sigma: Of the Gaussian before and after, in pixels.
        reach: Farthest offset, in pixels, rounded to an integer.
        iterations: Passes over the image, 0 to 100, rounded to an integer.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "blur"
    stage: ClassVar[str] = "optics"
    seen_in: ClassVar[tuple[str, ...] | None] = ("endoscopy", "fundus")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    alike: ClassVar[bool] = True
    sigma: Levels = Levels((0.7, 0.9, 1.0, 1.1, 1.5), identity=0.0, unit="px")
    reach: Levels = Levels((1, 2, 2, 3, 4), identity=0.0, unit="px")
    iterations: Levels = Levels((2, 1, 3, 2, 2), identity=0.0, unit="passes")

    def __post_init__(self) -> None:
        check_levels(self, "sigma", self.sigma, 0, 1000)
        check_levels(self, "reach", self.reach, 0, 1000)
        check_levels(self, "iterations", self.iterations, 0, 100)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        passes = round(max(self.iterations.values))
        bits = rng.bits("offsets", passes * shape[1] * shape[2])
        return {"bits": bits.view(len(rng), passes, *shape[1:])}

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        sigma, reach, passes = values["sigma"], round(values["reach"]), round(values["iterations"])
        bits = draws["bits"][:, :passes]
        out = torch.empty_like(pixels, memory_format=torch.contiguous_format)
        for part in blocks(pixels):
            row, column = (
                (half & 0xFFFF).mul_(2 * reach).bitwise_right_shift_(16).sub_(reach)
                for half in (bits[part] >> 16, bits[part])
            )
            out[part] = glass_blur(pixels[part], row, column, sigma, reach)
        return out
