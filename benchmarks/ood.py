"""Detectors beside pytorch-ood on the same features: agreement of the ranks, time to fit and score, peak memory.

    python -m benchmarks.ood [--quick] [--threads N] [--rounds N] [--json FILE]

Features are drawn from a mixture of classes behind a ReLU, 50,000 x 512 to fit on and as many to score (2,000 x 64 with
--quick). Both sides get the same float32 arrays and the same threads (all, or --threads), one after the other, and the
best of the rounds counts. A rank correlation below 1 is explained in ``docs/validation.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks._rival import FOLDER, RivalMissingError, environment
from defenses.detectors import (
    ASH,
    DICE,
    FDBD,
    GEN,
    KNN,
    MDS,
    RMD,
    SCALE,
    SHE,
    Energy,
    Entropy,
    KLMatching,
    MaxLogit,
    NNGuide,
    ReAct,
    ViM,
)
from robustlab.core.detector import Detector, Head
from robustlab.core.types import ModelOutputs
from robustlab.metrics.base import Context, Frozen
from robustlab.metrics.resample import Resampler
from robustlab.metrics.store import PredictionStore

CLASSES, NEIGHBOURS = 10, 50


def detectors(dim: int) -> dict[str, Detector]:
    """Return ours with the settings of the rival: no shrinkage, the same shares, the whole bank."""
    everything = 1 << 30
    return {
        "max-logit": MaxLogit(),
        "energy": Energy(),
        "entropy": Entropy(),
        "gen": GEN(),
        "kl-matching": KLMatching(),
        "mds": MDS(shrinkage=0.0),
        "rmd": RMD(shrinkage=0.0),
        "knn": KNN(k=NEIGHBOURS, bank=everything),
        "vim": ViM(dim=dim),
        "she": SHE(),
        "nnguide": NNGuide(k=10, bank=everything),
        "fdbd": FDBD(),
        "dice": DICE(sparsity=0.7),
        "react": ReAct(quantile=0.9, bank=everything),
        "ash": ASH(percentile=0.9),
        "scale": SCALE(percentile=0.85),
    }


def drawn(count: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, Head]:
    """Return features float32 (N, D), labels and the last layer of a mixture of classes."""
    layer = torch.Generator().manual_seed(7)
    weight = torch.randn(CLASSES, width, generator=layer) / math.sqrt(width)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    features = (4 * weight[labels] + 0.5 * torch.randn(count, width, generator=generator)).clamp_min_(0)
    return features, labels, Head(weight, 0.1 * torch.randn(CLASSES, generator=layer))


def outputs(features: torch.Tensor, head: Head) -> ModelOutputs:
    """Return what a network with this last layer answers."""
    return ModelOutputs(logits=features @ head.weight.T + head.bias, features={"penultimate": features})


class Rival:
    """pytorch-ood in a process of its own."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [str(environment("pytorchood")), str(FOLDER / "run_pytorchood.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")},
        )  # fmt: skip
        self.versions = self.ask({"do": "load", "path": str(folder / "arrays.npz"), "threads": threads})["versions"]

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a job; ``error`` in it says what failed."""
        if self.process.stdin is None or self.process.stdout is None:
            return {"error": "no pipes"}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended (out of memory?)"}
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each side; all if not given")
    parser.add_argument("--only", nargs="+", help="names of detectors")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    count, width = (2000, 64) if options.quick else (50_000, 512)
    dim = width // 2
    train, labels, head = drawn(count, width, 0)
    test, _, _ = drawn(count, width, 1)
    test[: count // 2] *= 0.6  # what is foreign is weaker
    threads = options.threads
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        arrays = {"train": train, "test": test, "labels": labels, "w": head.weight, "b": head.bias}
        np.savez(folder / "arrays.npz", **{name: value.numpy() for name, value in arrays.items()})
        try:
            rival: Rival | None = Rival(folder, threads)
            print(rival.versions if rival else "")
        except RivalMissingError as error:
            rival = None
            print(f"pytorch-ood is missing: {error}")
        taught, seen = outputs(train, head), outputs(test, head)
        for name, detector in detectors(dim).items():
            if options.only and name not in options.only:
                continue
            best: dict[str, float] = {}
            theirs: dict[str, Any] = {"error": "missing"}
            for _ in range(options.rounds):
                started = time.perf_counter()
                if hasattr(detector, "fit_outputs"):
                    detector.fit_outputs(taught, labels, head)
                fitted = time.perf_counter()
                score = detector.score(seen)
                done = time.perf_counter()
                for key, value in (("fit", fitted - started), ("score", done - fitted)):
                    best[key] = min(best.get(key, math.inf), value)
                if rival is not None:
                    save = str(folder / "scores.npy")
                    theirs = rival.ask({"do": "run", "name": name, "k": NEIGHBOURS, "dim": dim, "save": save})
                    for key in ("fit", "score"):
                        if key in theirs:
                            best[f"rival_{key}"] = min(best.get(f"rival_{key}", math.inf), theirs[key])
            row: dict[str, Any] = {"case": name, "rival": "pytorch-ood 0.4.0"} | {
                k: round(v, 4) for k, v in best.items()
            }
            if "error" in theirs:
                row["error"] = theirs["error"]
            else:
                ours_s, rival_s = best["fit"] + best["score"], best["rival_fit"] + best["rival_score"]
                row["ratio"] = round(rival_s / ours_s, 2)
                other = np.load(folder / "scores.npy")
                row["rank_correlation"] = round(float(spearmanr(score.numpy(), other).statistic), 6)
            row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            rows.append(row)
            print(row, flush=True)
    ratios = {row["case"]: row["ratio"] for row in rows if "ratio" in row}
    summary: dict[str, Any] = {"metrics_2M_seconds": round(metric_seconds(), 2)}
    if ratios:
        plain = [value for name, value in ratios.items() if name not in ("mds", "rmd")]
        summary |= {
            "geomean": round(math.exp(np.mean(np.log(list(ratios.values())))), 2),
            "geomean_without_mahalanobis": round(math.exp(np.mean(np.log(plain))), 2) if plain else None,
            "min": min(ratios.values()),
        }
    print(summary)
    if options.json:
        options.json.write_text(
            json.dumps({"machine": f"{threads} threads", "rows": rows, "summary": summary}, indent=1)
        )


def metric_seconds() -> float:
    """Return how long AUROC, AUPR and FPR95, both ways and with intervals, take on 2 million scores."""
    from robustlab.metrics import compute

    generator = torch.Generator().manual_seed(0)
    count = 1_000_000

    def store(mean: float) -> PredictionStore:
        scores = {"s": mean + torch.randn(count, generator=generator, dtype=torch.float64)}
        return PredictionStore(torch.arange(count), torch.zeros(count, 2), None, "multiclass", scores=scores)

    reference, foreign = store(0.0), store(1.0)
    context = Context(resampler=Resampler(seed=0, replicates=1000), frozen=Frozen(), reference=reference)
    names = ["auroc-ood", "aupr-ood-pos", "aupr-id-pos", "fpr95-ood-pos", "fpr95-id-pos"]
    started = time.perf_counter()
    compute(foreign, context, names)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
