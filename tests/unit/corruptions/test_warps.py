"""Zoom blur, glass blur and elastic deformation: closed forms and laws."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import label, map_coordinates

from corruptions.geometry import Elastic, displacement, warp
from corruptions.glass import GlassBlur, gather, offsets
from corruptions.motion import MotionBlur
from corruptions.reference.geometry import RefElastic
from corruptions.reference.glass import RefGlassBlur
from corruptions.reference.motion import RefMotionBlur
from corruptions.reference.zoom import RefZoomBlur
from corruptions.zoom import ZoomBlur, zoom_mean
from robustlab.core.errors import ConfigError, RangeError
from robustlab.core.registry import SUITES
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch

PHYSICAL = [ZoomBlur(), GlassBlur(), Elastic()]
REFERENCE = [RefZoomBlur(), RefGlassBlur(), RefElastic()]


def textured(count, channels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, channels, height, width)
    for cells in (3, 9, 27):
        coarse = torch.rand(count, channels, cells, cells, generator=generator)
        total += torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (((total / 3 - 0.5) * 1.6 + 0.55).clamp(0, 1) * 255).round() / 255


def name_of(shift):
    return shift.name


def rng_of(count, seed=0):
    return SampleRng.make(seed, "test", torch.arange(count))


@pytest.mark.parametrize("shift", PHYSICAL + REFERENCE, ids=name_of)
@pytest.mark.parametrize("size", [(28, 28), (61, 75), (224, 200)], ids=str)
def test_batch_layout_and_order_change_no_bit(shift, size):
    images = textured(5, 3, *size)
    ids = torch.arange(20, 25)
    for given in (images, (images * 255).round().to(torch.uint8)):
        whole = shift(given, 3.3, ids=ids)
        assert torch.equal(shift(given.to(memory_format=torch.channels_last), 3.3, ids=ids), whole)
        index = torch.tensor([3, 0, 4])
        assert torch.equal(shift(given[index], 3.3, ids=ids[index]), whole[index])
        assert torch.equal(shift(given[1:2], 3.3, ids=ids[1:2]), whole[1:2])


@pytest.mark.parametrize("shift", PHYSICAL, ids=name_of)
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_bytes_give_the_rounded_result_of_floats(shift, channels):
    images = textured(3, channels, 40, 33)
    pixels = (images * 255).round().to(torch.uint8)
    expected = (shift(images, 3, ids=torch.arange(3)) * 255).round().to(torch.uint8)
    assert torch.equal(shift(pixels, 3, ids=torch.arange(3)), expected)


@pytest.mark.parametrize("shift", PHYSICAL, ids=name_of)
@pytest.mark.parametrize("size", [28, 64])
def test_harm_rises_with_severity(shift, size):
    images = textured(6, 3, size, size, seed=2)
    harm = [(shift(images, s, ids=torch.arange(6)) - images).abs().mean().item() for s in (0, 0.5, 1, 2, 3, 4, 5)]
    assert all(low < high for low, high in itertools.pairwise(harm)), harm


@pytest.mark.parametrize("shift", PHYSICAL + REFERENCE, ids=name_of)
def test_flat_images_and_grey_ones(shift):
    flat = torch.full((2, 3, 30, 34), 0.6)
    assert (shift(flat, 5, ids=torch.arange(2)) - flat).abs().max() <= 1.001 / 255
    grey = (textured(2, 1, 30, 34) * 255).round().to(torch.uint8)
    colour = shift(grey.expand(-1, 3, -1, -1), 4, ids=torch.arange(2))
    assert torch.equal(shift(grey, 4, ids=torch.arange(2)), colour[:, :1])


@pytest.mark.parametrize("shift", [GlassBlur(), Elastic(), RefGlassBlur(), RefElastic()], ids=name_of)
def test_draws_are_keyed_by_sample_and_blind_to_pixels(shift):
    first = shift.draw(rng_of(4), (3, 20, 24))
    one = shift.draw(SampleRng.make(0, "test", torch.tensor([2])), (1, 20, 24))
    for name, value in first.items():
        assert len(value) == 4
        assert torch.equal(one[name][0], value[2])
        assert not torch.equal(value[0], value[1])


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (ZoomBlur, {"zoom": 0.9}),
        (GlassBlur, {"reach": -1.0}),
        (Elastic, {"displacement": 2.5}),
        (RefZoomBlur, {"stop": 0.5}),
        (RefZoomBlur, {"step": 0.0}),
        (RefGlassBlur, {"iterations": 1e6}),
        (RefElastic, {"alpha": 1e6}),
    ],
)
def test_values_outside_their_range_are_refused(kind, values):
    with pytest.raises(RangeError, match=next(iter(values))):
        kind.at(**values)


def test_images_too_small_for_the_published_affinity_are_refused():
    with pytest.raises(ConfigError, match="at least 3 x 3"):
        RefElastic()(torch.zeros(1, 3, 2, 9), 3)


@pytest.mark.parametrize("size", [(64, 64), (63, 90), (50, 31)], ids=str)
def test_zoom_blur_is_the_mean_of_centred_zooms(size):
    """SciPy samples each layer at centre + (p - centre) / z."""
    image = textured(1, 1, *size)
    place = np.indices(size).astype(np.float64)
    centre = (np.array(size).reshape(2, 1, 1) - 1) / 2
    layers = [
        map_coordinates(image[0, 0].numpy().astype(np.float64), centre + (place - centre) / z, order=1, mode="nearest")
        for z in 1 + 0.25 * (np.arange(16) + 0.5) / 16
    ]
    assert np.abs(zoom_mean(image, 1.25)[0, 0].numpy() - np.mean(layers, axis=0)).max() < 1e-4


def test_zoom_blur_of_ramps_shrinks_their_slope_about_the_centre():
    """The mean of (p - c) / z over z in (1, Z) is ln(Z) / (Z - 1) (p - c), along both axes at any aspect ratio."""
    y, x = torch.meshgrid(torch.arange(101) - 50.0, torch.arange(160) - 79.5, indexing="ij")
    ramps = torch.stack([y / 101, x / 160])[None]
    blurred = ZoomBlur.at(zoom=1.4)(ramps + 0.5, 5) - 0.5
    assert (blurred - ramps * (math.log(1.4) / 0.4)).abs().max() < 1e-4


def test_offsets_of_glass_blur_are_symmetric_and_uniform():
    bits = rng_of(1).bits("offsets", 120_000)[0]
    for reach in (0.4, 1.0, 2.0, 3.5):
        for part in offsets(bits, reach):
            counts = torch.bincount(part.long() + 10, minlength=21)[10 - math.ceil(reach) : 11 + math.ceil(reach)]
            share = torch.full((len(counts),), 1 / (2 * reach + 1))
            share[0] = share[-1] = (1 - (2 * math.ceil(reach) - 1) / (2 * reach + 1)) / 2
            spread = (120_000 * share * (1 - share)).sqrt()
            assert ((counts - 120_000 * share).abs() < 4.5 * spread).all()
    assert not any(part.any() for part in offsets(bits, 0.0))
    extremes = torch.tensor([-1, 0], dtype=torch.int32)
    assert [part.tolist() for part in offsets(extremes, 3.0)] == [[3.0, -3.0]] * 2


def test_offsets_of_glass_blur_never_shrink_with_reach():
    bits = rng_of(1).bits("offsets", 20_000)[0]
    far = [offsets(bits, reach)[0].abs() for reach in (0.2, 0.7, 1.0, 1.9, 4.0)]
    assert all((low <= high).all() for low, high in itertools.pairwise(far))


def test_glass_blur_does_not_move_content():
    """The centroid of a spot stays, to the standard error of the mean over the images."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    spot = torch.exp(-((y - 30) ** 2 + (x - 33) ** 2) / 50).expand(64, 1, 64, 64)
    seen = GlassBlur()(spot, 5, ids=torch.arange(64))[:, 0]
    for axis, at in ((y, 30), (x, 33)):
        centre = (seen * axis).sum((1, 2)) / seen.sum((1, 2))
        error = centre.std().item() / 8
        assert abs(centre.mean().item() - at) < 4 * error
        assert error < 0.05


