"""Two-sample tests against closed forms and scipy; false alarms, also of patients with several images."""

import numpy as np
import pytest
import torch
from scipy.stats import binom, ks_2samp

from robustlab.core.errors import ShapeError
from robustlab.metrics.drift import ks_by_feature, mmd
from robustlab.metrics.stats import holm


def drawn(seed, count=40, width=5, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) + shift


def test_mmd_is_the_double_sum_over_pairs():
    x, y = drawn(0, 9), drawn(1, 7, shift=0.5)
    rows = torch.cat((x, y))
    width = np.median([float((a - b).square().sum()) for i, a in enumerate(rows) for b in rows[:i]])

    def kernel(a, b):
        return float(np.exp(-float((a - b).square().sum()) / width))

    def within(part):
        pairs = [kernel(a, b) for i, a in enumerate(part) for j, b in enumerate(part) if i != j]
        return sum(pairs) / (len(part) * (len(part) - 1))

    between = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    # torch's median of an even number of distances is the lower of the middle two
    assert mmd(x, y, permutations=9)[0] == pytest.approx(within(x) + within(y) - 2 * between, abs=0.01)


def test_mmd_of_two_points_each_is_its_closed_form():
    """Squared distances 0, 0, 4, 4, 4, 4 have the median 4: both sets at one point, the kernel between is 1/e."""
    x, y = torch.zeros(2, 1), torch.full((2, 1), 2.0)
    assert mmd(x, y, permutations=9)[0] == pytest.approx(2 - 2 * np.exp(-1), abs=1e-9)


def test_ks_is_scipys_feature_by_feature_also_with_ties():
    for x, y in ((drawn(0), drawn(1, 30)), (drawn(2).round(), drawn(3, 30).round())):
        statistic, p = ks_by_feature(x, y)
        for column in range(5):
            expected = ks_2samp(x[:, column].numpy(), y[:, column].numpy())
            assert float(statistic[column]) == pytest.approx(expected.statistic, abs=1e-12)
            assert float(p[column]) == pytest.approx(expected.pvalue, abs=1e-12)


def bounds(count, share=0.05):
    return binom.ppf([0.0005, 0.9995], count, share)


def test_false_alarms_are_as_many_as_promised():
    runs = 400
    alarms = {"mmd": 0, "ks": 0}
    for run in range(runs):
        x, y = drawn(2 * run), drawn(2 * run + 1, 25)
        alarms["mmd"] += mmd(x, y, permutations=99, seed=run)[1] <= 0.05
        alarms["ks"] += min(holm(ks_by_feature(x, y)[1].tolist())) <= 0.05
    low, high = bounds(runs)
    assert low <= alarms["mmd"] <= high
    assert alarms["ks"] <= high  # discrete: it may be below


def patients(seed, count=12, images=8):
    each = drawn(seed, count)
    noise = 0.3 * drawn(seed + 5000, count * images)
    return each.repeat_interleave(images, 0) + noise, torch.arange(count).repeat_interleave(images)


def test_patients_are_permuted_whole():
    runs = 200
    apart = together = 0
    for run in range(runs):
        (x, x_units), (y, y_units) = patients(2 * run), patients(2 * run + 1)
        together += mmd(x, y, reference_units=x_units, recent_units=y_units, permutations=99, seed=run)[1] <= 0.05
        apart += mmd(x, y, permutations=99, seed=run)[1] <= 0.05
    assert together <= bounds(runs)[1]
    assert apart > 0.5 * runs, "images of one patient taken as independent raise false alarms"


def test_the_least_p_value_is_that_of_the_relabellings_that_there_are():
    x, y = drawn(0, 20), drawn(1, 20, shift=5.0)
    assert mmd(x, y, permutations=199)[1] == 1 / 200
    # of two units on each side a third of all relabellings leave them together
    units = torch.arange(20) // 10
    assert mmd(x, y, reference_units=units, recent_units=units, permutations=199)[1] == pytest.approx(1 / 3, abs=0.1)


def test_what_moved_is_found():
    x, y = drawn(0, 80), drawn(1, 80)
    y[:, 3] += 1.5
    assert mmd(x, y)[1] < 0.01
    corrected = holm(ks_by_feature(x, y)[1].tolist())
    assert corrected[3] == min(corrected) < 1e-4
    assert min(corrected[:3] + corrected[4:]) > 0.05


def test_p_values_do_not_depend_on_the_global_generator():
    x, y = drawn(0), drawn(1)
    first = mmd(x, y, permutations=50)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        assert mmd(x, y, permutations=50) == first
    assert mmd(x, y, permutations=50, seed=1)[1] != first[1]


def test_sets_that_do_not_fit_are_refused():
    for x, y in ((drawn(0), drawn(1, width=4)), (drawn(0, 1), drawn(1)), (drawn(0)[0], drawn(1))):
        with pytest.raises(ShapeError, match="drift"):
            mmd(x, y)
        with pytest.raises(ShapeError, match="drift"):
            ks_by_feature(x, y)
