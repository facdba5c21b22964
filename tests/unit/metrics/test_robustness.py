"""Metrics over several conditions, failure thresholds, and robustness against other models."""

import dataclasses
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from robustlab.core.errors import ConfigError, RangeError
from robustlab.core.registry import METRICS
from robustlab.metrics import Context, Estimate, Frozen, PredictionStore, Resampler, compute, paired_difference, wilson
from robustlab.metrics.base import Conditions, ConditionStore, MetricValue
from robustlab.metrics.failure_threshold import (
    FailureThreshold,
    Scale,
    SensitivityFailureThreshold,
    crossing,
    failure_threshold,
)
from robustlab.metrics.relative_robustness import (
    condition_errors,
    corruption_error,
    effective_robustness,
    relative_corruption_error,
)
from robustlab.metrics.robustness import (
    AllConditionsAccuracy,
    BalancedMeanCorruptionError,
    FlipRate,
    LeastFailingSeverity,
    MeanCorruptionError,
    RelativeBalancedMeanCorruptionError,
    RelativeMeanCorruptionError,
    SeverityArea,
    WorstCondition,
    flips,
    least_failing_severity,
)
from robustlab.metrics.stats import linear_estimate

CONTEXT = Context(Resampler())
METRICS_OVER = (
    AllConditionsAccuracy,
    BalancedMeanCorruptionError,
    FailureThreshold,
    FlipRate,
    LeastFailingSeverity,
    MeanCorruptionError,
    RelativeBalancedMeanCorruptionError,
    RelativeMeanCorruptionError,
    SensitivityFailureThreshold,
    SeverityArea,
    WorstCondition,
)


def answered(wrong, labels=None, clusters=None, ids=None):
    """A two-class store in which some answers are wrong."""
    wrong = torch.as_tensor(np.asarray(wrong, dtype=bool))
    count = len(wrong)
    labels = torch.arange(count) % 2 if labels is None else labels
    ids = torch.arange(count) if ids is None else ids
    logits = 4 * torch.eye(2)[torch.where(wrong, 1 - labels, labels)]
    return PredictionStore(ids, logits, labels, "binary", clusters=clusters)


def over(clean, rows, *, amounts=None, unit="px", identity=math.nan, **kwargs):
    """Conditions from {shift: [wrong answers at severities 1, 2, ...]}."""
    shifted = tuple(
        ConditionStore(
            f"{shift}@{severity}",
            shift,
            float(severity),
            math.nan if amounts is None else amounts[severity - 1],
            unit,
            answered(wrong, **kwargs),
            identity=identity,
        )
        for shift, several in rows.items()
        for severity, wrong in enumerate(several, 1)
    )
    return Conditions(answered(clean, **kwargs), shifted)


def counts(n, *wrong):
    """Nested wrong answers: the first so many samples."""
    return [np.arange(n) < count for count in wrong]


def by_shift(metric, conditions, context=CONTEXT) -> dict[str, MetricValue]:
    return {value.shift: value for value in metric().compute(conditions, context)}


def random_conditions(seed=0, n=300, per_cluster=0, labels=None):
    rng = np.random.default_rng(seed)
    clusters = torch.arange(n) // per_cluster if per_cluster else None
    rows = {shift: [rng.random(n) < level * s for s in (1, 2, 3)] for shift, level in (("a", 0.1), ("b", 0.2))}
    return over(rng.random(n) < 0.1, rows, clusters=clusters, labels=labels)


def test_order_of_aggregation_is_severities_then_shifts():
    n = 100
    conditions = over(counts(n, 10)[0], {"a": counts(n, 10, 20, 60), "b": counts(n, 40)})
    found = by_shift(MeanCorruptionError, conditions)
    assert found["a"].estimate.value == pytest.approx(0.3, abs=1e-12)
    assert found["b"].estimate.value == pytest.approx(0.4, abs=1e-12)
    assert found[""].estimate.value == pytest.approx(0.35, abs=1e-12)  # pooled over conditions it were 0.325
    assert found[""].estimate.method.endswith("4 conditions of 2 shifts")
    rise = by_shift(RelativeMeanCorruptionError, conditions)
    assert rise[""].estimate.value == pytest.approx(0.25, abs=1e-12)
    assert rise["a"].direction == "lower"


