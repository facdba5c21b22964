import dataclasses
import math
from itertools import permutations

import pytest
import torch
from scipy.stats import t

import robustlab.metrics.agreement  # noqa: F401 - registers
from robustlab.core.errors import ConfigError, RangeError
from robustlab.core.registry import METRICS
from robustlab.metrics import Context, Estimate, Frozen, Metric, PredictionStore, Resampler, compute, wilson
from robustlab.metrics.classification import ppv_at_prevalence
from robustlab.metrics.rankings import rank_keys
from robustlab.metrics.stats import delong, linearise, spread, unit_sums

OURS = [
    "accuracy", "top-3-accuracy", "top-5-accuracy", "balanced-accuracy", "sensitivity", "specificity", "ppv", "npv",
    "f1", "mcc", "kappa", "kappa-quadratic", "auroc", "auroc-weighted", "average-precision",
    "sensitivity-at-95-specificity",
]  # fmt: skip
SHAPES = [(2, "binary"), (7, "multiclass"), (3, "multilabel")]


def context(classes: int = 1, replicates: int = 60) -> Context:
    thresholds = torch.full((classes,), 0.45, dtype=torch.float64)
    return Context(Resampler(replicates=replicates), Frozen(thresholds=thresholds))


def context_of(store: PredictionStore) -> Context:
    return context(store.num_classes if store.task == "multilabel" else 1)


def one(store: PredictionStore, name: str, ctx: Context | None = None, target: str = "") -> Estimate:
    (value,) = [value for value in compute(store, ctx or context_of(store), [name]) if value.target == target]
    return value.estimate


def two_class(odds: list[float], labels: list[int]) -> PredictionStore:
    logits = torch.tensor([[0.0, z] for z in odds])
    return PredictionStore(torch.arange(len(odds)), logits, torch.tensor(labels), "binary")


def answered(labels: list[int], answers: list[int], classes: int) -> PredictionStore:
    logits = torch.nn.functional.one_hot(torch.tensor(answers), classes).float()
    return PredictionStore(torch.arange(len(labels)), logits, torch.tensor(labels), "multiclass")


def twice(store: PredictionStore, rows: torch.Tensor) -> PredictionStore:
    made = store.select(torch.cat([torch.arange(len(store)), rows]))
    return dataclasses.replace(made, ids=torch.arange(len(made)), clusters=None)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("classes", "task"), SHAPES)
def test_point_statistic_and_estimate_agree_and_weights_repeat(make_store, name: str, classes: int, task: str) -> None:
    store = make_store(150, classes, task=task)
    store = dataclasses.replace(store, logits=torch.round(store.logits, decimals=1))
    ctx, metric = context_of(store), METRICS.get(name)()
    assert isinstance(metric, Metric)
    values = {v.target: v.estimate for v in metric.compute(store, ctx)}
    point, statistics = metric.point(store, ctx), metric.statistics(store, ctx)
    applies = not (task == "multilabel" and name.startswith(("top", "kappa-q")))
    applies &= not (classes == 2 and name.startswith("top"))
    assert bool(values) == bool(point) == bool(statistics) == applies
    rows = torch.arange(0, 150, 4)
    weights = torch.ones((150, 2), dtype=torch.float64)
    weights[rows, 1] = 2
    repeated = metric.point(twice(store, rows), ctx)
    for target, estimate in values.items():
        made = statistics[target](weights).tolist()
        assert point[target] == pytest.approx(estimate.value, abs=1e-12)
        assert made == pytest.approx([estimate.value, repeated[target]], abs=1e-12)
        assert estimate.low < estimate.value < estimate.high
        assert not metric.smooth or estimate.high - estimate.low < 0.6


