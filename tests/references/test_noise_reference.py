"""Noise of the published benchmarks against the exact laws of their formulas."""

import numpy as np
import pytest
import torch
from scipy import stats
from skimage.util import random_noise

from corruptions._poisson import alias, alias_table
from corruptions.reference.noise import RefGaussianNoise, RefImpulseNoise, RefShotNoise, RefSpeckleNoise

LEVELS = np.arange(256)


def drawn(shift, level, count=400_000, channels=3):
    """Return the counts of each byte that a flat image of this grey level becomes."""
    side = round((count / 8 / channels) ** 0.5)
    pixels = torch.full((8, channels, side, side), level, dtype=torch.uint8)
    changed = shift(pixels, 1, ids=torch.arange(8) + 1000 * level)
    return np.bincount(changed.flatten().numpy(), minlength=256)


def p_value(seen, law):
    """Return the chi-square p-value, bytes of fewer than 8 expected hits taken together."""
    expected = law * seen.sum()
    assert seen[expected == 0].sum() == 0
    rare = (expected < 8) & (expected > 0)
    some = expected >= 8
    seen = np.append(seen[some], seen[rare].sum())
    expected = np.append(expected[some], expected[rare].sum())
    if expected[-1] < 8:  # too few to test by themselves
        seen, expected = np.append(seen[:-2], seen[-2:].sum()), np.append(expected[:-2], expected[-2:].sum())
    if len(seen) == 1:
        return 1.0
    return stats.chi2.sf(((seen - expected) ** 2 / expected).sum(), len(seen) - 1)


def truncated_normal(mean, deviation):
    """Return the law of floor(clip(mean + deviation z, 0, 255)): everything at or above 255 is stored as 255."""
    upper = stats.norm.cdf((LEVELS + 1 - mean) / deviation)
    upper[255] = 1
    return np.diff(upper, prepend=0)


def truncated_poisson(level, photons):
    """Return the law of the published expression, summed over the counts."""
    mean = level / 255.0 * photons
    counts = np.arange(int(max(photons, mean) + 60 * (1 + mean**0.5)))
    stored = (np.clip(counts / float(photons), 0, 1) * 255).astype(np.uint8)
    return np.bincount(stored, stats.poisson.pmf(counts, mean), minlength=256)


@pytest.mark.parametrize("sigma", [0.02, 0.08, 0.38])
@pytest.mark.parametrize("level", [0, 3, 100, 251, 255])
def test_gaussian_noise_has_the_exact_law(sigma, level):
    assert p_value(drawn(RefGaussianNoise.at(sigma=sigma), level), truncated_normal(level, 255 * sigma)) > 1e-3


@pytest.mark.parametrize("sigma", [0.06, 0.15, 0.6])
@pytest.mark.parametrize("level", [1, 20, 128, 255])
def test_speckle_noise_has_the_exact_law(sigma, level):
    assert p_value(drawn(RefSpeckleNoise.at(sigma=sigma), level), truncated_normal(level, level * sigma)) > 1e-3
    assert drawn(RefSpeckleNoise.at(sigma=sigma), 0, 3000)[0] > 0


def test_speckle_leaves_black_alone():
    assert drawn(RefSpeckleNoise.at(sigma=0.6), 0)[1:].sum() == 0


@pytest.mark.parametrize("photons", [0.4, 2.5, 3, 12, 60, 113.7, 255, 500, 3000])
def test_the_photon_table_holds_the_exact_law_of_every_grey_level(photons):
    entries = alias_table(photons, torch.device("cpu")).numpy().view(np.uint32).reshape(256, 256).astype(np.int64)
    own, other, threshold = entries & 255, (entries >> 8) & 255, entries >> 16
    for level in range(256):
        law = np.bincount(own[level], threshold[level], minlength=256)
        law += np.bincount(other[level], 65536 - threshold[level], minlength=256)
        assert np.abs(law / 2**24 - truncated_poisson(level, photons)).max() < 1.01 / 2**24


