"""Brightness, contrast, gamma and saturation as published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from corruptions._bytes import every_level, in_threads, interleaved, look_up, pixel_blocks, planar, sums
from corruptions._checks import check_levels
from robustlab.core.corruption import Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS

from .base import Reference, grey_of

# Pillow's weights, and a half to round up; 65536 x 255 + 32768 is below 2^24, so float32 holds every sum exactly
_LUMA = np.array([[19595, 38470, 7471, 32768]]) / 65536


@lru_cache(maxsize=64)
def blend_table(factor: float) -> Tensor:
    """Return Pillow's blend m + factor (q - m), cut off below the point, as uint8 [m, q] (256, 256), by Pillow."""
    levels = np.arange(256, dtype=np.uint8)
    start, end = np.repeat(levels[:, None], 256, 1), np.repeat(levels[None], 256, 0)
    blended = Image.blend(Image.fromarray(start), Image.fromarray(end), factor)
    return torch.from_numpy(np.array(blended))


@CORRUPTIONS.register("ref:brightness")
@dataclass(frozen=True)
class RefBrightness(Reference):
    """Pillow's ImageEnhance.Brightness as in MedMNIST-C: factor q, digits cut off, at most 255.

    Args:
        factor: Above 1 brightens, below 1 darkens. Levels of MedMNIST-C for ChestMNIST.

    References:
        F. Di Salvo et al., "MedMNIST-C: comprehensive benchmark and improved classifier robustness by simulating
        realistic image corruptions", 2024, 2406.17536.
    """

    family: ClassVar[str] = "contrast"
    stage: ClassVar[str] = "exposure"
    alike: ClassVar[bool] = True
    factor: Levels = Levels((1.1, 1.2, 1.3, 1.4, 1.5), identity=1.0, unit="x grey level")

    def __post_init__(self) -> None:
        check_levels(self, "factor", self.factor, 0, 100)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        return look_up(pixels, blend_table(values["factor"])[0].to(pixels.device))


@CORRUPTIONS.register("ref:contrast")
@dataclass(frozen=True)
class RefContrast(Reference):
    """Pillow's ImageEnhance.Contrast as in MedMNIST-C: m + factor (q - m) about the rounded mean m of the luma.

    Args:
        factor: Above 1 raises contrast, below 1 lowers it. Levels of MedMNIST-C for ChestMNIST, "up".

    References:
        F. Di Salvo et al., "MedMNIST-C: comprehensive benchmark and improved classifier robustness by simulating
        realistic image corruptions", 2024, 2406.17536.
    """

    family: ClassVar[str] = "contrast"
    stage: ClassVar[str] = "processing"
    alike: ClassVar[bool] = True
    factor: Levels = Levels((1.1, 1.2, 1.3, 1.4, 1.6), identity=1.0, unit="x contrast")

    def __post_init__(self) -> None:
        check_levels(self, "factor", self.factor, 0, 100)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        count = pixels.shape[2] * pixels.shape[3]
        pivot = (2 * luma_sums(pixels) + count) // (2 * count)
        # plain indexing would wake torch's threads for so few bytes
        return look_up(pixels, blend_table(values["factor"]).to(pixels.device).index_select(0, pivot))


def luma_sums(pixels: Tensor) -> Tensor:
    """Return the sum of Pillow's luma over each image, int64 (N,), of uint8 images of 1 or 3 channels."""
    if pixels.shape[1] == 1:
        return sums(pixels)[:, 0]
    if pixels.device.type != "cpu":
        return sums(grey_of(pixels))[:, 0]
    images = interleaved(pixels)
    totals = np.empty(len(images))

    def work(start: int, stop: int) -> None:
        colours, luma = (np.empty(shape, np.float32) for shape in (images.shape[1:], images.shape[1:3]))
        for place in range(start, stop):
            np.copyto(colours, images[place])
            cv2.transform(colours, _LUMA, dst=luma)
            totals[place] = cv2.sumElems(np.floor(luma, out=luma))[0]

    in_threads(work, len(images), images[0].size)
    return torch.from_numpy(totals).to(torch.int64)


