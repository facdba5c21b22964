"""Paired differences: where few samples differ, where patients change as a whole, where rows are not finite."""

import math
from dataclasses import replace

import pytest
import torch

from robustlab.core.errors import ConfigError
from robustlab.metrics import Context, Frozen, PredictionStore, Resampler, compute, paired_difference
from robustlab.metrics.stats import compare_metric, discordance_interval, permutation_test, wilson

Z = 1.959963984540054


def gains(plus, minus, count):
    values = torch.zeros(count, dtype=torch.float64)
    values[:plus] = 1
    values[plus : plus + minus] = -1
    return values


@pytest.mark.parametrize(("plus", "minus", "count"), [(0, 0, 50), (4, 0, 624), (12, 3, 100), (30, 30, 200)])
def test_equals_the_published_formula(plus, minus, count):
    p12, p21 = (plus + 1) / (count + 2), (minus + 1) / (count + 2)
    half = Z * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / (count + 2))
    low, high = discordance_interval(gains(plus, minus, count), None)
    assert low == pytest.approx(p12 - p21 - half, abs=1e-12)
    assert high == pytest.approx(p12 - p21 + half, abs=1e-12)


def test_a_few_one_sided_differences_decide_nothing():
    low, _ = discordance_interval(gains(4, 0, 624), None)  # exact McNemar: p = .125
    assert low < 0
    low, _ = discordance_interval(gains(9, 0, 624), None)  # exact McNemar: p = .004
    assert low > 0


@pytest.mark.parametrize(("p12", "p21", "groups"), [(0.02, 0.02, None), (0.1, 0.02, None), (0.2, 0.05, 60)])
def test_coverage(p12, p21, groups):
    generator = torch.Generator().manual_seed(3)
    clusters = None if groups is None else torch.arange(400) % groups
    inside = 0
    for _ in range(500):
        u = torch.rand(400, generator=generator, dtype=torch.float64)
        if clusters is not None:
            shared = torch.randn(groups, generator=generator, dtype=torch.float64)[clusters]
            u = torch.special.ndtr(math.sqrt(0.5) * (shared + torch.special.ndtri(u)))
        gain = (u < p12).double() - (u > 1 - p21).double()
        low, high = discordance_interval(gain, clusters)
        inside += low <= p12 - p21 <= high
    assert 0.925 <= inside / 500 <= 0.995


def test_clusters_widen_where_images_of_a_patient_agree():
    gain = gains(40, 0, 400)
    together, apart = torch.arange(400) // 20, torch.randperm(400, generator=torch.Generator().manual_seed(0)) % 20
    widths = [high - low for low, high in (discordance_interval(gain, c) for c in (together, apart))]
    assert widths[0] > 2 * widths[1]


def test_one_answer_to_everything_has_no_certain_balanced_accuracy():
    labels = torch.arange(40) % 2
    store = PredictionStore(
        ids=torch.arange(40),
        logits=torch.tensor([[0.0, 1.0]]).repeat(40, 1),
        labels=labels,
        task="binary",
        clusters=torch.arange(40) // 4,
    )
    (value,) = compute(store, Context(resampler=Resampler(replicates=200)), ["balanced-accuracy"])
    assert value.estimate.value == 0.5
    assert value.estimate.low < 0.5 < value.estimate.high


# patients, images each, share of patients whose answers all change, or (drop, correlation within patients)
WHOLE = [(20, 50, 0.05), (40, 20, 0.02), (100, 10, 0.01)]
PARTLY = [(40, 20, 0.05, 0.3), (100, 10, 0.02, 0.3), (60, 20, 0.1, 0.2), (60, 20, 0.02, 0.0)]


@pytest.mark.parametrize("case", [*WHOLE, *PARTLY], ids=str)
def test_coverage_where_images_of_a_patient_change_together(case):
    """With one image as the added gain and loss this is 0.55 to 0.65 for whole patients, 0.89 for a part of them."""
    generator = torch.Generator().manual_seed(5)
    units, images, drop, *together = case
    clusters = torch.arange(units).repeat_interleave(images)
    inside = 0
    for _ in range(300):
        if together and together[0]:
            a, b = drop * (1 - together[0]) / together[0], (1 - drop) * (1 - together[0]) / together[0]
            pairs = torch._standard_gamma(torch.tensor([[a, b]]).repeat(units, 1), generator=generator)
            share = (pairs[:, :1] / pairs.sum(1, keepdim=True)).repeat(1, images)
            gain = torch.rand((units, images), generator=generator) < share
        else:
            gain = torch.rand((units, images if together else 1), generator=generator) < drop
        low, high = discordance_interval(gain.expand(units, images).double().flatten(), clusters)
        inside += low <= drop <= high
    assert inside / 300 >= 0.92


