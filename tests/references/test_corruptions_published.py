"""Corruptions against outside libraries and closed forms."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from corruptions import (
    JPEG,
    ContrastLoss,
    DefocusBlur,
    DownUpSampling,
    Gamma,
    GaussianNoise,
    Pixelate,
    PoissonNoise,
    StainShift,
    standard,
)
from corruptions._poisson import poisson_quantile
from corruptions.blur import disc_blur, disc_kernel, nested_boxes
from corruptions.staining import STAINS
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext, quantize
from robustlab.core.types import Batch, ImageSpec

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def photograph(height, width, channels, seed=0):
    """Smooth colour gradients, edges and fine noise as uint8 (H, W) or (H, W, 3)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [
        110 + 70 * np.sin(rows / (9 + 5 * c)) * np.cos(columns / (13 - 2 * c)) + 40 * ((rows + 2 * columns) % 41 > 20)
        for c in range(channels)
    ]
    image = np.stack(planes, -1) + rng.normal(0, 6, (height, width, channels))
    image = image.clip(0, 255).astype(np.uint8)
    return image[..., 0] if channels == 1 else image


def tensor(image):
    array = image[..., None] if image.ndim == 2 else image
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].to(torch.float32) / 255


def stored(images):
    pixels = (images[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(224, 224), (221, 219), (28, 28), (1, 1)], ids=str)
@pytest.mark.parametrize("quality", [3, 10, 50, 95])
def test_jpeg_equals_pillow_bit_for_bit(quality, size, channels):
    image = photograph(*size, channels)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    changed = JPEG.at(quality=quality)(tensor(image))
    assert np.array_equal(stored(changed), np.asarray(Image.open(buffer)))
    assert torch.equal(quantize(changed, ImageSpec(channels, size)), changed)


@pytest.mark.parametrize("factor", [0.9, 0.8, 0.6, 0.5, 0.4, 0.33, 0.25, 0.1])
@pytest.mark.parametrize("size", [(224, 224), (221, 219), (28, 31), (1, 1)], ids=str)
def test_pixelate_equals_pillow_on_floats_and_is_within_one_level_on_bytes(size, factor):
    image = photograph(*size, 3)
    small = (max(1, int(size[1] * factor)), max(1, int(size[0] * factor)))
    box = Image.Resampling.BOX
    expected = np.asarray(Image.fromarray(image).resize(small, box).resize((size[1], size[0]), box)).astype(int)
    difference = np.abs(stored(Pixelate.at(factor=factor)(tensor(image))).astype(int) - expected)
    assert difference.max() <= 1
    channel = Image.fromarray(tensor(image)[0, 1].numpy()).resize(small, box).resize((size[1], size[0]), box)
    ours = Pixelate.at(factor=factor)(tensor(image))[0, 1].numpy()
    assert np.allclose(ours, np.asarray(channel), atol=1e-6)


@pytest.mark.parametrize("factor", [2, 4])
def test_down_sampling_by_whole_factors_is_block_averaging_and_bilinear_interpolation(factor):
    images = tensor(photograph(64, 48, 3))
    small = torch.nn.functional.avg_pool2d(images, factor)
    expected = torch.nn.functional.interpolate(small, (64, 48), mode="bilinear", align_corners=False)
    assert torch.allclose(DownUpSampling.at(factor=factor)(images), expected, atol=1e-6)


def test_down_sampling_keeps_a_ramp_where_it_is():
    ramp = (torch.arange(60.0) / 59).expand(1, 1, 60, 60)
    changed = DownUpSampling.at(factor=2.7)(ramp)
    assert (changed - ramp)[..., 6:-6].abs().max().item() < 0.05 / 59  # twentieths of a pixel


@pytest.mark.parametrize("mean", [0.02, 0.3, 1, 3, 7.9, 8, 11, 25, 60, 150, 400, 1000])
def test_poisson_quantiles_agree_with_scipy(mean):
    means = np.linspace(mean, mean * 1.05, 6, dtype=np.float32)
    u = ((np.arange(65536) + 0.5) / 65536).astype(np.float32)
    z = _normal_of_every_cell()
    grid = torch.from_numpy(np.repeat(means, 65536))
    ours = poisson_quantile(grid, torch.from_numpy(np.tile(u, 6)), z.repeat(6)).numpy()
    exact = stats.poisson.ppf(np.tile(u.astype(np.float64), 6), grid.numpy().astype(np.float64))
    off = np.abs(ours - exact)
    assert off.max() <= 1
    assert (off > 0).mean() <= (1e-5 if mean < 7.5 else 6.5e-4)


