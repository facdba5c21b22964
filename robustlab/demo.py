"""The known-answer demo: data with known truth, planted faults, and what the report says of them.

Radiograph phantoms come from a generator whose posterior is known. The training images carry a marker that goes with
the finding (a shortcut). The network standardises each image, so a loss of contrast is harmless by construction, and
then sharpens it, so that noise does harm by construction. A twin holds the same function in permuted weights. The
report must find the breaking shift, clear the harmless one, expose the shortcut, and say *no decision* on the twin; the
truth beside each estimate comes from a large fresh sample and, for the best possible accuracy, from the posterior.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses import TemperatureScaling
from robustlab.core.corruption import Corruption
from robustlab.core.levels import Levels
from robustlab.core.model import wrap
from robustlab.core.registry import CORRUPTIONS, SUITES
from robustlab.core.rng import SampleRng
from robustlab.core.shift import Shift, ShiftContext, as_stored
from robustlab.data import RadiographPhantom
from robustlab.data.radiograph import MARKER_GREY, marker_stamps
from robustlab.evaluate import evaluate_under_shift
from robustlab.metrics.stats import condition_verdict
from robustlab.report.compare import compare
from robustlab.report.report import Report
from robustlab.train import fit, seeded_init

MARGIN = 0.02
SEVERITIES = (1, 3, 5)
BREAKING, HARMLESS, SHORTCUT = "gaussian-noise", "contrast-loss", "laterality-marker"
POPULATION = 4000
SIZE = 48


@dataclass(frozen=True)
class Claim:
    """A planted fact, what the report says of it, and the truth.

    Args:
        claim: The fact in words.
        metric: Metric of the estimate.
        where: Condition in words.
        estimate: What the report estimates.
        low: Lower end of its 95 % interval.
        high: Upper end.
        truth: The true value.
        verdict: The report's word.
        right: The word is the right one.
    """

    claim: str
    metric: str
    where: str
    estimate: float
    low: float
    high: float
    truth: float
    verdict: str
    right: bool


@dataclass(frozen=True)
class LateralityMarker(Corruption):
    """Blend the marker into every image: a counterfactual that only a model with the shortcut minds."""

    opacity: Levels = Levels((0.2, 0.4, 0.6, 0.8, 1.0), identity=0.0, unit="of the marker's grey")
    name = SHORTCUT
    family = "artifact"

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> Mapping[str, Tensor]:
        stamps = marker_stamps(shape[1]).to(rng.keys.device)
        return {"stamp": stamps[rng.integers("place", len(stamps))][:, None]}

    def apply(self, images: Tensor, draws: Mapping[str, Tensor], values: Mapping[str, float]) -> Tensor:
        marked = torch.lerp(images, torch.full_like(images, MARKER_GREY), values["opacity"])
        return torch.where(draws["stamp"] > 0, marked, images)


class Standardise(nn.Module):
    """Standardise each image, then add ``sharpness`` times its Laplacian."""

    def __init__(self, sharpness: float = 0.1) -> None:
        super().__init__()
        kernel = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]])
        self.register_buffer("kernel", kernel.view(1, 1, 3, 3) * sharpness)

    def forward(self, images: Tensor) -> Tensor:
        """Return standardised, sharpened images (N, 1, H, W)."""
        mean = images.mean((1, 2, 3), keepdim=True)
        spread = images.std((1, 2, 3), keepdim=True).clamp_min(1e-3)
        plain = (images - mean) / spread
        edges = F.conv2d(F.pad(plain, (1, 1, 1, 1), mode="replicate"), self.kernel)  # type: ignore[arg-type]
        return plain + edges


def demo_net() -> nn.Module:
    """Return the demo's network: the planted front end, three convolutions and a linear layer."""

    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    return nn.Sequential(
        Standardise(),
        *block(1, 16),
        *block(16, 32),
        *block(32, 32),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(288, 2),
    )


def twin_of(net: nn.Module) -> nn.Module:
    """Return the same function in other weights: the last convolution's channels are permuted, and permuted back."""
    twin = copy.deepcopy(net)
    conv = [module for module in twin.modules() if isinstance(module, nn.Conv2d)][-1]
    norm = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    head = [module for module in twin.modules() if isinstance(module, nn.Linear)][-1]
    channels = conv.out_channels
    order = torch.arange(channels - 1, -1, -1)
    state = norm.state_dict()
    norm.load_state_dict({name: value[order] if value.shape == (channels,) else value for name, value in state.items()})
    with torch.no_grad():
        conv.weight.copy_(conv.weight[order])
        head.weight.copy_(head.weight.view(2, channels, -1)[:, order].flatten(1))
    return twin