def test_balanced_error_sees_a_rare_class_that_is_destroyed():
    # 10 % positives of which 60 % are lost: error .06, balanced error .30 (reference page, section 8)
    labels = (torch.arange(1000) < 100).long()
    conditions = over(np.zeros(1000), {"a": counts(1000, 60)}, labels=labels)
    assert by_shift(MeanCorruptionError, conditions)[""].estimate.value == pytest.approx(0.06, abs=1e-12)
    assert by_shift(BalancedMeanCorruptionError, conditions)[""].estimate.value == pytest.approx(0.30, abs=1e-12)
    assert by_shift(RelativeBalancedMeanCorruptionError, conditions)["a"].estimate.value == pytest.approx(0.30)


def test_one_condition_has_the_interval_of_the_paired_difference():
    conditions = random_conditions(per_cluster=3)
    one = Conditions(conditions.clean, conditions.shifted[2:3])
    made = by_shift(RelativeBalancedMeanCorruptionError, one)[""].estimate
    known = paired_difference(one.shifted[0].store, one.clean, "balanced-accuracy", CONTEXT)
    assert (made.value, made.low, made.high) == pytest.approx((known.value, known.low, known.high), abs=1e-12)


@pytest.mark.parametrize("per_cluster", [0, 5])
def test_the_interval_of_a_mean_over_conditions_knows_that_samples_are_shared(per_cluster):
    conditions = random_conditions(per_cluster=per_cluster)
    made = by_shift(MeanCorruptionError, conditions)[""].estimate
    errors = torch.stack([(item.store.predicted != item.store.labels).double() for item in conditions.shifted])
    each = errors.mean(0)  # three severities each: the same weights
    store = conditions.clean
    known = linear_estimate(store, lambda w: each @ w / w.sum(0), torch.ones_like(store.finite), bounds=(0.0, 1.0))
    assert (made.value, made.low, made.high) == pytest.approx((known.value, known.low, known.high), abs=1e-12)
    copies = over(
        np.arange(300) < 30, {shift: counts(300, 90) for shift in "abcdefgh"}
    )  # the same answers eight times are no more evidence than once
    assert by_shift(MeanCorruptionError, copies)[""].estimate.low == pytest.approx(
        by_shift(MeanCorruptionError, copies)["a"].estimate.low, abs=1e-9
    )


def test_severity_area_is_the_trapezoid_with_clean():
    # the toy case of the reference page: trapezoid .748, mean with clean .735, mean of 1 to 5 .698
    accuracy = [0.92, 0.88, 0.82, 0.72, 0.62, 0.45]
    wrong = [round(1000 * (1 - value)) for value in accuracy]
    conditions = over(counts(1000, wrong[0])[0], {"a": counts(1000, *wrong[1:])})
    (made,) = SeverityArea().compute(conditions, CONTEXT)
    assert made.shift == "a"
    expected = sum((a + b) / 2 for a, b in pairwise(accuracy)) / 5
    assert made.estimate.value == pytest.approx(expected, abs=1e-12)
    half = Conditions(conditions.clean, conditions.shifted[1::3])  # severities 2 and 5
    expected = (2 * (0.92 + 0.82) / 2 + 3 * (0.82 + 0.45) / 2) / 5
    assert SeverityArea().compute(half, CONTEXT)[0].estimate.value == pytest.approx(expected, abs=1e-12)


