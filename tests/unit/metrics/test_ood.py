import math

import numpy as np
import pytest
import torch

from robustlab.core.errors import ConfigError
from robustlab.core.registry import METRICS
from robustlab.metrics import Context, Estimate, PredictionStore, Resampler, compute

NAMES = ("auroc-ood", "fpr95-ood-pos", "fpr95-id-pos")


def scored(
    scores: list[float] | np.ndarray, *, clusters: torch.Tensor | None = None, reason: str = ""
) -> PredictionStore:
    values = torch.as_tensor(np.asarray(scores, dtype=np.float64))
    n = len(values)
    return PredictionStore(
        torch.arange(n), torch.zeros(n, 2), None, "multiclass", scores={"s": values},
        score_reasons={"s": reason} if reason else {}, clusters=clusters,
    )  # fmt: skip


def run(inside: PredictionStore, outside: PredictionStore, replicates: int = 200) -> dict[str, Estimate]:
    values = compute(outside, Context(Resampler(replicates=replicates), reference=inside))
    assert all(value.scorer == "s" for value in values)
    return {value.metric: value.estimate for value in values}


def by_hand(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float, float]:
    auroc = np.mean((outside[:, None] > inside) + 0.5 * (outside[:, None] == inside))
    caught = [t for t in outside if (outside >= t).sum() * 20 >= 19 * len(outside)]
    accepted = [t for t in inside if (inside <= t).sum() * 20 >= 19 * len(inside)]
    return float(auroc), float((inside >= max(caught)).mean()), float((outside <= min(accepted)).mean())


@pytest.mark.parametrize(("n", "m", "decimals"), [(50, 40, 6), (200, 20, 1), (1, 3, 1), (40, 100, 0), (37, 19, 1)])
def test_values_by_hand(n: int, m: int, decimals: int) -> None:
    rng = np.random.default_rng(n)
    inside, outside = rng.normal(size=n).round(decimals), rng.normal(0.7, 1.5, m).round(decimals)
    made = run(scored(inside), scored(outside))
    assert tuple(made[name].value for name in NAMES) == pytest.approx(by_hand(inside, outside), abs=1e-12)
    assert all(made[name].n == n + m for name in NAMES)


def test_golden_cases() -> None:
    low, high = np.arange(20.0), np.arange(20.0) + 30
    apart = run(scored(low), scored(high))
    assert [apart[name].value for name in NAMES] == [1, 0, 0]
    flat = run(scored(np.zeros(20)), scored(np.zeros(30)))
    assert [flat[name].value for name in NAMES] == [0.5, 1, 1]
    mixed = run(scored(low), scored(low + 0.5))["auroc-ood"].value
    assert run(scored(-low), scored(-low - 0.5))["auroc-ood"].value == pytest.approx(1 - mixed)
    for change in (lambda s: 1e4 * s, lambda s: s - 120, np.arctan):
        moved = run(scored(change(low)), scored(change(low + 0.5)))
        assert moved["auroc-ood"].value == pytest.approx(mixed)


def test_orientation_matters() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=3000), np.where(rng.random(1000) < 0.1, rng.normal(-2, 1, 1000), 6)
    made = run(scored(inside), scored(outside))
    assert made["fpr95-ood-pos"].value > 0.8
    assert made["fpr95-id-pos"].value < 0.15


def test_edges_keep_an_interval() -> None:
    made = run(scored(np.arange(20.0)), scored(np.arange(30.0) + 30))
    assert made["auroc-ood"].low < 0.9
    assert made["fpr95-ood-pos"].high > 0.1
    assert made["fpr95-ood-pos"].high > made["fpr95-id-pos"].high


def test_auroc_interval_matches_hanley_mcneil() -> None:
    rng = np.random.default_rng(1)
    n, m = 300, 200
    made = run(scored(rng.normal(size=n)), scored(rng.normal(1, 1, m)), replicates=2000)["auroc-ood"]
    a = made.value
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = math.sqrt((a * (1 - a) + (m - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)) / (m * n))
    assert made.high - made.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_replicates_are_the_weighted_statistic_by_hand() -> None:
    rng = np.random.default_rng(4)
    inside, outside = rng.normal(size=30).round(1), rng.normal(0.5, 1, 25).round(1)
    ((a, b),) = list(Resampler(replicates=30).chunks(torch.arange(30), torch.arange(25)))
    for name, position in zip(NAMES, range(3), strict=True):
        metric = METRICS.get(name)()
        rows = [torch.argsort(torch.from_numpy(side), stable=True) for side in (inside, outside)]
        statistic = metric.statistic(torch.from_numpy(inside)[rows[0]], torch.from_numpy(outside)[rows[1]])
        values = statistic(a[rows[0]], b[rows[1]])
        for r in range(30):
            sides = [np.repeat(s, w[:, r].long().numpy()) for s, w in ((inside, a), (outside, b))]
            assert values[r].item() == pytest.approx(by_hand(*sides)[position], abs=1e-12)


def test_patients_widen_the_interval() -> None:
    rng = np.random.default_rng(2)
    inside, outside = rng.normal(size=40).repeat(10), rng.normal(1, 1, 40).repeat(10)
    clusters = torch.arange(40).repeat_interleave(10)
    plain = run(scored(inside), scored(outside))["auroc-ood"]
    grouped = run(scored(inside, clusters=clusters), scored(outside, clusters=clusters))["auroc-ood"]
    assert (grouped.n, grouped.n_units) == (800, 80)
    assert grouped.high - grouped.low > 2 * (plain.high - plain.low)


def test_undefined_scores_tell_why() -> None:
    reason = "needs logits: the offset of the logits is lost in probabilities"
    made = run(scored([math.nan] * 5, reason=reason), scored([math.nan] * 4, reason=reason))
    assert {made[name].reason for name in NAMES} == {reason}
    some = run(scored([0.0, 1.0, math.nan]), scored([2.0, math.nan, 3.0, math.inf]))
    assert (some["auroc-ood"].value, some["auroc-ood"].n) == (1, 5)
    assert run(scored([]), scored([1.0]))["auroc-ood"].reason == "no_samples"
    with pytest.raises(ConfigError, match="reference"):
        METRICS.get("auroc-ood")().compute(scored([1.0]), Context(Resampler()))
