"""Drawing of tiles that look like H&E sections: stain concentrations, then Beer-Lambert absorbance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.core.rng import SampleRng

# Macenko et al. 2009 reference colours: optical density (base e) of one unit of haematoxylin and of eosin in R, G, B
HAEMATOXYLIN = (0.5626, 0.7201, 0.4062)
EOSIN = (0.2159, 0.8012, 0.5581)

_GRID = 6  # nuclei sit in the cells of a 6 x 6 grid, off centre


def render_histology(rng: SampleRng, theta: Tensor, size: int) -> Tensor:
    """Draw tiles.

    Args:
        rng: Generator of the nuisance (stain strength, texture, places), one key a tile.
        theta: float32 (N, 3): nuclear density, nuclear size and roundness, in standard deviations around the middle.
        size: Height and width in pixels; the field of view does not depend on it.

    Returns:
        float32 (N, 3, size, size) in [0, 1].
    """
    chromatin, cytoplasm = _nuclei(rng.child("nuclei"), theta, size)
    coarse = smooth_noise(rng, "coarse", size, 3)
    middle = smooth_noise(rng, "middle", size, 7)
    fine = smooth_noise(rng, "fine", size, size // 3)
    grain = smooth_noise(rng, "grain", size, size // 2)
    per_tile = rng.uniform("stain", (3,))[:, :, None, None]
    fibres = _fibres(rng, size, coarse + 0.5 * middle)
    eosin = 0.30 + 0.07 * coarse + 0.06 * middle + 0.035 * fine + 0.17 * fibres + 0.30 * cytoplasm
    clefts = torch.sigmoid((middle + 0.6 * coarse - 1.75 - 0.5 * per_tile[:, 2]) / 0.14) * (1 - cytoplasm).clamp_min(0)
    eosin = (eosin * (1 - 0.93 * clefts)).clamp_min(0.0) * (1 - 0.55 * chromatin.clamp_max(1))
    blue = 0.055 + 0.02 * coarse + 0.10 * cytoplasm
    haematoxylin = blue.clamp_min(0) * (1 - clefts) + chromatin * (1.12 + 0.13 * fine + 0.12 * grain)
    eosin = eosin * (0.95 + 0.45 * per_tile[:, 0])
    haematoxylin = haematoxylin * (0.88 + 0.3 * per_tile[:, 1])
    stains = torch.tensor([HAEMATOXYLIN, EOSIN])
    density = haematoxylin[:, None] * stains[0].view(1, 3, 1, 1) + eosin[:, None] * stains[1].view(1, 3, 1, 1)
    light = blur(torch.exp(-density.clamp_min(0)) * 0.97)
    return light.add_(rng.normal("sensor", (3, size, size)), alpha=0.008).clamp_(0, 1)


def _nuclei(rng: SampleRng, theta: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return chromatin (about 0 to 1.3) and the halo of cytoplasm (0 to 1), each (N, size, size).

    Each nucleus is drawn on a small patch; patches are joined by the maximum, which does not depend on order.
    """
    tiles, slots, scale = len(theta), _GRID * _GRID, size / 64
    number = torch.round(13.5 + 4.2 * theta[:, :1]).clamp_(2, slots - 1)
    used = rng.uniform("order", (slots,)).argsort(1).argsort(1) < number
    cell = torch.arange(slots)
    corner = torch.stack([cell // _GRID, cell % _GRID], 1) + 0.5
    centre = (corner + 0.62 * (rng.uniform("place", (slots, 2)) - 0.5)) * (size / _GRID)
    radius = 4.3 * scale * torch.exp(0.16 * theta[:, 1:2] + 0.10 * rng.normal("radius", (slots,)))
    aspect = 0.40 + 0.55 * torch.sigmoid(0.9 * theta[:, 2:3] + 0.35 * rng.normal("aspect", (slots,)))
    long, short = radius * aspect.rsqrt(), radius * aspect.sqrt()
    angle = math.pi * (rng.uniform("direction")[:, None] + 0.35 * rng.normal("angle", (slots,)))
    lobes = 0.10 * rng.normal("lobes", (slots,))
    depth = 0.82 + 0.32 * rng.uniform("depth", (slots,))
    tile = used.nonzero()[:, 0]
    reach = math.ceil(12 * scale)
    base = torch.floor(centre[used])
    rest = centre[used] - base - 0.5
    offset = torch.arange(-reach, reach + 1, dtype=torch.float32)
    dy = (offset - rest[:, :1])[:, :, None]
    dx = (offset - rest[:, 1:])[:, None, :]
    cos, sin = torch.cos(angle)[used][:, None, None], torch.sin(angle)[used][:, None, None]
    u = (dx * cos + dy * sin) / long[used][:, None, None]
    v = (dy * cos - dx * sin) / short[used][:, None, None]
    squared = u * u + v * v
    distance = torch.sqrt(squared + 1e-6)
    lobed = u * (4 * u * u - 3 * squared) / (squared * distance + 0.05)
    distance = distance * (1 + lobes[used][:, None, None] * lobed)
    body = torch.sigmoid((1 - distance) / 0.11)
    rim = torch.exp(-(((distance - 0.84) / 0.16) ** 2))
    spot = torch.exp(((u - 0.3) ** 2 + (v - 0.15) ** 2) * (-1 / 0.035))
    chromatin = body * depth[used][:, None, None] * (0.80 + 0.24 * rim + 0.30 * spot)
    halo = torch.sigmoid((1.75 - distance) / 0.28)
    side = size + 2 * reach
    row = (base[:, :1] + offset + reach).long()[:, :, None] + tile[:, None, None] * side
    column = (base[:, 1:] + offset + reach).long()[:, None, :]
    place = (row * side + column).flatten()
    canvases = []
    for value in (chromatin, halo):
        canvas = torch.zeros(tiles * side * side)
        canvas.scatter_reduce_(0, place, value.flatten(), "amax")
        canvases.append(canvas.view(tiles, side, side)[:, reach:-reach, reach:-reach])
    return canvases[0], canvases[1]


def _fibres(rng: SampleRng, size: int, bend: Tensor) -> Tensor:
    """Return wavy collagen in one direction a tile, (N, size, size) in [0, 1]."""
    angle = (math.pi * rng.uniform("fibre angle"))[:, None, None]
    frequency = (4 + 4 * rng.uniform("fibre frequency"))[:, None, None]
    axis = (torch.arange(size) + 0.5) / size
    along = torch.cos(angle) * axis[None, None, :] + torch.sin(angle) * axis[None, :, None]
    phase = 2 * math.pi * (frequency * along + 0.45 * bend + rng.uniform("fibre phase")[:, None, None])
    strength = rng.uniform("fibre strength")[:, None, None]
    return (0.5 + 0.5 * torch.sin(phase)) ** 2 * strength


def smooth_noise(rng: SampleRng, label: str, size: int, cells: int) -> Tensor:
    """Return noise (N, size, size) of about unit variance that varies over ``size / cells`` pixels."""
    coarse = rng.normal(f"noise {label}", (1, cells + 1, cells + 1))
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)[:, 0] * 1.3


def blur(images: Tensor) -> Tensor:
    """Return (N, C, H, W) images after a 3 x 3 binomial filter, edges repeated."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    rows = 0.22 * (padded[:, :, :-2] + padded[:, :, 2:]) + 0.56 * padded[:, :, 1:-1]
    return 0.22 * (rows[..., :-2] + rows[..., 2:]) + 0.56 * rows[..., 1:-1]
