"""Resolution and compression in physical mode: bytes against floats, and the resampling parts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from corruptions._jpeg import round_trip
from corruptions._resample import box_members, nearest
from corruptions.compression import JPEG
from corruptions.resolution import DownUpSampling, Pixelate, counts
from robustlab.core.shift import ShiftContext, from_bytes, to_bytes
from robustlab.core.types import Batch

KINDS = (DownUpSampling, Pixelate, JPEG)
SIZES = [(1, 1), (2, 7), (28, 28), (33, 65), (224, 200)]


def random_bytes(count, channels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    severity=st.floats(0.01, 5),
    size=st.sampled_from(SIZES),
    channels=st.sampled_from([1, 3, 4]),
    seed=st.integers(0, 9),
)
def test_bytes_equal_rounded_floats(kind, severity, size, channels, seed):
    pixels = random_bytes(3, channels, *size, seed)
    direct = kind()(pixels, severity)
    batch = Batch(from_bytes(pixels), None, torch.arange(3))
    assert torch.equal(direct, to_bytes(kind().on(batch, severity, ShiftContext()).images))
    assert torch.equal(kind()(pixels.contiguous(memory_format=torch.channels_last), severity), direct)
    assert torch.equal(kind()(pixels[1:2], severity)[0], direct[1])


@pytest.mark.parametrize("factor", [0.6, 0.5, 0.33, 0.25, 0.1, 1.5, 2.0, 3.0, 4.0])
def test_ties_of_whole_cells_round_as_floats_do(factor):
    pixels = (random_bytes(2, 3, 60, 60) // 128) * torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1)
    kind = Pixelate if factor < 1 else DownUpSampling
    shift = kind.at(factor=factor)
    batch = Batch(from_bytes(pixels), None, torch.arange(2))
    assert torch.equal(shift(pixels), to_bytes(shift.on(batch, 3, ShiftContext()).images))


@pytest.mark.parametrize(("height", "width"), [(28, 28), (31, 33), (224, 200), (5, 1)])
def test_nearest_copies_as_pillows_box_filter_enlarges(height, width):
    for rows, columns in ((1, 1), (3, 1), (height // 2 or 1, width // 2 or 1), (height, width)):
        small = random_bytes(1, 3, rows, columns)
        image = Image.fromarray(small[0].permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BOX)
        assert np.array_equal(nearest(small, height, width)[0].permute(1, 2, 0).numpy(), np.asarray(image))


def test_every_pixel_is_in_one_cell():
    for size in (1, 2, 7, 28, 219, 224):
        for count in {1, max(1, size // 3), max(1, int(size * 0.6)), size}:
            members = box_members(size, count)
            assert members.any(1).all()
            assert (members.sum(0) >= 1).all()
            assert (members.sum(0) <= 1).all()


def test_at_least_one_pixel_is_left():
    assert counts(torch.zeros(1, 1, 3, 500), 0.01) == (1, 5)
    pixels = random_bytes(1, 3, 3, 3)
    flat = Pixelate.at(factor=0.01)(pixels)
    assert torch.equal(flat, flat[..., :1, :1].expand_as(flat))


def test_the_tensor_codec_is_what_jpeg_does():
    for channels in (1, 3, 4):
        pixels = random_bytes(2, channels, 45, 38)
        assert torch.equal(JPEG.at(quality=12)(pixels), round_trip(pixels, 12))
    assert torch.equal(JPEG.at(quality=12.4)(pixels), JPEG.at(quality=12)(pixels))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_equal_rounded_floats_on_cuda(kind):
    pixels = random_bytes(4, 3, 61, 64).cuda()
    for severity in (0.4, 1, 3, 5):
        batch = Batch(from_bytes(pixels), None, torch.arange(4).cuda())
        done = to_bytes(kind().on(batch, severity, ShiftContext()).images)
        assert torch.equal(kind()(pixels, severity, ids=torch.arange(4)), done)
