import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torch.nn import functional

from robustlab.core.errors import ShapeError
from robustlab.metrics import Context, Estimate, PredictionStore, Resampler, compute
from robustlab.metrics.uncertainty import (
    disagreement,
    entropy,
    expected_entropy,
    mutual_information,
    predictive_entropy,
    reduce_members,
    variation_ratio,
)

NAMES = ("mean-entropy", "mean-mutual-information", "mean-disagreement")


def members(s: int = 7, n: int = 50, c: int = 4, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(s, n, c)))
    return functional.log_softmax(scale * logits, 2)


def one(store: PredictionStore, name: str) -> Estimate:
    (value,) = compute(store, Context(Resampler()), [name])
    return value.estimate


@pytest.mark.parametrize("scale", [0.0, 2.0, 400.0])
def test_entropies_by_scipy(scale: float) -> None:
    logs = members(scale=scale)
    p = logs.exp().numpy()
    total, mean = scipy_entropy(p.mean(0), axis=1), scipy_entropy(p, axis=2).mean(0)
    assert predictive_entropy(logs).numpy() == pytest.approx(total, abs=1e-12)
    assert expected_entropy(logs).numpy() == pytest.approx(mean, abs=1e-12)
    assert mutual_information(logs)[0].numpy() == pytest.approx(total - mean, abs=1e-12)


def test_disagreement_is_the_share_of_pairs() -> None:
    logs = members(s=6, c=3)
    votes = logs.argmax(2).numpy()
    pairs = np.mean([votes[i] != votes[j] for i in range(6) for j in range(6) if i != j], axis=0)
    assert disagreement(logs).numpy() == pytest.approx(pairs, abs=1e-12)
    top = np.array([np.bincount(column).max() for column in votes.T])
    assert variation_ratio(logs).numpy() == pytest.approx(1 - top / 6, abs=1e-12)
    assert bool(torch.isnan(disagreement(logs[:1])).all())
    assert bool((variation_ratio(logs[:1]) == 0).all())


def test_equal_probabilities_vote_for_the_first_class() -> None:
    flat = torch.full((1, 2, 3), -math.log(3))
    first, last = (torch.eye(3)[[k, k]].log()[None] for k in (0, 2))
    assert disagreement(torch.cat([flat, first])).tolist() == [0, 0]
    assert disagreement(torch.cat([flat, last])).tolist() == [1, 1]


def test_members_may_arrive_in_any_order_and_one_by_one() -> None:
    logs = members()
    whole, turned = reduce_members(logs), reduce_members(member for member in logs.flip(0))
    assert list(whole) == ["predictive-entropy", "expected-entropy", "mutual-information", "disagreement"]
    for name, values in whole.items():
        assert values.shape == (50,)
        assert values.dtype == torch.float64
        assert turned[name].numpy() == pytest.approx(values.numpy(), abs=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mutual_information_is_not_negative_in_low_precision(dtype: torch.dtype) -> None:
    logs = members(c=10, scale=0.02).to(dtype)
    found, clamped = mutual_information(logs)
    wide, _ = mutual_information(logs.double())
    assert torch.equal(found, wide)
    assert clamped == 0
    same, clamped = mutual_information(logs[:1].repeat(5, 1, 1))
    assert bool((same >= 0).all())
    assert bool((same < 1e-14).all())
    # equal members differ by rounding alone, and what fell below 0 was counted
    raw = predictive_entropy(logs[:1].repeat(5, 1, 1)) - expected_entropy(logs[:1].repeat(5, 1, 1))
    assert clamped == int((raw < 0).sum())


def test_certain_members_and_broken_rows() -> None:
    certain = torch.eye(3).log()[None].repeat(4, 1, 1)
    for values in reduce_members(certain).values():
        assert values.tolist() == [0, 0, 0]
    broken = members()
    broken[2, 5] = math.nan
    for values in (*reduce_members(broken).values(), variation_ratio(broken)):
        assert torch.isnan(values).nonzero()[:, 0].tolist() == [5]


def test_ambiguity_of_the_brier_score() -> None:
    p = members().exp()
    truth = functional.one_hot(torch.arange(50) % 4, 4)
    mean = p.mean(0)
    brier, spread = ((p - truth) ** 2).sum(2).mean(0), ((p - mean) ** 2).sum(2).mean(0)
    assert ((mean - truth) ** 2).sum(1).numpy() == pytest.approx((brier - spread).numpy(), abs=1e-12)
    # the entropies obey the same inequality: the mean is at least as uncertain as its members
    assert bool((predictive_entropy(p.log()) >= expected_entropy(p.log())).all())


def test_bad_members_are_refused() -> None:
    with pytest.raises(ShapeError, match="at least one member"):
        reduce_members([])
    with pytest.raises(ShapeError, match=r"\(3, 2\) after \(4, 2\)"):
        reduce_members([torch.zeros(4, 2), torch.zeros(3, 2)])
    with pytest.raises(ShapeError, match="log-probabilities"):
        reduce_members(torch.zeros(4, 2))


def test_entropy_of_a_store(make_store) -> None:
    store = make_store(classes=4)
    assert entropy(store).numpy() == pytest.approx(scipy_entropy(store.probs.numpy(), axis=1), abs=1e-12)
    labels = make_store(classes=3, task="multilabel")
    both = torch.stack([labels.probs, 1 - labels.probs])
    assert entropy(labels).numpy() == pytest.approx(scipy_entropy(both.numpy(), axis=0).mean(1), abs=1e-12)
    sure = dataclasses.replace(store, logits=1e4 * store.logits)
    assert float(entropy(sure).max()) < 1e-3
    assert not bool(torch.isnan(entropy(sure)).any())


def test_means_of_a_store(make_store) -> None:
    store = make_store(classes=4)
    found = one(store, "mean-entropy")
    values = entropy(store)
    error = float(values.std() / math.sqrt(200))
    assert found.value == pytest.approx(float(values.mean()), abs=1e-12)
    assert math.log(found.high / found.low) == pytest.approx(2 * 1.972 * error / found.value, rel=0.05)
    for name in NAMES[1:]:
        assert math.isnan(one(store, name).value)
        assert one(store, name).reason == "no_members"
    scores = reduce_members(members(n=200))
    scores["disagreement"][3] = math.nan
    held = dataclasses.replace(store, scores=scores)
    information, apart = (one(held, name) for name in NAMES[1:])
    assert information.value == pytest.approx(float(scores["mutual-information"].mean()), abs=1e-12)
    assert apart.value == pytest.approx(float(scores["disagreement"].nanmean()), abs=1e-12)
    assert (information.n, apart.n) == (200, 199)
    assert information.low < information.value < information.high
    assert 0 < apart.low < apart.value < apart.high < 1


def test_rows_that_are_not_finite_have_no_entropy(make_store) -> None:
    store = make_store(classes=3)
    logits = store.logits.clone()
    logits[:20, 1] = math.nan
    broken = dataclasses.replace(store, logits=logits)
    assert one(broken, "mean-entropy").n == 180
    assert one(broken, "mean-entropy").value == pytest.approx(float(entropy(store)[20:].mean()), abs=1e-12)
    assert one(broken.select(torch.arange(20)), "mean-entropy").reason == "no_samples"
