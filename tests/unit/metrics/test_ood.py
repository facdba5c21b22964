import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from robustlab.core.errors import ConfigError
from robustlab.core.registry import METRICS
from robustlab.metrics import Context, Estimate, PredictionStore, Resampler, compute, wilson
from robustlab.metrics.ood import full_spectrum
from robustlab.metrics.separation import Pair, Side, average_precision

NAMES = ("auroc-ood", "fpr95-ood-pos", "fpr95-id-pos", "aupr-ood-pos", "aupr-id-pos", "detection-error")


def scored(
    scores: list[float] | np.ndarray, *, clusters: torch.Tensor | None = None, reason: str = ""
) -> PredictionStore:
    values = torch.as_tensor(np.asarray(scores, dtype=np.float64))
    n = len(values)
    return PredictionStore(
        torch.arange(n), torch.zeros(n, 2), None, "multiclass", scores={"s": values},
        score_reasons={"s": reason} if reason else {}, clusters=clusters,
    )  # fmt: skip


def run(inside: PredictionStore, outside: PredictionStore, names: tuple[str, ...] = NAMES) -> dict[str, Estimate]:
    values = compute(outside, Context(Resampler(), reference=inside), names)
    assert all(value.scorer == "s" for value in values)
    return {value.metric: value.estimate for value in values}


def by_hand(inside: np.ndarray, outside: np.ndarray) -> tuple[float, ...]:
    auroc = np.mean((outside[:, None] > inside) + 0.5 * (outside[:, None] == inside))
    caught = [t for t in outside if (outside >= t).sum() * 20 >= 19 * len(outside)]
    accepted = [t for t in inside if (inside <= t).sum() * 20 >= 19 * len(inside)]
    precisions = [
        np.mean([(good >= t).sum() / ((good >= t).sum() + (bad >= t).sum()) for t in good])
        for good, bad in ((outside, inside), (-inside, -outside))
    ]
    error = min(0.5, *(((outside < t).mean() + (inside >= t).mean()) / 2 for t in outside))
    rates = (inside >= max(caught)).mean(), (outside <= min(accepted)).mean()
    return (float(auroc), *map(float, rates), *map(float, precisions), float(error))


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
    assert [apart[name].value for name in NAMES] == [1, 0, 0, 1, 1, 0]
    flat = run(scored(np.zeros(20)), scored(np.zeros(30)))
    assert [flat[name].value for name in NAMES] == [0.5, 1, 1, 0.6, 0.4, 0.5]
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
    assert made["detection-error"].high > 0.04
    assert made["aupr-ood-pos"].reason == "no_variance"
    lone = run(scored([0.0, 2.0, 4.0]), scored([3.0]))
    assert {lone[name].reason for name in ("auroc-ood", "fpr95-ood-pos", "aupr-id-pos")} == {"too_few_units"}


def test_auroc_interval_matches_hanley_mcneil() -> None:
    rng = np.random.default_rng(1)
    n, m = 300, 200
    made = run(scored(rng.normal(size=n)), scored(rng.normal(1, 1, m)))["auroc-ood"]
    a = made.value
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = math.sqrt((a * (1 - a) + (m - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)) / (m * n))
    assert made.high - made.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def delong(inside: np.ndarray, outside: np.ndarray, groups: tuple[np.ndarray, np.ndarray]) -> float:
    """Obuchowski's standard error by brute force: DeLong's where every group is one sample."""
    wins = (outside[:, None] > inside) + 0.5 * (outside[:, None] == inside)
    total = 0.0
    for placements, codes in ((wins.mean(0), groups[0]), (wins.mean(1), groups[1])):
        sums = [(placements - wins.mean())[codes == code].sum() for code in np.unique(codes)]
        total += len(sums) / (len(sums) - 1) * np.sum(np.square(sums)) / len(placements) ** 2
    return math.sqrt(total)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("decimals", [6, 1])
def test_auroc_interval_is_that_of_delong_or_obuchowski(size: int, decimals: int) -> None:
    rng = np.random.default_rng(size)
    inside, outside = rng.normal(size=300).round(decimals), rng.normal(1, 1, 200).round(decimals)
    groups = np.arange(300) // size, np.arange(200) // size
    sides = [
        scored(scores, clusters=None if size == 1 else torch.from_numpy(codes))
        for scores, codes in zip((inside, outside), groups, strict=True)
    ]
    made = run(*sides)["auroc-ood"]
    odds = [math.log(p / (1 - p)) for p in (made.low, made.value, made.high)]
    error = delong(inside, outside, groups) / (made.value * (1 - made.value))
    assert odds[2] - odds[1] == pytest.approx(odds[1] - odds[0], rel=1e-9)
    quantile = (odds[2] - odds[1]) / error
    assert 1.96 < quantile < 2.03  # Student, with many degrees of freedom
    assert made.method == f"influence values over ID and OOD {'samples' if size == 1 else 'clusters'} apart"


