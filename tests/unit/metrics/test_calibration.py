import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, kstest

from robustlab.core.registry import METRICS
from robustlab.metrics import (
    Context,
    Estimate,
    PredictionStore,
    Resampler,
    bin_index,
    compute,
    paired_difference,
    reliability,
    wilson,
)
from robustlab.metrics.calibration import CalibrationGrid, brier_decomposition, calibration_test
from robustlab.metrics.forecasts import Forecasts, equal_mass_index
from robustlab.metrics.stats import linearise

NAMES = [
    *("nll", "brier", "brier-reliability", "brier-resolution", "ece", "ece-null", "ece-excess", "ece-equal-mass"),
    *("mce", "ece-classwise", "ece-top-label", "ece-debiased", "smooth-ece"),
    *("calibration-slope", "calibration-intercept"),
]


def from_probs(p: np.ndarray, labels: np.ndarray, **more: object) -> PredictionStore:
    odds = torch.from_numpy(np.log(p) - np.log1p(-p)).float()
    logits = torch.stack([torch.zeros_like(odds), odds], 1)
    return PredictionStore(torch.arange(len(p)), logits, torch.from_numpy(labels).long(), "binary", **more)


def one(store: PredictionStore, name: str, replicates: int = 200) -> Estimate:
    value, *labels = compute(store, Context(Resampler(replicates=replicates)), [name])
    assert value.target == ""
    assert all(item.target for item in labels)
    return value.estimate


def test_bins_of_a_lattice() -> None:
    p = torch.arange(11, dtype=torch.float64) / 10
    assert bin_index(p, 10).tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    # shares of votes that went through float32 logits fall in the same bins
    votes = from_probs(np.arange(1, 10) / 10, np.zeros(9))
    assert bin_index(votes.probs[:, 1], 10).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert bin_index(torch.tensor([0.1 + 2e-6, 0.1 - 2e-6], dtype=torch.float64), 10).tolist() == [1, 0]


def test_ece_of_alternating_errors_on_the_lattice() -> None:
    # one level a bin: ECE is the error at lattice level, which other bin rules miss by merging two levels
    level = np.repeat(np.arange(1, 16) / 15 - 1e-3, 1000)
    shift = np.repeat(np.where(np.arange(15) % 2 == 0, 0.03, -0.03), 1000)
    happened = np.concatenate([np.arange(1000) < round(1000 * q) for q in (level + shift)[::1000]])
    expected = np.abs(np.round((level + shift)[::1000] * 1000).clip(0, 1000) / 1000 - level[::1000]).mean()
    assert one(from_probs(level, happened), "ece", 50).value == pytest.approx(expected, abs=1e-6)


def test_ece_is_of_the_positive_class_or_of_the_confidence() -> None:
    p, y = np.array([0.1, 0.1, 0.8, 0.8]), np.array([0, 1, 1, 1])
    assert one(from_probs(p, y), "ece").value == pytest.approx((0.8 + 0.4) / 4, abs=1e-6)
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]]))
    store = PredictionStore(torch.arange(3), logits, torch.tensor([0, 1, 1]), "multiclass")
    assert one(store, "ece").value == pytest.approx((0.2 + 0.2) / 3, abs=1e-6)


def test_multilabel_is_the_mean_over_labels() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(80, 3)), rng.integers(0, 2, (80, 3))
    labels[:10, 0] = -1
    store = PredictionStore(torch.arange(80), torch.from_numpy(logits).float(), torch.from_numpy(labels), "multilabel")
    for name, factor in (("ece", 1), ("nll", 1), ("brier", 0.5), ("ece-null", 1)):
        parts = []
        for index in range(3):
            rows = labels[:, index] >= 0
            p = 1 / (1 + np.exp(-logits[rows, index].astype(np.float32).astype(np.float64)))
            parts.append(one(from_probs(p, labels[rows, index]), name).value * factor)
        assert one(store, name).value == pytest.approx(np.mean(parts), abs=1e-6)
        listed = {item.target: item.estimate for item in compute(store, Context(Resampler()), [name])[1:]}
        assert [listed[label].value for label in "012"] == pytest.approx(parts, abs=1e-6)
        assert [listed[label].n for label in "012"] == [70, 80, 80]
        assert all(item.low < item.value < item.high or name == "ece" for item in listed.values())


