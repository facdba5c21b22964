"""The fitted temperature against netcal and scipy."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, log_softmax, softmax

from defenses.recalibration import fit_temperature


def problem(scale, classes=4, count=3000):
    rng = np.random.default_rng(0)
    truth = 2.0 * rng.normal(size=(count, classes))
    labels = np.array([rng.choice(classes, p=p) for p in softmax(truth, 1)])
    return truth * scale, labels


def optimum(loss):
    found = minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-10})
    return np.exp(-found.x)


@pytest.mark.parametrize("scale", [0.1, 0.4, 2.5, 10.0, 50.0])
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
