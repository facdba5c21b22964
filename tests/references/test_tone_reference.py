"""Tone in reference mode against Pillow, torchvision, scikit-image and NumPy."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from skimage import color
from torchvision.transforms import functional as tv

from corruptions.reference.tone import (
    RefBrightness,
    RefContrast,
    RefGamma,
    RefHSVBrightness,
    RefMeanContrast,
    RefSaturate,
    hsv_values,
)

SIZES = [(300, 230), (221, 219), (28, 28), (17, 9), (1, 1)]
ENHANCE = (0.15, 0.3, 0.5, 0.72, 0.9, 1.1, 1.15, 1.22, 1.4, 1.8, 2.0)
PUBLISHED_HSV = [
    *({"lift": lift} for lift in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)),
    *({"gain": 1.0, "offset": offset} for offset in (0.05, 0.1, 0.15, 0.17, 0.2, 0.25)),
    *({"gain": gain, "offset": 0.0} for gain in (0.3, 0.1, 1.5, 2.0)),
    *({"gain": gain, "offset": offset} for gain, offset in ((2, 0.1), (2.5, 0.2), (5, 0.1), (20, 0.2), (30, 0.2))),
]


def image(height, width, seed=0):
    """Gradients with dark, bright and coloured parts as uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [128 + 110 * np.sin((rows + seed) / (17 + 6 * c) + columns / (23 - 4 * c)) for c in range(3)]
    return (np.stack(planes, -1) + rng.normal(0, 9, (height, width, 3))).clip(0, 255).astype(np.uint8)


