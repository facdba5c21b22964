"""Blur."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS

from ._bytes import blocks, in_threads
from ._checks import check_levels

Image = np.ndarray[Any, np.dtype[Any]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
Kernel = np.ndarray[tuple[int], np.dtype[np.float64]]


def to_units(image: Image, out: Floats) -> Floats:
    """Write bytes divided by 255, correctly rounded, to ``out``; float32 images are returned as they are."""
    return image if image.dtype == np.float32 else np.divide(image, np.float32(255), out=out, dtype=np.float32)


def to_levels(units: Floats) -> Image:
    """Return bytes of numbers from 0 to 1, rounded half to even."""
    levels: Image = cv2.convertScaleAbs(units, alpha=255)
    return levels


def image_by_image(function: Callable[[int, Image, Floats], Image], images: Tensor) -> Tensor:
    """Return images after a function of (place in the batch, image, scratch), by ``in_threads``.

    The function sees contiguous arrays, (H, W, 3), or (H, W) of one channel where there are not three, so that its bits
    do not depend on how the batch lies in memory; the scratch is float32, of the same shape, and may hold the result
    (fresh memory for every image would cost more than a small blur).

    Args:
        function: Keeps the shape and the dtype; must not change the image in place.
        images: (N, C, H, W) on the CPU.

    Returns:
        (N, C, H, W), laid out in memory as the images were.
    """
    count, channels, height, width = images.shape
    split = channels == 3 and images.is_contiguous()
    if channels == 3 and not split:
        held = images.permute(0, 2, 3, 1).contiguous().numpy()
    else:
        held = images.contiguous().reshape(-1, channels if split else 1, height, width).numpy()
        held = held if split else held[:, 0]
    out = np.empty_like(held)
    planes = len(held) // count

    def work(start: int, stop: int) -> None:
        scratch = np.empty((height, width, 3) if channels == 3 else (height, width), np.float32)
        for place in range(start, stop):
            if split:
                cv2.split(function(place, cv2.merge(tuple(held[place])), scratch), list(out[place]))
            else:
                out[place] = function(place // planes, held[place], scratch)

    in_threads(work, len(held), held[0].size)
    done = torch.from_numpy(out)
    return done.permute(0, 3, 1, 2) if channels == 3 and not split else done.reshape(images.shape)


@lru_cache(maxsize=64)
def gaussian_kernel(sigma: float) -> Kernel:
    """Return float64 (2 R + 1,), R = ceil(4 sigma): the normal distribution on the integers whose variance is sigma^2.

    The weights are exp(-k^2 / 2 s^2), normalised. Taken at s = sigma they would hardly blur at all below half a pixel
    (at 0.3 px a twelfth of the variance is left); so s is solved for, which makes variances exact and additive down to
    0. Above 0.8 px s is sigma to less than 1 in 1,000.

    Args:
        sigma: Standard deviation, in pixels, above 0.
    """
    reach = math.ceil(4 * sigma)
    squares = np.arange(-reach, reach + 1, dtype=np.float64) ** 2
    low, high = 1e-3 * min(sigma, 1.0) + 0.02, 2 * sigma + 1  # brackets of s
    for _ in range(200):
        middle = math.sqrt(low * high)
        weights = np.exp(-squares / (2 * middle * middle))
        if (squares * weights).sum() < sigma * sigma * weights.sum():
            low = middle
        else:
            high = middle
    weights = np.exp(-squares / (2 * low * high))
    kernel: Kernel = weights / weights.sum()
    return kernel


def separable(images: Tensor, kernel: Kernel) -> Tensor:
    """Return images (N, C, H, W) convolved along height and width, borders mirrored, taps summed in their order."""
    reach = len(kernel) // 2
    for axis in (2, 3):
        size = images.shape[axis]
        index = np.pad(np.arange(size), reach, mode="symmetric")
        padded = images.index_select(axis, torch.from_numpy(index).to(images.device))
        total = padded.narrow(axis, 0, size) * float(kernel[0])
        for place, weight in enumerate(kernel[1:].tolist(), start=1):
            total.add_(padded.narrow(axis, place, size), alpha=weight)
        images = total
    return images


def _separable_image(image: Floats, kernel: Kernel, out: Floats) -> Floats:
    """Return ``separable`` of one image, (H, W) or (H, W, 3), written to ``out``, which may be the image itself.

    OpenCV sums in an order of its own, so that results differ from those of ``separable`` in the last digits.
    """
    cv2.sepFilter2D(image, cv2.CV_32F, kernel, kernel, dst=out, borderType=cv2.BORDER_REFLECT)
    return out


@lru_cache(maxsize=64)
def disc_kernel(radius: float) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return the (2 R + 1, 2 R + 1) weights of the mean, over a disc, of the bilinearly interpolated image.

    The weight of a pixel is the mean of the bilinear hat (1 - |x|)(1 - |y|) over the disc, so the kernel changes
    smoothly from the single pixel at radius 0 on, also below one pixel.

    Args:
        radius: Of the disc, in pixels, above 0.
    """
    reach = math.ceil(radius + 1) - 1
    rings = 16 + 4 * reach
    nodes, weights = np.polynomial.legendre.leggauss(rings)
    r = radius * (nodes + 1) / 2
    angle = (np.arange(8 * rings) + 0.5) * (2 * math.pi / (8 * rings))
    x, y = (r[:, None] * f(angle)[None, :] for f in (np.cos, np.sin))
    share = np.broadcast_to((weights * r)[:, None], x.shape)
    size = 2 * reach + 3
    kernel: np.ndarray[tuple[int, int], np.dtype[np.float64]] = np.zeros((size, size))
    column, row = np.floor(x), np.floor(y)
    for right in (0, 1):
        for below in (0, 1):
            hat = np.abs(1 - right - (x - column)) * np.abs(1 - below - (y - row))
            place = (row.astype(int) + below + reach + 1, column.astype(int) + right + reach + 1)
            np.add.at(kernel, place, share * hat)
    kernel = kernel[1:-1, 1:-1] / kernel.sum()
    kernel = (kernel + kernel[::-1]) / 2
    kernel = (kernel + kernel[:, ::-1]) / 2
    kernel = (kernel + kernel.T) / 2
    far = np.abs(np.arange(-reach, reach + 1)) + 1
    kernel[np.hypot(far[:, None], far[None, :]) <= radius] = 1 / (math.pi * radius * radius)
    kernel /= kernel.sum()
    return kernel


