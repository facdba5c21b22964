"""McNemar, sign flips, swapped predictions, and p-values of a family."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from robustlab.core.errors import ConfigError, RangeError, ShapeError
from robustlab.metrics import Context, PredictionStore, Resampler
from robustlab.metrics.stats import holm, mcnemar, permutation_test, sign_flip_test

CONTEXT = Context(Resampler())


def pair(gains, losses, n, per_cluster=0):
    """Two models that differ in the first rows: the second gains some, then loses some."""
    labels = torch.arange(n) % 2
    answers = [labels.clone(), labels.clone()]
    answers[0][:gains] = 1 - labels[:gains]
    answers[1][gains : gains + losses] = 1 - labels[gains : gains + losses]
    clusters = torch.arange(n) // per_cluster if per_cluster else None
    return [
        PredictionStore(torch.arange(n), torch.eye(2)[answer], labels, "binary", clusters=clusters)
        for answer in answers
    ]


def test_mcnemar_known_values():
    assert mcnemar(9, 21, kind="exact") == pytest.approx(0.0428, abs=5e-5)
    assert mcnemar(9, 21) == mcnemar(21, 9) == pytest.approx(0.0294, abs=5e-5)
    assert mcnemar(0, 0) == mcnemar(0, 0, kind="exact") == 1
    assert mcnemar(7, 7) == mcnemar(7, 7, kind="exact") == 1
    assert mcnemar(0, 3, kind="exact") == 0.25
    assert mcnemar(0, 3) == 0.125
    with pytest.raises(RangeError, match="at least 0"):
        mcnemar(-1, 3)


def test_sign_flips_agree_with_the_exact_test():
    gains = torch.zeros(200)
    gains[:21], gains[21:30] = 1, -1
    found = sign_flip_test(gains, torch.arange(200), draws=20_000)
    assert found.p[0] == found.adjusted[0] == pytest.approx(mcnemar(9, 21, kind="exact"), abs=0.006)
    assert (found.n_units, found.draws) == (200, 20_000)


def test_sign_flips_agree_with_all_of_them():
    """Ten units with any gains: 1,024 sign patterns, whose shares are the p-value and its max-T form."""
    gains = torch.from_numpy(np.random.default_rng(3).normal(0.3, 1, (10, 3)))
    scaled = gains / gains.square().sum(0).sqrt()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=10)), dtype=torch.float64)
    drawn, seen = (signs @ scaled).abs(), scaled.sum(0).abs()
    exact = (drawn >= seen - 1e-12).double().mean(0)
    order = seen.argsort(descending=True).tolist()
    adjusted, reached = {}, 0.0
    for rank, k in enumerate(order):
        reached = max(reached, float((drawn[:, order[rank:]].amax(1) >= seen[k] - 1e-12).double().mean()))
        adjusted[k] = reached
    found = sign_flip_test(gains, torch.arange(10), draws=40_000)
    assert found.p == pytest.approx(exact.tolist(), abs=0.01)
    assert found.adjusted == pytest.approx([adjusted[k] for k in range(3)], abs=0.01)


def test_a_less_extreme_difference_is_never_adjusted_to_a_smaller_p():
    """One unit alone has |sum| = root of the sum of squares under any signs, so p = 1, and the second follows it."""
    lone, many = torch.zeros(25), torch.ones(25)
    lone[0], many[:10] = 1, -1
    found = sign_flip_test(torch.stack([lone, many], 1), torch.arange(25), draws=2000)
    assert found.p[0] == 1
    assert found.p[1] == pytest.approx(0.4244, abs=0.035)  # |X - 12.5| >= 2.5, binomial(25, 1/2)
    assert found.adjusted == (1, 1)


def test_draws_depend_on_the_unit_alone():
    gains = torch.from_numpy(np.random.default_rng(4).normal(0.01, 1, (5000, 2)))
    units = torch.arange(5000) * 13 % 1700
    order = torch.from_numpy(np.random.default_rng(5).permutation(5000))
    first = sign_flip_test(gains, units, draws=1500)
    assert sign_flip_test(gains[order], units[order], draws=1500) == first
    assert first.n_units == 1700
    assert sign_flip_test(gains, units, draws=1500, seed=1).p != first.p


def test_images_of_a_patient_are_flipped_together():
    gains = torch.ones(60)
    together = sign_flip_test(gains, torch.arange(60) // 20, draws=4000)
    assert together.p[0] == pytest.approx(0.25, abs=0.03)  # 2 of 8 sign patterns
    assert sign_flip_test(gains, torch.arange(60), draws=4000).p[0] == 1 / 4001


def test_size_of_the_sign_flip_test():
    rng, units = np.random.default_rng(6), torch.arange(40)
    p = [sign_flip_test(torch.from_numpy(rng.normal(size=40)), units, draws=199, seed=run).p[0] for run in range(600)]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.027)  # three standard errors


def test_max_t_holds_the_family_and_beats_holm_where_tests_hang_together():
    rng, wrong, found, units = np.random.default_rng(8), 0, [0, 0], torch.arange(40)
    for run in range(400):
        noise = torch.from_numpy(0.97 * rng.normal(size=(40, 1)) + 0.24 * rng.normal(size=(40, 10)))
        wrong += min(sign_flip_test(noise, units, draws=199, seed=run).adjusted) <= 0.05
        if run < 150:
            moved = sign_flip_test(noise + 0.4, units, draws=399, seed=run)
            found[0] += moved.adjusted[0] <= 0.05
            found[1] += holm(moved.p)[0] <= 0.05
    assert wrong / 400 <= 0.05 + 0.033  # three standard errors
    assert found[0] > 1.3 * found[1]


def test_gains_of_nothing_and_bad_input():
    found = sign_flip_test(torch.stack([torch.zeros(9), torch.arange(9.0)], 1), torch.arange(9), draws=100)
    assert found.p[0] == found.adjusted[0] == 1
    with pytest.raises(ShapeError, match="9 units"):
        sign_flip_test(torch.zeros(9), torch.arange(8))
    with pytest.raises(RangeError, match="finite differences"):
        sign_flip_test(torch.tensor([math.nan, 1]), torch.arange(2))
    with pytest.raises(RangeError, match="at least 1 draw"):
        sign_flip_test(torch.zeros(9), torch.arange(9), draws=0)


@pytest.mark.parametrize("per_cluster", [0, 4])
def test_swapping_predictions_is_flipping_signs_for_accuracy(per_cluster):
    a, b = pair(21, 9, 120, per_cluster)
    gain = (b.predicted == b.labels).double() - (a.predicted == a.labels).double()
    units = a.keys if a.clusters is None else a.clusters
    flipped = sign_flip_test(gain, units, draws=3000).p[0]
    assert permutation_test(a, b, "accuracy", CONTEXT, draws=3000) == pytest.approx(flipped, abs=1e-12)


def test_swapping_predictions_agrees_with_all_swaps():
    """Eight samples: AUROC of both models under all 256 swaps, by pairs."""
    rng = np.random.default_rng(11)
    labels, odds = np.arange(8) % 2, rng.normal(size=(2, 8)) + np.array([[0.0], [1.5]]) * (np.arange(8) % 2)

    def area(z):
        return np.mean([[z[i] > z[j] for j in range(0, 8, 2)] for i in range(1, 8, 2)])

    gaps = []
    for swap in itertools.product((False, True), repeat=8):
        first, second = (np.where(swap, odds[1 - k], odds[k]) for k in (0, 1))
        gaps.append(abs(area(second) - area(first)))
    exact = np.mean(np.array(gaps) >= gaps[0] - 1e-9)
    stores = [
        PredictionStore(torch.arange(8), torch.tensor(np.stack([0 * z, z], 1)), torch.from_numpy(labels), "binary")
        for z in odds
    ]
    assert permutation_test(*stores, "auroc", CONTEXT, draws=8000) == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("metric", ["auroc", "brier", "balanced-accuracy"])
def test_size_and_power_of_swapping(make_store, metric):
    a = make_store(150)
    rng = np.random.default_rng(2)
    noise = torch.from_numpy(rng.normal(size=(2, *a.logits.shape))).float()
    like, worse = (dataclasses.replace(a, logits=a.logits + noise[0] * scale) for scale in (1e-4, 4.0))
    assert permutation_test(a, like, metric, CONTEXT, draws=500) > 0.02
    assert permutation_test(a, worse, metric, CONTEXT, draws=500) < 0.01
    order = torch.from_numpy(rng.permutation(150))
    assert permutation_test(a.select(order), worse, metric, CONTEXT, draws=500) == permutation_test(
        a, worse, metric, CONTEXT, draws=500
    )


def test_identical_predictions_have_p_one_and_undefined_ones_none(make_store):
    store = make_store()
    assert permutation_test(store, store, "accuracy", CONTEXT, draws=50) == 1
    assert math.isnan(permutation_test(store, store, "silent-failure-rate", CONTEXT, draws=50))  # no threshold
    with pytest.raises(ConfigError, match="the same classes"):
        permutation_test(
            make_store(classes=3), dataclasses.replace(make_store(classes=3), logits=store.logits), "accuracy", CONTEXT
        )


def test_holm_known_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.6, 0.7]) == [1, 1]
    adjusted = holm([0.01, math.nan, 0.02])
    assert adjusted[::2] == pytest.approx([0.03, 0.04])  # an undefined one counts
    assert math.isnan(adjusted[1])
    with pytest.raises(RangeError, match="p-values from 0 to 1"):
        holm([0.5, 1.2])
