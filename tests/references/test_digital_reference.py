"""JPEG and pixelation in reference mode against Pillow."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from corruptions import compression
from corruptions._jpeg import quantisation, round_trip
from corruptions._resample import box_down, nearest
from corruptions.compression import JPEG, compress, jpeg
from corruptions.reference.digital import RefJPEG, RefPixelate

QUALITIES = (1, 5, 7, 10, 15, 25, 40, 50, 65, 80, 95)
SMALL = [(1, 1), (1, 2), (2, 1), (3, 4), (4, 5), (5, 3), (8, 8), (9, 17), (16, 3), (17, 9), (15, 33)]
FACTORS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.15, 0.1)


def pictures(height, width):
    """Noise, black and white noise, waves, stripes, edges and a flat image, uint8 (6, H, W, 3)."""
    rng = np.random.default_rng(height * 1000 + width)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.stack([127 + 100 * np.sin(rows / (5 + c) + columns / (9 - c)) for c in range(3)], -1)
    stripes = np.repeat(((columns % 3 == 0) * 255)[..., None], 3, -1) * np.array([1, 0, 1])
    edges = np.where(((rows // 7 + columns // 11) % 2)[..., None], [250, 30, 60], [10, 220, 200])
    flat = np.full((height, width, 3), (200, 100, 37))
    noise = rng.integers(0, 256, (height, width, 3))
    extreme = rng.integers(0, 2, (height, width, 3)) * 255
    return np.stack([noise, extreme, waves, stripes, edges, flat]).astype(np.uint8)


def by_pillow(image, quality):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def tensor(images):
    batch = torch.from_numpy(images)
    return batch[:, None] if batch.ndim == 3 else batch.permute(0, 3, 1, 2)


def array(batch):
    images = batch.permute(0, 2, 3, 1).numpy()
    return images[..., 0] if images.shape[3] == 1 else images


@pytest.mark.parametrize("size", [(224, 224), (200, 216), (221, 219), (28, 28)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_integer_jpeg_equals_pillow_bit_for_bit(size, channels):
    images = pictures(*size)
    images = images if channels == 3 else images[..., 0].copy()
    for quality in QUALITIES:
        expected = np.stack([by_pillow(each, quality) for each in images])
        assert np.array_equal(array(round_trip(tensor(images), quality)), expected), quality
        assert np.array_equal(array(RefJPEG.at(quality=quality)(tensor(images))), expected), quality


@pytest.mark.parametrize("size", SMALL, ids=str)
def test_integer_jpeg_equals_pillow_on_small_images(size):
    for images in (pictures(*size), pictures(*size)[..., 0].copy()):
        for quality in QUALITIES:
            expected = np.stack([by_pillow(each, quality) for each in images])
            assert np.array_equal(array(round_trip(tensor(images), quality)), expected), quality
            assert np.array_equal(array(compress(tensor(images), quality)), expected), quality


def test_pillow_steps_in_where_opencv_decodes_otherwise(monkeypatch):
    images = pictures(40, 50)
    expected = np.stack([by_pillow(each, 20) for each in images])
    assert compression._opencv_is_pillow()
    monkeypatch.setattr(compression, "_opencv_is_pillow", lambda: False)
    monkeypatch.setattr(compression, "_opencv_jpeg", None)
    assert np.array_equal(array(compress(tensor(images), 20)), expected)
    assert np.array_equal(jpeg(images[0], 20), expected[0])


def test_quantisation_tables_are_those_in_pillows_files():
    from corruptions._jpeg import _CHROMA, _LUMA

    for quality in range(1, 101):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=quality)
        stored = Image.open(buffer).quantization
        for place, base in enumerate((_LUMA, _CHROMA)):
            assert quantisation(base, quality).ravel().tolist() == list(stored[place])


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (224, 224), (221, 219), (31, 60), (3, 2), (1, 1)], ids=str)
def test_pixelate_equals_pillow_bit_for_bit(size):
    images = pictures(*size)[:3]
    height, width = size
    for factor in FACTORS:
        small = max(1, int(width * factor)), max(1, int(height * factor))
        box = Image.Resampling.BOX
        expected = [np.asarray(Image.fromarray(i).resize(small, box).resize((width, height), box)) for i in images]
        assert np.array_equal(array(RefPixelate.at(factor=factor)(tensor(images))), np.stack(expected)), factor
        on_tensors = nearest(box_down(tensor(images), small[1], small[0]), height, width)
        assert np.array_equal(array(on_tensors), np.stack(expected)), factor
        grey = array(RefPixelate.at(factor=factor)(tensor(images[..., 0].copy())))
        through = [
            np.asarray(Image.fromarray(i[..., 0]).resize(small, box).resize((width, height), box)) for i in images
        ]
        assert np.array_equal(grey, np.stack(through)), factor


@pytest.mark.parametrize("corruption", [RefJPEG(), RefPixelate(), JPEG()], ids=lambda each: each.name)
def test_batch_layout_and_input_do_not_matter(corruption):
    batch = tensor(pictures(33, 47))
    ids = torch.arange(len(batch))
    before = batch.clone()
    whole = corruption(batch, 2.4, ids=ids)
    assert torch.equal(corruption(batch.contiguous(), 2.4, ids=ids), whole)
    assert torch.equal(torch.cat([corruption(batch[i : i + 1], 2.4, ids=ids[:1]) for i in ids]), whole)
    assert torch.equal(batch, before)
    floats = corruption(batch.to(torch.float64) / 255, 2.4, ids=ids)
    assert torch.equal((floats * 255).round().to(torch.uint8), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [RefJPEG, RefPixelate, JPEG])
def test_cuda_gives_the_same_bytes(kind):
    for size in [(224, 224), (221, 219), (28, 28), (5, 3)]:
        for batch in (tensor(pictures(*size)), tensor(pictures(*size)[..., 0].copy())):
            for severity in (0.5, 1, 3, 5):
                assert torch.equal(kind()(batch.cuda(), severity).cpu(), kind()(batch, severity))
