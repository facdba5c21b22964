"""DeLong's variance against the definition, the influence values, and simulated data."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, t

from robustlab.core.errors import RangeError, ShapeError
from robustlab.metrics.stats import delong, linearise, placements, rank_probability, spread, unit_sums

KINDS = ("random", "tied", "saturated")


def data(kind, n=90, scores=2, seed=0):
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.4
    values = rng.normal(size=(scores, n)) + 0.8 * positive + rng.normal(size=n)
    if kind == "tied":
        values = values.round(0)
    if kind == "saturated":
        values = np.where(values > 1, 1.0, np.where(values < -1, 0.0, values))
    return torch.from_numpy(values), torch.from_numpy(positive)


def brute(scores, positive, clusters=None):
    """The published double sums, pair by pair: areas, covariance."""
    scores, positive = scores.numpy(), positive.numpy()
    x, y = scores[:, positive], scores[:, ~positive]
    m, n = x.shape[1], y.shape[1]
    psi = (x[:, :, None] > y[:, None, :]) + 0.5 * (x[:, :, None] == y[:, None, :])
    area, v10, v01 = psi.mean((1, 2)), psi.mean(2), psi.mean(1)
    if clusters is None:
        return area, np.cov(v10) / m + np.cov(v01) / n
    clusters = clusters.numpy()
    codes = np.unique(clusters)
    first, second, has = np.zeros((len(area), len(codes))), np.zeros((len(area), len(codes))), np.zeros((2, len(codes)))
    for i, code in enumerate(codes):
        mine, other = clusters[positive] == code, clusters[~positive] == code
        has[:, i] = mine.any(), other.any()
        first[:, i] = v10[:, mine].sum(1) - mine.sum() * area
        second[:, i] = v01[:, other].sum(1) - other.sum() * area
    i10, i01 = has.sum(1)
    s10 = i10 / ((i10 - 1) * m) * first @ first.T
    s01 = i01 / ((i01 - 1) * n) * second @ second.T
    s11 = len(codes) / (len(codes) - 1) * first @ second.T
    return area, s10 / m + s01 / n + (s11 + s11.T) / (m * n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_cluster", [0, 1, 5])
def test_equals_the_pairwise_definition(kind, per_cluster):
    scores, positive = data(kind, scores=3)
    clusters = torch.arange(90) // per_cluster * 7 + 3 if per_cluster else None
    area, covariance = brute(scores, positive, clusters)
    made = delong(scores, positive, clusters)
    assert made.area.numpy() == pytest.approx(area, abs=1e-13)
    assert made.covariance.numpy() == pytest.approx(covariance, abs=1e-15)
    c = np.array([-1, 1, 0])
    shift = made.difference(0, 1)
    assert shift.value == pytest.approx(area[1] - area[0], abs=1e-13)
    assert (shift.high + shift.low) / 2 == pytest.approx(shift.value, abs=1e-12)
    quantile = t.ppf(0.975, min(made.counts) - 1)
    if per_cluster:
        assert shift.high - shift.low == pytest.approx(2 * quantile * math.sqrt(c @ covariance @ c), rel=1e-9)
    else:  # Welch lies between the smaller side's degrees of freedom and those of both
        half = (shift.high - shift.low) / 2 / math.sqrt(c @ covariance @ c)
        assert t.ppf(0.975, sum(made.counts) - 2) <= half <= quantile


@pytest.mark.parametrize("kind", KINDS)
def test_clusters_of_one_are_independent_samples(kind):
    scores, positive = data(kind)
    apart, single = delong(scores, positive), delong(scores, positive, torch.arange(90).flip(0))
    assert torch.allclose(apart.covariance, single.covariance, rtol=0, atol=1e-16)


@pytest.mark.parametrize("kind", KINDS)
def test_influence_values_are_centred_placements(kind):
    """d area / d weight = (V - area) / P for positives and (W - area) / M for negatives."""
    scores, positive = data(kind, scores=1)
    rows, others = positive.nonzero()[:, 0], (~positive).nonzero()[:, 0]
    others = others[scores[0, others].argsort()]
    area = rank_probability(scores[0, rows], scores[0, others])
    linear = linearise(lambda w: area(w[rows], w[others]), 90)
    made = delong(scores, positive)
    v, w = placements(scores, positive)
    expected = torch.zeros(90, dtype=torch.float64)
    expected[positive] = (v[0] - made.area) / len(rows)
    expected[~positive] = (w[0] - made.area) / len(others)
    assert linear.value == pytest.approx(float(made.area), abs=1e-14)
    assert torch.allclose(linear.influence, expected, rtol=0, atol=1e-15)
    # so the two variances differ by their divisors alone
    p, m = len(rows), len(others)
    mixed = expected[positive].square().sum() * p / (p - 1) + expected[~positive].square().sum() * m / (m - 1)
    assert float(made.covariance) == pytest.approx(float(mixed), rel=1e-12)
    error, _ = spread(unit_sums(linear.influence, None, torch.ones(90, dtype=torch.bool)))
    assert error == pytest.approx(float(made.covariance) ** 0.5, rel=0.02)


def test_row_order_changes_nothing():
    scores, positive = data("tied")
    clusters = torch.arange(90) // 4
    order = torch.from_numpy(np.random.default_rng(1).permutation(90))
    first = delong(scores, positive, clusters)
    second = delong(scores[:, order], positive[order], clusters[order])
    assert torch.allclose(first.covariance, second.covariance, rtol=0, atol=1e-16)
    assert first.estimate(1).low == pytest.approx(second.estimate(1).low, abs=1e-13)


def test_known_case_and_its_logit_interval():
    """Positives 2, 4, 5 and negatives 1, 3: V = 1/2, 1, 1; W = 1, 2/3."""
    made = delong(torch.tensor([2.0, 4, 5, 1, 3]), torch.tensor([1, 1, 1, 0, 0]).bool())
    first, second = 1 / 12 / 3, 1 / 18 / 2
    assert made.area.tolist() == pytest.approx([5 / 6])
    assert made.covariance.tolist() == [pytest.approx([first + second])]
    freedom = (first + second) ** 2 / (first**2 / 2 + second**2 / 1)
    half = t.ppf(0.975, freedom) * math.sqrt(first + second) / (5 / 36)
    estimate = made.estimate()
    assert (estimate.low, estimate.high) == pytest.approx(
        [1 / (1 + math.exp(-math.log(5) + s * half)) for s in (1, -1)]
    )
    assert (estimate.n, estimate.n_units, estimate.method) == (5, 5, "delong")


@pytest.mark.parametrize(
    ("scores", "labels", "reason"),
    [
        ([1.0, 2, 3, 4], [0, 0, 1, 1], "no_variance"),
        ([4.0, 3, 2, 1], [0, 0, 1, 1], "no_variance"),
        ([1.0, 1, 1, 1], [0, 0, 1, 1], "no_variance"),
        ([1.0, 3, 2, 4], [0, 0, 0, 1], "too_few_units"),
    ],
)
def test_what_has_no_interval(scores, labels, reason):
    estimate = delong(torch.tensor(scores), torch.tensor(labels).bool()).estimate()
    assert 0 <= estimate.value <= 1
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)
    assert estimate.reason == reason


@pytest.mark.parametrize(("labels", "reason"), [([0, 0], "no_positives"), ([1, 1], "no_negatives"), ([], "no_samples")])
def test_what_has_no_area(labels, reason):
    made = delong(torch.zeros((2, len(labels))), torch.tensor(labels, dtype=torch.bool))
    for estimate in (made.estimate(), made.difference()):
        assert math.isnan(estimate.value)
        assert estimate.reason == reason


def test_identical_ranks_differ_by_nothing():
    scores, positive = data("random", scores=1)
    made = delong(torch.cat([scores, scores.exp()]), positive).difference()
    assert (made.value, made.low, made.high, made.reason) == (0, 0, 0, "")


def test_refuses_what_cannot_be_ranked():
    with pytest.raises(RangeError, match="scores that can be ranked"):
        delong(torch.tensor([1.0, math.nan]), torch.tensor([True, False]))
    with pytest.raises(ShapeError, match=r"scores \(K, 3\)"):
        delong(torch.zeros(2, 4), torch.tensor([True, False, True]))
    made = delong(torch.tensor([math.inf, 2.0, 1.0, -math.inf]), torch.tensor([True, False, True, False]))
    assert made.area.tolist() == [0.75]


def test_paired_standard_error_is_the_scatter_of_differences():
    rng = np.random.default_rng(8)
    positive = torch.arange(120) < 40
    values, errors = [], []
    for _ in range(400):
        base = rng.normal(size=120)
        scores = np.stack([base + positive.numpy(), 0.8 * base + 0.6 * rng.normal(size=120) + 0.7 * positive.numpy()])
        made = delong(torch.from_numpy(scores), positive)
        c = torch.tensor([-1.0, 1.0], dtype=torch.float64)
        values.append(made.difference().value)
        errors.append(math.sqrt(float(c @ made.covariance @ c)))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.09)  # three standard errors of a standard deviation


@pytest.mark.parametrize("mixed", [False, True])
def test_coverage_on_patients_with_many_images(mixed):
    """60 patients with 10 images: the clustered interval holds, the plain one does not."""
    rng, inside = np.random.default_rng(9), [0, 0]
    clusters = torch.arange(60).repeat_interleave(10)
    truth = norm.cdf(1.5 / math.sqrt(2))
    for _ in range(300):
        share = rng.beta(0.5, 1, 60) if mixed else (np.arange(60) < 20).astype(float)
        positive = rng.random(600) < share.repeat(10)
        own = (1.2 * rng.normal(size=60).repeat(10) + rng.normal(size=600)) / math.hypot(1, 1.2)
        scores, y = torch.from_numpy(own + 1.5 * positive), torch.from_numpy(positive)
        for kind, codes in enumerate((clusters, None)):
            estimate = delong(scores, y, codes).estimate()
            inside[kind] += estimate.low <= truth <= estimate.high
    assert 0.91 <= inside[0] / 300 <= 0.985
    assert inside[1] / 300 < 0.85
