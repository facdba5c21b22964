"""Debris, air bubbles, field stops and text: closed forms, expected cover, nesting."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from corruptions._shapes import (
    _STROKES,
    GLYPHS,
    disc_radius,
    discs,
    glyphs,
    knots,
    share_each,
    smooth_field,
    threshold,
)
from corruptions.artifacts import AirBubbles, BurnedInText, DarkCorners, Debris, _page, bubble_depth
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch

ALL = (Debris(), AirBubbles(), DarkCorners(), BurnedInText())
by_name = pytest.mark.parametrize("shift", ALL, ids=lambda shift: shift.name)


def noise(count, channels, height, width, seed=0):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(seed))


def draws_of(shift, count, shape):
    return shift.draw(SampleRng.make(7, shift.name, torch.arange(count)), shape)


def within(values, expected):
    """Check that the mean of independent values agrees with what is expected, to 4.5 standard errors."""
    values = np.asarray(values, dtype=np.float64)
    return abs(values.mean() - expected) < 4.5 * values.std(ddof=1) / math.sqrt(len(values))


@pytest.mark.parametrize("size", [(9, 14), (30, 5), (1, 1)])
@pytest.mark.parametrize("pitch", [1.0, 2.7, 16.8])
def test_a_smooth_field_has_unit_variance_at_every_pixel(size, pitch):
    rows, columns = (knots(extent, pitch) for extent in size)
    basis = torch.eye(rows * columns).view(-1, rows, columns)
    power = smooth_field(basis, size, pitch).square().sum(0)
    assert power.shape == size
    assert torch.allclose(power, torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("cover", [0.001, 0.03, 0.4])
@pytest.mark.parametrize("ramp", [0.05, 1.0])
def test_threshold_gives_the_mean_cover(cover, ramp):
    t = threshold(cover, ramp)
    mean = quad(lambda z: min(max((z - t) / ramp, 0), 1) * norm.pdf(z), t, t + ramp)[0] + norm.sf(t + ramp)
    assert mean == pytest.approx(cover, rel=1e-6)


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_debris_covers_its_share_in_expectation(severity):
    count, size = 2500, 40
    shift = Debris()
    cover = shift.cover.at(severity)
    draws = draws_of(shift, count, (1, size, size))
    left = shift.apply(torch.ones(count, 1, size, size), draws, {"cover": cover})
    hidden = (1 - left) / (0.7 + 0.2 * draws["opacity"])
    assert within(hidden.mean((1, 2, 3)), cover / 100)
    assert 0.99 < hidden.max() <= 1.001


@pytest.mark.parametrize("area", [0.05, 0.6, 1.0, 1.1, 8.0, 60.0])
def test_a_disc_sums_to_its_area(area):
    steps = torch.arange(24, dtype=torch.float32) / 24 + 8
    y, x = (each.reshape(-1, 1) for each in torch.meshgrid(steps, steps, indexing="ij"))
    radius = disc_radius(torch.tensor(area, dtype=torch.float64)).float().expand_as(y)
    total = (0.5 - discs(y, x, radius, (18, 19))).clamp(0, 1).sum((1, 2)).mean()
    assert total.item() == pytest.approx(area, rel=2e-3)


def test_discs_wrap_around_and_measure_distance():
    y, x, radius = (torch.tensor([[value]]) for value in (0.5, 9.5, 2.0))
    far = discs(y, x, radius, (8, 10))[0]
    assert far[0, 9].item() == -2
    assert far[7, 9].item() == far[1, 9].item() == far[0, 0].item() == far[0, 8].item() == -1
    assert far[4, 4].item() == pytest.approx(math.hypot(4, 5) - 2)


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_bubbles_cover_their_share_in_expectation(severity):
    shift = AirBubbles()
    cover = shift.cover.at(severity) / 100
    depth = bubble_depth(draws_of(shift, 2500, (1, 48, 48)), cover, (48, 48))
    assert within((depth + 0.5).clamp(0, 1).mean((1, 2)), cover)


def test_the_share_of_one_object_rises_with_the_cover_of_all():
    covers = np.linspace(1e-4, 0.6, 400)
    shares = [share_each(cover, min(16.0, 30 * math.sqrt(cover))) for cover in covers]
    assert (np.diff(shares) > 0).all()
    assert share_each(0.19, 2.0) == pytest.approx(0.1)
    assert share_each(0.3, 1.5) == pytest.approx((1.5 - math.sqrt(1.5**2 - 4 * 0.5 * 0.3)) / 1.0)


def test_the_number_of_bubbles_grows_with_the_root_of_the_cover():
    draws = draws_of(AirBubbles(), 8, (1, 64, 64))
    for cover, number in ((0.01, 3), (0.04, 6), (0.5, 16)):
        plain = bubble_depth(draws, cover, (64, 64))
        for bubble in (number - 1, number):
            other = {name: values.clone() for name, values in draws.items()}
            other["y"][:, bubble : bubble + 1] += 0.4
            assert torch.equal(bubble_depth(other, cover, (64, 64)), plain) == (bubble == number)


def test_bubbles_have_a_dark_edge_a_bright_ring_and_a_soft_bright_inside():
    size, radius = 224, 40.0
    shift = AirBubbles()
    draws = {"y": torch.full((1, 16), 0.5), "x": torch.full((1, 16), 0.5), "size": torch.full((1, 16), 0.5774)}
    grey = torch.full((1, 1, size, size), 0.4)
    row = shift.apply(grey, draws, {"cover": 18.0})[0, 0, size // 2, size // 2 :]
    depth = bubble_depth(draws, 0.18, (size, size))[0, size // 2, size // 2 :]
    radius = depth[0].item()
    assert 15 < radius < 60
    edge, ring, middle = (row[(depth - at).abs().argmin()].item() for at in (1.2, 4.8, radius))
    assert edge < 0.4 < middle < ring
    assert torch.equal(row[depth < -0.5], grey[0, 0, 0, size // 2 :][depth < -0.5])
    checks = (torch.arange(size) % 2).float().expand(1, 1, size, size)
    inner = shift.apply(checks, draws, {"cover": 18.0})[0, 0, size // 2, size // 2 - 5 : size // 2 + 5]
    assert inner.std() < 0.1


@pytest.mark.parametrize("size", [(28, 28), (64, 80)])
def test_what_is_there_at_one_severity_is_there_at_the_next(size):
    severities = (0.2, 0.7, 1, 1.6, 2, 3, 3.9, 5)
    black, white = torch.zeros(16, 1, *size), torch.ones(16, 1, *size)

    def all_of(shift, images):
        draws = draws_of(shift, 16, (1, *size))
        values = [{name: levels.at(s) for name, levels in shift.levels().items()} for s in severities]
        return torch.stack([shift.apply(images, draws, value) for value in values])

    for shift in (Debris(), DarkCorners()):
        assert (all_of(shift, white).diff(dim=0) <= 0).all(), shift
    assert (all_of(BurnedInText(), black).diff(dim=0) >= 0).all()
    draws = draws_of(AirBubbles(), 16, (1, *size))
    depths = torch.stack([bubble_depth(draws, AirBubbles().cover.at(s) / 100, size) for s in severities])
    assert (depths.diff(dim=0) >= -1e-4).all()


@pytest.mark.parametrize("size", [(224, 224), (70, 90)])
def test_a_field_stop_keeps_a_disc_near_the_middle(size):
    height, width = size
    half = math.hypot(height, width) / 2
    shift, radius = DarkCorners(), 0.5
    draws = draws_of(shift, 40, (1, height, width))
    lit = shift.apply(torch.ones(40, 1, height, width), draws, {"radius": radius})[:, 0].double()
    assert lit.sum((1, 2)).numpy() == pytest.approx(math.pi * (radius * half) ** 2, rel=3e-3)
    y, x = torch.meshgrid(*[torch.arange(e) + 0.5 - e / 2 for e in size], indexing="ij")
    away = torch.hypot(y, x) / half
    assert (lit[:, away < radius - 0.08] == 1).all()
    assert (lit[:, away > radius + 0.08] == 0).all()
    centre = torch.stack([(lit * x).sum((1, 2)), (lit * y).sum((1, 2))]) / lit.sum((1, 2)) / half
    assert centre.norm(dim=0).max() < 0.04
    assert centre.std(1).min() > 0.005
    assert torch.equal(
        shift.apply(torch.ones(1, 1, height, width), draws, {"radius": 1.1})[:1], torch.ones(1, 1, *size)
    )


@pytest.mark.parametrize("size", [(224, 224), (64, 64), (28, 28)])
def test_text_has_the_stated_number_of_words(size):
    shift, count = BurnedInText(), 30
    draws = draws_of(shift, count, (1, *size))
    cell = (max(1, round(0.07 * size[0])), max(1, round(0.037 * size[0])))
    for words in (1, 5, 16):
        letters, strength = _page(draws, float(words), size[0] // cell[0], size[1] // cell[1])
        assert torch.equal((letters < GLYPHS).sum((1, 2)), draws["length"][:, :words].sum(1))
        assert torch.equal(strength > 0, letters < GLYPHS)
    faint = _page(draws, 2.25, size[0] // cell[0], size[1] // cell[1])[1]
    assert torch.equal((faint == 0.25).sum((1, 2)), draws["length"][:, 2])


def test_text_depends_on_ids_only():
    shift, batch = BurnedInText(), Batch(noise(8, 3, 64, 64), None, torch.arange(8))

    def done(images, labels=None):
        return shift.on(Batch(images, labels, batch.ids), 5, ShiftContext()).images.double()

    dark, light = done(torch.zeros_like(batch.images)), done(torch.ones_like(batch.images))
    assert torch.allclose(done(batch.images), dark + batch.images.double() * (light - dark), atol=1e-6)
    assert torch.equal(done(batch.images, torch.arange(8)), done(batch.images, 7 - torch.arange(8)))


def test_glyphs_have_the_ink_of_their_strokes_and_differ():
    ink, surround = glyphs((70, 37))
    r = 0.32
    # an L is two rounded bars that share a right angle
    area = 2 * r * 6 + 2 * math.pi * r * r - (r * r + 0.75 * math.pi * r * r)
    assert ink[list(_STROKES).index("L")].sum().item() == pytest.approx(100 * area, rel=0.005)
    assert not ink[GLYPHS].any()
    assert not surround[GLYPHS].any()
    assert (surround >= ink).all()
    assert ink[:, [0, -1]].max() == ink[:, :, [0, -1]].max() == 0
    small = glyphs((16, 8))[0]
    apart = (small[:, None] - small[None]).abs().sum((2, 3)) + 99 * torch.eye(GLYPHS + 1)
    assert apart.min() > 2


@by_name
def test_sample_results_ignore_batch_and_layout(shift):
    pixels = (noise(7, 3, 61, 45) * 255).round().to(torch.uint8)
    ids = torch.arange(50, 57)
    for images in (pixels, pixels.float() / 255):
        whole = shift(images, 3.4, ids=ids)
        order = torch.tensor([4, 0, 6, 1])
        assert torch.equal(shift(images[order], 3.4, ids=ids[order]), whole[order])
        assert torch.equal(shift(images.to(memory_format=torch.channels_last), 3.4, ids=ids), whole)


@pytest.mark.parametrize("shift", [AirBubbles(), DarkCorners(), BurnedInText()], ids=lambda shift: shift.name)
def test_objects_keep_their_place_at_other_sizes(shift):
    draws = [draws_of(shift, 3, (1, size, size)) for size in (224, 112)]
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])
    values = {name: levels.at(5) for name, levels in shift.levels().items()}
    large, small = (
        shift.apply(torch.full((3, 1, size, size), 0.5), draw, values)
        for size, draw in zip((224, 112), draws, strict=True)
    )
    halved = torch.nn.functional.avg_pool2d(large, 2)
    assert (halved - small).abs().mean() < 0.1 * (small - 0.5).abs().mean() + 0.01