def test_nothing_wrong_anywhere_has_wilsons_interval_and_identical_answers_no_rise():
    conditions = over(np.zeros(50), {"a": counts(50, 0, 0)})
    made = by_shift(MeanCorruptionError, conditions)[""].estimate
    assert (made.value, made.low) == (0.0, 0.0)
    assert made.high == pytest.approx(1 - wilson(50, 50)[0])
    area = SeverityArea().compute(conditions, CONTEXT)[0].estimate
    assert (area.value, area.low, area.high) == (1.0, pytest.approx(wilson(50, 50)[0]), 1.0)
    for metric in (RelativeMeanCorruptionError, RelativeBalancedMeanCorruptionError):
        rise = by_shift(metric, over(counts(50, 9)[0], {"a": counts(50, 9, 9)}))["a"].estimate
        assert (rise.value, rise.low, rise.high) == (0.0, 0.0, 0.0)


def test_condition_stores_are_paired_by_id():
    conditions = random_conditions(per_cluster=4)
    rng = np.random.default_rng(9)
    mixed = Conditions(
        conditions.clean,
        tuple(
            dataclasses.replace(item, store=item.store.select(torch.from_numpy(rng.permutation(300))))
            for item in conditions.shifted
        ),
    )
    turned = Conditions(
        conditions.clean.select(torch.arange(299, -1, -1)),
        mixed.shifted,
    )
    for metric in METRICS_OVER:
        first, second, third = (metric().compute(item, CONTEXT) for item in (conditions, mixed, turned))
        for a, b, c in zip(first, second, third, strict=True):
            numbers = [(v.estimate.value, v.estimate.low, v.estimate.high) for v in (a, b, c)]
            assert numbers[0] == pytest.approx(numbers[1], abs=1e-12, nan_ok=True), a.metric
            assert numbers[0] == pytest.approx(numbers[2], abs=1e-12, nan_ok=True), a.metric
    bare = [dataclasses.replace(i, store=dataclasses.replace(i.store, clusters=None)) for i in conditions.shifted]
    for metric in METRICS_OVER:  # patients are those of the clean store
        assert repr(metric().compute(Conditions(conditions.clean, tuple(bare)), CONTEXT)) == repr(
            metric().compute(conditions, CONTEXT)
        )
    other = answered(np.zeros(300), ids=torch.arange(1, 301))
    stranger = Conditions(conditions.clean, (dataclasses.replace(conditions.shifted[0], store=other),))
    for metric in METRICS_OVER:
        with pytest.raises(ConfigError, match="same samples"):
            metric().compute(stranger, CONTEXT)


def test_metrics_are_registered_and_only_the_threshold_is_in_the_default_set():
    names = {METRICS.get(item.name) for item in METRICS_OVER}
    assert names == set(METRICS_OVER)
    assert [item.name for item in METRICS_OVER if item.default] == ["failure-threshold"]
    assert all(item.on == "conditions" and item.title for item in METRICS_OVER)


@pytest.mark.parametrize("metric", METRICS_OVER)
def test_no_samples_and_no_conditions(metric):
    empty = over(np.zeros(0), {"a": [np.zeros(0)]})
    for value in metric().compute(empty, CONTEXT):
        assert math.isnan(value.estimate.value)
        assert value.estimate.reason == "no_samples"
    assert metric().compute(Conditions(answered(np.zeros(5)), ()), CONTEXT) == []


