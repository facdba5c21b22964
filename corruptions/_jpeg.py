"""JPEG as libjpeg codes it, in integer arithmetic on tensors: the pixels that a decoder would show, bit for bit.

Entropy coding loses nothing and is left out. What remains is colour conversion in 16-bit fixed point, averaging of
chroma over 2 x 2 pixels, the integer cosine transform of Loeffler, Ligtenberg and Moschytz with 13-bit constants,
quantisation, and the way back with triangle-filtered chroma. Each one-dimensional transform is linear before its single
rounding shift, hence an 8 x 8 integer matrix; products in float64 are exact.

References:
    G. K. Wallace, "The JPEG still picture compression standard", 1992.
    C. Loeffler, A. Ligtenberg, G. S. Moschytz, "Practical fast 1-D DCT algorithms with 11 multiplications", 1989.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

_BITS = 13
# example tables K.1 and K.2 of the standard (ITU-T T.81)
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)


def round_trip(pixels: Tensor, quality: int) -> Tensor:
    """Return uint8 images as they are after JPEG.

    Args:
        pixels: uint8 (N, C, H, W); 3 channels are coded as colour with 4:2:0 chroma, others as grey images each.
        quality: libjpeg quality, 1 to 100.
    """
    count, channels, height, width = pixels.shape
    if channels != 3:
        planes = pixels.reshape(count * channels, height, width).to(torch.int32)
        return _plane(planes, quality, _LUMA).to(torch.uint8).reshape(pixels.shape)
    red, green, blue = pixels.to(torch.int32).unbind(1)
    luma = _weigh(red, green, blue, (19595, 38470, 7471), 1 << 15)
    chroma = [
        _weigh(red, green, blue, weights, (128 << 16) + (1 << 15) - 1)
        for weights in ((-11059, -21709, 32768), (32768, -27439, -5329))
    ]
    luma = _plane(luma, quality, _LUMA)
    small = _plane(_halve(torch.cat(chroma)), quality, _CHROMA)[:, :, : math.ceil(width / 2)]
    cb, cr = _double(small)[:, :height, :width].sub(128).chunk(2)
    back = (
        luma + ((cr * 91881 + (1 << 15)) >> 16),
        luma + ((cb * -22554 + cr * -46802 + (1 << 15)) >> 16),
        luma + ((cb * 116130 + (1 << 15)) >> 16),
    )
    return torch.stack(back, 1).clamp_(0, 255).to(torch.uint8)


def _weigh(red: Tensor, green: Tensor, blue: Tensor, weights: tuple[int, int, int], offset: int) -> Tensor:
    total = red * weights[0]
    return total.add_(green * weights[1]).add_(blue * weights[2]).add_(offset) >> 16


def _halve(planes: Tensor) -> Tensor:
    """Return means over 2 x 2 pixels, with a rounding bias that alternates 1, 2 along a row."""
    height, width = planes.shape[1:]
    # libjpeg repeats columns up to whole blocks before it averages, but rows only to an even number
    planes = _extend(planes, height + height % 2, math.ceil(width / 16) * 16)
    total = planes[:, ::2, ::2] + planes[:, ::2, 1::2] + planes[:, 1::2, ::2] + planes[:, 1::2, 1::2]
    bias = torch.arange(total.shape[2], dtype=torch.int32, device=planes.device) % 2 + 1
    return (total + bias) >> 2


def _double(small: Tensor) -> Tensor:
    """Return planes of twice the size by libjpeg's triangle filter: 3/4 of the nearer pixel and 1/4 of the next."""
    if small.shape[2] <= 2:  # libjpeg filters only planes wider than that
        return small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    tall = pad(small[:, None].to(torch.float32), (0, 0, 1, 1), mode="replicate")[:, 0].to(torch.int32)
    middle = tall[:, 1:-1] * 3
    rows = torch.stack((middle + tall[:, :-2], middle + tall[:, 2:]), 2).flatten(1, 2)
    wide = pad(rows[:, None].to(torch.float32), (1, 1, 0, 0), mode="replicate")[:, 0].to(torch.int32)
    middle = wide[:, :, 1:-1] * 3
    left, right = (middle + wide[:, :, :-2] + 8) >> 4, (middle + wide[:, :, 2:] + 7) >> 4
    return torch.stack((left, right), 3).flatten(2, 3)


