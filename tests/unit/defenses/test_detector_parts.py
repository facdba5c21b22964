"""What detectors share: uniform samples of a stream, exact quantiles of many values, rows that are not finite."""

import numpy as np
import pytest
import torch

from defenses.detectors import SHE
from defenses.detectors.base import Sampler, by_blocks, finite_rows, products, undefined
from defenses.detectors.shaping import quantile
from robustlab.core.types import ModelOutputs


def streamed(values, limit, block, seed=0):
    kept = Sampler(limit, seed)
    for part in torch.split(values, block):
        kept.add(part, -part)
    return kept


@pytest.mark.parametrize("block", [1, 7, 100, 1000])
def test_a_sample_is_the_same_for_every_cut_and_keeps_the_order(block):
    values = torch.arange(1000)
    whole = streamed(values, 60, 1000).rows
    found = streamed(values, 60, block).rows
    assert torch.equal(found[0], whole[0])
    assert torch.equal(found[1], -whole[0])
    assert len(whole[0]) == 60
    assert bool((whole[0].diff() > 0).all())
    assert torch.equal(torch.cat([part[0] for part in streamed(values, 60, block).parts]), whole[0])


def test_a_sample_is_uniform_over_the_stream_and_depends_on_the_seed():
    values = torch.arange(1000)
    chosen = torch.zeros(1000)
    for seed in range(300):
        chosen[streamed(values, 50, 100, seed).rows[0]] += 1
    assert float(chosen.sum()) == 300 * 50
    # 15 are expected of each, with a deviation of 3.8
    assert float(chosen.min()) >= 2
    assert float(chosen.max()) <= 33
    quarters = chosen.view(4, 250).sum(1) / chosen.sum()
    assert float((quarters - 0.25).abs().max()) < 0.02


def test_a_short_stream_is_kept_whole():
    values = torch.arange(30)
    assert torch.equal(streamed(values, 30, 8).rows[0], values)
    assert Sampler(5).rows == ()
    assert Sampler(5).parts == []


def many(kind, count=700_001):
    """Return many values, of which some kinds mislead a look at a part of them."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, generator=generator)
    if kind == "ties":
        return values.clamp_min(0)
    if kind == "steps":
        return values.mul(3).round()
    if kind == "sorted":
        return values.sort().values
    if kind == "equal":
        return torch.full((count,), 2.5)
    if kind == "outlier":
        values[3] = 1e30
    return values


@pytest.mark.parametrize("kind", ["normal", "ties", "steps", "sorted", "equal", "outlier"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.37, 0.5, 0.9, 0.99999])
def test_quantiles_of_many_values_are_numpys(kind, share):
    values = many(kind)
    expected = np.quantile(values.double().numpy(), share)
    for parts in ((values,), torch.split(values, 123_456)):
        assert float(quantile(share, *parts)) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_many_small_parts_are_looked_at():
    values = many("normal")
    parts = torch.split(values, 5)
    assert float(quantile(0.9, *parts)) == pytest.approx(float(np.quantile(values.double().numpy(), 0.9)), abs=1e-7)


def test_a_sample_that_misleads_costs_time_only(monkeypatch):
    """The places that are looked at all hold the largest values: the quantile must be found all the same."""
    values = many("normal")
    monkeypatch.setattr("defenses.detectors.shaping.hashed", lambda places: torch.zeros_like(places) + 3)
    values[3] = 50.0
    assert float(quantile(0.5, values)) == pytest.approx(float(np.quantile(values.double().numpy(), 0.5)), abs=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_go_from_all_columns(value):
    features, logits, labels = torch.rand(6, 4), torch.rand(6, 2), torch.arange(6)
    assert all(a is b for a, b in zip(finite_rows(features, labels, logits), (features, labels, logits), strict=True))
    features[1, 3], logits[4, 0] = value, value
    kept = finite_rows(features, labels, logits)
    assert kept[1].tolist() == [0, 2, 3, 5]
    assert torch.equal(kept[0], features[kept[1]])


def test_large_finite_rows_are_kept():
    features = torch.rand(4, 8)
    features[2] = 3e38  # whose sum is infinite
    assert torch.equal(finite_rows(features)[0], features)


def test_blocks_are_joined_in_order(monkeypatch):
    monkeypatch.setattr("defenses.detectors.base._CACHED", 12)
    rows, other = torch.rand(50, 4), torch.rand(50)
    sizes = []

    def score(block, more):
        sizes.append(len(block))
        return block.sum(1) + more

    assert torch.equal(by_blocks(score, rows, other), rows.sum(1) + other)
    assert set(sizes) == {3, 2}


def test_scores_are_undefined_where_what_was_seen_is():
    score, seen = torch.zeros(3), torch.ones(3, 2)
    seen[1, 0] = float("nan")
    line = torch.tensor([0.0, 1.0, float("inf")])
    assert torch.isnan(undefined(score, seen, line)).tolist() == [False, True, True]


def test_products_are_those_of_matrices():
    rows = torch.randn(40, 7, dtype=torch.float64)
    assert torch.allclose(products(rows), rows.T @ rows, atol=1e-12)


def test_templates_of_a_class_are_of_what_is_answered_right():
    """Class 0 has a right and a wrong answer, class 1 only wrong ones, class 2 no sample."""
    features = torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.0, 2.0], [0.0, 4.0]])
    logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [9, 0, 0], [9, 0, 0]])
    outputs = ModelOutputs(logits=logits, features={"penultimate": features})
    she = SHE().fit_outputs(outputs, torch.tensor([0, 0, 1, 1]))
    assert she.learned["means"].tolist() == [[1, 0], [0, 3], [0, 0]]