def _normal_of_every_cell():
    """Return the generator's normal number for each of its 65,536 cells."""
    rng = SampleRng.make(0, "cells", torch.arange(4))
    u, z = rng.quantiles("x", (1 << 20,)).flatten(), rng.normal("x", (1 << 20,)).flatten()
    cell = (u.to(torch.float64) * 65536).to(torch.int64)
    table = torch.full((65536,), float("nan"))
    table[cell] = z
    assert bool(torch.isfinite(table).all())
    return table


@pytest.mark.parametrize("photons", [15, 60, 500])
def test_photon_counts_follow_a_poisson_law(photons):
    level = 0.4
    images = torch.full((1, 1, 300, 300), level)
    counts = PoissonNoise.at(photons=photons)(images, 1) * photons
    assert torch.allclose(counts, counts.round(), atol=1e-3)
    counts = counts.round().numpy().ravel()
    mean = level * photons
    assert counts.mean() == pytest.approx(mean, abs=4.5 * (mean / counts.size) ** 0.5)
    assert counts.var() == pytest.approx(mean, rel=0.04)
    support = np.arange(stats.poisson.ppf(0.001, mean), stats.poisson.ppf(0.999, mean) + 1)
    support = support[support < photons]  # white holds all counts from there on
    seen = np.array([(counts == k).sum() for k in support])
    expected = stats.poisson.pmf(support, mean) * counts.size
    keep = expected > 5
    assert stats.chi2.sf(((seen - expected) ** 2 / expected)[keep].sum(), keep.sum()) > 1e-3


def test_fewer_photons_change_a_count_in_the_same_direction():
    images = torch.full((1, 1, 100, 100), 0.5)
    ctx = ShiftContext()
    batch = Batch(images, None, torch.arange(1))
    high, low = (PoissonNoise.at(photons=n).on(batch, 1, ctx).images.flatten() for n in (400, 60))
    assert np.corrcoef(high, low)[0, 1] > 0.98


def test_gaussian_noise_moments_and_law():
    sigma = 0.08
    images = torch.full((4, 3, 100, 100), 0.5)
    batch = Batch(images, None, torch.arange(4))
    noise = (GaussianNoise.at(sigma=sigma).on(batch, 1, ShiftContext()).images - 0.5).numpy() / sigma
    assert abs(noise.mean()) < 4.5 / noise.size**0.5
    assert noise.std() == pytest.approx(1, abs=4.5 / (2 * noise.size) ** 0.5)
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    flat = noise.reshape(12, -1)
    correlation = np.corrcoef(flat) - np.eye(12)
    assert np.abs(correlation).max() < 4.5 / flat.shape[1] ** 0.5


def test_grey_images_get_the_nominal_noise():
    images = torch.full((1, 1, 256, 256), 0.5)
    assert (GaussianNoise.at(sigma=0.05)(images) - 0.5).std().item() == pytest.approx(0.05, rel=0.01)


def test_gamma_is_the_power_law_in_either_direction():
    levels = torch.arange(256, dtype=torch.float32).div(255).expand(64, 1, 1, 256).contiguous()
    batch = Batch(levels, None, torch.arange(64))
    changed = Gamma.at(exponent=1.7).on(batch, 1, ShiftContext()).images.double()
    dark, bright = (levels[0, 0, 0].double() ** power for power in (1.7, 1 / 1.7))
    is_dark = (changed - dark).abs().amax((1, 2, 3)) < 1e-6
    is_bright = (changed - bright).abs().amax((1, 2, 3)) < 1e-6
    assert bool((is_dark ^ is_bright).all())
    assert 16 < int(is_dark.sum()) < 48


def test_contrast_keeps_the_mean_and_scales_the_deviation():
    images = tensor(photograph(50, 60, 3))
    changed = ContrastLoss.at(factor=0.4)(images)
    mean = images.mean()
    assert torch.allclose(changed, mean + 0.4 * (images - mean), atol=1e-6)


def test_defocus_kernel_is_the_mean_over_the_disc():
    for radius in (0.05, 0.4, 1.3, 3.0, 7.5):
        kernel = disc_kernel(radius)
        assert kernel.sum() == pytest.approx(1, abs=1e-12)
        assert kernel.min() >= 0
        reach = len(kernel) // 2
        offsets = np.arange(-reach, reach + 1.0)
        # variance of a disc along an axis is r^2 / 4; bilinear interpolation adds the mean of t (1 - t) over the disc
        rng = np.random.default_rng(0)
        points = rng.uniform(-radius, radius, (400_000, 2))
        points = points[np.hypot(*points.T) <= radius]
        part = points[:, 0] - np.floor(points[:, 0])
        spread = (kernel.sum(0) * offsets**2).sum()
        assert spread == pytest.approx(radius**2 / 4 + (part * (1 - part)).mean(), rel=0.01)


