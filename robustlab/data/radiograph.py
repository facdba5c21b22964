"""Drawing of images that look like frontal chest radiographs: a schematic sum of attenuations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustlab.core.rng import SampleRng

from .histology import blur, smooth_noise

MARKER_GREY = 0.96
_LETTER_L = ("1000", "1000", "1000", "1000", "1111")


def render_radiograph(rng: SampleRng, theta: Tensor, marker: Tensor, size: int) -> Tensor:
    """Draw radiographs.

    Args:
        rng: Generator of the nuisance (anatomy, exposure, noise), one key an image.
        theta: float32 (N, 2): amount of lung opacity and of nodules, in standard deviations around the middle.
        marker: bool (N,), a bright letter L in the upper right corner.
        size: Height and width in pixels.

    Returns:
        float32 (N, 1, size, size) in [0, 1].
    """
    body = _Body(rng, size)
    x, y = body.x, body.y
    ax = x.abs()
    texture = smooth_noise(rng, "parenchyma", size, size // 5)
    cloud = smooth_noise(rng, "cloud", size, 9)
    skin = _step(y - (-0.86 + 0.42 * ax.square()), 0.05) * _step(0.99 - ax, 0.03)
    lungs, diaphragm = body.lungs()
    solid, midline = body.mediastinum()
    lungs = lungs * (1 - solid)
    image = 0.50 + 0.05 * y + 0.025 * smooth_noise(rng, "soft", size, 4) + 0.06 * _step(ax - 0.74, 0.06)
    image = image + 0.16 * diaphragm + 0.13 * solid * (1 - diaphragm) - lungs * (0.38 - 0.06 * y)
    image = image + midline + body.bones() * (0.35 + 0.65 * lungs)
    vessels = torch.exp(-(((ax - 0.2) / 0.22) ** 2 + ((y - 0.02) / 0.42) ** 2))
    image = image + lungs * (0.016 * texture + vessels * (0.06 + 0.05 * texture.clamp_min(0) + 0.03 * cloud))
    opacity, nodules = _findings(rng.child("finding"), theta, body)
    image = image + lungs * (opacity * (1 + 0.22 * cloud) + nodules)
    exposure = rng.uniform("exposure", (2,))[:, :, None, None]
    image = (image * skin).clamp(0.0, 1.2) ** (0.85 + 0.3 * exposure[:, 0]) * (0.98 + 0.12 * exposure[:, 1])
    image = image + 0.03 * skin
    light = blur(image[:, None])
    light = light + 0.010 * rng.normal("quanta", (1, size, size))
    return _put_marker(light, rng, marker).clamp_(0, 1)


class _Body:
    """Anatomy of one batch: a coordinate grid that is shifted, turned and scaled for each image."""

    def __init__(self, rng: SampleRng, size: int) -> None:
        axis = (torch.arange(size) + 0.5) / size * 2 - 1
        pose = rng.normal("pose", (8,))[..., None, None].clamp(-2.5, 2.5)
        angle = 0.03 * pose[:, 0]
        x = (axis[None, None, :] + 0.025 * pose[:, 1]) * (1 + 0.03 * pose[:, 2])
        y = (axis[None, :, None] + 0.03 * pose[:, 3]) * (1 + 0.03 * pose[:, 4])
        self.x = torch.cos(angle) * x - torch.sin(angle) * y
        self.y = torch.sin(angle) * x + torch.cos(angle) * y
        self.base = 0.56 + 0.05 * pose[:, 5]
        self.heart = 1 + 0.07 * pose[:, 6]
        self.spread = 1 + 0.03 * pose[:, 7]
        self.rib_phase = rng.uniform("ribs")[:, None, None]

    def lungs(self) -> tuple[Tensor, Tensor]:
        """Return soft masks of the air-filled lungs and of what lies below the diaphragm."""
        x, y = self.x, self.y
        ax = x.abs()
        centre = 0.40 + 0.07 * y
        width = (0.315 + 0.075 * y - 0.10 * (y + 0.35).clamp_max(0).square() * 4) * self.spread
        side = ((ax - centre) / width.clamp_min(0.08)).abs()
        top = _step(y + 0.76 - 0.9 * (ax - 0.33).square(), 0.045)
        dome = self.base + 0.05 * torch.sign(x) + 0.75 * (ax - 0.34).square()
        below = _step(y - dome, 0.025)
        return _step(1 - side.square() * (0.4 + 0.6 * side), 0.13) * top * (1 - below), below

    def mediastinum(self) -> tuple[Tensor, Tensor]:
        """Return the soft mask of heart and great vessels, and the attenuation of spine and windpipe."""
        x, y = self.x, self.y
        tilt_x, tilt_y = x - 0.14 - 0.25 * (y - 0.34), y - 0.34 - 0.12 * (x - 0.14)
        heart = _step(1 - ((tilt_x / (0.38 * self.heart)) ** 2 + (tilt_y / (0.36 * self.heart)) ** 2), 0.16)
        knob = _step(1 - (((x - 0.11) / 0.11) ** 2 + ((y + 0.22) / 0.12) ** 2), 0.2)
        trunk = _step(0.145 - x.abs() + 0.03 * y, 0.035)
        solid = 1 - (1 - heart) * (1 - 0.75 * knob) * (1 - 0.85 * trunk)
        vertebrae = torch.exp(-(x / 0.085).square()) * (0.5 + 0.5 * torch.cos(2 * math.pi * y / 0.17))
        windpipe = torch.exp(-((x + 0.01) / 0.045).square()) * _step(-0.22 - y, 0.06)
        return solid, 0.045 * vertebrae - 0.11 * windpipe

    def bones(self) -> Tensor:
        """Return the attenuation of ribs and collar bones."""
        x, y = self.x, self.y
        ax = x.abs()
        cage = _step(0.84 - ax - 0.10 * (y + 0.2).square(), 0.04) * _step(ax - 0.10, 0.05) * _step(0.62 - y, 0.12)
        back = y + 0.34 * (ax - 0.38).square() * 2.2 - 0.05 * ax
        front = y - 0.62 * (ax - 0.1) + 0.1
        ribs = 0.105 * _ridge(back / 0.178 + self.rib_phase) + 0.05 * _ridge(front / 0.21 + self.rib_phase + 0.4)
        collar_line = y + 0.63 + 0.20 * (ax - 0.1) - 0.10 * torch.sin(5.0 * (ax - 0.1))
        collar = torch.exp(-((collar_line / 0.032) ** 2)) * _step(ax - 0.07, 0.03) * _step(0.80 - ax, 0.05)
        edge = torch.exp(-(((ax - 0.83 + 0.10 * (y + 0.2).square()) / 0.03) ** 2)) * _step(0.5 - y, 0.1)
        return ribs * cage * _step(y + 0.72, 0.06) + 0.17 * collar + 0.05 * edge * _step(y + 0.6, 0.06)


def _findings(rng: SampleRng, theta: Tensor, body: _Body) -> tuple[Tensor, Tensor]:
    """Return attenuation of a hazy opacity in one lung and of five nodules; both grow with the latents."""
    side = rng.sign("side")[:, None, None]
    place = rng.uniform("place", (2,))[..., None, None]
    amount = torch.sigmoid(1.1 * theta)[..., None, None]
    dx, dy = body.x - side * (0.36 + 0.12 * place[:, 0]), body.y - (-0.18 + 0.36 * place[:, 1])
    haze = torch.exp(-((dx / 0.25).square() + (dy / 0.23).square()))
    nodules = torch.zeros_like(haze)
    for index in range(5):
        spot = rng.uniform(f"nodule {index}", (4,))[..., None, None]
        where = 1.0 if index % 2 else -1.0
        nx = body.x - where * (0.27 + 0.30 * spot[:, 0])
        ny = body.y - (-0.55 + 0.95 * spot[:, 1])
        width = 0.055 + 0.025 * spot[:, 2]
        spread = (nx * nx + ny * ny) / width.square()
        nodules = torch.maximum(nodules, torch.exp(-spread * spread) * (0.8 + 0.4 * spot[:, 3]))
    return 0.40 * amount[:, 0] * haze, 0.36 * amount[:, 1] * nodules


def marker_stamps(size: int) -> Tensor:
    """Return the letter at each of its places, float32 (P, size, size) of 0 and 1."""
    unit = max(1, round(size / 48))
    glyph = torch.tensor([[float(c) for c in row] for row in _LETTER_L])
    glyph = glyph.repeat_interleave(unit, 0).repeat_interleave(unit, 1)
    stamp = torch.zeros((size, size))
    top, right = max(2, size // 16), size - max(2, size // 16) - glyph.shape[1]
    stamp[top : top + glyph.shape[0], right : right + glyph.shape[1]] = glyph
    return torch.stack([stamp.roll((dy, dx), (0, 1)) for dy in range(2) for dx in range(-1, 1)])


def _put_marker(images: Tensor, rng: SampleRng, marker: Tensor) -> Tensor:
    """Return images with the letter where ``marker`` is set, a pixel or two off its place."""
    stamps = marker_stamps(images.shape[-1])
    chosen = stamps[rng.integers("marker place", len(stamps))][:, None]
    return torch.where((chosen > 0) & marker.view(-1, 1, 1, 1), MARKER_GREY, images)


def _step(value: Tensor, width: float) -> Tensor:
    return torch.sigmoid(value / (0.5 * width))


def _ridge(phase: Tensor) -> Tensor:
    return (0.5 + 0.5 * torch.cos(2 * math.pi * phase)).square()