@pytest.mark.parametrize("name", [name for name in OURS if METRICS.get(name).smooth])
@pytest.mark.parametrize(("classes", "task"), SHAPES)
def test_duplicates_narrow_only_the_unclustered_interval(make_store, name: str, classes: int, task: str) -> None:
    store = make_store(150, classes, task=task)
    everyone = torch.arange(150)
    doubled = twice(store, everyone)
    patients = dataclasses.replace(doubled, clusters=everyone.repeat(2))
    for first, second, third in zip(
        *(compute(item, context_of(store), [name]) for item in (store, doubled, patients)), strict=True
    ):
        a, b, c = first.estimate, second.estimate, third.estimate
        assert b.value == pytest.approx(a.value, abs=1e-12)
        assert c.value == pytest.approx(a.value, abs=1e-12)
        assert b.high - b.low < 0.85 * (a.high - a.low)
        assert c.high - c.low > 0.85 * (a.high - a.low)


@pytest.mark.parametrize("name", ["auroc", "auroc-weighted"])
@pytest.mark.parametrize(("classes", "task"), [(7, "multiclass"), (3, "multilabel")])
@pytest.mark.parametrize("per_cluster", [0, 2])
def test_error_of_the_mean_area_is_that_of_its_derivatives(
    make_store, name: str, classes: int, task: str, per_cluster: int
) -> None:
    """P / (P - 1) on each side, instead of U / (U - 1) for all, vanishes with the number of samples."""
    store = make_store(6000, classes, task=task, per_cluster=per_cluster)
    metric = METRICS.get(name)()
    made, entered = metric._defined(store)
    values = torch.stack([metric._value(item) for item in made])
    linear = linearise(metric.statistics(store, context())[""], len(store))
    error, _ = spread(unit_sums(linear.influence, store.clusters, entered))
    assert metric._spread(store, made, values, 0.95)[0] == pytest.approx(error, rel=5e-3)


@pytest.mark.parametrize("per_cluster", [0, 3])
def test_the_mean_of_one_label_twice_has_the_interval_of_one(make_store, per_cluster: int) -> None:
    plain = make_store(90, 1, task="multilabel", per_cluster=per_cluster)
    twice = dataclasses.replace(plain, logits=plain.logits.repeat(1, 2), labels=plain.labels.repeat(1, 2))
    single, double = (one(store, "auroc") for store in (plain, twice))
    assert single.low < single.value < single.high
    middle = [math.log(end / (1 - end)) for end in (double.low, double.high)]
    known = plain.select(plain.labels[:, 0] >= 0)
    made = delong(known.logits[:, 0], known.labels[:, 0] == 1, known.clusters)
    slope = single.value * (1 - single.value)
    metric = METRICS.get("auroc")()
    items, _ = metric._defined(twice)
    values = torch.stack([metric._value(item) for item in items])
    error, freedom = metric._spread(twice, items, values, 0.95)
    assert error == pytest.approx(float(made.covariance[0, 0]) ** 0.5, rel=1e-9 if not per_cluster else 0.05)
    assert middle[1] - middle[0] == pytest.approx(2 * t.ppf(0.975, freedom) * error / slope, rel=1e-9)


@pytest.mark.parametrize("per_cluster", [0, 3])
def test_area_of_two_classes_is_delong(make_store, per_cluster: int) -> None:
    store = make_store(120, per_cluster=per_cluster, task="binary")
    theirs = delong(store.log_odds[:, 1], store.labels == 1, store.clusters).estimate()
    ours = one(store, "auroc")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert ours.method == theirs.method


def test_rare_labels_have_an_interval(make_store) -> None:
    store = make_store(200, 3, task="multilabel")
    labels = store.labels.clone()
    labels[:, 2] = 0
    labels[:4, 2] = 1
    rare = one(dataclasses.replace(store, labels=labels), "auroc", target="2")
    assert rare.low < rare.value < rare.high
    labels[:, 2] = 0
    missing = one(dataclasses.replace(store, labels=labels), "auroc", target="2")
    assert missing.reason == "single_class"
    assert "mean of 2 of 3 defined" in one(dataclasses.replace(store, labels=labels), "auroc").method


def test_scores_without_information() -> None:
    store = two_class([0.0] * 10, [0, 1] * 5)
    area = one(store, "auroc")
    assert (area.value, area.reason) == (0.5, "no_variance")
    assert one(store, "average-precision").value == 0.5
    assert one(store, "sensitivity-at-95-specificity").value == 0


