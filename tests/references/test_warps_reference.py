"""Zoom blur, glass blur and elastic deformation against SciPy, scikit-image, OpenCV and the published loops."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates, zoom
from skimage.filters import gaussian

from corruptions.reference._scipy import centre_crop
from corruptions.reference._scipy import gaussian as blurred
from corruptions.reference.geometry import (
    RefElastic,
    elastic_transform,
    inverse_affine,
    noise_of,
    smoothed_noise,
    warp_affine,
)
from corruptions.reference.glass import RefGlassBlur, chain_ends, glass_blur
from corruptions.reference.zoom import RefZoomBlur, _Line, _zoomed, clipped_zoom, zoom_blur

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
IMAGENET_C_ZOOMS = [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)]
GLASS = [(0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2), (0.1, 1, 1), (0.05, 1, 1)]


def picture(height, width, seed=0):
    """Noise, a flat part and a black one, (H, W, 3) uint8."""
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image[: height // 3] = image[0, 0]
    image[-(height // 5) :, : width // 2] = 0
    return image


def batch(*images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def image_of(pixels):
    return pixels[0].permute(1, 2, 0).numpy()


def scipy_zoomed(image, factor):
    counts = [math.ceil(size / factor) for size in image.shape[:2]]
    (top, left) = ((size - count) // 2 for size, count in zip(image.shape, counts, strict=False))
    grown = zoom(image[top : top + counts[0], left : left + counts[1]], (factor, factor, 1), order=1)
    over = [(after - size) // 2 for after, size in zip(grown.shape, image.shape, strict=True)]
    return grown[over[0] : over[0] + image.shape[0], over[1] : over[1] + image.shape[1]]


def scipy_zoom_blur(image, zooms):
    clean = (image / 255.0).astype(np.float32)
    total = np.zeros_like(clean)
    for factor in zooms:
        total += scipy_zoomed(clean, factor)
    mean = (clean + total) / (len(zooms) + 1)
    return (np.clip(mean, 0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (224, 224), (61, 75), (5, 9)], ids=str)
def test_zoom_blur_equals_scipy_bit_for_bit(size):
    image = picture(*size)
    for stop, step in IMAGENET_C_ZOOMS:
        zooms = np.arange(1, stop, step)
        assert np.array_equal(image_of(zoom_blur(batch(image), zooms.tolist())), scipy_zoom_blur(image, zooms))


@pytest.mark.parametrize("factor", [1.01, 1.3, 1.5, 2.0, 3.7])
def test_one_zoom_equals_scipy(factor):
    for size in [(32, 32), (50, 41), (7, 96)]:
        image = picture(*size, seed=1).astype(np.float32) / np.float32(255)
        ours = clipped_zoom(torch.from_numpy(image).permute(2, 0, 1)[None].double(), factor)
        assert np.array_equal(image_of(ours), scipy_zoomed(image, factor))


def test_zeros_that_scipy_writes_past_the_end_are_kept():
    """4 px zoomed 47 times: 187 * (3 / 187) exceeds 3 in floating point."""
    image = np.ones((188, 188, 1), np.float32)
    expected = scipy_zoomed(image, 47.0)
    assert expected.min() == 0, "SciPy no longer does this"
    assert np.array_equal(image_of(clipped_zoom(torch.ones(1, 1, 188, 188, dtype=torch.float64), 47.0)), expected)


def test_every_layer_equals_scipy_and_so_does_the_route_of_other_devices():
    """Float32 layers, where the last bit of float64 shows in 1 of 100,000 values."""
    image = picture(96, 96, seed=7).astype(np.float32) / np.float32(255)
    fine = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    for factor in np.concatenate(
        [np.arange(1.01, 1.16, 0.01), np.arange(1.02, 1.26, 0.02), np.arange(1.03, 1.3, 0.03)]
    ):
        expected = scipy_zoomed(image, factor)
        assert np.array_equal(image_of(clipped_zoom(fine, factor)), expected)
        top, crop, grown, over = centre_crop(96, factor)
        line = _Line(crop, grown, fine.device)
        slow = _zoomed(fine[:, :, top : top + crop, top : top + crop], line, line)
        assert np.array_equal(image_of(slow)[over : over + 96, over : over + 96], expected)


def test_severities_of_zoom_blur_are_the_published_ones():
    image = picture(40, 40)
    for severity, (stop, step) in enumerate(IMAGENET_C_ZOOMS, start=1):
        ours = RefZoomBlur()(batch(image), severity)
        assert np.array_equal(image_of(ours), scipy_zoom_blur(image, np.arange(1, stop, step)))
    assert len(np.arange(1, 1.11, 0.01)) == 12  # rounding adds a zoom of 1.11


def sequential_glass(image, row, column, sigma, reach):
    held = np.uint8(gaussian(image / 255.0, sigma=sigma, channel_axis=-1) * 255)
    height, width = held.shape[:2]
    for turn in range(len(row)):
        for h in range(height - reach, reach, -1):
            for w in range(width - reach, reach, -1):
                there = h + row[turn, h, w], w + column[turn, h, w]
                held[h, w], held[there] = held[there], held[h, w]
    return np.uint8(np.clip(gaussian(held / 255.0, sigma=sigma, channel_axis=-1), 0, 1) * 255)


@pytest.mark.parametrize(("sigma", "reach", "turns"), GLASS, ids=str)
@pytest.mark.parametrize("size", [(64, 64), (31, 45), (9, 7), (3, 3)], ids=str)
def test_glass_blur_equals_the_sequential_loop_bit_for_bit(size, sigma, reach, turns):
    generator = np.random.default_rng(2)
    images = [picture(*size, seed=seed) for seed in (3, 4)]
    row, column = generator.integers(-reach, reach, (2, 2, turns, *size)).astype(np.int32)
    ours = glass_blur(batch(*images), torch.from_numpy(row), torch.from_numpy(column), sigma, reach)
    for place, image in enumerate(images):
        expected = sequential_glass(image, row[place], column[place], sigma, reach)
        assert np.array_equal(ours[place].permute(1, 2, 0).numpy(), expected)


def test_chains_are_followed_to_their_end():
    """Every interior pixel points to its right neighbour, so a whole row takes the value beyond its end."""
    row, column = torch.zeros(1, 9, 200, dtype=torch.int32), torch.ones(1, 9, 200, dtype=torch.int32)
    ends = chain_ends(row, column, 2).view(9, 200)
    assert (ends[3, 3:199] == 3 * 200 + 199).all()
    assert torch.equal(ends[2], torch.arange(400, 600, dtype=torch.int32))


@pytest.mark.parametrize("mode", ["nearest", "reflect"])
@pytest.mark.parametrize(("sigma", "truncate"), [(0.7, 4.0), (1.5, 4.0), (2.44, 3.0), (9.0, 3.0)])
def test_the_gaussian_equals_scipy_to_the_last_bit(sigma, truncate, mode):
    planes = np.random.default_rng(5).random((2, 33, 20))
    expected = gaussian_filter(planes, (0, sigma, sigma), mode=mode, truncate=truncate)
    assert np.array_equal(blurred(torch.from_numpy(planes), sigma, truncate, mode).numpy(), expected)


def test_the_offsets_of_glass_blur_have_the_published_law():
    """Uniform on -reach ... reach - 1, so content drifts down and to the right."""
    draws = RefGlassBlur().draw(_rng(4), (3, 60, 60))["bits"]
    assert draws.shape == (4, 3, 60, 60)
    ramp = torch.arange(60, dtype=torch.uint8).view(1, 1, 60, 1).expand(4, 3, 60, 60)
    drift = RefGlassBlur()(ramp, 5, ids=torch.arange(4))[:, :, 20:40].float() - ramp[:, :, 20:40].float()
    assert -3 < drift.mean().item() + 0.5 < 3
    half = (draws[:, 0] & 0xFFFF).mul(8).bitwise_right_shift(16).sub(4)
    counts = torch.bincount(half.flatten() + 4, minlength=9)
    assert counts[8] == 0
    assert (counts[:8] - 1800).abs().max() < 4.5 * (14400 * 7 / 64) ** 0.5


def _rng(count):
    from robustlab.core.rng import SampleRng

    return SampleRng.make(0, "test", torch.arange(count))


def fields(size, severity, seed=0):
    """Corner moves and noise in the units of RefElastic's published table."""
    generator = np.random.default_rng(seed)
    plain = RefElastic()
    alpha, sigma, affine = (levels.at(severity) for levels in (plain.alpha, plain.sigma, plain.affine))
    jitter = generator.uniform(-affine, affine, (3, 2)).astype(np.float32)
    noise = generator.uniform(-1, 1, (2, *size)).astype(np.float32)
    return jitter, noise, alpha, sigma


