"""Minimal budget: the smallest budget of an attack at which a sample is answered wrongly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustlab.core.registry import METRICS

from .base import ConditionMetric, Conditions, ConditionStore, Context, Estimate, Frozen, MetricValue
from .robustness import paired
from .selective import wrong_answers
from .stats import unit_count
from .stats.proportions import proportion
from .store import PredictionStore


@dataclass(frozen=True, eq=False)
class Budgets:
    """Where the samples of one attack fell.

    Args:
        amounts: Tested budgets, ascending, float64 (B,).
        fallen: bool (B, N): wrong at this budget, a smaller one or the clean image.
        clean: bool (N,): wrong on the clean image.
        entered: bool (N,): has a label.
    """

    amounts: Tensor
    fallen: Tensor
    clean: Tensor
    entered: Tensor

    @property
    def falls_at(self) -> Tensor:
        """float64 (N,), the smallest budget at which the answer is wrong; 0 on the clean image, NaN for none."""
        nowhere = self.amounts.new_full((1,), math.nan)
        found = torch.cat((self.amounts, nowhere))[(~self.fallen).sum(0)]
        return torch.where(self.clean, 0.0, found)

    @property
    def holds_at(self) -> Tensor:
        """float64 (N,), the largest budget below at which the answer is right; NaN if wrong on the clean image."""
        steps = torch.cat((self.amounts.new_zeros(1), self.amounts))
        return torch.where(self.clean, math.nan, steps[(~self.fallen).sum(0)])


def budgets_of(clean: PredictionStore, attacked: Sequence[ConditionStore], frozen: Frozen) -> Budgets:
    """Return where samples fell.

    An image that is wrong within a small budget lies inside every larger one, so a sample that fell stays fallen.

    Args:
        clean: Labelled predictions.
        attacked: Conditions of one attack on the same samples in the same order, budgets ascending.
        frozen: Where several labels are decided; a sample is wrong if any annotated one is.
    """
    at_first, entered = wrong_answers(clean, frozen)
    wrong = torch.stack([wrong_answers(item.store, frozen)[0] for item in attacked]) | at_first
    amounts = torch.tensor([item.amount for item in attacked], dtype=torch.float64)
    return Budgets(amounts, wrong.cummax(0).values, at_first, entered)


@METRICS.register("minimal-budget")
class MinimalBudget(ConditionMetric):
    """Median over samples of the smallest tested budget at which an attack makes the answer wrong; one an attack.

    A sample whose clean answer is wrong counts 0. An attack that fails proves nothing, so this is an upper bound, and
    as coarse as the budgets are. The interval inverts those of the shares that fell (Woodruff 1952): it ends at the
    first budgets at which the upper and the lower end of the share reach one half. A median that no budget reaches is
    NaN with the reason ``not_reached``, as is an end (``open_interval``).

    References:
        R. S. Woodruff, "Confidence intervals for medians and other position measures", 1952.
    """

    on = "attacks"
    each_shift = True
    title = "Budget that makes half of the answers wrong"
    direction = "higher"
    default = True
    from_answers = True

    def compute(self, conditions: Conditions, context: Context) -> list[MetricValue]:
        same = paired(conditions)
        made = []
        for shift, items in same.by_shift().items():
            # published tables of several parameters have no amount
            if all(item.kind == "attack" and not math.isnan(item.amount) for item in items):
                estimate = _median(same.clean, budgets_of(same.clean, items, context.frozen), context)
                made.append(MetricValue(self.name, estimate, self.direction, shift=shift, unit=items[0].unit))
        return made


def _median(clean: PredictionStore, budgets: Budgets, context: Context) -> Estimate:
    rows = budgets.entered
    if not bool(rows.any()):
        return Estimate.undefined("no_samples", n=0)
    clusters = None if clean.clusters is None else clean.clusters[rows]
    steps = [(0.0, budgets.clean), *zip(budgets.amounts.tolist(), budgets.fallen, strict=True)]
    value = low = high = math.nan
    for amount, fallen in steps:
        share = proportion(fallen[rows], clusters, confidence=context.resampler.confidence)
        value = amount if math.isnan(value) and share.value >= 0.5 else value
        low = amount if math.isnan(low) and share.high >= 0.5 else low
        high = amount if math.isnan(high) and share.low >= 0.5 else high
    reason = "not_reached" if math.isnan(value) else "open_interval" if math.isnan(high) else ""
    if math.isnan(low):
        low = float(budgets.amounts[-1])
        note = "; the end given is the largest budget tested"
    else:
        note = ""
    units = unit_count(clean.clusters, rows)
    method = f"woodruff over {len(budgets.amounts)} budgets{note}"
    return Estimate(value, low, high, int(rows.sum()), units, method, reason)
