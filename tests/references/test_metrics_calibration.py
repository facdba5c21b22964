"""Calibration metrics against relplot, uncertainty-calibration, scikit-learn, statsmodels, torchmetrics and numbers."""

import math

import numpy as np
import pytest
import torch

from robustlab.core.registry import METRICS
from robustlab.metrics import Context, PredictionStore, Resampler, bin_index
from robustlab.metrics.calibration import CalibrationGrid

CONTEXT = Context(Resampler())


def point(name: str, store: PredictionStore) -> dict[str, float]:
    return dict(METRICS.get(name)().point(store, CONTEXT))


def binary(odds: np.ndarray, labels: np.ndarray) -> PredictionStore:
    logits = torch.from_numpy(np.stack([np.zeros_like(odds), odds], 1))
    return PredictionStore(torch.arange(len(odds)), logits, torch.from_numpy(labels).long(), "binary")


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def draw(seed: int, n: int = 3000, scale: float = 1.6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.normal(-0.7, 1.5, n)
    return scale * true + 0.3, (rng.random(n) < sigmoid(true)).astype(int)


# ------------------------------------------------------------------------------------------------------- proper scores


@pytest.mark.parametrize("scale", [1.0, 15.0])
@pytest.mark.parametrize("classes", [2, 6])
def test_scores_of_scikit_learn(classes: int, scale: float) -> None:
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(classes)
    logits, labels = scale * rng.normal(size=(2000, classes)), rng.integers(0, classes - (classes > 2), 2000)
    if scale > 1:  # its log-loss clips at machine epsilon
        logits = logits.clip(-15, 15)
    p = torch.softmax(torch.from_numpy(logits), 1).numpy()
    store = PredictionStore(torch.arange(2000), torch.from_numpy(logits), torch.from_numpy(labels), "multiclass")
    every = np.arange(classes)
    assert point("nll", store)[""] == pytest.approx(sk.log_loss(labels, p, labels=every), rel=1e-9)
    theirs = sk.brier_score_loss(labels, p, labels=every, scale_by_half=False)
    assert point("brier", store)[""] == pytest.approx(theirs, abs=1e-12)


def test_nll_is_not_clipped() -> None:
    # scikit-learn's clip gives 36 / 2 for one of two that is wrong at p = 0
    store = binary(np.array([-800.0, 5.0]), np.array([1, 1]))
    assert point("nll", store)[""] == pytest.approx((800 + math.log1p(math.exp(-5))) / 2, rel=1e-12)


# ------------------------------------------------------------------------------------------------ clinical calibration


@pytest.mark.parametrize("seed", [0, 1])
def test_slope_and_intercept_of_statsmodels(seed: int) -> None:
    sm = pytest.importorskip("statsmodels.api")
    odds, labels = draw(seed)
    joint = sm.Logit(labels, sm.add_constant(odds)).fit(disp=0, tol=1e-12)
    fixed = sm.GLM(labels, np.ones_like(odds), family=sm.families.Binomial(), offset=odds).fit(tol=1e-12)
    store = binary(odds, labels)
    assert point("calibration-slope", store)[""] == pytest.approx(joint.params[1], abs=1e-8)
    assert point("calibration-intercept", store)[""] == pytest.approx(fixed.params[0], abs=1e-8)
    assert abs(joint.params[0] - fixed.params[0]) > 0.02  # the jointly fitted one is another number


def test_intervals_are_the_sandwich_of_statsmodels() -> None:
    sm = pytest.importorskip("statsmodels.api")
    odds, labels = draw(3)
    store = binary(odds, labels)
    for clusters in (None, np.arange(3000) // 5):
        more = {"cov_type": "HC0"}
        factor = 3000 / 2999
        if clusters is not None:
            more = {"cov_type": "cluster", "cov_kwds": {"groups": clusters, "use_correction": False}}
            factor = 600 / 599
        theirs = sm.Logit(labels, sm.add_constant(odds)).fit(disp=0, tol=1e-12, **more).bse[1] * math.sqrt(factor)
        codes = None if clusters is None else torch.from_numpy(clusters)
        made = PredictionStore(store.ids, store.logits, store.labels, "binary", clusters=codes)
        (value,) = METRICS.get("calibration-slope")().compute(made, CONTEXT)
        half = (value.estimate.high - value.estimate.low) / 2
        assert half / theirs == pytest.approx(1.96, abs=0.05)


def test_saturated_probabilities_do_not_break_the_slope() -> None:
    sm = pytest.importorskip("statsmodels.api")
    odds, labels = draw(4)
    odds[:30] *= 40  # their float64 probabilities are exactly 0 or 1
    assert ((sigmoid(odds[:30]) == 1) | (sigmoid(odds[:30]) < 1e-15)).any()
    joint = sm.Logit(labels, sm.add_constant(odds)).fit(disp=0, tol=1e-12, maxiter=200)
    assert point("calibration-slope", binary(odds, labels))[""] == pytest.approx(joint.params[1], abs=1e-6)


# ------------------------------------------------------------------------------------------------------- binned errors


def test_debiased_of_uncertainty_calibration() -> None:
    utils = pytest.importorskip("calibration.utils")
    odds, labels = draw(5)
    p = sigmoid(odds)
    index = bin_index(torch.from_numpy(p)).numpy()
    theirs = utils.unbiased_square_ce([list(zip(p[index == m], labels[index == m], strict=True)) for m in range(15)])
    assert point("ece-debiased", binary(odds, labels))[""] == pytest.approx(theirs, abs=1e-12)


def test_lattice_confidences_have_the_error_of_their_levels() -> None:
    # the catalogue's case 1: confidences k / 10 whose error alternates; rules that merge levels cancel it
    rng = np.random.default_rng(6)
    level = rng.integers(1, 10, 9000)
    p = level / 10
    q = p + np.where(level % 2 == 0, 0.09, -0.09)
    labels = (rng.random(9000) < q).astype(int)
    truth = sum(abs((p - labels)[level == k].sum()) for k in range(1, 10)) / 9000
    odds = (np.log(p) - np.log1p(-p)).astype(np.float32)
    got = torch.sigmoid(torch.from_numpy(odds).double())
    index = bin_index(got, 10)
    ours = sum(abs(float((got.numpy() - labels)[(index == m).numpy()].sum())) for m in range(10)) / 9000
    assert ours == pytest.approx(truth, abs=1e-6)
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    theirs = float(torchmetrics.binary_calibration_error(torch.from_numpy(p), torch.from_numpy(labels), n_bins=10))
    assert theirs < truth - 0.005


def test_torchmetrics_has_a_bin_of_its_own_for_certainty() -> None:
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    rng = np.random.default_rng(7)
    odds = rng.normal(0, 4, 4000)
    odds[:400] = 60.0  # p is exactly 1
    labels = (rng.random(4000) < sigmoid(odds / 3)).astype(int)
    labels[:400] = rng.random(400) < 0.6
    p = torch.from_numpy(sigmoid(odds))
    assert bool((p[:400] == 1).all())
    theirs = [
        float(torchmetrics.binary_calibration_error(p, torch.from_numpy(labels), n_bins=15, norm=norm))
        for norm in ("l1", "max")
    ]
    ours = [point(name, binary(odds, labels))[""] for name in ("ece", "mce")]
    top = (p > 14 / 15).numpy()
    merged = abs((p.numpy() - labels)[top].mean())
    assert ours[1] >= merged - 1e-12
    assert theirs[1] == pytest.approx(abs((p.numpy() - labels)[:400].mean()), abs=1e-6)
    assert theirs[1] > ours[1] + 0.01
    # without the sure ones both agree, to the float32 in which it counts
    keep = slice(400, None)
    again = float(torchmetrics.binary_calibration_error(p[keep], torch.from_numpy(labels[keep]), n_bins=15))
    assert point("ece", binary(odds[keep], labels[keep]))[""] == pytest.approx(again, abs=1e-6)


def test_positive_class_and_confidence_are_two_errors() -> None:
    # the catalogue's case 3: a model that is right about how sure to be, of the wrong class as often as it should
    rng = np.random.default_rng(8)
    odds = rng.normal(0, 1.5, 5000)
    correct = rng.random(5000) < sigmoid(np.abs(odds)) + np.where(odds > 0, -0.17, 0.17)
    labels = np.where(correct, odds > 0, odds <= 0).astype(int)
    store = binary(odds, labels)
    several = PredictionStore(
        store.ids, torch.cat([store.logits, torch.full((5000, 1), -1e4)], 1), store.labels, "multiclass"
    )
    assert point("ece", store)[""] > 0.1
    assert point("ece", several)[""] < 0.05


@pytest.mark.parametrize("n", [100, 200, 1000, 10_000])
def test_null_level_is_the_mean_of_simulated_calibrated_models(n: int) -> None:
    rng = np.random.default_rng(9)
    p = rng.beta(8, 1.2, n)
    index = np.ceil(p * 15).astype(int) - 1
    gaps = p - (rng.random((2000, n)) < p)
    mean = np.abs(gaps @ np.eye(15)[index]).sum(1).mean() / n
    null = point("ece-null", binary(np.log(p) - np.log1p(-p), np.zeros(n)))[""]
    sums = [math.sqrt((p * (1 - p))[index == m].sum()) for m in range(15)]
    assert null == pytest.approx(math.sqrt(2 / math.pi) * sum(sums) / n, abs=1e-9)
    assert null == pytest.approx(mean, rel=0.06 if n < 1000 else 0.025)  # normal sums in bins of a few are approximate


# -------------------------------------------------------------------------------------------------------------- smooth


@pytest.mark.parametrize("scale", [1.0, 1.6])
def test_smooth_error_of_relplot(scale: float) -> None:
    relplot = pytest.importorskip("relplot")
    odds, labels = draw(10, scale=scale)
    theirs = relplot.smECE(sigmoid(odds), labels, eps=1e-6)
    assert point("smooth-ece", binary(odds, labels))[""] == pytest.approx(theirs, abs=5e-4)


def by_hand(p: np.ndarray, labels: np.ndarray, width: float) -> float:
    """Return the smooth error at a width, with the images of every forecast at both ends, by quadrature."""
    t = np.linspace(0, 1, 4001)
    images, gaps = np.concatenate([p, -p, 2 - p]), np.tile(p - labels, 3)
    field = np.zeros_like(t)
    for rows in np.array_split(np.arange(len(images)), 30):
        kernel = np.exp(-(((t[:, None] - images[rows]) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
        field += kernel @ gaps[rows] / len(p)
    return float(np.trapezoid(np.abs(field), t))


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1])
def test_smooth_error_at_a_bandwidth(width: float, monkeypatch: pytest.MonkeyPatch) -> None:
    relplot = pytest.importorskip("relplot")
    odds, labels = draw(11, 1500)
    p = sigmoid(odds)
    grid = CalibrationGrid.of(torch.from_numpy(p), torch.from_numpy(labels == 1))
    assert grid.error(width) == pytest.approx(by_hand(p, labels, width), abs=1e-6)
    # away from the ends both agree, to its grid of 1001 points
    inner = p.clip(0.12, 0.88)
    grid = CalibrationGrid.of(torch.from_numpy(inner), torch.from_numpy(labels == 1))
    monkeypatch.setattr(relplot.config, "smECE_mesh_pts", 4001)
    assert grid.error(width) == pytest.approx(relplot.smECE_sigma(inner, labels, width), abs=1e-5)


def test_relplot_loses_half_of_what_lies_at_the_ends() -> None:
    # its grid is mirrored without the end points, where a forecast and its image coincide
    relplot = pytest.importorskip("relplot")
    odds, labels = draw(10, scale=4.0)
    p = sigmoid(odds)
    theirs, width = relplot.smECE(p, labels, eps=1e-6, return_width=True)
    exact = by_hand(p, labels, width)
    grid = CalibrationGrid.of(torch.from_numpy(p), torch.from_numpy(labels == 1))
    assert grid.error(width) == pytest.approx(exact, abs=1e-6)
    assert theirs > exact + 0.005
