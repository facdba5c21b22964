import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from robustlab.metrics import Context, Estimate, PredictionStore, Resampler, bin_index, compute, reliability, wilson


def from_probs(p: np.ndarray, labels: np.ndarray, **more: object) -> PredictionStore:
    odds = torch.from_numpy(np.log(p) - np.log1p(-p)).float()
    logits = torch.stack([torch.zeros_like(odds), odds], 1)
    return PredictionStore(torch.arange(len(p)), logits, torch.from_numpy(labels).long(), "binary", **more)


def one(store: PredictionStore, name: str, replicates: int = 200) -> Estimate:
    (value,) = compute(store, Context(Resampler(replicates=replicates)), [name])
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


def test_null_error_is_the_mean_ece_of_calibrated_draws() -> None:
    rng = np.random.default_rng(1)
    p = rng.beta(2, 2, 1000)
    draws = [one(from_probs(p, rng.random(1000) < p), "ece", 2).value for _ in range(300)]
    null = one(from_probs(p, np.zeros(1000)), "ece-null")
    assert null.value == pytest.approx(np.mean(draws), rel=0.05)


def test_reflected_interval_corrects_the_bias_of_the_bootstrap() -> None:
    # calibrated model: replicates have twice the bias, so a percentile interval would lie above the estimate
    rng = np.random.default_rng(2)
    p = rng.beta(2, 2, 400)
    estimate = one(from_probs(p, rng.random(400) < p), "ece", 500)
    assert "reflected" in estimate.method
    assert 0 <= estimate.low <= 0.02
    assert estimate.low < estimate.high < estimate.value + 0.01


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
    labels = torch.from_numpy(rng.integers(-1, 2, (50, 3)))
    store = PredictionStore(torch.arange(50), torch.from_numpy(rng.normal(size=(50, 3))).float(), labels, "multilabel")
    assert int(reliability(store).n.sum()) == int((labels >= 0).sum())


def test_undefined_calibration_has_a_reason() -> None:
    store = PredictionStore(torch.arange(3), torch.zeros(3, 2), torch.full((3, 2), -1), "multilabel")
    for name in ("nll", "brier", "ece", "ece-null"):
        estimate = one(store, name)
        assert math.isnan(estimate.value)
        assert estimate.reason == "no_samples"
