import dataclasses
import math

import numpy as np
import pytest
import torch

from robustlab.core.errors import RangeError, ShapeError, UnknownNameError
from robustlab.core.registry import METRICS
from robustlab.metrics import (
    Context,
    Estimate,
    Frozen,
    PredictionStore,
    Resampler,
    compute,
    fit_frozen,
    fit_referral,
    referred,
    wilson,
)
from robustlab.metrics.risk_coverage import excess_aurc, risk_coverage
from robustlab.metrics.selective import confidence
from robustlab.metrics.stats import linearise


def two_class(odds: list[float], labels: list[int], **more: object) -> PredictionStore:
    logits = torch.tensor([[0.0, z] for z in odds])
    return PredictionStore(torch.arange(len(odds)), logits, torch.tensor(labels), "binary", **more)


def one(store: PredictionStore, name: str, frozen: Frozen) -> Estimate:
    (value,) = compute(store, Context(Resampler(replicates=100), frozen), [name])
    return value.estimate


def test_confidence_orders_as_the_largest_probability(make_store) -> None:
    store = make_store(classes=4)
    assert torch.equal(torch.argsort(confidence(store)), torch.argsort(store.probs.amax(1)))
    labels = make_store(classes=3, task="multilabel")
    least = torch.maximum(labels.probs, 1 - labels.probs).amin(1)
    assert torch.equal(torch.argsort(confidence(labels)), torch.argsort(least))
    sure = two_class([40.0, 60.0], [1, 1])
    assert confidence(sure).tolist() == [40, 60]


@pytest.mark.parametrize("referral", [0.0, 0.05, 0.1, 0.37, 1.0])
@pytest.mark.parametrize("detector", ["", "noise"])
def test_agreed_share_is_met_on_val(make_store, referral: float, detector: str) -> None:
    val = make_store(1000)
    frozen = fit_frozen(val, referral, detector)
    share = float(referred(val, frozen).double().mean())
    assert referral - 0.0015 <= share <= referral + 1e-9
    assert frozen.detector == detector


def test_both_criteria_get_the_same_marginal_share(make_store) -> None:
    val = make_store(2000)
    low, high = fit_referral(val, 0.1, "noise")
    by_confidence, by_score = confidence(val) <= low, val.scores["noise"] >= high
    assert int(by_confidence.sum()) == int(by_score.sum())
    # independent criteria: 1 - (1 - x)^2 = 0.1
    assert float(by_score.double().mean()) == pytest.approx(1 - math.sqrt(0.9), abs=0.004)


def test_ties_never_exceed_the_share(make_store) -> None:
    val = make_store(500)
    flat = dataclasses.replace(val, scores={"flat": torch.zeros(500)})
    frozen = fit_frozen(flat, 0.1, "flat")
    assert frozen.score == math.inf
    assert int(referred(flat, frozen).sum()) == 50
    coarse = dataclasses.replace(val, scores={"coarse": torch.round(val.scores["noise"])})
    assert 0 < int(referred(coarse, fit_frozen(coarse, 0.1, "coarse")).sum()) <= 50


def test_a_detector_without_scores_leaves_the_share_to_confidence(make_store) -> None:
    val = dataclasses.replace(make_store(500), scores={"energy": torch.full((500,), math.nan)})
    frozen = fit_frozen(val, 0.1, "energy")
    assert frozen.detector == ""
    assert math.isnan(frozen.score)
    assert int(referred(val, frozen).sum()) == 50


def test_bad_calls_are_refused(make_store) -> None:
    val = make_store()
    with pytest.raises(RangeError, match="share from 0 to 1"):
        fit_referral(val, 10)
    with pytest.raises(UnknownNameError, match="noise, other"):
        fit_referral(val, 0.1, "msp")
    with pytest.raises(ShapeError, match="finite prediction"):
        fit_referral(two_class([math.nan], [0]), 0.1)


def test_silent_failures_are_wrong_and_not_referred() -> None:
    store = two_class([3, -3, 3, 0.5, -0.5, 3], [1, 1, 0, 0, 0, 0], scores={"d": torch.tensor([0.0, 0, 0, 0, 0, 9])})
    frozen = Frozen(confidence=1.0, detector="d", score=5.0)
    estimate = one(store, "silent-failure-rate", frozen)
    # rows 1 and 2 are sure and wrong; 3 is wrong and unsure; 5 is wrong and flagged
    assert (estimate.value, estimate.low, estimate.high) == (2 / 6, *wilson(2, 6))
    assert one(store, "referred-share", frozen).value == pytest.approx(3 / 6)
    assert "0.1 on val by confidence or d" in estimate.method