def disc_blur(images: Tensor, radius: float) -> Tensor:
    """Return images (N, C, H, W) blurred by a disc of ``radius`` pixels, borders repeated.

    On the CPU OpenCV sums in an order of its own, so that results differ from those of other devices, and of images
    that carry gradients, in the last digits. There the kernel is written as nested horizontal boxes shifted up and
    down, which takes a number of image additions proportional to the radius instead of its square, in an order that
    does not depend on the batch.
    """
    if radius == 0:
        return images
    if images.device.type == "cpu" and not images.requires_grad:
        return image_by_image(lambda _, image, scratch: _disc_image(image, radius, scratch), images)
    return nested_boxes(images, radius)


def _disc_image(image: Floats, radius: float, out: Floats) -> Floats:
    """Write ``disc_blur`` of one float32 image, (H, W) or (H, W, 3), to ``out``, which may be the image itself."""
    kernel = disc_kernel(radius).astype(np.float32)
    cv2.filter2D(image, cv2.CV_32F, kernel, dst=out, borderType=cv2.BORDER_REPLICATE)
    return out


def nested_boxes(images: Tensor, radius: float) -> Tensor:
    """Return ``disc_blur`` by sums of whole images, on any device."""
    kernel = disc_kernel(radius)
    reach = len(kernel) // 2
    quarter = kernel[reach:, reach:]
    steps = quarter - np.pad(quarter, ((0, 0), (0, 1)))[:, 1:]
    height, width = images.shape[2:]
    planes = images.reshape(-1, height, width)
    out = torch.empty_like(planes)
    for block in blocks(planes):
        out[block] = _nested_boxes(planes[block], steps, reach)
    return out.reshape(images.shape)


