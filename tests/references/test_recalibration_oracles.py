"""Recalibrations against scipy, statsmodels, scikit-learn, betacal and netcal; netcal's faults are pinned."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_expit, log_softmax, softmax

from defenses.recalibration import (
    fit_beta,
    fit_dirichlet,
    fit_isotonic,
    fit_platt,
    fit_temperature,
    fit_vector,
)
from defenses.recalibration.isotonic import interpolate

SCALES = [0.05, 0.083, 1.0, 2.5, 10.0, 33.0, 100.0]


def problem(scale, classes=4, count=3000):
    rng = np.random.default_rng(0)
    truth = 2.0 * rng.normal(size=(count, classes))
    labels = np.array([rng.choice(classes, p=p) for p in softmax(truth, 1)])
    return truth * scale, labels


def optimum(loss):
    found = minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-10})
    return np.exp(-found.x)


@pytest.mark.parametrize("scale", SCALES)
def test_is_scipys_optimum(scale):
    z, y = problem(scale)
    best = optimum(lambda u: -log_softmax(np.exp(u) * z, 1)[np.arange(len(y)), y].mean())
    ours = fit_temperature(torch.from_numpy(z), torch.from_numpy(y), "multiclass")
    assert ours == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_is_scipys_optimum_for_several_labels_with_gaps(scale):
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(1500, 5)) * 2
    labels = (rng.uniform(size=truth.shape) < 1 / (1 + np.exp(-truth))).astype(np.int64)
    labels[rng.uniform(size=labels.shape) < 0.2] = -1
    z, known = truth * scale, labels >= 0
    best = optimum(lambda u: -log_expit(np.exp(u) * np.where(labels == 1, z, -z))[known].mean())
    ours = fit_temperature(torch.from_numpy(z), torch.from_numpy(labels), "multilabel")
    assert ours == pytest.approx(best, rel=1e-6)


def netcal_temperature(probabilities, labels):
    from netcal.scaling import TemperatureScaling

    method = TemperatureScaling()
    method.fit(probabilities, labels, random_state=0)
    return 1.0 / float(np.ravel(method.temperature)[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scale", [0.4, 2.5])
def test_is_netcals_answer_in_float64_and_netcal_does_nothing_in_float32(scale):
    z, y = problem(scale)
    ours = fit_temperature(torch.from_numpy(z), torch.from_numpy(y), "multiclass")
    state = torch.get_rng_state()
    wide = netcal_temperature(softmax(z, 1), y)
    narrow = netcal_temperature(softmax(z.astype(np.float32), 1), y)
    torch.set_rng_state(state)
    assert ours == pytest.approx(wide, rel=1e-5, abs=1e-5)
    assert narrow == pytest.approx(1.0, abs=1e-6), "netcal 1.4.0 is the identity on float32; if not, drop this pin"


@pytest.mark.filterwarnings("ignore")
def test_netcal_reports_the_inverse_temperature_and_loses_saturated_logits():
    from netcal.scaling import TemperatureScaling

    z, y = problem(2.5)
    state = torch.get_rng_state()
    method = TemperatureScaling()
    method.fit(softmax(z, 1), y, random_state=0)
    z, y = problem(33.4)
    saturated = netcal_temperature(softmax(z, 1), y)
    torch.set_rng_state(state)
    assert np.ravel(method.temperature)[0] == pytest.approx(1 / 2.5, rel=0.05)
    assert fit_temperature(torch.from_numpy(z), torch.from_numpy(y), "multiclass") == pytest.approx(33.4, rel=0.05)
    assert saturated == pytest.approx(15.18, abs=0.05), "netcal 1.4.0 clips probabilities; if not, drop this pin"


# ---- two outcomes: Platt, beta, isotonic


def two(scale, kind="smooth", count=2000, seed=0):
    """Log-odds times a scale, shifted and bent, and outcomes; tied, or nearly without one outcome, if asked."""
    rng = np.random.default_rng(seed)
    odds = 1.5 * rng.normal(size=count) - (3.0 if kind == "rare" else 0.3)
    y = (rng.uniform(size=count) < expit(0.8 * odds + 0.2 * np.maximum(odds, 0) ** 2 + 0.5)).astype(np.int64)
    return scale * (np.round(odds, 0) if kind == "tied" else odds), y


def columns(odds, y):
    return torch.from_numpy(np.stack([np.zeros_like(odds), odds], 1)), torch.from_numpy(y), "binary"


@pytest.mark.parametrize("kind", ["smooth", "tied", "rare"])
@pytest.mark.parametrize("scale", SCALES)
def test_platt_is_the_logistic_regression_of_statsmodels_and_scikit_learn(scale, kind):
    import statsmodels.api as sm
    from sklearn.linear_model import LogisticRegression

    odds, y = two(scale, kind)
    (slope,), (intercept,) = (values.tolist() for values in fit_platt(*columns(odds, y)))
    wanted = sm.Logit(y, sm.add_constant(odds)).fit(disp=0, method="newton", maxiter=100, tol=1e-14).params
    assert (intercept, slope * scale) == pytest.approx((wanted[0], wanted[1] * scale), rel=1e-6, abs=1e-8)
    learned = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10000, solver="newton-cholesky")
    learned.fit(odds[:, None] / scale, y)
    assert (intercept, slope * scale) == pytest.approx((learned.intercept_[0], learned.coef_[0, 0]), rel=1e-5, abs=1e-6)


def test_platt_of_several_labels_is_one_regression_a_label():
    import statsmodels.api as sm

    rng = np.random.default_rng(2)
    z = 3 * rng.normal(size=(1500, 4)) + np.arange(4)
    y = (rng.uniform(size=z.shape) < expit(0.4 * z - 1)).astype(np.int64)
    y[rng.uniform(size=z.shape) < 0.3] = -1
    slope, intercept = fit_platt(torch.from_numpy(z), torch.from_numpy(y), "multilabel")
    for k in range(4):
        known = y[:, k] >= 0
        wanted = sm.Logit(y[known, k], sm.add_constant(z[known, k])).fit(disp=0, tol=1e-14).params
        assert (intercept[k].item(), slope[k].item()) == pytest.approx(tuple(wanted), rel=1e-6, abs=1e-8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["smooth", "tied", "rare"])
@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5])
def test_beta_is_betacal(scale, kind, monkeypatch):
    from betacal import BetaCalibration
    from sklearn.linear_model import LogisticRegression

    # its own regression stops at 1e-4
    exact = partial(LogisticRegression, tol=1e-12, max_iter=100000)
    monkeypatch.setattr("betacal.beta_calibration.LogisticRegression", exact)
    odds, y = two(scale, kind)
    theirs = BetaCalibration("abm")
    theirs.fit(expit(odds).reshape(-1, 1), y)
    a, b, _ = theirs.calibrator_.map_
    c = theirs.calibrator_.lr_.intercept_[0]
    (ours,) = fit_beta(*columns(odds, y)).numpy()
    assert ours == pytest.approx([a, b, c], abs=1e-4)
    mapped = expit(ours[0] * log_expit(odds) - ours[1] * log_expit(-odds) + ours[2])
    assert mapped == pytest.approx(theirs.predict(expit(odds).reshape(-1, 1)), abs=1e-5)


@pytest.mark.parametrize("kind", ["smooth", "tied", "rare"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bend", [0.0, 3.0, -3.0])
def test_beta_is_scipys_constrained_optimum(scale, kind, bend):
    odds, y = two(1.0, kind)
    odds = scale * (odds + bend * np.minimum(odds, 0) ** 2 * 0.1 - bend * np.maximum(odds, 0) ** 2 * 0.1)
    x = np.stack([log_expit(odds), -log_expit(-odds), np.ones_like(odds)], 1)
    size = np.sqrt((x**2).mean(0))

    def loss(theta):
        margin = x / size @ theta
        return -log_expit(np.where(y == 1, margin, -margin)).mean(), (x / size).T @ (expit(margin) - y) / len(y)

    options = {"ftol": 1e-16, "gtol": 1e-12, "maxiter": 10000, "maxfun": 100000}
    bounds = [(0, None), (0, None), (None, None)]
    best = minimize(loss, np.zeros(3), jac=True, bounds=bounds, method="L-BFGS-B", options=options)
    ours = fit_beta(*columns(odds, y))[0].numpy()
    assert ours[:2].min() >= 0
    assert loss(ours * size)[0] == pytest.approx(best.fun, abs=1e-9)
    assert loss(ours * size)[0] <= best.fun + 1e-10


@pytest.mark.parametrize("kind", ["smooth", "tied", "rare"])
@pytest.mark.parametrize("scale", SCALES)
def test_isotonic_is_scikit_learns_on_the_log_odds(scale, kind):
    from sklearn.isotonic import IsotonicRegression

    odds, y = two(scale, kind)
    knots, values, _ = fit_isotonic(*columns(odds, y))
    fresh = np.concatenate([odds, two(scale, seed=1)[0], [-1e6, 1e6]])
    ours = interpolate(torch.from_numpy(fresh)[:, None], knots, values)[:, 0].numpy()
    theirs = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(odds, y).predict(fresh)
    assert ours == pytest.approx(theirs, abs=1e-12)
    if scale == 1.0:  # on probabilities the steps are the same
        same = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(expit(odds), y).predict(expit(odds))
        assert ours[: len(odds)] == pytest.approx(same, abs=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_netcals_isotonic_gives_a_row_of_nan_where_every_class_was_never_seen():
    from netcal.binning import IsotonicRegression

    pairs = np.array([[0, 1], [1, 2], [2, 3], [3, 0]]).repeat(50, 0)
    p = np.full((200, 4), 1e-6)
    p[np.arange(200)[:, None], pairs] = [0.6, 0.4]
    method = IsotonicRegression()
    method.fit(p, pairs[:, 0])
    rows = method.transform(np.array([[0.25] * 4, [0.6, 0.4, 0.0, 0.0]]))
    assert np.isnan(rows[0]).all(), "netcal 1.4.0 divides 0 by 0; if not, drop this pin"
    assert rows[1] == pytest.approx([1, 0, 0, 0])


@pytest.mark.filterwarnings("ignore")
def test_netcals_histogram_fits_and_answers_with_two_rules():
    from netcal.binning import HistogramBinning

    p = np.array([0.1, 0.2, 0.3, 0.5, 0.5, 0.5, 0.8, 0.9])
    method = HistogramBinning(bins=2)
    method.fit(p, np.array([0, 0, 0, 1, 1, 1, 0, 1]))
    answers = method.transform(np.array([0.2, 0.5, 0.6]))
    assert answers == pytest.approx([0, 0, 0.8]), "0.5 was counted in the upper bin; if not, drop this pin"


# ---- several classes: vector scaling and Dirichlet calibration


def biased(scale, classes=4, count=2000):
    z, y = problem(1.0, classes, count)
    return scale * (z * np.linspace(0.6, 1.5, classes) + np.linspace(-1, 1, classes)), y


def nll(logits, y):
    return -log_softmax(logits, 1)[np.arange(len(y)), y].mean()


def precise(loss, start, size):
    """scipy's optimum in standardised parameters, from three methods in a row."""
    point = start
    for method in ("L-BFGS-B", "BFGS", "L-BFGS-B"):
        limits = {"ftol": 1e-16, "maxfun": 10**6} if method == "L-BFGS-B" else {}
        options = {"gtol": 1e-11, "maxiter": 20000, **limits}
        point = minimize(loss, point, jac=True, method=method, options=options).x
    return point / size


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("classes", [2, 5])
def test_vector_scaling_is_scipys_optimum(scale, classes):
    z, y = biased(scale, classes)
    size = np.concatenate([np.sqrt((z**2).mean(0)), np.ones(classes)])
    hits = np.eye(classes)[y]

    def loss(theta):
        w, b = np.split(theta / size, 2)
        log_q = log_softmax(z * w + b, 1)
        rest = (np.exp(log_q) - hits) / len(y)
        return -(log_q * hits).sum(1).mean(), np.concatenate([(rest * z).sum(0), rest.sum(0)]) / size

    best = precise(loss, np.zeros(2 * classes), size)
    weight, bias = fit_vector(torch.from_numpy(z), torch.from_numpy(y), "multiclass")
    assert nll(z * weight.numpy() + bias.numpy(), y) == pytest.approx(loss(best * size)[0], abs=1e-11)
    assert weight.numpy() == pytest.approx(best[:classes], rel=1e-4)
    assert bias.numpy() == pytest.approx(best[classes:] - best[classes:].mean(), abs=1e-4)


