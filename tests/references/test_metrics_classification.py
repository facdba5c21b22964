"""Discrimination metrics against scikit-learn, torchmetrics and MONAI, and where these differ from each other."""

import warnings

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

import robustlab.metrics.agreement
import robustlab.metrics.classification  # noqa: F401 - registers
from robustlab.core.registry import METRICS
from robustlab.metrics import Context, Frozen, PredictionStore, Resampler, compute

sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is a development dependency")
tm = pytest.importorskip("torchmetrics.functional.classification", reason="torchmetrics is a development dependency")

KINDS = ("random", "tied", "saturated", "float16", "absent")
SCALARS = (
    "accuracy", "balanced-accuracy", "f1", "mcc", "kappa", "kappa-quadratic", "auroc", "auroc-weighted",
    "average-precision", "top-3-accuracy",
)  # fmt: skip


def made(kind: str, classes: int, n: int = 400, seed: int = 0) -> PredictionStore:
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, n, p=rng.dirichlet(np.full(classes, 3)))
    if kind == "absent":
        labels = np.minimum(labels, classes - 3)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += 1
    if kind == "saturated":
        logits = 12 * logits + 18
    if kind == "tied":
        logits = np.round(logits)
    if kind == "float16":
        logits = logits.astype(np.float16)
    task = "binary" if classes == 2 else "multiclass"
    return PredictionStore(torch.arange(n), torch.from_numpy(logits).float(), torch.from_numpy(labels), task)


def values(store: PredictionStore, names: list[str], frozen: Frozen | None = None) -> dict[tuple[str, str], float]:
    """Values of compute, which must be those of point."""
    context = Context(Resampler(replicates=2), frozen or Frozen())
    found = {(v.metric, v.target): v.estimate.value for v in compute(store, context, names)}
    for name in names:
        for target, value in METRICS.get(name)().point(store, context).items():
            assert value == pytest.approx(found[name, target], abs=1e-12), (name, target)
    return found


def log_odds(store: PredictionStore) -> np.ndarray:
    """Log-odds by another way: one class at a time, in extended precision."""
    z = store.logits.numpy().astype(np.longdouble)
    out = np.empty(z.shape)
    for k in range(z.shape[1]):
        rest = np.delete(z, k, 1)
        top = rest.max(1)
        # sorted, so that the same numbers in another order make the same sum
        total = np.sort(np.exp(rest - top[:, None]), 1).sum(1)
        out[:, k] = ((z[:, k] - top) - np.log(total)).round(12)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_several_classes(kind: str, seed: int) -> None:
    store = made(kind, 5, seed=seed)
    ours = values(store, list(SCALARS))
    y, answers, odds = store.labels.numpy(), store.predicted.numpy(), log_odds(store)
    present = np.unique(y)
    areas = np.array([sk.roc_auc_score(y == k, odds[:, k]) for k in present])
    theirs = {
        "accuracy": sk.accuracy_score(y, answers),
        "balanced-accuracy": np.mean(sk.recall_score(y, answers, average=None, labels=present)),
        "f1": np.mean(sk.f1_score(y, answers, average=None, labels=present)),
        "mcc": sk.matthews_corrcoef(y, answers),
        "kappa": sk.cohen_kappa_score(y, answers),
        "kappa-quadratic": sk.cohen_kappa_score(y, answers, weights="quadratic", labels=range(5)),
        "auroc": areas.mean(),
        "auroc-weighted": np.average(areas, weights=np.bincount(y, minlength=5)[present]),
        "average-precision": np.mean([sk.average_precision_score(y == k, odds[:, k]) for k in present]),
    }
    for name, value in theirs.items():
        assert ours[name, ""] == pytest.approx(value, abs=1e-12), name
    # the first index wins a tie here, the last one there
    flipped = sk.top_k_accuracy_score(4 - y, store.logits.numpy()[:, ::-1], k=3, labels=range(5))
    assert ours["top-3-accuracy", ""] == pytest.approx(flipped, abs=1e-12)


