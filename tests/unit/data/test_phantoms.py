import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from robustlab.core.errors import ConfigError, RangeError
from robustlab.core.shift import quantize
from robustlab.data import HistologyPhantom, RadiographPhantom, load_data
from robustlab.data.phantoms import BAYES_ACCURACY

KINDS = [HistologyPhantom, RadiographPhantom]


def _parts(source):
    info = source.info
    assert info.labels is not None
    assert info.posterior is not None
    return info.labels, info.posterior


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_how_many_are_asked_for(kind):
    few, many = kind(21, seed=3), kind(70, seed=3)
    rows = range(21)
    assert torch.equal(few.pixels(rows), many.pixels(rows))
    assert torch.equal(few.info.ids, many.info.ids[:21])
    for one, other in zip(_parts(few), _parts(many), strict=True):
        assert torch.equal(one, other[:21])
    for column, codes in few.info.groups.items():
        assert torch.equal(codes, many.info.groups[column][:21])
    assert not torch.equal(few.pixels([0]), kind(1, seed=4).pixels([0]))


@pytest.mark.parametrize("kind", KINDS)
def test_global_random_state_is_neither_read_nor_changed(kind):
    one = kind(8).pixels(range(8))
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # noqa: NPY002
    assert torch.equal(kind(8).pixels(range(8)), one)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("kind", KINDS)
def test_the_posterior_is_calibrated_and_has_the_stated_accuracy(kind):
    labels, posterior = _parts(kind(6000))
    positive = posterior[:, 1]
    assert torch.allclose(posterior.sum(1), torch.ones(6000, dtype=torch.float64))
    edges = torch.tensor([0.0, 0.02, 0.1, 0.3, 0.7, 0.9, 0.98, 1.0])
    for low, high in itertools.pairwise(edges):
        inside = (positive >= low) & (positive < high)
        count = int(inside.sum())
        assert count > 100
        gap = float((labels[inside] - positive[inside]).mean())
        # images of one patient share the label, so an image counts as about half a patient
        spread = float((positive[inside] * (1 - positive[inside])).mean() / count * 2) ** 0.5
        assert abs(gap) < 4 * spread
    accuracy = float((posterior.argmax(1) == labels).double().mean())
    assert accuracy == pytest.approx(BAYES_ACCURACY, abs=0.015)
    assert float(posterior.max(1).values.mean()) == pytest.approx(BAYES_ACCURACY, abs=0.01)
    assert float(labels.double().mean()) == pytest.approx(0.5, abs=0.04)


def test_the_marker_follows_the_label_as_stated_and_enters_the_posterior():
    source = RadiographPhantom(4000, size=16, marker_with_label=0.9, marker_without=0.1)
    labels, posterior = _parts(source)
    present = source.column("marker")
    assert source.info.group_levels["marker"] == ("absent", "present")
    assert float(present[labels == 1].double().mean()) == pytest.approx(0.9, abs=0.025)
    assert float(present[labels == 0].double().mean()) == pytest.approx(0.1, abs=0.025)
    _, plain = _parts(RadiographPhantom(4000, size=16))
    odds = torch.log(posterior[:, 1] / posterior[:, 0]) - torch.log(plain[:, 1] / plain[:, 0])
    # odds of a nearly sure answer lose digits, hence only the open cases
    open_cases = (plain.max(1).values < 0.999) & (posterior.max(1).values < 0.9999)
    expected = torch.where(present == 1, 1.0, -1.0).double() * np.log(9)
    assert torch.allclose(odds[open_cases], expected[open_cases], atol=1e-6)
    assert "marker" not in RadiographPhantom(4, size=16).info.groups


def test_the_marker_changes_its_corner_only():
    without = RadiographPhantom(40, marker_with_label=0, marker_without=0)
    with_all = RadiographPhantom(40, marker_with_label=1, marker_without=1)
    changed = (without.pixels(range(40)) - with_all.pixels(range(40))).abs() > 0.01
    assert changed.flatten(1).any(1).all()
    assert not changed[:, :, 16:].any()
    assert not changed[:, :, :, :48].any()
    certain = RadiographPhantom(200, size=16, marker_with_label=1, marker_without=0)
    labels, posterior = _parts(certain)
    assert torch.equal(posterior[:, 1], labels.double())


