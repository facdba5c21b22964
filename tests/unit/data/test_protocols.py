"""Held-out classes: the published splits, labels anew, nothing on both sides."""

import numpy as np
import pytest
import torch

import robustlab
from robustlab.core.errors import LabelError, RangeError
from robustlab.data import held_out_classes, hold_out

AIRCRAFT = {
    0: (9, 21, 36, 44, 47, 64, 67, 83, 87, 96),
    1: (1, 5, 9, 12, 16, 37, 64, 72, 75, 79),
    2: (7, 15, 22, 34, 40, 43, 49, 72, 75, 82),
}


@pytest.mark.parametrize("split", AIRCRAFT)
def test_the_published_splits_of_aircraft(split):
    assert held_out_classes(100, 10, split) == AIRCRAFT[split]


def data(labels=None, **options):
    images = np.arange(40 * 16, dtype=np.int64).reshape(40, 4, 4) % 256
    given = np.arange(40) % 5 if labels is None else labels
    return robustlab.load_data(images.astype(np.uint8), labels=given, **options)


def test_both_sides():
    source = data(class_names=("a", "b", "c", "d", "e"))
    found = hold_out(source, classes=(1, 3))
    assert found.classes == (1, 3)
    assert found.known.info.class_names == ("a", "c", "e")
    old = source.info.labels
    assert found.known.info.ids.tolist() == source.info.ids[(old != 1) & (old != 3)].tolist()
    renamed = {0: 0, 2: 1, 4: 2}
    wanted = [renamed[int(label)] for label in old if int(label) in renamed]
    assert found.known.info.labels.tolist() == wanted
    assert found.foreign.info.labels is None
    assert len(found.known) + len(found.foreign) == len(source)
    assert source.info.labels is old, "the set itself is left alone"
    row = int((old == 1).nonzero()[0])
    assert torch.equal(found.foreign.pixels([0]), source.pixels([row]))


def test_a_fifth_by_default_and_the_same_for_every_part():
    first, second = hold_out(data(), split=2), hold_out(data(np.arange(40) // 8), split=2)
    assert first.classes == second.classes == held_out_classes(5, 1, 2)


def test_it_can_be_evaluated():
    found = hold_out(data(), classes=(4,))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4)).eval()
    report = robustlab.evaluate_under_shift(
        robustlab.wrap(net), found.known, shifts=(), ood={"near/held-out": found.foreign}, progress=False
    )
    assert report.value("auroc-ood", scorer="msp").n == 40


def test_what_cannot_be_held_out():
    with pytest.raises(RangeError, match="from 1 to 3"):
        hold_out(data(), count=4)
    with pytest.raises(LabelError, match="two classes"):
        hold_out(data(), classes=(0, 1, 2, 3))
    with pytest.raises(LabelError, match="two classes"):
        hold_out(data(), classes=(7,))
    with pytest.raises(LabelError, match="one class"):
        hold_out(robustlab.load_data(np.zeros((4, 4, 4), np.uint8)))
    with pytest.raises(LabelError, match="both sides"):
        hold_out(data(np.arange(40) % 4, class_names=("a", "b", "c", "d", "e")), classes=(4,))
