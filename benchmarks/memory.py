"""Peak memory of an evaluation of many images over that of few: it must not grow with the size of the data.

Each size runs in a fresh process, whose peak resident memory (``ru_maxrss``) is read at its end. The images are made
from their ids when they are read, and nothing of them is kept, so what grows is what the evaluation itself holds.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import robustlab
from robustlab.core.source import Source, SourceInfo
from robustlab.core.types import ImageSpec
from robustlab.train import seeded_init

LIMIT_MB = 300
SIZE = 64
SHIFTS = ("gaussian-noise", "contrast-loss", "gamma")  # three severities each: nine shifted conditions and clean
SEVERITIES = (1.0, 3.0, 5.0)
_COPRIME = 2_654_435_761  # spreads consecutive ids over the images' parameters


class SyntheticSource(Source):
    """Grey images of a bright disc on a slope, made from their ids when read; nothing is kept.

    Args:
        count: Number of images.
        first: Id of the first one, so that two sources share no image.
    """

    def __init__(self, count: int, first: int = 0) -> None:
        ids = torch.arange(first, first + count)
        self.info = SourceInfo(
            name=f"synthetic-{count}",
            spec=ImageSpec(channels=1, size=(SIZE, SIZE)),
            ids=ids,
            labels=(_share(ids, 1) > 0.5).to(torch.int64),
            task="binary",
            class_names=("small", "large"),
        )

    def pixels(self, index: Sequence[int]) -> Tensor:
        ids = self.info.ids[torch.as_tensor(list(index))]
        size, x, y, slope = (_share(ids, stream)[:, None, None] for stream in (1, 2, 3, 4))
        axis = torch.linspace(-1, 1, SIZE)
        across, down = axis[None, None, :] - (x - 0.5) / 2, axis[None, :, None] - (y - 0.5) / 2
        disc = (across.square() + down.square()).lt((0.3 + 0.4 * size).square())
        grey = 0.25 + 0.2 * slope * axis[None, :, None] + 0.4 * disc
        return (grey * 255).to(torch.uint8).to(torch.float32).div_(255)[:, None]


def _share(ids: Tensor, stream: int) -> Tensor:
    """Return float32 (N,) in [0, 1): a fixed scatter of the ids, another one a stream."""
    return ((ids * _COPRIME + stream * 40_503_000_001) % 1_000_003).to(torch.float32) / 1_000_003


def small_cnn() -> nn.Module:
    """Return a three-layer network for grey images of 64 px, cheap enough for two million passes."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip


def evaluate_once(count: int, replicates: int) -> dict[str, Any]:
    """Run one evaluation in this process and return what it took."""
    net = seeded_init(small_cnn, 0).eval()
    seconds = _time_scoring()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {}
        if "cache" in inspect.signature(robustlab.evaluate_under_shift).parameters:
            options["cache"] = Path(folder) / "cache"
        report = robustlab.evaluate_under_shift(
            robustlab.wrap(net, task="binary"),
            SyntheticSource(count),
            val=SyntheticSource(2000, first=10**7),
            shifts=SHIFTS,
            severities=SEVERITIES,
            detectors=("msp", "energy"),
            replicates=replicates,
            batch_size=64,
            progress=False,
            **options,
        )
        wall = time.perf_counter() - started
        conditions = len(report.manifest["conditions"])
        report.save(Path(folder) / "report")
    accuracy = report.value("accuracy")
    return {
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "wall_s": wall,
        "scoring_s": seconds(),
        "conditions": conditions,
        "n": accuracy.n,
        "rows": len(report.rows),
        "cache": bool(options),
        "failures": len(report.manifest["failures"]),
    }


def _time_scoring() -> Callable[[], float]:
    """Time the calls that turn predictions into rows; return a function that gives their sum."""
    from robustlab.evaluate import api

    total = [0.0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                total[0] += time.perf_counter() - started

        return run

    found = False
    for name in ("condition_rows", "worst_rows", "ood_rows"):
        if hasattr(api, name):
            found = True
            setattr(api, name, timed(getattr(api, name)))
    return lambda: total[0] if found else math.nan


def in_fresh_process(count: int, replicates: int) -> dict[str, Any]:
    """Run one evaluation in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", str(count), "--replicates", str(replicates)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20,000 images instead of 200,000")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--replicates", type=int, default=1000, help=argparse.SUPPRESS)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(evaluate_once(options.one, options.replicates)))
        return 0
    few, many = 2_000, 20_000 if options.quick else 200_000
    results = {count: in_fresh_process(count, options.replicates) for count in (few, many)}
    for count, found in results.items():
        print(
            f"{count:,} images of {SIZE} px x {found['conditions']} conditions (clean and {found['conditions'] - 1} "
            f"shifted): peak {found['peak_mb']:.0f} MB, {found['wall_s']:.1f} s, of which scoring "
            f"{found['scoring_s']:.1f} s{', with a cache' if found['cache'] else ''}"
        )
    same = all(
        found["n"] == count and not found["failures"] and found["rows"] == results[few]["rows"]
        for count, found in results.items()
    )
    grown = results[many]["peak_mb"] - results[few]["peak_mb"]
    print(f"same rows from both, no failed condition: {same}")
    print(f"difference {grown:.0f} MB, at most {LIMIT_MB} MB allowed: {'within' if grown <= LIMIT_MB else 'EXCEEDED'}")
    rows = [
        {
            "case": f"{SIZE} px, {results[many]['conditions']} conditions: {many:,} images",
            "rival": f"{few:,} images",
            "ours_s": round(results[many]["wall_s"], 2),
            "rival_s": round(results[few]["wall_s"], 2),
            "ratio": round(results[few]["wall_s"] / results[many]["wall_s"], 4),
            "ours_mb": round(results[many]["peak_mb"], 1),
            "rival_mb": round(results[few]["peak_mb"], 1),
            "scoring_s": round(results[many]["scoring_s"], 2),
        }
    ]
    result = {
        "machine": {
            "platform": platform.platform(terse=True),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "rows": rows,
        "summary": {
            "geomean": round(statistics.geometric_mean([float(str(row["ratio"])) for row in rows]), 4),
            "min": rows[0]["ratio"],
            "difference_mb": round(grown, 1),
            "limit_mb": LIMIT_MB,
            "within": grown <= LIMIT_MB,
        },
    }
    print(json.dumps(result["summary"]))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    return 0 if same and grown <= LIMIT_MB else 1


if __name__ == "__main__":
    sys.exit(main())
