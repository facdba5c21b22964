"""Intervals of several conditions at once, and the worst one."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from robustlab.core.errors import ConfigError
from robustlab.metrics import Context, PredictionStore, Resampler, compute
from robustlab.metrics.stats import jeffreys, joint_error, picked_error, simultaneous, wilson, worst_condition

CONTEXT = Context(Resampler())


def normals(rng, conditions, units, shared):
    return torch.from_numpy(
        math.sqrt(shared) * rng.normal(size=(1, units)) + math.sqrt(1 - shared) * rng.normal(size=(conditions, units))
    )


def answers(wrong, clusters=None):
    """Stores of conditions (K, n) in which some answers are wrong."""
    count = wrong.shape[1]
    labels = torch.arange(count) % 2
    return {
        f"c{k}": PredictionStore(
            torch.arange(count), torch.eye(2)[torch.where(row, 1 - labels, labels)], labels, "binary", clusters=clusters
        )
        for k, row in enumerate(torch.as_tensor(wrong))
    }


@pytest.mark.parametrize("two_sided", [False, True])
def test_joint_error_of_equal_and_of_independent_conditions(two_sided):
    rng = np.random.default_rng(0)
    one = normals(rng, 1, 5000, 0).expand(12, -1)
    assert joint_error(one, 0.05, two_sided=two_sided) == pytest.approx(0.05, rel=0.1)
    apart = joint_error(torch.eye(40, dtype=torch.float64)[:12], 0.05, two_sided=two_sided)
    assert apart == pytest.approx(1 - 0.95 ** (1 / 12), rel=0.08)  # Sidak
    between = joint_error(normals(rng, 12, 5000, 0.8), 0.05, two_sided=two_sided)
    assert 1.5 * apart < between < 0.04


def test_joint_error_of_two_conditions_is_the_bivariate_normal_one():
    r = 0.7
    units = torch.zeros((2, 50), dtype=torch.float64)
    units[0, 0], units[1, 0], units[1, 1] = 3.0, r, math.sqrt(1 - r * r)
    each = joint_error(units, 0.05, two_sided=False)
    edge = norm.isf(each)
    from scipy.stats import multivariate_normal

    assert 1 - multivariate_normal(cov=[[1, r], [r, 1]]).cdf([edge, edge]) == pytest.approx(0.05, abs=0.004)


def test_joint_error_falls_back_to_bonferroni_and_knows_neither_order_nor_scale():
    rng = np.random.default_rng(1)
    units = normals(rng, 6, 200, 0.5)
    assert joint_error(units[:, :29], 0.05, two_sided=True) == 0.05 / 6
    first = joint_error(units, 0.05, two_sided=True)
    assert joint_error(units * torch.arange(1.0, 7)[:, None], 0.05, two_sided=True) == pytest.approx(first, abs=1e-9)
    order = torch.from_numpy(rng.permutation(200))
    assert joint_error(units[:, order], 0.05, two_sided=True) == pytest.approx(first, abs=1e-9)
    assert joint_error(units[:1], 0.05, two_sided=True) == 0.05
    units[2], units[3] = 0, math.nan  # no variance, undefined: independent of the rest
    assert 0.05 / 6 <= joint_error(units, 0.05, two_sided=True) < first


def test_picked_error_lies_between_one_condition_and_all_of_them():
    units = normals(np.random.default_rng(2), 20, 500, 0.0)
    units /= units.square().sum(1, keepdim=True).sqrt()
    every = joint_error(units, 0.025, two_sided=False)
    equal = picked_error(torch.zeros(20, dtype=torch.float64), units, 0.025)
    assert equal == pytest.approx(every, rel=1e-9)
    far = picked_error(20 * torch.arange(20.0, dtype=torch.float64), units, 0.025)
    assert far == pytest.approx(0.025, rel=0.15)
    between = picked_error(0.5 * torch.arange(20.0, dtype=torch.float64), units, 0.025)
    assert 1.5 * every < between < 0.02
    assert picked_error(torch.arange(20.0), torch.zeros_like(units), 0.025) == 0.025 / 20


@pytest.mark.parametrize(
    "truths",
    [np.zeros(12), np.linspace(0, 5, 12), np.where(np.arange(12) % 2, 0.0, 6.0), np.where(np.arange(12), 3.0, 0)],
)
@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_coverage_of_the_picked_one(truths, shared):
    """Means of 200 normal units, truths in standard errors apart; the plain interval errs where they are close."""
    rng, runs, inside, plain = np.random.default_rng(3), 150, 0, 0
    for _ in range(runs):
        noise = normals(rng, 12, 200, shared)
        values = noise.mean(1) * math.sqrt(200) + torch.from_numpy(truths)
        units = (noise - noise.mean(1, keepdim=True)) / math.sqrt(200)
        k = int(values.argmin())
        error = truths[k] - float(values[k])
        inside += -1.96 <= error <= norm.isf(picked_error(values, units, 0.025))
        plain += -1.96 <= error <= 1.96
    assert inside / runs >= 0.93 - 0.038  # less three standard errors
    if not truths.any() and not shared:
        assert plain / runs < 0.85


@pytest.mark.parametrize("per_cluster", [1, 5])
def test_coverage_of_the_worst_of_thirty(per_cluster):
    """Accuracy .85 of 60 patients, under 30 correlated conditions."""
    rng, runs, inside, plain = np.random.default_rng(4), 40, 0, 0
    clusters = torch.arange(60 * per_cluster) // per_cluster if per_cluster > 1 else None
    for _ in range(runs):
        patients = rng.normal(size=(30, 60)).repeat(per_cluster, 1) if per_cluster > 1 else 0
        noise = normals(rng, 30, 60 * per_cluster, 0.6).numpy()
        noise = (noise + patients) / (math.sqrt(2) if per_cluster > 1 else 1)
        stores = answers(noise > norm.ppf(0.85), clusters)
        key, estimate = worst_condition(stores, "accuracy", CONTEXT)
        alone = compute(stores[key], CONTEXT, ["accuracy"])[0].estimate
        assert estimate.value == min(float((s.predicted == s.labels).double().mean()) for s in stores.values())
        assert estimate.low == alone.low
        inside += estimate.low <= 0.85 <= estimate.high
        plain += alone.low <= 0.85 <= alone.high
    # three standard errors below .93: the corrected one stays above that, the plain one does not
    assert inside / runs >= 0.93 - 0.12 > plain / runs


def test_worst_condition_for_each_direction_and_smooth_metric(make_store):
    clean = make_store(150, signal=2.0)
    rng = np.random.default_rng(5)
    noise = torch.from_numpy(rng.normal(size=clean.logits.shape)).float()
    stores = {f"{s:g}": dataclasses.replace(clean, logits=clean.logits + s * noise) for s in (0.0, 1.0, 1.2, 6.0)}
    for metric, away in (("auroc", 1), ("brier", -1)):
        alone = {key: compute(store, CONTEXT, [metric])[0].estimate for key, store in stores.items()}
        key, estimate = worst_condition(stores, metric, CONTEXT)
        assert key == "6" == (min if away > 0 else max)(alone, key=lambda key: alone[key].value)
        kept, moved = ("low", "high") if away > 0 else ("high", "low")
        assert getattr(estimate, kept) == pytest.approx(getattr(alone[key], kept), abs=1e-12)
        gap = (getattr(estimate, moved) - getattr(alone[key], moved)) * away
        assert 0 <= gap < 0.25 * (alone[key].high - alone[key].low)  # the others are never picked
        assert "picked from 4 conditions" in estimate.method


def test_worst_condition_passes_over_what_is_undefined(make_store):
    store = make_store(100)
    one_class = dataclasses.replace(store, logits=torch.where(store.labels[:, None] == 1, torch.nan, store.logits))
    key, estimate = worst_condition({"none": one_class, "some": store}, "auroc", CONTEXT)
    assert key == "some"
    assert not math.isnan(estimate.value)
    key, estimate = worst_condition({"none": one_class}, "auroc", CONTEXT)
    assert key == "none"
    assert math.isnan(estimate.value)
    assert estimate.reason == "single_class"


def test_few_units_and_single_conditions():
    wrong = torch.zeros((4, 25), dtype=torch.bool)
    wrong[1, :6] = wrong[2, 4:10] = True
    key, estimate = worst_condition(answers(wrong), "accuracy", CONTEXT)
    assert key == "c1"
    assert estimate.method == "wilson, picked from 4 conditions, Bonferroni"
    assert estimate.low == wilson(19, 25)[0]
    assert estimate.high == pytest.approx(jeffreys(19, 25, confidence=1 - 0.05 / 4)[1], abs=1e-12)
    _, alone = worst_condition(answers(wrong[1:2]), "accuracy", CONTEXT)
    assert (alone.low, alone.high) == pytest.approx(wilson(19, 25), abs=1e-9)


def test_simultaneous_intervals_hold_together():
    rng, runs, inside, alone = np.random.default_rng(6), 60, 0, 0
    for _ in range(runs):
        stores = answers(normals(rng, 10, 200, 0.5) > norm.ppf(0.8))
        found = simultaneous(stores, "accuracy", CONTEXT)
        inside += all(item.low <= 0.8 <= item.high for item in found.values())
        ends = [compute(store, CONTEXT, ["accuracy"])[0].estimate for store in stores.values()]
        alone += all(item.low <= 0.8 <= item.high for item in ends)
        bonferroni = [jeffreys(item.value * 200, 200, confidence=1 - 0.05 / 10) for item in ends]
        assert all(
            item.high - item.low < high - low for item, (low, high) in zip(found.values(), bonferroni, strict=True)
        )
    assert inside / runs >= 0.95 - 0.085  # three standard errors
    assert alone / runs < 0.85
    assert next(iter(found.values())).method == "jeffreys, joint over 10 conditions"


def test_refuses_what_makes_no_sense(make_store):
    store = make_store(50)
    with pytest.raises(ConfigError, match="at least one condition"):
        worst_condition({}, "accuracy", CONTEXT)
    with pytest.raises(ConfigError, match="a metric with a direction"):
        worst_condition({"a": store}, "referred-share", CONTEXT)
    with pytest.raises(ConfigError, match="predictions of the same samples"):
        simultaneous({"a": store, "b": store.select(torch.arange(49))}, "accuracy", CONTEXT)
