"""Stored numbers to pixels in [0, 1]: array layouts, bit depths and value ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from robustlab.core.errors import KindError, RangeError, ShapeError
from robustlab.core.types import ImageSpec

Array = NDArray[Any]

MAX_CHANNELS_LAST = 4


@dataclass(frozen=True)
class Scale:
    """The affine map from stored numbers to [0, 1].

    Args:
        low: Stored number that becomes 0.
        high: Stored number that becomes 1.
    """

    low: float
    high: float

    def to_unit(self, array: Array) -> Tensor:
        """Return float32 pixels in [0, 1]; integers k of b bits give k / (2^b - 1) exactly as ``quantize`` does."""
        if array.dtype.kind in "ui" and array.dtype != np.uint8:
            array = array.astype(np.int32)
        pixels = torch.from_numpy(np.ascontiguousarray(array)).float()
        if self.low != 0:
            pixels = pixels.sub_(self.low).div_(self.high - self.low).clamp_(0, 1)
        elif self.high != 1:
            pixels = pixels.div_(self.high)
            if array.dtype.kind == "f":
                pixels.clamp_(0, 1)
        return pixels


def to_channels_first(images: Array | Tensor, who: str) -> Array:
    """Return images as an (N, C, H, W) array (a view where possible).

    NumPy arrays hold channels last and tensors channels first, as files and torch do; the layout is never guessed.

    Args:
        images: (N, H, W), or (N, H, W, C) for arrays and (N, C, H, W) for tensors.
        who: Name used in messages.

    Raises:
        ShapeError: Any other shape, or no image.
    """
    shape = tuple(images.shape)
    tensor = isinstance(images, Tensor)
    wanted = "(N, H, W) or " + ("(N, C, H, W)" if tensor else "(N, H, W, C)")
    if len(shape) not in (3, 4):
        fix = "One image? Use images[None]." if len(shape) == 2 else "Reshape it; volumes are not images."
        raise ShapeError(who, f"images of shape {wanted}", f"shape {shape}", fix)
    if 0 in shape:
        raise ShapeError(who, "at least one image and pixel", f"shape {shape}", "The array is empty.")
    if len(shape) == 3 and shape[-1] in (3, 4) and min(shape[:2]) >= 8:
        raise ShapeError(who, f"images of shape {wanted}", f"shape {shape}", "One colour image? Use images[None].")
    if isinstance(images, Tensor):
        if len(shape) == 4 and shape[1] > MAX_CHANNELS_LAST >= shape[-1]:
            raise ShapeError(who, f"a tensor of shape {wanted}", f"shape {shape}", "Use images.permute(0, 3, 1, 2).")
        plain = images.detach().cpu()
        array: Array = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    else:
        array = images
        if len(shape) == 4 and shape[-1] > MAX_CHANNELS_LAST:
            raise ShapeError(
                who,
                f"an array of shape {wanted} with at most {MAX_CHANNELS_LAST} channels",
                f"shape {shape}",
                "Channels first? Pass torch.from_numpy(images). Volumes are not supported.",
            )
    if len(shape) == 3:
        return array[:, None]
    return array if tensor else np.moveaxis(array, -1, 1)


def interpret(
    images: Array, *, value_range: tuple[float, float] | None, modality: str | None, who: str
) -> tuple[ImageSpec, Scale]:
    """Decide what the numbers of (N, C, H, W) images mean, and check them.

    Args:
        images: Any numeric array.
        value_range: Stored numbers that are 0 and 1; needed unless the images are uint8, uint16 or floats in [0, 1].
        modality: Tag for the specification.
        who: Name used in messages.

    Returns:
        The specification and the map to [0, 1].

    Raises:
        KindError: Not uint8, uint16, another integer with ``value_range``, or floats.
        RangeError: NaN or infinite pixels, or pixels outside the range.
    """
    kind = images.dtype.kind
    if kind not in "uif":
        raise KindError(who, "images of numbers", f"dtype {images.dtype}", "Convert them, e.g. to uint8.")
    if kind == "f":
        check_finite(images, who)
    bits: int | None = None
    if value_range is None:
        if images.dtype in (np.uint8, np.uint16):
            bits = 8 * images.dtype.itemsize
            low, high = 0.0, float((1 << bits) - 1)
        elif kind == "f":
            low, high = 0.0, 1.0
        else:
            raise KindError(
                who,
                "uint8, uint16 or float images, or value_range=(low, high)",
                f"dtype {images.dtype} with values from {images.min()} to {images.max()}",
                "Say what black and white are, e.g. value_range=(0, 255), or cast to uint8.",
            )
    else:
        low, high = float(value_range[0]), float(value_range[1])
        if not low < high:
            raise RangeError(who, "value_range=(low, high) with low < high", f"{value_range}", "Swap the two.")
        if kind != "f" and low == 0 and high in [float((1 << b) - 1) for b in range(1, 17)]:
            bits = int(high).bit_length()
    if value_range is not None or kind == "f":
        check_range(images, low, high, who)
    unit = "grey level" if bits is not None else "unit" if (low, high) == (0.0, 1.0) else "value"
    height, width = images.shape[-2:]
    spec = ImageSpec(
        channels=images.shape[1], size=(height, width), range=(low, high), unit=unit, bits=bits, modality=modality
    )
    return spec, Scale(low, high)


def check_finite(images: Array, who: str) -> None:
    """Refuse NaN and infinite pixels.

    Raises:
        RangeError: Names the first bad image.
    """
    bad = ~np.isfinite(images.reshape(len(images), -1).sum(axis=1, dtype=np.float64))
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise RangeError(
            who,
            "finite pixels",
            f"NaN or infinite pixels in {int(bad.sum())} image(s), the first at index {first}",
            "Repair or drop those images.",
        )


def check_range(images: Array, low: float, high: float, who: str) -> None:
    """Refuse pixels outside of what was stated, or of [0, 1].

    Raises:
        RangeError: Tells the range that was found.
    """
    stated = (low, high) != (0.0, 1.0)
    found_low, found_high = float(images.min()), float(images.max())
    slack = 1e-6 * (high - low) if images.dtype.kind == "f" and stated else 0.0
    if found_low >= low - slack and found_high <= high + slack:
        return
    raise RangeError(
        who,
        f"pixels in value_range=({low:g}, {high:g})"
        if stated
        else "float pixels in [0, 1], or value_range=(low, high)",
        f"pixels from {found_low:.4g} to {found_high:.4g}",
        "Widen the range, or clip (window) the images yourself."
        if stated
        else "Pass value_range=(0, 255) or divide by 255 if these are grey levels.",
    )


def decode(image: Image.Image, who: str) -> Array:
    """Return a Pillow image as uint8 or uint16 (H, W), or uint8 (H, W, 3).

    Raises:
        ShapeError: A colour mode with transparency, CMYK or another one that has no plain meaning as pixels.
    """
    mode = image.mode
    if mode in ("L", "RGB"):
        return np.asarray(image)
    if mode == "1":
        return np.asarray(image.convert("L"))
    if mode == "P" and "transparency" not in image.info:
        return np.asarray(image.convert("RGB"))
    if mode in ("I;16", "I;16B", "I;16L"):
        return np.asarray(image).astype(np.uint16)
    raise ShapeError(
        who,
        "a grey (8 or 16 bit) or RGB image",
        f"Pillow mode {mode!r}",
        "Convert it first: image.convert('RGB') or image.convert('L').",
    )