def test_several_classes_of_probabilities() -> None:
    store = made("random", 5)
    ours = values(store, ["auroc", "auroc-weighted"])
    labels, p = store.labels.numpy(), softmax(store.logits.numpy().astype(np.float64), 1)
    assert ours["auroc", ""] == pytest.approx(sk.roc_auc_score(labels, p, multi_class="ovr"), abs=1e-12)
    weighted = sk.roc_auc_score(labels, p, multi_class="ovr", average="weighted")
    assert ours["auroc-weighted", ""] == pytest.approx(weighted, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_two_classes(kind: str) -> None:
    store = made(kind, 2)
    frozen = Frozen(thresholds=torch.tensor([0.4], dtype=torch.float64))
    names = ["f1", "ppv", "npv", "mcc", "kappa", "auroc", "auroc-weighted", "average-precision"]
    ours = values(store, names, frozen)
    y, z = store.labels.numpy(), store.logits.numpy().astype(np.float64)
    odds = z[:, 1] - z[:, 0]
    called = expit(odds) >= 0.4
    assert ours["f1", ""] == pytest.approx(sk.f1_score(y, called), abs=1e-12)
    assert ours["ppv", ""] == pytest.approx(sk.precision_score(y, called), abs=1e-12)
    assert ours["npv", ""] == pytest.approx(sk.precision_score(y, called, pos_label=0), abs=1e-12)
    assert ours["mcc", ""] == pytest.approx(sk.matthews_corrcoef(y, z.argmax(1)), abs=1e-12)
    assert ours["kappa", ""] == pytest.approx(sk.cohen_kappa_score(y, z.argmax(1)), abs=1e-12)
    assert ours["auroc", ""] == ours["auroc-weighted", ""] == pytest.approx(sk.roc_auc_score(y, odds), abs=1e-12)
    assert ours["average-precision", ""] == pytest.approx(sk.average_precision_score(y, odds), abs=1e-12)


def test_labels() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(-1, 2, (300, 4))
    logits = (rng.normal(size=(300, 4)) + labels).round(1).astype(np.float32)
    labels[:, 3] = np.minimum(labels[:, 3], 0)
    store = PredictionStore(torch.arange(300), torch.from_numpy(logits), torch.from_numpy(labels), "multilabel")
    frozen = Frozen(thresholds=torch.tensor([0.3, 0.5, 0.7, 0.5], dtype=torch.float64))
    functions = {
        "f1": lambda y, s, c: sk.f1_score(y, c),
        "mcc": lambda y, s, c: sk.matthews_corrcoef(y, c),
        "kappa": lambda y, s, c: sk.cohen_kappa_score(y, c),
        "ppv": lambda y, s, c: sk.precision_score(y, c),
        "npv": lambda y, s, c: sk.precision_score(y, c, pos_label=0),
        "auroc": lambda y, s, c: sk.roc_auc_score(y, s),
        "average-precision": lambda y, s, c: sk.average_precision_score(y, s),
    }
    ours = values(store, list(functions), frozen)
    called = expit(logits.astype(np.float64)) >= frozen.thresholds.numpy()
    columns = [
        (labels[known, i], logits[known, i], called[known, i]) for i in range(3) for known in [labels[:, i] >= 0]
    ]
    for name, function in functions.items():
        theirs = [function(*column) for column in columns]
        assert [ours[name, str(i)] for i in range(3)] == pytest.approx(theirs, abs=1e-12), name
        if name not in ("ppv", "npv", "kappa"):  # kappa of a label that does not occur is 0 by its formula
            assert ours[name, ""] == pytest.approx(np.mean(theirs), abs=1e-12), name
            assert np.isnan(ours[name, "3"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_sensitivity_at_specificity(kind: str, seed: int) -> None:
    name = "sensitivity-at-95-specificity"
    store = made("tied" if kind == "absent" else kind, 2, n=80, seed=seed)
    odds = store.log_odds[:, 1]
    fpr, tpr, _ = sk.roc_curve(store.labels.numpy(), odds.numpy(), drop_intermediate=False)
    negatives = int((store.labels == 0).sum())
    allowed = np.round(fpr * negatives) * 20 <= negatives
    assert values(store, [name])[name, ""] == pytest.approx(tpr[allowed].max(), abs=1e-12)
    ranks = torch.unique(odds, return_inverse=True)[1].double() / len(odds)
    theirs, _ = tm.binary_sensitivity_at_specificity(ranks, store.labels, 0.95, validate_args=False)
    # their rates are float32, so a specificity of exactly 95 % may be missed
    if not bool(np.any(np.round(fpr * negatives) * 20 == negatives)):
        assert float(theirs) == pytest.approx(tpr[allowed].max(), abs=1e-6)


def subset() -> PredictionStore:
    """Five classes of which three occur."""
    return made("absent", 5, n=500, seed=7)


def test_catalogue_7_absent_classes() -> None:
    store = subset()
    labels, answers, probs = store.labels, store.predicted, torch.softmax(store.logits.double(), 1)
    assert sorted(labels.unique().tolist()) == [0, 1, 2]
    assert set(answers.tolist()) == {0, 1, 2, 3, 4}
    ours = values(store, ["auroc", "average-precision", "balanced-accuracy", "f1", "mcc", "kappa", "kappa-quadratic"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # macro AUROC: torchmetrics counts an absent class as 0, scikit-learn refuses
        theirs = float(tm.multiclass_auroc(probs, labels, num_classes=5))
        assert theirs == pytest.approx(ours["auroc", ""] * 3 / 5, abs=1e-6)
        with pytest.raises(ValueError, match="Number of classes"):
            sk.roc_auc_score(labels, probs, multi_class="ovr")
        # macro AP: scikit-learn counts it as 0, torchmetrics drops it
        one_hot = np.eye(5)[labels]
        assert sk.average_precision_score(one_hot, probs) == pytest.approx(ours["average-precision", ""] * 3 / 5)
        kept = float(tm.multiclass_average_precision(probs, labels, num_classes=5))
        assert kept == pytest.approx(ours["average-precision", ""], abs=1e-6)
        # macro recall: torchmetrics counts classes that are only answered as 0
        assert sk.balanced_accuracy_score(labels, answers) == pytest.approx(ours["balanced-accuracy", ""], abs=1e-12)
        recall = float(tm.multiclass_accuracy(answers, labels, num_classes=5, average="macro"))
        assert recall == pytest.approx(ours["balanced-accuracy", ""] * 3 / 5, abs=1e-6)
        # macro F1: both take the classes of truth and answers together
        union = sk.f1_score(labels, answers, average="macro")
        assert union == pytest.approx(ours["f1", ""] * 3 / 5)
        assert float(tm.multiclass_f1_score(answers, labels, num_classes=5)) == pytest.approx(union, abs=1e-6)
        estimate = compute(store, Context(Resampler(replicates=2)), ["f1"])[0].estimate
        assert f"mean of 3 of 5 defined; {union:.4g} over 5 answered too" in estimate.method
        # the rest agree
        for name, function in (
            ("mcc", tm.multiclass_matthews_corrcoef),
            ("kappa", tm.multiclass_cohen_kappa),
        ):
            assert float(function(answers, labels, num_classes=5)) == pytest.approx(ours[name, ""], abs=1e-6)
        assert sk.matthews_corrcoef(labels, answers) == pytest.approx(ours["mcc", ""], abs=1e-12)
        quadratic = float(tm.multiclass_cohen_kappa(answers, labels, num_classes=5, weights="quadratic"))
        assert quadratic == pytest.approx(ours["kappa-quadratic", ""], abs=1e-6)


@pytest.mark.parametrize(("right", "theirs"), [(50, 1.0), (40, 0.212)])
def test_catalogue_7_one_class(right: int, theirs: float) -> None:
    labels = torch.ones(50, dtype=torch.long)
    answers = torch.cat([labels[:right], torch.zeros(50 - right, dtype=torch.long)])
    store = PredictionStore(torch.arange(50), torch.nn.functional.one_hot(answers, 3).float(), labels, "multiclass")
    for name in ("mcc", "auroc", "auroc-weighted"):
        estimate = compute(store, Context(Resampler(replicates=2)), [name])[0].estimate
        assert np.isnan(estimate.value)
        assert estimate.reason == "single_class"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sk.matthews_corrcoef(labels, answers) == 0
        assert float(tm.binary_matthews_corrcoef(answers, labels)) == pytest.approx(theirs, abs=5e-4)
        assert np.isnan(sk.roc_auc_score(labels, answers.double()))
        assert float(tm.binary_auroc(answers.double(), labels)) == 0


def test_catalogue_8_large_logits() -> None:
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 2, 20_000))
    odds = torch.from_numpy(rng.normal(18, 12, 20_000) + 18 * (labels.numpy() - 0.5)).float()
    store = PredictionStore(torch.arange(20_000), torch.stack([torch.zeros_like(odds), odds], 1), labels, "binary")
    ours = values(store, ["auroc"])["auroc", ""]
    assert ours == pytest.approx(sk.roc_auc_score(labels, odds.double()), abs=1e-12)
    # a float32 sigmoid is 1 above 17, and ranks are lost
    assert float(tm.binary_auroc(odds, labels)) < ours - 0.03
    several = PredictionStore(
        store.ids, torch.cat([store.logits, torch.full((20_000, 1), -200.0)], 1), labels, "multiclass"
    )
    assert values(several, ["auroc"])["auroc", ""] == pytest.approx(ours, abs=1e-12)


def test_catalogue_9_steps_and_trapezoid() -> None:
    rng = np.random.default_rng(1)
    labels = np.zeros(1000, dtype=np.int64)
    labels[:20] = 1
    odds = (rng.normal(size=1000) + 0.7 * labels).astype(np.float32)
    logits = torch.from_numpy(np.stack([np.zeros_like(odds), odds], 1))
    store = PredictionStore(torch.arange(1000), logits, torch.from_numpy(labels), "binary")
    ours = values(store, ["average-precision"])["average-precision", ""]
    assert ours == pytest.approx(sk.average_precision_score(labels, odds), abs=1e-12)
    assert float(tm.binary_average_precision(torch.from_numpy(expit(odds)), store.labels)) == pytest.approx(
        ours, abs=1e-6
    )
    precision, recall, _ = sk.precision_recall_curve(labels, odds)
    assert sk.auc(recall, precision) < ours - 0.003
    method = compute(store, Context(Resampler(replicates=2)), ["average-precision"])[0].estimate.method
    assert "; prevalence 0.02" in method


def test_catalogue_16_monai_with_float32_labels() -> None:
    monai = pytest.importorskip("monai.metrics", reason="MONAI is a development dependency")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 20_000)
    odds = (rng.normal(size=20_000) + 1.37 * labels).round(1).astype(np.float32)
    logits = torch.from_numpy(np.stack([np.zeros_like(odds), odds], 1))
    store = PredictionStore(torch.arange(20_000), logits, torch.from_numpy(labels), "binary")
    ours = values(store, ["auroc"])["auroc", ""]
    whole = monai.compute_roc_auc(torch.from_numpy(odds), store.labels)
    rough = monai.compute_roc_auc(torch.from_numpy(odds), store.labels.float())
    assert ours == pytest.approx(sk.roc_auc_score(labels, odds), abs=1e-12)
    assert whole == pytest.approx(ours, abs=1e-12)
    assert abs(rough - ours) > 1e-9


@pytest.mark.parametrize("classes", [2, 4])
def test_weights_of_scikit_learn(classes: int) -> None:
    store = made("tied", classes, n=200)
    weights = torch.from_numpy(np.random.default_rng(5).integers(0, 4, (200, 3))).double()
    frozen = Frozen(thresholds=torch.tensor([0.4], dtype=torch.float64)) if classes == 2 else Frozen()
    context = Context(Resampler(replicates=2), frozen)
    y, answers, odds = store.labels.numpy(), store.predicted.numpy(), log_odds(store)
    called = store.probs[:, 1].numpy() >= 0.4 if classes == 2 else answers
    average = "binary" if classes == 2 else "macro"
    ranked = (1,) if classes == 2 else range(classes)
    functions = {
        "f1": lambda w: sk.f1_score(y, called, average=average, sample_weight=w),
        "mcc": lambda w: sk.matthews_corrcoef(y, answers, sample_weight=w),
        "kappa": lambda w: sk.cohen_kappa_score(y, answers, sample_weight=w),
        "kappa-quadratic": lambda w: sk.cohen_kappa_score(y, answers, weights="quadratic", sample_weight=w),
        "auroc": lambda w: np.mean([sk.roc_auc_score(y == k, odds[:, k], sample_weight=w) for k in ranked]),
        "average-precision": lambda w: np.mean(
            [sk.average_precision_score(y == k, odds[:, k], sample_weight=w) for k in ranked]
        ),
    }
    for name, function in functions.items():
        ours = METRICS.get(name)().statistics(store, context)[""](weights)
        theirs = [function(weights[:, r].numpy()) for r in range(3)]
        assert ours.tolist() == pytest.approx(theirs, abs=1e-12), name
