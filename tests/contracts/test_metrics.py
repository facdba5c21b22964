"""What every registered metric keeps, whatever it measures. A metric that may break a rule is named here, with why."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustlab.core.registry import METRICS
from robustlab.metrics import PredictionStore
from robustlab.metrics.smooth import SmoothMetric
from robustlab.metrics.stats import linearise
from tests.contracts.metric_cases import (
    KINDS,
    SEEDS,
    TASKS,
    Case,
    agree,
    agree_estimates,
    ask,
    case,
    degenerate,
    near,
    points,
    statistics,
)

NAMES = METRICS.names()
COUNTS = "depends on the number of samples by definition: "
OF_SIZE = {
    "ece-null": COUNTS + "the noise of n forecasts falls as 1 / sqrt(n)",
    "ece-excess": COUNTS + "it holds ece-null",
    "ece-debiased": COUNTS + "the correction divides by n - 1",
    "aurc": COUNTS + "a mean over 1 to n accepted samples, of which one step is 1 / n",
    "augrc": COUNTS + "a mean over 1 to n accepted samples, of which one step is 1 / n",
    "coverage-at-risk": COUNTS + "coverage goes in steps of 1 / n",
    "risk-at-coverage": COUNTS + "ceil(0.8 n) samples are accepted",
} | {name: COUNTS + "small groups are not compared" for name, item in METRICS.items() if item.on == "groups"}
OF_RANKS = {
    "mce": COUNTS + "bins below 10 samples do not enter",
    "ece-equal-mass": COUNTS + "bins end at whole ranks, ceil(m N / M)",
}
ORDERED: dict[str, str] = {"kappa-quadratic": "classes are grades in order"}
SAFE = "not reached, it still has an end: the amount up to which it is safe"
ONE_END = {
    "failure-threshold": SAFE,
    "failure-threshold-sensitivity": SAFE,
    "minimal-budget": "not reached, the largest budget tested is still below it",
}
TOLD_BESIDE = {"coverage-at-risk": "0 with the reason that no coverage meets the risk"}
POINT_OUTSIDE: dict[str, str] = {
    "ece": "reflected about the estimate, which carries the sampling bias once",
    "sensitivity-at-95-specificity": "percentiles of the 12 replicates that there are here",
}

EVERY = pytest.mark.parametrize("name", NAMES)
FEW = settings(max_examples=4, deadline=None)
FINITE_KINDS = [kind for kind in KINDS if "gaps" not in kind]


def cases(kinds=tuple(KINDS), smooth=False):
    return st.builds(case, st.sampled_from(kinds), st.integers(0, SEEDS - 1), smooth=st.just(smooth))


def relogit(change):
    return lambda store: dataclasses.replace(store, logits=change(store.logits))


def doubled(rows, patients=0):
    """Return a change of stores that appends ``rows`` again, as other samples of the same or of other patients."""

    def change(store):
        again = store.select(rows)
        clusters = None if again.clusters is None else again.clusters + patients
        again = dataclasses.replace(again, ids=again.ids + 10**9, clusters=clusters)
        return PredictionStore.concatenate([store, again])

    return change


@EVERY
@FEW
@given(made=cases(), seed=st.integers(0, 99))
def test_rows_in_another_order(name, made, seed):
    order = torch.randperm(len(made.store), generator=torch.Generator().manual_seed(seed))
    shuffled = made.mapped(lambda store: store.select(order))
    agree_estimates(ask(name, made), ask(name, shuffled), 1e-9)
    agree(points(name, made), points(name, shuffled), 1e-11)


@EVERY
@FEW
@given(made=cases(), cuts=st.lists(st.integers(0, 90), max_size=3))
def test_rows_in_batches(name, made, cuts):
    def joined(store):
        ends = [0, *sorted(cuts), len(store)]
        parts = [store.select(torch.arange(a, b)) for a, b in itertools.pairwise(ends)]
        return PredictionStore.concatenate(parts)

    agree_estimates(ask(name, made), ask(name, made.mapped(joined)), 0)


@EVERY
@FEW
@given(made=cases())
def test_every_sample_twice(name, made):
    if name in {**OF_SIZE, **OF_RANKS}:
        return
    agree(points(name, made), points(name, made.mapped(doubled(torch.arange(len(made.store))))), 1e-9)


@EVERY
@FEW
@given(made=cases(), seed=st.integers(0, 99))
def test_a_weight_of_two_is_a_sample_twice(name, made, seed):
    made_of = statistics(name, made)
    if name in {**OF_SIZE, **OF_RANKS} or not made_of:
        return
    n = len(made.store)
    units = torch.arange(n) if made.store.clusters is None else made.store.clusters
    count = int(units.max()) + 1
    # units are drawn whole, since some metrics count patients
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: count // 3]
    rows = torch.isin(units, chosen).nonzero()[:, 0]
    weights = torch.ones((n, 1), dtype=torch.float64)
    weights[rows] = 2
    twice = statistics(name, made.mapped(doubled(rows, patients=1000)))
    ones = torch.ones((n + len(rows), 1), dtype=torch.float64)
    agree(
        {place: float(item(weights)[0]) for place, item in made_of.items()},
        {place: float(item(ones)[0]) for place, item in twice.items()},
        1e-9,
    )


@EVERY
@FEW
@given(made=cases([kind for kind in KINDS if "multilabel" not in kind and "answers" not in kind]))
def test_a_constant_added_to_all_logits_of_a_row(name, made):
    n = len(made.store)
    constants = (torch.arange(n) % 17 - 8.0)[:, None]
    agree(points(name, made), points(name, made.mapped(relogit(lambda logits: logits + constants))), 1e-9)


@EVERY
@FEW
@given(
    made=cases([kind for kind in FINITE_KINDS if not kind.startswith("binary") and "answers" not in kind], smooth=True),
    order=st.permutations(range(3)),
)
def test_classes_in_another_order(name, made, order):
    if name in ORDERED:
        return
    classes = made.store.num_classes
    order = torch.tensor([*order, *range(3, classes)])
    names = tuple("abcd"[:classes])
    multilabel = made.store.task == "multilabel"

    def change(store):
        labels = store.labels[:, order] if multilabel else order.argsort()[store.labels]
        return dataclasses.replace(store, logits=store.logits[:, order], labels=labels)

    frozen = made.context.frozen
    thresholds = frozen.thresholds[order] if multilabel else frozen.thresholds
    renamed = made.mapped(
        change,
        class_names=tuple(names[index] for index in order.tolist()),
        frozen=dataclasses.replace(frozen, thresholds=thresholds),
    )
    named = dataclasses.replace(made, context=dataclasses.replace(made.context, class_names=names))
    agree(points(name, named), points(name, renamed), 1e-9)


@EVERY
@FEW
@given(made=cases(tuple(kind for kind in FINITE_KINDS if "answers" not in kind), smooth=True))
def test_float32_and_float64_logits(name, made):
    assert made.store.logits.dtype == torch.float64
    agree(points(name, made), points(name, made.mapped(relogit(lambda logits: logits.float()))), 1e-5)


@EVERY
@FEW
@given(made=cases())
def test_values_that_float16_holds_count_the_same_in_any_type(name, made):
    expect = points(name, made)
    for dtype in (torch.float16, torch.float64):
        store = made.mapped(relogit(lambda logits, dtype=dtype: logits.to(dtype)))
        assert bool(((store.store.logits == made.store.logits) | ~torch.isfinite(made.store.logits)).all())
        if made.shifted and any(bool((a.store.logits.abs() > 15).any()) for a in made.shifted):
            store = dataclasses.replace(store, shifted=made.shifted)
        agree(expect, points(name, store), 1e-12)


@EVERY
@FEW
@given(made=cases())
def test_no_metric_changes_what_it_is_given(name, made):
    made = made.mapped(relogit(lambda logits: logits.to(torch.float64)))
    stores = [made.store, made.reference, *(item.store for item in made.shifted)]
    kept = [(store.logits.clone(), store.scores["gappy"].clone(), store.labels.clone()) for store in stores]
    ask(name, made)
    points(name, made)
    for store, copies in zip(stores, kept, strict=True):
        for now, before in zip((store.logits, store.scores["gappy"], store.labels), copies, strict=True):
            assert torch.equal(now.nan_to_num(7.5), before.nan_to_num(7.5))


@EVERY
@FEW
@given(made=cases())
def test_value_point_and_statistic_are_one_number(name, made):
    metric = METRICS.get(name)()
    if metric.on in ("groups", "conditions", "attacks"):
        return
    values = {scorer or target: item.value for (target, scorer, _), item in ask(name, made).items()}
    fast = points(name, made)
    assert fast.keys() <= values.keys()
    for place, value in values.items():
        assert near(value, fast.get(place, math.nan), 1e-11), (place, value, fast)
    ones = torch.ones((len(made.store), 3), dtype=torch.float64)
    for place, item in statistics(name, made).items():
        got = item(ones)
        assert got.shape == (3,)
        assert got.dtype == torch.float64
        assert near(values[place], float(got[0]), 1e-11), place
        assert near(float(got[2]), float(got[0]), 1e-12), place


@EVERY
def test_rows_that_are_not_finite_enter_where_a_metric_says_so(name):
    metric = METRICS.get(name)()
    if metric.on != "labels" or metric.keeps_broken:
        return
    for task in TASKS:
        made = case(f"{task} gaps", 0)
        finite = int(made.store.finite.sum())
        assert finite < len(made.store)
        assert all(item.n <= finite for item in ask(name, made).values())
        # what stands in those rows is of no account
        other = made.store.logits.where(made.store.finite[:, None], math.inf)
        changed = dataclasses.replace(made, store=dataclasses.replace(made.store, logits=other))
        agree(points(name, made), points(name, changed), 1e-12)


@EVERY
@FEW
@given(made=cases())
def test_influence_values_sum_to_zero(name, made):
    if name in OF_SIZE or not getattr(METRICS.get(name), "smooth", False):
        return
    for place, item in statistics(name, made).items():
        line = linearise(item, len(made.store))
        scale = 1 + float(line.influence.abs().sum())
        assert math.isnan(line.value) or abs(float(line.influence.sum())) < 1e-10 * scale, place


def bounds_of(name, made):
    """Return target to the range of its values, where a metric states one."""
    metric = METRICS.get(name)()
    if not isinstance(metric, SmoothMetric) or made.store.answers_only:
        return {}
    parts = metric.parts(made.store, made.context)
    return {target: metric.bounds if part.bounds is None else part.bounds for target, part in parts.items()}


def sane(name, estimates, made, *, clusters):
    metric, bounds = METRICS.get(name), bounds_of(name, made)
    rows = len(made.store) + (len(made.reference) if metric.on == "ood" else 0)
    for place, item in estimates.items():
        told = (name, place, item)
        low, high = bounds.get(place[0], getattr(metric, "bounds", (-math.inf, math.inf)))
        parts = (item.value, item.low, item.high)
        if any(math.isnan(part) for part in parts):
            assert re.fullmatch(r"[a-z][a-z0-9_]*(\(.*\))?", item.reason), told
        assert not any(math.isinf(part) for part in parts), told
        if not math.isnan(item.value):
            assert low <= item.value <= high, told
        if math.isnan(item.value):
            ends = math.isnan(item.low) + math.isnan(item.high)
            assert ends == 2 or (name in ONE_END and ends == 1), told
        elif name in ONE_END and item.reason == "open_interval":
            assert math.isnan(item.low) or math.isnan(item.high), told
        elif not math.isnan(item.low):
            assert low <= item.low <= item.high <= high, told
            if name not in POINT_OUTSIDE:
                assert item.low - 1e-9 <= item.value <= item.high + 1e-9, told
            assert not item.reason or (name in TOLD_BESIDE and item.value == 0), told
        assert 0 <= item.n_units <= item.n <= rows, told
        if clusters is not None:
            assert item.n_units <= clusters, told
        elif metric.on in ("labels", "ood"):
            assert item.n_units == item.n, told


@EVERY
@FEW
@given(made=cases())
def test_numbers_are_in_range_or_have_a_reason(name, made):
    clusters = None
    if made.store.clusters is not None:
        clusters = len(made.store.clusters.unique())
        if METRICS.get(name).on == "ood":
            clusters += len(made.reference.clusters.unique())
    sane(name, ask(name, made), made, clusters=clusters)


@EVERY
@pytest.mark.parametrize("task", TASKS)
def test_what_is_missing_is_told(name, task):
    whole = case(task, 0)
    clustered = case(f"{task} clustered", 0)
    for what, store in degenerate(task).items():
        like = whole if store.clusters is None else clustered
        shifted = tuple(dataclasses.replace(item, store=store) for item in like.shifted)
        for reference in (like.reference, store):
            context = dataclasses.replace(like.context, reference=reference)
            made = Case(store, reference, shifted, context)
            clusters = None
            if store.clusters is not None:
                clusters = len(store.clusters.unique())
                if METRICS.get(name).on == "ood":
                    clusters += len(reference.clusters.unique())
            try:
                sane(name, ask(name, made), made, clusters=clusters)
                points(name, made)
            except Exception as error:
                error.add_note(f"{name} on {task}: {what}")
                raise
            if METRICS.get(name).on != "ood":
                break


def test_exceptions_are_of_metrics_that_exist():
    assert {*OF_SIZE, *OF_RANKS, *ORDERED, *ONE_END, *TOLD_BESIDE, *POINT_OUTSIDE} <= set(NAMES)


def test_deterministic_algorithms_suffice():
    torch.use_deterministic_algorithms(True)
    try:
        for kind in ("binary clustered", "multiclass", "multilabel gaps"):
            for name in NAMES:
                ask(name, case(kind, 0))
    finally:
        torch.use_deterministic_algorithms(False)


def moved(store, device):
    def put(item):
        if isinstance(item, torch.Tensor):
            return item.to(device)
        return {key: put(value) for key, value in item.items()} if isinstance(item, dict) else item

    return PredictionStore(**{field.name: put(getattr(store, field.name)) for field in dataclasses.fields(store)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@EVERY
def test_both_devices_give_the_same_numbers(name):
    torch.use_deterministic_algorithms(True)
    try:
        for kind in KINDS:
            made = case(kind, 0)
            frozen = made.context.frozen
            cuts = None if frozen.thresholds is None else frozen.thresholds.cuda()
            there = made.mapped(lambda store: moved(store, "cuda"), frozen=dataclasses.replace(frozen, thresholds=cuts))
            agree_estimates(ask(name, made), ask(name, there), 1e-9)
    finally:
        torch.use_deterministic_algorithms(False)