@pytest.mark.parametrize("photons", [3, 60, 500])
@pytest.mark.parametrize("level", [0, 2, 64, 200, 255])
def test_shot_noise_has_the_exact_law_and_moments(photons, level):
    law = truncated_poisson(level, photons)
    seen = drawn(RefShotNoise.at(photons=photons), level)
    assert p_value(seen, law) > 1e-3
    mean = (law * LEVELS).sum()
    variance = (law * (LEVELS - mean) ** 2).sum()
    fourth = (law * (LEVELS - mean) ** 4).sum()
    count = seen.sum()
    assert abs((seen * LEVELS).sum() / count - mean) <= 4.5 * (variance / count) ** 0.5
    spread = (seen * (LEVELS - mean) ** 2).sum() / count
    assert abs(spread - variance) <= 4.5 * ((fourth - variance**2) / count) ** 0.5


def test_alias_tables_hold_any_weights_exactly():
    generator = np.random.default_rng(0)
    weights = generator.exponential(1, (40, 16)) ** 4
    weights[::3, 5:] = 0
    edges = np.rint(np.cumsum(weights, 1) / weights.sum(1, keepdims=True) * (16 << 16)).astype(np.int64)
    weights = np.diff(edges, axis=1, prepend=0)
    threshold, other = alias(weights)
    assert threshold.min() >= 0
    assert threshold.max() < 1 << 16
    for row in range(40):
        found = threshold[row] + np.bincount(other[row], (1 << 16) - threshold[row], minlength=16)
        assert np.array_equal(found, weights[row])


@pytest.mark.parametrize("amount", [0.005, 0.03, 0.27, 1.0])
def test_impulse_noise_has_the_share_and_ratio_of_scikit_image(amount):
    level, side = 77, 200
    seen = drawn(RefImpulseNoise.at(amount=amount), level)
    law = np.zeros(256)
    law[[0, level, 255]] = amount / 2, 1 - amount, amount / 2
    assert p_value(seen, law) > 1e-3
    image = np.full((side, side, 3), level, np.uint8)
    theirs = random_noise(image / 255.0, mode="s&p", amount=amount, rng=np.random.default_rng(3))
    theirs = np.bincount((theirs.clip(0, 1) * 255).astype(np.uint8).ravel(), minlength=256)
    if amount < 1:
        table = np.array([seen[[0, level, 255]], theirs[[0, level, 255]]])
        assert stats.chi2_contingency(table).pvalue > 1e-3
    else:
        assert theirs[level] == seen[level] == 0


def test_impulses_are_independent_between_channels():
    pixels = torch.full((8, 3, 96, 96), 128, dtype=torch.uint8)
    hit = RefImpulseNoise.at(amount=0.1)(pixels, 1, ids=torch.arange(8)) != 128
    both = (hit[:, 0] & hit[:, 1]).sum().item()
    expected = 0.01 * 8 * 96 * 96
    assert abs(both - expected) < 4.5 * expected**0.5


@pytest.mark.parametrize(("kind", "scale"), [(RefGaussianNoise, 1.0), (RefSpeckleNoise, 0.5)])
def test_grey_images_lose_a_third_of_the_noise_as_published(kind, scale):
    sigma = 0.1
    grey = torch.full((6, 1, 160, 160), 128, dtype=torch.uint8)
    noise = kind.at(sigma=sigma)(grey, 1, ids=torch.arange(6)).double() / 255
    weights = np.array([0.299, 0.587, 0.114])
    share = (weights**2).sum() ** 0.5
    assert share == pytest.approx(0.669, abs=5e-4)
    # 1/12 of a grey level of variance is added by truncating three channels, weighted, and again by the rounded luma
    rounding = ((share**2 + 1) / 12) ** 0.5 / 255
    expected = ((sigma * scale * 128 / 127.5 if scale < 1 else sigma) ** 2 * share**2 + rounding**2) ** 0.5
    assert noise.std().item() == pytest.approx(expected, rel=5 / (2 * noise.numel()) ** 0.5)


def test_grey_impulses_move_a_quarter_of_the_pixels_and_make_almost_none_black_or_white():
    grey = torch.full((6, 1, 160, 160), 128, dtype=torch.uint8)
    changed = RefImpulseNoise.at(amount=0.09)(grey, 1, ids=torch.arange(6))
    count = changed.numel()
    moved = 1 - (1 - 0.09) ** 3
    assert (changed != 128).sum().item() == pytest.approx(moved * count, abs=4.5 * (moved * (1 - moved) * count) ** 0.5)
    assert ((changed == 0) | (changed == 255)).double().mean().item() < 1e-3
