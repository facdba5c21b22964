"""ImageNet-C's fog, snow and frost in reference mode.

None of them is met in medical imaging, so there is no physical mode; they complete the published suites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from corruptions._bytes import BLOCK, blocks
from corruptions._checks import check_levels
from robustlab.core.corruption import Draws
from robustlab.core.errors import KindError, RangeError
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng
from robustlab.core.shift import from_bytes

from ._frost import PUBLISHED, content_of, stacked_on
from ._scipy import centre_crop
from .base import Reference
from .motion import RefMotionBlur


def _truncated(values: Tensor) -> Tensor:
    """Return the bytes of float images in [0, 1], cut off as NumPy's ``uint8`` does; changes ``values``."""
    # by way of int32, which processors convert to at four times the speed
    return values.clamp_(0, 1).mul_(255).to(torch.int32).to(torch.uint8)


def _full(value: float, like: Tensor) -> Tensor:
    # a tensor, since CUDA would multiply by the reciprocal of a Python number and miss the value by a digit
    return torch.full((), value, dtype=torch.float64, device=like.device)


def plasma_side(height: int, width: int) -> int:
    """Return the side of the square map for an image: the next power of two, at least 2."""
    return 1 << max(1, (max(height, width) - 1).bit_length())


def plasma(uniforms: Tensor, decay: float) -> Tensor:
    """Return plasma clouds by the diamond-square algorithm on a torus, each scaled to [0, 1].

    From a corner at 0, every level doubles the map: a square's centre, then the middles of a diamond's four corners,
    are the mean of their four neighbours plus a number uniform on [-w^2, w^2]; w starts at 100 and is divided by
    ``decay`` at each level, so amplitudes fall by decay^2.

    Args:
        uniforms: (N, side * side - 1) in [0, 1), side a power of two: level by level, each the numbers of the square
            centres, of the diamonds on the rows, and of the diamonds on the columns of the coarser map.
        decay: Of w, above 0.

    Returns:
        float64 (N, side, side).

    References:
        A. Fournier, D. Fussell, L. Carpenter, "Computer rendering of stochastic models", CACM 25, 1982.
    """
    count = len(uniforms)
    side = math.isqrt(uniforms.shape[1] + 1)
    grid = torch.zeros((count, 1, 1), dtype=torch.float64, device=uniforms.device)
    wibble, used = 100.0, 0
    while grid.shape[1] < side:
        half = grid.shape[1]
        noise = uniforms[:, used : used + 3 * half * half].to(torch.float64).view(count, 3, half, half)
        noise = noise.sub(0.5).mul_(2 * wibble * wibble)
        below = _with_next(grid, 1)
        # a quarter is a power of two, so alpha rounds nothing and fused and plain arithmetic agree
        centre = noise[:, 0].add_(_with_next(below, 2), alpha=0.25)
        finer = torch.empty((count, 2 * half, 2 * half), dtype=torch.float64, device=grid.device)
        finer[:, ::2, ::2] = grid
        finer[:, 1::2, 1::2] = centre
        around = _with_last(centre, 1).add_(_with_next(grid, 2))
        torch.add(noise[:, 1], around, alpha=0.25, out=finer[:, ::2, 1::2])
        around = _with_last(centre, 2).add_(below)
        torch.add(noise[:, 2], around, alpha=0.25, out=finer[:, 1::2, ::2])
        grid, used, wibble = finer, used + 3 * half * half, wibble / decay
    low, high = grid.amin((1, 2), keepdim=True), grid.amax((1, 2), keepdim=True)
    return grid.sub_(low).div_(high.sub_(low))


def _with_next(grid: Tensor, axis: int) -> Tensor:
    """Return each value plus the following one along an axis of the torus."""
    size, out = grid.shape[axis], torch.empty_like(grid)
    torch.add(grid.narrow(axis, 0, size - 1), grid.narrow(axis, 1, size - 1), out=out.narrow(axis, 0, size - 1))
    torch.add(grid.narrow(axis, size - 1, 1), grid.narrow(axis, 0, 1), out=out.narrow(axis, size - 1, 1))
    return out


