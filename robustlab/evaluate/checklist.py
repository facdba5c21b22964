"""The checklist of an evaluation's attacks, one for each norm, for its report."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from robustlab.core.attack import Attack, Norm
from robustlab.core.errors import KindError, RangeError, RobustlabError
from robustlab.core.model import Model
from robustlab.core.shift import quantize
from robustlab.core.source import Source
from robustlab.core.spec import array_fingerprint
from robustlab.core.types import ImageSpec

from .cache import ModelEntry, replace_file
from .plan import Plan
from .trust import TrustCheck, trust_checks
from .trust_checks import FEW

logger = logging.getLogger("robustlab")

_MOST = 64
_SHARE = 8
_CANDIDATES = 4  # samples read for each that is used, as wrong ones are left out


def check_trust(limit: object) -> None:
    """Refuse numbers of samples that make no sense.

    Raises:
        KindError: No whole number.
        RangeError: Too few for a checklist.
    """
    who = "evaluate_under_shift"
    if limit is None or (limit == 0 and not isinstance(limit, bool)):
        return
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise KindError(who, "trust as a whole number of samples", f"{limit!r}", "Leave it out for the default.")
    if limit < FEW:
        raise RangeError(who, f"trust of {FEW} samples or more, or 0 for no checklist", f"{limit}", "64 are plenty.")


def checklists(
    model: Model, source: Source, plan: Plan, limit: int | None, seed: int, entry: ModelEntry | None
) -> list[dict[str, Any]]:
    """Return what ``trust_checks`` finds, at the middle one of all budgets of a norm.

    Args:
        model: The model, on its device.
        source: Labelled data.
        plan: What was run.
        limit: Right samples to run it on; None for an eighth of the data, 10 to 64; 0 for no checklist.
        seed: Seed of the evaluation.
        entry: What the cache holds of the model, where the findings are kept; None for no cache.
    """
    spec = source.info.spec
    budgets: dict[Any, set[float]] = {}
    draws = 1
    for sweep in plan.sweeps:
        attack = sweep.shift
        if isinstance(attack, Attack) and attack.goal == "answer" and attack.norm in ("linf", "l2"):
            budgets.setdefault(attack.norm, set()).update(attack.budget(eps, spec) for eps in attack.eps)
            draws = max(draws, getattr(attack, "draws", 1))
    if limit == 0 or not budgets or source.info.labels is None:
        return []
    # as many passes for models that are random, over fewer samples
    most = max(FEW, min(_MOST, len(source) // _SHARE) // draws) if limit is None else limit
    found = []
    for norm, all_eps in budgets.items():
        eps = sorted(all_eps)[(len(all_eps) - 1) // 2]
        facts = (norm, eps, spec, seed, most, plan.thresholds, draws)
        checks = _kept(entry, source, facts, partial(_checks, model, source, *facts))
        native = f"{spec.native(eps):.3g} {spec.unit}s" if norm == "linf" else f"{eps:.3g} on the [0, 1] scale"
        found.append({"norm": norm, "eps": eps, "budget": native, "checks": checks})
    return found


def _checks(
    model: Model,
    source: Source,
    norm: Norm,
    eps: float,
    spec: ImageSpec,
    seed: int,
    most: int,
    thresholds: tuple[float, ...],
    draws: int,
) -> list[dict[str, Any]]:
    # spread over the data, which may be sorted by class
    count = min(len(source), _CANDIDATES * most)
    batch = source.read([place * len(source) // count for place in range(count)]).to(model.device)
    batch = batch.replace(quantize(batch.images, spec))
    try:
        checks = trust_checks(
            model, batch, norm=norm, eps=eps, spec=spec, seed=seed, limit=most, thresholds=thresholds, draws=draws
        )
    except RobustlabError as error:  # the numbers are there, and must not be lost
        checks = (TrustCheck("checklist", "Could the checklist be run?", "failed", str(error)),)
    return [check.to_dict() for check in checks]


def _kept(
    entry: ModelEntry | None, source: Source, facts: tuple[object, ...], run: Callable[[], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return findings of an earlier evaluation from the cache, or run the checklist and keep what it finds."""
    if entry is None:
        return run()
    labels = [] if source.info.labels is None else [("labels", source.info.labels)]
    seen = (source.content_fingerprint(), array_fingerprint(labels), facts)
    key = hashlib.blake2b(repr(seen).encode(), digest_size=16).hexdigest()
    path = entry.folder / f"checklist-{key}.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(stored, list) and all({"name", "status", "finding"} <= set(check) for check in stored):
            return stored
    except (OSError, ValueError, TypeError):
        pass
    found = run()
    try:
        replace_file(path, json.dumps(found).encode())
    except OSError as error:
        logger.warning("cache: the checklist of the attacks could not be kept: %s", error)
    return found