def test_average_precision_changes_with_weights_as_by_hand() -> None:
    rng = np.random.default_rng(3)
    bad, good = rng.normal(size=40).round(1), rng.normal(0.5, 1, 25).round(1)
    weights = rng.integers(0, 4, 40), rng.integers(0, 4, 25)
    pair = Pair(*(Side(torch.from_numpy(scores), None, len(scores)) for scores in (bad, good)))
    statistic = average_precision(pair)
    value = statistic(*(torch.from_numpy(w).double()[:, None] for w in weights))
    repeated = [np.repeat(scores, w) for scores, w in zip((bad, good), weights, strict=True)]
    assert float(value[0]) == pytest.approx(by_hand(*repeated)[3], abs=1e-12)


def test_values_do_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(5)
    inside, outside = rng.normal(size=500).round(1), rng.normal(1, 1, 300).round(1)
    first = run(scored(inside), scored(outside))
    second = run(scored(rng.permutation(inside)), scored(rng.permutation(outside)))
    for name in NAMES:
        ours, theirs = ([e.value, e.low, e.high] for e in (first[name], second[name]))
        assert ours == pytest.approx(theirs, abs=1e-12)
        assert ours[1] < ours[0] < ours[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_scores_of_any_type_are_ranked_as_they_are(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(6)
    sides = [torch.from_numpy(rng.normal(loc, 3, 200)).to(dtype) for loc in (0, 3)]
    stores = [dataclasses.replace(scored(side.double().numpy()), scores={"s": side}) for side in sides]
    expected = by_hand(*(side.double().numpy() for side in sides))
    assert [run(*stores)[name].value for name in NAMES] == pytest.approx(expected, abs=1e-12)


def test_point_is_the_value() -> None:
    rng = np.random.default_rng(7)
    inside = scored(np.append(rng.normal(size=80).round(1), math.nan))
    outside = scored(rng.normal(1, 1, 60).round(1))
    for name, estimate in run(inside, outside).items():
        assert METRICS.get(name)().point(outside, Context(Resampler(), reference=inside)) == {"s": estimate.value}
    nothing = Context(Resampler(), reference=scored([]))
    assert METRICS.get("aupr-id-pos")().point(outside, nothing) == {}


@pytest.mark.parametrize("positive", ["ood", "id"])
def test_fpr_interval_allows_for_the_threshold(positive: str) -> None:
    # 20 OOD scores of 60: a bootstrap covers 83 % with OOD positive, the rate alone less
    rng = np.random.default_rng(8)
    truth = norm.sf(1.5 - norm.ppf(0.95)) if positive == "ood" else norm.cdf(norm.ppf(0.95) - 1.5)
    metric, held = METRICS.get(f"fpr95-{positive}-pos")(), []
    for _ in range(400):
        inside, outside = scored(rng.normal(size=40)), scored(rng.normal(1.5, 1, 20))
        (value,) = metric.compute(outside, Context(Resampler(), reference=inside))
        held.append(value.estimate.low <= truth <= value.estimate.high)
    assert 0.92 <= np.mean(held) <= 0.99


def test_fpr_interval_is_that_of_the_rate_where_the_threshold_is_certain() -> None:
    # all OOD scores are equal, so every one of them is the threshold
    made = run(scored(np.repeat([0.0, 2.0], [2000, 1000])), scored(np.ones(500)))["fpr95-ood-pos"]
    assert made.value == pytest.approx(1 / 3)
    assert (made.low, made.high) == pytest.approx(wilson(1000, 3000), abs=1e-3)


def test_patients_widen_the_fpr_interval() -> None:
    rng = np.random.default_rng(9)
    inside, outside = rng.normal(size=60).repeat(10), rng.normal(1, 1, 60).repeat(10)
    codes = torch.arange(60).repeat_interleave(10)
    for name in ("fpr95-ood-pos", "fpr95-id-pos", "detection-error", "aupr-ood-pos"):
        plain = run(scored(inside), scored(outside))[name]
        grouped = run(scored(inside, clusters=codes), scored(outside, clusters=codes))[name]
        assert grouped.high - grouped.low > 1.5 * (plain.high - plain.low)


def test_average_precision_says_its_ratio() -> None:
    made = run(scored(np.arange(30.0)), scored(np.arange(20.0) + 15))
    assert made["aupr-ood-pos"].method.endswith("; OOD:ID 20:30")
    assert made["aupr-id-pos"].method.endswith("; OOD:ID 20:30")


def answering(scores: np.ndarray, right: np.ndarray | None) -> PredictionStore:
    store = scored(scores)
    logits = torch.tensor([[0.0, 1.0]]).repeat(len(scores), 1)
    labels = None if right is None else torch.from_numpy(right.astype(np.int64))
    return dataclasses.replace(store, logits=logits, labels=labels)


def test_oscr_is_the_pairwise_share_of_right_accepted_answers() -> None:
    rng = np.random.default_rng(10)
    inside, outside, right = rng.normal(size=90).round(1), rng.normal(1, 1, 60).round(1), rng.random(90) < 0.7
    made = run(answering(inside, right), scored(outside), ("oscr",))["oscr"]
    pairs = right * ((outside[:, None] > inside) + 0.5 * (outside[:, None] == inside))
    assert made.value == pytest.approx(pairs.mean(), abs=1e-12)
    assert made.low < made.value < made.high < right.mean() + 0.1
    apart = run(answering(inside, right), scored(outside + 99), ("oscr",))["oscr"]
    assert apart.value == pytest.approx(right.mean())
    flat = run(answering(np.zeros(90), right), scored(np.zeros(5)), ("oscr",))["oscr"]
    assert flat.value == pytest.approx(right.mean() / 2)
    whole = run(answering(inside, np.ones(90, bool)), scored(outside), ("oscr", "auroc-ood"))
    assert whole["oscr"].value == pytest.approx(whole["auroc-ood"].value)
    assert whole["oscr"].low == pytest.approx(whole["auroc-ood"].low)


def test_oscr_interval_varies_with_the_answers_too() -> None:
    rng = np.random.default_rng(11)
    inside, outside, right = rng.normal(size=400), rng.normal(9, 1, 400), rng.random(400) < 0.7
    made = run(answering(inside, right), scored(outside), ("oscr",))["oscr"]
    assert (made.low, made.high) == pytest.approx(wilson(right.sum(), 400), abs=0.005)


def test_oscr_without_right_answers_or_labels() -> None:
    inside, outside = np.arange(9.0), scored(np.arange(9.0) + 3)
    none = run(answering(inside, np.zeros(9, bool)), outside, ("oscr",))["oscr"]
    assert (none.value, none.reason) == (0, "no_variance")
    unlabelled = run(answering(inside, None), outside, ("oscr",))["oscr"]
    assert math.isnan(unlabelled.value)
    assert unlabelled.reason == "no_labels"


def test_full_spectrum_pools_the_inside() -> None:
    rng = np.random.default_rng(12)
    parts = [rng.normal(loc, 1, 100).round(1) for loc in (0, 0.5, 1)]
    outside = rng.normal(2, 1, 80).round(1)
    pooled = full_spectrum(scored(parts[0]), [scored(part) for part in parts[1:]])
    assert len(torch.unique(pooled.ids)) == 300
    made = run(pooled, scored(outside))
    assert [made[name].value for name in NAMES] == pytest.approx(by_hand(np.concatenate(parts), outside), abs=1e-12)
    # a sample and its shifted versions are one unit
    assert made["auroc-ood"].n_units == 100 + 80
    codes = torch.arange(100) // 4
    grouped = full_spectrum(scored(parts[0], clusters=codes), [scored(parts[1], clusters=codes)])
    assert torch.equal(grouped.clusters, codes.repeat(2))


def test_full_spectrum_keeps_what_all_have() -> None:
    clean = answering(np.arange(4.0), np.array([True, True, False, True]))
    more = dataclasses.replace(clean, scores={"t": torch.zeros(4), **clean.scores}, groups={"site": torch.zeros(4)})
    pooled = full_spectrum(more, [clean])
    assert set(pooled.scores) == {"s"}
    assert pooled.groups == {}
    assert pooled.labels.tolist() == [1, 1, 0, 1] * 2
    assert full_spectrum(clean, [dataclasses.replace(clean, labels=None)]).labels is None
    with pytest.raises(ConfigError, match="clusters everywhere or nowhere"):
        full_spectrum(clean, [dataclasses.replace(clean, clusters=torch.arange(4))])
    with pytest.raises(ConfigError, match="one number of classes"):
        full_spectrum(clean, [dataclasses.replace(clean, logits=torch.zeros(4, 3))])


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
