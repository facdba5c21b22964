import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustlab.core.errors import ConfigError, UnknownNameError
from robustlab.core.registry import METRICS
from robustlab.metrics import (
    Context,
    Estimate,
    Frozen,
    PredictionStore,
    Resampler,
    compute,
    fit_frozen,
    fit_thresholds,
    wilson,
)

LABEL_METRICS = [name for name, item in METRICS.items() if item.on == "labels" and item.default]
OURS = [
    "accuracy", "top-3-accuracy", "top-5-accuracy", "balanced-accuracy", "sensitivity", "specificity", "ppv", "npv",
    "f1", "mcc", "kappa", "kappa-quadratic", "auroc", "auroc-weighted", "average-precision",
    "sensitivity-at-95-specificity",
]  # fmt: skip


def two_class(odds: list[float], labels: list[int], **more: object) -> PredictionStore:
    logits = torch.tensor([[0.0, z] for z in odds])
    return PredictionStore(torch.arange(len(odds)), logits, torch.tensor(labels), "binary", **more)


def context(**more: object) -> Context:
    return Context(Resampler(replicates=200), **more)


def one(store: PredictionStore, name: str, ctx: Context | None = None, target: str = "") -> Estimate:
    (value,) = [value for value in compute(store, ctx or context(), [name]) if value.target == target]
    return value.estimate


def test_every_name_of_the_first_release_is_registered() -> None:
    assert {
        "accuracy", "balanced-accuracy", "sensitivity", "specificity", "auroc", "nll", "brier", "ece", "ece-null",
        "silent-failure-rate", "referred-share", "auroc-ood", "fpr95-ood-pos", "fpr95-id-pos",
    } <= set(METRICS.names())  # fmt: skip


def test_accuracy_interval_is_wilson() -> None:
    estimate = one(two_class([1, 1, -1, -1], [1, 0, 0, 0]), "accuracy")
    assert (estimate.value, estimate.low, estimate.high) == (0.75, *wilson(3, 4))
    assert (estimate.n, estimate.n_units, estimate.effective_n) == (4, 4, 4)


def test_rows_that_are_not_finite_are_errors_or_left_out() -> None:
    nan, inf = math.nan, math.inf
    store = two_class([2, -2, 1, -1, nan, inf], [1, 0, 1, 0, 1, 0])
    ctx = context(frozen=Frozen(thresholds=torch.tensor([0.5], dtype=torch.float64), confidence=-1.0))
    assert one(store, "accuracy").value == pytest.approx(4 / 6)
    assert one(store, "accuracy").n == 6
    assert one(store, "balanced-accuracy").value == pytest.approx(2 / 3)
    assert one(store, "sensitivity", ctx).value == pytest.approx(2 / 3)
    assert one(store, "specificity", ctx).value == pytest.approx(2 / 3)
    clean = two_class([2, -2, 1, -1], [1, 0, 1, 0])
    for name in ("auroc", "nll", "brier", "ece", "ece-null"):
        estimate = one(store, name)
        assert estimate.n == 4
        assert estimate.value == pytest.approx(one(clean, name).value)


def test_all_rows_nan() -> None:
    store = two_class([math.nan] * 5, [0, 1, 0, 1, 1])
    assert one(store, "accuracy").value == 0
    assert one(store, "auroc").reason == "no_samples"
    assert one(store, "nll").reason == "no_samples"


def test_no_samples_is_undefined_everywhere(make_store) -> None:
    for classes, task in ((2, "binary"), (4, "multiclass"), (3, "multilabel")):
        empty = make_store(classes=classes, task=task).select(torch.zeros(200, dtype=torch.bool))
        ctx = context(frozen=fit_frozen(make_store(classes=classes, task=task), 0.1))
        values = compute(empty, ctx, [*LABEL_METRICS, *OURS])
        assert {value.metric for value in values} >= set(LABEL_METRICS)
        assert all(math.isnan(value.estimate.value) and value.estimate.reason == "no_samples" for value in values)


def test_single_class() -> None:
    store = two_class([1, 2, -1], [1, 1, 1])
    assert one(store, "auroc").reason == "single_class"
    assert one(store, "balanced-accuracy").value == pytest.approx(2 / 3)
    frozen = Frozen(thresholds=torch.tensor([0.5], dtype=torch.float64))
    assert one(store, "specificity", context(frozen=frozen)).reason == "no_negatives"
    assert math.isfinite(one(store, "nll").value)