def test_thresholds_are_inclusive() -> None:
    store = two_class([1.0, -1.0], [0, 1], scores={"d": torch.tensor([0.0, 5.0])})
    assert referred(store, Frozen(confidence=1.0)).all()
    assert referred(store, Frozen(confidence=0.9, detector="d", score=5.0)).tolist() == [False, True]


def test_broken_answers_are_referred_not_silent() -> None:
    store = two_class([math.nan, math.inf, 3, 3], [0, 0, 0, 1])
    frozen = Frozen(confidence=-1.0)
    assert one(store, "accuracy", frozen).value == 1 / 4
    assert one(store, "silent-failure-rate", frozen).value == 1 / 4
    assert one(store, "referred-share", frozen).value == 2 / 4


def test_a_patient_fails_with_any_image() -> None:
    store = two_class([3, 3, 3, 3, 3, 3], [1, 0, 0, 1, 1, 1], clusters=torch.tensor([7, 7, 7, 2, 2, 9]))
    estimate = one(store, "silent-failure-rate", Frozen(confidence=0.0))
    assert (estimate.value, estimate.n, estimate.n_units) == (pytest.approx(1 / 3), 6, 3)
    assert (estimate.low, estimate.high) == wilson(1, 3)


def test_multilabel_fails_with_any_annotated_label() -> None:
    logits = torch.tensor([[3.0, 3.0], [3.0, 3.0], [3.0, 3.0], [0.1, 3.0]])
    labels = torch.tensor([[1, 0], [1, -1], [-1, -1], [0, 1]])
    store = PredictionStore(torch.arange(4), logits, labels, "multilabel", clusters=torch.tensor([0, 1, 2, 3]))
    frozen = Frozen(thresholds=torch.tensor([0.5, 0.5], dtype=torch.float64), confidence=1.0)
    estimate = one(store, "silent-failure-rate", frozen)
    assert (estimate.value, estimate.n) == (pytest.approx(1 / 3), 3)
    strict = dataclasses.replace(frozen, thresholds=torch.tensor([0.5, 0.99], dtype=torch.float64))
    assert one(store, "silent-failure-rate", strict).value == 0


def test_unannotated_first_image_does_not_hide_a_patient() -> None:
    logits = torch.tensor([[3.0], [3.0]])
    store = PredictionStore(
        torch.arange(2), logits, torch.tensor([[-1], [0]]), "multilabel", clusters=torch.tensor([4, 4])
    )
    estimate = one(store, "silent-failure-rate", Frozen(confidence=0.0))
    assert (estimate.value, estimate.n, estimate.n_units) == (1, 1, 1)


def test_detector_catches_what_confidence_misses() -> None:
    # wrong answers are sure of themselves, but the score knows them
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    wrong = rng.random(400) < 0.05
    odds = np.where(labels ^ wrong, 1, -1) * rng.uniform(1, 4, 400)
    store = two_class(odds.tolist(), labels.tolist(), scores={"d": torch.from_numpy(wrong + rng.random(400))})
    alone, both = (one(store, "silent-failure-rate", fit_frozen(store, 0.15, name)).value for name in ("", "d"))
    assert both < 0.01 < alone


CURVE = ("aurc", "augrc", "failure-auroc", "coverage-at-risk", "risk-at-coverage")


def graded(sure: np.ndarray, wrong: np.ndarray, **more: object) -> PredictionStore:
    """A store whose confidence is ``sure``, above 0, and whose answer 1 is wrong where told."""
    return two_class(sure.tolist(), (1 - wrong.astype(int)).tolist(), **more)


