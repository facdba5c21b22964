"""A realistic report from seeded synthetic predictions, for the tests of everything that shows one."""

import io
import math
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from robustlab.metrics.stats import condition_verdict, wilson
from robustlab.metrics.store import PredictionStore
from robustlab.report.report import Picture, Report
from robustlab.report.rows import Row

N = 624
SHIFTS = {
    "gaussian-noise": ("of full range", (0.02, 0.04, 0.08, 0.12, 0.18), 0.42),
    "poisson-noise": ("photons", (500.0, 250.0, 120.0, 60.0, 25.0), 0.70),
    "resolution": ("fold", (1.5, 2.0, 3.0, 4.0, 6.0), 0.30),
    "contrast": ("of contrast kept", (0.9, 0.75, 0.6, 0.45, 0.3), 0.16),
    "gamma": ("exponent", (1.1, 1.25, 1.5, 1.8, 2.2), 0.05),
    "defocus-blur": ("px radius", (0.5, 1.0, 1.5, 2.0, 3.0), 0.22),
    "jpeg": ("quality", (80.0, 60.0, 40.0, 25.0, 10.0), 0.01),
}
EPS = (1 / 255, 2 / 255, 4 / 255)
MODEL, DATA, MARGIN = "small-cnn", "pneumoniamnist (test)", 0.05


def _store(rng: np.random.Generator, labels: np.ndarray, harm: float, noise: np.ndarray) -> PredictionStore:
    """Two-class logits whose margin sinks with harm; the noise is shared, so conditions are paired."""
    signal = (2 * labels - 1) * (2.6 - 5.2 * harm) + 1.7 * noise + 0.4 * rng.standard_normal(len(labels))
    logits = torch.tensor(np.stack([-signal, signal], 1) * 0.8, dtype=torch.float32)
    energy = torch.tensor(-np.abs(signal) + 0.3 * rng.standard_normal(len(labels)) + harm, dtype=torch.float64)
    count = len(labels)
    return PredictionStore(
        ids=torch.arange(count) * 7919 + 13,
        logits=logits,
        labels=torch.tensor(labels, dtype=torch.int64),
        task="binary",
        scores={"energy": energy, "msp": -torch.softmax(logits, 1).amax(1).to(torch.float64)},
        groups={"sex": torch.arange(count) % 2, "site": torch.arange(count) % 3},
    )


def _row(metric, value, low, high, *, n=N, shift="clean", severity=0.0, amount=math.nan, unit="", **other):
    known = {"model": MODEL, "data": DATA, "group": "", "target": "", "scorer": "", "method": "wilson", "reason": ""}
    direction = "lower" if metric in ("nll", "brier", "ece", "silent-failure-rate", "accuracy-drop") else "higher"
    place = {"shift": shift, "severity": severity, "amount": amount, "unit": unit}
    numbers = {"metric": metric, "value": value, "low": low, "high": high, "n": n, "n_units": n}
    return Row(**{**known, "direction": direction, **place, **numbers, **other})


def _share(metric, hits, n, **other):
    low, high = wilson(hits, n)
    return _row(metric, hits / n, low, high, n=n, **other)


def _silent(store):
    wrong = store.predicted != store.labels
    return wrong & (store.probs.amax(1) > 0.75) & (store.scores["energy"] < -0.6)


def _condition_rows(store, clean, **place):
    right = (store.predicted == store.labels).numpy()
    labels = store.labels.numpy()
    yield _share("accuracy", int(right.sum()), N, **place)
    sens, spec = right[labels == 1], right[labels == 0]
    balanced = (sens.mean() + spec.mean()) / 2
    yield _row("balanced-accuracy", balanced, balanced - 0.025, balanced + 0.025, method="bootstrap", **place)
    yield _share("sensitivity", int(sens.sum()), len(sens), target="pneumonia", **place)
    yield _share("specificity", int(spec.sum()), len(spec), target="pneumonia", **place)
    score = store.probs[:, 1].numpy()
    auroc = float((score[labels == 1][:, None] > score[labels == 0][None]).mean())
    yield _row("auroc", auroc, auroc - 0.018, min(auroc + 0.016, 1.0), method="bootstrap", **place)
    own = -store.log_probs.gather(1, store.labels[:, None]).mean().item()
    yield _row("nll", own, own * 0.9, own * 1.12, method="bootstrap", **place)
    brier = float(((score - labels) ** 2).mean())
    yield _row("brier", brier, brier * 0.9, brier * 1.1, method="bootstrap", **place)
    ece = abs(float(store.probs.amax(1).mean()) - right.mean()) + 0.012
    yield _row("ece", ece, ece * 0.8, ece * 1.2, method="bootstrap", **place)
    yield _row("ece-null", 0.017, math.nan, math.nan, reason="expected value", direction="none", **place)
    yield _share("silent-failure-rate", int(_silent(store).sum()), N, **place)
    yield _share("referred-share", int((store.probs.amax(1) <= 0.75).sum()), N, direction="none", **place)
    if clean is not None:
        drop = (clean.predicted == clean.labels).numpy().astype(float) - right
        half = 1.96 * drop.std(ddof=1) / math.sqrt(N)
        yield _row(
            "accuracy-drop", drop.mean(), drop.mean() - half, drop.mean() + half, method="paired bootstrap", **place
        )


