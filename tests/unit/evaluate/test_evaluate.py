"""evaluate_under_shift: what the report says is what a hand-made loop finds."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import robustlab
from robustlab.core.corruption import Corruption
from robustlab.core.errors import KindError, UnknownNameError
from robustlab.core.levels import Levels
from robustlab.core.shift import ShiftContext, quantize
from robustlab.corruptions import PGD, GaussianNoise
from robustlab.data import load_data


@dataclass(frozen=True)
class Darken(Corruption):
    """Multiply by a factor."""

    factor: Levels = Levels((0.9, 0.8, 0.7, 0.6, 0.5), identity=1.0, unit="of brightness")
    name = "darken"

    def draw(self, rng, shape):
        return {}

    def apply(self, images, draws, values):
        return images * values["factor"]


@dataclass(frozen=True)
class Broken(Darken):
    """Raises on the second chunk."""

    name = "broken"

    def apply(self, images, draws, values):
        if images[0, 0, 0, 0] > 0.5:
            raise ArithmeticError("planted")
        return images


class Brightness(nn.Module):
    """Class 1 where the mean brightness exceeds a half: its answers under Darken are known."""

    def __init__(self, most=10**9):
        super().__init__()
        self.most = most
        self.sizes = []
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        z = (x.mean((1, 2, 3)) - 0.5) * self.scale
        return torch.stack([-z, z], 1)


def arrays(count=60, seed=0, size=6):
    generator = np.random.default_rng(seed)
    means = generator.uniform(0.05, 0.95, count)
    images = np.clip(means[:, None, None] + generator.normal(0, 0.02, (count, size, size)), 0, 1)
    flip = generator.uniform(size=count) < 0.1
    labels = ((images.mean((1, 2)) > 0.5) ^ flip).astype(np.int64)
    return (images * 255).round().astype(np.uint8), labels


def source(count=60, seed=0, **options):
    images, labels = arrays(count, seed)
    return load_data(images, labels=labels, name="discs", **options)


def evaluate(model=None, data=None, **options):
    settings = {"shifts": (Darken(),), "progress": False, "val": source(40, 1), "replicates": 200} | options
    return robustlab.evaluate_under_shift(
        (model or Brightness()).eval() if model is None else model, data or source(), **settings
    )


def test_rows_equal_a_hand_made_loop():
    data = source()
    report = evaluate(data=data, severities=(1, 3, 5))
    batch = data.read(range(len(data)))
    for severity in (0, 1, 3, 5):
        shifted = Darken().on(batch, severity, ShiftContext()).images
        answers = (quantize(shifted, data.info.spec).mean((1, 2, 3)) > 0.5).long()
        accuracy = (answers == data.info.labels).double().mean().item()
        row = report.value("accuracy", shift="darken" if severity else "clean", severity=severity)
        assert row.value == pytest.approx(accuracy, abs=1e-9)
        assert row.low < row.value < row.high
        assert row.n == row.n_units == 60
    row = report.value("accuracy-drop", shift="darken", severity=5)
    clean, dark = (report.value("accuracy", shift=s, severity=v).value for s, v in (("clean", 0), ("darken", 5)))
    assert row.value == pytest.approx(clean - dark, abs=1e-9)
    assert report.value("accuracy", shift="darken", severity=3).amount == pytest.approx(0.7)


def test_chunk_size_changes_nothing_that_counts():
    reports = [evaluate(shifts=(GaussianNoise(),), severities=(2,), batch_size=size) for size in (60, 7, 7, 2)]
    stores = [report.predictions["gaussian-noise@2"] for report in reports]
    assert torch.equal(stores[1].logits, stores[2].logits)
    for store in stores[1:]:
        assert torch.allclose(store.logits, stores[0].logits, atol=1e-5)
        assert torch.equal(store.ids, stores[0].ids)


def test_every_pass_has_the_same_size_and_the_padding_is_dropped():
    net = Brightness().eval()
    report = evaluate(net, batch_size=16)
    assert set(net.sizes[-10:]) == {16}
    assert all(len(store) == 60 for store in report.predictions.values())


def test_out_of_memory_halves_the_chunk_and_gives_the_same_numbers():
    net = Brightness(most=9).eval()
    report = evaluate(net)
    assert report.manifest["chunk"] <= 9
    assert [row.value for row in report.rows if row.metric == "accuracy"] == [
        row.value for row in evaluate().rows if row.metric == "accuracy"
    ]
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(Brightness(most=9).eval(), batch_size=32)


def test_a_failing_shift_is_listed_and_the_rest_finishes():
    report = evaluate(shifts=(Broken(), Darken()), batch_size=8)
    assert [failure["condition"] for failure in report.manifest["failures"]] == ["broken"]
    assert "planted" in report.manifest["failures"][0]["error"]
    shifts = {row.shift for row in report.rows}
    assert "darken" in shifts
    assert "broken" not in shifts
    assert any("broken" in sentence for sentence in report.manifest["not_tested"])


def test_attack_rows_state_native_budgets_and_fall_with_eps():
    report = evaluate(shifts=(), attacks=PGD(eps=(2 / 255, 30 / 255, 120 / 255), steps=5))
    rows = [row for row in report.rows if row.shift == "pgd-linf" and row.metric == "accuracy" and not row.group]
    assert [row.amount for row in rows] == pytest.approx([2, 30, 120])
    assert {row.unit for row in rows} == {"grey level"}
    values = [report.value("accuracy").value, *(row.value for row in rows)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.2


def test_silent_failures_need_validation_data():
    without = evaluate(val=None).value("silent-failure-rate")
    assert np.isnan(without.value)
    assert without.reason == "no_val"
    with_val = evaluate().value("silent-failure-rate")
    assert 0 <= with_val.value <= 0.3
    assert with_val.n == 60


def test_ood_sets_are_adapted_and_scored():
    foreign = np.random.default_rng(0).integers(0, 255, (20, 9, 9, 3), dtype=np.uint8)
    report = evaluate(shifts=(), ood={"far/noise": foreign}, metrics="all")
    store = report.predictions["ood:far/noise"]
    assert len(store) == 20
    assert store.labels is None
    rows = {(row.scorer, row.metric) for row in report.rows if row.data == "ID vs far/noise"}
    assert {("energy", "auroc-ood"), ("msp", "fpr95-ood-pos"), ("msp", "fpr95-id-pos")} <= rows
    assert report.manifest["ood"]["far/noise"]["spec"]["size"] == [9, 9]


def test_groups_and_clusters():
    data = source(groups={"site": np.array(["a", "b", "b"] * 20), "patient": np.arange(60) // 4})
    val = source(40, 1, groups={"site": np.array(["a", "b"] * 20), "patient": np.arange(40) // 4})
    report = evaluate(data=data, val=val, groups=("site",), cluster="patient")
    assert report.value("accuracy", group="site=a").n == 20
    assert report.value("accuracy", group="site=b").n == 40
    assert report.value("accuracy").n_units == 15
    plain = evaluate(data=data, val=val).value("accuracy")
    assert plain.n_units == 60


def test_worst_plausible_stays_within_its_severities():
    report = evaluate(severities=(1, 3, 5))
    likely = report.value("accuracy", shift="worst plausible")
    overall = report.value("accuracy", shift="worst")
    assert likely.target == "darken@3"
    assert overall.target == "darken@5"
    plain = report.value("accuracy", shift="darken", severity=3)
    assert likely.value == plain.value
    assert likely.high - likely.low > plain.high - plain.low


def test_nan_outputs_count_as_errors_and_both_n_are_there():
    class Sometimes(Brightness):
        def forward(self, x):
            logits = super().forward(x)
            return torch.where(x.mean((1, 2, 3), keepdim=False)[:, None] > 0.8, torch.nan, logits)

    report = evaluate(Sometimes().eval(), shifts=(), metrics=("accuracy", "nll"))
    data = source()
    bright = data.read(range(60)).images.mean((1, 2, 3)) > 0.8
    healthy = evaluate(shifts=()).predictions["clean"]
    right = (healthy.predicted == data.info.labels) & ~bright
    assert report.value("accuracy").value == pytest.approx(right.float().mean().item())
    assert report.value("accuracy").n == 60
    assert report.value("nll").n == 60 - int(bright.sum())


def test_global_state_and_the_network_are_left_alone():
    net = Brightness().train()
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the legacy state is what must not change
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), net.scale.clone())  # noqa: NPY002
    with pytest.warns(robustlab.RobustlabWarning, match="training mode"):
        evaluate(net, shifts=(GaussianNoise(),), attacks=PGD(steps=2, eps=(0.1,)), gallery=True)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert net.training
    assert torch.equal(before[2], net.scale)
    assert net.scale.grad is None


def test_same_seed_same_report_other_seed_other_draws():
    one, two, three = (evaluate(shifts=(GaussianNoise(),), seed=seed) for seed in (1, 1, 2))
    assert list(map(repr, one.rows)) == list(map(repr, two.rows))
    key = "gaussian-noise@5"
    assert not torch.equal(one.predictions[key].logits, three.predictions[key].logits)


def test_twice_the_same_shift_gets_two_labels():
    report = evaluate(shifts=(GaussianNoise(), GaussianNoise.at(sigma=0.5)), severities=(1,))
    assert {row.shift for row in report.rows} >= {"gaussian-noise", "gaussian-noise#2"}
    assert report.value("accuracy", shift="gaussian-noise#2", severity=1).amount == 0.5


def test_gallery_only_when_asked():
    assert evaluate().gallery == ()
    pictures = evaluate(gallery=True).gallery
    assert len(pictures) == 6
    assert all(picture.png.startswith(b"\x89PNG") for picture in pictures)


def test_validation_that_is_the_test_data_is_called_out():
    with pytest.warns(robustlab.RobustlabWarning, match="same"):
        report = evaluate(val=source())
    assert any("thresholds saw the test data" in sentence for sentence in report.manifest["not_tested"])
    assert not any("thresholds saw" in sentence for sentence in evaluate().manifest["not_tested"])


def test_outputs_that_are_not_finite_are_counted_on_the_first_screen():
    class Sometimes(Brightness):
        def forward(self, x):
            return torch.where(x.mean((1, 2, 3))[:, None] > 0.8, torch.nan, super().forward(x))

    report = evaluate(Sometimes().eval())
    count = int((source().read(range(60)).images.mean((1, 2, 3)) > 0.8).sum())
    assert f"{count} of 60 on clean data" in report.summary()


def test_a_guessing_model_gets_no_reassuring_verdict():
    class Constant(Brightness):
        def forward(self, x):
            return super().forward(x) * 0 + torch.tensor([0.0, 2.0])

    summary = evaluate(Constant().eval()).summary()
    assert "not shown to beat guessing" in " ".join(summary.split())
    assert "not shown to beat guessing" not in evaluate().summary()


def test_the_frozen_threshold_stands_beside_the_rates_that_use_it():
    report = evaluate()
    (threshold,) = report.manifest["frozen"]["thresholds"]
    assert f"Sensitivity at {threshold:.3g}, set on val" in report.summary()


def test_metrics_that_were_asked_for_and_have_no_row_say_why():
    names = ("auroc", "accuracy-gap", "auroc-ood", "top-3-accuracy", "flip-rate", "auroc")
    report = evaluate(shifts=(), metrics=names)
    reasons = {name: report.value(name).reason for name in dict.fromkeys(names)}
    assert reasons == {
        "auroc": "",
        "accuracy-gap": "no_groups",
        "auroc-ood": "no_ood_set",
        "top-3-accuracy": "not_for_this_task",
        "flip-rate": "no_conditions",
    }
    assert "no ood= was passed" in report.summary()
    assert not {"no_groups", "no_ood_set"} & {row.reason for row in evaluate(shifts=(), metrics="all").rows}


def test_the_default_set_and_one_more():
    report = evaluate(metrics=("default", "nll", "accuracy"))
    plain = evaluate()
    assert {row.metric for row in report.rows} == {row.metric for row in plain.rows} | {
        "nll",
        "auroc-ood",
        "minimal-budget",
    }
    assert report.value("auroc-ood").reason == "no_ood_set"
    assert report.value("minimal-budget").reason == "no_attack"
    with pytest.raises(KindError, match="metrics as"):
        evaluate(metrics=[3])
    with pytest.raises(UnknownNameError):
        evaluate(metrics=("default", "acuracy"))