def test_null_error_is_the_mean_ece_of_calibrated_draws() -> None:
    rng = np.random.default_rng(1)
    p = rng.beta(2, 2, 1000)
    draws = [one(from_probs(p, rng.random(1000) < p), "ece", 2).value for _ in range(300)]
    null = one(from_probs(p, np.zeros(1000)), "ece-null")
    assert null.value == pytest.approx(np.mean(draws), rel=0.05)


def test_nll_of_sure_errors_is_finite() -> None:
    logits = torch.tensor([[0.0, 500.0], [500.0, 0.0]])
    store = PredictionStore(torch.arange(2), logits, torch.tensor([0, 0]), "binary")
    assert one(store, "nll").value == 250
    assert one(store, "brier").value == 1


def test_reliability_curve() -> None:
    rng = np.random.default_rng(3)
    p = rng.uniform(0.34, 0.99, 500)
    happened = rng.random(500) < p
    store = from_probs(p, happened)
    curve = reliability(store)
    assert curve.n.tolist()[:5] == [0] * 5
    assert int(curve.n.sum()) == 500
    for values in (curve.mean_p, curve.frequency, curve.low, curve.high, curve.band_low, curve.band_high):
        assert torch.isnan(values[:5]).all()
        assert not torch.isnan(values[5:]).any()
    rows = np.ceil(p * 15).astype(int) - 1 == 7
    n, mean, share = rows.sum(), p[rows].mean(), happened[rows].mean()
    assert curve.mean_p[7].item() == pytest.approx(mean, abs=1e-6)
    assert curve.frequency[7].item() == pytest.approx(share)
    assert (curve.low[7].item(), curve.high[7].item()) == pytest.approx(wilson(share * n, n))
    assert curve.band_low[7].item() == pytest.approx(binom.ppf(0.025, n, mean) / n)
    assert curve.band_high[7].item() == pytest.approx(binom.ppf(0.975, n, mean) / n)
    ece = float((curve.n[5:] / 500 * (curve.mean_p - curve.frequency)[5:].abs()).sum())
    assert ece == pytest.approx(one(store, "ece").value)


def test_reliability_knows_clusters_and_labels() -> None:
    rng = np.random.default_rng(4)
    p, y = np.full(300, 0.5), (np.arange(60) % 2 > 0).repeat(5)
    plain, clustered = from_probs(p, y), from_probs(p, y, clusters=torch.arange(60).repeat_interleave(5))
    width = [float((c.high - c.low)[7]) for c in (reliability(plain), reliability(clustered))]
    assert width[1] > 2 * width[0]
    band = [float((c.band_high - c.band_low)[7]) for c in (reliability(plain), reliability(clustered))]
    assert band[1] == pytest.approx(band[0] * 5**0.5, rel=0.1)
    labels = torch.from_numpy(rng.integers(-1, 2, (50, 3)))
    store = PredictionStore(torch.arange(50), torch.from_numpy(rng.normal(size=(50, 3))).float(), labels, "multilabel")
    assert int(reliability(store).n.sum()) == int((labels >= 0).sum())


def test_undefined_calibration_has_a_reason() -> None:
    store = PredictionStore(torch.arange(3), torch.zeros(3, 2), torch.full((3, 2), -1), "multilabel")
    for name in ("nll", "brier", "ece", "ece-null"):
        estimate = one(store, name)
        assert math.isnan(estimate.value)
        assert estimate.reason == "no_samples"


@pytest.mark.parametrize("name", ["ece", "smooth-ece"])
def test_interval_covers_the_expected_error_of_a_calibrated_model(name: str) -> None:
    # the expected plug-in value lies well above 0, and the width is that of sizes of gaps, not of gaps
    rng = np.random.default_rng(2)
    p = rng.beta(2, 2, 400)
    draws = [one(from_probs(p, rng.random(400) < p), name) for _ in range(300 if name == "ece" else 60)]
    values = np.array([item.value for item in draws])
    covered = np.mean([item.low <= values.mean() <= item.high for item in draws])
    assert 0.93 <= covered <= 0.99
    widths = np.array([item.high - item.low for item in draws])
    assert 0.95 < widths.mean() / (2 * 1.97 * values.std()) < 1.3
    null = float(draws[0].method.split("expected ")[1].split()[0])
    assert values.mean() == pytest.approx(null, rel=0.05)