def _group_rows(store):
    for column, levels in (("sex", ("F", "M")), ("site", ("north", "centre", "south"))):
        for code, level in enumerate(levels):
            part = store.select(store.groups[column] == code)
            right = part.predicted == part.labels
            group = f"{column}={level}"
            yield _share("accuracy", int(right.sum()), len(part), group=group)
            yield _share("silent-failure-rate", int(_silent(part).sum()), len(part), group=group)


def _worst(rows, metric, shift, keys, sign):
    found = [r for r in rows if r.metric == metric and f"{r.shift}@{r.severity:g}" in keys and not r.group]
    bad = max(found, key=lambda r: sign * r.value)
    low, high = wilson(bad.value * N, N, alpha_divisor=len(keys))
    key = f"{bad.shift}@{bad.severity:g}"
    return replace(bad, shift=shift, target=key, low=low, high=high, method=f"wilson, Bonferroni over {len(keys)}")


def _ood_rows(stores, clean):
    for name, store in stores.items():
        for scorer in ("msp", "energy"):
            inside, outside = clean.scores[scorer].numpy(), store.scores[scorer].numpy()
            auroc = float((outside[:, None] > inside[None]).mean())
            place = {"data": f"ID vs {name}", "scorer": scorer, "method": "bootstrap", "n": N + len(store)}
            yield _row("auroc-ood", auroc, auroc - 0.02, min(auroc + 0.02, 1.0), **place)
            caught = float((inside >= np.quantile(outside, 0.05)).mean())
            kept = float((outside <= np.quantile(inside, 0.95)).mean())
            for metric, value in (("fpr95-ood-pos", caught), ("fpr95-id-pos", kept)):
                yield _row(metric, value, max(value - 0.04, 0.0), min(value + 0.04, 1.0), direction="lower", **place)


