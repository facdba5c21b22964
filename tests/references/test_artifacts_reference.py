"""MedMNIST-C's artefacts against compositions with Pillow, OpenCV and NumPy, image by image, for the same draws."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy.stats import chisquare

import corruptions.reference.artifacts as artifacts
from corruptions.reference.artifacts import (
    RefBlackCorner,
    RefBubble,
    RefCharacters,
    RefStainDeposit,
    blot_masks,
    disc_half_widths,
    pick,
    whiten,
)
from robustlab.core.errors import ConfigError, RangeError
from robustlab.core.rng import SampleRng

ALL = (RefStainDeposit(), RefBubble(), RefBlackCorner(), RefCharacters())
by_name = pytest.mark.parametrize("shift", ALL, ids=lambda shift: shift.name)
IDS = torch.arange(300, 306)


def pixels_of(count, channels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def values_of(shift, severity):
    return {name: levels.at(severity) for name, levels in shift.levels().items()}


def whole(bits, low, high):
    """Return what a generator of whole numbers from ``low`` to ``high`` gives for 32 random bits."""
    return low + ((int(bits) % 2**32) * (high - low + 1) >> 32)


def draw(shift, size, count=6, extreme=None):
    draws = shift.draw(SampleRng.make(4, shift.name, torch.arange(count)), (3, *size))
    return draws if extreme is None else {name: torch.full_like(bits, extreme) for name, bits in draws.items()}


def each(pixels, function):
    """Return the images after a function of one (H, W, 3) image and its index."""
    done = [function(index, image.permute(1, 2, 0).numpy().copy()) for index, image in enumerate(pixels)]
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(224, 224), (221, 219), (64, 97), (31, 28), (2, 3), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_black_corner_equals_opencv(size, channels):
    height, width = size
    pixels = pixels_of(3, channels, height, width)
    for severity, share in enumerate((1.10, 1.05, 1.00, 0.90, 0.95), start=1):
        canvas = np.zeros(size, np.uint8)
        x, y = width // 2, height // 2
        radius = int(min(x, y, width - x, height - y) * share)
        cv2.circle(canvas, (x, y), radius, 255, thickness=-1)
        wanted = torch.where(torch.from_numpy(canvas == 255), pixels, 0)
        assert torch.equal(RefBlackCorner()(pixels, severity), wanted)


def test_black_corner_keeps_the_published_order():
    white = torch.full((1, 3, 224, 224), 255, dtype=torch.uint8)
    hidden = [(RefBlackCorner()(white, severity) == 0).float().mean().item() for severity in (1, 2, 3, 4, 5)]
    assert hidden[2] < hidden[4] < hidden[3]
    assert hidden[3] == pytest.approx(0.374, abs=0.005)
    assert hidden[4] == pytest.approx(0.297, abs=0.005)
    assert torch.equal(RefBlackCorner()(white, 1e-9), white)


@pytest.mark.parametrize("radius", range(1, 40))
def test_discs_are_pillows(radius):
    canvas = Image.new("L", (2 * radius + 9,) * 2)
    ImageDraw.Draw(canvas).ellipse((4, 4, 4 + 2 * radius, 4 + 2 * radius), fill=1)
    rows = np.asarray(canvas)[4 + radius : 5 + 2 * radius]
    middle = 4 + radius
    for row, half in zip(rows, disc_half_widths(radius), strict=True):
        assert np.flatnonzero(row).tolist() == list(range(middle - half, middle + half + 1))


def test_whitening_equals_pillows_paste():
    grey = np.arange(256, dtype=np.uint8)
    under, opacity = np.meshgrid(grey, grey)
    image = Image.fromarray(np.repeat(under[..., None], 3, 2))
    layer = np.full((256, 256, 4), 255, np.uint8)
    layer[..., 3] = opacity
    image.paste(Image.fromarray(layer), (0, 0), Image.fromarray(layer))
    wanted = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
    pixels = torch.from_numpy(under).expand(1, 3, 256, 256)
    assert torch.equal(whiten(pixels, torch.from_numpy(opacity)[None, None]), wanted)


def with_pillow(image, number, bubbles, values):
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    layer = Image.new("RGBA", picture.size, (255, 255, 255, 0))
    pen = ImageDraw.Draw(layer)
    for bits in bubbles[: whole(number, 7, int(values["count"]))]:
        r = whole(bits[0], 3, int(values["radius"]))
        # the source takes its height for the width
        x, y = whole(bits[1], r, height - r), whole(bits[2], r, width - r)
        pen.ellipse((x - r - 2, y - r - 2, x + r + 2, y + r + 2), fill=(255, 255, 255, 130))
        pen.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 255, 100))
    picture.paste(layer, (0, 0), layer)
    return np.asarray(picture)


@pytest.mark.parametrize("size", [(224, 224), (60, 97), (34, 34)])
@pytest.mark.parametrize("extreme", [None, 0, -1])
def test_bubbles_equal_pillow(size, extreme):
    shift, pixels = RefBubble(), pixels_of(len(IDS), 3, *size)
    draws = draw(shift, size, extreme=extreme)
    for severity in (1, 3, 5):
        values = values_of(shift, severity)
        wanted = each(
            pixels,
            lambda i, image, values=values: with_pillow(
                image, draws["number"][i, 0], draws["bubbles"][i].tolist(), values
            ),
        )
        assert torch.equal(shift.change(pixels, draws, values), wanted)


@pytest.mark.parametrize("size", [(224, 224), (60, 97), (52, 52)])
@pytest.mark.parametrize("extreme", [None, 0, -1])
def test_stain_deposits_equal_numpy(size, extreme):
    shift, pixels = RefStainDeposit(), pixels_of(len(IDS), 3, *size)
    draws = draw(shift, size, extreme=extreme)
    for severity, (most, side) in enumerate(((1, 24), (2, 24), (3, 24), (4, 24), (5, 32)), start=1):

        def blotted(index, image, most=most, side=side):
            number = most if most == 1 else whole(draws["number"][index, 0], 1, most)
            for bits in draws["blots"][index, :number].tolist():
                ink = blot_masks(side)[whole(bits[0], 0, 9)]
                x, y = whole(bits[1], 10, size[1] - side - 10), whole(bits[2], 10, size[0] - side - 10)
                image[y : y + side, x : x + side] *= ~ink[..., None]
            return image

        assert torch.equal(shift.change(pixels, draws, values_of(shift, severity)), each(pixels, blotted))


def with_opencv(image, number, words, letters, values):
    height, width = image.shape[:2]
    for bits, row in zip(words[: whole(number, 1, int(values["words"]))], letters, strict=False):
        length = whole(bits[0], 3, int(values["letters"]))
        scale = whole(bits[1], 14, int(values["scale"] * 100)) / 100.0
        place = (whole(bits[2], 10, width - 8 * length), whole(bits[3], 10, height - 10))
        text = "".join("abcdefghijklmnopqrstuvwxyz"[whole(letter, 0, 25)] for letter in row[:length])
        colour = tuple(whole(value, 0, 255) for value in bits[4:])
        cv2.putText(image, text, place, cv2.FONT_HERSHEY_DUPLEX, scale, colour, 1, cv2.LINE_AA)
    return image


@pytest.mark.parametrize("size", [(224, 224), (101, 90)])
@pytest.mark.parametrize("extreme", [None, 0, -1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_characters_equal_opencv(size, extreme, layout):
    shift, pixels = RefCharacters(), pixels_of(len(IDS), 3, *size)
    draws = draw(shift, size, extreme=extreme)
    for severity in (1, 2, 3, 4, 5):
        values = values_of(shift, severity)
        wanted = each(
            pixels,
            lambda i, image, values=values: with_opencv(
                image, draws["number"][i, 0], draws["words"][i].tolist(), draws["letters"][i].tolist(), values
            ),
        )
        assert torch.equal(shift.change(pixels.contiguous(memory_format=layout), draws, values), wanted)
        assert not torch.equal(wanted, pixels)


@pytest.mark.parametrize("size", [(224, 224), (60, 97)])
def test_the_batched_forms_give_the_same_bits(size, monkeypatch):
    pixels = pixels_of(len(IDS), 3, *size)
    for shift in (RefStainDeposit(), RefBubble()):
        for severity in (1, 5):
            plain = shift(pixels, severity, ids=IDS)
            with monkeypatch.context() as patch:
                patch.setattr(artifacts, "_blots_each", artifacts._blots_together)
                patch.setattr(artifacts, "_bubbles_each", artifacts._bubbles_together)
                assert torch.equal(shift(pixels, severity, ids=IDS), plain)


@by_name
def test_sample_results_ignore_batch_and_layout(shift):
    pixels = pixels_of(6, 3, 110, 97)
    before, order = pixels.clone(), torch.tensor([3, 0, 5])
    for severity in (0.4, 2, 5):
        plain = shift(pixels, severity, ids=IDS)
        assert torch.equal(shift(pixels[order], severity, ids=IDS[order]), plain[order])
        for other in (pixels.to(memory_format=torch.channels_last), pixels.mT.contiguous().mT):
            assert torch.equal(shift(other, severity, ids=IDS), plain)
        wide = torch.zeros(6, 3, 110, 120, dtype=torch.uint8)
        wide[..., :97] = pixels
        assert torch.equal(shift(wide[..., :97], severity, ids=IDS), plain)
    assert torch.equal(pixels, before)


@by_name
def test_grey_images_go_through_three_equal_channels(shift):
    grey = pixels_of(6, 1, 100, 100)
    colour = shift(grey.expand(-1, 3, -1, -1), 5, ids=IDS)
    wanted = [np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")) for image in colour]
    assert torch.equal(shift(grey, 5, ids=IDS)[:, 0], torch.from_numpy(np.stack(wanted)))


def test_picks_are_uniform():
    bits = SampleRng.make(0, "picks", torch.arange(4000)).bits("x", 3)
    for count in (5, 9, 26):
        values = pick(bits, count)
        assert values.min() == 0
        assert values.max() == count - 1
        assert chisquare(torch.bincount(values.flatten(), minlength=count).numpy()).pvalue > 1e-4
    several = pick(bits, torch.tensor([1, 2, 7]))
    assert several.amax(0).tolist() == [0, 1, 6]


def test_blots_hide_as_much_as_the_published_ones():
    shares = {size: blot_masks(size).mean((1, 2)) for size in (24, 32)}
    # mean and deviation of the ink in the published masks
    assert (shares[24].mean(), shares[24].std()) == pytest.approx((0.625, 0.094), abs=0.003)
    assert (shares[32].mean(), shares[32].std()) == pytest.approx((0.541, 0.046), abs=0.003)
    count, size = 2000, 60
    white = torch.full((count, 1, size, size), 255, dtype=torch.uint8)
    black = (RefStainDeposit()(white, 1, ids=torch.arange(count)) == 0).double().sum((1, 2, 3))
    expected = shares[24].mean() * 24 * 24
    assert abs(black.mean().item() - expected) < 4.5 * black.std().item() / count**0.5
    number = 1 + pick(draw(RefStainDeposit(), (size, size), count)["number"], 5)
    assert chisquare(torch.bincount(number[:, 0], minlength=6)[1:].numpy()).pvalue > 1e-4


def test_blots_and_bubbles_spread_over_the_image():
    count, size = 3000, 64
    white = torch.full((count, 1, size, size), 255, dtype=torch.uint8)
    inked = (RefStainDeposit()(white, 1, ids=torch.arange(count)) == 0).double().mean(0)[0]
    assert not inked[:10].any()
    assert not inked[:, -10:].any()
    row, column = (torch.arange(size) * inked.sum(axis) / inked.sum() for axis in (1, 0))
    assert row.sum().item() == pytest.approx(31.5, abs=0.6)
    assert column.sum().item() == pytest.approx(31.5, abs=0.6)


@by_name
def test_images_too_small_for_the_source_are_refused(shift):
    side = shift.min_size
    assert shift(pixels_of(2, 3, side, side), 5).shape == (2, 3, side, side)
    if side > 1:
        with pytest.raises(ConfigError, match=f"at least {side} x {side} px"):
            shift(pixels_of(2, 3, side, side - 1), 5)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (RefBubble, "count", 6),
        (RefBubble, "radius", 2),
        (RefBubble, "radius", 18),
        (RefStainDeposit, "size", 12),
        (RefStainDeposit, "blots", 17),
        (RefCharacters, "letters", 11),
        (RefCharacters, "scale", 0.1),
    ],
)
def test_limits_at_which_the_source_does_not_run_are_refused(kind, name, value):
    with pytest.raises(RangeError, match=name):
        kind.at(**{name: value})
