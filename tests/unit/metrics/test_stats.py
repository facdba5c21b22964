import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm, poisson

from robustlab.core.errors import ConfigError, LabelError, RangeError
from robustlab.metrics import (
    Context,
    Estimate,
    PredictionStore,
    Resampler,
    compute,
    condition_verdict,
    decide,
    fit_frozen,
    paired_difference,
    wilson,
)
from robustlab.metrics.resample import WeightCache, _poisson_steps
from robustlab.metrics.stats import (
    Proportion,
    bootstrap,
    effective_count,
    interval,
    jeffreys,
    proportion,
    ratio,
    worst_of,
)


def weights_of(resampler: Resampler, units: torch.Tensor) -> torch.Tensor:
    return torch.cat([block for (block,) in resampler.chunks(units)], 1)


def mean_estimate(values: torch.Tensor, resampler: Resampler, clusters: torch.Tensor | None = None) -> Estimate:
    n = len(values)
    store = PredictionStore(torch.arange(n), torch.zeros(n, 2), None, "multiclass", clusters=clusters)
    statistic = ratio(values.double()[None], torch.ones((1, n), dtype=torch.float64))
    return bootstrap(store, statistic, resampler, torch.ones(n, dtype=torch.bool))


def test_wilson_known_value_and_ends() -> None:
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert wilson(20, 20)[1] == 1.0
    assert wilson(0, 7)[0] == 0.0
    assert all(math.isnan(end) for end in wilson(0, 0))


def test_wilson_bonferroni_is_the_interval_at_the_divided_error() -> None:
    assert wilson(30, 50, alpha_divisor=10) == pytest.approx(wilson(30, 50, confidence=0.995))


def test_weights_are_poisson() -> None:
    weights = weights_of(Resampler(replicates=500), torch.arange(2000) * 31)
    share = torch.bincount(weights.flatten().long(), minlength=8)[:8].double() / weights.numel()
    assert share.numpy() == pytest.approx(poisson(1).pmf(np.arange(8)), abs=1.5e-3)
    # rows and columns must not hang together
    assert abs(float(torch.corrcoef(weights[:40]).triu(1).sum()) / 780) < 0.01
    assert abs(float(torch.corrcoef(weights[:, :40].T).triu(1).sum()) / 780) < 0.01


def test_weights_depend_on_the_unit_alone() -> None:
    ids = torch.arange(300) * 17
    resampler = Resampler(seed=3, replicates=130)
    whole = weights_of(resampler, ids)
    order = torch.from_numpy(np.random.default_rng(0).permutation(300))
    assert torch.equal(weights_of(Resampler(seed=3, replicates=130), ids[order]), whole[order])
    assert torch.equal(weights_of(resampler, ids[50:60]), whole[50:60])
    assert not torch.equal(weights_of(Resampler(seed=4, replicates=130), ids), whole)


def test_fewer_replicates_are_the_first_ones() -> None:
    ids = torch.arange(40)
    few = weights_of(Resampler(replicates=70), ids)
    assert torch.equal(few, weights_of(Resampler(replicates=1000), ids)[:, :70])


def test_chunks_without_cache_give_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(500)
    whole = weights_of(Resampler(replicates=120), ids)
    monkeypatch.setattr("robustlab.metrics.resample._CACHE_BYTES", 10)
    monkeypatch.setattr("robustlab.metrics.resample._CHUNK", 3500)
    monkeypatch.setattr("robustlab.metrics.resample._ROWS", 64)
    assert torch.equal(weights_of(Resampler(replicates=120), ids), whole)
    monkeypatch.setattr("robustlab.metrics.resample._WHOLE", 10)
    assert torch.equal(weights_of(Resampler(replicates=120), ids), whole)


def test_a_count_fits_into_four_bits() -> None:
    """Poisson(1) exceeds 15 with a probability below 2^-44, the smallest one drawn is 2^-32."""
    assert len(_poisson_steps()) == 12
    assert int(weights_of(Resampler(replicates=1000), torch.arange(3000)).max()) in range(7, 13)


