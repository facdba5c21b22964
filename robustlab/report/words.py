"""How numbers, amounts and names are written for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from robustlab.core.registry import METRICS

from .rows import Row

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
_TITLES = {
    "accuracy": "Accuracy",
    "balanced-accuracy": "Balanced accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "auroc": "AUROC",
    "nll": "Negative log-likelihood",
    "brier": "Brier score",
    "ece": "Calibration error (ECE)",
    "ece-null": "ECE of a perfectly calibrated model",
    "silent-failure-rate": "Silent failures",
    "referred-share": "Referred share",
    "accuracy-drop": "Accuracy drop",
    "auroc-ood": "AUROC",
    "fpr95-ood-pos": "FPR at 95 % of OOD caught",
    "fpr95-id-pos": "FPR at 95 % of ID kept",
}
SHARES = frozenset(
    {"accuracy", "balanced-accuracy", "sensitivity", "specificity", "ppv", "npv", "top-3-accuracy", "top-5-accuracy"}
    | {"sensitivity-at-95-specificity", "referred-share", "coverage-at-risk", "risk-at-coverage"}
    | {"accuracy-drop", "worst-condition", "all-conditions-accuracy", "flip-rate", "severity-area"}
    | {"mean-corruption-error", "mean-corruption-error-balanced"}
    | {"mean-corruption-error-relative", "mean-corruption-error-relative-balanced"}
    | {"accuracy-gap", "worst-group-accuracy", "fpr95-ood-pos", "fpr95-id-pos", "detection-error"}
)
PER_THOUSAND = frozenset({"silent-failure-rate"})
_REASONS = {
    "no_val": "no validation data",
    "single_class": "only one class is present",
    "no_labels": "no labels",
    "empty": "no samples",
    "answers_only": "answers without probabilities",
    "no_groups": "no groups= were named",
    "no_ood_set": "no ood= was passed",
    "no_conditions": "no shift was tested",
    "no_attack": "no attack was run",
}


def title(metric: str) -> str:
    """Return a metric's name for people."""
    known = METRICS.get(metric).title if metric in METRICS else ""
    return _TITLES.get(metric) or known or metric.replace("-", " ").capitalize()


def number(metric: str, value: float) -> str:
    """Return a value: shares in per cent, silent failures per 1,000, the rest with three decimals."""
    if math.isnan(value):
        return DASH
    if metric in PER_THOUSAND:
        return _minus(f"{1000 * value:,.0f}")
    if metric in SHARES:
        return _minus(f"{100 * value:.1f} %")
    return decimal(value)


def interval(metric: str, low: float, high: float) -> str:
    """Return an interval as "18 to 52"; a dash where it is undefined."""
    if math.isnan(low) or math.isnan(high):
        return DASH
    first = number(metric, low)
    return f"{first.removesuffix(' %')} to {number(metric, high)}"


def estimate(row: Row) -> str:
    """Return "93.1 % (91.0 to 94.8 %)", or a dash with the reason."""
    if math.isnan(row.value):
        return f"{DASH} ({reason(row.reason)})"
    if math.isnan(row.low) or math.isnan(row.high):
        return f"{number(row.metric, row.value)} (no interval: {reason(row.reason)})"
    return f"{number(row.metric, row.value)} ({interval(row.metric, row.low, row.high)})"


def measured(row: Row) -> str:
    """Return "38 photons (30 to 45)" for a number with a unit of its own, else as ``estimate``."""
    if not row.unit:
        return estimate(row)
    low, high = (DASH if math.isnan(end) else f"{end:.3g}" for end in (row.low, row.high))
    if math.isnan(row.value):
        return f"{DASH} ({reason(row.reason)})"
    ends = "" if DASH in (low, high) else f" ({low} to {high})"
    return _minus(f"{row.value:.3g} {row.unit}{ends}")


def points(value: float) -> str:
    """Return a difference of shares in percentage points, e.g. "12.4"."""
    return DASH if math.isnan(value) else _minus(f"{100 * value:.1f}")


def decimal(value: float, sign: str = "") -> str:
    """Return a number with three decimals, with ``sign="+"`` always signed."""
    return DASH if math.isnan(value) else _minus(f"{value:{sign}.3f}")


def reason(text: str) -> str:
    """Return the reason of an undefined number in words."""
    return _REASONS.get(text, text.replace("_", " ")) or "no reason recorded"


def amount(value: float, unit: str, kind: str) -> str:
    """Return a physical amount, e.g. "60 photons", for attacks "eps 4 grey levels"; empty where there is none."""
    if math.isnan(value):
        return ""
    if kind.endswith("attack") and unit.startswith("linf") and "[0, 1]" in unit:
        levels = 255 * value
        near = abs(levels - round(levels)) < 1e-6 and round(levels) > 0
        return f"eps {round(levels)}/255" if near else f"eps {value:.3g}"
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if kind.endswith("attack"):
        return f"eps {text}" if "[0, 1]" in unit else f"eps {text} {unit}{'' if text == '1' else 's'}"
    return f"{text} {unit}".strip()


def listed(names: list[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def units(manifest: Mapping[str, Any], count: int = 2) -> str:
    """Return the noun that is counted: patients where they are known, images otherwise."""
    noun = str((manifest.get("data") or {}).get("unit") or "image")
    if count == 1:
        return noun
    return noun if noun.endswith("s") else f"{noun}s"


def _minus(text: str) -> str:
    return text.replace("-", MINUS)