@CORRUPTIONS.register("ref:gamma")
@dataclass(frozen=True)
class RefGamma(Reference):
    """torchvision's adjust_gamma on Pillow images as in MedMNIST-C: floor(255.999 (q / 255)^gamma).

    Args:
        gamma: Above 1 darkens (MedMNIST-C calls it "up"). Levels of MedMNIST-C for ChestMNIST, "up".

    References:
        F. Di Salvo et al., "MedMNIST-C: comprehensive benchmark and improved classifier robustness by simulating
        realistic image corruptions", 2024, 2406.17536.
    """

    family: ClassVar[str] = "contrast"
    stage: ClassVar[str] = "processing"
    alike: ClassVar[bool] = True
    gamma: Levels = Levels((1.1, 1.2, 1.3, 1.4, 1.6), identity=1.0, unit="exponent")

    def __post_init__(self) -> None:
        check_levels(self, "gamma", self.gamma, 0, 100)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        curve = [int((256 - 1e-3) * pow(level / 255, values["gamma"])) for level in range(256)]
        return look_up(pixels, torch.tensor(curve, dtype=torch.uint8, device=pixels.device))


@CORRUPTIONS.register("ref:mean-contrast")
@dataclass(frozen=True)
class RefMeanContrast(Reference):
    """Contrast of ImageNet-C: m + factor (x - m) about the mean m of each channel in float64, digits cut off.

    Args:
        factor: Share of contrast that is left. Levels of ImageNet-C at 224 px.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "contrast"
    stage: ClassVar[str] = "processing"
    alike: ClassVar[bool] = True
    factor: Levels = Levels((0.4, 0.3, 0.2, 0.1, 0.05), identity=1.0, unit="of original contrast")

    def __post_init__(self) -> None:
        check_levels(self, "factor", self.factor, 0, 100)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        count = torch.full((), 255.0 * pixels.shape[2] * pixels.shape[3], dtype=torch.float64, device=pixels.device)
        mean = (sums(pixels).to(torch.float64) / count)[..., None]
        table = _contrast_table(mean, values["factor"])
        # the running sum of the source ends up to 1e-12 beside the exact one, which shows at whole grey levels only
        close = ((table - table.round()).abs() < 1e-6).any(2)
        if bool(close.any()):
            mean[close] = _running_mean(pixels[close])[:, None]
            table = _contrast_table(mean, values["factor"])
        return look_up(pixels, table.clamp_(0, 255).to(torch.uint8))


def _contrast_table(mean: Tensor, factor: float) -> Tensor:
    """Return what the 256 levels become, in grey levels and not yet clipped, float64 (N, C, 256)."""
    return ((_unit(torch.arange(256, device=mean.device)) - mean) * factor + mean).mul_(255)


def _running_mean(planes: Tensor) -> Tensor:
    """Return means, float64 (K,), of uint8 planes (K, H, W) summed one pixel after the other, as NumPy does."""
    whole = np.cumsum(planes.flatten(1).cpu().numpy() / 255.0, axis=1)[:, -1] / planes[0].numel()
    return torch.from_numpy(whole).to(planes.device)


def _unit(pixels: Tensor) -> Tensor:
    """Return pixels / 255 in float64, correctly rounded on any device."""
    return pixels.to(torch.float64).div_(torch.full((), 255.0, dtype=torch.float64, device=pixels.device))


def hsv_values(
    pixels: Tensor, *, gain: float = 1.0, offset: float = 0.0, lift: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest, middle and smallest channel after clip(gain S + offset) and clip(V + lift) in HSV.

    They are V', V' (1 - g S') and V' (1 - S'), with the hue's distance g from the largest channel. Every operation that
    rounds is the one of scikit-image's way to HSV and back, in its order: where the exact result is a whole grey level
    the last digit decides, for digits are cut off later.

    Args:
        pixels: uint8 (N, 3, P).
        gain: Factor of the saturation.
        offset: Added to the saturation, after the factor.
        lift: Added to the value.

    Returns:
        Three float64 (N, P) in [0, 1]; the middle one means nothing where two channels are equal.
    """
    red, green, blue = pixels.unbind(1)
    most, least = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    # the hue counts from blue where blue is largest, else from green, else from red
    is_blue = _mask(blue == most)
    is_green = _mask(green == most)
    first = _select(is_blue, red, _select(is_green, blue, green))
    second = _select(is_blue, green, _select(is_green, red, blue))
    base = _select(is_blue, torch.full_like(red, 4), is_green & 2)
    value = _unit(most)
    spread = value - _unit(least)
    # greys divide 0 by a number instead of by 0
    hue = (_unit(first) - _unit(second)).div_(spread.clamp_min(1e-3)).add_(base)
    hue.div_(torch.full((), 6.0, dtype=torch.float64, device=pixels.device))
    hue.sub_(hue.floor()).mul_(6)
    part = hue.sub_(hue.floor())
    # in even sixths of the circle the middle channel rises, which is where the difference is not negative
    distance = part.neg_().add_((first >= second).to(torch.float64)).abs_()
    saturation = spread.div_(value.clamp_min(1e-3))
    if gain != 1.0 or offset != 0.0:
        saturation.mul_(gain).add_(offset).clamp_(0, 1)
    bright = (value + lift).clamp_(0, 1) if lift != 0.0 else value
    middle = distance.mul_(saturation).neg_().add_(1).mul_(bright)
    return bright, middle, saturation.neg_().add_(1).mul_(bright)


