"""Thresholds of scores chosen on validation data, and what they detect."""

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from robustlab.metrics import Context, PredictionStore, Resampler, compute, fit_flags, fit_frozen
from robustlab.metrics.base import Frozen


def store(scores, labels=True, wrong=None, clusters=None):
    scores = torch.as_tensor(scores, dtype=torch.float64)
    count = len(scores)
    answers = torch.zeros(count, dtype=torch.int64) if wrong is None else torch.as_tensor(wrong).long()
    logits = torch.nn.functional.one_hot(answers, 2).float()
    given = torch.zeros(count, dtype=torch.int64) if labels else None
    return PredictionStore(torch.arange(count), logits, given, "multiclass", scores={"s": scores}, clusters=clusters)


def context(flags=None, reference=None):
    return Context(resampler=Resampler(seed=0, replicates=100), frozen=Frozen(flags=flags or {}), reference=reference)


@pytest.mark.parametrize("count", [20, 39, 40, 100, 1000])
def test_at_most_one_in_twenty_of_val_is_flagged(count):
    scores = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    line = fit_flags(store(scores))["s"]
    assert int((scores >= line).sum()) == count // 20


def test_equal_scores_are_flagged_together_or_not_at_all():
    scores = [0.0] * 90 + [1.0] * 4 + [2.0] * 6
    assert fit_flags(store(scores))["s"] == math.inf
    assert fit_flags(store([0.0] * 96 + [1.0] * 4))["s"] == 1.0
    assert fit_flags(store([0.0] * 95 + [1.0] * 5))["s"] == 1.0
    assert fit_flags(store([3.0] * 50))["s"] == math.inf
    assert fit_flags(store(list(range(19))))["s"] == math.inf
    assert fit_flags(store([math.nan] * 4)) == {}


def test_shares_by_hand():
    reference = store([0.0] * 10)
    found = compute(store([0.0, 1.0, 2.0, 3.0, math.nan], labels=False), context({"s": 2.0}, reference), ["detected"])
    assert found[0].estimate.value == 0.5
    assert found[0].estimate.n == 4
    assert found[0].estimate.low < 0.5 < found[0].estimate.high
    found = compute(store([0.0, 1.0, 2.0, 3.0]), context({"s": 3.0}), ["false-alarms"])
    assert found[0].estimate.value == 0.25
    clustered = store([0.0, 0.0, 5.0, 5.0], clusters=torch.tensor([0, 0, 1, 1]))
    assert compute(clustered, context({"s": 3.0}), ["false-alarms"])[0].estimate.n_units == 2


def test_without_val_there_is_no_threshold():
    found = compute(store([0.0, 1.0]), context(), ["false-alarms"])
    assert found[0].estimate.reason == "no_val"
    assert math.isnan(found[0].estimate.value)


def test_frozen_points_hold_the_flags():
    val = store(torch.arange(100.0))
    assert fit_frozen(val, 0.1, "s").flags == {"s": 95.0}


def test_failures_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 12, (300,), generator=generator).double()
    wrong = torch.rand(300, generator=generator) < 0.2 + 0.03 * scores
    found = compute(store(scores, wrong=wrong), context(), ["score-failure-auroc"])[0].estimate
    assert found.value == pytest.approx(roc_auc_score(wrong, scores), abs=1e-12)
    assert found.low < found.value < found.high
    assert compute(store(scores), context(), ["score-failure-auroc"])[0].estimate.reason == "no_errors"
    perfect = compute(store([0.0, 0.0, 1.0], wrong=[0, 0, 1]), context(), ["score-failure-auroc"])[0].estimate
    assert perfect.value == 1.0
    assert perfect.low < 1.0 == perfect.high
