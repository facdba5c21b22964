"""Noise keeps its promises: the same bytes in blocks and on tensors, compiled, on any threads, in any batch."""

import hashlib
import math
import shutil

import numpy as np
import pytest
import torch

import corruptions._words as words
from corruptions import _poisson
from corruptions._poisson import alias_table
from corruptions.compose import Compose
from corruptions.noise import GaussianNoise, ImpulseNoise, PoissonNoise, SpeckleNoise
from corruptions.reference.noise import RefGaussianNoise, RefImpulseNoise, RefShotNoise, RefSpeckleNoise
from robustlab.core import rng
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch

CPU = torch.device("cpu")
REFERENCE = [RefGaussianNoise(), RefShotNoise(), RefImpulseNoise(), RefSpeckleNoise()]
PHYSICAL = [GaussianNoise(), PoissonNoise(), ImpulseNoise(), SpeckleNoise()]
SHAPES = [(3, 3, 224, 200), (150, 3, 28, 28), (2, 3, 221, 219), (5, 3, 1, 1)]
GOLDEN = {
    "ref:gaussian-noise": "d4459c188a275776ebeac520d66bfb1d56b89b3060b506bb77a9d70b903c10fd",
    "ref:shot-noise": "735d23812f24924de5a6f984eb43a43b8af6ac10ed369fabc6a657f36f6ef18d",
    "ref:impulse-noise": "26124247c45ceaec9615ea927bdb669600226ae8d11e5ee1b1cdb01d1a785e60",
    "ref:speckle-noise": "2cd0b4f3dcae1042d183e6278ea3cf73986b1f2984de50ba5a45da7a58e2af34",
    "gaussian-noise": "ff344fc00988e77166f76f1312f9203a49b9c682ef8fafadaabc99ed5ad28e2a",
    "poisson-noise": "944a7c576a70f98fd4bb5807955aae885cb788600f724efe564a843ba3a946e6",
    "impulse-noise": "b74386139e8a9aa6921c1f5cd025421e0edda52238e52e6706bfdbabaf2db3f5",
    "speckle-noise": "060098830ea9fff018bb6022fc8c71f62ab6e71019d36f7401a17818fbcb5836",
}


def named(shift):
    return shift.name


def ramp(shape):
    """Every grey level, in an order that no row or channel repeats."""
    return (torch.arange(math.prod(shape)) * 7919 % 256).to(torch.uint8).view(shape)


def keys(count):
    return torch.arange(900, 900 + count)


@pytest.mark.parametrize("shift", REFERENCE, ids=named)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_equal_tensors_bit_for_bit(shift, shape, monkeypatch):
    pixels = ramp(shape)
    severities = (0.4, 1, 3.3, 5)
    blocks = [shift(pixels, severity, ids=keys(len(pixels))) for severity in severities]
    monkeypatch.setattr(words, "on_tensors", lambda stream: True)
    monkeypatch.setattr(rng, "on_tensors", lambda stream: True)
    for severity, block in zip(severities, blocks, strict=True):
        assert torch.equal(shift(pixels, severity, ids=keys(len(pixels))), block)


@pytest.mark.slow
def test_compiled_equals_eager_bit_for_bit():
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU, and none is installed")
    gaussian, alias, speckle = words.gaussian_table(0.18, CPU), alias_table(12.0, CPU), words.speckle_scale(0.35, CPU)

    def every_kernel(pixels, stream):
        return (
            words.add_noise(pixels, stream, gaussian),
            words.sample_alias(pixels, stream, alias),
            words.salt_and_pepper(pixels, stream, 0.09),
            words.add_scaled_noise(pixels, stream, *speckle),
        )

    # an odd number of pixels, whose last word serves only one
    pixels, stream = ramp((3, 3, 31, 33)), SampleRng.make(0, "compiled", keys(3)).stream("noise")
    compiled = torch.compile(every_kernel, fullgraph=True)(pixels, stream)
    assert all(map(torch.equal, compiled, every_kernel(pixels, stream)))


