"""Published blurs against the libraries that their sources call."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image
from scipy.ndimage import correlate1d
from skimage.filters import gaussian

from corruptions.reference._scipy import scipy_kernel
from corruptions.reference.blur import (
    RefDefocusBlur,
    RefGaussianBlur,
    RefTorchvisionBlur,
    disc_tensor,
    published_disc,
    scipy_blur_tensor,
    torchvision_blur_tensor,
)
from corruptions.reference.motion import RefMotionBlur, magick_blur_tensor, magick_offsets, magick_weights
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
ALL = [RefGaussianBlur(), RefTorchvisionBlur(), RefDefocusBlur(), RefMotionBlur()]


def pictures(channels, height, width):
    """Texture, noise, a saturated picture with flat regions, ramps and stripes: sums that fall on whole levels too."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (4, 7, 7, channels), np.uint8)
    smooth = [cv2.resize(each, (width, height), interpolation=cv2.INTER_CUBIC) for each in coarse]
    flat = np.full((height, width, channels), 255, np.uint8)
    flat[height // 3 :, width // 2 :] = 71
    flat[: height // 4] = 0
    ramp = np.broadcast_to((np.arange(width) % 256).astype(np.uint8)[None, :, None], flat.shape)
    stripes = np.where(np.arange(height)[:, None, None] % 2 == 0, 255, 3).astype(np.uint8) * np.ones_like(flat)
    noise = rng.integers(0, 256, flat.shape, np.uint8)
    made = [each.reshape(height, width, channels) for each in (*smooth, flat, ramp, stripes, noise)]
    return np.stack(made)


def tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def ours(corruption, images):
    return corruption(tensor(images), 1, ids=torch.arange(len(images))).permute(0, 2, 3, 1).numpy()


def to_rgb(image):
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def by_scikit_image(image, sigma):
    return (np.clip(gaussian(image / 255.0, sigma=sigma, channel_axis=-1), 0, 1) * 255).astype(np.uint8)


def by_torchvision(image, kernel):
    return np.array(tv.gaussian_blur(Image.fromarray(to_rgb(image)), kernel))[..., : image.shape[-1]]


def by_filter2d(image, radius, alias):
    """The route of the source, channel by channel."""
    grid = np.arange(-8, 9) if radius <= 8 else np.arange(-radius, radius + 1)
    x, y = np.meshgrid(grid, grid)
    disc = np.array((x**2 + y**2) <= radius**2, dtype=np.float32)
    disc /= np.sum(disc)
    disc = cv2.GaussianBlur(disc, ksize=(3, 3) if radius <= 8 else (5, 5), sigmaX=alias)
    planes = [cv2.filter2D(np.ascontiguousarray(image[..., c]) / 255.0, -1, disc) for c in range(image.shape[-1])]
    return (np.clip(np.stack(planes, -1), 0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(64, 61), (28, 28), (5, 90)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [0.1, 0.4, 1, 3, 6])
def test_gaussian_blur_is_scikit_images_bit_for_bit(sigma, channels, size):
    images = pictures(channels, *size)
    expected = np.stack([by_scikit_image(image, sigma) for image in images])
    np.testing.assert_array_equal(ours(RefGaussianBlur.at(sigma=sigma), images), expected)
    elsewhere = scipy_blur_tensor(tensor(images), sigma).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(elsewhere, expected)


def test_the_gaussian_weights_are_scipys_to_the_last_digits():
    line = np.zeros(61)
    line[30] = 1
    for sigma in (0.5, 1.0, 3.0, 6.0):
        kernel = scipy_kernel(sigma)
        spread = gaussian(line, sigma=sigma)[30 - len(kernel) // 2 : 31 + len(kernel) // 2]
        np.testing.assert_allclose(kernel, spread, rtol=0, atol=1e-15)
        np.testing.assert_allclose(correlate1d(line, kernel), gaussian(line, sigma=sigma), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(64, 61), (28, 28), (14, 90)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kernel", [3, 7, 11, 25])
def test_gaussian_blur_of_medmnist_c_is_torchvisions_bit_for_bit(kernel, channels, size):
    images = pictures(channels, *size)
    expected = np.stack([by_torchvision(image, kernel) for image in images])
    np.testing.assert_array_equal(ours(RefTorchvisionBlur.at(kernel=kernel), images), expected)
    if kernel < 25:
        elsewhere = torchvision_blur_tensor(tensor(images), kernel).permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(elsewhere, expected)


def test_where_torchvision_fails_the_border_is_reflected_on():
    images = pictures(1, 4, 4)
    with pytest.raises(RuntimeError):
        by_torchvision(images[0], 11)
    wide = np.pad(images, ((0, 0), (24, 24), (24, 24), (0, 0)), mode="reflect")
    expected = np.stack([by_torchvision(image, 11) for image in wide])[:, 24:28, 24:28]
    np.testing.assert_array_equal(ours(RefTorchvisionBlur.at(kernel=11), images), expected)


@pytest.mark.parametrize("size", [(64, 61), (28, 28), (5, 90)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("radius", "alias"), [(0.3, 0.4), (0.5, 0.6), (1, 0.5), (1.5, 0.1), (3, 0.1), (6, 0.5), (8, 0.5), (10, 0.5)]
)
def test_defocus_is_opencvs_filter_bit_for_bit(radius, alias, channels, size):
    images = pictures(channels, *size)
    expected = np.stack([by_filter2d(image, radius, alias) for image in images])
    np.testing.assert_array_equal(ours(RefDefocusBlur.at(radius=radius, alias=alias), images), expected)


@pytest.mark.parametrize(("radius", "alias"), [(1.5, 0.1), (3, 0.1), (6, 0.5), (10, 0.5)])
def test_defocus_on_other_devices_differs_only_where_sums_are_whole(radius, alias):
    images = pictures(3, 64, 61)
    expected = np.stack([by_filter2d(image, radius, alias) for image in images]).astype(int)
    elsewhere = disc_tensor(tensor(images), published_disc(radius, alias)).permute(0, 2, 3, 1).numpy()
    assert np.abs(elsewhere - expected).max() <= 1
    assert (elsewhere != expected).mean() < 1e-4


def magick(image, radius, sigma, angle):
    """ImageMagick's formula written out tap by tap, in float64 on 16-bit levels."""
    width = 2 * math.ceil(radius) + 1
    weights = [math.exp(-i * i / (2 * sigma * sigma)) for i in range(width)]
    total = sum(weights)
    down, right = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    height, breadth = image.shape[:2]
    sums = np.zeros(image.shape)
    for i, weight in enumerate(weights):
        rows = np.clip(np.arange(height) + math.ceil(i * down - 0.5), 0, height - 1)
        columns = np.clip(np.arange(breadth) + math.ceil(i * right - 0.5), 0, breadth - 1)
        sums += weight / total * 257.0 * image[rows][:, columns]
    return (np.floor(sums + 0.5) // 257).astype(np.uint8)


def angles_of(count, seed=0):
    batch = Batch(torch.zeros(count, 3, 1, 1), None, torch.arange(count))
    return RefMotionBlur().prepare(batch, ShiftContext(seed=seed))["angle"]


@pytest.mark.parametrize("size", [(64, 61), (28, 28), (5, 90)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("radius", "sigma"), [(3, 3), (6, 1), (10, 3), (15, 12), (20, 15)])
def test_motion_blur_is_imagemagicks_formula_bit_for_bit(radius, sigma, channels, size):
    images = pictures(channels, *size)
    angles = angles_of(len(images))
    expected = np.stack(
        [magick(image, radius, sigma, angle) for image, angle in zip(images, angles.double().tolist(), strict=True)]
    )
    np.testing.assert_array_equal(ours(RefMotionBlur.at(radius=radius, sigma=sigma), images), expected)
    weights = magick_weights(radius, sigma)
    elsewhere = magick_blur_tensor(tensor(images), *magick_offsets(angles, len(weights)), weights)
    np.testing.assert_array_equal(elsewhere.permute(0, 2, 3, 1).numpy(), expected)


def test_motion_blur_looks_to_one_side_along_the_drawn_angle():
    images = np.zeros((30, 81, 81, 1), np.uint8)
    images[:, 38:43, 38:43] = 255
    blurred = ours(RefMotionBlur.at(radius=15, sigma=8), images).astype(float)[..., 0]
    place = np.arange(81) - 40
    mass = blurred.sum((1, 2))
    down = (blurred * place[:, None]).sum((1, 2)) / mass
    right = (blurred * place[None, :]).sum((1, 2)) / mass
    weights = magick_weights(15, 8)
    mean = (weights * np.arange(31)).sum()
    # what is read lies to the right, so contents move to the left, by the mean of the weights
    assert np.hypot(down, right) == pytest.approx(mean, abs=0.3)  # truncation loses the faint end
    assert np.degrees(np.arctan2(-down, -right)) == pytest.approx(angles_of(30).numpy(), abs=2.5)


def test_motion_angles_are_uniform_over_a_quarter_turn():
    angles = angles_of(4000, seed=1).double()
    assert -45 <= angles.min().item() < -44.5
    assert 44.5 < angles.max().item() < 45
    counts = torch.histc(angles, 12, -45, 45)
    assert ((counts - 4000 / 12) ** 2 / (4000 / 12)).sum().item() < 31.3  # chi-square, 11 degrees, p = 0.001


@pytest.mark.parametrize("blur", ALL, ids=lambda blur: blur.name)
@pytest.mark.parametrize("channels", [1, 3])
def test_neither_batch_nor_memory_layout_changes_a_bit(blur, channels):
    images, ids = tensor(pictures(channels, 43, 38)).contiguous(), torch.arange(8)
    whole = blur(images, 2.6, ids=ids)
    assert torch.equal(blur(images.to(memory_format=torch.channels_last), 2.6, ids=ids), whole)
    assert torch.equal(blur(images.flip(0), 2.6, ids=ids.flip(0)).flip(0), whole)
    assert torch.equal(torch.cat([blur(images[i : i + 1], 2.6, ids=ids[i : i + 1]) for i in range(8)]), whole)


@pytest.mark.parametrize("blur", ALL, ids=lambda blur: blur.name)
def test_grey_images_are_one_of_three_equal_channels_and_any_size_runs(blur):
    for size in ((1, 1), (2, 3), (28, 28)):
        images, ids = tensor(pictures(1, *size)), torch.arange(8)
        for severity in (0.3, 3, 5):
            coloured = blur(images.expand(-1, 3, -1, -1), severity, ids=ids)
            assert torch.equal(coloured[:, :1], blur(images, severity, ids=ids))
            assert torch.equal(coloured[:, 2], coloured[:, 0])


@pytest.mark.skipif(not (DATA / "pneumoniamnist.npz").exists(), reason="the shared image sets are not here")
def test_real_images_at_28_px_equal_the_sources():
    with np.load(DATA / "pneumoniamnist.npz") as held:
        images = held["test_images"][:16, :, :, None]
    for kernel in (3, 5, 7, 9, 11):
        expected = np.stack([by_torchvision(image, kernel) for image in images])
        np.testing.assert_array_equal(ours(RefTorchvisionBlur.at(kernel=kernel), images), expected)
    for sigma in (0.4, 1.0, 3.0):
        expected = np.stack([by_scikit_image(image, sigma) for image in images])
        np.testing.assert_array_equal(ours(RefGaussianBlur.at(sigma=sigma), images), expected)