def tied(n: int = 60, seed: int = 0, rate: float = 0.3, step: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sure = (np.ceil(rng.uniform(0, 4, n) / step) * step).astype(np.float32)
    return sure, rng.random(n) < rate * np.exp(-sure / 4) * 1.5


def curve_by_hand(sure: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Expected errors among the first k, by the formula of the groups."""
    out, a, b = [], 0, 0.0
    for level in np.unique(sure)[::-1]:
        c, e = (sure == level).sum(), wrong[sure == level].sum()
        out += [b + j * e / c for j in range(1, c + 1)]
        a, b = a + c, b + e
    return np.array(out)


def by_hand(sure: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    n, errors = len(sure), curve_by_hand(sure, wrong)
    k = np.arange(1, n + 1)
    good, bad = sure[~wrong], sure[wrong]
    area = np.mean((good[:, None] > bad) + 0.5 * (good[:, None] == bad)) if len(good) and len(bad) else math.nan
    met = k[20 * errors <= k + 1e-9]
    cut = -(-4 * n // 5)
    return {
        "aurc": (errors / k).mean(),
        "augrc": (errors / n).mean(),
        "failure-auroc": area,
        "coverage-at-risk": met.max(initial=0) / n,
        "risk-at-coverage": errors[cut - 1] / cut,
    }


@pytest.mark.parametrize("step", [1e-6, 0.1, 0.5, 4.0])
@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_the_curve_by_hand(step: float, rate: float) -> None:
    sure, wrong = tied(step=step, rate=rate)
    store = graded(sure, wrong)
    hand = by_hand(sure, wrong)
    for name in CURVE:
        assert one(store, name, Frozen()).value == pytest.approx(hand[name], abs=1e-12)
        metric, context = METRICS.get(name)(), Context(Resampler())
        assert metric.point(store, context)[""] == pytest.approx(hand[name], abs=1e-12)
    coverage, risk = risk_coverage(torch.from_numpy(sure), torch.from_numpy(wrong))
    assert risk.numpy() == pytest.approx(curve_by_hand(sure, wrong) / np.arange(1, 61), abs=1e-12)
    assert coverage.numpy() == pytest.approx(np.arange(1, 61) / 60)


@pytest.mark.parametrize("name", CURVE)
@pytest.mark.parametrize("step", [1e-6, 0.5])
def test_whole_weights_are_repetitions(name: str, step: float) -> None:
    sure, wrong = tied(step=step, rate=0.1)
    weights = np.random.default_rng(1).integers(0, 4, (60, 20))
    (statistic,) = METRICS.get(name)().statistics(graded(sure, wrong), Context(Resampler())).values()
    made = statistic(torch.from_numpy(weights).double())
    hand = [by_hand(np.repeat(sure, w), np.repeat(wrong, w))[name] for w in weights.T]
    assert made.numpy() == pytest.approx(hand, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("name", ["aurc", "augrc", "failure-auroc"])
def test_influence_is_the_change_with_a_weight(name: str) -> None:
    sure, wrong = tied()
    (statistic,) = METRICS.get(name)().statistics(graded(sure, wrong), Context(Resampler())).values()
    influence = linearise(statistic, 60).influence
    for row in (0, 17, 59):
        step = torch.zeros(60, 1, dtype=torch.float64)
        step[row] = 1e-5
        change = float(statistic(1 + step)[0] - statistic(1 - step)[0]) / 2e-5
        assert float(influence[row]) == pytest.approx(change, abs=1e-8)


def test_ties_are_the_mean_over_shuffles() -> None:
    sure, wrong = tied(n=12, seed=3, step=2.0)
    rng, found = np.random.default_rng(0), []
    for _ in range(20000):
        order = np.lexsort((rng.random(12), -sure))
        found.append((wrong[order].cumsum() / np.arange(1, 13)).mean())
    mean = by_hand(sure, wrong)["aurc"]
    assert np.mean(found) == pytest.approx(mean, abs=4 * np.std(found) / math.sqrt(20000))
    assert np.std(found) > 0.01


@pytest.mark.parametrize("step", [1e-6, 0.5, 4.0])
def test_augrc_identity(step: float) -> None:
    sure, wrong = tied(n=200, step=step)
    values = {name: one(graded(sure, wrong), name, Frozen()).value for name in ("augrc", "failure-auroc")}
    acc, n = 1 - wrong.mean(), 200
    right = (1 - values["failure-auroc"]) * acc * (1 - acc) + (1 - acc) ** 2 / 2 + (1 - acc) / (2 * n)
    assert values["augrc"] == pytest.approx(right, abs=1e-12)


def test_excess_aurc_is_above_the_best_order() -> None:
    for seed in range(20):
        sure, wrong = (torch.from_numpy(x) for x in tied(seed=seed))
        n, errors = 60, int(wrong.sum())
        best = np.mean([max(0, k - (n - errors)) / k for k in range(1, n + 1)])
        excess = excess_aurc(sure, wrong)
        assert excess >= 0
        assert excess == pytest.approx(by_hand(sure.numpy(), wrong.numpy())["aurc"] - best, abs=1e-12)
        assert excess_aurc(-wrong.double(), wrong) == pytest.approx(0, abs=1e-12)


def test_the_last_crossing_counts() -> None:
    # the surest answer is wrong, so the risk meets 5 % only from the 20th answer on, and no longer after the 41st
    wrong = np.zeros(60, dtype=bool)
    wrong[[0, 40, 41, 42]] = True
    sure = np.arange(60.0)[::-1] + 1
    assert one(graded(sure, wrong), "coverage-at-risk", Frozen()).value == pytest.approx(41 / 60)
    never = one(graded(sure, np.ones(60, dtype=bool)), "coverage-at-risk", Frozen())
    assert (never.value, never.reason) == (0, "risk_not_met")
    always = one(graded(sure, np.zeros(60, dtype=bool)), "coverage-at-risk", Frozen())
    # Wilson: 60 flawless answers do not show a risk of at most 5 %, 73 do
    assert (always.value, always.low, always.high) == (1, 0, 1)
    more = graded(np.arange(80.0) + 1, np.zeros(80, dtype=bool))
    assert one(more, "coverage-at-risk", Frozen()).low == 1


def test_no_errors_and_no_right_answers() -> None:
    sure = np.arange(40.0) + 1
    flawless, hopeless = (graded(sure, np.full(40, flag)) for flag in (False, True))
    assert one(flawless, "failure-auroc", Frozen()).reason == "no_errors"
    assert one(hopeless, "failure-auroc", Frozen()).reason == "no_correct"
    assert [one(flawless, name, Frozen()).value for name in ("aurc", "augrc", "risk-at-coverage")] == [0, 0, 0]
    assert one(hopeless, "aurc", Frozen()).value == pytest.approx(1)
    risk = one(flawless, "risk-at-coverage", Frozen())
    assert (risk.low, risk.high) == wilson(0, 32)
    apart = one(graded(sure, sure < 6), "failure-auroc", Frozen())
    assert (apart.value, apart.low, apart.high) == (1, *wilson(5, 5))
    empty = graded(sure, sure < 6).select(torch.zeros(40, dtype=torch.bool))
    assert {one(empty, name, Frozen()).reason for name in CURVE} == {"no_samples"}


def test_rows_that_are_not_finite_are_left_out() -> None:
    sure, wrong = tied()
    broken = sure.copy()
    broken[:5] = math.nan
    for name in CURVE:
        ours, theirs = (one(graded(*part), name, Frozen()) for part in ((broken, wrong), (sure[5:], wrong[5:])))
        assert ours.value == pytest.approx(theirs.value, abs=1e-12)
        assert ours.n == 55


@pytest.mark.parametrize("name", CURVE)
def test_intervals_hold_the_value_and_widen_with_patients(name: str) -> None:
    sure, wrong = tied(n=100, rate=0.15, step=1e-4)
    sure = sure + np.linspace(0, 1e-3, 100)  # no ties: the copies of a patient are tied below
    plain = one(graded(sure, wrong), name, Frozen())
    codes = torch.arange(100).repeat_interleave(5)
    copies = [np.repeat(part, 5) for part in (sure, wrong)]
    naive = one(graded(*copies), name, Frozen())
    grouped = one(graded(*copies, clusters=codes), name, Frozen())
    assert plain.low < plain.value < plain.high
    assert grouped.n_units == 100
    assert grouped.high - grouped.low > 1.5 * (naive.high - naive.low)
    assert grouped.high - grouped.low == pytest.approx(plain.high - plain.low, rel=0.25)


def test_order_of_rows_does_not_matter() -> None:
    sure, wrong = tied(n=300)
    order = np.random.default_rng(0).permutation(300)
    for name in ("aurc", "augrc", "failure-auroc"):
        first = one(graded(sure, wrong), name, Frozen())
        second = one(graded(sure[order], wrong[order]), name, Frozen())
        ends = [[e.value, e.low, e.high] for e in (first, second)]
        assert ends[0] == pytest.approx(ends[1], abs=1e-12)


def test_a_curve_needs_confidences() -> None:
    with pytest.raises(ShapeError, match="1 NaN"):
        risk_coverage(torch.tensor([0.0, math.nan]), torch.tensor([0, 1]))
    _, risk = risk_coverage(torch.tensor([-math.inf, math.inf, 0.0]), torch.tensor([1, 0, 0]))
    assert risk.tolist() == pytest.approx([0, 0, 1 / 3])


def test_multilabel_answers_are_wrong_with_any_annotated_label() -> None:
    logits = torch.tensor([[3.0, 2.0], [3.0, 1.0], [3.0, 3.0], [3.0, 4.0]])
    labels = torch.tensor([[1, 0], [1, -1], [-1, -1], [1, 1]])
    store = PredictionStore(torch.arange(4), logits, labels, "multilabel")
    made = one(store, "aurc", Frozen())
    assert made.n == 3
    assert made.value == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)


def test_rows_with_the_same_logits_in_another_order_are_equally_sure() -> None:
    """A sum in another order ends on another last digit, which would decide ties in every selective metric."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((500, 7), generator=generator)
    order = torch.rand((500, 7), generator=generator).argsort(1)
    sides = [PredictionStore(torch.arange(500), z, None, "multiclass") for z in (logits, logits.gather(1, order))]
    first, second = (confidence(store) for store in sides)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, sides[0].log_odds.amax(1), rtol=1e-12, atol=1e-12)