def run(corruption, *images, severity=3):
    batch = torch.from_numpy(np.stack(images))
    batch = batch[:, None] if batch.ndim == 3 else batch.permute(0, 3, 1, 2)
    done = corruption(batch, severity, ids=torch.arange(len(batch))).permute(0, 2, 3, 1).numpy()
    return done[..., 0] if done.shape[3] == 1 else done


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("kind", "enhancer"), [(RefBrightness, ImageEnhance.Brightness), (RefContrast, ImageEnhance.Contrast)]
)
def test_brightness_and_contrast_equal_pillow(kind, enhancer, size):
    images = [image(*size, seed) for seed in range(2)]
    images += [(images[0] // 4).astype(np.uint8), (255 - images[1] // 5).astype(np.uint8)]
    for factor in ENHANCE:
        done = run(kind.at(factor=factor), *images)
        grey = run(kind.at(factor=factor), *(each[..., 0] for each in images))
        for place, each in enumerate(images):
            assert np.array_equal(done[place], np.asarray(enhancer(Image.fromarray(each)).enhance(factor)))
            through = Image.fromarray(each[..., 0]).convert("RGB")
            assert np.array_equal(grey[place], np.asarray(enhancer(through).enhance(factor).convert("L")))


@pytest.mark.parametrize(
    ("kind", "enhancer"), [(RefBrightness, ImageEnhance.Brightness), (RefContrast, ImageEnhance.Contrast)]
)
def test_every_grey_level_equals_pillow_at_any_factor(kind, enhancer):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for factor in np.linspace(0.013, 3, 60).tolist():
        expected = np.asarray(enhancer(Image.fromarray(levels)).enhance(factor))
        assert np.array_equal(run(kind.at(factor=factor), levels)[0], expected)


def test_the_pivot_of_contrast_is_rounded_half_up():
    for low, high, pivot in ((10, 11, 11), (20, 23, 22), (0, 1, 1)):
        grey = np.array([[low, high], [high, low]], dtype=np.uint8)
        assert set(run(RefContrast.at(factor=0.0), grey).ravel()) == {pivot}


@pytest.mark.parametrize("gamma", [0.4, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0])
def test_gamma_equals_torchvision_at_every_level(gamma):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colour = np.stack([levels, levels.T, 255 - levels], -1)
    for each in (levels, colour):
        expected = np.asarray(tv.adjust_gamma(Image.fromarray(each), gamma))
        assert np.array_equal(run(RefGamma.at(gamma=gamma), each)[0], expected)


def through_skimage(pixels, gain=1.0, offset=0.0, lift=None):
    hsv = color.rgb2hsv(pixels / 255.0)
    if lift is None:
        hsv[..., 1] = np.clip(hsv[..., 1] * gain + offset, 0, 1)
    else:
        hsv[..., 2] = np.clip(hsv[..., 2] + lift, 0, 1)
    return np.clip(color.hsv2rgb(hsv), 0, 1) * 255


def colours():
    """All greys, all colours on a grid with the extremes, and random ones, as uint8 (H, W, 3)."""
    greys = np.repeat(np.arange(256)[:, None], 3, 1)
    steps = np.unique([*range(0, 256, 15), 1, 2, 127, 128, 254])
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    chance = np.random.default_rng(0).integers(0, 256, (12000, 3))
    every = np.concatenate([greys, grid, chance]).astype(np.uint8)
    return every[: len(every) // 128 * 128].reshape(-1, 128, 3)


@pytest.mark.parametrize("change", PUBLISHED_HSV, ids=str)
def test_hsv_equals_scikit_image_bit_for_bit(change):
    pixels = colours()
    expected = through_skimage(pixels, **change)
    corruption = RefHSVBrightness.at(offset=change["lift"]) if "lift" in change else RefSaturate.at(**change)
    assert np.array_equal(run(corruption, pixels)[0], expected.astype(np.uint8))
    flat = torch.from_numpy(pixels).reshape(1, -1, 3).transpose(1, 2)
    bright, middle, low = (each[0].numpy() * 255 for each in hsv_values(flat, **change))
    three = (np.diff(np.sort(pixels.reshape(-1, 3), axis=1), axis=1) > 0).all(1)
    ordered = np.sort(expected.reshape(-1, 3), axis=1)[three]
    for place, each in enumerate((low, middle, bright)):
        assert np.abs(each[three] - ordered[:, place]).max() <= 255e-12


def test_hsv_of_images_larger_than_a_block():
    images = [image(300, 230, seed) for seed in range(2)]
    done = run(RefSaturate.at(gain=2.0, offset=0.0), *images)
    for place, each in enumerate(images):
        assert np.array_equal(done[place], through_skimage(each, gain=2.0).astype(np.uint8))


def test_grey_images_go_through_three_channels():
    grey = image(40, 50)[..., 1]
    through = np.asarray(Image.fromarray(grey).convert("RGB"))
    for change, corruption in (
        ({"lift": 0.2}, RefHSVBrightness.at(offset=0.2)),
        ({"gain": 1.0, "offset": 0.2}, RefSaturate.at(gain=1.0, offset=0.2)),
        ({"gain": 20.0, "offset": 0.2}, RefSaturate.at(gain=20.0, offset=0.2)),
    ):
        changed = through_skimage(through, **change).astype(np.uint8)
        expected = np.asarray(Image.fromarray(changed).convert("L"))
        assert np.array_equal(run(corruption, grey)[0], expected)


@pytest.mark.parametrize("factor", [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75])
def test_mean_contrast_equals_numpy(factor):
    for size in SIZES[:4]:
        images = [image(*size, seed) for seed in range(3)]
        # where a channel has one value, or its sum is a whole number of levels, the last digit of the mean decides
        images += [np.full_like(images[0], (0, 77, 201)), images[0] // 51 * 51]
        done = run(RefMeanContrast.at(factor=factor), *images)
        for place, each in enumerate(images):
            whole = each / 255.0
            means = np.mean(whole, axis=(0, 1), keepdims=True)
            expected = (np.clip((whole - means) * factor + means, 0, 1) * 255).astype(np.uint8)
            assert np.array_equal(done[place], expected)


@pytest.mark.parametrize(
    "corruption",
    [RefBrightness(), RefContrast(), RefGamma(), RefMeanContrast(), RefHSVBrightness(), RefSaturate()],
    ids=lambda each: each.name,
)
def test_batch_layout_and_input_do_not_matter(corruption):
    batch = torch.from_numpy(np.stack([image(33, 47, seed) for seed in range(5)])).permute(0, 3, 1, 2)
    ids = torch.arange(5)
    before = batch.clone()
    whole = corruption(batch, 2.4, ids=ids)
    assert torch.equal(corruption(batch.contiguous(), 2.4, ids=ids), whole)
    assert torch.equal(torch.cat([corruption(batch[i : i + 1], 2.4, ids=ids[:1]) for i in range(5)]), whole)
    assert torch.equal(batch, before)
    assert not torch.equal(whole, batch)
    sliced = torch.zeros(5, 3, 40, 60, dtype=torch.uint8)
    sliced[..., 3:36, 5:52] = batch
    assert torch.equal(corruption(sliced[..., 3:36, 5:52], 2.4, ids=ids), whole)
    floats = corruption(batch.to(torch.float64) / 255, 2.4, ids=ids)
    assert torch.equal((floats * 255).round().to(torch.uint8), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [RefBrightness, RefContrast, RefGamma, RefMeanContrast, RefHSVBrightness, RefSaturate])
def test_cuda_gives_the_same_bytes(kind):
    colour = torch.from_numpy(colours()[None]).permute(0, 3, 1, 2)
    for batch in (colour, colour[:, :1]):
        for severity in (0.5, 1, 2, 3, 4, 5):
            here, there = kind()(batch, severity), kind()(batch.cuda(), severity)
            assert torch.equal(there.cpu(), here)


def test_levels_are_those_published():
    assert RefSaturate().parameters(5) == {"gain": (20, "x saturation"), "offset": (0.2, "of full saturation")}
    assert RefHSVBrightness().offset.values == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert dataclasses.replace(RefGamma(), published="gamma_corr_up").label == "gamma_corr_up"
