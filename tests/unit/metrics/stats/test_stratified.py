"""The stratified bootstrap, and influence values under stratified sampling."""

import numpy as np
import pytest
import torch

from robustlab.metrics import PredictionStore, Resampler
from robustlab.metrics.stats import bootstrap, linearise, macro, ratio, replicate, spread, stack, stratified, unit_sums


def store_of(n, clusters=None):
    return PredictionStore(torch.arange(n), torch.zeros(n, 2), None, "multiclass", clusters=clusters)


def recalls(values, strata):
    rows = [(strata == code).double()[None] for code in strata.unique()]
    return [ratio(values[None] * row, row) for row in rows]


def test_no_replicate_loses_a_class():
    """Five members of 100 are all left out in 0.67 % of plain replicates, for which the mean recall is undefined."""
    strata = (torch.arange(100) < 5).long()
    values = torch.from_numpy(np.random.default_rng(0).random(100))
    statistic = macro(recalls(values, strata))
    resampler = Resampler(replicates=2000)
    plain = replicate(store_of(100), lambda w: statistic(w)[None], resampler)[1]
    lost = int(plain.isnan().sum())
    assert 3 <= lost <= 30
    point, kept = replicate(store_of(100), lambda w: stratified(statistic, strata)(w)[None], resampler)
    assert not kept.isnan().any()
    assert float(point) == float(statistic(torch.ones((100, 1), dtype=torch.float64)))
    # what is invariant to the totals of the strata is the same in all other replicates
    assert torch.allclose(kept[~plain.isnan()], plain[~plain.isnan()], rtol=0, atol=1e-14)


def test_every_stratum_keeps_its_share():
    strata = torch.tensor([4, 4, 4, 9, 9, -1])
    weights = torch.tensor([[1.0, 0, 2, 1, 3, 0], [0, 0, 0, 0, 1, 2]], dtype=torch.float64).T
    (scaled,) = stratified(lambda w: w[None], strata)(weights)
    for code in (4, 9, -1):
        assert scaled[strata == code].sum(0).tolist() == pytest.approx([float((strata == code).sum())] * 2)
    assert scaled[:, 1].tolist() == [1, 1, 1, 0, 2, 1]


@pytest.mark.parametrize("per_cluster", [1, 4])
def test_variance_is_the_one_within_strata(per_cluster):
    """A mean of two strata far apart: stratified sampling sees the scatter within them alone."""
    rng = np.random.default_rng(1)
    n = 400
    clusters = torch.arange(n) // per_cluster if per_cluster > 1 else None
    strata = (torch.arange(n) < 120).long()
    shared = np.repeat(rng.normal(size=n // per_cluster), per_cluster)
    values = torch.from_numpy(rng.normal(size=n) + shared) + 5 * strata
    mean = ratio(values[None], torch.ones((1, n), dtype=torch.float64))
    linear = linearise(stratified(mean, strata), n)
    within = values.clone()
    for code in (0, 1):
        within[strata == code] -= values[strata == code].mean()
    assert linear.value == pytest.approx(float(values.mean()), abs=1e-13)
    assert torch.allclose(linear.influence, within / n, rtol=0, atol=1e-15)
    everyone = torch.ones(n, dtype=torch.bool)
    error, _ = spread(unit_sums(linear.influence, clusters, everyone))
    estimate = bootstrap(store_of(n, clusters), stratified(mean, strata), Resampler(replicates=2000), everyone)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    plain = bootstrap(store_of(n, clusters), mean, Resampler(replicates=500), everyone)
    assert plain.high - plain.low > 1.5 * (estimate.high - estimate.low)


def test_several_values_at_once_and_order():
    strata = torch.arange(60) % 3
    values = torch.from_numpy(np.random.default_rng(2).random(60))
    statistic = stratified(stack(recalls(values, strata)), strata)
    ids, order = torch.arange(60), torch.from_numpy(np.random.default_rng(3).permutation(60))
    first = Resampler(replicates=50).values(statistic, ids)
    assert first.shape == (3, 50)
    again = stratified(stack(recalls(values[order], strata[order])), strata[order])
    assert torch.allclose(Resampler(replicates=50).values(again, ids[order]), first, rtol=0, atol=1e-14)