def test_absent_classes_leave_the_mean() -> None:
    logits = torch.tensor([[3.0, 0, 1], [0, 3.0, 1], [0, 3.0, 1], [3.0, 0, 1]])
    store = PredictionStore(torch.arange(4), logits, torch.tensor([0, 1, 0, 0]), "multiclass")
    assert one(store, "balanced-accuracy").value == pytest.approx((2 / 3 + 1) / 2)
    assert "2 of 3 defined" in one(store, "auroc").method
    assert one(store, "sensitivity", target="2").reason == "no_positives"
    assert one(store, "specificity", target="2").value == 1
    named = context(class_names=("a", "b", "c"))
    assert [value.target for value in compute(store, named, ["sensitivity"])] == ["a", "b", "c"]


def test_without_val_there_is_no_threshold(make_store) -> None:
    for name in ("sensitivity", "specificity", "silent-failure-rate", "referred-share"):
        estimate = one(make_store(), name)
        assert math.isnan(estimate.value)
        assert estimate.reason == "no_val"


def test_youden_threshold_lies_midway_and_ties_take_the_lowest() -> None:
    def p(z: float) -> float:
        return 1 / (1 + math.exp(-z))

    assert fit_thresholds(two_class([-2, -1, 1, 2], [0, 0, 1, 1])).item() == pytest.approx((p(-1) + p(1)) / 2)
    # J = 1/2 at 1 and at 3: the lower one has the higher sensitivity
    assert fit_thresholds(two_class([0, 1, 2, 3], [0, 1, 0, 1])).item() == pytest.approx((p(0) + p(1)) / 2)
    # equal scores cannot be told apart: everybody is called positive
    assert fit_thresholds(two_class([1, 1], [0, 1])).item() == pytest.approx(p(1) / 2)
    assert fit_thresholds(two_class([1, 2], [1, 1])).isnan().all()
    assert fit_thresholds(two_class([1, math.nan, 2, 1], [0, 0, 1, 0])).item() == pytest.approx((p(1) + p(2)) / 2)


def test_thresholds_of_multilabel_and_multiclass(make_store) -> None:
    store = make_store(classes=3, task="multilabel")
    labels = store.labels.clone()
    labels[:, 1] = 0
    thresholds = fit_thresholds(dataclasses.replace(store, labels=labels))
    assert thresholds.dtype == torch.float64
    assert torch.isnan(thresholds).tolist() == [False, True, False]
    ctx = context(frozen=Frozen(thresholds=thresholds))
    assert one(store, "sensitivity", ctx, "1").reason == "val_single_class"
    assert "0.5 for 1 labels" in one(store, "accuracy", ctx).method
    assert fit_thresholds(make_store(classes=4)).shape == (0,)


def test_multilabel_accuracy_counts_annotated_decisions() -> None:
    logits = torch.tensor([[1.0, 1.0], [1.0, -1.0], [math.nan, -1.0]])
    labels = torch.tensor([[1, 0], [1, -1], [-1, 0]])
    store = PredictionStore(torch.arange(3), logits, labels, "multilabel")
    estimate = one(store, "accuracy")
    assert estimate.value == pytest.approx(2 / 4)
    assert (estimate.n, estimate.n_units) == (3, 3)
    assert "at 0.5" in estimate.method
    high = Frozen(thresholds=torch.tensor([0.9, 0.9], dtype=torch.float64))
    assert one(store, "accuracy", context(frozen=high)).value == pytest.approx(1 / 4)


def test_perfect_scores_keep_an_interval() -> None:
    store = two_class([-3, -2, -1, 1, 2, 3, 4], [0, 0, 0, 1, 1, 1, 1])
    for name in ("auroc", "balanced-accuracy"):
        estimate = one(store, name)
        assert (estimate.value, estimate.high) == (1, 1)
        assert 0.2 < estimate.low < 0.9
    assert one(store, "auroc").low == wilson(3, 3)[0]
    clustered = dataclasses.replace(store, clusters=torch.tensor([0, 0, 1, 1, 2, 2, 3]))
    for name in ("auroc", "balanced-accuracy", "accuracy"):
        assert one(clustered, name).low < one(clustered, name).high