def test_vector_scaling_of_one_sigmoid_is_scikit_learns_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    odds, y = two(10.0)
    weight, bias = (values.tolist() for values in fit_vector(*columns(odds, y)))
    learned = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10000, solver="newton-cholesky")
    learned.fit(odds[:, None] / 10, y)
    assert (10 * weight[1], bias[1] - bias[0]) == pytest.approx(
        (learned.coef_[0, 0], learned.intercept_[0]), rel=1e-5, abs=1e-6
    )


@pytest.mark.filterwarnings("ignore")
def test_netcals_vector_scaling_agrees_in_double_precision_only():
    from netcal.scaling import LogisticCalibration

    z, y = biased(1.0)
    weight, bias = fit_vector(*(torch.from_numpy(values) for values in (log_softmax(z, 1), y)), "multiclass")
    ours = nll(log_softmax(z, 1) * weight.numpy() + bias.numpy(), y)
    state = torch.get_rng_state()
    losses = []
    for dtype in (np.float64, np.float32):
        p, method = softmax(z, 1).astype(dtype), LogisticCalibration()
        method.fit(p, y, random_state=0)
        losses.append(-np.log(method.transform(p)[np.arange(len(y)), y]).mean())
    torch.set_rng_state(state)
    assert ours <= losses[0] + 1e-9
    assert losses[1] == pytest.approx(nll(z, y), abs=1e-4), "netcal 1.4.0 is the identity on float32; or drop this pin"
    assert ours < losses[1] - 0.05


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("reg_lambda", "reg_mu"), [(1e-3, 1e-3), (0.1, 0.01)])
def test_dirichlet_is_scipys_optimum(scale, reg_lambda, reg_mu):
    z, y = biased(scale, 3)
    x = np.concatenate([log_softmax(z, 1), np.ones((len(y), 1))], 1)
    hits, off = np.eye(3)[y], np.concatenate([1 - np.eye(3), np.zeros((3, 1))], 1)
    penalty = off * reg_lambda / 6 + (1 - off - np.eye(3, 4)) * reg_mu / 3
    size = np.sqrt((x**2).mean(0))

    def loss(theta):
        point = theta.reshape(3, 4) / size
        log_q = log_softmax(x @ point.T, 1)
        gradient = (np.exp(log_q) - hits).T @ x / len(y) + 2 * penalty * point
        return (penalty * point**2).sum() - (log_q * hits).sum(1).mean(), (gradient / size).ravel()

    best = precise(loss, np.zeros(12), np.tile(size, 3))
    weight, bias = fit_dirichlet(*map(torch.from_numpy, (z, y)), "multiclass", reg_lambda=reg_lambda, reg_mu=reg_mu)
    ours = np.concatenate([weight.numpy(), bias.numpy()[:, None]], 1)
    value, gradient = loss((ours * size).ravel())
    assert value <= loss((best.reshape(3, 4) * size).ravel())[0] + 1e-10
    assert np.abs(gradient).max() < 1e-8
    assert softmax(x @ ours.T, 1) == pytest.approx(softmax(x @ best.reshape(3, 4).T, 1), abs=1e-5)
