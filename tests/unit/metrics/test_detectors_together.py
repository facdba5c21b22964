"""Means over foreign sets and differences of scores, against DeLong and simulation."""

import math

import pytest
import torch

from robustlab.metrics.detectors import area_difference, areas_of, mean_area
from robustlab.metrics.stats import delong
from robustlab.metrics.store import PredictionStore


def store(scores, clusters=None):
    count = len(next(iter(scores.values())))
    return PredictionStore(
        torch.arange(count), torch.zeros(count, 2), None, "multiclass", scores=scores, clusters=clusters
    )


def normal(count, seed, mean=0.0):
    return mean + torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(count=80, foreign=60, seed=0):
    base, other = normal(count, seed), normal(foreign, seed + 1, 1.0)
    inside = {"a": base, "b": base + 0.5 * normal(count, seed + 2)}
    outside = {"a": other, "b": other + 0.5 * normal(foreign, seed + 3)}
    return store(inside), store(outside)


def test_one_set_is_delong():
    inside, outside = pair()
    made = mean_area([areas_of(inside, outside, "a")])
    both = torch.cat((inside.scores["a"], outside.scores["a"]))
    wanted = delong(both, torch.arange(140) >= 80).estimate()
    assert made.value == pytest.approx(wanted.value, abs=1e-12)
    # variances are the same; degrees of freedom are estimated otherwise
    assert made.low == pytest.approx(wanted.low, abs=2e-3)
    assert made.high == pytest.approx(wanted.high, abs=2e-3)
    assert made.n == 140


def test_difference_is_delongs_paired_one():
    inside, outside = pair()
    made = area_difference([areas_of(inside, outside, "a")], [areas_of(inside, outside, "b")])
    both = torch.stack([torch.cat((inside.scores[name], outside.scores[name])) for name in ("a", "b")])
    wanted = delong(both, torch.arange(140) >= 80).difference(0, 1)
    assert made.value == pytest.approx(wanted.value, abs=1e-12)
    assert made.low == pytest.approx(wanted.low, abs=3e-3)
    assert made.high == pytest.approx(wanted.high, abs=3e-3)


def test_equal_ranks_differ_by_nothing():
    inside, outside = pair()
    twin = [store({**part.scores, "c": part.scores["a"] * 3 + 1}) for part in (inside, outside)]
    made = area_difference([areas_of(*twin, "a")], [areas_of(*twin, "c")])
    assert (made.value, made.low, made.high) == (0.0, 0.0, 0.0)
    assert made.method == "identical ranks"


def test_sets_share_the_images_they_are_told_from():
    """Two copies of one foreign set say no more about the in-distribution side than one."""
    inside, outside = pair()
    one = mean_area([areas_of(inside, outside, "a")])
    same = areas_of(inside, outside, "a")
    two = mean_area([same, same])
    assert two.value == pytest.approx(one.value)
    assert two.high - two.low < one.high - one.low
    apart = (one.high - one.low) / math.sqrt(2)
    assert two.high - two.low > 1.05 * apart, "independent sets of both sides would halve the whole variance"


def test_images_without_a_score_leave_out_no_others():
    inside, outside = pair()
    holes = inside.scores["b"].clone()
    holes[:10] = math.nan
    spoiled = store({"a": inside.scores["a"], "b": holes})
    part = areas_of(spoiled, outside, "b")
    assert part.area == pytest.approx(float((outside.scores["b"][:, None] > holes[10:]).double().mean()))
    assert not bool(part.inside[:10].any())
    assert len(part.inside) == 80
    assert areas_of(spoiled, outside, "nothing") == "no_samples"


def test_clusters_widen():
    base = normal(20, 0).repeat_interleave(4)
    inside = {"a": base}
    outside = store({"a": normal(60, 5, 1.0)})
    alone = mean_area([areas_of(store(inside), outside, "a")])
    grouped = mean_area([areas_of(store(inside, torch.arange(80) // 4), outside, "a")])
    assert grouped.high - grouped.low > 1.3 * (alone.high - alone.low)
    assert grouped.n_units == 20 + 60


def test_coverage_of_mean_and_difference():
    truth = 0.5 * (1 + math.erf(1 / 2))  # P(N(1, 1) > N(0, 1))
    noisy = 0.5 * (1 + math.erf(1 / math.sqrt(4 * 1.25)))
    hits = [0, 0]
    for seed in range(300):
        inside, first = pair(seed=10 * seed)
        _, second = pair(seed=10 * seed + 5)
        a, b = ([areas_of(inside, part, name) for part in (first, second)] for name in ("a", "b"))
        mean, difference = mean_area(a), area_difference(a, b)
        hits[0] += mean.low <= truth <= mean.high
        hits[1] += difference.low <= noisy - truth <= difference.high
    for hit in hits:
        assert 0.95 * 300 - 3 * math.sqrt(300 * 0.95 * 0.05) <= hit