@pytest.mark.parametrize("blur", [disc_blur, nested_boxes])
@pytest.mark.parametrize("radius", [0.3, 1.7, 4.2, 9.0])
def test_defocus_equals_direct_convolution_and_preserves_energy(radius, blur):
    images = tensor(photograph(40, 57, 3))
    kernel = torch.from_numpy(disc_kernel(radius))
    reach = len(kernel) // 2
    padded = torch.nn.functional.pad(images.double(), (reach,) * 4, mode="replicate")
    expected = torch.nn.functional.conv2d(padded.transpose(0, 1), kernel[None, None]).transpose(0, 1)
    assert torch.allclose(blur(images, radius).double(), expected, atol=3e-6)
    point = torch.zeros(1, 1, 41, 41)
    point[..., 20, 20] = 1
    assert blur(point, radius).sum().item() == pytest.approx(1, abs=1e-5)
    flat = torch.full((1, 1, 9, 9), 0.37)
    assert torch.allclose(blur(flat, radius), flat, atol=1e-6)


def test_defocus_is_given_in_percent_of_the_height():
    small, large = tensor(photograph(28, 28, 1)), tensor(photograph(224, 224, 1))
    assert torch.allclose(DefocusBlur.at(radius=2.0)(small), disc_blur(small, 0.56).clamp(0, 1))
    assert torch.allclose(DefocusBlur.at(radius=2.0)(large), disc_blur(large, 4.48).clamp(0, 1))


def stain_identity():
    return StainShift.at(alpha=1.0, beta=0.0)


def test_stain_shift_at_identity_parameters_changes_nothing_much():
    colours = torch.stack(torch.meshgrid(*[torch.arange(0, 256, 5) / 255.0] * 3, indexing="ij")).flatten(1)
    images = colours[None, :, :, None]
    assert (stain_identity()(images, 3) - images).abs().max().item() * 255 < 0.01


def test_white_stays_white_under_every_stain_shift():
    batch = Batch(torch.ones(64, 3, 4, 4), None, torch.arange(64))
    for severity in (0.5, 1, 3, 5):
        assert torch.equal(StainShift().on(batch, severity, ShiftContext()).images, batch.images)
    nearly = batch.replace(torch.full((64, 3, 4, 4), 252 / 255))
    assert (StainShift().on(nearly, 5, ShiftContext()).images - nearly.images).abs().max().item() < 3.5 / 255


def test_stain_amounts_scale_as_stated():
    amounts = np.array([0.9, 0.5, 0.0])
    colour = np.exp(-amounts @ STAINS)
    batch = Batch(torch.from_numpy(colour).float().reshape(1, 3, 1, 1).repeat(64, 1, 1, 1), None, torch.arange(64))
    changed = StainShift.at(alpha=1.5, beta=0.0).on(batch, 1, ShiftContext()).images.double()[..., 0, 0].numpy()
    after = -np.log(changed) @ np.linalg.inv(STAINS)
    for stain in (0, 1):
        ratio = after[:, stain] / amounts[stain]
        assert np.all(np.isclose(ratio, 1.5, atol=1e-4) | np.isclose(ratio, 1 / 1.5, atol=1e-4))
        assert 16 < np.isclose(ratio, 1.5, atol=1e-4).sum() < 48
    assert np.abs(after[:, 2]).max() < 1e-4


REAL = {
    "oral_he_400x_96.npz": "histology",
    "bccd_cells_40.npz": "microscopy",
    "chestxray_kermany_test_96.npz": "xray",
    "pneumoniamnist.npz": "xray",
    "busi_96.npz": "ultrasound",
}
OTHER = {"dermoscopy": "histology", "fundus": "histology", "endoscopy": "histology", "oct": "ultrasound", "ct": "xray"}


@pytest.mark.parametrize("file", REAL)
@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent")
def test_harm_rises_strictly_on_real_images_of_the_modality(file):
    array = np.load(DATA / file)["test_images"][::7][:24]
    array = array[..., None] if array.ndim == 3 else array
    images = torch.from_numpy(array).permute(0, 3, 1, 2).to(torch.float32) / 255
    batch = Batch(images, None, torch.arange(len(images)))
    spec = ImageSpec(images.shape[1], tuple(images.shape[2:]))
    default = {shift.name for shift in standard()}
    tested = 0
    for name, kind in CORRUPTIONS.items():
        shift = kind()
        tags = {OTHER.get(tag, tag) for tag in shift.seen_in or shift.modalities or (REAL[file],)}
        if shift.mode == "reference" or shift.skip_reason(spec) is not None or REAL[file] not in tags:
            continue
        done = [quantize(shift.on(batch, s, ShiftContext()).images, spec) for s in (1, 2, 3, 4, 5)]
        harm = [(each - images).abs().mean().item() for each in done]
        assert harm == sorted(set(harm)), (name, harm)
        assert harm[0] > 0, name
        assert harm[0] * 255 > 0.5 or name not in default or file == "bccd_cells_40.npz", (name, harm)
        tested += 1
    assert tested >= 10