def published_maps(size, jitter):
    """OpenCV's matrix, inverted, and its coordinates as it rounded them to 1/32 px up to version 4."""
    height, width = size
    centre, half = np.float32(size) // 2, min(size) // 3
    corners = np.array([centre + half, [centre[0] + half, centre[1] - half], centre - half], np.float32)
    matrix = cv2.invertAffineTransform(cv2.getAffineTransform(corners, corners + jitter))
    x, y = np.arange(width), np.arange(height)[:, None]
    fixed = [
        (np.rint((line[1] * y + line[2]) * 1024).astype(int) + 16 + np.rint(line[0] * x * 1024).astype(int)) >> 5
        for line in matrix
    ]
    return matrix, fixed[0].astype(np.float32) / 32, fixed[1].astype(np.float32) / 32


@pytest.mark.parametrize("severity", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(64, 64), (61, 75), (28, 28)], ids=str)
def test_the_affinity_equals_opencv(size, severity):
    image = picture(*size).astype(np.float32) / np.float32(255)
    jitter = fields(size, severity)[0] * min(size) / 224
    matrix, x, y = published_maps(size, jitter)
    ours = inverse_affine(torch.from_numpy(jitter)[None], size)
    assert np.allclose(ours[0].numpy(), matrix, rtol=0, atol=1e-9)
    warped = image_of(warp_affine(torch.from_numpy(image).permute(2, 0, 1)[None], ours))
    expected = cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    assert np.abs(warped - expected).max() < 1e-4


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [(48, 60), (3, 5)], ids=str)
def test_the_displacement_equals_scikit_image(size, severity):
    _, noise, alpha, sigma = fields(size, severity)
    ours = smoothed_noise(torch.from_numpy(noise), sigma, alpha).numpy()
    for plane, field in zip(noise, ours, strict=True):
        expected = (gaussian(plane.astype(np.float64), sigma, mode="reflect", truncate=3) * alpha).astype(np.float32)
        assert np.abs(field - expected).max() <= np.abs(expected).max() * 1e-6


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [(64, 64), (61, 75), (3, 3)], ids=str)
def test_sampling_equals_scipy_bit_for_bit(size, severity):
    image = picture(*size)
    _, noise, alpha, sigma = fields(size, severity)
    dx, dy = smoothed_noise(torch.from_numpy(noise), sigma, alpha)
    ours = image_of(elastic_transform(batch(image), None, dx[None], dy[None]))
    clean = np.array(image, dtype=np.float32) / np.float32(255)
    y, x, z = np.meshgrid(*(np.arange(count) for count in image.shape), indexing="ij")
    places = (y + dy.numpy()[..., None], x + dx.numpy()[..., None], z)
    sampled = map_coordinates(clean, places, order=1, mode="reflect")
    assert np.array_equal(ours, (np.clip(sampled, 0, 1) * 255).astype(np.uint8))