def test_worst_condition_names_it_and_all_conditions_counts_samples():
    # different samples fail under each: the worst accuracy is high, few are right throughout
    n = 1000
    rows = {f"s{k}": [np.arange(n) // 100 == k] for k in range(8)} | {"t": [np.arange(n) < 157]}
    conditions = over(np.zeros(n), rows)
    (worst,) = WorstCondition().compute(conditions, CONTEXT)
    assert (worst.target, worst.estimate.value) == ("t@1", pytest.approx(0.843))
    assert worst.estimate.high > wilson(843, 1000)[1]  # moved out: it was picked
    (both,) = AllConditionsAccuracy().compute(conditions, CONTEXT)
    assert both.estimate.value == 0.2
    assert (both.estimate.low, both.estimate.high) == wilson(200, 1000)


def test_flips_need_no_labels_and_rows_without_answer_differ():
    clean = dataclasses.replace(answered(np.zeros(6)), labels=None)
    logits = clean.logits.clone()
    logits[0] = math.nan
    logits[1] = logits[1].flip(0)
    assert flips(clean, dataclasses.replace(clean, logits=logits), CONTEXT).tolist() == [1, 1, 0, 0, 0, 0]
    broken = dataclasses.replace(clean, logits=logits)
    assert flips(broken, broken, CONTEXT).sum() == 0
    shift = ConditionStore("a@1", "a", 1.0, math.nan, "", broken)
    made = by_shift(FlipRate, Conditions(clean, (shift,)))[""].estimate
    assert made.value == pytest.approx(2 / 6)
    assert (made.low, made.high) == wilson(2, 6)


def test_flips_of_labels_are_decided_at_the_frozen_thresholds():
    clean = PredictionStore(torch.arange(2), torch.tensor([[0.0, 2.0], [-3.0, 0.0]]), None, "multilabel")
    store = dataclasses.replace(clean, logits=torch.tensor([[1.0, 2.0], [-3.0, math.nan]]))
    assert flips(clean, store, CONTEXT).tolist() == [0.0, 1.0]
    frozen = Frozen(thresholds=torch.tensor([0.6, 0.5], dtype=torch.float64))
    assert flips(clean, store, dataclasses.replace(CONTEXT, frozen=frozen)).tolist() == [0.5, 1.0]


def test_flip_rate_is_a_mean_over_severities_then_shifts():
    conditions = over(np.zeros(100), {"a": counts(100, 0, 10), "b": counts(100, 30)})
    found = by_shift(FlipRate, conditions)
    assert [found[shift].estimate.value for shift in ("a", "b", "")] == pytest.approx([0.05, 0.3, 0.175])
    assert found["a"].estimate.high < 0.1


def test_least_failing_severity_of_every_sample():
    clean = [1, 0, 0, 0, 0]
    conditions = over(clean, {"a": [[0, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0]]})
    first = least_failing_severity(conditions.clean, conditions.shifted, CONTEXT)
    assert first.tolist()[:4] == [0.0, 1.0, 2.0, 3.0]
    assert math.isnan(first[4])
    backwards = least_failing_severity(conditions.clean, conditions.shifted[::-1], CONTEXT)
    assert torch.equal(first.nan_to_num(-1), backwards.nan_to_num(-1))
    (made,) = LeastFailingSeverity().compute(conditions, CONTEXT)
    assert made.estimate.value == pytest.approx((0 + 1 + 2 + 3 + 3) / 5)
    assert (made.unit, made.shift) == ("severity", "a")
    assert "0.2 never fail, counted as 3" in made.estimate.method
    never = LeastFailingSeverity().compute(over(np.zeros(40), {"a": counts(40, 0, 0)}), CONTEXT)[0].estimate
    assert (never.value, never.low, never.high) == pytest.approx((2.0, 2 * wilson(40, 40)[0], 2.0))


def test_multilabel_rows_without_annotation_do_not_enter():
    labels = torch.tensor([[1, 0], [-1, -1], [1, -1], [0, 1]])
    store = PredictionStore(torch.arange(4), (2 * labels - 1).float(), labels, "multilabel")
    logits = store.logits.clone()
    logits[1:3] *= -1
    shift = ConditionStore("a@1", "a", 1.0, math.nan, "", dataclasses.replace(store, logits=logits))
    conditions = Conditions(store, (shift,))
    assert AllConditionsAccuracy().compute(conditions, CONTEXT)[0].estimate.value == pytest.approx(2 / 3)
    first = least_failing_severity(store, [shift], CONTEXT)
    assert math.isnan(first[1])
    assert first[2] == 1.0
    rise = by_shift(RelativeMeanCorruptionError, conditions)[""].estimate.value
    assert rise == pytest.approx(1 / 5)  # of five decisions one is lost
    (made,) = FailureThreshold().compute(conditions, CONTEXT)
    assert (made.estimate.n, made.estimate.value) == (3, pytest.approx(0.25))  # in severities


class TestFailureThreshold:
    """Where accuracy has fallen by five points."""

    def value(self, wrong, clean=0, n=1000, **kwargs) -> MetricValue:
        conditions = over(counts(n, clean)[0], {"a": counts(n, *wrong)}, **kwargs)
        (made,) = FailureThreshold().compute(conditions, CONTEXT)
        return made

    def test_between_severities_in_physical_units(self):
        made = self.value([20, 120, 320, 400, 500], clean=20, amounts=[10, 20, 40, 50, 60], identity=0.0)
        # falls 0, 10, 30 points: five points half-way between severities 1 and 2
        assert made.unit == "px"
        assert made.estimate.value == pytest.approx(15.0)
        assert made.estimate.low < 15 < made.estimate.high
        assert made.estimate.low > 10
        assert made.estimate.high < 20
        assert (made.estimate.reason, made.direction) == ("", "none")

    def test_of_sensitivity(self):
        labels = (torch.arange(1000) < 200).long()  # all errors are among the positives
        none, most = counts(1000, 0, 40)
        conditions = over(none, {"a": [none, most]}, amounts=[1, 2], identity=0.0, labels=labels)
        frozen = dataclasses.replace(CONTEXT, frozen=Frozen(torch.tensor([0.5], dtype=torch.float64)))
        (made,) = SensitivityFailureThreshold().compute(conditions, frozen)
        assert made.estimate.value == pytest.approx(1.25)  # 5 of 20 points between severities 1 and 2
        assert "5% of sensitivity" in made.estimate.method
        assert made.estimate.n == 200
        (whole,) = FailureThreshold().compute(conditions, frozen)
        assert whole.estimate.reason == "not_reached"  # 4 points of accuracy
        assert SensitivityFailureThreshold().compute(conditions, CONTEXT)[0].estimate.reason == "no_val"
        items = list(conditions.shifted)
        with pytest.raises(ConfigError, match="a share"):
            failure_threshold(conditions.clean, items, frozen, Scale.of(items), metric="auroc")

    def test_amounts_that_fall_turn_the_interval(self):
        made = self.value([0, 100, 300], amounts=[0.5, 0.3, 0.1], identity=1.0).estimate
        assert made.value == pytest.approx(0.4)
        assert 0.3 < made.low < 0.4 < made.high < 0.5

    def test_exactly_at_a_tested_severity(self):
        assert self.value([10, 50, 300], amounts=[1, 2, 3]).estimate.value == 2.0

    def test_the_first_crossing_counts(self):
        assert self.value([100, 0, 300], amounts=[1, 2, 3], identity=0.0).estimate.value == pytest.approx(0.5)

    def test_below_the_first_severity(self):
        amounts = [10, 20]
        made = self.value([200, 300], amounts=amounts, identity=0.0).estimate
        assert made.value == pytest.approx(2.5)
        assert 0 < made.low < 2.5 < made.high < 10
        photons = self.value([200, 300], amounts=[100, 50], identity=math.inf).estimate
        assert photons.value == pytest.approx(400.0)  # in inverse proportion to severity
        assert photons.low < 400 < photons.high
        unknown = self.value([200, 300], amounts=amounts).estimate
        assert math.isnan(unknown.value)
        assert (unknown.reason, unknown.high) == ("below_first_severity", 10.0)  # there it is known to fail
        assert math.isnan(unknown.low)
        reach = self.value([48, 300], amounts=amounts).estimate
        assert 10 < reach.value < reach.high
        assert (math.isnan(reach.low), reach.reason) == (True, "open_interval")

    def test_not_reached_tells_up_to_where_it_is_safe(self):
        calm = self.value([0, 0, 0], amounts=[1, 2, 3], identity=0.0).estimate
        assert math.isnan(calm.value)
        assert (calm.reason, calm.low) == ("not_reached", 3.0)
        assert math.isnan(calm.high)
        close = self.value([0, 0, 45], amounts=[1, 2, 3], identity=0.0).estimate
        assert close.reason == "not_reached"
        assert 2 < close.low < 3
        falling = self.value([0, 0, 45], amounts=[3, 2, 1], identity=9.0).estimate
        assert 1 < falling.high < 2
        assert math.isnan(falling.low)

    def test_an_end_beyond_the_last_severity_is_open(self):
        made = self.value([0, 0, 55], amounts=[1, 2, 3], identity=0.0).estimate
        assert 2.9 < made.value < 3
        assert made.low < made.value
        assert math.isnan(made.high)
        assert made.reason == "open_interval"

    @pytest.mark.parametrize("amounts", [None, [1, 3, 2], [math.nan, 1.0, 2.0]])
    def test_without_amounts_in_order_severity_is_the_unit(self, amounts):
        made = self.value([0, 100, 300], amounts=amounts)
        assert (made.unit, made.estimate.value) == ("severity", pytest.approx(1.5))

    def test_clusters_widen_it(self):
        rng = np.random.default_rng(0)
        rows = {"a": [np.repeat(rng.random(60) < share, 10) for share in (0.02, 0.12, 0.3)]}
        made = [
            FailureThreshold()
            .compute(over(np.zeros(600), rows, clusters=clusters, amounts=[1, 2, 3], identity=0.0), CONTEXT)[0]
            .estimate
            for clusters in (None, torch.arange(600) // 10)
        ]
        assert made[0].value == made[1].value
        assert made[1].high - made[1].low > 2 * (made[0].high - made[0].low)
        assert (made[0].n_units, made[1].n_units) == (600, 60)

    def test_coverage_of_the_known_threshold(self):
        # falls of 1, 3, 7, 11 points: five points at severity 2.5; 400 runs of 500 samples
        inside, rng = 0, np.random.default_rng(3)
        for _ in range(400):
            u = rng.random(500)
            rows = {"a": [(u < share) | (rng.random(500) < 0.02) for share in (0.01, 0.03, 0.07, 0.11)]}
            conditions = over(rng.random(500) < 0.02, rows)
            made = FailureThreshold().compute(conditions, CONTEXT)[0].estimate
            truth = 2 + (0.05 / 0.98 - 0.03) / 0.04
            inside += (not made.low > truth) and (not made.high < truth)
        assert 0.93 < inside / 400 < 0.99

    def test_crossing_and_scale(self):
        assert crossing([0, 1, 3], [0, 0.02, 0.1], 0.06) == pytest.approx(2.0)
        assert crossing([0, 1], [0, 0.04], 0.05) == math.inf
        scale = Scale((0.0, 1.0, 2.0), (math.nan, 3.0, 4.0), "px")
        assert scale.amount(1.5) == 3.5
        assert math.isnan(scale.amount(0.5))
        assert scale.rising


def test_a_ratio_of_sums_is_no_mean_of_ratios():
    errors, baseline = {"a": [0.1, 0.2, 0.7]}, {"a": [0.2, 0.3, 0.9]}
    made = corruption_error(errors, baseline)
    assert made.ratios["a"] == pytest.approx(float(Fraction(10, 14)))
    assert made.mean == made.median == made.ratios["a"]
    assert corruption_error(errors, {"a": [1.4 / 3]}).ratios["a"] == pytest.approx(made.ratios["a"])
    assert made.raw["a"] == pytest.approx(1 / 3)


def test_small_and_negative_denominators_are_guarded():
    errors = {"up": [0.15], "down": [0.25], "same": [0.2]}
    baseline = {"up": [0.1444], "down": [0.2], "same": [0.15]}
    made = relative_corruption_error(errors, baseline, clean=0.0, baseline_clean=0.15)
    assert made.reasons == {"up": "baseline_too_small", "same": "baseline_too_small"}
    assert math.isnan(made.ratios["up"])
    assert made.raw["up"] == 0.15
    assert made.mean == pytest.approx(5.0)
    loose = relative_corruption_error(errors, baseline, clean=0.0, baseline_clean=0.15, minimum=0.06)
    assert math.isnan(loose.mean)
    with pytest.raises(ConfigError, match="same conditions"):
        corruption_error({"a": [0.1, 0.2]}, {"b": [0.1]})
    with pytest.raises(ConfigError, match="same conditions"):
        corruption_error({"a": [0.1, 0.2, 0.3]}, {"a": [0.1, 0.2]})


def test_condition_errors_are_those_of_the_metric():
    conditions = random_conditions()
    clean, errors = condition_errors(conditions, CONTEXT)
    (made,) = compute(conditions.clean, CONTEXT, ["balanced-accuracy"])
    assert clean == pytest.approx(1 - made.estimate.value, abs=1e-15)
    assert list(errors) == ["a", "b"]
    mean = by_shift(BalancedMeanCorruptionError, conditions)
    assert np.mean(errors["b"]) == pytest.approx(mean["b"].estimate.value, abs=1e-12)


def share(value: float, n: int = 1000) -> Estimate:
    low, high = wilson(value * n, n)
    return Estimate(value, low, high, n, n, "wilson")


def test_effective_robustness_is_what_lies_above_the_line():
    x = np.linspace(-1, 3, 12)
    line = 0.8 * x - 0.7

    def shares(odds):
        return 1 / (1 + np.exp(-odds))

    exact = list(zip(shares(x), shares(line), strict=True))
    on = effective_robustness(share(float(shares(1.0))), share(float(shares(0.1))), exact)
    assert on.value == pytest.approx(0, abs=1e-9)
    assert on.low < 0 < on.high
    above = effective_robustness(share(float(shares(1.0))), share(float(shares(0.6))), exact)
    assert above.value == pytest.approx(shares(0.6) - shares(0.1))
    assert above.low > 0
    noise = np.random.default_rng(0).normal(size=12) * 0.3
    noisy = list(zip(shares(x), shares(line + noise), strict=True))
    made = effective_robustness(share(float(shares(1.0))), share(float(shares(0.6))), noisy)
    assert made.high - made.low > above.high - above.low  # the error of the fit is in it
    slope, level = np.polyfit(x, line + noise, 1)
    assert made.value == pytest.approx(shares(0.6) - shares(slope + level))


def test_effective_robustness_needs_ten_models_and_survives_the_ends():
    pairs = [(0.5 + 0.05 * k, 0.4 + 0.05 * k) for k in range(11)]  # the best one has no error on clean data
    made = effective_robustness(share(1.0), share(0.9), pairs)
    assert math.isfinite(made.value)
    assert made.low < made.value < made.high
    assert effective_robustness(share(0.9), share(0.8), pairs[:9]).reason == "too_few_models"
    assert effective_robustness(share(0.9), share(0.8), [(0.7, 0.6)] * 10).reason == "no_variance"
    nothing = Estimate.undefined("no_samples")
    assert effective_robustness(nothing, share(0.8), pairs).reason == "no_samples"
    with pytest.raises(RangeError, match="Divide by 100"):
        effective_robustness(share(0.9), share(0.8), [(70.0, 60.0)] * 10)


def test_answers_without_probabilities_are_enough():
    conditions = random_conditions()

    def bare(store):
        return dataclasses.replace(store, logits=torch.eye(2)[store.predicted], answers_only=True)

    plain = Conditions(
        bare(conditions.clean),
        tuple(dataclasses.replace(item, store=bare(item.store)) for item in conditions.shifted),
    )
    for metric in METRICS_OVER:
        assert metric.from_answers
        context = dataclasses.replace(CONTEXT, frozen=Frozen(torch.tensor([0.5], dtype=torch.float64)))
        first, second = (repr(metric().compute(item, context)) for item in (plain, conditions))
        assert first == second
