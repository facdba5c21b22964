"""One self-contained HTML page of a report: inline styles, inline SVG, a little script, nothing from a network."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from markupsafe import Markup
from torch import Tensor

from robustlab.report import confusing, detection_views, group_views, ood_views, views, words
from robustlab.report.rows import Row

from . import svg

if TYPE_CHECKING:
    from robustlab.metrics.calibration import Reliability
    from robustlab.metrics.store import PredictionStore
    from robustlab.report.report import Report

_GLYPHS = {
    "breaks": "▼",
    "worse": "▾",
    "holds": "●",
    "no decision": "○",
    "right": "✓",
    "wrong": "✗",
    "gap": "▾",
    "better": "▲",
    "passed": "✓",
    "failed": "✗",
    "warned": "▾",
}
_FACTS = ("versions", "model", "data", "val", "ood", "frozen", "settings", "capabilities")
_HISTOGRAMS = 6


@dataclass(frozen=True)
class DefenseLine:
    """One number of a defence beside the same number of the plain model."""

    name: str
    metric: str
    shift: str
    own: str
    n: int | None
    plain: Row | None


def render(report: Report) -> str:
    """Return the page of a report."""
    here = files("robustlab.report.html")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(words=words, svg=svg, chip=chip, points=words.points)
    template = environment.from_string((here / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        style=Markup((here / "style.css").read_text(encoding="utf-8")),
        script=Markup((here / "page.js").read_text(encoding="utf-8")),
        data=embedded(report.to_json()),
        **_context(report),
    )


def embedded(text: str) -> Markup:
    """Return JSON text that a script element may hold: "<" becomes its JSON escape, which parses to the same."""
    return Markup(text.replace("<", "\\u003c"))


def chip(word: str) -> Markup:
    """Return a verdict word with its sign, so that colour is never the only difference."""
    return Markup('<span class="chip {}"><span aria-hidden="true">{}</span> {}</span>').format(
        word.replace(" ", "-"), _GLYPHS.get(word, "○"), word
    )


def _context(report: Report) -> dict[str, Any]:
    manifest = report.manifest
    verdict, drops, curves = views.verdict(report), views.drops(report), views.curves(report)
    attacks = [curve for curve in curves if curve.kind == "attack"]
    model, data = manifest.get("model") or {}, manifest.get("data") or {}
    table = views.index(report.rows)
    bad = views.worst_plausible(table, views.conditions(report))
    return {
        "manifest": manifest,
        "model": model,
        "source": data,
        "units": words.units(manifest),
        "verdict": verdict,
        "most": _most(verdict),
        "headline": views.headline(report),
        "further": views.further(report),
        "bad": bad,
        "doubts": views.doubts(report),
        "not_tested": views.not_tested(report),
        "drops": drops,
        "reach": _reach(drops),
        "margin": views.margin(report),
        "curves": [curve for curve in curves if curve.kind != "attack"],
        "attacks": attacks,
        "trust": views.trust(report),
        "attack_drops": [item for item in drops if item.condition.kind == "attack"],
        "duels": detection_views.duels(report),
        "passed": detection_views.passed(report),
        "chance": _chance(data),
        "reliability": _reliability(report, bad),
        "ood": ood_views.ood(report),
        "rocs": [(name, svg.roc_chart(curves, name)) for name, curves in ood_views.rocs(report).items()],
        "histograms": _histograms(report),
        "confusing": _confusing(report),
        "groups": group_views.groups(report),
        "over": views.over_conditions(report),
        "against": ood_views.against_first(report),
        "full_spectrum": ood_views.full_spectrum(report),
        "ood_metrics": ood_views.ood_metrics(report),
        "truth": views.claims(report),
        "compared": views.compared(report),
        "defenses": _defenses(report, table),
        "gallery": _gallery(report),
        "skipped": manifest.get("skipped") or [],
        "failures": manifest.get("failures") or [],
        "facts": [
            ("run", _flat({k: v for k, v in manifest.items() if k not in _FACTS and not isinstance(v, (list, dict))}))
        ]
        + [(name, _flat(manifest[name])) for name in _FACTS if isinstance(manifest.get(name), Mapping)],
        "fingerprints": [entry for entry in manifest.get("conditions") or [] if entry.get("fingerprint")],
    }


def _most(verdict: views.Verdict) -> float:
    ends = [
        end
        for row in (verdict.clean, verdict.worst)
        if row is not None
        for end in (row.value, row.high)
        if not math.isnan(end)
    ]
    return max([*ends, 0.001])


def _reach(drops: Sequence[views.Drop]) -> tuple[float, float]:
    ends = [e for item in drops for e in (item.drop.value, item.drop.low, item.drop.high) if not math.isnan(e)]
    return min([*ends, 0.0]), max([*ends, 0.1])


def _chance(data: Mapping[str, Any]) -> float | None:
    names = data.get("class_names")
    return 1 / len(names) if names and data.get("task") in ("binary", "multiclass") else None


def _reliability(report: Report, bad: views.Condition | None) -> list[tuple[str, str, Markup]]:
    """Return (name, sentence on the calibration error, chart) for clean data and the worst plausible condition."""
    from robustlab.metrics.calibration import reliability

    table = views.index(report.rows)
    wanted = [("clean", "clean", 0.0, "Clean data")]
    if bad is not None:
        wanted.append((bad.key, bad.shift, bad.severity, bad.label))
    found = []
    for key, shift, severity, name in wanted:
        store = report.predictions.get(key)
        if store is None or store.labels is None or store.answers_only:
            continue
        subject = _subject(store, report.manifest.get("data") or {})
        ece, null = views.pick(table, "ece", shift, severity), views.pick(table, "ece-null", shift, severity)
        text = f"ECE {words.estimate(ece)}" if ece is not None else ""
        if ece is not None and null is not None and views.defined(null):
            text += f"; a perfectly calibrated model would show {words.number('ece', null.value)} at this n"
        found.append((name, text, svg.reliability_chart(_bins(reliability(store)), name, subject)))
    return found


def _subject(store: PredictionStore, data: Mapping[str, Any]) -> str:
    """Return what the probabilities of a reliability diagram speak of."""
    names = data.get("class_names") or []
    if store.task == "multilabel":
        return "probability of a label"
    if store.positive_class:
        return f"probability of {names[1]}" if len(names) == 2 else "probability of class 1"
    return "confidence"


def _bins(curve: Reliability) -> list[svg.Bin]:
    columns = (curve.mean_p, curve.frequency, curve.low, curve.high, curve.band_low, curve.band_high, curve.n)
    return [
        svg.Bin(p, frequency, low, high, band_low, band_high, int(n))
        for p, frequency, low, high, band_low, band_high, n in zip(*(c.tolist() for c in columns), strict=True)
    ]


def _histograms(report: Report) -> list[tuple[str, str, Markup]]:
    """Return (set, scorer, chart) for the detector with the highest AUROC on each OOD set."""
    clean = report.predictions.get("clean")
    best: dict[str, ood_views.OodLine] = {}
    for line in ood_views.ood(report):
        row = line.rows.get("auroc-ood")
        if row is not None and views.defined(row):
            rival = best.get(line.name)
            if rival is None or row.value > rival.rows["auroc-ood"].value:
                best[line.name] = line
    found = []
    for name, line in list(best.items())[:_HISTOGRAMS]:
        store = report.predictions.get(f"ood:{name}")
        if clean is None or store is None or line.scorer not in clean.scores or line.scorer not in store.scores:
            continue
        inside, outside, reach = _shares(clean.scores[line.scorer], store.scores[line.scorer])
        auroc = words.estimate(line.rows["auroc-ood"])
        label = f"Scores of {line.scorer} on the evaluated data and on {name}, AUROC {auroc}"
        found.append((name, line.scorer, svg.score_histogram(inside, outside, reach, label)))
    return found


def _confusing(report: Report) -> list[tuple[str, list[confusing.Confusing]]]:
    """Return what confuses each score most, by score."""
    shelves: dict[str, list[confusing.Confusing]] = {}
    for item in confusing.most_confusing(report):
        shelves.setdefault(item.scorer, []).append(item)
    return list(shelves.items())


def _shares(inside: Tensor, outside: Tensor, bins: int = 32) -> tuple[list[float], list[float], tuple[float, float]]:
    """Return shares per bin of both samples on their common range, its outer 0.5 % at each end folded inwards."""
    kept = [part[torch.isfinite(part)].to(torch.float64) for part in (inside, outside)]
    if not all(len(part) for part in kept):
        return [], [], (0.0, 0.0)
    low = min(float(part.quantile(0.005)) for part in kept)
    high = max(float(part.quantile(0.995)) for part in kept)
    high = high if high > low else low + 1.0
    counts = [torch.histc(part.clamp(low, high), bins=bins, min=low, max=high) / len(part) for part in kept]
    return counts[0].tolist(), counts[1].tolist(), (low, high)


def _defenses(report: Report, table: views.Index) -> list[DefenseLine]:
    lines = []
    for entry in report.manifest.get("defenses") or []:
        for row in entry.get("rows") or []:
            metric, shift, severity = row["metric"], row.get("shift", "clean"), float(row.get("severity") or 0)
            value, low, high = (views.as_float(row.get(k)) for k in ("value", "low", "high"))
            own = f"{words.number(metric, value)} ({words.interval(metric, low, high)})"
            place = shift if shift in ("clean", *views.WORST) else f"{shift}, severity {severity:g}"
            plain = views.pick(table, metric, shift, 0.0 if shift in views.WORST else severity)
            lines.append(DefenseLine(str(entry["name"]), metric, place, own, row.get("n"), plain))
    return lines


def _gallery(report: Report) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Return pictures by condition as (source, caption, severity)."""
    shelves: dict[str, list[tuple[str, str, str]]] = {}
    for picture in report.gallery:
        source = "data:image/png;base64," + base64.b64encode(picture.png).decode()
        name = f"severity {picture.severity:g}" if picture.severity else ""
        shelves.setdefault(picture.condition, []).append((source, picture.caption, name))
    return list(shelves.items())


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    return list(_flatten(facts, prefix))


def _flatten(facts: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield f"{prefix}{name}", ", ".join(map(str, value)) or words.DASH
        else:
            yield f"{prefix}{name}", words.DASH if value is None else str(value)