@pytest.mark.parametrize("kind", KINDS)
def test_patients_share_attributes_and_the_split_is_by_patient(kind):
    train, test = kind(100, size=16, split="train"), kind(100, size=16, split="test")
    labels, _ = _parts(train)
    patient = train.column("patient")
    assert torch.bincount(patient).tolist() == [1, 2, 3, 4] * 10
    for column in (labels, train.column("sex"), train.column("site")):
        for code in patient.unique():
            assert len(column[patient == code].unique()) == 1
    assert not set(train.info.ids.tolist()) & set(test.info.ids.tolist())
    assert not set(train.info.group_levels["patient"]) & set(test.info.group_levels["patient"])
    assert not torch.equal(train.pixels([0]), test.pixels([0]))


def test_attributes_have_no_influence():
    source = HistologyPhantom(1500, size=16)
    labels, _ = _parts(source)
    means = source.pixels(range(1500)).mean((1, 2, 3))
    patients = len(source.info.group_levels["patient"])
    for column in ("sex", "site"):
        codes = source.column(column)
        for code in codes.unique():
            share = float(labels[codes == code].double().mean())
            assert abs(share - 0.5) < 4 * (0.25 / (patients / 3)) ** 0.5
            count = int((codes == code).sum())
            assert abs(float(means[codes == code].mean() - means.mean())) < 5 * float(means.std()) / (count / 3) ** 0.5


def _features(source):
    """Amount of haematoxylin, and its coarse and fine structure: what a pathologist would count by eye."""
    images = source.pixels(range(len(source)))
    pooled = nn.functional.avg_pool2d(images, 4)
    dark = (images.mean(1) < 0.5).float()
    edges = (dark[:, 1:] - dark[:, :-1]).abs().mean((1, 2)) + (dark[:, :, 1:] - dark[:, :, :-1]).abs().mean((1, 2))
    return torch.stack([dark.mean((1, 2)), edges, pooled.std((1, 2, 3)), images.mean((1, 2, 3))], 1)


def test_histology_classes_can_be_told_from_pixels():
    train, test = HistologyPhantom(600, split="train"), HistologyPhantom(400)
    sklearn = pytest.importorskip("sklearn.linear_model")
    scale = _features(train).std(0)
    model = sklearn.LogisticRegression().fit((_features(train) / scale).numpy(), _parts(train)[0].numpy())
    accuracy = model.score((_features(test) / scale).numpy(), _parts(test)[0].numpy())
    assert 0.80 < accuracy < 0.97


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_small_network_comes_near_the_best_accuracy(kind):
    train, test = kind(2000, split="train"), kind(500)
    images, (labels, _) = train.pixels(range(2000)), _parts(train)
    channels = images.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(channels, 16, 5, 2, 2), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 2)),
        )
        optimiser = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=12 * 32)
        for _ in range(12):
            for rows in torch.randperm(2000)[: 32 * 62].split(62):
                optimiser.zero_grad()
                nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
                optimiser.step()
                schedule.step()
    net.eval()
    with torch.no_grad():
        predicted = net(test.pixels(range(500))).argmax(1)
    accuracy = float((predicted == _parts(test)[0]).double().mean())
    assert 0.86 < accuracy < 0.97


def test_phantoms_by_name():
    source = load_data("phantom:radiograph", split="val", name="demo")
    assert (source.info.name, len(source)) == ("demo", 500)
    assert (source.info.spec.modality, source.info.spec.channels, source.info.spec.size) == ("xray", 1, (64, 64))
    assert torch.equal(source.pixels([0, 499]), RadiographPhantom(500, split="val").pixels([0, 499]))
    assert torch.equal(quantize(source.pixels([7]), source.info.spec), source.pixels([7]))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: HistologyPhantom(0), RangeError, "count=0"),
        (lambda: RadiographPhantom(5, size=8), RangeError, "size=8"),
        (lambda: HistologyPhantom(5, split="dev"), ConfigError, "'dev'"),
        (lambda: RadiographPhantom(5, marker_with_label=1.2), RangeError, "shares"),
    ],
)
def test_phantom_mistakes(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
