"""Readouts of drawn label vectors: published values, closed forms, invariances."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from defenses.ladine.readouts import (
    fit_iota,
    interval_width,
    mapped,
    probabilities,
    scaled_variance,
    votes,
)
from robustlab.core.errors import ConfigError, LabelError, RangeError

READOUTS = ("mean", "mapped-mean", "mean-of-mapped", "mapped-twice")


def drawn(shares, count=100):
    """Return one-hot draws (B, count, A) with these shares."""
    return torch.stack(
        [torch.repeat_interleave(torch.eye(len(s)), torch.tensor([round(p * count) for p in s]), 0) for s in shares]
    ).double()


@pytest.mark.parametrize(("iota", "expected"), [(0.1737, 0.996850), (0.3162, 0.959401)])
def test_a_certain_mean_reaches_the_published_cap(iota, expected):
    probs = probabilities(drawn([[0.0, 1.0]]), "mapped-mean", iota)
    assert float(probs[0, 1]) == pytest.approx(expected, abs=5e-7)
    assert float(probs[0, 1]) == pytest.approx(1 / (1 + math.exp(-1 / iota)), abs=1e-12)


@pytest.mark.parametrize(
    ("readout", "iota", "expected"),
    [
        ("mean", 0.1737, 0.7),
        ("mapped-mean", 0.1737, 0.8998),
        ("mapped-twice", 0.1737, 0.8986),
        ("mapped-twice", 0.3162, 0.758),
        ("mapped-mean", 0.3162, 0.776),
    ],
)
def test_a_hundred_draws_at_seven_tenths_give_the_published_probabilities(readout, iota, expected):
    """The mean over how many of the draws are of the class; the published ones were simulated."""
    counts = torch.arange(101)
    probs = probabilities(drawn([[k / 100, 1 - k / 100] for k in counts.tolist()]), readout, iota)[:, 0]
    found = float((torch.from_numpy(binom.pmf(counts, 100, 0.7)) * probs).sum())
    assert found == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("readout", READOUTS)
def test_rows_sum_to_one_and_classes_are_alike(readout):
    samples = torch.randn(20, 30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = samples.clone()
    probs = probabilities(samples, readout, 0.3)
    assert torch.equal(samples, before)
    assert torch.allclose(probs.sum(1), torch.ones(20, dtype=torch.float64))
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(probabilities(samples[..., order], readout, 0.3), probs[:, order])


def test_the_map_peaks_at_one_so_that_larger_means_can_lose():
    inside = torch.rand(200, 40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(probabilities(inside, "mapped-mean", 0.2).argmax(1), inside.mean(1).argmax(1))
    beyond = torch.tensor([[[1.8, 0.9]]], dtype=torch.float64)
    assert int(probabilities(beyond, "mapped-mean", 0.2).argmax(1)) == 1
    assert int(beyond.mean(1).argmax(1)) == 0


def test_a_mean_without_anything_positive_says_nothing():
    assert probabilities(-torch.ones(1, 3, 4), "mean").tolist() == [[0.25] * 4]
    assert probabilities(torch.tensor([[[1.2, -0.2, 0.3]]]), "mean")[0].tolist() == pytest.approx([0.8, 0, 0.2])


def test_votes_are_shares_and_ties_go_to_the_lowest_class():
    tied = torch.tensor([[[0.2, 0.7, 0.7], [0.9, 0.1, 0.9], [0.1, 0.2, 0.3], [0.1, 0.4, 0.4]]])
    assert votes(tied).tolist() == [[0.25, 0.5, 0.25]]
    assert votes(drawn([[0.7, 0.2, 0.1]]))[0].tolist() == pytest.approx([0.7, 0.2, 0.1])


def test_half_zeros_half_ones_are_as_wide_as_can_be():
    samples = drawn([[0.5, 0.5], [1.0, 0.0]])
    assert interval_width(samples).tolist() == [[1, 1], [0, 0]]
    assert torch.allclose(scaled_variance(samples), torch.tensor([[1.0, 1], [0, 0]]).double(), atol=1e-14)


def test_width_and_variance_are_numpys():
    samples = torch.randn(4, 37, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    low, high = np.quantile(samples.numpy(), [0.025, 0.975], axis=1)
    assert np.allclose(interval_width(samples).numpy(), high - low, atol=1e-12)
    assert np.allclose(scaled_variance(samples).numpy(), 4 * np.var(samples.numpy(), axis=1, ddof=0), atol=1e-12)


def sharpened(iota, count=4000):
    """Return spread-out samples of two classes, and labels that the map of this width makes calibrated."""
    generator = torch.Generator().manual_seed(5)
    share = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    samples = torch.stack([share, 1 - share], -1)
    probs = mapped(samples.mean(1), iota)
    labels = (torch.rand(count, generator=generator, dtype=torch.float64) > probs[:, 0]).long()
    return samples, labels


@pytest.mark.parametrize("objective", ["ece", "nll"])
@pytest.mark.parametrize("iota", [0.2, 0.6])
def test_the_width_that_made_the_labels_is_found(objective, iota):
    found = fit_iota(*sharpened(iota), objective=objective)
    assert found == pytest.approx(iota, rel=0.15)


def test_no_other_width_calibrates_better():
    netcal = pytest.importorskip("netcal.metrics")
    samples, labels = sharpened(0.4)
    best = fit_iota(samples, labels)

    def error(iota):
        probs = probabilities(samples, "mapped-mean", iota).max(1).values
        right = (probabilities(samples, "mapped-mean", iota).argmax(1) == labels).long()
        return netcal.ECE(bins=10).measure(probs.numpy(), right.numpy())

    assert error(best) <= min(error(best * factor) for factor in (0.5, 0.8, 0.9, 1.1, 1.25, 2.0)) + 1e-9


def test_what_makes_no_sense_is_refused():
    samples, labels = sharpened(0.4, 10)
    with pytest.raises(RangeError, match="positive"):
        mapped(samples, 0.0)
    with pytest.raises(ConfigError, match="readout"):
        probabilities(samples, "median")
    with pytest.raises(ConfigError, match="readout that maps"):
        fit_iota(samples, labels, readout="mean")
    with pytest.raises(LabelError, match="one label"):
        fit_iota(samples, labels[:5])