def _nested_boxes(planes: Tensor, steps: np.ndarray[tuple[int, int], np.dtype[np.float64]], reach: int) -> Tensor:
    height, width = planes.shape[1:]
    padded = pad(planes[:, None], (reach,) * 4, mode="replicate")[:, 0]
    box = padded[:, :, reach : reach + width].clone()
    total = torch.zeros_like(planes)
    for half in range(reach + 1):
        if half:
            box.add_(padded[:, :, reach - half : reach - half + width])
            box.add_(padded[:, :, reach + half : reach + half + width])
        for shift, weight in enumerate(steps[:, half].tolist()):
            if abs(weight) < 1e-12:
                continue
            term = box[:, reach + shift : reach + shift + height]
            if shift:
                term = term + box[:, reach - shift : reach - shift + height]
            total.add_(term, alpha=weight)
    return total


@CORRUPTIONS.register("defocus-blur")
@dataclass(frozen=True)
class DefocusBlur(Corruption):
    """Defocus: the mean of the image over a disc, the image of a point through an open aperture.

    Args:
        radius: Of the disc, in percent of the image height, so that small and large images lose the same structures.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "blur"
    stage: ClassVar[str] = "optics"
    seen_in: ClassVar[tuple[str, ...] | None] = ("histology", "microscopy", "dermoscopy", "fundus", "endoscopy")
    radius: Levels = Levels((0.6, 1.0, 1.6, 2.4, 3.5), identity=0.0, unit="% of image height", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "radius", self.radius, 0, 50)

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        return disc_blur(images, values["radius"] / 100 * images.shape[2])

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        radius = values["radius"] / 100 * pixels.shape[2]
        if pixels.device.type != "cpu" or radius == 0:
            return super().apply_bytes(pixels, draws, values)

        def blurred(_: int, image: Image, scratch: Floats) -> Image:
            return to_levels(_disc_image(to_units(image, scratch), radius, scratch))

        return image_by_image(blurred, pixels)


@CORRUPTIONS.register("gaussian-blur")
@dataclass(frozen=True)
class GaussianBlur(Corruption):
    """Gaussian blur, the sum of many small unsharpnesses: focal spot, detector, reconstruction filter, tear film.

    Borders are mirrored, which keeps the mean of the image; the kernel reaches to 4 sigma and has variance sigma^2.

    Args:
        sigma: Standard deviation of the kernel along each axis, in percent of the image height.

    References:
        D. Hendrycks, T. Dietterich, "Benchmarking neural network robustness to common corruptions", 2019, 1903.12261.
    """

    family: ClassVar[str] = "blur"
    stage: ClassVar[str] = "optics"
    seen_in: ClassVar[tuple[str, ...] | None] = ("xray", "ct", "fundus", "oct")
    sigma: Levels = Levels((0.3, 0.5, 0.8, 1.2, 1.8), identity=0.0, unit="% of image height", scale="log")

    def __post_init__(self) -> None:
        check_levels(self, "sigma", self.sigma, 0, 50)

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        del draws
        if values["sigma"] == 0:
            return images
        kernel = gaussian_kernel(values["sigma"] / 100 * images.shape[2])
        if images.device.type != "cpu" or images.requires_grad:
            return separable(images, kernel)
        return image_by_image(lambda _, image, scratch: _separable_image(image, kernel, scratch), images)

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        if pixels.device.type != "cpu" or values["sigma"] == 0:
            return super().apply_bytes(pixels, draws, values)
        kernel = gaussian_kernel(values["sigma"] / 100 * pixels.shape[2])

        def blurred(_: int, image: Image, scratch: Floats) -> Image:
            return to_levels(_separable_image(to_units(image, scratch), kernel, scratch))

        return image_by_image(blurred, pixels)