def test_rank_keys_are_exact(make_store) -> None:
    store = make_store(300, 5)
    store = dataclasses.replace(store, logits=torch.round(4 * store.logits) / 4)
    rows = torch.arange(300)
    keys, odds = rank_keys(store, rows), store.log_odds.T
    for order in permutations(range(5), 5):
        changed = dataclasses.replace(store, logits=store.logits[:, list(order)])
        assert torch.equal(rank_keys(changed, rows), keys[list(order)])
    moved = dataclasses.replace(store, logits=store.logits + torch.arange(300)[:, None] % 7)
    assert torch.equal(rank_keys(moved, rows), keys)
    high = odds > 0
    torch.testing.assert_close(keys[high], odds[high], atol=1e-12, rtol=1e-12)
    below = torch.nn.functional.logsigmoid(odds[~high]) + math.log(2)
    torch.testing.assert_close(keys[~high], below, atol=1e-12, rtol=1e-12)


def test_rank_keys_of_extreme_logits() -> None:
    logits = torch.tensor([[1e4, 0, -1e4], [2e4, 0, 0], [60, 0, 0], [59, 0, 0], [0, 0, -900], [3, 3, -800.0]])
    store = PredictionStore(torch.arange(6), logits, torch.zeros(6, dtype=torch.long), "multiclass")
    first = rank_keys(store, torch.arange(6))[0].tolist()
    assert first == pytest.approx([1e4, 2e4 - math.log(2), 60 - math.log(2), 59 - math.log(2), 0, 0], abs=1e-12)
    assert first[4] == first[5] == 0


def test_top_answers_and_ties() -> None:
    logits = torch.tensor([[4.0, 3, 2, 1, 0, 0, 0]] * 4 + [[1.0] * 7] * 2 + [[math.nan, 1, 1, 1, 1, 1, 1]])
    labels = torch.tensor([0, 2, 3, 5, 2, 3, 2])
    store = PredictionStore(torch.arange(7), logits, labels, "multiclass")
    # of equal outputs the first three are the answers
    assert one(store, "top-3-accuracy").value == 3 / 7
    assert one(store, "top-5-accuracy").value == 5 / 7
    assert (one(store, "top-3-accuracy").low, one(store, "top-3-accuracy").high) == wilson(3, 7)
    large = -torch.arange(300.0).repeat(2, 1)
    many = PredictionStore(torch.arange(2), large, torch.tensor([257, 2]), "multiclass")
    assert one(many, "top-3-accuracy").value == 1 / 2
    three = answered([0, 1], [0, 1], 3)
    assert compute(three, context(), ["top-3-accuracy", "top-5-accuracy"]) == []


def test_predictive_values_are_shares_of_calls() -> None:
    store = two_class([2, 2, 2, -2, -2, math.nan], [1, 1, 0, 0, 1, 1])
    for name, hits, called in (("ppv", 2, 3), ("npv", 1, 2)):
        estimate = one(store, name)
        assert estimate.value == pytest.approx(hits / called)
        assert (estimate.low, estimate.high) == wilson(hits, called)
    # 2 TP, 1 FP, and two positives that were not called
    assert one(store, "f1").value == pytest.approx(4 / 7)
    assert one(two_class([-2, -3], [1, 0]), "ppv").reason == "none_called_positive"
    assert one(two_class([2, 3], [1, 0]), "npv").reason == "none_called_negative"
    assert one(two_class([2, 3], [0, 0]), "f1").reason == "no_positives"
    for name in ("ppv", "npv", "f1"):
        assert one(store, name, Context(Resampler(replicates=5))).reason == "no_val"


