"""tune: a planted best setting is found, noise decides nothing, and test data are never touched in silence."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

import robustlab
from defenses.detectors import KNN, MSP, ODIN, FromPytorchOOD, ViM, load_detector, save_detector
from robustlab.core.detector import Detector, Needs
from robustlab.core.errors import ConfigError, KindError, RangeError, UnknownNameError
from robustlab.core.registry import DETECTORS
from robustlab.core.taps import TappedModel
from robustlab.data import subset
from robustlab.evaluate.tuning import GRIDS, grid_of, tune
from tests.contracts.toys import Small, source


@dataclass(frozen=True)
class Axis(Detector):
    """Scores one logit."""

    name: ClassVar[str] = "test-axis"
    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.LOGITS})

    axis: int = 0

    def score(self, outputs):
        if self.axis >= outputs.logits.shape[1]:
            raise RangeError("test-axis", "an axis that exists", f"{self.axis}", "Choose another.")
        return outputs.logits[:, self.axis]


class Channels(nn.Module):
    """The mean of each colour."""

    def forward(self, x):
        return 8 * x.mean((2, 3))


def coloured(count, seed, blue=0.0):
    images = np.random.default_rng(seed).normal(0.5, 0.15, (count, 1, 1, 3)) + np.random.default_rng(seed + 99).normal(
        0, 0.05, (count, 8, 8, 3)
    )
    images[..., 2] += blue
    return robustlab.load_data((np.clip(images, 0, 1) * 255).round().astype(np.uint8))


def model():
    return robustlab.wrap(Channels().eval(), task="multiclass", output="logits", num_classes=3)


def small():
    return robustlab.wrap(Small(), task="multiclass", output="logits", num_classes=3)


AXES = (Axis(0), Axis(1), Axis(2))


def test_a_planted_best_setting_is_found():
    chosen, table = tune(AXES, model(), val_id=coloured(80, 1), val_ood={"blue": coloured(60, 2, 0.4)})
    assert chosen == Axis(2)
    assert table.verdict == "better"
    assert [trial.setting for trial in table.trials] == ["axis=0", "axis=1", "axis=2"]
    change = table.trials[2].difference
    assert 0 < change.low < change.value < change.high
    assert table.trials[0].difference is None
    assert "Chosen: axis=2, which beats the default." in table.summary()
    frame = table.to_frame()
    assert len(frame) == 6
    assert frame[frame.chosen].setting.unique().tolist() == ["axis=2"]
    assert set(frame.n) == {140}


def test_noise_decides_nothing():
    picked = 0
    for seed in range(0, 240, 6):
        chosen, table = tune(AXES, model(), val_id=coloured(40, seed), val_ood={"same": coloured(40, seed + 3)})
        picked += table.chosen != 0
        if table.chosen == 0:
            assert chosen == Axis(0)
            assert table.verdict == "no decision"
    assert picked <= 3  # at most 2.5 % are wrongly called better; more than 3 of 40 have a probability of 2 %


def test_intervals_hold_for_all_settings_at_once():
    data = {"val_id": coloured(80, 1), "val_ood": {"blue": coloured(60, 2, 0.1)}}
    pair, three = (tune(axes, model(), **data)[1] for axes in ((Axis(0), Axis(2)), AXES))
    alone, among = (table.trials[-1].difference for table in (pair, three))
    assert (among.high - among.low) / (alone.high - alone.low) == pytest.approx(2.2414 / 1.96, rel=0.02)


def test_what_is_not_shown_to_differ_leaves_the_default():
    _, table = tune(AXES, model(), val_id=coloured(12, 1), val_ood={"same": coloured(12, 3)})
    assert "which is kept" in table.summary()
    # equal ranks are equal: the default stays first
    chosen, table = tune(
        (Axis(2), dataclasses.replace(Axis(2), axis=-1)), model(), val_id=coloured(40, 1),
        val_ood={"blue": coloured(40, 2, 0.4)},
    )  # fmt: skip
    assert (table.best, table.chosen, chosen.axis) == (0, 0, 2)
    assert (table.trials[1].difference.low, table.trials[1].difference.high) == (0, 0)


def test_numbers_are_those_of_each_setting_by_itself():
    train, inside, sets = source(count=90, seed=4), source(count=70, seed=5), {"a": 6, "b": 7}
    foreign = {name: source(count=30, seed=seed) for name, seed in sets.items()}
    chosen, table = tune("knn", small(), val_id=inside, val_ood=foreign, fit=train)
    tapped = TappedModel(small())
    settings = grid_of(KNN())
    assert [trial.setting for trial in table.trials] == [f"k={item.k}" for item in settings]
    assert settings[0] == KNN()
    for trial, setting in zip(table.trials, settings, strict=True):
        alone = setting.fit(small(), train)
        score = {
            name: alone.score(tapped.predict(data.read(range(len(data)))))
            for name, data in {"": inside, **foreign}.items()
        }
        for name, data in foreign.items():
            truth = np.repeat([0, 1], [len(inside), len(data)])
            wanted = roc_auc_score(truth, torch.cat([score[""], score[name]]).numpy())
            assert trial.sets[name].value == pytest.approx(wanted, abs=2e-3)
        assert trial.auroc.value == pytest.approx(sum(item.value for item in trial.sets.values()) / 2)
    assert chosen.is_fitted
    assert chosen == settings[table.chosen]


def test_one_forward_pass_over_each_set_serves_all_settings():
    net, calls = Small(), []
    net.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    data = {"val_id": source(count=70, seed=5), "val_ood": {"a": source(count=30, seed=6)}}
    plain = robustlab.wrap(net, task="multiclass", output="logits", num_classes=3)
    tune("knn", plain, **data, fit=source(count=90, seed=4))
    assert sorted(calls) == sorted([64, 26, 64, 6, 30])
    calls.clear()
    tune([ODIN(), ODIN(eps=0.0), ODIN(eps=0.01)], plain, **data)
    own = 2 * 2 * 3  # two settings move the image: two more passes of three batches
    assert len(calls) == 3 + own


def test_settings_that_do_not_fit_have_a_reason_and_no_number():
    _, table = tune((*AXES, Axis(7)), model(), val_id=coloured(40, 1), val_ood={"blue": coloured(40, 2, 0.4)})
    assert math.isnan(table.trials[3].auroc.value)
    assert "an axis that exists" in table.trials[3].auroc.reason
    assert table.chosen == 2
    chosen, table = tune((Axis(7), Axis(2)), model(), val_id=coloured(40, 1), val_ood={"blue": coloured(40, 2, 0.4)})
    assert chosen == Axis(2)  # a default without a number cannot be kept
    with pytest.raises(RangeError, match="an axis that exists"):
        tune((Axis(7), Axis(8)), model(), val_id=coloured(40, 1), val_ood={"blue": coloured(40, 2, 0.4)})


def test_clusters_widen_the_intervals():
    inside, outside = coloured(40, 1), coloured(40, 2, 0.1)
    for data in (inside, outside):
        data.info = dataclasses.replace(data.info, groups={"patient": torch.arange(40) // 8})
    _, alone = tune(AXES, model(), val_id=inside, val_ood={"a": outside})
    _, table = tune(AXES, model(), val_id=inside, val_ood={"a": outside}, cluster="patient")
    assert (alone.trials[2].auroc.n_units, table.trials[2].auroc.n_units) == (80, 10)
    assert table.trials[2].auroc.value == alone.trials[2].auroc.value
    with pytest.raises(UnknownNameError, match="site"):
        tune(AXES, model(), val_id=inside, val_ood={"a": outside}, cluster="site")


def test_every_grid_is_of_a_detector_and_makes_valid_settings():
    for name, fields in GRIDS.items():
        settings = grid_of(DETECTORS.get(name)())
        assert settings[0] == DETECTORS.get(name)()
        assert len(set(settings)) == len(settings) >= 4
        assert set(fields) <= {field.name for field in dataclasses.fields(settings[0])}
    assert {"knn", "vim", "react", "dice", "ash", "scale", "odin", "gen", "nnguide"} <= set(GRIDS)


def test_every_grid_runs():
    data = {
        "val_id": source(count=40, seed=5),
        "val_ood": {"a": source(count=30, seed=6)},
        "fit": source(count=90, seed=4),
    }

    class Plain(Small):
        def forward(self, x):
            return self.head(torch.relu(self.conv(x - 0.5)).mean((2, 3)))

    plain = robustlab.wrap(Plain(), task="multiclass", output="logits", num_classes=3)
    for name in GRIDS:
        chosen, table = tune(name, plain, **data)
        assert chosen.is_fitted
        assert len(table.trials) == len(grid_of(DETECTORS.get(name)()))
        assert not math.isnan(table.trials[0].auroc.value)


@pytest.fixture(scope="module")
def tuned():
    chosen, _ = tune(
        [KNN(k=3), KNN(k=9)], small(), val_id=source(count=50, seed=5), val_ood={"a": source(count=30, seed=6)},
        fit=source(count=90, seed=4),
    )  # fmt: skip
    return chosen


def report(detector, data=None, **ood):
    ood = ood or {"far": source(count=20, seed=8)}
    return robustlab.ood_report(small(), data or source(), ood=ood, detectors=("msp", detector), progress=False)


def test_an_evaluation_on_what_was_tuned_on_is_refused(tuned, tmp_path):
    assert set(tuned.tuned_on) == {"val_id", "val_ood/a"}
    assert [len(hashes) for hashes in tuned.tuned_on.values()] == [50, 30]
    report(tuned)
    loaded = load_detector(save_detector(tuned, tmp_path / "d.safetensors"))
    assert set(loaded.learned) == set(tuned.learned)
    for detector in (tuned, loaded):
        with pytest.raises(ConfigError, match=r"ood 'far', of which 30 images were in val_ood/a"):
            report(detector, far=source(count=30, seed=6))
        with pytest.raises(ConfigError, match=r"data, of which 50 images were in val_id"):
            report(detector, source(count=50, seed=5))
        with pytest.raises(ConfigError, match=r"of which 2 images"):
            report(detector, far=subset(source(count=30, seed=6), [3, 4]))
        with pytest.raises(ConfigError, match="knn"):
            robustlab.evaluate_under_shift(small(), source(count=50, seed=5), detectors=("msp", detector), shifts=())
    report(KNN(k=3).fit(small(), source(count=90, seed=4)), far=source(count=30, seed=6))


def test_sets_that_share_images_are_refused():
    data = {"val_id": source(count=50, seed=5), "fit": source(count=90, seed=4)}
    both = [KNN(k=3), KNN(k=9)]
    with pytest.raises(ConfigError, match="val_ood/a and val_id without common images, got 50 in both"):
        tune(both, small(), **data, val_ood={"a": source(count=50, seed=5)})
    with pytest.raises(ConfigError, match="val_ood/a and fit"):
        tune(both, small(), **data, val_ood={"a": source(count=90, seed=4)})
    with pytest.raises(ConfigError, match="val_id and fit"):
        tune(both, small(), **data | {"val_id": source(count=90, seed=4)}, val_ood={"a": source(count=50, seed=6)})


def test_what_cannot_be_tuned_is_said():
    data = {"val_id": source(count=40, seed=5), "val_ood": {"a": source(count=30, seed=6)}}
    with pytest.raises(ConfigError, match="grid of its own"):
        tune("msp", small(), **data)
    with pytest.raises(ConfigError, match="two settings"):
        tune([MSP()], small(), **data)
    with pytest.raises(ConfigError, match="fit=None"):
        tune("knn", small(), **data)
    with pytest.raises(KindError, match="val_ood as a mapping"):
        tune("gen", small(), val_id=source(count=40, seed=5), val_ood={})
    probs = robustlab.wrap(nn.Sequential(Small(), nn.Softmax(1)), output="probs", num_classes=3)
    with pytest.raises(ConfigError, match="offset"):
        tune([ViM(), ViM(dim=2)], probs, **data, fit=source(count=90, seed=4))


def test_a_detector_of_another_library_is_tuned_by_its_settings():
    class Far:
        requires_fit = True

        def __init__(self, power):
            self.power = power

        def predict(self, x):
            raise AssertionError

        def fit_features(self, z, y):
            self.mean = z.mean(0)

        def predict_features(self, z):
            return (z - self.mean).abs().pow(self.power).sum(1)

    settings = [FromPytorchOOD(Far(power), name=f"far-{power}") for power in (1, 2)]
    chosen, table = tune(
        settings, small(), val_id=source(count=40, seed=5), val_ood={"a": source(count=30, seed=6)},
        fit=source(count=90, seed=4),
    )  # fmt: skip
    assert [trial.setting for trial in table.trials] == ["far-1", "far-2"]
    assert chosen.name == settings[table.chosen].name
