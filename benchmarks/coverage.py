"""How often the 95 % intervals hold the truth: simulated data with a known answer, 60, 200 and 2,000 patients.

Every run draws new data, and asks the library as a user would. The truths are closed forms of normal distributions,
except for the calibration error, whose interval is for its expected plug-in value: there the truth is the mean over all
runs. A third of the patients are positive. The bar is 93 to 98 % (at least 92 % for clustered intervals on 20 images a
patient, where the plain interval must be seen to fail); a miss is printed as one.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import norm

from robustlab.metrics import (
    Context,
    Frozen,
    PredictionStore,
    Resampler,
    calibration_test,
    compute,
    paired_difference,
    worst_condition,
)

RUNS, QUICK = 2000, 200
SIZES = (60, 200, 2000)
WORKERS = 2
BAR = (0.93, 0.98)
CLUSTERED_BAR = (0.92, 1.0)
SIZE_BAR = (0.02, 0.08)  # of a test at 5 %

APART = 1.8  # distance of the two normal scores, in standard deviations
OFFSET = 0.5  # of the decision
SURE = 1.0  # log-odds at or below which a case is referred
SECOND = 1.2  # distance of the second model's scores
TOGETHER = 0.7  # correlation of the two models' scores within a class
OOD_APART = 1.5
CONDITIONS = 30
IMAGES = 20  # a patient
BETWEEN = 1.2  # standard deviation between patients, of scores whose own is 1

Numbers = Mapping[str, tuple[float, float, float]]
"""Name to (point, low, high)."""


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    case: str
    metric: str
    n: int
    runs: int
    undefined: int
    truth: float
    coverage: float
    width: float
    bar: tuple[float, float]

    @property
    def verdict(self) -> str:
        """Whether the coverage lies within the bar."""
        return "ok" if self.bar[0] <= self.coverage <= self.bar[1] else "MISS"


def context(replicates: int = 1000) -> Context:
    """Return a context with frozen operating points."""
    frozen = Frozen(thresholds=torch.tensor([0.5], dtype=torch.float64), confidence=SURE)
    return Context(Resampler(replicates=replicates), frozen)


def labels_of(n: int) -> np.ndarray[Any, Any]:
    """Return n labels of which a third are 1."""
    return (np.arange(n) < n // 3).astype(np.int64)


def store_of(values: np.ndarray[Any, Any], labels: np.ndarray[Any, Any] | None, **more: Any) -> PredictionStore:
    """Return two-class predictions whose log-odds are the values."""
    logits = torch.from_numpy(np.stack([np.zeros_like(values), values], 1))
    known = None if labels is None else torch.from_numpy(labels)
    return PredictionStore(torch.arange(len(values)), logits, known, "binary", **more)


def ends(values: Iterable[Any]) -> Numbers:
    """Return the first value of every metric."""
    out: dict[str, tuple[float, float, float]] = {}
    for value in values:
        made = value.estimate
        out.setdefault(value.metric, (made.value, made.low, made.high))
    return out


def odds(rng: np.random.Generator, labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return log-odds of one model."""
    return APART * (rng.normal(size=len(labels)) + APART * (labels - 0.5)) - OFFSET


def rates(apart: float) -> dict[str, float]:
    """Return what is true of a model whose scores lie ``apart``."""
    hit = [float(norm.cdf(apart / 2 - side * OFFSET / apart)) for side in (1, -1)]
    silent = [float(norm.cdf(-apart / 2 - (SURE - side * OFFSET) / apart)) for side in (1, -1)]
    return {
        "accuracy": hit[0] / 3 + hit[1] * 2 / 3,
        "balanced-accuracy": sum(hit) / 2,
        "auroc": float(norm.cdf(apart / math.sqrt(2))),
        "silent-failure-rate": silent[0] / 3 + silent[1] * 2 / 3,
    }


# ---------------------------------------------------------------------------------------------------- one run a case


def one_model(rng: np.random.Generator, n: int) -> Numbers:
    """Metrics of one model on independent patients."""
    labels = labels_of(n)
    return ends(compute(store_of(odds(rng, labels), labels), context(), list(rates(APART))))


