"""Group tables and differences between groups with their null values."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from robustlab.core.errors import ConfigError, ShapeError
from robustlab.core.registry import METRICS
from robustlab.metrics import Context, Frozen, PredictionStore, Resampler, compute, wilson
from robustlab.metrics.groups import (
    AccuracyGap,
    AurocGap,
    DemographicParityDifference,
    EceGap,
    EqualisedOddsDifference,
    EquityScaledAccuracy,
    EquityScaledAuroc,
    WorstGroupAccuracy,
    group_table,
)

FROZEN = Frozen(thresholds=torch.tensor([0.5], dtype=torch.float64))
CONTEXT = Context(Resampler(), frozen=FROZEN)
ALL = (
    AccuracyGap,
    AurocGap,
    DemographicParityDifference,
    EceGap,
    EqualisedOddsDifference,
    EquityScaledAccuracy,
    EquityScaledAuroc,
    WorstGroupAccuracy,
)
ABC = ("A", "B", "C")


def two_classes(labels, scores, **kwargs):
    scores = torch.as_tensor(np.asarray(scores), dtype=torch.float64)
    logits = torch.stack([torch.zeros_like(scores), scores], 1)
    return PredictionStore(torch.arange(len(scores)), logits, torch.as_tensor(labels).long(), "binary", **kwargs)


def table_of(cells):
    """A store from {group: (true positives, false negatives, false positives, true negatives)}."""
    codes, labels, scores = [], [], []
    for group, counts in enumerate(cells):
        for (label, score), count in zip(((1, 2), (1, -2), (0, 2), (0, -2)), counts, strict=True):
            codes += [group] * count
            labels += [label] * count
            scores += [score] * count
    return two_classes(labels, scores), torch.tensor(codes)


D80 = norm.ppf(0.8) * math.sqrt(2)


def equal_groups(rng, sizes, positives, d=D80):
    """Groups with the same binormal scores, AUROC .80."""
    labels = np.concatenate([np.arange(n) < p for n, p in zip(sizes, positives, strict=True)]).astype(int)
    return two_classes(labels, rng.normal(size=len(labels)) + d * labels), torch.arange(len(sizes)).repeat_interleave(
        torch.tensor(sizes)
    )


CELLS = ((40, 10, 5, 45), (30, 20, 20, 30), (45, 5, 10, 40))


def test_closed_forms():
    store, codes = table_of(CELLS)
    found = {item.name: item().difference(store, codes, ABC, CONTEXT) for item in ALL}
    values = {name: made.estimate.value for name, made in found.items()}
    assert values["accuracy-gap"] == pytest.approx(0.25)
    assert values["worst-group-accuracy"] == pytest.approx(0.6)
    assert values["demographic-parity-difference"] == pytest.approx(0.55 - 0.45)
    assert values["equalised-odds-difference"] == pytest.approx(0.3)  # TPR .9 - .6; FPR .4 - .1 is as large
    overall = 230 / 300
    expected = overall / (1 + abs(0.85 - overall) * 2 + abs(0.6 - overall))
    assert values["equity-scaled-accuracy"] == pytest.approx(expected)
    assert found["accuracy-gap"].groups == pytest.approx({"A": 0.85, "B": 0.6, "C": 0.85})
    assert found["accuracy-gap"].p == pytest.approx(1 / 1001, abs=0.003)
    for name in ("auroc", "ece"):
        of = [compute(store.select(codes == group), CONTEXT, [name])[0].estimate.value for group in range(3)]
        assert values[f"{name}-gap"] == pytest.approx(max(of) - min(of), abs=1e-12)
    of = [compute(store.select(codes == group), CONTEXT, ["auroc"])[0].estimate.value for group in range(3)]
    whole = compute(store, CONTEXT, ["auroc"])[0].estimate.value
    assert values["equity-scaled-auroc"] == pytest.approx(whole / (1 + sum(abs(item - whole) for item in of)))


def test_equity_scale_of_two_groups_is_the_sum_form():
    # groups .85 and .75 about .80: .727 by the sum, not .747 or .762 by a standard deviation (reference page)
    store, codes = table_of(((170, 30, 30, 170), (150, 50, 50, 150)))
    made = EquityScaledAccuracy().difference(store, codes, ABC[:2], CONTEXT)
    assert made.estimate.value == pytest.approx(0.8 / 1.1)
    assert round(made.estimate.value, 3) == 0.727


def test_equalised_odds_takes_the_larger_range():
    store, codes = table_of(((40, 10, 25, 25), (30, 20, 5, 45)))
    assert EqualisedOddsDifference().difference(store, codes, ABC[:2], CONTEXT).estimate.value == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("sizes", "positives", "gap", "scaled"),
    [
        ((500,) * 2, (100,) * 2, 0.025, 0.782),
        ((200,) * 5, (40,) * 5, 0.089, 0.706),
        ((60,) * 5, (10,) * 5, 0.181, 0.631),
    ],
)
def test_null_table_of_the_reference_page(sizes, positives, gap, scaled):
    rng = np.random.default_rng(0)
    gaps, scales, nulls = [], [], []
    for run in range(240):
        store, codes = equal_groups(rng, sizes, positives)
        levels = [str(group) for group in range(len(sizes))]
        inside = torch.nn.functional.one_hot(codes).double()
        rates = AurocGap().rates(store, CONTEXT)
        groups, overall = rates.statistic(inside)[0], rates.statistic(torch.ones_like(inside[:, :1]))[0]
        gaps.append(float(groups.max() - groups.min()))
        scales.append(float(overall / (1 + (groups - overall).abs().sum())))
        if run < 6:
            nulls.append(AurocGap().difference(store, codes, levels, CONTEXT).null)
    error = np.std(gaps) / math.sqrt(len(gaps))
    # the page's own table has a simulation error too
    assert np.mean(gaps) == pytest.approx(gap, abs=3 * error + 0.002)
    assert np.mean(scales) == pytest.approx(scaled, abs=3 * np.std(scales) / math.sqrt(len(scales)) + 0.004)
    assert np.mean(nulls) == pytest.approx(np.mean(gaps), rel=0.12)


def test_p_values_of_equal_groups_are_uniform():
    rng, ps = np.random.default_rng(1), []
    for _ in range(60):
        store, codes = equal_groups(rng, (100,) * 3, (40,) * 3)
        ps.append(AccuracyGap().difference(store, codes, ABC, CONTEXT).p)
    assert 0.38 < np.mean(ps) < 0.63
    assert np.mean(np.array(ps) <= 0.1) < 0.22


def test_the_unit_of_permutation_is_the_patient():
    # 60 patients, all right or all wrong: between images the gap looks significant, between patients it does not
    rng = np.random.default_rng(2)
    patient_wrong = np.zeros(60, dtype=bool)
    patient_wrong[:9], patient_wrong[30:34] = True, True
    wrong = np.repeat(patient_wrong, 20)
    labels = rng.integers(0, 2, 1200)
    scores = np.where(wrong, 1 - 2 * labels, 2 * labels - 1)
    codes = torch.arange(1200) // 600
    plain = AccuracyGap().difference(two_classes(labels, scores), codes, ABC[:2], CONTEXT)
    clustered = AccuracyGap().difference(
        two_classes(labels, scores, clusters=torch.arange(1200) // 20), codes, ABC[:2], CONTEXT
    )
    assert plain.p < 0.002
    assert clustered.p > 0.1
    assert clustered.null > 3 * plain.null
    assert (plain.estimate.low > 0, clustered.estimate.low) == (True, 0.0)
    # of two groups of patients the gap's error is that of a difference of means
    rates = patient_wrong.reshape(2, 30)
    error = math.sqrt(sum(rate.var() / 30 for rate in rates))
    assert clustered.estimate.high == pytest.approx(rates.mean(1)[0] - rates.mean(1)[1] + 2 * error, rel=0.03)


def test_a_patient_in_several_groups_is_as_many_units():
    store, codes = table_of(CELLS)
    mixed = dataclasses.replace(store, clusters=torch.arange(len(store)) % 100)
    made = AccuracyGap().difference(mixed, codes, ABC, CONTEXT)
    assert made.estimate.value == pytest.approx(0.25)
    assert 0 < made.p <= 1


def test_small_groups_are_listed_and_left_out():
    cells = (*CELLS, (0, 20, 20, 0), (0, 9, 60, 0), (0, 0, 0, 0))
    store, codes = table_of(cells)
    levels = ("A", "B", "C", "few", "no positives", "empty")
    for item in ALL:
        made = item().difference(store, codes, levels, CONTEXT)
        assert made.excluded == {"few": "group_too_small", "no positives": "group_too_small", "empty": "no_samples"}
        assert "not compared: few (group_too_small)" in made.estimate.method
        alone = item().difference(*table_of(CELLS), ABC, CONTEXT)
        assert made.estimate.value == alone.estimate.value
        assert made.estimate.n == (100 if item is WorstGroupAccuracy else 300)
        one = item().difference(store, codes.clamp(min=1), levels, CONTEXT)
        assert not math.isnan(one.estimate.value)
        none = item().compute(store, torch.where(codes < 1, 0, -1), levels, CONTEXT)[0].estimate
        assert (math.isnan(none.value), none.reason) == (True, "too_few_groups")
        assert "few (no_samples)" in none.method


def test_missing_groups_do_not_enter():
    store, codes = table_of(CELLS)
    for item in ALL:
        with_missing = item().difference(store, torch.where(codes == 2, -1, codes), ABC[:2], CONTEXT)
        without = item().difference(store.select(codes < 2), codes[codes < 2], ABC[:2], CONTEXT)
        assert with_missing == without


def test_a_group_without_one_of_several_classes_is_not_compared():
    rng = np.random.default_rng(3)
    labels = torch.from_numpy(rng.integers(0, 3, 300))
    codes = torch.arange(300) // 100
    labels[(codes == 2) & (labels == 2)] = 0
    logits = torch.from_numpy(rng.normal(size=(300, 3))) + torch.nn.functional.one_hot(labels, 3)
    store = PredictionStore(torch.arange(300), logits, labels, "multiclass")
    made = AurocGap().difference(store, codes, ABC, CONTEXT)
    assert made.excluded == {"C": "undefined_in_group"}
    assert set(AccuracyGap().difference(store, codes, ABC, CONTEXT).groups) == set(ABC)
    assert EqualisedOddsDifference().compute(store, codes, ABC, CONTEXT) == []
    assert DemographicParityDifference().difference(store, codes, ABC, CONTEXT) is None


def test_order_of_rows_changes_nothing():
    rng = np.random.default_rng(4)
    store, codes = equal_groups(rng, (80, 90, 100), (30, 30, 30))
    store = dataclasses.replace(store, clusters=torch.arange(270) // 3)
    order = torch.from_numpy(rng.permutation(270))
    for item in ALL:
        a = item().difference(store, codes, ABC, CONTEXT)
        b = item().difference(store.select(order), codes[order], ABC, CONTEXT)
        first, second = ((m.estimate.value, m.estimate.low, m.estimate.high, m.null, m.p) for m in (a, b))
        assert first == pytest.approx(second, abs=1e-12), item.name
    other = dataclasses.replace(CONTEXT, resampler=Resampler(seed=1))
    assert AccuracyGap().difference(store, codes, ABC, other).null != a.null


def test_the_interval_of_an_equity_scaled_value_is_that_of_the_bootstrap():
    rng = np.random.default_rng(5)
    store, codes = equal_groups(rng, (400, 400), (150, 150), d=1.0)
    store = two_classes(store.labels, store.logits[:, 1] + 1.2 * (2 * store.labels - 1) * (codes == 0))
    for item in (EquityScaledAuroc, AurocGap, AccuracyGap):
        made = item().difference(store, codes, ABC[:2], CONTEXT).estimate
        inside = torch.nn.functional.one_hot(codes).double()
        rates = item().rates(store, CONTEXT)

        def value(weights, rates=rates, item=item, inside=inside):
            groups = torch.stack([rates.statistic(weights * inside[:, [g]])[0] for g in range(2)])
            whole = rates.statistic(weights)[0]
            if item is EquityScaledAuroc:
                return whole / (1 + (groups - whole).abs().sum(0))
            return groups.amax(0) - groups.amin(0)

        drawn = Resampler().values(value, store.keys)
        assert made.high - made.low == pytest.approx(3.92 * float(drawn.std()), rel=0.08), item.name


def test_worst_group_is_corrected_for_having_been_picked():
    store, codes = table_of(CELLS)
    made = WorstGroupAccuracy().difference(store, codes, ABC, CONTEXT).estimate
    assert made.low < wilson(60, 100)[0] < wilson(60, 100)[1] < made.high
    assert "over 3 groups; B" in made.method
    assert (made.n, made.n_units) == (100, 100)


def test_reasons():
    store, codes = table_of(CELLS)
    bare = Context(Resampler())
    for item in (DemographicParityDifference, EqualisedOddsDifference):
        assert item().compute(store, codes, ABC, bare)[0].estimate.reason == "no_val"
    answers = dataclasses.replace(store, logits=torch.eye(2)[store.predicted], answers_only=True)
    for item in ALL:
        (made,) = item().compute(answers, codes, ABC, CONTEXT)
        (known,) = item().compute(store, codes, ABC, CONTEXT)
        if item.from_answers:
            assert made.estimate.value == pytest.approx(known.estimate.value)
        else:
            assert made.estimate.reason == "answers_only"
    with pytest.raises(ShapeError, match="one code a sample"):
        AccuracyGap().compute(store, codes[1:], ABC, CONTEXT)
    with pytest.raises(ShapeError, match="Name every group"):
        AccuracyGap().compute(store, codes, ABC[:2], CONTEXT)


def test_multilabel_accuracy_of_groups_is_of_decisions():
    rng = np.random.default_rng(6)
    labels = torch.from_numpy(rng.integers(-1, 2, (200, 3)))
    store = PredictionStore(torch.arange(200), torch.from_numpy(rng.normal(size=(200, 3))), labels, "multilabel")
    codes = torch.arange(200) % 2
    context = Context(Resampler())
    made = AccuracyGap().difference(store, codes, ABC[:2], context)
    known = [compute(store.select(codes == g), context, ["accuracy"])[0].estimate.value for g in (0, 1)]
    assert list(made.groups.values()) == pytest.approx(known, abs=1e-12)
    assert not math.isnan(WorstGroupAccuracy().compute(store, codes, ABC[:2], context)[0].estimate.low)


def test_group_table_lists_all_groups():
    store, codes = table_of((*CELLS, (0, 0, 0, 0), (3, 0, 0, 3)))
    codes = torch.where(codes == 2, -1, codes)
    rows = group_table(store, codes, ("A", "B", "gone", "empty", "few"), CONTEXT, ["accuracy", "auroc"])
    assert [(row.level, row.excluded) for row in rows[::2]] == [
        ("A", ""),
        ("B", ""),
        ("gone", "no_samples"),
        ("empty", "no_samples"),
        ("few", "group_too_small"),
        ("missing", "missing"),
    ]
    assert [row.value.metric for row in rows[:2]] == ["accuracy", "auroc"]
    assert rows[0].value.estimate.value == 0.85
    assert rows[4].value.estimate.reason == "no_samples"
    assert rows[8].value.estimate.value == 1.0  # small groups are shown all the same
    answers = dataclasses.replace(store, logits=torch.eye(2)[store.predicted], answers_only=True)
    assert (
        group_table(answers, codes.clamp(max=0), ("A",), CONTEXT, ["auroc"])[0].value.estimate.reason == "answers_only"
    )
    with pytest.raises(ConfigError, match="metrics on labels"):
        group_table(store, codes, ("A", "B", "gone", "empty", "few"), CONTEXT, ["accuracy-gap"])


def test_none_is_in_the_default_set():
    assert all(METRICS.get(item.name) is item and not item.default and item.on == "groups" for item in ALL)
