"""Several attacks at one budget, as one condition: for each sample the attack that comes closest to a wrong answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from corruptions.adversarial.losses import decided_at, margin
from robustlab.core.attack import Attack, Norm
from robustlab.core.levels import MAX_SEVERITY
from robustlab.core.types import ImageSpec
from robustlab.metrics.store import PredictionStore

from .plan import Condition, Plan

WORST_ATTACK = "worst attack"


def with_worst_attacks(
    plan: Plan, stores: Mapping[str, PredictionStore], spec: ImageSpec
) -> tuple[Plan, dict[str, PredictionStore]]:
    """Add a condition for each budget at which two or more attacks of a norm were run on the same samples.

    Budgets are compared on the [0, 1] scale, in whatever units they were given.

    A mean over samples of the worst over attacks is at most the smallest of the means (Carlini et al. 2019,
    arXiv:1902.06705, which ask for it).

    Returns:
        The plan with these conditions as ``derived``, and the stores with theirs.
    """
    budgets: dict[Norm, dict[float, list[Condition]]] = {}
    for sweep in plan.sweeps:
        attack = sweep.shift
        if not isinstance(attack, Attack) or attack.goal != "answer" or attack.norm == "parameters":
            continue  # parameters of two attacks have nothing in common
        for condition in sweep.conditions:
            if condition.key in stores:
                eps = attack.budget(attack.eps_at(condition.severity), spec)
                budgets.setdefault(attack.norm, {}).setdefault(round(eps, 12), []).append(condition)
    added: list[Condition] = []
    found = dict(stores)
    for norm, at in budgets.items():
        shared = {eps: members for eps, members in sorted(at.items()) if len(members) > 1}
        for place, members in enumerate(shared.values(), start=1):
            parts = [stores[condition.key] for condition in members]
            if any(not torch.equal(part.ids, parts[0].ids) for part in parts):
                continue  # a part of one attack failed, which the report lists
            severity = MAX_SEVERITY * place / len(shared)
            label = f"{WORST_ATTACK} {norm}"
            condition = replace(members[0], key=f"{label}@{severity:g}", label=label, severity=severity)
            added.append(condition)
            found[condition.key] = worst_of_each(parts, plan.thresholds)
    return replace(plan, derived=tuple(added)), found


def worst_of_each(stores: list[PredictionStore], thresholds: tuple[float, ...] = ()) -> PredictionStore:
    """Return for each sample the row of the store with the smallest margin; rows that are not finite come last.

    Args:
        stores: Of the same labelled samples in the same order.
        thresholds: Probability at which each label of a multi-label task is decided; empty for one half.
    """
    chosen = torch.stack([_margins(store, thresholds) for store in stores]).argmin(0)
    rows = torch.arange(len(chosen))

    def pick(values: list[Tensor]) -> Tensor:
        return torch.stack(values)[chosen, rows]

    first = stores[0]
    scores = {name: pick([store.scores[name] for store in stores]) for name in first.scores}
    return replace(first, logits=pick([store.logits for store in stores]), scores=scores)


def _margins(store: PredictionStore, thresholds: tuple[float, ...]) -> Tensor:
    if store.labels is None:
        raise ValueError("attacks need labels")
    return margin(decided_at(store.logits, thresholds), store.labels, store.task).nan_to_num(nan=torch.inf)
