"""Intervals and tests against statsmodels, scipy and scikit-learn."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, permutation_test

from robustlab.metrics.stats import (
    clopper_pearson,
    delong,
    holm,
    jeffreys,
    joint_error,
    mcnemar,
    placements,
    sign_flip_test,
    wilson,
)

sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is a development dependency")
multitest = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is a development dependency")
tables = pytest.importorskip("statsmodels.stats.contingency_tables")
proportions = pytest.importorskip("statsmodels.stats.proportion")


@pytest.mark.parametrize(("gains", "losses"), [(9, 21), (0, 4), (5, 5), (1, 0), (300, 251), (0, 0)])
def test_mcnemar(gains, losses):
    theirs = tables.mcnemar([[50, gains], [losses, 40]], exact=True).pvalue if gains + losses else 1.0
    assert mcnemar(gains, losses, kind="exact") == pytest.approx(theirs, abs=1e-14)
    if gains + losses:
        assert mcnemar(gains, losses, kind="exact") == pytest.approx(binomtest(gains, gains + losses).pvalue, abs=1e-13)


@pytest.mark.parametrize("seed", range(4))
def test_holm(seed):
    p = np.random.default_rng(seed).random(12) ** 3
    p[3:5] = p[3]
    assert holm(p.tolist()) == pytest.approx(multitest.multipletests(p, method="holm")[1], abs=1e-15)


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (7, 7), (20, 20), (3, 50), (812, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_proportions(hits, n, confidence):
    for ours, name in ((wilson, "wilson"), (clopper_pearson, "beta")):
        theirs = proportions.proportion_confint(hits, n, alpha=1 - confidence, method=name)
        assert ours(hits, n, confidence=confidence) == pytest.approx(theirs, abs=1e-12)
    if 0 < hits < n:
        theirs = proportions.proportion_confint(hits, n, alpha=1 - confidence, method="jeffreys")
        assert jeffreys(hits, n, confidence=confidence) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_areas(decimals):
    rng = np.random.default_rng(5)
    positive = rng.random(500) < 0.3
    scores = (rng.normal(size=(3, 500)) + positive).round(decimals)
    made = delong(torch.from_numpy(scores), torch.from_numpy(positive))
    theirs = [sk.roc_auc_score(positive, row) for row in scores]
    assert made.area.tolist() == pytest.approx(theirs, abs=1e-13)
    for side in placements(torch.from_numpy(scores), torch.from_numpy(positive)):
        assert side.mean(1).tolist() == pytest.approx(theirs, abs=1e-13)


def test_sign_flips():
    gains = np.random.default_rng(6).normal(0.25, 1, 12)
    theirs = permutation_test((gains,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    ours = sign_flip_test(torch.from_numpy(gains), torch.arange(12), draws=40_000).p[0]
    assert ours == pytest.approx(theirs, abs=0.01)


def test_joint_error_is_dunnetts():
    """Correlation 1/2, as of differences to a common control with large groups: the two-sided 5 % point."""
    rng = np.random.default_rng(7)
    count = 8
    root = np.linalg.cholesky(0.5 * np.eye(count) + 0.5)
    from scipy.stats import multivariate_normal, norm

    units = torch.zeros((count, 40), dtype=torch.float64)
    units[:, :count] = torch.from_numpy(root)
    edge = norm.isf(joint_error(units, 0.05, two_sided=True) / 2)
    inside = multivariate_normal(cov=root @ root.T, seed=rng).cdf(
        np.full(count, edge), lower_limit=-np.full(count, edge)
    )
    assert 1 - inside == pytest.approx(0.05, abs=0.004)