def test_ppv_at_a_prevalence() -> None:
    # sensitivity 3/4, specificity 4/5
    store = two_class([2, 2, 2, -2, 2, -2, -2, -2, -2], [1, 1, 1, 1, 0, 0, 0, 0, 0])
    made = ppv_at_prevalence(store, context(), 0.1)
    assert made.value == pytest.approx(0.075 / (0.075 + 0.2 * 0.9))
    assert made.low < made.value < made.high
    assert "at prevalence 0.1; threshold 0.45 frozen on val" in made.method
    at_data = ppv_at_prevalence(store, context(), 4 / 9)
    assert at_data.value == pytest.approx(one(store, "ppv").value)
    # the logit of PPV has variance var(log s) + var(log(1 - c)): delta method, with n / (n - 1) and the t quantile
    many = dataclasses.replace(twice(store, torch.arange(9).repeat(399)), clusters=None)
    wide = ppv_at_prevalence(many, context(), 0.1)
    spread = math.sqrt((1 / 4) / (3 / 4) / 1600 + (4 / 5) / (1 / 5) / 2000)
    centre = math.log(made.value / (1 - made.value))
    ends = [1 / (1 + math.exp(-(centre + side * 1.96 * spread))) for side in (-1, 1)]
    assert [wide.low, wide.high] == pytest.approx(ends, abs=2e-4)
    sure = ppv_at_prevalence(two_class([2, 2, -2, -2], [1, 1, 0, 0]), context(), 0.1)
    low = wilson(2, 2)[0]
    assert (sure.value, sure.high) == (1, 1)
    assert sure.low == pytest.approx(0.1 * low / (0.1 * low + 0.9 * (1 - low)))


def test_ppv_at_a_prevalence_refuses_and_explains() -> None:
    store = two_class([2, -2], [1, 1])
    assert ppv_at_prevalence(store, context(), 0.1).reason == "no_negatives"
    assert ppv_at_prevalence(store, Context(Resampler()), 0.1).reason == "no_val"
    assert ppv_at_prevalence(two_class([-2, -2], [1, 0]), context(), 0.1).reason == "none_called_positive"
    for wrong in (0.0, 1.0, math.nan):
        with pytest.raises(RangeError, match="prevalence"):
            ppv_at_prevalence(store, context(), wrong)
    with pytest.raises(ConfigError, match="class or label"):
        ppv_at_prevalence(store, context(), 0.1, "lung")


def test_agreement_closed_forms() -> None:
    # counts [[2, 1, 0], [0, 3, 1], [1, 0, 2]]
    truth, answers = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1, 2, 0, 2, 2]
    store = answered(truth, answers, 3)
    # rows 3, 4, 3; columns 3, 4, 3; sum t p = 34
    assert one(store, "mcc").value == pytest.approx((70 - 34) / (100 - 34))
    assert one(store, "kappa").value == pytest.approx(1 - 3 / (10 - 3.4))
    # squared distances: 1 + 1 + 4 observed; expected (3 4 + 4 3 + 4 3 + 3 4 + 4 (3 3 + 3 3)) / 10
    assert one(store, "kappa-quadratic").value == pytest.approx(1 - 6 / 12)
    assert one(store, "f1").value == pytest.approx((4 / 6 + 6 / 8 + 4 / 6) / 3)


def test_agreement_of_rows_that_are_not_finite() -> None:
    store = answered([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], 3)
    logits = store.logits.clone()
    logits[5] = math.nan
    store = dataclasses.replace(store, logits=logits)
    # the missing answer is a column of its own: t = 2, 2, 2; p = 2, 2, 1 and 1
    assert one(store, "mcc").value == pytest.approx((30 - 10) / math.sqrt(36 - 10) / math.sqrt(36 - 12))
    assert one(store, "kappa").value == pytest.approx(1 - 1 / (6 - 10 / 6))
    pairs = sum(t * p * ((i - j) / 2) ** 2 for i, t in enumerate((2, 2, 2)) for j, p in enumerate((2, 2, 1)))
    assert one(store, "kappa-quadratic").value == pytest.approx(1 - 1 / ((pairs + 6) / 6))
    assert one(store, "f1").value == pytest.approx((1 + 1 + 2 / 3) / 3)
    for name in ("mcc", "kappa", "kappa-quadratic", "f1"):
        assert METRICS.get(name)().point(store, context())[""] == pytest.approx(one(store, name).value, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in OURS if name not in ("accuracy", "mcc", "kappa", "kappa-quadratic")])