def run_demo(seed: int = 0, *, gallery: bool = True, progress: bool = True) -> Report:
    """Train the demo's network, evaluate it, and put the truth beside the estimates (``manifest["truth"]``).

    Args:
        seed: Seed of data, training and draws.
        gallery: Put phantom pictures into the report.
        progress: Show progress bars.
    """
    marked = {"marker_with_label": 0.85, "marker_without": 0.15}
    train = RadiographPhantom(1500, seed, SIZE, split="train", **marked)
    val = RadiographPhantom(400, seed, SIZE, split="val", **marked)
    test = RadiographPhantom(1000, seed, SIZE, split="test", **marked)
    net = seeded_init(demo_net, seed)
    model = wrap(net, task="multiclass", output="logits", name="demo-net")
    fit(model, train, val, epochs=8, batch_size=64, lr=3e-3, seed=seed, progress=progress)

    shifts: tuple[Shift, ...] = (*SUITES.get("standard")(), LateralityMarker())
    common: dict[str, Any] = {
        "val": val,
        "severities": SEVERITIES,
        "margin": MARGIN,
        "seed": seed,
        "progress": progress,
    }
    report = evaluate_under_shift(
        model, test, shifts=shifts, groups=("marker", "sex"), cluster="patient", gallery=gallery, **common
    )
    planted: tuple[Shift, ...] = (CORRUPTIONS.get(BREAKING)(), CORRUPTIONS.get(HARMLESS)(), LateralityMarker())
    twin = evaluate_under_shift(
        wrap(twin_of(net), task="multiclass", output="logits", name="twin"),
        test,
        shifts=planted,
        cluster="patient",
        **common,
    )
    calibrated = TemperatureScaling(model).fit(None, val)
    defended = evaluate_under_shift(calibrated, test, shifts=planted[:1], cluster="patient", **common)

    population = RadiographPhantom(POPULATION, seed + 1_000_003, SIZE, split="test", **marked)
    claims = [*_claims(report, _true_accuracy(model, population, planted, seed)), _twin_claim(report, twin)]
    manifest = {
        **report.manifest,
        "truth": [asdict(claim) for claim in claims],
        "compared": [_compared(report, twin)],
        "defenses": [_defended(defended)],
    }
    return replace(report, manifest=manifest)


def _true_accuracy(model: Any, source: Any, shifts: tuple[Shift, ...], seed: int) -> dict[str, float]:
    """Return the expected accuracy over a large fresh sample: the posterior of each answer, so without label noise."""
    ctx = ShiftContext(seed=seed + 1, spec=source.info.spec)
    posterior = source.info.posterior
    totals: dict[str, float] = {}
    for start in range(0, len(source), 250):
        rows = list(range(start, min(start + 250, len(source))))
        batch = source.read(rows)
        for shift in (None, *shifts):
            changed = batch if shift is None else shift.on(batch, SEVERITIES[-1], ctx)
            stored = changed.images if shift is None else as_stored(shift, changed.images, ctx.spec)
            answers = model.predict(changed.replace(stored)).logits.argmax(1)
            key = "clean" if shift is None else shift.label
            chance = posterior[rows].gather(1, answers[:, None]).sum()
            totals[key] = totals.get(key, 0.0) + float(chance)
    best = float(posterior.max(1).values.mean())
    return {"best": best, **{key: total / len(source) for key, total in totals.items()}}


def _claims(report: Report, truth: Mapping[str, float]) -> list[Claim]:
    clean = report.value("accuracy")
    inside = clean.low <= truth["clean"] <= clean.high
    claims = [
        Claim("Accuracy on clean data", "accuracy", f"clean; best possible {truth['best']:.3f}", clean.value, clean.low,
              clean.high, truth["clean"], "truth inside" if inside else "truth outside", inside),
    ]  # fmt: skip
    top = SEVERITIES[-1]
    for label, words, wanted in (
        (BREAKING, "This shift breaks the model", "breaks"),
        (HARMLESS, "This shift is harmless", "holds"),
        (SHORTCUT, "The marker is a shortcut", "breaks"),
    ):
        row = report.value("accuracy-drop", shift=label, severity=top)
        verdict = condition_verdict(row.low, row.high, MARGIN)
        drop = truth["clean"] - truth[label]
        planted = drop > MARGIN if wanted == "breaks" else abs(drop) < MARGIN
        claims.append(
            Claim(words, "accuracy-drop", f"{label}, severity {top}", row.value, row.low, row.high, drop, verdict,
                  planted and verdict == wanted)
        )  # fmt: skip
    return claims


def _worst_twin_row(report: Report, twin: Report) -> Any:
    comparison = compare(report, twin)
    decided = [row for row in comparison.rows if not row.verdict.startswith("no decision")]
    return decided[0] if decided else comparison.rows[0]


def _twin_claim(report: Report, twin: Report) -> Claim:
    row = _worst_twin_row(report, twin)
    return Claim(
        "The twin is the same model", "accuracy", f"{row.condition}, twin minus model", row.difference, row.low,
        row.high, 0.0, row.verdict.partition(" (")[0], row.verdict.startswith("no decision"),
    )  # fmt: skip


def _compared(report: Report, twin: Report) -> dict[str, Any]:
    row = _worst_twin_row(report, twin)
    return {"other": "twin", "metric": "accuracy", "difference": row.difference, "low": row.low, "high": row.high,
            "verdict": row.verdict}  # fmt: skip


def _defended(report: Report) -> dict[str, Any]:
    places = (("clean", 0), (BREAKING, SEVERITIES[1]))
    rows = [
        json.loads(json.dumps(asdict(report.value(metric, shift=shift, severity=severity))))
        for metric in ("accuracy", "ece", "brier")
        for shift, severity in places
    ]
    return {"name": "temperature scaling", "rows": rows}


def all_right(report: Report) -> bool:
    """Tell whether the report got every planted fact right (the clean interval may miss, as it does 1 time in 20)."""
    return all(
        claim["right"]
        for claim in report.manifest["truth"]
        if claim["metric"] != "accuracy" or "twin" in claim["where"]
    )


def write_demo(folder: Path, seed: int = 0, *, progress: bool = True) -> tuple[Report, Path]:
    """Run the demo and write its report into ``folder``; return the report and the HTML file."""
    report = run_demo(seed, progress=progress)
    report.save(folder)
    return report, report.to_html(folder / "report.html")