@pytest.mark.parametrize("shift", REFERENCE + PHYSICAL, ids=named)
def test_threads_blocks_and_memory_layout_change_no_bit(shift, monkeypatch):
    pixels, before = ramp((9, 3, 61, 57)), torch.get_num_threads()
    results = []
    try:
        for threads, block in ((1, rng.BLOCK), (2, 1000), (2, 12345), (4, 977), (1, 1 << 20)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(rng, "BLOCK", block)
            results.append(shift(pixels, 2.6, ids=keys(9)))
    finally:
        torch.set_num_threads(before)
    results.append(shift(pixels.to(memory_format=torch.channels_last), 2.6, ids=keys(9)))
    results.append(torch.cat([shift(pixels[i : i + 1], 2.6, ids=keys(9)[i : i + 1]) for i in range(9)]))
    assert all(torch.equal(result, results[0]) for result in results)
    assert not torch.equal(results[0], pixels)


@pytest.mark.parametrize("shift", PHYSICAL, ids=named)
@pytest.mark.parametrize("shape", [(3, 3, 100, 111), (40, 1, 28, 28), (2, 4, 1, 1)], ids=str)
def test_bytes_are_the_rounded_floats(shift, shape):
    pixels = ramp(shape)
    for severity in (0.3, 2, 4.5):
        floats = shift(pixels / 255, severity, ids=keys(len(pixels)))
        assert torch.equal((floats * 255).round().to(torch.uint8), shift(pixels, severity, ids=keys(len(pixels))))


@pytest.mark.parametrize("sigma", [1e-7, 0.01, 0.1234, 0.25, 1.0, 100.0])
def test_whole_number_noise_is_the_rounded_float_noise(sigma, monkeypatch):
    monkeypatch.setattr(words, "_TABLE_COST", 0)
    # enough values for the hundreds whose sum lies near a half, where single precision decides
    pixels, noise = ramp((20, 3, 112, 112)), GaussianNoise.at(sigma=sigma)
    floats = noise(pixels / 255, 1, ids=keys(20))
    assert torch.equal((floats * 255).round().to(torch.uint8), noise(pixels, 1, ids=keys(20)))


@pytest.mark.parametrize("photons", [0.3, 10.0, 137.1, 400.0, 1e4])
def test_photon_table_holds_every_quantile(photons):
    every = np.broadcast_to(np.arange(65536), (256, 65536)).copy()
    cells, entries = _poisson.quantile_table(photons, 1 << 21)
    entry = entries.view(np.uint32)[(np.arange(256)[:, None] << 8) + cells]
    found = np.where(every < entry >> 16, entry & 255, (entry >> 8) & 255)
    assert np.array_equal(found, _poisson._stored_quantiles(every, photons))


def test_photon_noise_by_table_is_the_photon_noise(monkeypatch):
    asked = []
    monkeypatch.setattr(_poisson, "_asked", lambda photons: asked)
    for shape in [(3, 3, 100, 111), (2, 3, 221, 219)]:
        pixels, noise = ramp(shape), PoissonNoise.at(photons=33.3)
        asked[:] = [-(1 << 30)]
        floats = noise(pixels, 1, ids=keys(len(pixels)))
        asked[:] = [1 << 30]
        assert torch.equal(noise(pixels, 1, ids=keys(len(pixels))), floats)
        assert asked[0] > 1 << 30


@pytest.mark.parametrize("kind", [GaussianNoise, RefGaussianNoise])
def test_two_equal_stages_are_independent(kind):
    sigma = 0.04
    noise = kind.at(sigma=sigma)
    batch = Batch(torch.full((6, 3, 96, 96), 128, dtype=torch.uint8), None, keys(6))
    twice = Compose([noise, noise]).on(batch, 1, ShiftContext()).images.double() / 255
    count = twice.numel()
    assert twice.std().item() == pytest.approx(sigma * 2**0.5, rel=5 / (2 * count) ** 0.5)


@pytest.mark.parametrize("kind", [GaussianNoise, SpeckleNoise])
def test_grey_images_get_all_of_the_noise(kind):
    sigma, level = 0.1, 0.5
    grey = torch.full((4, 1, 128, 128), level)
    noise = kind.at(sigma=sigma)(grey, 1, ids=keys(4)) - level
    nominal = sigma if kind is GaussianNoise else sigma * level
    assert noise.std().item() == pytest.approx(nominal, rel=5 / (2 * noise.numel()) ** 0.5)


def test_impulses_hit_all_channels_of_a_pixel_and_nest():
    images = torch.full((8, 3, 96, 96), 0.5)
    count, hit = 8 * 96 * 96, torch.zeros(8, 96, 96, dtype=torch.bool)
    for amount in (0.01, 0.05, 0.3):
        changed = ImpulseNoise.at(amount=amount)(images, 1, ids=keys(8))
        assert torch.equal(changed, changed[:, :1].expand_as(changed))
        salt, pepper = changed[:, 0] == 1, changed[:, 0] == 0
        assert torch.equal(salt | pepper, changed[:, 0] != 0.5)
        for share, seen in ((amount, salt | pepper), (amount / 2, salt), (amount / 2, pepper)):
            assert seen.sum().item() == pytest.approx(share * count, abs=4.5 * (share * count) ** 0.5)
        assert not bool((hit & ~(salt | pepper)).any())
        hit = salt | pepper
    assert bool((ImpulseNoise.at(amount=1.0)(images, 1, ids=keys(8)) != 0.5).all())


@pytest.mark.parametrize("kind", [RefGaussianNoise, RefSpeckleNoise])
def test_samples_and_neighbours_are_uncorrelated(kind):
    pixels = torch.full((12, 3, 96, 96), 128, dtype=torch.uint8)
    noise = kind.at(sigma=0.1)(pixels, 1, ids=keys(12)).double()
    noise = (noise - noise.mean()) / noise.std()
    flat = noise.flatten(1)
    bound = 5 / flat.shape[1] ** 0.5
    assert (flat @ flat.T / flat.shape[1] - torch.eye(12)).abs().fill_diagonal_(0).max().item() < bound
    total = noise.numel() ** 0.5
    for lag in (1, 2, 3, 96, 97, 9216):  # 1: both halves of a word; 96: a row; 9216: a channel
        assert abs((flat[:, lag:] * flat[:, :-lag]).mean().item()) * total < 5
    assert abs((noise**4).mean().item() - 3) < 5 * (96**0.5) / total
    assert abs((noise**3).mean().item()) < 5 * (15**0.5) / total


@pytest.mark.parametrize("shift", REFERENCE + PHYSICAL, ids=named)
def test_golden_bytes_do_not_move(shift):
    digest = hashlib.sha256()
    for channels in (1, 3):
        pixels = ramp((4, channels, 32, 33))
        for severity, seed in ((1, 0), (2.5, 1), (5, 7)):
            digest.update(shift(pixels, severity, seed=seed, ids=keys(4)).numpy().tobytes())
    assert digest.hexdigest() == GOLDEN[shift.name], f"{shift.name} changed: raise its version with the new hash"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shift", REFERENCE, ids=named)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_equals_the_cpu_bit_for_bit(shift, shape):
    pixels, ids = ramp(shape), keys(shape[0])
    for severity in (0.4, 1, 3.3, 5):
        there = shift(pixels.cuda(), severity, ids=ids.cuda())
        assert there.device.type == "cuda"
        assert torch.equal(there.cpu(), shift(pixels, severity, ids=ids))
