"""The smallest budget that makes answers wrong: by hand, over clusters, labels and budgets that never suffice."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import norm

from robustlab.metrics.base import Conditions, ConditionStore, Context, Frozen
from robustlab.metrics.minimal_budget import MinimalBudget, budgets_of
from robustlab.metrics.resample import Resampler
from robustlab.metrics.store import PredictionStore

AMOUNTS = (1.0, 2.0, 4.0)
CONTEXT = Context(resampler=Resampler(seed=0, replicates=100), frozen=Frozen())


def store(right, **fields):
    """A store of class 0 with these answers right."""
    right = torch.as_tensor(right)
    logits = torch.stack([right.float(), 1 - right.float()], 1)
    labels = torch.zeros(len(right), dtype=torch.int64)
    return PredictionStore(torch.arange(len(right)), logits, labels, "multiclass", **fields)


def attacked(falls, kind="attack", shift="pgd-linf", clusters=None):
    """Clean and attacked stores of samples that fall at these budgets; 0 is wrong at once, inf never."""
    falls = torch.as_tensor(falls, dtype=torch.float64)
    items = tuple(
        ConditionStore(f"{shift}@{i}", shift, float(i + 1), amount, "grey level", store(falls > amount), kind)
        for i, amount in enumerate(AMOUNTS)
    )
    return Conditions(store(falls > 0, clusters=clusters), items)


def median_of(falls, **fields):
    return MinimalBudget().compute(attacked(falls, **fields), CONTEXT)[0].estimate


def test_falls_and_holds_by_hand():
    conditions = attacked([0, 1, 2, 4, math.inf])
    budgets = budgets_of(conditions.clean, conditions.shifted, Frozen())
    assert budgets.falls_at[:4].tolist() == [0, 1, 2, 4]
    assert math.isnan(budgets.falls_at[4])
    assert budgets.holds_at[1:].tolist() == [0, 1, 2, 4]
    assert math.isnan(budgets.holds_at[0])


def test_who_fell_stays_fallen():
    """An attack may miss at a larger budget what it found at a smaller one, whose image is inside both."""
    conditions = attacked([1, math.inf])
    items = (*conditions.shifted[:2], replace(conditions.shifted[2], store=store([True, True])))
    budgets = budgets_of(conditions.clean, items, Frozen())
    assert budgets.falls_at[0] == 1
    assert budgets.fallen.tolist() == [[True, False]] * 3


@pytest.mark.parametrize(
    ("falls", "value"),
    [([0, 1, 2, 4, 4], 2), ([0, 0, 0, 4, 4], 0), ([1, 1, 4, 4], 1), ([2, 4, math.inf, math.inf], 4)],
)
def test_median_by_hand(falls, value):
    found = median_of(falls)
    assert found.value == value
    assert found.low <= value
    assert found.n == len(falls)


def test_interval_is_where_the_ends_of_the_share_reach_one_half():
    falls = [1] * 44 + [2] * 12 + [4] * 24 + [math.inf] * 20  # 44, 56 and 80 of 100
    found = median_of(falls)
    assert (found.value, found.low, found.high) == (2, 1, 4)
    z = norm.ppf(0.975)
    for wrong, reaches in ((44, False), (56, False), (80, True)):
        p, n = wrong / 100, 100
        low = (p + z * z / (2 * n) - z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)
        assert (low >= 0.5) == reaches
    clusters = torch.arange(100) // 10
    assert median_of(falls, clusters=clusters).n_units == 10


def test_coverage_of_the_interval():
    """Budgets of samples are drawn from a law whose median is 2; at most 1 in 40 falls to each side."""
    generator = torch.Generator().manual_seed(1)
    missed = moved = 0
    for _ in range(400):
        falls = torch.tensor(AMOUNTS)[torch.multinomial(torch.tensor([0.45, 0.1, 0.45]), 60, True, generator=generator)]
        found = median_of(falls)
        missed += not (found.low <= 2 <= found.high)
        moved += found.value != 2
    assert missed <= 0.05 * 400 + 3 * math.sqrt(400 * 0.05 * 0.95)
    assert moved > 100, "an interval without width would miss as often"


def test_images_of_one_patient_widen_the_interval():
    falls = [1] * 44 + [2] * 12 + [4] * 24 + [math.inf] * 20
    alone, together = median_of(falls), median_of(falls, clusters=torch.arange(100) // 20)
    assert (alone.value, alone.low, alone.high) == (2, 1, 4)
    assert (together.value, together.low) == (2, 1)
    assert math.isnan(together.high), "of five patients the share that fell is not known to be a half"


def test_a_median_that_no_budget_reaches():
    found = median_of([1] + [math.inf] * 30)
    assert math.isnan(found.value)
    assert found.reason == "not_reached"
    assert found.low == AMOUNTS[-1]
    assert "largest budget tested" in found.method
    assert math.isnan(found.high)
    close = median_of([1] * 4 + [math.inf] * 5)
    assert math.isnan(close.value)
    assert close.low == 1
    open_end = median_of([4] * 5 + [math.inf] * 4)
    assert open_end.value == 4
    assert open_end.reason == "open_interval"


def test_only_attacks_have_one():
    assert MinimalBudget().compute(attacked([1, 2], kind="corruption", shift="gamma"), CONTEXT) == []
    both = attacked([1, 2])
    other = attacked([1, 2], shift="fgsm-linf")
    made = MinimalBudget().compute(Conditions(both.clean, (*both.shifted, *other.shifted)), CONTEXT)
    assert [value.shift for value in made] == ["pgd-linf", "fgsm-linf"]
    assert {value.unit for value in made} == {"grey level"}


def test_several_labels_are_decided_at_their_thresholds():
    logits = torch.tensor([[2.0, -2.0], [2.0, -2.0]])
    labels = torch.tensor([[1, 0], [1, 0]])
    clean = PredictionStore(torch.arange(2), logits, labels, "multilabel")
    moved = replace(clean, logits=torch.tensor([[1.0, -2.0], [2.0, 1.0]]))
    item = ConditionStore("pgd@1", "pgd", 1.0, 1.0, "grey level", moved, "attack")
    assert budgets_of(clean, [item], Frozen()).fallen.tolist() == [[False, True]]
    strict = Frozen(thresholds=torch.tensor([0.8, 0.5], dtype=torch.float64))
    assert budgets_of(clean, [item], strict).fallen.tolist() == [[True, True]]


def test_no_annotated_sample():
    labels = torch.full((2, 2), -1)
    clean = PredictionStore(torch.arange(2), torch.zeros(2, 2), labels, "multilabel")
    item = ConditionStore("pgd@1", "pgd", 1.0, 1.0, "grey level", clean, "attack")
    found = MinimalBudget().compute(Conditions(clean, (item,)), CONTEXT)[0].estimate
    assert math.isnan(found.value)
    assert found.reason == "no_samples"