def test_cache_keeps_to_its_bytes_and_drops_what_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bytes hold four replicates, so 100 units x 100 replicates take 5,000 bytes."""
    resampler, first, second = Resampler(replicates=100), torch.arange(100), torch.arange(100) + 500
    expected = [weights_of(Resampler(replicates=100), units) for units in (first, second)]
    monkeypatch.setattr("robustlab.metrics.resample._CACHE_BYTES", 6000)
    cache = resampler._cache
    for units, weights in ((first, expected[0]), (second, expected[1]), (first, expected[0])):
        assert torch.equal(weights_of(resampler, units), weights)
        held = {key: set(blocks) for key, blocks in cache._items.items()}
        assert held[WeightCache.key("side 0", units)] == {0, 50}  # the older ones made room
        assert cache._bytes == sum(b.numel() for blocks in cache._items.values() for b in blocks.values()) <= 6000
    list(resampler.chunks(first, second))  # 10,000 bytes in use: what fits stays, nothing in use is pushed out
    held = {key: set(blocks) for key, blocks in cache._items.items()}
    assert held == {WeightCache.key("side 0", first): {0, 50}}


def test_two_sides_with_equal_codes_have_different_weights() -> None:
    ids = torch.arange(50)
    ((first, second),) = list(Resampler(replicates=20).chunks(ids, ids))
    assert not torch.equal(first, second)


def test_cache_sees_a_change_in_place_and_is_not_pickled() -> None:
    resampler = Resampler(replicates=60)
    ids = torch.arange(1000)
    before = weights_of(resampler, ids)
    ids += 1
    assert torch.equal(weights_of(resampler, ids)[:-1], before[1:])
    assert len(pickle.dumps(resampler)) < 1000
    assert pickle.loads(pickle.dumps(resampler)) == resampler


def test_resampler_refuses_bad_numbers() -> None:
    with pytest.raises(RangeError, match="at least 1 replicate"):
        Resampler(replicates=0)
    with pytest.raises(RangeError, match="confidence between 0 and 1"):
        Resampler(confidence=95)


def test_bootstrap_interval_of_a_mean_matches_the_normal_one() -> None:
    values = torch.from_numpy(np.random.default_rng(1).normal(3, 2, 800))
    estimate = mean_estimate(values, Resampler(replicates=4000))
    half = norm.ppf(0.975) * float(values.std(correction=0)) / math.sqrt(800)
    assert estimate.value == pytest.approx(float(values.mean()))
    assert estimate.high - estimate.low == pytest.approx(2 * half, rel=0.05)
    assert (estimate.high + estimate.low) / 2 == pytest.approx(estimate.value, abs=0.1 * half)


def test_percentile_and_reflected_intervals() -> None:
    values = torch.linspace(0.10, 0.20, 1001, dtype=torch.float64)
    assert interval(values, 0.1)[:2] == pytest.approx((0.1025, 0.1975))
    low, high, reason = interval(values, 0.12, "reflected", bounds=(0.05, 1))
    assert (low, high, reason) == (0.05, pytest.approx(0.24 - 0.1025), "")


def test_interval_is_undefined_when_replicates_lose_a_class() -> None:
    values = torch.ones(1000, dtype=torch.float64)
    values[:50] = math.nan
    assert interval(values, 1.0) == (1.0, 1.0, "")
    values[50] = math.nan
    low, high, reason = interval(values, 1.0)
    assert math.isnan(low)
    assert math.isnan(high)
    assert reason == "too_few_units"


def test_clustered_interval_is_wider_on_correlated_data() -> None:
    patients = torch.from_numpy(np.random.default_rng(2).normal(size=40))
    values = patients.repeat_interleave(10)
    plain = mean_estimate(values, Resampler())
    clustered = mean_estimate(values, Resampler(), clusters=torch.arange(40).repeat_interleave(10))
    assert clustered.n_units == 40
    assert (clustered.high - clustered.low) / (plain.high - plain.low) == pytest.approx(math.sqrt(10), rel=0.2)


def test_effective_count_of_copied_images_is_the_number_of_patients() -> None:
    hits = (torch.arange(60) % 3 > 0).repeat_interleave(5)
    effective, units = effective_count(hits, torch.arange(60).repeat_interleave(5))
    assert units == 60
    assert effective == pytest.approx(59)  # the factor G / (G - 1)
    assert effective_count(hits, None) == (300.0, 300)


def test_effective_count_never_exceeds_n_and_falls_back_to_units() -> None:
    alternating = torch.tensor([0, 1] * 50)
    assert effective_count(alternating, torch.arange(50).repeat_interleave(2))[0] == 100
    assert effective_count(torch.ones(100), torch.arange(50).repeat_interleave(2)) == (50.0, 50)
    assert effective_count(alternating, torch.zeros(100, dtype=torch.int64)) == (1.0, 1)


def test_few_clusters_use_the_t_quantile() -> None:
    hits = (torch.arange(10) % 2 > 0).repeat_interleave(4)
    effective, _ = effective_count(hits, torch.arange(10).repeat_interleave(4))
    assert effective == pytest.approx(9 * (1.959964 / 2.262157) ** 2, rel=1e-6)


def test_clustered_proportion_at_one_has_width() -> None:
    estimate = proportion(torch.ones(100, dtype=torch.bool), torch.arange(20).repeat_interleave(5))
    assert (estimate.low, estimate.high) == wilson(20, 20)
    assert (estimate.n, estimate.n_units) == (100, 20)


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


def test_coverage_under_clustering() -> None:
    # 40 patients x 10 images, between-patient sd 1.2 logits
    rng = np.random.default_rng(5)
    fine = rng.normal(0, 1.2, 400_000)
    truth = float((1 / (1 + np.exp(-(0.5 + fine)))).mean())
    clusters = torch.arange(40).repeat_interleave(10)
    right = plain = 0
    for _ in range(400):
        p = 1 / (1 + np.exp(-(0.5 + rng.normal(0, 1.2, 40))))
        hits = torch.from_numpy(rng.random((40, 10)) < p[:, None]).flatten()
        right += covers(proportion(hits, clusters), truth)
        plain += covers(proportion(hits, None), truth)
    assert 0.91 <= right / 400 <= 0.99
    assert plain / 400 < 0.88


def test_bootstrap_coverage_of_a_clustered_mean() -> None:
    rng = np.random.default_rng(6)
    clusters = torch.arange(50).repeat_interleave(4)
    resampler = Resampler(replicates=300)
    right = 0
    for _ in range(300):
        values = rng.normal(size=(50, 1)) + rng.normal(size=(50, 4))
        right += covers(mean_estimate(torch.from_numpy(values).flatten(), resampler, clusters), 0.0)
    assert 0.89 <= right / 300 <= 0.98


def test_worst_of_covers_the_picked_condition() -> None:
    rng = np.random.default_rng(7)
    conditions, n, share = 20, 200, 0.85
    corrected = plain = 0
    for _ in range(400):
        hits = rng.binomial(n, share, conditions)
        _, estimate = worst_of([Proportion(str(i), k, n) for i, k in enumerate(hits)], direction="higher")
        corrected += covers(estimate, share)
        low, high = wilson(hits.min(), n)
        plain += low <= share <= high
    assert corrected / 400 >= 0.93
    assert plain / 400 < 0.75


def test_worst_of_picks_by_direction_and_names_the_correction() -> None:
    items = [Proportion("a", 5, 10), Proportion("b", 9, 10), Proportion("c", math.nan, 0)]
    assert worst_of(items, direction="higher")[0] == "a"
    key, estimate = worst_of(items, direction="lower")
    assert key == "b"
    assert estimate.method == "jeffreys, Bonferroni over 3 conditions"
    assert (estimate.low, estimate.high) == jeffreys(9, 10, confidence=1 - 0.05 / 3)
    alone = worst_of(items[:1], direction="higher")[1]
    assert (alone.low, alone.high) == pytest.approx(wilson(5, 10), abs=1e-15)


@pytest.mark.parametrize("share", [0.8, 0.85, 0.95])
def test_worst_of_many_equal_conditions_errs_as_often_as_it_says(share: float) -> None:
    """Exact, from the binomial; the Wilson interval at alpha / 30 would err up to 8 % of the time at its upper end."""
    n, count = 60, 30
    items = [Proportion(str(i), n, n) for i in range(count - 1)]
    ends = [worst_of([Proportion("worst", k, n), *items], direction="higher")[1].high for k in range(n + 1)]
    missed = sum(float(binom.pmf(k, n, share)) for k, high in enumerate(ends) if high < share)
    assert 0.01 < 1 - (1 - missed) ** count < 0.035
    wilson_missed = sum(
        float(binom.pmf(k, n, share)) for k in range(n + 1) if wilson(k, n, alpha_divisor=count)[1] < share
    )
    assert 1 - (1 - wilson_missed) ** count > 0.05
    with pytest.raises(ConfigError, match="at least one condition"):
        worst_of([], direction="higher")


METRICS_WITH_ONE_VALUE = (
    "accuracy", "balanced-accuracy", "sensitivity", "specificity", "auroc", "nll", "brier", "ece", "ece-null",
    "silent-failure-rate", "referred-share",
)  # fmt: skip


@pytest.mark.parametrize("metric", METRICS_WITH_ONE_VALUE)
@pytest.mark.parametrize("per_cluster", [0, 4])
def test_paired_difference_of_identical_predictions_is_zero(make_store, metric: str, per_cluster: int) -> None:
    store = make_store(per_cluster=per_cluster)
    context = Context(Resampler(replicates=200), fit_frozen(make_store(seed=1), 0.1, "noise"))
    twin = store.select(torch.from_numpy(np.random.default_rng(0).permutation(len(store))))
    estimate = paired_difference(store, twin, metric, context)
    assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)
    assert estimate.n == 200
    assert estimate.n_units == (50 if per_cluster else 200)


@pytest.mark.parametrize("metric", METRICS_WITH_ONE_VALUE)
def test_paired_difference_is_the_difference_of_the_values(make_store, metric: str) -> None:
    a = make_store()
    rng = np.random.default_rng(3)
    b = dataclasses.replace(a, logits=a.logits + torch.from_numpy(rng.normal(size=a.logits.shape)).float())
    context = Context(Resampler(replicates=200), fit_frozen(make_store(seed=1), 0.1, "noise"))
    first, second = (compute(store, context, [metric])[0].estimate.value for store in (a, b))
    estimate = paired_difference(a, b, metric, context)
    assert estimate.value == pytest.approx(second - first, abs=1e-12)
    back = paired_difference(b, a, metric, context)
    assert (back.value, back.low, back.high) == pytest.approx(
        (-estimate.value, -estimate.high, -estimate.low), abs=1e-12
    )


def test_pairing_narrows_the_interval(make_store) -> None:
    a = make_store(400)
    logits = a.logits.clone()
    logits[:8] = logits[:8].flip(1)
    b = dataclasses.replace(a, logits=logits)
    context = Context(Resampler())
    estimate = paired_difference(a, b, "accuracy", context)
    alone = compute(a, context, ["accuracy"])[0].estimate
    assert estimate.high - estimate.low < 0.5 * (alone.high - alone.low)


def test_paired_difference_refuses_what_cannot_be_compared(make_store) -> None:
    store, context = make_store(), Context(Resampler(replicates=10))
    with pytest.raises(ConfigError, match="200 and 199 samples, of which 199 are common"):
        paired_difference(store, store.select(torch.arange(199)), "accuracy", context)
    with pytest.raises(ConfigError, match="a metric on labels"):
        paired_difference(store, store, "auroc-ood", context)
    with pytest.raises(LabelError, match="the same labels"):
        paired_difference(store, dataclasses.replace(store, labels=1 - store.labels), "accuracy", context)
    twice = dataclasses.replace(store, ids=torch.zeros_like(store.ids))
    with pytest.raises(ConfigError, match="unique"):
        paired_difference(twice, twice, "accuracy", context)
    several = make_store(classes=3)
    with pytest.raises(ConfigError, match="target= one of '0', '1', '2'"):
        paired_difference(several, several, "sensitivity", context)
    undefined = paired_difference(store, store, "silent-failure-rate", context)
    assert math.isnan(undefined.value)
    assert undefined.reason == "undefined_on_one_side"


@pytest.mark.parametrize(
    ("low", "high", "direction", "answer"),
    [
        (0.1, 0.2, "higher", "better"),
        (0.1, 0.2, "lower", "worse"),
        (-0.2, -0.1, "higher", "worse"),
        (-0.2, -0.1, "lower", "better"),
        (-0.1, 0.1, "higher", "no decision"),
        (0.0, 0.0, "higher", "no decision"),
        (0.0, 0.2, "higher", "no decision"),
        (0.1, 0.2, "none", "no decision"),
        (math.nan, math.nan, "higher", "no decision"),
    ],
)
def test_decide(low: float, high: float, direction: str, answer: str) -> None:
    assert decide(low, high, direction) == answer


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [
        (0.06, 0.2, "breaks"),
        (0.05, 0.2, "worse"),
        (0.01, 0.03, "worse"),
        (-0.01, 0.04, "holds"),
        (0.0, 0.0, "holds"),
        (-0.01, 0.05, "no decision"),
        (math.nan, math.nan, "no decision"),
    ],
)
def test_condition_verdict(low: float, high: float, answer: str) -> None:
    assert condition_verdict(low, high, margin=0.05) == answer
