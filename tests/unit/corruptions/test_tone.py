"""Tone and colour in physical mode: bytes against floats, closed forms, white and grey."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corruptions._bytes import each_image, interleaved, look_up, planar, sums
from corruptions.colour import Saturation
from corruptions.contrast import Brightness, ContrastGain, ContrastLoss, Gamma, copy_and_means
from corruptions.staining import StainShift
from robustlab.core.errors import ConfigError, RangeError
from robustlab.core.shift import ShiftContext, from_bytes, luma, to_bytes
from robustlab.core.types import Batch

KINDS = (ContrastLoss, ContrastGain, Gamma, Brightness, Saturation, StainShift)
DATA = Path(__file__).resolve().parents[3] / ".." / "shared" / "data"
SIZES = [(1, 1), (9, 14), (28, 28), (65, 33)]


def random_bytes(count, channels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def channels_of(kind):
    return kind.channels or (1, 3, 4)


def by_floats(shift, pixels, severity, ids):
    return to_bytes(shift.on(Batch(from_bytes(pixels), None, ids), severity, ShiftContext()).images)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(severity=st.floats(0.01, 5), size=st.sampled_from(SIZES), seed=st.integers(0, 99))
def test_bytes_equal_rounded_floats(kind, severity, size, seed):
    for channels in channels_of(kind):
        pixels = random_bytes(4, channels, *size, seed)
        ids = torch.arange(seed, seed + 4)
        direct = kind()(pixels, severity, ids=ids)
        assert torch.equal(direct, by_floats(kind(), pixels, severity, ids))
        last = pixels.contiguous(memory_format=torch.channels_last)
        assert torch.equal(kind()(last, severity, ids=ids), direct)


@pytest.mark.parametrize("kind", [ContrastLoss, ContrastGain, Gamma, Brightness])
@pytest.mark.parametrize("severity", [0.3, 1, 2.5, 5])
def test_every_level_at_every_mean(kind, severity):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).repeat(8, 1, 3, 1)
    levels[:, :, 1:] = (torch.arange(8) * 36).view(8, 1, 1, 1).to(torch.uint8)
    ids = torch.arange(8)
    assert torch.equal(kind()(levels, severity, ids=ids), by_floats(kind(), levels, severity, ids))


@pytest.mark.parametrize("kind", [Saturation, StainShift])
def test_every_level_of_each_channel(kind):
    steps = torch.tensor([*range(0, 256, 17), 1, 2, 254], dtype=torch.uint8)
    grid = torch.stack(torch.meshgrid(steps, steps, torch.arange(256, dtype=torch.uint8), indexing="ij")).flatten(1)
    pixels = torch.stack([grid, grid.roll(1, 0), grid.roll(2, 0)])[:, :, None]
    ids = torch.arange(3)
    assert torch.equal(kind()(pixels, 3.3, ids=ids), by_floats(kind(), pixels, 3.3, ids))


@pytest.mark.parametrize("kind", [Saturation, StainShift])
@pytest.mark.parametrize("size", [(224, 200), (300, 230)], ids=str)
def test_images_larger_than_a_block_keep_their_own_draws(kind, size):
    pixels, ids = random_bytes(4, 3, *size), torch.arange(4)
    assert torch.equal(kind()(pixels, 3, ids=ids), by_floats(kind(), pixels, 3, ids))


def test_means_of_bytes_are_those_of_floats():
    for pixels in (random_bytes(5, 3, 60, 70), random_bytes(3, 1, 1, 1), torch.full((2, 3, 224, 224), 255).byte()):
        floats = from_bytes(pixels).to(torch.float64).mean((1, 2, 3)).to(torch.float32)
        copy, means = copy_and_means(pixels)
        assert torch.equal(means, floats)
        assert torch.equal(copy, pixels)
        assert copy.data_ptr() != pixels.data_ptr()


def of_sign(kind, sign):
    """Return an id whose draw is ``sign``."""
    batch = Batch(torch.zeros(64, 3, 1, 1), None, torch.arange(64))
    return (kind().prepare(batch, ShiftContext())["sign"].flatten() == sign).nonzero()[:1, 0]


def test_brightness_multiplies_or_divides():
    ramp = torch.linspace(0, 1, 200).view(1, 1, 1, 200)
    for sign, gain in ((1, 1.6), (-1, 1 / 1.6)):
        done = Brightness.at(gain=1.6)(ramp, ids=of_sign(Brightness, sign))
        assert torch.allclose(done, (ramp * gain).clamp(0, 1), atol=1e-6)


def test_contrast_gain_clips_at_both_ends():
    ramp = torch.linspace(0, 1, 201).view(1, 1, 1, 201)
    done = ContrastGain.at(factor=2.0)(ramp)
    assert torch.allclose(done, (2 * ramp - 0.5).clamp(0, 1), atol=1e-6)
    assert (done == 0).sum().item() >= 50
    assert (done == 1).sum().item() >= 50


def test_saturation_scales_chroma_and_keeps_luma():
    images = from_bytes(random_bytes(1, 3, 30, 30)) * 0.2 + 0.4
    for sign, factor in ((1, 1.5), (-1, 1 / 1.5)):
        done = Saturation.at(factor=1.5)(images, ids=of_sign(Saturation, sign))
        assert torch.allclose(luma(done), luma(images), atol=1e-6)
        assert torch.allclose(done - luma(done), factor * (images - luma(images)), atol=1e-6)


@pytest.mark.parametrize("kind", [Saturation, StainShift])
def test_white_and_for_saturation_grey_stay_bit_for_bit(kind):
    white = torch.full((64, 3, 4, 4), 255, dtype=torch.uint8)
    ids = torch.arange(64)
    for severity in (0.5, 1, 3, 5):
        assert torch.equal(kind()(white, severity, ids=ids), white)
        assert torch.equal(kind()(from_bytes(white), severity, ids=ids), from_bytes(white))
    if kind is Saturation:
        greys = torch.arange(256, dtype=torch.uint8).expand(64, 3, 1, 256)
        assert torch.equal(kind()(greys, 5, ids=ids), greys)
        assert torch.equal(kind()(from_bytes(greys), 5, ids=ids), from_bytes(greys))


def test_stains_at_identity_parameters_change_no_byte():
    steps = torch.arange(0, 256, 5, dtype=torch.uint8)
    colours = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij")).flatten(1)[None, :, :, None]
    assert torch.equal(StainShift.at(alpha=1.0, beta=0.0)(colours), colours)


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent")
def test_empty_glass_of_a_real_slide_takes_up_no_stain():
    image = np.load(DATA / "oral_he_400x_96.npz")["test_images"][210]
    corner = np.zeros((96, 96), dtype=bool)
    corner[65:, :40] = True  # mostly blank, of a greenish lamp
    blank = torch.from_numpy(corner & (np.abs(image.astype(int) - [188, 224, 214]).max(-1) <= 16))
    assert blank.sum() > 1000
    pixels = torch.from_numpy(image).permute(2, 0, 1).repeat(16, 1, 1, 1)
    moved = (StainShift()(pixels, 5, ids=torch.arange(16)).int() - pixels.int()).abs()
    assert moved[:, :, blank].max() <= 2
    assert moved[:, :, ~torch.from_numpy(corner)].float().mean((1, 2)).min() > 5


def slide(tissue, blank):
    """Return 64 images, the lower tenth of which is blank slide, with a little noise."""
    pixels = torch.tensor(tissue).view(1, 3, 1, 1).repeat(64, 1, 40, 40)
    pixels[:, :, 36:] = torch.tensor(blank).view(3, 1, 1)
    return (pixels + torch.randint(-3, 4, pixels.shape, generator=torch.Generator().manual_seed(3))).to(torch.uint8)


@pytest.mark.parametrize(
    ("blank", "stays"),
    [((150, 190, 230), True), ((70, 80, 66), True), ((235, 200, 235), False), ((40, 45, 40), False)],
)
def test_the_lamp_may_have_any_colour_but_that_of_stains(blank, stays):
    pixels = slide([level * 2 // 5 for level in blank], blank)
    moved = (StainShift()(pixels, 5, ids=torch.arange(64)).int() - pixels.int()).abs()
    assert (moved[:, :, 36:].max() <= 1) == stays
    assert moved[:, :, :36].float().mean((1, 2, 3)).min() > 0.05 * max(blank)
    for severity in (0.4, 3.0):
        assert torch.equal(
            StainShift()(pixels, severity, ids=torch.arange(64)),
            by_floats(StainShift(), pixels, severity, torch.arange(64)),
        )


def test_saturation_is_for_colour_images():
    with pytest.raises(ConfigError, match="3 channels"):
        Saturation()(random_bytes(1, 1, 4, 4))
    for kind, name in ((Brightness, "gain"), (ContrastGain, "factor"), (Saturation, "factor")):
        with pytest.raises(RangeError, match=name):
            kind.at(**{name: 0.9})


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (28, 28), (40, 67)], ids=str)
def test_tables_of_any_kind_at_any_size(size, last):
    pixels = random_bytes(3, 3, *size)
    pixels = pixels.contiguous(memory_format=torch.channels_last) if last else pixels
    before = pixels.clone()
    generator = torch.Generator().manual_seed(1)
    table = torch.randint(0, 256, (3, 3, 256), generator=generator, dtype=torch.uint8)
    index = pixels.long()
    assert torch.equal(look_up(pixels, table[0, 0]), table[0, 0][index])
    rows = table[:, 1]
    assert torch.equal(look_up(pixels, rows), torch.stack([row[each] for row, each in zip(rows, index, strict=True)]))
    expected = torch.stack([torch.stack([table[n, c][index[n, c]] for c in range(3)]) for n in range(3)])
    assert torch.equal(look_up(pixels, table), expected)
    assert torch.equal(pixels, before)
    made = look_up(pixels, rows, overwrite=True)
    assert torch.equal(made, torch.stack([row[each] for row, each in zip(rows, index, strict=True)]))


def test_layouts_sums_and_images():
    for channels in (1, 3, 4):
        plain = random_bytes(3, channels, 13, 17)
        for pixels in (
            plain,
            plain.contiguous(memory_format=torch.channels_last),
            plain.repeat(1, 1, 2, 2)[..., :13, :17],
        ):
            assert torch.equal(planar(pixels), plain)
            assert planar(pixels).is_contiguous()
            assert torch.equal(sums(pixels), plain.sum((2, 3)))
            assert torch.equal(each_image(lambda image: 255 - image, pixels), 255 - plain)
            if channels == 3:
                assert torch.equal(torch.from_numpy(interleaved(pixels)).permute(0, 3, 1, 2), plain)
    wide = random_bytes(2, 1, 8, 8).expand(2, 3, 8, 8)
    assert torch.equal(planar(wide), wide)
    assert torch.equal(sums(wide), wide.sum((2, 3)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_equal_rounded_floats_on_cuda(kind):
    pixels, ids = random_bytes(6, 3, 61, 64).cuda(), torch.arange(6)
    for severity in (0.4, 1, 3, 5):
        assert torch.equal(kind()(pixels, severity, ids=ids), by_floats(kind(), pixels, severity, ids.cuda()))
