import dataclasses
import math

import numpy as np
import pytest
import torch

from robustlab.core.errors import RangeError, ShapeError, UnknownNameError
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
from robustlab.metrics.selective import confidence


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
