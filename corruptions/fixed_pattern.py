"""Noise that belongs to a detector: the same on every image that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustlab.core.corruption import Corruption, Draws
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng

from ._checks import check_levels


@CORRUPTIONS.register("fixed-pattern")
@dataclass(frozen=True)
class FixedPattern(Corruption):
    """Fixed pattern of a badly calibrated detector: pixel gains, row and column offsets, and dead columns.

    y = x (1 + gain k) + offset (r + c), with standard normal k for each pixel, r for each row and c for each column,
    the same for all channels; dead columns read black or white. All images of one scanner share one pattern, by
    ``ShiftContext.device_keys``; without them there is one scanner. A higher severity has the same pattern, stronger,
    and further dead columns; a fraction of a column is a column that is partly dead.

    Args:
        gain: Standard deviation of the pixels' gains, of the signal.
        offset: Standard deviation of the rows' and of the columns' offsets, of full range.
        dead: Share of dead columns, from 0 to 1.

    References:
        J. R. Janesick, "Photon Transfer", SPIE, 2007 (photo-response non-uniformity, offset fixed pattern noise).
    """

    family: ClassVar[str] = "noise"
    stage: ClassVar[str] = "electronics"
    seen_in: ClassVar[tuple[str, ...] | None] = ("xray", "ct", "endoscopy")
    keyed_by: ClassVar[Literal["sample", "device"]] = "device"

    gain: Levels = Levels((0.005, 0.01, 0.02, 0.03, 0.05), identity=0.0, unit="of the signal")
    offset: Levels = Levels((0.002, 0.004, 0.008, 0.012, 0.02), identity=0.0, unit="of full range")
    dead: Levels = Levels((0.0, 0.0, 0.005, 0.01, 0.02), identity=0.0, unit="of the columns")

    def __post_init__(self) -> None:
        check_levels(self, "gain", self.gain, 0)
        check_levels(self, "offset", self.offset, 0)
        check_levels(self, "dead", self.dead, 0, 1)

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Draws:
        _, height, width = shape
        # the place of each column in the order in which columns die
        order = torch.sort(rng.uniform("order", (width,)), dim=1, stable=True).indices
        place = torch.empty_like(order).scatter_(1, order, torch.arange(width, device=order.device).expand_as(order))
        return {
            "gain": rng.normal("gain", (1, height, width)),
            "row": rng.normal("row", (1, height, 1)),
            "column": rng.normal("column", (1, 1, width)),
            "place": place.to(torch.float32).view(-1, 1, 1, width),
            "value": rng.integers("value", 2, (1, 1, width)).to(torch.float32),
        }

    def apply(self, images: Tensor, draws: Draws, values: Mapping[str, float]) -> Tensor:
        dead = (values["dead"] * images.shape[3] - draws["place"]).clamp_(0, 1)
        alive = 1 - dead
        factor = (draws["gain"] * values["gain"]).add_(1).mul_(alive)
        base = (draws["row"] + draws["column"]).mul_(values["offset"]).mul_(alive).add_(draws["value"] * dead)
        return (images * factor).add_(base)