def test_a_replicate_that_lost_the_positives_is_undefined(name: str) -> None:
    store = two_class([2, 1, -1, 0.5, -2], [1, 1, 0, 0, 0])
    weights = torch.ones((5, 2), dtype=torch.float64)
    weights[:2, 1] = 0
    for statistic in METRICS.get(name)().statistics(store, context()).values():
        kept, lost = statistic(weights).tolist()
        assert not math.isnan(kept)
        assert math.isnan(lost) == (name not in ("specificity", "ppv", "npv"))


def test_a_replicate_that_lost_a_class_is_undefined() -> None:
    several = answered([0, 1, 2, 2], [0, 1, 2, 1], 3)
    weights = torch.tensor([[1.0, 1], [1, 0], [1, 1], [1, 1]], dtype=torch.float64)
    for each in ("f1", "balanced-accuracy", "auroc", "average-precision"):
        assert METRICS.get(each)().statistics(several, context())[""](weights).isnan().tolist() == [False, True]


def test_agreement_without_variance() -> None:
    assert one(answered([1, 1, 1], [1, 0, 1], 3), "mcc").reason == "single_class"
    assert one(answered([0, 1, 2], [1, 1, 1], 3), "mcc").reason == "no_variance"
    assert one(answered([0, 1, 2], [1, 1, 1], 3), "kappa").value == 0
    assert one(answered([1, 1, 1], [1, 1, 1], 3), "kappa").reason == "single_class"
    perfect = one(answered([0, 1, 2], [0, 1, 2], 3), "mcc")
    assert (perfect.value, perfect.reason) == (1, "no_variance")


def test_average_precision_at_the_ends() -> None:
    assert one(two_class([1, 2], [0, 0]), "average-precision").reason == "no_positives"
    every = one(two_class([1, 2], [1, 1]), "average-precision")
    assert (every.value, every.reason) == (1, "no_variance")
    # precision 1 at the best positive, 2/3 at the next
    assert one(two_class([3, 2, 1, 0], [1, 0, 1, 0]), "average-precision").value == pytest.approx((1 + 2 / 3) / 2)


def test_sensitivity_at_a_specificity_that_is_reached_exactly() -> None:
    # 20 negatives: one may lie at or above the threshold
    negatives, labels = [float(i) for i in range(20)], [0] * 20 + [1] * 4
    made = one(two_class([*negatives, 17.5, 18.0, 18.5, 30.0], labels), "sensitivity-at-95-specificity")
    assert made.value == 2 / 4
    assert "; specificity 0.95" in made.method
    # a positive that ties with the last negative allowed shares its threshold
    tied = one(two_class([*negatives, 19.0, 18.0, 17.0, 30.0], labels), "sensitivity-at-95-specificity")
    assert tied.value == 2 / 4
    few = one(two_class([0, 1, 2, 3], [0, 0, 1, 1]), "sensitivity-at-95-specificity")
    assert (few.value, few.low, few.high) == (1, *wilson(2, 2))
    assert "; specificity 1" in few.method


def test_accuracy_type_metrics_know_answers(make_store) -> None:
    store = answered([0, 0, 1, 1, 1], [0, 1, 1, 1, 0], 2)
    store = dataclasses.replace(store, task="binary", answers_only=True)
    ctx = Context(Resampler(replicates=5))
    assert one(store, "ppv", ctx).value == pytest.approx(2 / 3)
    assert one(store, "npv", ctx).value == pytest.approx(1 / 2)
    assert one(store, "f1", ctx).value == pytest.approx(4 / 6)
    assert one(store, "mcc", ctx).value == pytest.approx((15 - 13) / 12)
    for name in ("auroc", "average-precision", "sensitivity-at-95-specificity", "top-3-accuracy", "auroc-weighted"):
        assert one(store, name, ctx).reason == "answers_only"


def test_balanced_accuracy_of_clusters_is_linear(make_store) -> None:
    store = make_store(150, 4, per_cluster=3)
    estimate = one(store, "balanced-accuracy")
    assert estimate.method == "influence values over clusters"
    assert one(dataclasses.replace(store, clusters=None), "balanced-accuracy").method.startswith("wilson a class")
