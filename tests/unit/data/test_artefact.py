"""pasted_artefact: the object is there, small, bright, and the same for the same sample."""

import numpy as np
import pytest
import torch

from robustlab.core.errors import RangeError
from robustlab.data import load_data, pasted_artefact, subset


def grey(count=12, size=(48, 64)):
    images = np.full((count, *size), 60, np.uint8)
    return load_data(images, labels=np.zeros(count, int), task="multiclass", class_names=("a", "b"))


def test_an_object_is_pasted_and_nothing_else_changes():
    source = grey()
    moved = pasted_artefact(source, size=0.25)
    before, after = (item.pixels(range(12)) for item in (source, moved))
    change = after - before
    assert bool((change >= -1e-6).all())
    share = (change > 0.3).float().mean((1, 2, 3))
    # the case alone covers about 0.7 x 0.25 x 0.25 of the square of the shorter side
    assert float(share.min()) > 0.02
    assert float(share.max()) < 0.12
    assert float(after.amax()) <= 1
    assert float(after.amax((1, 2, 3)).min()) > 0.8
    assert float((change.abs() < 1e-6).float().mean()) > 0.8


def test_edges_are_grey_levels_that_an_8_bit_file_holds():
    levels = pasted_artefact(grey()).pixels(range(12)) * 255
    assert float((levels - levels.round()).abs().max()) < 1e-4
    assert len(torch.unique(levels.round())) > 20


def test_the_object_depends_on_the_sample_and_the_seed_only():
    source = grey()
    whole = pasted_artefact(source).pixels(range(12))
    part = pasted_artefact(subset(source, [7, 2])).pixels([0, 1])
    assert torch.equal(part, whole[[7, 2]])
    assert torch.equal(pasted_artefact(source).pixels([5, 3]), whole[[5, 3]])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(pasted_artefact(source, seed=1).pixels([0]), whole[:1])


def test_labels_are_gone_and_ids_are_new():
    source = grey()
    moved = pasted_artefact(source)
    assert moved.info.labels is None
    assert moved.info.class_names is None
    assert source.info.labels is not None
    assert not bool(torch.isin(moved.info.ids, source.info.ids).any())
    assert len(torch.unique(moved.info.ids)) == 12
    assert moved.content_fingerprint() != source.content_fingerprint()
    assert (
        len({item.state() for item in (moved, pasted_artefact(source, size=0.3), pasted_artefact(source, seed=1))}) == 3
    )
    assert moved.content_fingerprint() != pasted_artefact(source, size=0.3).content_fingerprint()


def test_colour_images_keep_their_channels():
    images = np.full((3, 32, 32, 3), 40, np.uint8)
    moved = pasted_artefact(load_data(images)).pixels(range(3))
    assert moved.shape == (3, 3, 32, 32)
    assert torch.equal(moved[:, 0], moved[:, 2])


@pytest.mark.parametrize("size", [0.0, 0.01, 0.9])
def test_sizes_that_make_no_sense_are_refused(size):
    with pytest.raises(RangeError, match="size"):
        pasted_artefact(grey(), size=size)


def test_images_that_are_too_small_are_refused():
    with pytest.raises(RangeError, match="12 pixels"):
        pasted_artefact(grey(size=(8, 8)))