def test_glass_blur_reads_the_pixel_at_the_offset_with_edges_repeated():
    image = torch.arange(20.0).view(1, 1, 4, 5)
    row, column = torch.full((1, 4, 5), -1.0), torch.full((1, 4, 5), 2.0)
    y, x = np.indices((4, 5))
    expected = image[0, 0].numpy()[(y - 1).clip(0), (x + 2).clip(None, 4)]
    assert np.array_equal(gather(image, row, column)[0, 0].numpy(), expected)


def fields_of(count, size, severity):
    draws = Elastic().draw(rng_of(count), (1, *size))
    return displacement(draws["knots"], size, Elastic().displacement.at(severity) / 100)


@pytest.mark.parametrize("size", [(96, 96), (60, 150), (28, 28)], ids=str)
def test_the_displacement_has_the_stated_root_mean_square(size):
    field = fields_of(400, size, 3)
    at_pixels = field.square().sum(1).mean(0).sqrt() / min(size) * 100
    assert at_pixels.mean().item() == pytest.approx(1.0, rel=0.02)
    assert (at_pixels - 1).abs().max() < 0.2
    assert field.mean().abs() < 0.02 * min(size) / 100


@pytest.mark.parametrize("size", [(96, 96), (60, 150), (28, 28), (5, 9)], ids=str)
def test_the_deformation_folds_nowhere(size):
    """The Jacobian of p + d(p) is positive at the strongest level, for random knots and for the worst ones."""
    field = fields_of(200, size, 5)
    signs = torch.stack([torch.ones(2, 40, 60), (-1.0) ** torch.arange(60).expand(2, 40, 60)])
    knots = Elastic().draw(rng_of(1), (1, *size))["knots"].shape
    worst = signs[:, :, : knots[2], : knots[3]] * signs[:, :, : knots[2], : knots[3]].flip(0)
    for each in (field, displacement(worst, size, 0.02)):
        down = each[:, :, 1:, :-1] - each[:, :, :-1, :-1]
        right = each[:, :, :-1, 1:] - each[:, :, :-1, :-1]
        jacobian = (1 + down[:, 0]) * (1 + right[:, 1]) - down[:, 1] * right[:, 0]
        assert jacobian.min() > 0
        assert (down.abs() + right.abs()).max() < 1


