"""Selective prediction, uncertainty and OOD metrics against scikit-learn and pytorch-ood."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from robustlab.core.registry import METRICS
from robustlab.metrics import Context, PredictionStore, Resampler
from robustlab.metrics.risk_coverage import risk_coverage

pytorch_ood = pytest.importorskip("pytorch_ood.metrics")
functional = pytest.importorskip("pytorch_ood.metrics.functional")


def stores(
    inside: np.ndarray, outside: np.ndarray, right: np.ndarray | None = None
) -> tuple[PredictionStore, PredictionStore]:
    def make(scores: np.ndarray) -> PredictionStore:
        n = len(scores)
        logits = torch.tensor([[0.0, 1.0]]).repeat(n, 1)
        return PredictionStore(torch.arange(n), logits, None, "binary", scores={"s": torch.from_numpy(scores)})

    labels = None if right is None else torch.from_numpy(right.astype(np.int64))
    return dataclasses.replace(make(inside), labels=labels), make(outside)


def value(name: str, reference: PredictionStore, store: PredictionStore) -> float:
    context = Context(Resampler(), reference=reference)
    metric = METRICS.get(name)()
    (made,) = metric.compute(store, context)
    assert metric.point(store, context) == {"s": made.estimate.value}
    return made.estimate.value


def theirs(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    scores = torch.from_numpy(np.concatenate([inside, outside]))
    labels = torch.cat([torch.zeros(len(inside)), -torch.ones(len(outside))]).long()
    return pytorch_ood.OODMetrics().update(scores, labels).compute()


def sample(kind: str, seed: int, n: int = 400, m: int = 150) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    inside, outside = rng.normal(size=n), rng.normal(0.8, 1.4, m)
    if kind == "tied":
        return inside.round(), outside.round()
    if kind == "saturated":
        return np.tanh(9 * inside).round(6), np.tanh(9 * outside).round(6)
    if kind == "float32":
        return inside.astype(np.float32), outside.astype(np.float32)
    return (inside, outside) if kind == "random" else (inside, outside + 99)


KINDS = ("random", "tied", "saturated", "float32", "apart")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(400, 150), (40, 20), (19, 77)])
def test_ood_metrics(kind: str, n: int, m: int) -> None:
    inside, outside = sample(kind, n, n, m)
    pair = stores(inside, outside)
    truth, scores = np.repeat([0, 1], [n, m]), np.concatenate([inside, outside])
    other = theirs(inside, outside)
    auroc = value("auroc-ood", *pair)
    assert auroc == pytest.approx(sk.roc_auc_score(truth, scores), abs=1e-12)
    assert auroc == pytest.approx(other["AUROC"], abs=1e-12)
    assert value("aupr-ood-pos", *pair) == pytest.approx(sk.average_precision_score(truth, scores), abs=1e-12)
    assert value("aupr-id-pos", *pair) == pytest.approx(sk.average_precision_score(1 - truth, -scores), abs=1e-12)
    assert value("fpr95-ood-pos", *pair) == pytest.approx(other["FPR95TPR"], abs=1e-12)
    # the other orientation is theirs with sides and signs exchanged
    assert value("fpr95-id-pos", *pair) == pytest.approx(theirs(-outside, -inside)["FPR95TPR"], abs=1e-12)
    fpr, tpr, _ = sk.roc_curve(truth, scores, drop_intermediate=False)
    assert value("detection-error", *pair) == pytest.approx(((1 - tpr + fpr) / 2).min(), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_oscr(kind: str) -> None:
    inside, outside = sample(kind, 1)
    right = np.random.default_rng(2).random(400) < 0.8
    labels = torch.from_numpy(np.concatenate([right.astype(np.int64), -np.ones(150, dtype=np.int64)]))
    scores = torch.from_numpy(np.concatenate([inside, outside]))
    other = functional.oscr_score(scores, torch.ones(550, dtype=torch.int64), labels)
    assert value("oscr", *stores(inside, outside, right)) == pytest.approx(other, abs=1e-12)


def test_step_and_trapezoid_differ_where_positives_are_few() -> None:
    # disagreement case 9: pytorch-ood integrates the precision-recall curve by trapezoids
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=980), rng.normal(0.7, 1, 20)
    ours = value("aupr-ood-pos", *stores(inside, outside))
    other = theirs(inside, outside)["AUPR-OUT"]
    precision, recall, _ = sk.precision_recall_curve(np.repeat([0, 1], [980, 20]), np.concatenate([inside, outside]))
    assert other == pytest.approx(sk.auc(recall, precision), abs=1e-12)
    assert ours == pytest.approx(0.050501, abs=1e-6)
    assert other == pytest.approx(0.039015, abs=1e-6)


def test_orientation_decides_fpr95() -> None:
    # disagreement case 10: the same scores, with a tenth of the OOD samples that look more ID than ID
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=3000), rng.normal(1.5, 1, 1000)
    outside[:100] = rng.normal(-1.9, 0.3, 100)
    pair = stores(inside, outside)
    assert value("fpr95-ood-pos", *pair) == pytest.approx(0.975, abs=1e-6)
    assert value("fpr95-id-pos", *pair) == pytest.approx(0.581, abs=1e-6)


def test_one_side_is_an_error_there_and_a_reason_here() -> None:
    inside, outside = sample("random", 3)
    with pytest.raises(ValueError, match="ID"):
        theirs(inside, outside[:0])
    context = Context(Resampler(), reference=stores(inside, outside)[0])
    (made,) = METRICS.get("aupr-ood-pos")().compute(stores(inside, outside[:0])[1], context)
    assert made.estimate.reason == "no_samples"


@pytest.mark.parametrize("n", [50, 3000])
def test_risk_coverage_without_ties(n: int) -> None:
    rng = np.random.default_rng(n)
    sure, wrong = rng.normal(size=n), rng.random(n) < 0.2
    # the area under their curve of accuracy against response rate is 1 - AURC
    other = functional.aurra(torch.from_numpy(sure), torch.from_numpy(~wrong))
    assert float(risk_coverage(torch.from_numpy(sure), torch.from_numpy(wrong))[1].mean()) == pytest.approx(
        1 - other, abs=1e-12
    )


def test_tied_confidences_have_no_order() -> None:
    # disagreement case 12: what they return for ties depends on the order of the rows
    rng = np.random.default_rng(0)
    sure, wrong = rng.random(500).round(1), rng.random(500) < 0.2
    ours, other = set(), set()
    for order in (np.lexsort((wrong, sure)), np.lexsort((~wrong, sure))):
        parts = torch.from_numpy(sure[order]), torch.from_numpy(wrong[order])
        ours.add(round(float(risk_coverage(*parts)[1].mean()), 12))
        other.add(round(1 - functional.aurra(parts[0], ~parts[1]), 12))
    assert len(ours) == 1
    assert len(other) == 2


@pytest.mark.parametrize("decimals", [6, 1])
def test_failure_auroc(decimals: int) -> None:
    rng = np.random.default_rng(4)
    sure = rng.uniform(0.1, 3, 400).round(decimals).astype(np.float32)
    right = rng.random(400) < 0.5 + sure / 7
    logits = torch.from_numpy(np.stack([np.zeros_like(sure), sure], 1))
    store = PredictionStore(torch.arange(400), logits, torch.from_numpy(right.astype(np.int64)), "binary")
    found = METRICS.get("failure-auroc")().point(store, Context(Resampler()))[""]
    assert found == pytest.approx(sk.roc_auc_score(right, sure), abs=1e-12)