def test_saturated_probabilities_do_not_tie() -> None:
    store = two_class([40, 50, 60, 70], [0, 0, 1, 1])
    assert float(store.probs[:, 1].min()) == 1
    assert one(store, "auroc").value == 1
    logits = torch.tensor([[z, 0, 1.0] for z in (40, 50, 60, 70)])
    assert store.log_odds[:, 1].tolist() == [40, 50, 60, 70]
    several = PredictionStore(torch.arange(4), logits, torch.tensor([1, 2, 0, 0]), "multiclass")
    assert several.log_odds[:, 0].diff().min() > 9
    expected = torch.log(several.probs[:, 1]) - torch.log1p(-several.probs[:, 1])
    torch.testing.assert_close(several.log_odds[:, 1], expected)


def test_names_select_and_unknown_names_are_refused(make_store) -> None:
    store = make_store()
    assert [value.metric for value in compute(store, context(), ["nll", "auroc-ood", "accuracy"])] == [
        "nll",
        "accuracy",
    ]
    with pytest.raises(UnknownNameError, match="accuracy"):
        compute(store, context(), ["acuracy"])
    unlabelled = dataclasses.replace(store, labels=None)
    assert compute(unlabelled, context()) == []
    with pytest.raises(ConfigError, match="labelled predictions"):
        METRICS.get("accuracy")().compute(unlabelled, context())


@pytest.mark.parametrize("per_cluster", [0, 3])
@pytest.mark.parametrize(("classes", "task"), [(2, "binary"), (4, "multiclass"), (3, "multilabel")])
def test_group_intervals_do_not_depend_on_the_rest(make_store, classes: int, task: str, per_cluster: int) -> None:
    store = make_store(90, classes, task=task, per_cluster=per_cluster)
    ctx = context(frozen=fit_frozen(make_store(300, classes, task=task, seed=9), 0.1, "noise"))
    rows = torch.arange(45)
    for a, b in zip(compute(store.select(rows), ctx), compute(store.select(rows.flip(0)), ctx), strict=True):
        assert (a.metric, a.target) == (b.metric, b.target)
        assert (a.estimate.value, a.estimate.low, a.estimate.high) == pytest.approx(
            (b.estimate.value, b.estimate.low, b.estimate.high), abs=1e-12, nan_ok=True
        )


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 60),
    shape=st.sampled_from([(2, "binary"), (3, "multiclass"), (2, "multilabel")]),
    cuts=st.lists(st.integers(0, 60), max_size=3),
)
def test_order_and_splits_change_nothing(
    make_store, seed: int, n: int, shape: tuple[int, str], cuts: list[int]
) -> None:
    store = make_store(n, shape[0], task=shape[1], seed=seed)
    rng = np.random.default_rng(seed)
    # coarse logits make ties
    store = dataclasses.replace(store, logits=torch.round(store.logits))
    ctx = Context(Resampler(replicates=60), fit_frozen(make_store(100, shape[0], task=shape[1], seed=1), 0.2, "noise"))
    pieces = torch.from_numpy(rng.permutation(n)).tensor_split(sorted(min(cut, n) for cut in cuts))
    parts = [store.select(piece) for piece in pieces]
    joined = PredictionStore(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.logits for part in parts]),
        torch.cat([part.labels for part in parts]),
        store.task,
        scores={name: torch.cat([part.scores[name] for part in parts]) for name in store.scores},
    )
    for a, b in zip(compute(store, ctx), compute(joined, ctx), strict=True):
        assert (a.metric, a.target, a.estimate.n, a.estimate.reason) == (
            b.metric,
            b.target,
            b.estimate.n,
            b.estimate.reason,
        )
        assert (a.estimate.value, a.estimate.low, a.estimate.high) == pytest.approx(
            (b.estimate.value, b.estimate.low, b.estimate.high), abs=1e-9, nan_ok=True
        )


def test_adding_a_constant_to_a_row_changes_nothing(make_store) -> None:
    store = make_store(classes=4)
    moved = dataclasses.replace(store, logits=store.logits + torch.arange(200)[:, None] % 7)
    for a, b in zip(compute(store, context()), compute(moved, context()), strict=True):
        assert a.estimate.value == pytest.approx(b.estimate.value, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_answer_is_the_first_of_equal_outputs(dtype: torch.dtype) -> None:
    logits = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (100_003, 9))).to(dtype)
    store = PredictionStore(torch.arange(len(logits)), logits, None, "multiclass")
    assert np.array_equal(store.predicted.numpy(), logits.numpy().argmax(1))  # NumPy takes the first