def _extend(planes: Tensor, height: int, width: int) -> Tensor:
    """Return planes whose last row and column are repeated up to a size."""
    rows = torch.arange(height, device=planes.device).clamp_(max=planes.shape[1] - 1)
    columns = torch.arange(width, device=planes.device).clamp_(max=planes.shape[2] - 1)
    return planes.index_select(1, rows).index_select(2, columns)


def _plane(planes: Tensor, quality: int, base: tuple[tuple[int, ...], ...]) -> Tensor:
    """Return int32 planes (N, H, W) after the transform, quantisation, and the inverse transform."""
    count, height, width = planes.shape
    down, across = math.ceil(height / 8), math.ceil(width / 8)
    blocks = _extend(planes, down * 8, across * 8).reshape(count, down, 8, across, 8).transpose(2, 3)
    forward, inverse = (matrix.to(planes.device) for matrix in _matrices())
    table = torch.from_numpy(quantisation(base, quality)).to(planes.device, torch.float64) * 8
    # rows, then columns; the coefficients are 8 times the cosine transform's
    part = _shift((blocks - 128).to(torch.float64) @ forward.T, _BITS - 2)
    part = _shift(forward @ part, _BITS + 2)
    steps = ((part.abs() + (table / 2).floor()) / table).floor().mul_(part.sign())
    # columns, then rows
    part = _shift(inverse @ steps.mul_(table / 8), _BITS - 2)
    part = _shift(part @ inverse.T, _BITS + 5).add_(128).clamp_(0, 255)
    whole = part.to(torch.int32).transpose(2, 3).reshape(count, down * 8, across * 8)
    return whole[:, :height, :width]


def _shift(values: Tensor, bits: int) -> Tensor:
    """Return integers divided by 2^bits, halves rounded up."""
    return values.add_(2 ** (bits - 1)).mul_(2.0**-bits).floor_()


@lru_cache(maxsize=256)
def quantisation(base: tuple[tuple[int, ...], ...], quality: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Return the quantisation table (8, 8) of a libjpeg quality from 1 to 100."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((np.array(base, dtype=np.int64) * scale + 50) // 100, 1, 255)


def _constant(value: float) -> int:
    return round(value * (1 << _BITS))


@lru_cache(maxsize=1)
def _matrices() -> tuple[Tensor, Tensor]:
    """Return the 2^13-fold integer matrices of the forward and inverse transform, float64 (8, 8)."""
    # rotations as libjpeg factors them: three products each, so the entries of a matrix are sums of rounded constants
    c = {
        name: _constant(value)
        for name, value in {
            "a": 0.298631336,
            "b": 0.390180644,
            "c": 0.541196100,
            "d": 0.765366865,
            "e": 0.899976223,
            "f": 1.175875602,
            "g": 1.501321110,
            "h": 1.847759065,
            "i": 1.961570560,
            "j": 2.053119869,
            "k": 2.562915447,
            "l": 3.072711026,
        }.items()
    }
    one = 1 << _BITS
    # odd part: inputs (or outputs) 7, 5, 3, 1 mixed by a symmetric 4 x 4 matrix
    mix = np.full((4, 4), c["f"])
    for place, gain in enumerate((c["a"], c["j"], c["l"], c["g"])):
        mix[place, place] += gain
    for first, second, gain in ((0, 3, c["e"]), (1, 2, c["k"]), (0, 2, c["i"]), (1, 3, c["b"])):
        for row, column in ((first, first), (second, second), (first, second), (second, first)):
            mix[row, column] -= gain
    odd = np.zeros((4, 8), dtype=np.int64)
    for place in range(4):
        # input of place p is x[3 - p] - x[4 + p]
        odd[:, 3 - place] += mix[:, place]
        odd[:, 4 + place] -= mix[:, place]
    forward = np.zeros((8, 8), dtype=np.int64)
    forward[7], forward[5], forward[3], forward[1] = odd
    signs = np.array([1, 1, 1, 1, 1, 1, 1, 1]), np.array([1, -1, -1, 1, 1, -1, -1, 1])
    forward[0], forward[4] = one * signs[0], one * signs[1]
    outer, inner = c["c"] + c["d"], c["c"]
    forward[2] = [outer, inner, -inner, -outer, -outer, -inner, inner, outer]
    outer, inner = c["c"], c["c"] - c["h"]
    forward[6] = [outer, inner, -inner, -outer, -outer, -inner, inner, outer]
    return torch.from_numpy(forward.astype(np.float64)), torch.from_numpy(forward.T.astype(np.float64).copy())
