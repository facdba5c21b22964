"""What the harness costs over bare forward passes on the same images, and random numbers over ``torch.randn``.

Both sides run in turn in one process: the bare loop feeds the network the very images that the evaluation feeds it (as
many, prepared the same way, in chunks of the same size); the evaluation decodes, draws, shifts, quantises, runs the
network, keeps every answer in a cache, and makes every number with its interval.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import robustlab
from robustlab.core.rng import SampleRng
from robustlab.core.types import Batch
from robustlab.data import load_data
from robustlab.train import seeded_init


def small_cnn() -> nn.Module:
    """Return a three-layer network for 28 px grey images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip


def resnet18() -> nn.Module:
    """Return an untrained ResNet-18 with two classes."""
    net: nn.Module = timm.create_model("resnet18", num_classes=2)
    return net


def case_data(count: int, channels: int, size: int, seed: int) -> robustlab.Source:
    """Return random 8-bit images with labels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    images = (smooth * 255).to(torch.uint8)
    array = images[:, 0].numpy() if channels == 1 else images.permute(0, 2, 3, 1).numpy()
    labels = (torch.arange(count) % 2).numpy()
    return load_data(array, labels=labels, name=f"synthetic-{size}")


def bare(model: robustlab.Model, source: robustlab.Source, chunk: int, conditions: int) -> float:
    """Time forward passes alone: as many chunks of the same images as the evaluation runs."""
    padded = [min(i, len(source) - 1) for i in range(-(-len(source) // chunk) * chunk)]
    batches = [source.read(padded[i : i + chunk]) for i in range(0, len(padded), chunk)]
    started = time.perf_counter()
    for _ in range(conditions):
        for batch in batches:
            model.predict(batch)
    return time.perf_counter() - started


def whole(model: Any, source: Any, val: Any, chunk: int, levels: tuple[float, ...]) -> tuple[float, robustlab.Report]:
    """Time the whole evaluation, with an empty cache that keeps every answer."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        report = robustlab.evaluate_under_shift(
            model, source, val=val, severities=levels, batch_size=chunk, cache=folder, progress=False
        )
        return time.perf_counter() - started, report


def profile(call: Callable[[], object], rows: int = 14) -> list[str]:
    """Return the functions that a call spends most of its own time in."""
    profiler = cProfile.Profile()
    profiler.runcall(call)
    stats = pstats.Stats(profiler)
    entries = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:rows]  # type: ignore[attr-defined]
    return [f"{values[2]:8.3f} s  {Path(file).name}:{line} {name}" for (file, line, name), values in entries]


def random_numbers(rounds: int) -> list[dict[str, object]]:
    """Compare keyed random numbers with torch's own generator on the same shape."""
    rows = []
    for count, shape in ((64, (3, 224, 224)), (512, (1, 28, 28))):
        rng = SampleRng.make(0, "benchmark", torch.arange(count))
        pairs: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
            (
                "normal",
                lambda rng=rng, shape=shape: rng.normal("z", shape),
                lambda c=count, s=shape: torch.randn(c, *s),
            ),
            (
                "uniform",
                lambda rng=rng, shape=shape: rng.uniform("u", shape),
                lambda c=count, s=shape: torch.rand(c, *s),
            ),
        ]
        for name, ours, rival in pairs:
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(rounds + 1):
                for side, call in zip(times, (ours, rival), strict=True):
                    started = time.perf_counter()
                    call()
                    side.append(time.perf_counter() - started)
            a, b = (statistics.median(side[1:]) for side in times)
            rows.append(
                _row(
                    f"{name} {count}x{'x'.join(map(str, shape))}",
                    f"torch.{'randn' if name == 'normal' else 'rand'}",
                    a,
                    b,
                )
            )
    return rows


def _row(case: str, rival: str, ours: float, theirs: float) -> dict[str, object]:
    return {
        "case": case,
        "rival": rival,
        "ours_s": round(ours, 5),
        "rival_s": round(theirs, 5),
        "ratio": round(theirs / ours, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    options = parser.parse_args()
    rounds = 1 if options.quick else 3
    levels = (3.0,) if options.quick else (1.0, 3.0, 5.0)
    cases = [
        ("small CNN, 28 px grey", small_cnn, 256 if options.quick else 1024, 1, 28, 64),
        ("resnet18, 224 px RGB", resnet18, 16 if options.quick else 64, 3, 224, 16),
    ]
    rows: list[dict[str, object]] = []
    for name, build, count, channels, size, chunk in cases:
        net = seeded_init(build, 0)
        source, val = case_data(count, channels, size, 0), case_data(64, channels, size, 1)
        model = robustlab.wrap(net, task="multiclass")
        times: tuple[list[float], list[float]] = ([], [])
        net.eval()
        _, report = whole(model, source, val, chunk, levels)
        passes = len(report.manifest["conditions"])
        for _ in range(rounds):
            times[0].append(whole(model, source, val, chunk, levels)[0])
            times[1].append(bare(model, source, chunk, passes) + bare(model, val, chunk, 1))
        ours, theirs = (statistics.median(side) for side in times)
        rows.append(_row(f"{name}, {count} images x {passes} conditions", "bare forward passes", ours, theirs))
        print(f"{name}: whole {ours:.2f} s, bare {theirs:.2f} s, whole / bare = {ours / theirs:.3f}")
        clean = model.predict(_first(source, chunk)).logits
        same = torch.equal(clean, report.predictions["clean"].logits[:chunk])
        print(f"  same clean logits on both sides: {same}")
        if options.profile:
            print(
                "\n".join(
                    f"  {line}" for line in profile(lambda m=model, s=source, v=val, c=chunk: whole(m, s, v, c, levels))
                )
            )
    rows += random_numbers(5 if options.quick else 15)
    for row in rows[len(cases) :]:
        print(f"{row['case']}: ours {row['ours_s']} s, {row['rival']} {row['rival_s']} s, ratio {row['ratio']}")
    ratios = [float(str(row["ratio"])) for row in rows]
    result = {
        "machine": {
            "platform": platform.platform(terse=True),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "rows": rows,
        "summary": {"geomean": round(statistics.geometric_mean(ratios), 4), "min": min(ratios)},
    }
    print(json.dumps(result["summary"]))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


def _first(source: robustlab.Source, chunk: int) -> Batch:
    return source.read(range(chunk))


if __name__ == "__main__":
    main()
