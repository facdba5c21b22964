"""Metrics against scikit-learn and scipy."""

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, softmax
from scipy.stats import binomtest

from robustlab.metrics import Context, Frozen, PredictionStore, Resampler, compute, wilson
from robustlab.metrics.stats import rank_probability

sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is a development dependency")


def predictions(n: int, classes: int, seed: int, decimals: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, n, p=rng.dirichlet(np.full(classes, 3)))
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += 1
    return logits.round(decimals).astype(np.float32), labels


def values(
    logits: np.ndarray, labels: np.ndarray, task: str, frozen: Frozen | None = None
) -> dict[tuple[str, str], float]:
    store = PredictionStore(torch.arange(len(logits)), torch.from_numpy(logits), torch.from_numpy(labels).long(), task)
    names = ["accuracy", "balanced-accuracy", "sensitivity", "specificity", "auroc", "nll", "brier"]
    made = compute(store, Context(Resampler(replicates=2), frozen or Frozen()), names)
    return {(value.metric, value.target): value.estimate.value for value in made}


@pytest.mark.parametrize("decimals", [0, 1, 6])
@pytest.mark.parametrize("seed", range(3))
def test_two_classes(seed: int, decimals: int) -> None:
    logits, labels = predictions(300, 2, seed, decimals)
    frozen = Frozen(thresholds=torch.tensor([0.4], dtype=torch.float64))
    ours = values(logits, labels, "binary", frozen)
    z = logits.astype(np.float64)
    p, answer = expit(z[:, 1] - z[:, 0]), z.argmax(1)
    called = p >= 0.4
    assert ours["accuracy", ""] == sk.accuracy_score(labels, answer)
    assert ours["balanced-accuracy", ""] == pytest.approx(sk.balanced_accuracy_score(labels, answer), abs=1e-12)
    assert ours["sensitivity", ""] == sk.recall_score(labels, called)
    assert ours["specificity", ""] == sk.recall_score(labels, called, pos_label=0)
    assert ours["auroc", ""] == pytest.approx(sk.roc_auc_score(labels, z[:, 1] - z[:, 0]), abs=1e-12)
    assert ours["nll", ""] == pytest.approx(sk.log_loss(labels, p), abs=1e-9)
    assert ours["brier", ""] == pytest.approx(2 * sk.brier_score_loss(labels, p), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_several_classes(seed: int) -> None:
    logits, labels = predictions(400, 5, seed)
    ours = values(logits, labels, "multiclass")
    z = logits.astype(np.float64)
    p, answer = softmax(z, 1), z.argmax(1)
    assert ours["accuracy", ""] == sk.accuracy_score(labels, answer)
    assert ours["balanced-accuracy", ""] == pytest.approx(sk.balanced_accuracy_score(labels, answer), abs=1e-12)
    assert ours["auroc", ""] == pytest.approx(sk.roc_auc_score(labels, p, multi_class="ovr"), abs=1e-12)
    assert ours["nll", ""] == pytest.approx(-log_softmax(z, 1)[np.arange(400), labels].mean(), abs=1e-12)
    assert ours["nll", ""] == pytest.approx(sk.log_loss(labels, p, labels=range(5)), abs=1e-9)
    assert ours["brier", ""] == pytest.approx(((p - np.eye(5)[labels]) ** 2).sum(1).mean(), abs=1e-12)
    recalls = sk.recall_score(labels, answer, average=None, labels=range(5))
    assert [ours["sensitivity", str(k)] for k in range(5)] == pytest.approx(recalls, abs=1e-12)
    for k in range(5):
        tn, fp, _, _ = sk.confusion_matrix(labels == k, answer == k).ravel()
        assert ours["specificity", str(k)] == pytest.approx(tn / (tn + fp), abs=1e-12)


def test_absent_classes_agree_where_scikit_learn_leaves_them_out() -> None:
    logits, labels = predictions(200, 5, 0)
    labels = labels % 3
    ours = values(logits, labels, "multiclass")
    answer = logits.argmax(1)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        theirs = sk.balanced_accuracy_score(labels, answer)
    assert ours["balanced-accuracy", ""] == pytest.approx(theirs, abs=1e-12)
    p = softmax(logits.astype(np.float64), 1)
    parts = [sk.roc_auc_score(labels == k, p[:, k]) for k in range(3)]
    assert ours["auroc", ""] == pytest.approx(np.mean(parts), abs=1e-12)


def test_multilabel() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 2, (300, 4))
    logits = (rng.normal(size=(300, 4)) + labels).round(1).astype(np.float32)
    labels[:, 3] = np.minimum(labels[:, 3], 0)
    frozen = Frozen(thresholds=torch.tensor([0.3, 0.5, 0.7, 0.5], dtype=torch.float64))
    ours = values(logits, labels, "multilabel", frozen)
    p = expit(logits.astype(np.float64))
    known = labels >= 0
    called = p >= frozen.thresholds.numpy()
    assert ours["accuracy", ""] == pytest.approx((called == labels)[known].mean(), abs=1e-12)
    columns = [(labels[known[:, i], i], p[known[:, i], i], called[known[:, i], i]) for i in range(4)]
    areas = [sk.roc_auc_score(y, s) for y, s, _ in columns[:3]]
    assert [ours["auroc", str(i)] for i in range(3)] == pytest.approx(areas, abs=1e-12)
    assert np.isnan(ours["auroc", "3"])
    assert ours["auroc", ""] == pytest.approx(np.mean(areas), abs=1e-12)
    balanced = [sk.balanced_accuracy_score(y, c) for y, _, c in columns[:3]]
    assert ours["balanced-accuracy", ""] == pytest.approx(np.mean(balanced), abs=1e-12)
    losses = [sk.log_loss(y, s, labels=[0, 1]) for y, s, _ in columns]
    assert ours["nll", ""] == pytest.approx(np.mean(losses), abs=1e-9)
    briers = [((s - y) ** 2).mean() for y, s, _ in columns]
    assert ours["brier", ""] == pytest.approx(np.mean(briers), abs=1e-12)


def test_auroc_with_integer_weights_and_ties() -> None:
    rng = np.random.default_rng(1)
    scores, labels, weights = rng.integers(0, 6, 400) / 2, rng.integers(0, 2, 400), rng.integers(0, 4, (400, 5))
    positive, negative = (torch.from_numpy(np.sort(scores[labels == k])) for k in (1, 0))
    order = [np.flatnonzero(labels == k)[np.argsort(scores[labels == k], kind="stable")] for k in (1, 0)]
    sides = [torch.from_numpy(weights[rows]).double() for rows in order]
    ours = rank_probability(positive, negative)(sides[0], sides[1])
    theirs = [sk.roc_auc_score(labels, scores, sample_weight=weights[:, r]) for r in range(5)]
    assert ours.numpy() == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (20, 20), (617, 624), (1, 1)])
def test_wilson_against_scipy(k: int, n: int) -> None:
    theirs = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
