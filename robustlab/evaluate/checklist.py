"""The checklist of an evaluation's attacks, one for each norm, for its report."""

from __future__ import annotations

from typing import Any

from robustlab.core.attack import Attack
from robustlab.core.errors import RobustlabError
from robustlab.core.model import Model
from robustlab.core.shift import quantize
from robustlab.core.source import Source

from .plan import Plan
from .trust import TrustCheck, trust_checks
from .trust_checks import FEW

_MOST = 64
_SHARE = 8
_CANDIDATES = 4  # samples read for each that is used, as wrong ones are left out


def checklists(model: Model, source: Source, plan: Plan, limit: int | None, seed: int) -> list[dict[str, Any]]:
    """Return what ``trust_checks`` finds, at the middle one of all budgets of a norm.

    Args:
        model: The model, on its device.
        source: Labelled data.
        plan: What was run.
        limit: Right samples to run it on; None for an eighth of the data, 10 to 64; 0 for no checklist.
        seed: Seed of the evaluation.
    """
    spec = source.info.spec
    budgets: dict[Any, set[float]] = {}
    for sweep in plan.sweeps:
        attack = sweep.shift
        if isinstance(attack, Attack) and attack.norm in ("linf", "l2"):
            budgets.setdefault(attack.norm, set()).update(attack.budget(eps, spec) for eps in attack.eps)
    if limit == 0 or not budgets or source.info.labels is None:
        return []
    most = max(FEW, min(_MOST, len(source) // _SHARE)) if limit is None else limit
    # spread over the data, which may be sorted by class
    count = min(len(source), _CANDIDATES * most)
    batch = source.read([place * len(source) // count for place in range(count)]).to(model.device)
    batch = batch.replace(quantize(batch.images, spec))
    found = []
    for norm, all_eps in budgets.items():
        eps = sorted(all_eps)[(len(all_eps) - 1) // 2]
        try:
            checks = trust_checks(model, batch, norm=norm, eps=eps, spec=spec, seed=seed, limit=most)
        except RobustlabError as error:  # the numbers are there, and must not be lost
            checks = (TrustCheck("checklist", "Could the checklist be run?", "failed", str(error)),)
        native = f"{spec.native(eps):.3g} {spec.unit}s" if norm == "linf" else f"{eps:.3g} on the [0, 1] scale"
        found.append({"norm": norm, "eps": eps, "budget": native, "checks": [check.to_dict() for check in checks]})
    return found