def _mask(condition: Tensor) -> Tensor:
    """Return uint8 255 where true, else 0."""
    return condition.view(torch.uint8).neg()


def _select(mask: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return bytes of ``one`` where the mask is 255, of ``other`` where it is 0; many times as fast as torch.where."""
    return torch.bitwise_xor(one, other).bitwise_and_(mask).bitwise_xor_(other)


def _hsv_block(pixels: Tensor, gain: float, offset: float, lift: float) -> Tensor:
    """Return uint8 (N, 3, P) of ``hsv_values``, digits cut off; greys have hue 0, so an offset on S reddens them."""
    top, middle, low = (
        each.mul_(255).to(torch.uint8) for each in hsv_values(pixels, gain=gain, offset=offset, lift=lift)
    )
    most, least = pixels.amax(1), pixels.amin(1)
    coloured = _mask(most != least)
    out = torch.empty_like(pixels)
    for channel, plane in enumerate(pixels.unbind(1)):
        largest = _mask(plane == most)
        if channel:
            largest &= coloured
        out[:, channel] = _select(largest, top, _select(_mask(plane == least), low, middle))
    return out


def _hsv_bytes(pixels: Tensor, *, gain: float = 1.0, offset: float = 0.0, lift: float = 0.0) -> Tensor:
    """Return uint8 images (N, 3, H, W) after a change of saturation or value, in blocks on the CPU."""
    count, _, height, width = pixels.shape
    flat = planar(pixels).reshape(count, 3, height * width)
    if pixels.device.type != "cpu":
        return _hsv_block(flat, gain, offset, lift).reshape(pixels.shape)
    out = torch.empty_like(flat)
    for block, part in pixel_blocks(flat):
        out[block, :, part] = _hsv_block(flat[block, :, part], gain, offset, lift)
    return out.reshape(pixels.shape)


@CORRUPTIONS.register("ref:hsv-brightness")
@dataclass(frozen=True)
class RefHSVBrightness(Reference):
    """Brightness of ImageNet-C: clip(V + offset) in HSV by scikit-image in float64, digits cut off.

    Args:
        offset: Added to the value V in [0, 1]. Levels of ImageNet-C at 224 px.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "contrast"
    stage: ClassVar[str] = "exposure"
    alike: ClassVar[bool] = True
    offset: Levels = Levels((0.1, 0.2, 0.3, 0.4, 0.5), identity=0.0, unit="of full range")

    def __post_init__(self) -> None:
        check_levels(self, "offset", self.offset, 0, 1)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        if pixels.shape[1] == 3:
            return _hsv_bytes(pixels, lift=values["offset"])
        greys = _hsv_bytes(every_level(1, 3, pixels.device), lift=values["offset"])
        return look_up(pixels, greys[0, 0, 0])


@CORRUPTIONS.register("ref:saturate")
@dataclass(frozen=True)
class RefSaturate(Reference):
    """Saturation of ImageNet-C and MedMNIST-C: clip(gain S + offset) in HSV by scikit-image in float64, digits cut off.

    A fault that comes with it: grey pixels have hue 0, so an offset turns a white slide pink.

    Args:
        gain: Factor of the saturation; 1 in MedMNIST-C. Levels of ImageNet-C at 224 px.
        offset: Added after it.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
        F. Di Salvo et al., "MedMNIST-C: comprehensive benchmark and improved classifier robustness by simulating
        realistic image corruptions", 2024, 2406.17536.
    """

    family: ClassVar[str] = "staining"
    stage: ClassVar[str] = "processing"
    seen_in: ClassVar[tuple[str, ...] | None] = ("histology", "microscopy", "dermoscopy", "fundus", "endoscopy")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    gain: Levels = Levels((0.3, 0.1, 2, 5, 20), identity=1.0, unit="x saturation")
    offset: Levels = Levels((0, 0, 0, 0.1, 0.2), identity=0.0, unit="of full saturation")

    def __post_init__(self) -> None:
        check_levels(self, "gain", self.gain, 0)
        check_levels(self, "offset", self.offset, 0, 1)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        return _hsv_bytes(pixels, gain=values["gain"], offset=values["offset"])

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        if pixels.shape[1] == 3:
            return self.change(pixels, draws, values)
        return look_up(pixels, grey_of(self.change(every_level(1, 3, pixels.device), draws, values))[0, 0, 0])