def test_null_test_is_uniform_when_calibrated_and_finds_miscalibration() -> None:
    rng = np.random.default_rng(5)
    p = rng.beta(2, 2, 500)
    context = Context(Resampler())
    values = [calibration_test(from_probs(p, rng.random(500) < p), context) for _ in range(300)]
    assert kstest(values, "uniform").pvalue > 0.01
    assert 0.02 <= np.mean(np.array(values) <= 0.05) <= 0.085
    assert calibration_test(from_probs(p, rng.random(500) < 0.5 + 0.4 * (p - 0.5)), context) < 0.01


def test_null_test_and_null_level_know_clusters() -> None:
    rng = np.random.default_rng(6)
    p = np.repeat(rng.beta(2, 2, 60), 10)
    context = Context(Resampler())
    plain, aware = [], []
    for _ in range(40):
        y = np.repeat(rng.random(60), 10) < p  # one draw a patient
        plain.append(calibration_test(from_probs(p, y), context) <= 0.05)
        store = from_probs(p, y, clusters=torch.arange(60).repeat_interleave(10))
        aware.append(calibration_test(store, context) <= 0.05)
    assert np.mean(plain) > 0.6
    assert np.mean(aware) < 0.2
    single = one(from_probs(p[::10], y[::10]), "ece")
    assert one(store, "ece").value == pytest.approx(single.value)
    assert one(store, "ece-null").value == pytest.approx(one(from_probs(p[::10], y[::10]), "ece-null").value, rel=0.2)
    assert one(store, "ece").high - one(store, "ece").low == pytest.approx(single.high - single.low, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_order_does_not_matter_and_inputs_are_left_alone(make_store, name: str) -> None:
    for task, classes in (("multiclass", 2), ("multiclass", 4), ("multilabel", 3)):
        store = make_store(300, classes, task=task, per_cluster=3)
        store = dataclasses.replace(store, logits=store.logits.double())
        before = store.logits.clone()
        order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
        context = Context(Resampler())
        first, second = (compute(item, context, [name]) for item in (store, store.select(order)))
        assert torch.equal(store.logits, before)
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert b.target == a.target
            numbers = [(item.estimate.value, item.estimate.low, item.estimate.high) for item in (a, b)]
            assert numbers[1] == pytest.approx(numbers[0], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_sum_to_zero_and_samples_repeated_change_nothing(make_store, name: str) -> None:
    for task, classes in (("multiclass", 2), ("multiclass", 4), ("multilabel", 3)):
        store = make_store(240, classes, task=task)
        context = Context(Resampler())
        points = METRICS.get(name)().point(store, context)
        for target, statistic in METRICS.get(name)().statistics(store, context).items():
            made = linearise(statistic, 240)
            assert made.value == pytest.approx(points[target], abs=1e-12)
            assert float(made.influence.sum()) == pytest.approx(0, abs=1e-9)
            assert made.value == pytest.approx(float(statistic(torch.full((240, 1), 2.0).double())[0]), abs=1e-9)


@pytest.mark.parametrize(
    "name", ["brier-resolution", "calibration-slope", "calibration-intercept", "ece", "smooth-ece"]
)
def test_influence_values_are_derivatives(name: str) -> None:
    # far from calibration, where sizes of gaps are linear
    rng = np.random.default_rng(7)
    p = rng.uniform(0.3, 0.98, 3000)
    store = from_probs(p, rng.random(3000) < (0.02 if name in ("ece", "smooth-ece") else 0.3 + 0.4 * p))
    (statistic,) = METRICS.get(name)().statistics(store, Context(Resampler())).values()
    made = linearise(statistic, 3000)
    step = torch.zeros((3000, 1), dtype=torch.float64)
    step[::3] = 1e-3
    ones = torch.ones_like(step)
    change = float((statistic(ones + step) - statistic(ones - step))[0]) / 2
    assert float(made.influence @ step[:, 0]) == pytest.approx(change, rel=0.05)


def test_equal_mass_bins_never_part_equal_probabilities() -> None:
    p = torch.cat([torch.full((40,), 0.5), torch.linspace(0.6, 0.99, 60)]).double()
    item = Forecasts(p, p > 2, torch.ones(100, dtype=torch.bool))
    index = equal_mass_index(item, 10)
    assert len(index[:40].unique()) == 1
    assert torch.equal(index[:40], torch.full((40,), 2))  # middle rank 20.5, above the second boundary
    assert index[40:].tolist() == [4 + i // 10 for i in range(60)]
    everything = Forecasts(torch.ones(20).double(), p[:20] > 2, torch.ones(20, dtype=torch.bool))
    assert len(equal_mass_index(everything, 10).unique()) == 1
    distinct = Forecasts(torch.rand(33, generator=torch.Generator().manual_seed(0)).double(), p[:33] > 2, p[:33] > 0)
    ranks = distinct.p.argsort().argsort() + 1
    assert equal_mass_index(distinct, 15).tolist() == [
        next(m for m in range(15) if rank <= -(-(m + 1) * 33 // 15)) for rank in ranks.tolist()
    ]


def test_top_label_and_class_wise_by_hand(make_store) -> None:
    store = make_store(500, 4)
    p, y = store.probs.numpy(), store.labels.numpy()
    answer, sure = p.argmax(1), p.max(1)

    def ece(p: np.ndarray, hit: np.ndarray) -> float:
        index = np.ceil(p * 15) - 1
        return sum(abs((p - hit)[index == m].sum()) for m in range(15)) / len(p)

    parts = [(answer == k).mean() * ece(sure[answer == k], (y == k)[answer == k]) for k in range(4)]
    assert one(store, "ece-top-label").value == pytest.approx(sum(parts), abs=1e-12)
    each = [ece(p[:, k], y == k) for k in range(4)]
    found = one(store, "ece-classwise")
    assert found.value == pytest.approx(np.mean(each), abs=1e-12)
    weighted = float(np.bincount(y, minlength=4) / 500 @ each)
    assert f"{weighted:.3g} weighted by prevalence" in found.method
    assert one(store, "ece-excess").value == pytest.approx(one(store, "ece").value - one(store, "ece-null").value)


def test_maximum_error_needs_ten_forecasts() -> None:
    p = np.concatenate([np.full(9, 0.05), np.full(10, 0.5), np.full(30, 0.9)])
    y = np.concatenate([np.ones(9), np.arange(10) < 2, np.arange(30) < 24])
    assert one(from_probs(p, y), "mce").value == pytest.approx(0.3, abs=1e-6)
    nothing = one(from_probs(p[:9], y[:9]), "mce")
    assert (math.isnan(nothing.value), nothing.reason) == (True, "below_min_count")


def test_debiased_square_has_its_sign() -> None:
    rng = np.random.default_rng(8)
    p = rng.beta(2, 2, 200)
    found = [one(from_probs(p, rng.random(200) < p), "ece-debiased") for _ in range(300)]
    values = np.array([item.value for item in found])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(300)
    assert 0.4 < np.mean(values < 0) < 0.75
    assert any("root 0;" in item.method for item in found)


@pytest.mark.parametrize(("task", "classes"), [("multiclass", 2), ("multiclass", 5), ("multilabel", 3)])
def test_brier_decomposition_is_exact(make_store, task: str, classes: int) -> None:
    store = make_store(400, classes, task=task)
    made = brier_decomposition(store)
    whole = made.reliability - made.resolution + made.uncertainty + made.within_variance - made.within_covariance
    assert whole == pytest.approx(made.brier, abs=1e-12)
    assert made.brier == pytest.approx(one(store, "brier").value, abs=1e-12)
    assert abs(made.reliability - made.resolution + made.uncertainty - made.brier) > 1e-6
    assert one(store, "brier-reliability").value == pytest.approx(made.reliability, abs=1e-12)
    assert one(store, "brier-resolution").value == pytest.approx(made.resolution, abs=1e-12)


def test_separation_and_single_classes_have_reasons() -> None:
    p, y = np.array([0.1, 0.2, 0.7, 0.9] * 5), np.array([0, 0, 1, 1] * 5)
    slope = one(from_probs(p, y), "calibration-slope")
    assert (math.isnan(slope.value), slope.reason) == (True, "separation")
    assert one(from_probs(1 - p, y), "calibration-slope").reason == "separation"
    assert not math.isnan(one(from_probs(p, y), "calibration-intercept").value)
    for name in ("calibration-slope", "calibration-intercept"):
        assert one(from_probs(p, np.zeros(20)), name).reason == "single_class"
    flat = from_probs(np.full(20, 0.3), y)
    assert one(flat, "calibration-slope").reason == "no_variance"
    expected = math.log(0.5 / 0.5) - math.log(0.3 / 0.7)
    assert one(flat, "calibration-intercept").value == pytest.approx(expected, abs=1e-6)


def test_slopes_of_labels_are_those_of_two_classes(make_store) -> None:
    store = make_store(300, 3, task="multilabel")
    for name in ("calibration-slope", "calibration-intercept"):
        found = {v.target: v.estimate for v in compute(store, Context(Resampler()), [name])}
        assert list(found) == ["0", "1", "2"]
        for k in range(3):
            rows = store.labels[:, k] >= 0
            odds = store.logits[rows, k]
            single = PredictionStore(
                store.ids[rows], torch.stack([torch.zeros_like(odds), odds], 1), store.labels[rows, k], "binary"
            )
            alone = one(single, name)
            assert found[str(k)].value == pytest.approx(alone.value, abs=1e-9)
            assert (found[str(k)].low, found[str(k)].high) == pytest.approx((alone.low, alone.high), abs=1e-7)


def test_grids_merge_bit_for_bit() -> None:
    rng = np.random.default_rng(9)
    p = torch.from_numpy(rng.random(1000))
    happened = torch.from_numpy(rng.random(1000) < 0.4)
    whole = CalibrationGrid.of(p, happened)
    parts = [CalibrationGrid.of(p[i::3], happened[i::3]) for i in range(3)]
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = parts[order[0]].merge(parts[order[1]]).merge(parts[order[2]])
        assert torch.equal(merged.residual, whole.residual)
        assert torch.equal(merged.mass, whole.mass)
    store = from_probs(p.numpy().clip(1e-6, 1 - 1e-6), happened.numpy())
    assert whole.error() == pytest.approx(one(store, "smooth-ece").value, abs=1e-6)
    empty = CalibrationGrid.of(p[:0], happened[:0])
    assert math.isnan(empty.error())


def test_paired_differences_of_every_error(make_store) -> None:
    a = make_store(300, 2)
    noise = torch.randn(a.logits.shape, generator=torch.Generator().manual_seed(1))
    b = dataclasses.replace(a, logits=2.5 * a.logits + 0.3 * noise)
    context = Context(Resampler(replicates=50))
    for name in NAMES:
        made = paired_difference(a, b, name, context)
        values = [one(item, name).value for item in (a, b)]
        assert made.value == pytest.approx(values[1] - values[0], abs=1e-9)
        assert made.low < made.high
        same = paired_difference(a, a, name, context)
        assert (same.value, same.low, same.high) == (0, 0, 0)


@pytest.mark.parametrize("centre", [-1.5, -3.0, 0.0])
def test_null_of_the_smooth_error_is_the_mean_over_calibrated_models(centre: float) -> None:
    """Where no forecast is near, the variance is a rounding below 0, and the search may not stop at its root."""
    rng = np.random.default_rng(3)
    p = 1 / (1 + np.exp(-rng.normal(centre, 1, 624)))
    draws = [one(from_probs(p, rng.random(624) < p), "smooth-ece") for _ in range(60)]
    null = float(draws[0].method.split("expected ")[1].split()[0])
    assert null == pytest.approx(np.mean([item.value for item in draws]), rel=0.12)
