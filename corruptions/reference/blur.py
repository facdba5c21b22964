"""Gaussian and defocus blur as published.

On the CPU sums are first taken in float32 by OpenCV, which is several times faster than the sources. Where such a sum
lies so near to a step between grey levels that its digits do not decide, the pixel is computed again in the source's
own order and precision. Results are the source's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from corruptions._checks import check_levels
from corruptions.blur import Floats, Image, Kernel, image_by_image
from robustlab.core.corruption import Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS

from ._scipy import fold, gaussian, scipy_kernel
from .base import Reference

Index = np.ndarray[Any, np.dtype[np.intp]]
_MANY = 1 << 18  # values to gather for pixels in doubt, above which the whole image is computed again


def in_doubt(total: Image, slack: float, step: float) -> tuple[Image, Index]:
    """Return float sums rounded down after adding ``step``, as bytes, and the places that ``slack`` would change."""
    low = (total + np.float32(step - slack)).astype(np.uint8)
    high = (total + np.float32(step + slack)).astype(np.uint8)
    return low, np.flatnonzero(low != high)


@lru_cache(maxsize=64)
def _padded(size: int, reach: int, mode: str) -> Index:
    """Return the places 0 .. size - 1 with the border continued by ``numpy.pad``."""
    places: Index = np.pad(np.arange(size), reach, mode=mode)  # type: ignore[call-overload]
    return places


def windows(image: Image, places: Index, reach: int, mode: str) -> Image:
    """Return (M, 2 reach + 1, 2 reach + 1) neighbourhoods of flat places in an (H, W) or (H, W, 3) image.

    Args:
        image: uint8.
        places: Flat indices.
        reach: Pixels on each side.
        mode: How ``numpy.pad`` continues the border.
    """
    height, width = image.shape[:2]
    planes = image.reshape(height, width, -1)
    row, column, plane = np.unravel_index(places, planes.shape)
    around = np.arange(2 * reach + 1)
    rows, columns = (_padded(size, reach, mode)[at[:, None] + around] for size, at in ((height, row), (width, column)))
    index = (rows[:, :, None] * width + columns[:, None, :]) * planes.shape[2] + plane[:, None, None]
    near: Image = np.take(image.reshape(-1), index)
    return near


@lru_cache(maxsize=64)
def _flat_levels(sigma: float) -> Image:
    """Return what becomes of a region of one grey level, for all levels; rounding may take one off."""
    kernel = scipy_kernel(sigma)
    once = fold(np.repeat(np.arange(256)[:, None] / 255.0, len(kernel), axis=1), kernel)
    return _stored(fold(np.repeat(once[:, None], len(kernel), axis=1), kernel))


def _stored(values: Image) -> Image:
    return (np.clip(values, 0, 1) * 255).astype(np.uint8)


def _scipy_blur(image: Image, sigma: float, scratch: Floats) -> Image:
    """Return a truncated Gaussian blur, with the bits of SciPy in float64."""
    kernel = scipy_kernel(sigma)
    size = len(kernel)
    total = cv2.sepFilter2D(image, cv2.CV_32F, kernel, kernel, dst=scratch, borderType=cv2.BORDER_REPLICATE)
    out, places = in_doubt(total, 2e-4, 0.0)
    flat = out.reshape(-1)
    if len(places) * size * size > _MANY:
        # most of them belong to regions of one level, whose sums are whole numbers but for their last digit
        box = np.ones((size, size), np.uint8)
        least, most = (f(image, box, borderType=cv2.BORDER_REPLICATE) for f in (cv2.erode, cv2.dilate))
        same = (least == most).reshape(-1)[places]
        flat[places[same]] = _flat_levels(sigma)[image.reshape(-1)[places[same]]]
        places = places[~same]
    if len(places) * size * size > _MANY:
        from scipy.ndimage import gaussian_filter

        axes = (sigma, sigma, 0)[: image.ndim]
        return _stored(gaussian_filter(image / 255.0, axes, mode="nearest", truncate=4.0))
    near = windows(image, places, size // 2, "edge") / 255.0
    flat[places] = _stored(fold(fold(near, kernel), kernel))
    return out


def scipy_blur_tensor(pixels: Tensor, sigma: float) -> Tensor:
    """Return the same on any device, with the same bits, from float64 sums over whole images."""
    # a tensor, since CUDA would multiply by the reciprocal of a Python number
    values = pixels.to(torch.float64).div_(torch.full((), 255.0, dtype=torch.float64, device=pixels.device))
    return gaussian(values, sigma, 4.0, "nearest").clamp_(0, 1).mul_(255).to(torch.uint8)


@CORRUPTIONS.register("ref:gaussian-blur")
@dataclass(frozen=True)
class RefGaussianBlur(Reference):
    """Gaussian blur of ImageNet-C: scikit-image's ``gaussian`` in float64, borders repeated, cut at 4 sigma, truncated.

    Where a region has one grey level, rounding of the weights may take one level off, as in the source.

    Args:
        sigma: Standard deviation, in pixels.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "blur"
    stage: ClassVar[str] = "optics"
    seen_in: ClassVar[tuple[str, ...] | None] = ()
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    alike: ClassVar[bool] = True
    sigma: Levels = Levels((1, 2, 3, 4, 6), identity=0.0, unit="px")

    def __post_init__(self) -> None:
        check_levels(self, "sigma", self.sigma, 0, 1000)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        sigma = values["sigma"]
        if pixels.device.type != "cpu":
            return scipy_blur_tensor(pixels, sigma)
        return image_by_image(lambda _, image, scratch: _scipy_blur(image, sigma, scratch), pixels)