def detection(rng: np.random.Generator, n: int) -> Numbers:
    """OOD metrics, a third of the scores being out of distribution."""
    sides = []
    for count, shift in ((n - n // 3, 0.0), (n // 3, OOD_APART)):
        scores = rng.normal(size=count) + shift
        sides.append(store_of(scores, None, scores={"score": torch.from_numpy(scores)}))
    names = ["auroc-ood", "fpr95-ood-pos", "fpr95-id-pos"]
    return ends(compute(sides[1], replace(context(), reference=sides[0]), names))


def paired(rng: np.random.Generator, n: int) -> Numbers:
    """Differences of two models on the same patients."""
    labels = labels_of(n)
    first, own = rng.normal(size=(2, n))
    second = TOGETHER * first + math.sqrt(1 - TOGETHER**2) * own
    stores = [
        store_of(apart * (noise + apart * (labels - 0.5)) - OFFSET, labels)
        for apart, noise in ((APART, first), (SECOND, second))
    ]
    made = {name: paired_difference(*stores, name, context()) for name in rates(APART)}
    return {name: (item.value, item.low, item.high) for name, item in made.items()}


def worst(rng: np.random.Generator, n: int, *, spread: float, shared: float) -> Numbers:
    """The worst of 30 conditions on the same patients; truths are taken off, so that 0 is the truth."""
    truths = 0.85 + spread * np.linspace(-1, 1, CONDITIONS)
    noise = math.sqrt(shared) * rng.normal(size=(n, 1)) + math.sqrt(1 - shared) * rng.normal(size=(n, CONDITIONS))
    labels = labels_of(n)
    wrong = noise > norm.ppf(truths)
    stores = {}
    for k in range(CONDITIONS):
        answer = np.where(wrong[:, k], 1 - labels, labels)
        stores[str(k)] = store_of(np.where(answer == 1, 2.0, -2.0), labels)
    key, made = worst_condition(stores, "accuracy", context())
    truth = float(truths[int(key)])
    return {"accuracy": (made.value - truth, made.low - truth, made.high - truth)}


def calibration(rng: np.random.Generator, n: int, *, scale: float) -> Numbers:
    """ECE, and the p-value of the test of perfect calibration, of log-odds that are ``scale`` times too large."""
    true = rng.normal(-0.7, 1.8, size=n)
    labels = (rng.random(n) < 1 / (1 + np.exp(-true))).astype(np.int64)
    store = store_of(scale * true, labels)
    p = calibration_test(store, context())
    return {**ends(compute(store, context(), ["ece"])), "null test": (p, p, p)}


def clustered(rng: np.random.Generator, n: int, *, known: bool) -> Numbers:
    """Metrics on 20 images a patient, with the patients known or not."""
    patients = labels_of(n)
    labels = np.repeat(patients, IMAGES)
    own = BETWEEN * np.repeat(rng.normal(size=n), IMAGES) + rng.normal(size=n * IMAGES)
    total = math.sqrt(1 + BETWEEN**2)
    scores = APART * (own / total + APART * (labels - 0.5)) - OFFSET
    clusters = torch.arange(n).repeat_interleave(IMAGES) if known else None
    names = [name for name in rates(APART) if name != "silent-failure-rate"]  # that one counts patients, not images
    return ends(compute(store_of(scores, labels, clusters=clusters), context(), names))


Run = Callable[[np.random.Generator, int], Numbers]
_BOTH = rates(APART)
_OOD = {
    "auroc-ood": float(norm.cdf(OOD_APART / math.sqrt(2))),
    "fpr95-ood-pos": float(norm.sf(OOD_APART - norm.ppf(0.95))),
    "fpr95-id-pos": float(norm.cdf(norm.ppf(0.95) - OOD_APART)),
}
_DIFFERENCE = {name: rates(SECOND)[name] - value for name, value in _BOTH.items()}
CASES: dict[str, tuple[Run, dict[str, float] | None, tuple[int, ...]]] = {
    "one model": (one_model, _BOTH, SIZES),
    "ood detection": (detection, _OOD, SIZES),
    "paired difference": (paired, _DIFFERENCE, SIZES),
    "worst of 30, equal, independent": (partial(worst, spread=0.0, shared=0.0), {"accuracy": 0.0}, SIZES),
    "worst of 30, equal, correlated": (partial(worst, spread=0.0, shared=0.6), {"accuracy": 0.0}, SIZES),
    "worst of 30, different": (partial(worst, spread=0.05, shared=0.6), {"accuracy": 0.0}, SIZES),
    "calibrated": (partial(calibration, scale=1.0), None, SIZES),
    "overconfident": (partial(calibration, scale=1.7), None, SIZES),
    "20 images a patient, clustered": (partial(clustered, known=True), _BOTH, SIZES[:2]),
    "20 images a patient, plain": (partial(clustered, known=False), _BOTH, SIZES[:2]),
}


# ------------------------------------------------------------------------------------------------------- all the runs


def _part(case: str, n: int, runs: tuple[int, int]) -> list[Numbers]:
    torch.set_num_threads(1)
    function = CASES[case][0]
    seed = list(CASES).index(case)
    return [function(np.random.default_rng((seed, n, run)), n) for run in range(*runs)]


def lines_of(case: str, n: int, found: list[Numbers]) -> list[Line]:
    """Return the coverage of every metric of a case."""
    truths = CASES[case][1]
    lines = []
    for metric in found[0]:
        numbers = np.array([run[metric] for run in found])
        if metric == "null test":
            if case == "calibrated":
                share = float((numbers[:, 0] < 0.05).mean())
                lines.append(Line(case, "size of the null test", n, len(found), 0, 0.05, share, math.nan, SIZE_BAR))
            continue
        truth = float(numbers[:, 0].mean()) if truths is None else truths[metric]
        missing = np.isnan(numbers[:, 1:]).any(1)
        low, high = numbers[~missing, 1:].T
        bar = CLUSTERED_BAR if case.endswith("clustered") else BAR
        if case.endswith("plain"):
            bar = (0.0, CLUSTERED_BAR[0])
        lines.append(
            Line(
                case,
                metric,
                n,
                len(found),
                int(missing.sum()),
                truth,
                float(((low <= truth) & (truth <= high)).mean()),
                float((high - low).mean()),
                bar,
            )
        )
    return lines


def main() -> None:
    """Run all cases and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} runs a case instead of {RUNS}")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    runs = QUICK if arguments.quick else RUNS
    step = max(1, runs // (4 * WORKERS))
    lines: list[Line] = []
    start = time.perf_counter()
    print(f"{'case':<34}{'metric':<23}{'n':>6}{'runs':>6}{'NaN':>5}{'truth':>9}{'coverage':>10}{'width':>9}  bar")
    with ProcessPoolExecutor(WORKERS) as pool:
        for case, (_, _, sizes) in CASES.items():
            if arguments.only not in case:
                continue
            for n in sizes:
                parts = [(first, min(first + step, runs)) for first in range(0, runs, step)]
                found = [item for part in pool.map(partial(_part, case, n), parts) for item in part]
                for line in lines_of(case, n, found):
                    lines.append(line)
                    print(
                        f"{line.case:<34}{line.metric:<23}{line.n:>6}{line.runs:>6}{line.undefined:>5}"
                        f"{line.truth:>9.4f}{line.coverage:>10.4f}{line.width:>9.4f}"
                        f"  {line.bar[0]:.2f} to {line.bar[1]:.2f} {line.verdict}",
                        flush=True,
                    )
    missed = sum(line.verdict != "ok" for line in lines)
    print(f"{len(lines)} lines, {missed} missed, {time.perf_counter() - start:.0f} s")
    if arguments.json:
        rows = [{**line.__dict__, "verdict": line.verdict} for line in lines]
        arguments.json.write_text(json.dumps({"rows": rows, "missed": missed}, indent=1))


if __name__ == "__main__":
    main()
