"""One comparison: better, worse, or no decision at this n, and what would decide."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from robustlab.metrics import Context, Estimate, PredictionStore, Resampler
from robustlab.metrics.stats import compare_metric, detectable_difference, paired_difference, units_to_decide

CONTEXT = Context(Resampler(replicates=200))


def models(rng, n, first, second, shared=0.5):
    """Two models' stores with true accuracies ``first`` and ``second``."""
    labels = torch.arange(n) % 2
    noise = rng.normal(size=(2, n))
    noise[1] = shared * noise[0] + math.sqrt(1 - shared**2) * noise[1]
    return [
        PredictionStore(
            torch.arange(n),
            torch.eye(2)[torch.where(torch.from_numpy(row > norm.ppf(share)), 1 - labels, labels)],
            labels,
            "binary",
        )
        for row, share in zip(noise, (first, second), strict=True)
    ]


def test_numbers_follow_from_the_interval():
    difference = Estimate(0.02, 0.02 - 0.049, 0.02 + 0.049, 400, 100, "")
    error = 0.049 / norm.ppf(0.975)
    assert detectable_difference(difference) == pytest.approx((1.959964 + 0.841621) * error, rel=1e-6)
    assert units_to_decide(difference) == math.ceil(100 * ((1.959964 + 0.841621) * error / 0.02) ** 2)
    assert units_to_decide(dataclasses.replace(difference, value=0.0)) == math.inf
    assert math.isnan(units_to_decide(Estimate(0.1, math.nan, math.nan, 400, 100, "")))
    assert units_to_decide(difference, power=0.9) > units_to_decide(difference)


def test_so_many_units_decide_four_times_in_five():
    """Twice as many units as are asked for nearly always decide, a quarter as many seldom."""
    rng = np.random.default_rng(0)
    pilot = compare_metric(*models(rng, 20_000, 0.8, 0.85), "accuracy", CONTEXT)
    assert pilot.decision == "better"
    needed = round(pilot.units_to_decide)
    found = []
    for count in (needed // 4, needed, needed * 2):
        made = [compare_metric(*models(rng, count, 0.8, 0.85), "accuracy", CONTEXT) for _ in range(100)]
        found.append(np.mean([item.decision == "better" for item in made]))
    assert found[1] == pytest.approx(0.8, abs=0.15)  # the pilot's own error, and three standard errors
    assert found[0] < 0.45
    assert found[2] > 0.93


def test_words():
    rng = np.random.default_rng(1)
    same = models(rng, 200, 0.8, 0.8)
    made = compare_metric(*same, "accuracy", CONTEXT)
    assert made.decision == "no decision"
    assert made.difference == paired_difference(*same, "accuracy", CONTEXT)
    assert str(made).startswith("no decision at n = 200; about ")
    better = compare_metric(*models(rng, 2000, 0.7, 0.9), "accuracy", CONTEXT)
    assert str(better) == "better (n = 2,000)"
    assert better.units_to_decide < 200
    assert 0 < better.detectable < 0.05


@pytest.mark.parametrize("per_cluster", [0, 4])
def test_no_difference_and_no_interval(make_store, per_cluster):
    store = make_store(per_cluster=per_cluster)
    twin = compare_metric(store, store, "auroc", CONTEXT)
    assert (twin.decision, twin.units_to_decide, twin.detectable) == ("no decision", math.inf, 0.0)
    assert twin.reason == "no_difference"
    assert str(twin) == f"no decision at n = {50 if per_cluster else 200} (no difference)"
    undefined = compare_metric(store, store, "silent-failure-rate", CONTEXT)
    assert math.isnan(undefined.units_to_decide)
    assert math.isnan(undefined.detectable)
    assert undefined.decision == "no decision"
    assert undefined.reason == "undefined_on_one_side"


def test_lower_is_better_where_the_metric_says_so(make_store):
    a = make_store(400, signal=3.0)
    noise = torch.from_numpy(np.random.default_rng(2).normal(size=a.logits.shape)).float()
    b = dataclasses.replace(a, logits=a.logits + 3 * noise)
    assert compare_metric(a, b, "brier", CONTEXT).decision == "worse"
    assert compare_metric(b, a, "brier", CONTEXT).decision == "better"