def _with_last(grid: Tensor, axis: int) -> Tensor:
    """Return each value plus the preceding one along an axis of the torus."""
    size, out = grid.shape[axis], torch.empty_like(grid)
    torch.add(grid.narrow(axis, 1, size - 1), grid.narrow(axis, 0, size - 1), out=out.narrow(axis, 1, size - 1))
    torch.add(grid.narrow(axis, 0, 1), grid.narrow(axis, size - 1, 1), out=out.narrow(axis, 0, 1))
    return out


@CORRUPTIONS.register("ref:fog")
@dataclass(frozen=True)
class RefFog(Reference):
    """Fog of ImageNet-C: plasma clouds added, then the brightest value brought back to where it was.

    out = trunc(255 clip((x + amount P) m / (m + amount))) with m = max x over pixels and channels, in float64.

    The cloud P is ``plasma``, cut from a square map whose side is the next power of two; the 224, 64 and 32 px
    generators are the same operator with other levels. Where the whole image is black, it stays black.

    Args:
        amount: Height of the clouds, of full range.
        decay: Ratio of successive levels' w in ``plasma``; larger is smoother.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "weather"
    stage: ClassVar[str] = "subject"
    seen_in: ClassVar[tuple[str, ...] | None] = ()
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    alike: ClassVar[bool] = True
    amount: Levels = Levels((1.5, 2, 2.5, 2.5, 3), identity=0.0, unit="of full range")
    decay: Levels = Levels((2, 2, 1.7, 1.5, 1.4), identity=2.0, unit="ratio of levels")

    def __post_init__(self) -> None:
        check_levels(self, "amount", self.amount, 0)
        check_levels(self, "decay", self.decay, 0.1, 100)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        side = plasma_side(*shape[1:])
        return {"plasma": rng.uniform("plasma", (side * side - 1,))}

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        height, width = pixels.shape[2:]
        amount = values["amount"]
        out = torch.empty_like(pixels, memory_format=torch.contiguous_format)
        brightest = pixels.amax((1, 2, 3), keepdim=True).to(torch.float64).div_(_full(255, pixels))
        # an image that is black without fog would divide 0 by 0 at amount 0
        level = (brightest + amount).clamp_min_(1e-300)
        for block in blocks(pixels[:, :1], 4 * BLOCK):
            # the coarse levels are small, so many maps at once
            clouds = plasma(draws["plasma"][block], values["decay"])[:, None, :height, :width]
            for part in blocks(pixels[block, :1]):
                cloud = clouds[part] * amount
                top, full = brightest[block][part], level[block][part]
                for channel in range(pixels.shape[1]):
                    plane = pixels[block, channel : channel + 1][part]
                    light = plane.to(torch.float64, memory_format=torch.contiguous_format).div_(_full(255, pixels))
                    light.add_(cloud).mul_(top).div_(full)
                    out[block, channel : channel + 1][part] = _truncated(light)
        return out


@lru_cache(maxsize=64)
def _zoom_taps(size: int, zoom: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return how one axis is zoomed about its centre: rows before and after each place, and the latter's share.

    The crop of ``centre_crop`` is stretched, ends onto ends. SciPy drops a last row whose place is rounded past the
    end; its index is -1 here.
    """
    first, crop, count, trimmed = centre_crop(size, zoom)
    step = (crop - 1) / (count - 1) if count > 1 else 1.0
    place = (np.arange(size) + trimmed) * step
    low = np.floor(place).astype(np.int64)
    share = place - low
    rows = np.minimum(low, crop - 1) + first
    after = np.minimum(low + 1, crop - 1) + first
    rows[place > crop - 1] = -1
    return torch.from_numpy(rows), torch.from_numpy(after), torch.from_numpy(share)


def magnified(planes: Tensor, zoom: float) -> Tensor:
    """Return planes magnified about their centre by linear interpolation, as ImageNet-C does through SciPy's ``zoom``.

    Args:
        planes: float64 (N, H, W).
        zoom: At least 1.
    """
    for axis in (1, 2):
        size = planes.shape[axis]
        rows, after, share = (part.to(planes.device) for part in _zoom_taps(size, zoom))
        share = share.view((-1, 1) if axis == 1 else (-1,))
        low = planes.index_select(axis, rows.clamp_min(0)).mul_(1 - share)
        planes = low.add_(planes.index_select(axis, after).mul_(share))
        lost = (rows < 0).view(share.shape)
        planes = planes.masked_fill_(lost, 0)
    return planes


