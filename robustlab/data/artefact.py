"""A foreign object pasted into images: the kind of near foreign data that a hospital meets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from robustlab.core.errors import RangeError
from robustlab.core.rng import SampleRng
from robustlab.core.shift import quantize
from robustlab.core.source import Source

_SEGMENTS = 24  # of the lead, a curve
_SMALLEST = 12  # pixels of the shorter side in which the object can be drawn


class ArtefactSource(Source):
    """Images of another source with an object pasted in; see ``pasted_artefact``."""

    def __init__(self, source: Source, size: float, seed: int) -> None:
        self.source = source
        self.size = size
        self.seed = seed
        self.in_memory = source.in_memory
        self.thread_safe = source.thread_safe
        info = source.info
        self.own = info.ids
        self.info = dataclasses.replace(
            info,
            name=f"{info.name} (artefact)",
            ids=SampleRng.make(seed, "artefact ids", info.ids).keys,
            labels=None,
            task=None,
            class_names=None,
            posterior=None,
        )

    def pixels(self, index: Sequence[int]) -> Tensor:
        images = self.source.pixels(index)
        rng = SampleRng.make(self.seed, "artefact", self.own[torch.as_tensor(list(index), dtype=torch.int64)])
        cover = _drawn(rng, images.shape[2], images.shape[3], self.size)[:, None].to(images)
        brightness = (0.85 + 0.15 * rng.uniform("brightness")).to(images)[:, None, None, None]
        return quantize(images + cover * (brightness - images), self.info.spec)

    def state(self) -> str:
        return f"artefact {self.size} {self.seed} {self.source.state()}"

    def refresh(self) -> None:
        super().refresh()
        self.source.refresh()


def pasted_artefact(source: Source, *, size: float = 0.2, seed: int = 0) -> Source:
    """Return the images with an object like a pacemaker pasted in: a bright rounded case and a curved lead.

    Place, angle and brightness depend on the seed and the sample; labels are left out, as the images are foreign data.
    It is a near set: all but the object is as in clean images, and artefacts can make a softmax more confident.

    Args:
        source: Images of the right kind.
        size: Length of the case, as a share of the shorter side, from 0.05 to 0.5.
        seed: Seed of the draws.

    Raises:
        RangeError: ``size`` makes no sense, or the images are below 12 pixels.

    References:
        The idea: Anthony, Kamnitsas, On the use of Mahalanobis distance for out-of-distribution detection with neural
        networks for medical imaging, 2023, arXiv 2309.01488. The object is our own drawing.
    """
    if not 0.05 <= size <= 0.5:
        raise RangeError("pasted_artefact", "size from 0.05 to 0.5 of the shorter side", f"{size}", "Try 0.2.")
    if min(source.info.spec.size) < _SMALLEST:
        got = " x ".join(map(str, source.info.spec.size))
        raise RangeError("pasted_artefact", f"images of {_SMALLEST} pixels or more", got, "Use larger images.")
    return ArtefactSource(source, size, seed)


def _drawn(rng: SampleRng, height: int, width: int, size: float) -> Tensor:
    """Return how much of each pixel the object covers, float32 (N, height, width) from 0 to 1."""
    short = min(height, width)
    draws = rng.uniform("place", (5,))
    rows = torch.arange(height, dtype=torch.float32)[None, :, None]
    columns = torch.arange(width, dtype=torch.float32)[None, None, :]

    def column(values: Tensor) -> Tensor:
        return values[:, None, None]

    middle_row = column((0.25 + 0.5 * draws[:, 0]) * height)
    middle_column = column((0.25 + 0.5 * draws[:, 1]) * width)
    angle = column(2 * torch.pi * draws[:, 2])
    across = (columns - middle_column) * angle.cos() + (rows - middle_row) * angle.sin()
    along = (rows - middle_row) * angle.cos() - (columns - middle_column) * angle.sin()
    half_length, half_width, corner = (share * size * short for share in (0.5, 0.36, 0.18))
    outside_along = (along.abs() - (half_length - corner)).clamp_min(0)
    outside_across = (across.abs() - (half_width - corner)).clamp_min(0)
    case = (outside_along.square() + outside_across.square()).sqrt() - corner
    # the lead is a parabola that leaves the end of the case
    reach = column((1.0 + draws[:, 3]) * 1.6 * size * short)
    bend = column((2 * draws[:, 4] - 1) * 1.2 * size * short)
    lead = torch.full_like(case, torch.inf)
    steps = torch.linspace(0, 1, _SEGMENTS + 1)
    for start, end in zip(steps[:-1].tolist(), steps[1:].tolist(), strict=True):
        first = (half_length + start * reach, bend * start**2)
        second = (half_length + end * reach, bend * end**2)
        step = (second[0] - first[0], second[1] - first[1])
        length = step[0] ** 2 + step[1] ** 2
        place = (((along - first[0]) * step[0] + (across - first[1]) * step[1]) / length).clamp(0, 1)
        off = (along - first[0] - place * step[0]).square() + (across - first[1] - place * step[1]).square()
        lead = torch.minimum(lead, off.sqrt())
    thickness = max(0.5, 0.03 * size * short)
    # edges are one pixel wide
    return (0.5 - torch.minimum(case, lead - thickness)).clamp(0, 1)
