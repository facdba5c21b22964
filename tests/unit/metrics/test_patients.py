"""From images to patients."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from robustlab.core.errors import ConfigError, LabelError, RangeError
from robustlab.metrics import Context, PredictionStore, Resampler, compute
from robustlab.metrics.patients import aggregate_patients, conflicting_patients

RULES = ("max", "mean", "mean-of-top-m", "noisy-or", "count")
PATIENTS = torch.tensor([7, 7, 7, 7, 3, 3, 9])
P = [0.2, 0.9, 0.6, 0.4, 0.3, 0.7, 0.1]


def store_of(p, patients=PATIENTS, labels=None, **kwargs):
    p = torch.as_tensor(p, dtype=torch.float64)
    odds = torch.log(p / (1 - p))
    logits = torch.stack([-odds / 2, odds / 2], 1)
    labels = (p > 0.5).long() if labels is None else torch.as_tensor(labels)
    return PredictionStore(torch.arange(len(p)), logits, labels, "binary", clusters=patients, **kwargs)


@pytest.mark.parametrize(
    ("rule", "m", "expected"),
    [
        ("max", 1, [0.7, 0.9, 0.1]),
        ("mean", 1, [0.5, 2.1 / 4, 0.1]),
        ("mean-of-top-m", 1, [0.7, 0.9, 0.1]),
        ("mean-of-top-m", 3, [0.5, 1.9 / 3, 0.1]),
        ("noisy-or", 1, [1 - 0.7 * 0.3, 1 - 0.8 * 0.1 * 0.4 * 0.6, 0.1]),
        ("count", 1, [0.7, 0.9, 0.1]),
        ("count", 2, [0.3, 0.6, 0.0]),
        ("count", 4, [0.0, 0.2, 0.0]),
    ],
)
def test_closed_forms(rule, m, expected):
    made = aggregate_patients(store_of(P), rule, m=m)
    assert made.ids.tolist() == [3, 7, 9]
    assert made.clusters is None
    assert made.probs[:, 1].tolist() == pytest.approx(expected, abs=1e-6)
    assert made.labels.tolist() == [1, 1, 0]
    labels = torch.stack([torch.tensor([0, 1, 0, 0, 0, 0, -1]), torch.full((7,), -1)], 1)
    odds = torch.log(torch.tensor(P) / (1 - torch.tensor(P)))
    several = PredictionStore(torch.arange(7), torch.stack([odds, -odds], 1), labels, "multilabel", clusters=PATIENTS)
    made = aggregate_patients(several, rule, m=m)
    assert made.probs[:, 0].tolist() == pytest.approx(expected, abs=1e-6)
    other = aggregate_patients(store_of([1 - p for p in P]), rule, m=m)
    assert made.probs[:, 1].tolist() == pytest.approx(other.probs[:, 1].tolist(), abs=1e-6)
    assert made.labels.tolist() == [[0, -1], [1, -1], [-1, -1]]


@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_count_rule_is_positive_where_enough_images_are_at_any_threshold(m):
    rng = np.random.default_rng(0)
    patients = torch.from_numpy(rng.integers(0, 40, 150))
    store = store_of(rng.random(150).round(2).clip(0.01, 0.99), patients)
    made = aggregate_patients(store, "count", m=m)
    for threshold in (0.105, 0.305, 0.5, 0.805):
        counts = torch.bincount(patients, (store.probs[:, 1] >= threshold).double(), minlength=40)
        known = counts[made.ids] >= m
        assert torch.equal(made.probs[:, 1] >= threshold, known)


@pytest.mark.parametrize("rule", RULES)
def test_saturated_probabilities_keep_their_order(rule):
    odds = torch.tensor([60.0, 50.0, 61.0, 50.0, -800.0, -801.0, -800.0, -802.0], dtype=torch.float64)
    logits = torch.stack([torch.zeros_like(odds), odds], 1)
    patients = torch.arange(8) // 2
    store = PredictionStore(torch.arange(8), logits, torch.ones(8).long(), "binary", clusters=patients)
    made = aggregate_patients(store, rule, m=1 if rule == "count" else 2)
    z = made.log_odds[:, 1].tolist()
    assert all(map(math.isfinite, z))
    assert z[1] > z[0]
    if rule in ("mean", "mean-of-top-m", "noisy-or"):
        assert z[2] > z[3]
    if rule == "noisy-or":
        assert z[0] == pytest.approx(110, abs=1e-4)
        assert z[2] == pytest.approx(np.logaddexp(-800, -801), abs=1e-3)
    if rule == "mean":
        assert z[2] == pytest.approx(np.logaddexp(-800, -801) - math.log(2), abs=1e-3)


def test_several_classes_have_the_mean_probability():
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(size=(30, 4)))
    patients = torch.arange(30) // 5
    store = PredictionStore(torch.arange(30), logits, patients % 4, "multiclass", clusters=patients)
    made = aggregate_patients(store, "mean")
    assert made.probs.numpy() == pytest.approx(store.probs.reshape(6, 5, 4).mean(1).numpy(), abs=1e-6)
    assert made.labels.tolist() == [0, 1, 2, 3, 0, 1]
    with pytest.raises(ConfigError, match="rule='mean'"):
        aggregate_patients(store, "max")
    mixed = dataclasses.replace(store, labels=torch.arange(30) % 4)
    with pytest.raises(LabelError, match="6 patients"):
        aggregate_patients(mixed, "mean")


def test_conflicts_are_told():
    assert conflicting_patients(store_of(P)).tolist() == [3, 7]
    labels = torch.tensor([[0, -1], [0, 1], [-1, 1], [0, 1], [1, 0], [1, 1], [0, 0]])
    store = PredictionStore(torch.arange(7), torch.randn(7, 2), labels, "multilabel", clusters=PATIENTS)
    assert conflicting_patients(store).tolist() == [3]
    with pytest.raises(ConfigError, match="Nothing can conflict"):
        conflicting_patients(dataclasses.replace(store, labels=None))


def test_groups_scores_and_broken_images():
    groups = {"sex": torch.tensor([1, 1, 1, 1, 0, 0, -1]), "view": torch.tensor([0, 1, 0, 0, 2, 2, 1])}
    scores = {"s": torch.tensor([1.0, math.nan, 3.0, 2.0, math.nan, math.nan, 5.0])}
    store = store_of(P, groups=groups, scores=scores, score_reasons={"t": "why"})
    logits = store.logits.clone()
    logits[4, 0] = math.inf
    made = aggregate_patients(dataclasses.replace(store, logits=logits), "max")
    assert made.finite.tolist() == [False, True, True]
    assert made.predicted.tolist() == [-1, 1, 0]
    assert {name: codes.tolist() for name, codes in made.groups.items()} == {"sex": [0, 1, -1], "view": [2, -1, 1]}
    assert made.scores["s"].tolist()[1:] == [3.0, 5.0]
    assert math.isnan(made.scores["s"][0])
    assert made.score_reasons == {"t": "why"}


@pytest.mark.parametrize("rule", RULES)
def test_order_of_images_changes_nothing_and_one_image_is_itself(rule):
    rng = np.random.default_rng(2)
    patients = torch.from_numpy(rng.integers(0, 50, 200))
    store = store_of(rng.random(200).round(1).clip(0.05, 0.95), patients)
    order = torch.from_numpy(rng.permutation(200))
    first, second = (aggregate_patients(item, rule, m=2) for item in (store, store.select(order)))
    assert torch.equal(first.ids, second.ids)
    assert first.logits.numpy() == pytest.approx(second.logits.numpy(), abs=1e-6)
    assert torch.equal(first.labels, second.labels)
    alone = aggregate_patients(dataclasses.replace(store, clusters=torch.arange(200)), rule, m=1)
    assert alone.probs.numpy() == pytest.approx(store.probs.numpy(), abs=1e-6)
    (made,) = compute(first, Context(Resampler()), ["auroc"])
    assert made.estimate.n == made.estimate.n_units == len(torch.unique(patients))


def test_refusals():
    store = store_of(P)
    with pytest.raises(ConfigError, match="cluster="):
        aggregate_patients(dataclasses.replace(store, clusters=None))
    with pytest.raises(ConfigError, match="one of max, mean"):
        aggregate_patients(store, "median")
    with pytest.raises(RangeError, match="at least 1"):
        aggregate_patients(store, "count", m=0)
    answers = dataclasses.replace(store, logits=torch.eye(2)[store.predicted], answers_only=True)
    with pytest.raises(ConfigError, match="answers alone"):
        aggregate_patients(answers)
    unlabelled = aggregate_patients(dataclasses.replace(store, labels=None), "noisy-or")
    assert unlabelled.labels is None
    assert len(unlabelled) == 3
    empty = aggregate_patients(store.select(torch.zeros(7, dtype=torch.bool)), "mean-of-top-m")
    assert len(empty) == 0