def _png(rng, harm):
    tile = np.clip(96 + 60 * np.sin(np.arange(28) / 4)[:, None] + 40 * harm * rng.standard_normal((28, 28)), 0, 255)
    out = io.BytesIO()
    Image.fromarray(tile.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def _truth(rows):
    at3 = {r.shift: r for r in rows if r.metric == "accuracy-drop" and r.severity == 3}
    for shift, claim, truth in (
        ("poisson-noise", "The planted shift breaks the model", 0.24),
        ("jpeg", "The harmless shift does no harm", 0.0),
        ("contrast", "The marker is a shortcut", 0.04),
    ):
        row = at3[shift]
        word = condition_verdict(row.low, row.high, MARGIN)
        yield {
            "claim": claim, "metric": "accuracy-drop", "where": f"{shift}, severity 3", "estimate": row.value,
            "low": row.low, "high": row.high, "truth": truth, "verdict": word, "right": True,
        }  # fmt: skip
    yield {
        "claim": "The twin is the same model", "metric": "accuracy", "where": "clean", "estimate": 0.0, "low": 0.0,
        "high": 0.0, "truth": 0.0, "verdict": "no decision", "right": True,
    }  # fmt: skip


def _manifest(conditions, rows, class_names):
    return {
        "versions": {"robustlab": "0.1.0", "torch": "2.9.0", "numpy": "2.1.0", "python": "3.11.2", "platform": "Linux"},
        "created": "2026-01-15T09:30:00+00:00", "wall_seconds": 41.7, "seed": 0, "device": "cpu", "chunk": 128,
        "git": "80cb72d",
        "model": {
            "name": MODEL, "fingerprint": "5f2d" * 8, "settings": {"size": 28, "mean": [0.5], "std": [0.25]},
            "parameters": 61_202, "capabilities": {"deterministic": True, "batch_independent": True},
        },
        "data": {
            "name": DATA, "fingerprint": "a91c" * 8, "n": N, "n_units": N, "unit": "patient", "task": "binary",
            "class_names": class_names, "spec": {"channels": 1, "size": [28, 28], "bits": 8}, "notes": [],
        },
        "val": {"name": "pneumoniamnist (val)", "n": 524, "fingerprint": "77aa" * 8},
        "conditions": conditions,
        "skipped": [{"what": "stain-shift", "why": "needs 3 channels, the images have 1"}],
        "failures": [],
        "not_tested": [
            "Other hospitals and scanners: all images come from one site.",
            "Geometry: no rotation, zoom or crop was tried.",
            "Adaptive attacks stronger than PGD with 20 steps.",
            "Stain shift: it needs colour images, these are grey.",
            "Labels: they were taken as given.",
        ],
        "frozen": {"thresholds": [0.5], "confidence": 1.1, "detector": "energy", "score": -0.6, "referral": 0.1},
        "settings": {
            "referral": 0.1, "plausible": 3, "cluster": None, "groups": ["sex", "site"], "severities": [1, 2, 3, 4, 5],
            "margin": MARGIN, "confidence_level": 0.95, "replicates": 1000,
        },
        "threat_model": "An adversary who knows the weights may change every pixel by at most eps (L-infinity), "
        "with 20 gradient steps from one random start.",
        "truth": list(_truth(rows)),
        "compared": [
            {"other": "small-cnn (twin)", "metric": "accuracy", "difference": 0.0, "low": 0.0, "high": 0.0,
             "verdict": "no decision"},
        ],
        "defenses": [{"name": "deep ensemble of 5", "rows": [
            {"metric": "accuracy", "shift": "clean", "value": 0.951, "low": 0.931, "high": 0.966, "n": N},
            {"metric": "silent-failure-rate", "shift": "worst plausible", "value": 0.11, "low": 0.08, "high": 0.15,
             "n": N},
        ]}],
    }  # fmt: skip


def sample_report(*, gallery: bool = False, class_names=("normal", "pneumonia"), seed: int = 0, skill=0.0) -> Report:
    """Return the report of a model that breaks under noise and ignores JPEG; ``skill`` makes it better."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(N) < 0.62).astype(np.int64)
    noise = rng.standard_normal(N)
    clean = _store(rng, labels, -skill, noise)
    stores, conditions = {"clean": clean}, [{"key": "clean", "shift": "clean", "kind": "clean", "severity": 0}]
    rows = [*_condition_rows(clean, None), *_group_rows(clean)]
    plans = [
        (name, "corruption", unit, tuple(zip(range(1, 6), values, strict=True)), reach)
        for name, (unit, values, reach) in SHIFTS.items()
    ]
    budgets = tuple((5 * (i + 1) / 3, eps) for i, eps in enumerate(EPS))
    plans.append(("pgd-linf", "attack", "linf, [0, 1] scale", budgets, 0.85))
    for name, kind, unit, levels, reach in plans:
        for severity, amount in levels:
            key = f"{name}@{severity:g}"
            store = _store(rng, labels, reach * (severity / 5) ** 1.6 - skill, noise)
            place = {"shift": name, "severity": float(severity), "amount": amount, "unit": unit}
            rows += _condition_rows(store, clean, **place)
            stores[key] = store
            conditions.append({"key": key, "kind": kind, "parameters": {}, "fingerprint": f"{len(key):032x}", **place})
    plausible = {f"{name}@{s}" for name in SHIFTS for s in (1, 2, 3)}
    rows += [
        _worst(rows, "accuracy", "worst plausible", plausible, -1),
        _worst(rows, "silent-failure-rate", "worst plausible", plausible, 1),
        _worst(rows, "accuracy", "worst", set(stores) - {"clean"}, -1),
    ]
    outside = {
        name: replace(_store(rng, labels[:400], harm, noise[:400]), labels=None, groups={})
        for name, harm in (("near/breastmnist", 0.35), ("far/photos", 0.5))
    }
    rows += _ood_rows(outside, clean)
    stores |= {f"ood:{name}": store for name, store in outside.items()}
    pictures = [
        Picture(name, float(s), _png(rng, s / 2), f"normal, {0.99 - 0.07 * s:.2f}")
        for name in ("clean", "gaussian-noise", "poisson-noise")
        for s in ((0,) if name == "clean" else (1, 2, 3, 4, 5))
    ]
    manifest = _manifest(conditions, rows, list(class_names))
    return Report(tuple(rows), manifest, stores, tuple(pictures) if gallery else ())
