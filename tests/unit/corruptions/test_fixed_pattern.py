"""The fixed pattern of a detector: moments, columns that die, and keys by scanner."""

import dataclasses
import itertools

import pytest
import torch

from corruptions.fixed_pattern import FixedPattern
from robustlab.core.errors import RangeError
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch


def flat(value, count=2, size=(200, 180), channels=1):
    return Batch(torch.full((count, channels, *size), value), None, torch.arange(count))


def test_all_images_of_a_scanner_have_one_pattern_at_any_time():
    batch, keys = flat(0.5, 5), torch.tensor([3, 3, 8, 3, 8])
    ctx = ShiftContext(seed=4, device_keys=keys)
    images = FixedPattern().on(batch, 4, ctx).images
    for row in range(5):
        assert torch.equal(images[row], images[0 if keys[row] == 3 else 2])
    assert not torch.equal(images[0], images[2])
    assert torch.equal(FixedPattern().on(batch, 4, dataclasses.replace(ctx, epoch=3, step=2)).images, images)
    assert not torch.equal(FixedPattern().on(batch, 4, dataclasses.replace(ctx, seed=5)).images, images)
    alone = batch.select(torch.tensor([4]))
    assert torch.equal(FixedPattern().on(alone, 4, ctx.select(torch.tensor([4]))).images[0], images[4])


def test_without_keys_there_is_one_scanner_whatever_the_ids():
    images = FixedPattern().on(flat(0.5, 3), 4, ShiftContext()).images
    assert torch.equal(images[0], images[2])
    renamed = dataclasses.replace(flat(0.5, 3), ids=torch.tensor([70, 80, 90]))
    assert torch.equal(FixedPattern().on(renamed, 4, ShiftContext()).images, images)


def test_gain_and_offset_have_the_stated_moments():
    gain = FixedPattern.at(gain=0.04, offset=0.0, dead=0.0)
    for value in (0.25, 0.5):
        pattern = gain.on(flat(value, 1), 1, ShiftContext()).images - value
        assert pattern.std().item() == pytest.approx(0.04 * value, rel=0.02)
    lines = (
        FixedPattern.at(gain=0.0, offset=0.01, dead=0.0).on(flat(0.5, 1, (900, 800)), 1, ShiftContext()).images[0, 0]
    )
    rows, columns = lines - lines[:1], lines - lines[:, :1]
    assert torch.allclose(rows, rows[:, :1].expand_as(rows), atol=1e-6)
    assert lines[:, 0].std().item() == pytest.approx(0.01, rel=0.08)
    assert lines[0].std().item() == pytest.approx(0.01, rel=0.08)
    assert torch.allclose(columns, columns[:1].expand_as(columns), atol=1e-6)


def test_colour_channels_share_the_pattern():
    images = FixedPattern().on(flat(0.5, 1, channels=3), 5, ShiftContext()).images
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])


def test_columns_die_one_after_the_other_and_stay_dead():
    def dead(share):
        images = FixedPattern.at(gain=0.0, offset=0.0, dead=share).on(flat(0.5, 1, (6, 100)), 1, ShiftContext()).images
        return (images[0, 0, 0] - 0.5).abs() * 2  # 1 where dead, between where partly dead

    counts = [dead(share / 100) for share in (0, 1, 2.5, 4, 30, 100)]
    assert [round(column.sum().item(), 4) for column in counts] == [0, 1, 2.5, 4, 30, 100]
    assert all(bool((more >= less).all()) for less, more in itertools.pairwise(counts))
    half = FixedPattern.at(gain=0.0, offset=0.0, dead=0.5).on(flat(0.5, 1, (2, 400)), 1, ShiftContext()).images[0, 0, 0]
    assert 60 < int((half == 0).sum()) < 140
    assert int((half == 0).sum() + (half == 1).sum()) == 200


def test_a_share_of_dead_columns_ends_at_one():
    with pytest.raises(RangeError, match="dead"):
        FixedPattern.at(dead=1.5)