def test_elastic_is_its_parts_with_its_draws():
    image, plain = picture(40, 52), RefElastic()
    draws = plain.draw(_rng(1), (3, 40, 52))
    values = {name: levels.at(4) for name, levels in plain.levels().items()}
    noise = noise_of(draws["noise"])
    dx, dy = (smoothed_noise(plane, values["sigma"], values["alpha"]) for plane in noise)
    expected = elastic_transform(batch(image), draws["corners"] * values["affine"], dx, dy)
    assert torch.equal(plain.change(batch(image), draws, values), expected)
    assert draws["corners"].abs().max() <= 1
    for plane in noise:
        assert plane.abs().max() < 1
        assert plane.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.05)
    assert abs(np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]) < 4.5 / math.sqrt(40 * 52)


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are absent")
def test_real_images_agree_bit_for_bit():
    with np.load(DATA / "oral_he_400x_96.npz") as held:
        images = next(held[name] for name in held.files if held[name].ndim == 4)[:3]
    for stop, step in IMAGENET_C_ZOOMS:
        zooms = np.arange(1, stop, step)
        ours = zoom_blur(batch(*images), zooms.tolist()).permute(0, 2, 3, 1).numpy()
        for image, got in zip(images, ours, strict=True):
            assert np.array_equal(got, scipy_zoom_blur(image, zooms))