def _grey(images: Tensor) -> Tensor:
    """Return OpenCV's grey (N, 1, H, W) of float32 images: fused multiply-adds over green, red and blue.

    A product of two float32 numbers is exact in float64, so only the sum is rounded, as in a fused operation.
    """
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    red, green, blue = (images[:, channel : channel + 1] for channel in range(3))
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    total = green * weights[1]
    for plane, weight in ((red, weights[0]), (blue, weights[2])):
        total = plane.to(torch.float64).mul_(weight.to(torch.float64)).add_(total).to(torch.float32)
    return total


@CORRUPTIONS.register("ref:snow")
@dataclass(frozen=True)
class RefSnow(Reference):
    """Snow of ImageNet-C: thresholded, magnified noise, blurred along the fall, over a whitened image.

    A plane of noise N(mean, std) is magnified about its centre, set to 0 below the threshold, cut to 8 bits and
    blurred by ImageMagick's one-sided motion blur at a uniform angle of -135 to -45 degrees. The image becomes
    mix x + (1 - mix) max(x, 1.5 grey + 0.5) in float32; the layer, and the layer turned by 180 degrees, are added in
    float64. The 224, 64 and 32 px generators are the same operator with other levels. Sides that differ are magnified
    each by itself, where the published code takes the height for both.

    Args:
        mean: Of the noise, of full range.
        std: Of the noise, of full range.
        zoom: Magnification of the noise, at least 1.
        threshold: Below which there is no snow, of full range.
        radius: Of the motion blur, whose reach is twice that, in pixels.
        sigma: Of the motion blur's one-sided Gaussian, in pixels.
        mix: Share of the image; the rest is the whitened image.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "weather"
    stage: ClassVar[str] = "subject"
    seen_in: ClassVar[tuple[str, ...] | None] = ()
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    alike: ClassVar[bool] = True
    mean: Levels = Levels((0.1, 0.2, 0.55, 0.55, 0.55), identity=0.0, unit="of full range")
    std: Levels = Levels((0.3, 0.3, 0.3, 0.3, 0.3), identity=0.3, unit="of full range")
    zoom: Levels = Levels((3, 2, 4, 4.5, 2.5), identity=3.0, unit="times")
    threshold: Levels = Levels((0.5, 0.5, 0.9, 0.85, 0.85), identity=0.5, unit="of full range")
    radius: Levels = Levels((10, 12, 12, 12, 12), identity=10.0, unit="px")
    sigma: Levels = Levels((4, 4, 8, 8, 12), identity=4.0, unit="px")
    mix: Levels = Levels((0.8, 0.7, 0.7, 0.65, 0.55), identity=1.0, unit="of the image")

    def __post_init__(self) -> None:
        for parameter, low, high in (
            ("mean", 0, 100),
            ("std", 0, 100),
            ("zoom", 1, 1000),
            ("threshold", 0, 100),
            ("radius", 0, 1000),
            ("sigma", 0.01, 1000),
            ("mix", 0, 1),
        ):
            check_levels(self, parameter, getattr(self, parameter), low, high)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        return {"layer": rng.normal("layer", shape[1:]), "angle": rng.uniform("angle")}

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        layers = torch.empty_like(pixels[:, :1], memory_format=torch.contiguous_format)
        for block in blocks(pixels[:, :1]):
            noise = draws["layer"][block].to(torch.float64).mul_(values["std"]).add_(values["mean"])
            noise = magnified(noise, values["zoom"])
            layers[block, 0] = _truncated(noise.masked_fill_(noise < values["threshold"], 0))
        fall = {"angle": draws["angle"].to(torch.float64).mul_(90).sub_(135)}
        layers = RefMotionBlur().change(layers, fall, values)
        out = torch.empty_like(pixels, memory_format=torch.contiguous_format)
        for block in blocks(pixels[:, :1]):
            snow = layers[block].to(torch.float64).div_(_full(255, pixels))
            turned = snow.flip(2, 3)
            images = from_bytes(pixels[block].contiguous())
            white = torch.maximum(images, _grey(images).mul_(1.5).add_(0.5)).mul_(1 - values["mix"])
            images.mul_(values["mix"]).add_(white)
            for channel in range(pixels.shape[1]):
                plane = images[:, channel : channel + 1].to(torch.float64)
                out[block, channel : channel + 1] = _truncated(plane.add_(snow).add_(turned))
        return out


@CORRUPTIONS.register("ref:frost")
@dataclass(frozen=True)
class RefFrost(Reference):
    """Frost of ImageNet-C: a picture of frost on glass, cut out at random, added to the image.

    out = trunc(clip(image_share q + frost_share f, 0, 255)) in float64, f one of five pictures with equal probability.

    With ``textures``, a folder that holds the published frost pictures (frost1.png to frost3.png, frost4.jpg,
    frost5.jpg), it follows the published code step for step. The pictures are no part of this package; without a folder
    our own take their place, and the label says so: an own design of ridged noise and branching crystals, near the
    published pictures in mean colour and spread. A picture that is no larger than the image is enlarged, where the
    published code fails.

    Args:
        image_share: Factor of the image.
        frost_share: Factor of the frost.
        textures: Folder with the published pictures; empty for our own.
        scale: Factor to which the pictures' sides are reduced first, linearly: 1 in the 224 px generator, 0.3 in the
            64 px and 0.2 in the 32 px one.
        content: Hash of the published pictures, found by itself where the folder can be read: part of what the shift
            is, so that results with other pictures under the same path are not taken for these.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "weather"
    stage: ClassVar[str] = "subject"
    seen_in: ClassVar[tuple[str, ...] | None] = ()
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    image_share: Levels = Levels((1, 0.8, 0.7, 0.65, 0.6), identity=1.0, unit="of the image")
    frost_share: Levels = Levels((0.4, 0.6, 0.7, 0.7, 0.75), identity=0.0, unit="of the frost")
    textures: str = ""
    scale: float = 1.0
    content: str = field(default="", repr=False)

    @property
    def label(self) -> str:
        return super().label if self.textures else f"{super().label} (drawn)"

    def __post_init__(self) -> None:
        check_levels(self, "image_share", self.image_share, 0, 1)
        check_levels(self, "frost_share", self.frost_share, 0, 1)
        if not isinstance(self.textures, str):
            raise KindError(
                "RefFrost", "textures as a string", repr(self.textures), 'Name a folder, or write "" for our own.'
            )
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float):
            raise KindError("RefFrost", "scale as a number from 0.01 to 1", repr(self.scale), "Write e.g. scale=0.3.")
        if not 0.01 <= self.scale <= 1:
            raise RangeError("RefFrost", "scale from 0.01 to 1", f"{self.scale}", "1 leaves the pictures as they are.")
        # what was stored stands where the folder is out of reach, as for reading a report on another machine
        object.__setattr__(self, "content", content_of(self.textures) or (self.content if self.textures else ""))

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        return {"picture": rng.integers("picture", len(PUBLISHED)), "place": rng.uniform("place", (2,))}

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        height, width = pixels.shape[2:]
        stack, sides = stacked_on(pixels.device, self.textures, self.scale, height, width)
        picture = draws["picture"]
        free = sides[picture] - torch.tensor((height, width), device=pixels.device)
        # uniforms are multiples of 2^-24, so the product is exact
        start = draws["place"].to(torch.float64).mul(free).to(torch.int64)
        windows = stack.unfold(2, height, 1).unfold(3, width, 1)
        out = torch.empty_like(pixels, memory_format=torch.contiguous_format)
        for block in blocks(pixels[:, :1]):
            frost = windows[picture[block], :, start[block, 0], start[block, 1]]
            image = pixels[block].contiguous().to(torch.float64).mul_(values["image_share"])
            image.add_(frost.to(torch.float64).mul_(values["frost_share"]))
            out[block] = image.clamp_(0, 255).to(torch.int32).to(torch.uint8)
        return out