def test_no_change_in_five_patients_shows_no_more_than_five_answers_would():
    low, high = discordance_interval(torch.zeros(1000, dtype=torch.float64), torch.arange(1000) // 200)
    assert high > 1 - wilson(5, 5)[0]
    assert low == -high
    apart = discordance_interval(torch.zeros(1000, dtype=torch.float64), torch.arange(1000))
    assert apart == pytest.approx(discordance_interval(torch.zeros(1000, dtype=torch.float64), None), rel=0.01)


def store_of(logits, labels, **more):
    return PredictionStore(torch.arange(len(logits)), logits, labels, "binary", **more)


def two_models(n=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    logits = torch.randn((n, 2), generator=generator)
    logits[torch.arange(n), labels] += 1
    return labels, logits, generator


CONTEXT = Context(Resampler(replicates=200), Frozen(torch.tensor([0.5], dtype=torch.float64), confidence=0.3))


def test_equal_outputs_at_other_operating_points_are_not_identical():
    labels, logits, _ = two_models()
    store = store_of(logits, labels)
    other = replace(CONTEXT, frozen=replace(CONTEXT.frozen, thresholds=torch.tensor([0.4], dtype=torch.float64)))
    made = paired_difference(store, store, "sensitivity", CONTEXT, context_b=other)
    assert made.value > 0
    assert made.low < made.value < made.high
    near = replace(CONTEXT.frozen, thresholds=torch.tensor([0.5 + 1e-9], dtype=torch.float64))
    made = paired_difference(store, store, "sensitivity", CONTEXT, context_b=replace(CONTEXT, frozen=near))
    assert made.value == 0  # no answer changes here, but others may
    assert made.low < 0 < made.high
    same = paired_difference(store, store, "sensitivity", CONTEXT, context_b=replace(CONTEXT))
    assert (same.value, same.low, same.high, same.method) == (0.0, 0.0, 0.0, "identical predictions")


def test_equal_outputs_with_other_scores_are_not_identical():
    labels, logits, generator = two_models()
    frozen = replace(CONTEXT.frozen, detector="d", score=1.0)
    sides = [store_of(logits, labels, scores={"d": torch.randn(400, generator=generator)}) for _ in range(2)]
    made = compare_metric(*sides, "silent-failure-rate", replace(CONTEXT, frozen=frozen))
    assert made.difference.value != 0
    assert made.difference.high - made.difference.low > 0.02  # about 20 of 400 answers differ
    score = sides[0].scores["d"]
    apart = replace(sides[0], scores={"d": torch.where(score >= 1, score + 1, score - 1)})
    made = compare_metric(sides[0], apart, "silent-failure-rate", replace(CONTEXT, frozen=frozen))
    assert made.difference.value == 0  # the scores differ, but not on which side of the threshold they are
    assert made.difference.low < 0 < made.difference.high


def test_zero_is_not_nan():
    labels = torch.zeros(200, dtype=torch.int64)
    broken = torch.zeros((200, 2))
    broken[:60] = math.nan
    made = paired_difference(store_of(torch.zeros((200, 2)), labels), store_of(broken, labels), "accuracy", CONTEXT)
    assert made.value == pytest.approx(-0.3)
    assert made.low < -0.3 < made.high < 0
    wrong = torch.ones(200, dtype=torch.int64)
    made = paired_difference(store_of(torch.zeros((200, 2)), wrong), store_of(broken, wrong), "accuracy", CONTEXT)
    assert made.value == 0  # 60 answers were wrong, and now there is none
    assert made.low < 0 < made.high
    infinite = store_of(torch.full((200, 2), math.inf), labels)
    largest = store_of(torch.full((200, 2), torch.finfo(torch.float32).max), labels)
    assert paired_difference(largest, infinite, "accuracy", CONTEXT).value == -1


@pytest.mark.parametrize("metric", ["brier", "nll", "auroc", "aurc", "ece", "risk-at-coverage"])
def test_rows_that_break_on_one_side_make_no_model_better(metric):
    labels, logits, _ = two_models(1000)
    wrong = logits.argmax(1) != labels
    broken = logits.clone()
    broken[wrong] = math.nan
    kept = torch.where(torch.arange(1000)[:, None] % 9 == 0, logits + 0.2, broken)
    made = paired_difference(store_of(logits, labels), store_of(kept, labels), metric, CONTEXT)
    finite = int(torch.isfinite(kept).all(1).sum())
    assert made.n == finite < 1000
    assert f"{1000 - finite} of 1000 rows not finite on a side" in made.method
    assert abs(made.value) < 1e-6
    accuracy = paired_difference(store_of(logits, labels), store_of(broken, labels), "accuracy", CONTEXT)
    assert (accuracy.n, accuracy.value) == (1000, 0.0)  # they were wrong before


@pytest.mark.parametrize("metric", ["sensitivity", "specificity", "balanced-accuracy", "silent-failure-rate"])
@pytest.mark.parametrize("patients", [None, 40])
def test_rates_that_do_not_change_have_an_interval(metric, patients):
    labels, logits, _ = two_models(2000)
    clusters = None if patients is None else torch.arange(2000) % patients
    first = store_of(logits, labels, clusters=clusters)
    made = paired_difference(first, replace(first, logits=logits * (1 + 1e-6)), metric, CONTEXT)
    assert made.value == 0
    assert made.low < 0 < made.high
    assert not made.reason
    if patients is None and metric != "silent-failure-rate":
        n = 1000
        assert made.high == pytest.approx(
            Z * math.sqrt(2) / (n + 2) / (math.sqrt(2) if "bal" in metric else 1), rel=1e-3
        )


@pytest.mark.parametrize("metric", ["ece-null", "ece-excess", "ece-debiased", "ece-equal-mass"])
def test_a_permutation_test_is_refused_where_it_would_be_of_another_number(metric):
    labels, logits, generator = two_models(300)
    other = store_of(logits + torch.randn(logits.shape, generator=generator), labels)
    with pytest.raises(ConfigError, match="weights of samples alone"):
        permutation_test(store_of(logits, labels), other, metric, CONTEXT, draws=20)
    assert 0 < permutation_test(store_of(logits, labels), other, "ece", CONTEXT, draws=20) <= 1
