"""The paired interval of an accuracy difference, where few samples differ."""

import math

import pytest
import torch

from robustlab.metrics import Context, PredictionStore, Resampler, compute
from robustlab.metrics.stats import discordance_interval

Z = 1.959963984540054


def gains(plus, minus, count):
    values = torch.zeros(count, dtype=torch.float64)
    values[:plus] = 1
    values[plus : plus + minus] = -1
    return values


@pytest.mark.parametrize(("plus", "minus", "count"), [(0, 0, 50), (4, 0, 624), (12, 3, 100), (30, 30, 200)])
def test_equals_the_published_formula(plus, minus, count):
    p12, p21 = (plus + 1) / (count + 2), (minus + 1) / (count + 2)
    half = Z * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / (count + 2))
    low, high = discordance_interval(gains(plus, minus, count), None)
    assert low == pytest.approx(p12 - p21 - half, abs=1e-12)
    assert high == pytest.approx(p12 - p21 + half, abs=1e-12)


def test_a_few_one_sided_differences_decide_nothing():
    low, _ = discordance_interval(gains(4, 0, 624), None)  # exact McNemar: p = .125
    assert low < 0
    low, _ = discordance_interval(gains(9, 0, 624), None)  # exact McNemar: p = .004
    assert low > 0


@pytest.mark.parametrize(("p12", "p21", "groups"), [(0.02, 0.02, None), (0.1, 0.02, None), (0.2, 0.05, 60)])
def test_coverage(p12, p21, groups):
    generator = torch.Generator().manual_seed(3)
    clusters = None if groups is None else torch.arange(400) % groups
    inside = 0
    for _ in range(500):
        u = torch.rand(400, generator=generator, dtype=torch.float64)
        if clusters is not None:
            shared = torch.randn(groups, generator=generator, dtype=torch.float64)[clusters]
            u = torch.special.ndtr(math.sqrt(0.5) * (shared + torch.special.ndtri(u)))
        gain = (u < p12).double() - (u > 1 - p21).double()
        low, high = discordance_interval(gain, clusters)
        inside += low <= p12 - p21 <= high
    assert 0.925 <= inside / 500 <= 0.995


def test_clusters_widen_where_images_of_a_patient_agree():
    gain = gains(40, 0, 400)
    together, apart = torch.arange(400) // 20, torch.randperm(400, generator=torch.Generator().manual_seed(0)) % 20
    widths = [high - low for low, high in (discordance_interval(gain, c) for c in (together, apart))]
    assert widths[0] > 2 * widths[1]


def test_one_answer_to_everything_has_no_certain_balanced_accuracy():
    labels = torch.arange(40) % 2
    store = PredictionStore(
        ids=torch.arange(40),
        logits=torch.tensor([[0.0, 1.0]]).repeat(40, 1),
        labels=labels,
        task="binary",
        clusters=torch.arange(40) // 4,
    )
    (value,) = compute(store, Context(resampler=Resampler(replicates=200)), ["balanced-accuracy"])
    assert value.estimate.value == 0.5
    assert value.estimate.low < 0.5 < value.estimate.high