@lru_cache(maxsize=64)
def torchvision_kernel(size: int) -> tuple[Kernel, np.ndarray[Any, np.dtype[np.float32]]]:
    """Return the weights of one axis (as float64) and of both (float32, rounded as torchvision does)."""
    sigma = 0.15 * size + 0.35
    half = (size - 1) * 0.5
    place = torch.linspace(-half, half, steps=size, dtype=torch.float32)
    weights = torch.exp(-0.5 * (place / sigma).pow(2))
    weights = weights / weights.sum()
    return weights.double().numpy(), (weights[:, None] * weights[None, :]).numpy()


def _torchvision_blur(image: Image, size: int, scratch: Floats) -> Image:
    """Return a rounded Gaussian blur, with the bits of torchvision's convolution in float32."""
    line, square = torchvision_kernel(size)
    total = cv2.sepFilter2D(image, cv2.CV_32F, line, line, dst=scratch, borderType=cv2.BORDER_REFLECT_101)
    # the convolution's own error grows with the number of its terms
    out, places = in_doubt(total, 2e-4 + 2e-6 * size * size, 0.5)
    if len(places):
        near = windows(image, places, size // 2, "reflect").reshape(len(places), -1).T
        terms = near * square.reshape(-1, 1).astype(np.float64)
        sums = np.zeros(len(places), np.float32)
        for term in terms:
            # a chain of fused multiply-adds: the products are exact in float64, each sum is rounded to float32
            np.add(sums, term, out=sums, casting="unsafe")
        out.reshape(-1)[places] = np.rint(sums).astype(np.uint8)
    return out


def torchvision_blur_tensor(pixels: Tensor, size: int) -> Tensor:
    """Return the same on any device, with the same bits, from the chain of sums over whole images."""
    height, width = pixels.shape[2:]
    padded = pixels
    for axis in (2, 3):
        index = np.pad(np.arange(pixels.shape[axis]), size // 2, mode="reflect")
        padded = padded.index_select(axis, torch.from_numpy(index).to(pixels.device))
    padded = padded.to(torch.float64)
    total = torch.zeros(pixels.shape, dtype=torch.float32, device=pixels.device)
    for row, weights in enumerate(torchvision_kernel(size)[1].tolist()):
        for column, weight in enumerate(weights):
            part = padded[:, :, row : row + height, column : column + width]
            total = (part * weight).add_(total).to(torch.float32)
    return total.round_().to(torch.uint8)


@CORRUPTIONS.register("ref:torchvision-blur")
@dataclass(frozen=True)
class RefTorchvisionBlur(Reference):
    """Gaussian blur of MedMNIST-C: torchvision's ``gaussian_blur``, sigma = 0.15 k + 0.35, borders reflected, rounded.

    Images of k // 2 pixels or fewer, for which torchvision fails, are reflected to and fro as often as it takes.

    Args:
        kernel: Side k of the kernel, in pixels; rounded to the nearest odd number.

    References:
        F. Di Salvo, S. Doerrich, C. Ledig, "MedMNIST-C", 2024, 2406.17536.
    """

    family: ClassVar[str] = "blur"
    stage: ClassVar[str] = "optics"
    seen_in: ClassVar[tuple[str, ...] | None] = ("xray", "ct", "microscopy")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    alike: ClassVar[bool] = True
    kernel: Levels = Levels((3, 5, 7, 9, 11), identity=1.0, unit="px")

    def __post_init__(self) -> None:
        check_levels(self, "kernel", self.kernel, 1, 1001)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        size = 2 * round((values["kernel"] - 1) / 2) + 1
        if pixels.device.type != "cpu":
            return torchvision_blur_tensor(pixels, size)
        return image_by_image(lambda _, image, scratch: _torchvision_blur(image, size, scratch), pixels)


@lru_cache(maxsize=64)
def published_disc(radius: float, alias: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the float32 kernel of a disc, softened by a 3 x 3 (above 8 px, 5 x 5) Gaussian.

    Up to 8 px it lies on 17 x 17 pixels; above, on a grid that ends at its radius, so that the softening reflects at
    the edge and the weights sum up to about 1.01. A radius that is no whole number is not centred there.

    Args:
        radius: In pixels.
        alias: Standard deviation of the softening, in pixels.
    """
    side = np.arange(-8.0, 9.0) if radius <= 8 else np.arange(-radius, radius + 1)
    inside = (side[:, None] ** 2 + side[None, :] ** 2 <= radius**2).astype(np.float32)
    inside /= np.sum(inside)
    around = (3, 3) if radius <= 8 else (5, 5)
    return np.asarray(cv2.GaussianBlur(inside, ksize=around, sigmaX=alias), dtype=np.float32)


@lru_cache(maxsize=1)
def _unit_doubles() -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.arange(256) / 255.0


def disc_tensor(pixels: Tensor, kernel: np.ndarray[Any, np.dtype[np.float32]]) -> Tensor:
    """Return the filtered, truncated images on any device, from float64 sums of the taps that weigh anything."""
    height, width = pixels.shape[2:]
    padded = pixels
    for axis, size in ((2, len(kernel)), (3, len(kernel))):
        reach = (size // 2, size - 1 - size // 2)
        index = np.pad(np.arange(pixels.shape[axis]), reach, mode="reflect")
        padded = padded.index_select(axis, torch.from_numpy(index).to(pixels.device))
    padded = padded.to(torch.float64)
    total = torch.zeros(pixels.shape, dtype=torch.float64, device=pixels.device)
    for row, weights in enumerate(kernel.tolist()):
        for column, weight in enumerate(weights):
            if weight > 1e-18:
                total.add_(padded[:, :, row : row + height, column : column + width] * weight)
    return total.clamp_(0, 255).to(torch.uint8)


@CORRUPTIONS.register("ref:defocus-blur")
@dataclass(frozen=True)
class RefDefocusBlur(Reference):
    """Defocus of ImageNet-C and MedMNIST-C: OpenCV's ``filter2D`` in float64 with a softened disc, truncated.

    Args:
        radius: Of the disc, in pixels.
        alias: Standard deviation of the softening of its rim, in pixels.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "blur"
    stage: ClassVar[str] = "optics"
    seen_in: ClassVar[tuple[str, ...] | None] = ("histology", "microscopy", "dermoscopy", "fundus", "oct")
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    alike: ClassVar[bool] = True
    radius: Levels = Levels((3, 4, 6, 8, 10), identity=0.0, unit="px")
    alias: Levels = Levels((0.1, 0.5, 0.5, 0.5, 0.5), identity=0.0, unit="px")

    def __post_init__(self) -> None:
        check_levels(self, "radius", self.radius, 0, 500)
        check_levels(self, "alias", self.alias, 0, 100)

    def change(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        # below, OpenCV would choose a width of its own
        kernel = published_disc(values["radius"], max(values["alias"], 1e-3))
        if pixels.device.type != "cpu":
            return disc_tensor(pixels, kernel)

        def blurred(_: int, image: Image, scratch: Floats) -> Image:
            del scratch
            total: Image = cv2.filter2D(cv2.LUT(image, _unit_doubles()), -1, kernel)
            np.minimum(total, 1, out=total)
            total *= 255
            # what rounding leaves below 0 is truncated to 0
            return total.astype(np.uint8)

        return image_by_image(blurred, pixels)
