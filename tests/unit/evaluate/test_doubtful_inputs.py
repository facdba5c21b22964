"""What once looked fine and was wrong: class orders, rounding, NaN, failed shifts, picked worst cases, duplicates."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import robustlab
from robustlab.core.corruption import Corruption
from robustlab.core.errors import ConfigError, LabelError, ModelError
from robustlab.core.levels import Levels
from robustlab.corruptions import PGD, ContrastLoss, Gamma
from robustlab.data import load_data
from robustlab.defenses import Energy


@dataclass(frozen=True)
class Boom(Corruption):
    """Always fails."""

    amount: Levels = Levels((1, 2, 3, 4, 5), identity=0, unit="")
    name = "boom"

    def draw(self, rng, shape):
        return {}

    def apply(self, images, draws, values):
        raise ArithmeticError("boom")


def data(count=60, seed=0, **options):
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = generator.normal(90 + 60 * labels[:, None, None], 30, (count, 6, 6)).clip(0, 255).astype(np.uint8)
    return load_data(images, labels=labels, **options)


class Mean(nn.Module):
    def forward(self, x):
        z = (x.mean((1, 2, 3)) - 0.47) * 20
        return torch.stack([-z, z], 1)


def evaluate(net=None, source=None, **options):
    settings = {"shifts": (Gamma(), ContrastLoss()), "progress": False, "replicates": 100} | options
    return robustlab.evaluate_under_shift(net or Mean().eval(), source or data(), **settings)


def test_class_names_in_another_order_are_refused():
    with pytest.raises(LabelError, match="in that order"):
        evaluate(source=data(class_names=("a", "b")), val=data(40, 1, class_names=("b", "a")))
    named = robustlab.wrap(Mean().eval(), class_names=("b", "a"), output="logits")
    with pytest.raises(LabelError, match="in that order"):
        evaluate(named, data(class_names=("a", "b")))


def test_folder_classes_have_the_order_that_torchvision_gives_them(tmp_path):
    from PIL import Image

    for name in ("1", "2", "10"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name / "a.png")
    assert load_data(tmp_path).info.class_names == ("1", "10", "2")


@pytest.mark.parametrize(("output", "top"), [("probs", 1 + 1e-7), ("log_probs", 5e-5)])
def test_a_probability_rounded_above_one_is_one(output, top):
    model = robustlab.wrap(lambda x: torch.full((len(x), 1), top), task="binary", output=output)
    logits = model(torch.zeros(4, 1, 2, 2)).logits
    assert bool(torch.isfinite(logits).all())
    assert bool((logits.softmax(1)[:, 1] > 0.999).all())


def test_a_nan_row_does_not_hide_undeclared_probabilities():
    def net(x):
        p = torch.softmax(Mean()(x), 1)
        p[0] = math.nan
        return p

    with pytest.raises(ModelError, match="output='probs'"):
        evaluate(net)


def test_pictures_of_a_failed_shift_are_left_out():
    report = evaluate(shifts=(Boom(), Gamma()), gallery=True)
    assert {picture.condition for picture in report.gallery} == {"clean", "gamma"}
    assert report.manifest["failures"][0]["condition"] == "boom"


def test_detectors_of_one_name_do_not_overwrite_each_other():
    scores = evaluate(detectors=(Energy(), Energy(temperature=10.0))).predictions["clean"].scores
    assert list(scores) == ["energy", "energy#2"]
    assert not torch.equal(scores["energy"], scores["energy#2"])
    with pytest.raises(ConfigError, match="twice"):
        evaluate(detectors=(Energy(), Energy()))


def test_worst_rows_keep_n_and_say_why_they_are_undefined():
    source = data(groups={"patient": np.arange(60) // 6})
    report = evaluate(source=source, cluster="patient")
    clean, worst = report.value("accuracy"), report.value("accuracy", shift="worst")
    assert (worst.n, worst.n_units) == (clean.n, clean.n_units) == (60, 10)
    assert "effective n" in worst.method
    silent = report.value("silent-failure-rate", shift="worst plausible")
    assert math.isnan(silent.value)
    assert silent.reason == report.value("silent-failure-rate").reason == "no_val"
    assert silent.target == ""


def test_attacks_on_several_labels_say_what_they_look_for():
    labels = np.random.default_rng(0).integers(0, 2, (60, 2))
    source = load_data(data().images.squeeze(1), labels=labels, task="multilabel")
    report = evaluate(source=source, attacks=PGD(steps=1, eps=(0.1,)))
    assert any("one wrong decision an image" in sentence for sentence in report.manifest["not_tested"])
    assert "pgd-linf" in {row.shift for row in report.rows}


def test_the_fingerprint_sees_every_pixel_and_column():
    images = np.zeros((300, 4, 4), np.uint8)
    changed = images.copy()
    changed[1, 0, 0] = 1
    labels = np.arange(300) % 2
    prints = {
        load_data(images, labels=labels).fingerprint(),
        load_data(changed, labels=labels).fingerprint(),
        load_data(images, labels=labels, groups={"sex": ["F", "M"] * 150}).fingerprint(),
        load_data(images, labels=labels, modality="xray").fingerprint(),
    }
    assert len(prints) == 4


def test_normalisation_read_from_the_network_is_said_on_the_first_page():
    import timm

    net = timm.create_model("resnet18", num_classes=2).eval()
    source = load_data(np.zeros((8, 32, 32), np.uint8), labels=np.arange(8) % 2)
    told = evaluate(net, source, shifts=()).manifest["not_tested"]
    assert any("pretrained_cfg" in sentence for sentence in told)
    silent = evaluate(robustlab.wrap(net, mean=0.5, std=0.5), source, shifts=()).manifest["not_tested"]
    assert not any("pretrained_cfg" in sentence for sentence in silent)
