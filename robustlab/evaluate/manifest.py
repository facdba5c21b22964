"""The manifest: what was run, with what, on what, and what was not tested."""

from __future__ import annotations

import math
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch

from robustlab import __version__
from robustlab.core.model import Capabilities, Model, WrappedModel
from robustlab.core.source import Source
from robustlab.core.types import ImageSpec
from robustlab.metrics.base import Frozen
from robustlab.metrics.store import PredictionStore

from .diagnosis import Diagnosis
from .plan import Plan, describe
from .run import clusters_of

SCHEMA = 1


def make_manifest(
    *,
    model: Model,
    capabilities: Capabilities,
    diagnosis: Diagnosis,
    notes: Sequence[str],
    source: Source,
    val: Source | None,
    ood: Mapping[str, Source],
    plan: Plan,
    trust: Sequence[Mapping[str, Any]],
    failures: Mapping[str, str],
    stores: Mapping[str, PredictionStore],
    frozen: Frozen,
    cluster: str | None,
    chunk: int | None,
    seed: int,
    started: float,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the manifest as JSON types; every argument is what its name says."""
    return {
        "schema": SCHEMA,
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(time.time() - started, 3),
        "seed": seed,
        "device": device_name(model.device),
        "chunk": chunk,
        "git": git_revision(),
        "model": {
            "name": model.model_name,
            "fingerprint": model.fingerprint(),
            "settings": _plain(model.settings()),
            "classes": model.num_classes,
            "parameters": model.parameter_count(),
            "capabilities": asdict(capabilities),
        },
        "data": describe_source(source, cluster),
        "val": None if val is None else describe_source(val, cluster if cluster in val.info.groups else None),
        "ood": {name: describe_source(foreign, None) for name, foreign in ood.items()},
        "conditions": _conditions(plan),
        "skipped": [{"what": what, "why": why} for what, why in plan.skipped],
        "failures": [{"condition": name, "error": text} for name, text in failures.items()],
        "doctor": diagnosis.to_dict(),
        "not_tested": [
            *notes,
            *warnings_of(model, capabilities, source, val, stores),
            *not_tested(plan, trust, source.info.spec, source.info.task, val, ood, cluster, settings, failures),
        ],
        "frozen": {
            "thresholds": None if frozen.thresholds is None else frozen.thresholds.tolist(),
            "confidence": frozen.confidence,
            "detector": frozen.detector,
            "score": frozen.score,
            "referral": frozen.referral,
            "flags": {name: line if math.isfinite(line) else None for name, line in frozen.flags.items()},
        },
        "settings": dict(settings),
        "threat_model": threat_model(plan, source),
        "trust": list(trust),
        "truth": None,
        "compared": None,
        "defenses": None,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def versions() -> dict[str, str]:
    """Return the versions that can change a number."""
    return {
        "robustlab": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
    }


def device_name(device: torch.device) -> str:
    """Return a device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"


def git_revision() -> str | None:
    """Return the revision of the working directory's repository, or None."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False, cwd=Path.cwd()
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def describe_source(source: Source, cluster: str | None) -> dict[str, Any]:
    """Return what a reader must know of a data set."""
    info = source.info
    clusters = clusters_of(source, cluster)
    return {
        "name": info.name,
        "fingerprint": source.fingerprint(),
        "n": len(source),
        "n_units": len(source) if clusters is None else len(torch.unique(clusters)),
        "unit": cluster or "image",
        "task": info.task,
        "class_names": None if info.class_names is None else list(info.class_names),
        "spec": asdict(info.spec) | {"size": list(info.spec.size), "range": list(info.spec.range)},
        "notes": list(info.notes),
    }


def _conditions(plan: Plan) -> list[dict[str, Any]]:
    every = (*plan.sweeps, *plan.hiding)
    described = {sweep.conditions[0].label: describe(sweep.shift) for sweep in every if sweep.conditions}
    out = []
    for condition in (*plan.conditions, *plan.on_foreign.conditions[1:]):
        spec, fingerprint = described.get(condition.label, (None, ""))
        if condition in plan.derived:
            spec = {"type": "derived", "of": "the attack, for each sample, with the smallest margin"}
        out.append(
            {
                "key": condition.key,
                "shift": condition.label,
                "kind": condition.kind,
                "severity": condition.severity,
                "amount": condition.amount,
                "unit": condition.unit,
                "parameters": {name: list(pair) for name, pair in condition.parameters.items()},
                "spec": spec,
                "fingerprint": fingerprint,
            }
        )
    return out


def _without_effect(plan: Plan, spec: ImageSpec) -> list[str]:
    """Return sentences about budgets below one level of the stored images, within which no pixel can change."""
    from robustlab.core.attack import Attack

    found = []
    for sweep in (*plan.sweeps, *plan.hiding):
        attack = sweep.shift
        if isinstance(attack, Attack) and attack.norm == "linf" and spec.bits is not None:
            level = 1 / ((1 << spec.bits) - 1)
            small = [
                item
                for item in sweep.conditions
                if attack.budget(attack.eps_at(item.severity), spec) < level * (1 - 1e-6)
            ]
            if small:
                amounts = ", ".join(f"{item.amount:.3g}" for item in small)
                found.append(
                    f"{sweep.conditions[0].label} at {amounts} {spec.unit}s: less than one level of the stored images, "
                    "so no pixel could change; load them as floating point numbers to search finer."
                )
    return found


def threat_model(plan: Plan, source: Source) -> str | None:
    """Return one sentence on what the attacks may do, or None without attacks."""
    from robustlab.core.attack import Attack

    attacks = [sweep.shift for sweep in (*plan.sweeps, *plan.hiding) if isinstance(sweep.shift, Attack)]
    if not attacks:
        return None
    spec = source.info.spec
    parts = [f"{attack.label}: may change {attack.bound(spec)}, sees the model's {attack.access}" for attack in attacks]
    return "; ".join(parts) + "."


def warnings_of(
    model: Model,
    capabilities: Capabilities,
    source: Source,
    val: Source | None,
    stores: Mapping[str, PredictionStore],
) -> list[str]:
    """Return sentences about what makes the numbers themselves doubtful."""
    out = []
    if isinstance(model, WrappedModel) and model.assumed_normalisation:
        out.append(
            f"Preprocessing: mean {model.mean} and std {model.std} were read from the network's pretrained_cfg; if it "
            "was trained with others, every number here is off (wrap(net, mean=..., std=...))."
        )
    if not capabilities.deterministic:
        out.append("Repeatability: two passes over the same images differ, so another run gives other numbers.")
    elif not capabilities.batch_independent or getattr(model, "order_dependent", False):
        out.append("Single images: an answer depends on the images beside it, so all numbers hold for this order only.")
    numbers = {key: store for key, store in stores.items() if not store.answers_only}
    broken = {key: int((~store.finite).sum()) for key, store in numbers.items()}
    if any(broken.values()):
        worst = max(broken, key=lambda key: broken[key])
        out.append(
            f"Outputs that are not finite: {broken.get('clean', 0)} of {len(source)} on clean data, {broken[worst]} "
            f"under {worst}; they count as wrong answers, as referred, and are left out of the other metrics."
        )
    if val is not None and val.fingerprint() == source.fingerprint():
        out.append("Independent operating points: val and data are the same, so thresholds saw the test data.")
    return out


def not_tested(
    plan: Plan,
    trust: Sequence[Mapping[str, Any]],
    spec: ImageSpec,
    task: str | None,
    val: Source | None,
    ood: Mapping[str, Source],
    cluster: str | None,
    settings: Mapping[str, Any],
    failures: Mapping[str, str],
) -> list[str]:
    """Return sentences about what this report says nothing of."""
    kinds = {condition.kind for condition in plan.conditions}
    out = []
    if "attack" in kinds and not trust:
        out.append("How far the attacks can be trusted: no checklist was run (trust=).")
    if val is None:
        out.append("Silent failures and fixed operating points: no validation data was given (val=).")
    if "attack" not in kinds:
        out.append("Adversarial inputs: no attack on the answers was run (attacks=).")
    else:
        run = [sweep.shift.name for sweep in plan.sweeps if sweep.conditions[0].kind == "attack"]
        if not any(name.startswith("aa-") or name == "auto-attack" for name in run):
            names = f"only {', '.join(sorted({*run}))} {'was' if len({*run}) == 1 else 'were'} run"
            out.append(f"Stronger or black-box adversaries: {names}, so robust accuracy is an upper bound.")
    if "attack" in kinds and task == "multilabel":
        out.append(
            "Attacks on all labels at once: they look for one wrong decision an image, and accuracy counts every "
            "decision, so it falls by little even where every image was fooled."
        )
    if not ood:
        out.append("Foreign inputs such as other organs, scanners or photographs: no OOD set was given (ood=).")
    if not settings["groups"]:
        out.append("Differences between groups such as sex or site: no columns were named (groups=).")
    if cluster is None:
        out.append("Several images of one patient: images are taken as independent (cluster=).")
    out += _without_effect(plan, spec)
    out += [f"{what}: {why}." for what, why in plan.skipped]
    out += [f"{name}: failed, see failures." for name in failures]
    sides = {side for sweep in plan.sweeps if (side := getattr(sweep.shift, "made_for", 0))}
    foreign = sorted(sides - {*spec.size} if spec.size[0] == spec.size[1] else sides)
    if foreign:
        wanted = " and ".join(f"{side} x {side}" for side in foreign)
        height, width = spec.size
        out.append(
            f"Published severities: made for {wanted} px, used here on {height} x {width} px; not comparable with "
            "published numbers."
        )
    families = {getattr(sweep.shift, "family", "") for sweep in plan.sweeps}
    kinds_of_shift = (("geometric shifts", "geometry"), ("artefacts", "artifacts"))
    untouched = [word for word, family in kinds_of_shift if family not in families]
    out.append(", ".join([*untouched, "real data of another site"]).capitalize() + ".")
    return out
