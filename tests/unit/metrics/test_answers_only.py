"""Answers without probabilities: what follows from the answer is right, everything else is NaN with that reason."""

import dataclasses
import math

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score

from robustlab.core.errors import ConfigError
from robustlab.core.registry import METRICS
from robustlab.metrics import (
    Context,
    Frozen,
    Metric,
    MetricValue,
    PredictionStore,
    Resampler,
    compute,
    fit_frozen,
    paired_difference,
    reliability,
)
from robustlab.report import words

LABELLED = [name for name, metric in METRICS.items() if metric.on == "labels"]
RIGHT = {name for name in LABELLED if METRICS.get(name).from_answers}


def answers(make_store, classes=2, unparsed=0, **options):
    """A store with the answers of a live one, the first few of them not parsed."""
    live = make_store(classes=classes, **options)
    logits = torch.nn.functional.one_hot(live.predicted, classes).float()
    logits[:unparsed] = math.nan
    return dataclasses.replace(live, logits=logits, answers_only=True, scores={}), live


def context(frozen=None):
    return Context(resampler=Resampler(seed=0, replicates=200), frozen=frozen or Frozen())


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("per_cluster", [0, 4])
def test_only_what_follows_from_the_answer_is_defined(make_store, classes, per_cluster):
    store, _ = answers(make_store, classes, per_cluster=per_cluster)
    frozen = Frozen(thresholds=torch.tensor([0.9], dtype=torch.float64), confidence=0.1)
    for value in compute(store, context(frozen), LABELLED):
        if value.metric in RIGHT:
            assert not math.isnan(value.estimate.value)
            assert value.estimate.reason == ""
        else:
            assert math.isnan(value.estimate.value)
            assert value.estimate.reason == "answers_only"
            assert (value.estimate.n, value.estimate.n_units) == (200, 50 if per_cluster else 200)
    assert {value.metric for value in compute(store, context(), LABELLED)} == set(LABELLED)
    assert {"accuracy", "balanced-accuracy", "sensitivity", "specificity"} <= RIGHT
    assert words.reason("answers_only") == "answers without probabilities"


@pytest.mark.parametrize("frozen", [Frozen(), Frozen(thresholds=torch.tensor([0.99], dtype=torch.float64))])
def test_two_classes_are_decided_by_the_answer_not_by_a_threshold(make_store, frozen):
    store, _ = answers(make_store)
    found = {v.metric: v.estimate for v in compute(store, context(frozen), sorted(RIGHT))}
    truth, given = store.labels.numpy(), store.predicted.numpy()
    assert found["accuracy"].value == pytest.approx(accuracy_score(truth, given), abs=1e-12)
    assert found["balanced-accuracy"].value == pytest.approx(balanced_accuracy_score(truth, given), abs=1e-12)
    assert found["sensitivity"].value == pytest.approx(recall_score(truth, given), abs=1e-12)
    assert found["specificity"].value == pytest.approx(recall_score(truth, given, pos_label=0), abs=1e-12)
    assert "of the answers given" in found["sensitivity"].method


@pytest.mark.parametrize("classes", [2, 4])
def test_answers_that_were_not_parsed_are_wrong_on_both_sides(make_store, classes):
    whole, _ = answers(make_store, classes)
    store, live = answers(make_store, classes, unparsed=30)
    expected = (live.predicted == live.labels)[30:].sum() / 200
    found = compute(store, context(), ["accuracy", "sensitivity", "specificity"])
    assert found[0].estimate.value == pytest.approx(float(expected), abs=1e-7)
    assert found[0].estimate.n == 200
    before = compute(whole, context(), ["accuracy", "sensitivity", "specificity"])
    assert all(a.estimate.value < b.estimate.value for a, b in zip(found, before, strict=True))
    for value in found[1:]:
        index = int(value.target or 1)
        rows = (store.labels == index) == (value.metric == "sensitivity")
        right = ((store.predicted == index) == (value.metric == "sensitivity")) & store.finite
        assert value.estimate.value == pytest.approx(float(right[rows].double().mean()), abs=1e-12)


def test_several_classes_have_the_live_models_rates(make_store):
    store, live = answers(make_store, 3)
    for name in RIGHT:
        assert compute(store, context(), [name]) == compute(live, context(), [name])


def test_nothing_can_be_read_as_a_probability(make_store):
    store, _ = answers(make_store, 3)
    for part in (store, store.select(torch.arange(50)), dataclasses.replace(store, labels=None)):
        assert part.answers_only
        for values in (part.log_probs, part.probs, part.log_odds):
            assert bool(torch.isnan(values).all())
    assert bool((reliability(store).n == 0).all())


def test_multilabel_answers_are_refused(make_store):
    live = make_store(task="multilabel", classes=3)
    with pytest.raises(ConfigError, match="multi-label"):
        dataclasses.replace(live, answers_only=True)


def test_operating_points_are_none(make_store):
    store, _ = answers(make_store)
    frozen = fit_frozen(dataclasses.replace(store, scores={"noise": torch.zeros(200)}), 0.2, "noise")
    assert frozen.thresholds is not None
    assert len(frozen.thresholds) == 0
    assert (frozen.detector, frozen.referral) == ("", 0.2)
    assert math.isnan(frozen.confidence)
    assert math.isnan(frozen.score)
    assert fit_frozen(dataclasses.replace(store, labels=None), 0.2).thresholds is None


def test_paired_accuracy_is_that_of_the_answers(make_store):
    store, live = answers(make_store, seed=1)
    other, other_live = answers(make_store, seed=1, signal=0.3)
    assert paired_difference(store, other, "accuracy", context()) == paired_difference(
        live, other_live, "accuracy", context()
    )
    for first, second in ((store, other), (live, store), (store, live)):
        frozen = Frozen(thresholds=torch.tensor([0.5], dtype=torch.float64), confidence=0.1)
        for name in ("nll", "brier", "auroc", "silent-failure-rate"):
            assert paired_difference(first, second, name, context(frozen)).reason == "answers_only"


def test_ood_metrics_give_the_reason_of_the_skipped_scores(make_store):
    store, _ = answers(make_store)
    nothing = torch.full((200,), math.nan)
    clean = dataclasses.replace(store, scores={"msp": nothing}, score_reasons={"msp": "answers_only"})
    against = dataclasses.replace(context(), reference=clean)
    names = [name for name, metric in METRICS.items() if metric.on == "ood"]
    values = compute(dataclasses.replace(clean, labels=None), against, names)
    assert {v.metric for v in values} == set(names) >= {"auroc-ood", "fpr95-ood-pos", "fpr95-id-pos"}
    assert {v.estimate.reason for v in values} == {"answers_only"}


def test_a_metric_of_somebody_else_is_not_asked_unless_it_says_so(make_store):
    store, _ = answers(make_store)

    class Foreign(Metric):
        name = "test-foreign"
        asked = 0

        def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
            type(self).asked += 1
            return []

    METRICS.register("test-foreign")(Foreign)
    try:
        assert compute(store, context(), ["test-foreign"])[0].estimate.reason == "answers_only"
        assert Foreign.asked == 0
        Foreign.from_answers = True
        assert compute(store, context(), ["test-foreign"]) == []
        assert Foreign.asked == 1
    finally:
        del METRICS._items["test-foreign"]
