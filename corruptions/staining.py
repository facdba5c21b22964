"""Histological staining, in natural-logarithm optical density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng
from robustlab.core.shift import from_bytes, to_bytes

from ._bytes import by_blocks, planar, sums
from ._checks import check_levels

_FLOOR = 1 / 255  # darkest transmission that an 8-bit scanner tells from 0
_TISSUE = 0.15  # mean optical density over the blank slide at which a pixel counts as tissue by 63 %
_DIMMEST = 64  # grey level of green below which nothing is taken for blank slide


def _stain_matrix() -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return unit stain vectors in optical density: haematoxylin, eosin, and the residual H x E."""
    haematoxylin, eosin = np.array([0.644, 0.717, 0.267]), np.array([0.093, 0.954, 0.283])
    rows = np.stack([haematoxylin, eosin, np.cross(haematoxylin, eosin)])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


STAINS = _stain_matrix()
_UNMIX = tuple(tuple(map(float, column)) for column in np.linalg.inv(STAINS).T)
_SHARES = (1.0, 1.0, 0.5)  # the residual is no stain, and moves half as far


@CORRUPTIONS.register("stain-shift")
@dataclass(frozen=True)
class StainShift(Corruption):
    """Stronger or weaker stains: amounts of haematoxylin and eosin are scaled and offset; empty slide stays as it is.

    The amounts c of haematoxylin, eosin and residual become c + w (alpha^s c - c + t beta). c M = OD =
    -ln(max(x, 1/255) / b) with a full 3 x 3 matrix M, so that at alpha = 1 and beta = 0 nothing changes. s and t are
    -1 or 1, drawn for each image and stain, and half of that for the residual, which is no stain. Negative amounts of
    a stain keep their value under alpha. The tissue weight w = 1 - exp(-(mean OD / 0.15)^4), 0 for negative means,
    vanishes where the slide is empty: bare glass cannot take up stain.

    b is the colour of the blank slide: the mean colour of the pixels whose green is at least 0.9 of its 99th
    percentile in the image. It is 1 in images without blank slide, where that colour has less green than 0.9 of the
    mean of red and blue (both stains take most of the green) or the percentile is below a quarter of full range.

    Args:
        alpha: Factor of the stain amounts, at least 1.
        beta: Offset of the stain amounts, in natural-log optical density.

    References:
        A. C. Ruifrok, D. A. Johnston, "Quantification of histochemical staining by color deconvolution", 2001.
        D. Tellez et al., "Quantifying the effects of data augmentation and stain color normalization", 2019,
        1902.06543.
    """

    version: ClassVar[int] = 2  # 1 took 255 alone for empty slide
    family: ClassVar[str] = "staining"
    stage: ClassVar[str] = "subject"
    domain: ClassVar[Literal["display", "optical density"]] = "optical density"
    channels: ClassVar[tuple[int, ...] | None] = (3,)
    modalities: ClassVar[tuple[str, ...] | None] = ("histology",)
    label_safety: ClassVar[Literal["safe", "conditional", "unsafe"]] = "conditional"
    alpha: Levels = Levels((1.1, 1.2, 1.35, 1.5, 1.7), identity=1.0, unit="x stain amount", scale="log")
    beta: Levels = Levels((0.01, 0.02, 0.04, 0.06, 0.08), identity=0.0, unit="natural-log OD")

    def __post_init__(self) -> None:
        check_levels(self, "alpha", self.alpha, 1)
        check_levels(self, "beta", self.beta, 0)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        del shape
        return {"alpha": rng.sign("alpha", (3,)), "beta": rng.sign("beta", (3,))}

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        gain, offset = self._strength(draws, values)
        return _restain(images, _density(images), _log_blank(to_bytes(images)), gain, offset)

    def apply_bytes(self, pixels: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        gain, offset = self._strength(draws, values)
        densities = _density(from_bytes(torch.arange(256, dtype=torch.uint8, device=pixels.device)))
        blank = _log_blank(pixels)

        def change(part: Tensor, block: slice) -> Tensor:
            return _restain(from_bytes(part), _values(part, densities), blank[block], gain[block], offset[block])

        return by_blocks(change, pixels)

    @staticmethod
    def _strength(draws: Draws, values: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """Return the change of each stain's amount as a factor less 1 and as an offset, float32 (N, 3, 1, 1, 1)."""
        up = [values["alpha"] ** share - 1 for share in _SHARES]
        down = [values["alpha"] ** -share - 1 for share in _SHARES]
        step = [values["beta"] * share for share in _SHARES]
        device = draws["alpha"].device
        gain = torch.where(draws["alpha"] > 0, torch.tensor(up, device=device), torch.tensor(down, device=device))
        offset = draws["beta"] * torch.tensor(step, device=device)
        return gain.to(torch.float32)[..., None, None, None], offset.to(torch.float32)[..., None, None, None]


def _density(images: Tensor) -> Tensor:
    return torch.log(images.clamp_min(_FLOOR)).neg_()


def _values(pixels: Tensor, table: Tensor) -> Tensor:
    """Return the float32 entries of a table (256,) at uint8 pixels."""
    if pixels.device.type != "cpu":
        return table[pixels.to(torch.int64)]
    import cv2

    flat = pixels.contiguous()
    return torch.from_numpy(cv2.LUT(flat.numpy().reshape(1, -1), table.numpy())).reshape(pixels.shape)


def _log_blank(pixels: Tensor) -> Tensor:
    """Return the logarithm of the blank slide's transmission, float32 (N, 3, 1, 1), of uint8 images; 0 without blank.

    All sums are whole numbers: they are the same in any order, batch and device, and for floats after rounding.
    """
    pixels = planar(pixels)
    green = pixels[:, 1].flatten(1)
    levels = torch.arange(256, device=pixels.device)
    counts = torch.zeros((len(green), 256), dtype=torch.int64, device=pixels.device)
    counts.scatter_add_(
        1, green.to(torch.int64), torch.ones((), dtype=torch.int64, device=pixels.device).expand_as(green)
    )
    top = (counts.cumsum(1) * 100 < 99 * green.shape[1]).sum(1, keepdim=True)
    lit = levels * 10 >= top * 9
    lowest = lit.logical_not().sum(1)[:, None, None, None]
    total = sums(pixels * (pixels[:, 1:2] >= lowest)).to(torch.float64)
    mean = total / ((counts * lit).sum(1, keepdim=True) * 255)
    found = (mean[:, 1:2] * 2 >= (mean[:, 0:1] + mean[:, 2:3]) * 0.9) & (top >= _DIMMEST)
    # in float64, whose rounding to float32 does not depend on how the processor takes logarithms
    return torch.where(found, mean.clamp_min(_FLOOR).log(), torch.zeros_like(mean)).to(torch.float32)[..., None, None]


def _restain(images: Tensor, density: Tensor, blank: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """Return images (N, 3, H, W) of given optical density after a change of their stains' amounts.

    Args:
        images: float32, in [0, 1].
        density: Of the images, overwritten by that over the blank slide.
        blank: See ``_log_blank``.
        gain: See ``StainShift._strength``.
        offset: Likewise.
    """
    density.add_(blank)
    tissue = _dot(density, (1 / (3 * _TISSUE),) * 3).clamp_min_(0).square_().square_().neg_().expm1_().neg_()
    change = torch.zeros_like(density)
    for stain in range(3):
        # broadcast sums: a matrix library may add in another order for another batch
        amount = _dot(density, _UNMIX[stain])
        amount = (amount if stain == 2 else amount.clamp_min_(0)).mul_(gain[:, stain])
        amount.add_(offset[:, stain]).mul_(tissue)
        for channel in range(3):
            change[:, channel : channel + 1].add_(amount * float(STAINS[stain, channel]))
    # a factor on x rather than a new x: pixels below the floor keep their value where nothing changes
    return change.neg_().exp_().mul_(images)


def _dot(density: Tensor, weights: Sequence[float]) -> Tensor:
    red, green, blue = (density[:, channel : channel + 1] * weights[channel] for channel in range(3))
    return red.add_(green).add_(blue)
