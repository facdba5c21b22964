import numpy as np
import pytest
import torch
from sklearn import metrics as oracle

from robustlab.core.registry import METRICS
from robustlab.metrics import Context, PredictionStore, Resampler
from robustlab.metrics.states import Bins, Confusion, Grid, Moments, answers
from robustlab.metrics.stats import linear_estimate

N = 3000
CONTEXT = Context(Resampler(replicates=20))


def binary(kind, n=N):
    """Logit of the positive class, label, patient."""
    rng = np.random.default_rng(4)
    label = (rng.random(n) < 0.3).astype(np.int64)
    score = rng.normal(size=n) + 1.2 * label
    if kind == "tied":
        score = np.round(score)
    if kind == "saturated":
        score = 30 * score
    return torch.from_numpy(score).float(), torch.from_numpy(label), torch.from_numpy(rng.integers(0, 150, n))


def store_of(score, label, cluster):
    logits = torch.stack([torch.zeros_like(score), score], 1)
    return PredictionStore(torch.arange(len(score)), logits, label, "binary", clusters=cluster)


def batches(n=N, size=700):
    return [slice(start, start + size) for start in range(0, n, size)]


@pytest.mark.parametrize("kind", ["random", "tied", "saturated"])
@pytest.mark.parametrize("make", [lambda: Grid.signed_log(), lambda: Grid.linear(-32, 32)], ids=["log", "linear"])
def test_scikit_learn_lies_in_a_narrow_bracket(kind, make):
    score, label, _ = binary(kind)
    grid = make()
    for rows in batches():
        grid.update(score[rows], label[rows])
    fpr, tpr, _ = oracle.roc_curve(label, score, drop_intermediate=False)
    exact = {
        "auroc": (oracle.roc_auc_score(label, score), 5e-4),
        "average_precision": (oracle.average_precision_score(label, score), 3e-3),
        "fpr95_pos": (fpr[np.argmax(tpr >= 0.95)], 2e-3),
    }
    for name, (wanted, width) in exact.items():
        bracket = getattr(grid, name)()
        assert float(bracket.low) - 1e-12 <= wanted <= float(bracket.high) + 1e-12, name
        if kind != "tied" and not (kind == "saturated" and grid.low < 0):
            assert float(bracket.error) < width, name


def test_the_error_bound_of_the_reference_page():
    rng = np.random.default_rng(0)
    n = 200_000
    label = rng.integers(0, 2, n)
    logit = 2 * rng.normal(size=n) + 1.5 * label
    exact = oracle.roc_auc_score(label, logit)
    for bins, error, bound in ((1024, 1e-4, 3e-3), (65536, 1e-6, 5e-5)):
        grid = Grid.linear(-16, 16, bins)
        grid.update(torch.from_numpy(logit), torch.from_numpy(label))
        bracket = grid.auroc()
        assert abs(float(bracket.value) - exact) < error
        assert float(bracket.error) < bound


@pytest.mark.parametrize("kind", ["random", "tied", "saturated"])
def test_streamed_numbers_are_those_of_the_stored_metrics(kind):
    score, label, cluster = binary(kind)
    store = store_of(score, label, cluster)
    bins, loss = Bins.empty(), Moments.empty(200)
    for rows in batches():
        part = store.select(torch.arange(N)[rows])
        bins.update(torch.sigmoid(part.log_odds[:, 1]), part.labels)
        loss.update(-part.log_probs.gather(1, part.labels[:, None])[:, 0], part.clusters)
    values = {name: METRICS.get(name)().point(store, CONTEXT)[""] for name in ("ece", "ece-null", "brier", "nll")}
    assert float(bins.ece()) == pytest.approx(values["ece"], abs=1e-9)
    assert float(bins.ece_null()) == pytest.approx(values["ece-null"], abs=1e-6)
    assert 2 * float(bins.brier()) == pytest.approx(values["brier"], abs=1e-9)
    assert float(bins.brier()) == pytest.approx(oracle.brier_score_loss(label, torch.sigmoid(score.double())), abs=1e-9)
    assert loss.estimate().value == pytest.approx(values["nll"], abs=1e-9)


def test_the_clustered_interval_is_that_of_the_stored_metric():
    store = store_of(*binary("random"))
    values = (store.probs[:, 1] - store.labels).square()
    moments = Moments.empty(150)
    moments.update(values, store.clusters)
    streamed = moments.estimate(bounds=(0.0, 1.0))
    stored = linear_estimate(store, lambda w: (values @ w) / w.sum(0), torch.ones_like(store.finite), bounds=(0.0, 1.0))
    assert (streamed.n, streamed.n_units, streamed.method) == (stored.n, stored.n_units, stored.method)
    for name in ("value", "low", "high"):
        assert getattr(streamed, name) == pytest.approx(getattr(stored, name), abs=1e-8)


@pytest.mark.parametrize("absent", [False, True], ids=["all classes", "class absent"])
def test_confusion_rates_are_those_of_scikit_learn(absent):
    rng = np.random.default_rng(1)
    label = rng.integers(0, 3 if absent else 5, N)
    logits = rng.normal(size=(N, 5)).round(1)
    logits[np.arange(N), label] += 1
    state = Confusion.empty(5)
    for rows in batches():
        state.update(answers(torch.from_numpy(logits[rows])), torch.from_numpy(label[rows]))
    answer = logits.argmax(1)
    names = list(range(5))
    table = oracle.confusion_matrix(label, answer, labels=names)
    assert np.array_equal(state.counts[0, :, :-1].numpy(), table)
    assert float(state.accuracy()) == pytest.approx(oracle.accuracy_score(label, answer), abs=1e-12)
    present = label if not absent else label[label < 3]
    recall = oracle.recall_score(present, answer, labels=names, average=None, zero_division=np.nan)
    np.testing.assert_allclose(state.recall()[0], recall, atol=1e-12)
    shared = {"labels": names, "average": None, "zero_division": np.nan}
    np.testing.assert_allclose(state.precision()[0], oracle.precision_score(label, answer, **shared), atol=1e-12)
    np.testing.assert_allclose(state.dice()[0], oracle.f1_score(label, answer, **shared), atol=1e-12)
    np.testing.assert_allclose(
        state.iou()[0], oracle.jaccard_score(label, answer, labels=names, average=None), atol=1e-12
    )


def test_a_detector_score_streams_to_both_orientations():
    rng = np.random.default_rng(2)
    inside, outside = torch.from_numpy(rng.normal(size=900)), torch.from_numpy(rng.normal(size=400) + 1)
    sides = [
        PredictionStore(torch.arange(len(s)), torch.zeros(len(s), 2), None, "binary", scores={"s": s})
        for s in (inside, outside)
    ]
    context = Context(Resampler(replicates=20), reference=sides[0])
    grid = Grid.signed_log()
    for score, positive in ((outside, 1), (inside, 0)):
        grid.update(score, torch.full_like(score, positive, dtype=torch.int64))
    for metric, name in (("auroc-ood", "auroc"), ("fpr95-ood-pos", "fpr95_pos"), ("fpr95-id-pos", "fpr95_neg")):
        wanted = METRICS.get(metric)().compute(sides[1], context)[0].estimate.value
        bracket = getattr(grid, name)()
        assert float(bracket.low) <= wanted <= float(bracket.high), metric
        assert float(bracket.error) < 0.002, metric
