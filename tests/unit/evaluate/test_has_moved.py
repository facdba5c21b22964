"""has_moved: recent inputs beside a reference, in the features of a model."""

import numpy as np
import pytest
import torch
from torch import nn

import robustlab
from robustlab.core.errors import RangeError, UnknownNameError
from robustlab.core.taps import TappedModel
from robustlab.metrics.drift import mmd
from robustlab.train import seeded_init


def network():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 2)),
    )


def model():
    return robustlab.wrap(seeded_init(network, 0).eval(), task="multiclass", output="logits")


def images(seed, count, brighter=0, each=1):
    rng = np.random.default_rng(seed)
    base = rng.normal(120 + brighter, 25, (count // each, 1, 1)).repeat(each, 0)
    noise = rng.normal(0, 20, (count, 20, 20))
    return np.clip(base + noise, 0, 255).astype(np.uint8)


def test_a_shifted_stream_is_noticed_and_the_same_stream_is_not():
    reference = images(0, 200)
    same = robustlab.has_moved(model(), reference, images(1, 60))
    assert not same.moved
    assert same.p_value > 0.05
    assert "No decision" in same.summary()
    other = robustlab.has_moved(model(), reference, images(2, 60, brighter=30))
    assert other.moved
    assert other.p_value <= 0.01
    assert other.features
    assert other.features[0][2] == pytest.approx(other.ks_p_value)
    assert "have moved" in other.summary()
    assert (other.n_reference, other.n_recent, other.units) == (200, 60, (200, 60))


def test_more_looks_ask_for_more_evidence():
    reference, recent = images(0, 200), images(3, 60, brighter=11)
    once, often = (robustlab.has_moved(model(), reference, recent, looks=looks) for looks in (1, 20))
    assert once.moved
    assert not often.moved


def test_images_of_one_patient_are_one():
    sources = [
        robustlab.load_data(
            images(seed, count, each=10), groups={"patient": [f"{seed}-{i // 10}" for i in range(count)]}
        )
        for seed, count in ((0, 200), (5, 100))
    ]
    apart = robustlab.has_moved(model(), *sources)
    together = robustlab.has_moved(model(), *sources, cluster="patient")
    assert together.units == (20, 10)
    for found in (apart, together):
        assert found.p_value == min(1, 2 * min(found.mmd_p_value, found.ks_p_value))
    view = TappedModel(model())
    features = [view.predict(data.read(range(len(data)))).features["penultimate"] for data in sources]
    codes = [data.column("patient") for data in sources]
    value, p = mmd(*features, reference_units=codes[0], recent_units=codes[1])
    assert together.mmd == pytest.approx(value, rel=1e-4)
    assert together.mmd_p_value == pytest.approx(p, abs=0.01)
    with pytest.raises(UnknownNameError, match="site"):
        robustlab.has_moved(model(), *sources, cluster="site")


def test_another_tap_has_other_features():
    reference, recent = images(0, 80), images(1, 50)
    found = robustlab.has_moved(model(), reference, recent, tap="1")
    assert found.mmd != robustlab.has_moved(model(), reference, recent).mmd
    with pytest.raises(UnknownNameError, match="tap"):
        robustlab.has_moved(model(), reference, recent, tap="layer9")


@pytest.mark.parametrize("arguments", [{"alpha": 0.0}, {"alpha": 1.0}, {"looks": 0}])
def test_numbers_that_make_no_sense_are_refused(arguments):
    with pytest.raises(RangeError, match="alpha"):
        robustlab.has_moved(model(), images(0, 30), images(1, 30), **arguments)


def test_large_sets_are_thinned(monkeypatch):
    monkeypatch.setattr("robustlab.evaluate.drift._MOST", 50)
    assert robustlab.has_moved(model(), images(0, 120), images(1, 60)).n_reference == 50


def test_the_model_is_left_as_it_was():
    net = model()
    before = {name: value.clone() for name, value in net.net.state_dict().items()}
    net.net.train()
    with pytest.warns(robustlab.RobustlabWarning, match="training mode"):
        robustlab.has_moved(net, images(0, 40), images(1, 40))
    assert net.net.training
    assert all(torch.equal(value, before[name]) for name, value in net.net.state_dict().items())
