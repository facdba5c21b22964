"""LaDiNE's three shifts against outside libraries and closed forms."""

import cv2
import numpy as np
import pytest
import torch
from scipy import stats

from corruptions.reference.ladine import RefLadineContrast, RefLadineNoise, RefLadineResolution


def images_of(count, channels, height, width):
    generator = torch.Generator().manual_seed(5)
    return torch.rand((count, channels, height, width), generator=generator)


def test_noise_is_normal_unclipped_and_independent_in_every_channel():
    images = torch.full((4, 3, 100, 100), 0.9)
    noise = (RefLadineNoise.at(sigma=0.5)(images, 1, ids=torch.arange(4)) - images).double().numpy() / 0.5
    assert (noise > 0.2).mean() > 0.4, "pixels leave [0, 1]"
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    rows = noise.reshape(12, -1)
    assert np.abs(np.corrcoef(rows) - np.eye(12)).max() < 4.5 / rows.shape[1] ** 0.5


@pytest.mark.parametrize("factor", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("size", [(96, 96), (61, 75)], ids=str)
def test_resolution_is_opencvs_bilinear_resizing_down_and_up(size, factor):
    images = images_of(2, 3, *size)
    changed = RefLadineResolution.at(factor=factor)(images, 1)
    small = (size[1] // factor, size[0] // factor)
    for image, done in zip(images, changed, strict=True):
        down = cv2.resize(image.permute(1, 2, 0).numpy(), small, interpolation=cv2.INTER_LINEAR)
        wanted = cv2.resize(down, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
        assert np.abs(done.permute(1, 2, 0).numpy() - wanted).max() < 1e-4


@pytest.mark.parametrize("factor", [0.9, 0.7, 0.5])
def test_contrast_is_about_one_mean_of_all_channels(factor):
    images = images_of(3, 3, 20, 30) * torch.tensor([1.0, 0.5, 0.2]).view(3, 1, 1)
    pixels = images.double().numpy()
    mean = pixels.mean((1, 2, 3), keepdims=True)
    wanted = np.clip(factor * (pixels - mean) + mean, 0, 1)
    assert np.abs(RefLadineContrast.at(factor=factor)(images, 1).numpy() - wanted).max() < 1e-6