def test_elastic_equals_scipy_with_the_same_field():
    image = textured(2, 1, 70, 55)
    field = fields_of(2, (70, 55), 5)
    place = np.indices((70, 55))
    for got, clean, shift in zip(warp(image, field), image, field, strict=True):
        expected = map_coordinates(clean[0].numpy(), place + shift.numpy(), order=1, mode="reflect")
        assert np.abs(got[0].numpy() - expected).max() < 1e-4


def labelled(left, right, size=(80, 64)):
    y, x = torch.meshgrid(torch.arange(float(size[0])), torch.arange(float(size[1])), indexing="ij")
    inside = (y >= 20) & (y < 50) & (x >= left) & (x < right)
    mask = inside.to(torch.int64) * 3
    images = (0.2 + 0.6 * inside.float()).expand(6, 1, *size)
    boxes = (torch.tensor([[float(left), 20.0, float(right), 50.0]]), torch.zeros(0, 4)) * 3
    return Batch(images, None, torch.arange(6), masks=mask.expand(6, *size), boxes=boxes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_masks_move_with_the_image(dtype):
    """Across a straight edge the interpolated image is brighter than the middle where the nearest pixel is bright."""
    batch = labelled(0, 64)
    if dtype == torch.uint8:
        batch = batch.replace((batch.images * 255).to(torch.uint8))
    moved = Elastic().on(batch, 5, ShiftContext())
    assert moved.masks is not None
    assert moved.masks.dtype == torch.int64
    assert set(moved.masks.unique().tolist()) == {0, 3}
    assert torch.equal(moved.masks == 3, moved.images[:, 0] > (127 if dtype == torch.uint8 else 0.5))
    assert not torch.equal(moved.masks, batch.masks)


def test_boxes_enclose_what_they_enclosed():
    batch = labelled(15, 45)
    moved = Elastic().on(batch, 5, ShiftContext())
    assert moved.masks is not None
    assert moved.boxes is not None
    for place, box in enumerate(moved.boxes):
        assert box.shape == (1 - place % 2, 4)
        if len(box):
            rows, columns = (moved.masks[place] == 3).nonzero().unbind(1)
            seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (box[0] - seen).abs().max() < 1
            assert (box[0] - batch.boxes[place][0]).abs().max() > 0.5


def published_elastic(suite):
    return next(shift for shift in SUITES.get(suite)() if isinstance(shift, RefElastic))


@pytest.mark.parametrize(
    ("suite", "size", "off"),
    [("cifar-10-c", (32, 32), 1.5), ("tiny-imagenet-c", (64, 61), 1.5), ("imagenet-c", (200, 224), 4)],
)
@pytest.mark.parametrize("severity", [1, 2, 3, 4.4, 5])
def test_labels_move_with_the_published_deformation(suite, size, off, severity):
    height, width = size
    mask = torch.zeros(8, height, width, dtype=torch.int64)
    top, left, bottom, right = height // 3, width // 4, height * 2 // 3, width * 2 // 3
    mask[:, top:bottom, left:right] = 3
    box = torch.tensor([[left, top, right, bottom]], dtype=torch.float32)
    boxes = tuple(box if place % 4 else torch.zeros(0, 4) for place in range(8))
    pixels = (mask[:, None] * 85).to(torch.uint8).expand(8, 3, height, width)
    moved = published_elastic(suite).on(
        Batch(pixels, None, torch.arange(8), masks=mask, boxes=boxes), severity, ShiftContext()
    )
    assert set(moved.masks.unique().tolist()) == {0, 3}
    bright = moved.images[:, 1] > 127
    # twice interpolated edges, and the source's truncation, leave single pixels on either side
    assert ((moved.masks == 3) != bright).float().mean() < 0.004
    assert (mask != moved.masks).float().mean() > 0.005
    for place, found in enumerate(moved.boxes):
        assert len(found) == len(boxes[place])
        if len(found):
            parts = label((moved.masks[place] == 3).numpy(), np.ones((3, 3)))[0]  # mirrored copies are others
            rows, columns = torch.from_numpy(parts == np.bincount(parts.ravel())[1:].argmax() + 1).nonzero().unbind(1)
            seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (found[0] - seen).abs().max() < off, (found, seen)


def test_a_shift_that_moves_nothing_leaves_masks_and_boxes_alone():
    batch = labelled(15, 45)
    for shift in (GlassBlur(), ZoomBlur()):
        after = shift.on(batch, 5, ShiftContext())
        assert after.masks is batch.masks
        assert after.boxes is batch.boxes


def test_motion_along_and_across_the_line_of_sight_may_come_in_any_order():
    assert len({kind.stage for kind in (ZoomBlur, RefZoomBlur, MotionBlur, RefMotionBlur)}) == 1
