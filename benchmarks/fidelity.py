"""Whether the published suites are reproduced: our reference mode beside medmnistc and imagecorruptions, pair by pair.

Deterministic pairs (data set, corruption) must be equal in every pixel at every severity. Random ones are compared in
distribution: for each image the PSNR to the clean image, and the mean and standard deviation of each channel; the mean
over images of ours minus theirs is printed with a 95 % interval, paired by image, and a pair is flagged where 0 lies
outside the interval that is corrected (Bonferroni) for all intervals of the run.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks import _images
from benchmarks._rival import Array, Rival, RivalError, RivalMissingError
from robustlab.core.shift import Shift

RANDOM = {
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "motion_blur", "stain_deposit", "bubble",
    "characters", "fog", "spatter",
}  # fmt: skip
# Glass blur takes the rival a second an image and is compared with the sequential loop in the tests. The others are not
# ImageNet-C's own in imagecorruptions: motion blur and snow are written anew, elastic differs, frost has photographs.
LEFT_OUT = ("glass_blur", "motion_blur", "snow", "elastic_transform", "frost")
SEVERITIES = (1, 2, 3, 4, 5)
ENOUGH = 150
LIKELY_TESTS = 1000  # for the marks in the lines that tell how far it is; the verdicts take the true number


@dataclass
class Interval:
    """The mean over images of a statistic of ours minus theirs, in dB or grey levels."""

    statistic: str
    mean: float
    error: float
    count: int

    def bounds(self, tests: int) -> tuple[float, float]:
        """Return the 95 % interval, corrected for the number of tests."""
        reach = float(stats.t.ppf(1 - 0.025 / tests, self.count - 1)) * self.error
        return self.mean - reach, self.mean + reach

    def flagged(self, tests: int) -> bool:
        """Whether 0 is outside of the corrected interval."""
        low, high = self.bounds(tests)
        return not low <= 0 <= high


@dataclass
class Comparison:
    """One corruption of one data set at one severity."""

    suite: str
    corruption: str
    severity: int
    images: int
    random: bool
    differing: int = 0
    values: int = 0
    largest: int = 0
    intervals: list[Interval] = field(default_factory=list)
    problem: str = ""

    def passed(self, tests: int) -> bool:
        """Whether it agrees."""
        if self.problem:
            return False
        return not any(i.flagged(tests) for i in self.intervals) if self.random else self.differing == 0

    def words(self, tests: int) -> str:
        """Return what was found."""
        if self.problem:
            return self.problem
        if not self.random:
            return "0 differ" if not self.differing else f"{self.differing} of {self.values} (by <= {self.largest})"
        parts = []
        for interval in self.intervals:
            low, high = interval.bounds(1)
            mark = " !" if interval.flagged(tests) else ""
            parts.append(f"{interval.statistic} {interval.mean:+.3f} [{low:+.3f}, {high:+.3f}]{mark}")
        return "; ".join(parts)


def statistics_of(images: Array, clean: Array) -> dict[str, np.ndarray]:
    """Return name to (N,): PSNR in dB (one value off by one level where nothing changed), moments in grey levels."""
    changed = images.reshape(len(images), -1, 1 if images.ndim == 3 else 3).astype(np.float64)
    before = clean.reshape(changed.shape).astype(np.float64)
    error = np.square(changed - before).mean(axis=(1, 2)).clip(min=1 / before[0].size)
    found = {"psnr": 10 * np.log10(255**2 / error)}
    for channel in range(changed.shape[2]):
        name = "" if changed.shape[2] == 1 else " " + "RGB"[channel]
        found[f"mean{name}"] = changed[:, :, channel].mean(axis=1)
        found[f"std{name}"] = changed[:, :, channel].std(axis=1)
    return found


def compare(shift: Shift, severity: int, rival: Rival, key: str, clean: Array, suite: str, dataset: str) -> Comparison:
    """Run ours and theirs side by side on the same images."""
    name = shift.label.removesuffix(_images.DRAWN)
    result = Comparison(suite, name, severity, len(clean), name in RANDOM)
    seed = zlib.crc32(f"{suite}/{name}/{severity}".encode())
    options = {"dataset": dataset} if dataset else {}
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(rival.images, key, name, severity, count=len(clean), seed=seed, **options)
        try:
            pixels = _images.as_tensor(clean)
            ours = _images.as_array(shift(pixels, severity, seed=seed, ids=torch.arange(len(clean))))
        except Exception as error:
            result.problem = f"OURS FAILED: {type(error).__name__}: {error}"
        try:
            theirs = job.result()
        except RivalError as error:
            result.problem = f"RIVAL FAILED: {error}"
    if result.problem:
        return result
    if theirs.shape != ours.shape:
        result.problem = f"shapes {ours.shape} and {theirs.shape}"
    elif result.random:
        first, second = statistics_of(ours, clean), statistics_of(theirs, clean)
        for label, values in first.items():
            gap = values - second[label]
            result.intervals.append(
                Interval(label, float(gap.mean()), float(gap.std(ddof=1) / len(gap) ** 0.5), len(gap))
            )
    else:
        gap = np.abs(ours.astype(np.int16) - theirs.astype(np.int16))
        result.differing, result.values, result.largest = int((gap > 0).sum()), gap.size, int(gap.max())
    return result


@dataclass(frozen=True)
class Job:
    """One suite on one set of images."""

    rival: str
    suite: str
    title: str
    images: Array
    few: int
    dataset: str = ""
    names: tuple[str, ...] | None = None


def jobs(quick: bool) -> Iterable[Job]:
    """Yield what there is to compare; ``few`` images are enough where pixels must be equal."""
    many, few = (40, 4) if quick else (160, 16)
    for dataset in ("pneumoniamnist", "breastmnist"):
        images = _images.stored(dataset, 160 if quick else 1000)
        yield Job("medmnistc", f"medmnist-c/{dataset}", f"{dataset} 28 px", images, len(images), dataset)
    for dataset in _images.STAND_INS:
        yield Job(
            "medmnistc",
            f"medmnist-c/{dataset}",
            f"{dataset} 224 px",
            _images.stand_in(dataset, many),
            few,
            dataset,
        )
    histology = _images.enlarged("oral_he_400x_96", many, colour=True)
    for suite in ("imagenet-c", "imagenet-c-extra"):
        yield Job("imagecorruptions", suite, f"{suite} 224 px", histology, few)


def run(job: Job, rival: Rival, severities: tuple[int, ...], only: str) -> list[Comparison]:
    """Compare every corruption of a suite that both sides have."""
    found = []
    rival.load(job.title, job.images)
    for name, shift in _images.suite_of(job.suite).items():
        if (job.rival == "imagecorruptions" and name in LEFT_OUT) or (only and only not in f"{job.title} {name}"):
            continue
        clean = job.images if name in RANDOM else job.images[: job.few]
        for severity in severities:
            found.append(compare(shift, severity, rival, job.title, clean, job.title, job.dataset))
            line = found[-1]
            print(f"  {job.title} {name} {severity}: n={line.images} {line.words(LIKELY_TESTS)}", flush=True)
    return found


def verdicts(found: list[Comparison], tests: int) -> list[dict[str, Any]]:
    """Return one row a pair: whether it agrees at all severities, and where not."""
    rows: list[dict[str, Any]] = []
    for pair in dict.fromkeys((item.suite, item.corruption) for item in found):
        items = [item for item in found if (item.suite, item.corruption) == pair]
        bad = [item for item in items if not item.passed(tests)]
        kind = "random" if items[0].random else "deterministic"
        verdict = "DIFFERS" if bad else ("agrees" if items[0].random else "equal")
        if not bad and items[0].random and items[0].images < ENOUGH:
            verdict = f"agrees, n < {ENOUGH}"
        rows.append(
            {
                "suite": pair[0],
                "corruption": pair[1],
                "kind": kind,
                "images": items[0].images,
                "verdict": verdict,
                "where": {item.severity: item.words(tests) for item in bad},
                "severities": [
                    {
                        "severity": item.severity,
                        "differing": None if item.random else item.differing,
                        "differences": {
                            i.statistic: [round(value, 5) for value in (i.mean, *i.bounds(1))] for i in item.intervals
                        },
                    }
                    for item in items
                ],
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images, severities 1, 3 and 5")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--only", default="", help="only pairs with this in 'SET SIZE px CORRUPTION'")
    options = parser.parse_args()
    severities = (1, 3, 5) if options.quick else SEVERITIES
    rivals: dict[str, Rival] = {}
    missing: dict[str, str] = {}
    found: list[Comparison] = []
    for job in jobs(options.quick):
        if job.rival in missing:
            continue
        try:
            if job.rival not in rivals:
                rivals[job.rival] = Rival(job.rival)
            found += run(job, rivals[job.rival], severities, options.only)
        except RivalMissingError as error:
            missing[job.rival] = str(error)
    tests = max(1, sum(len(item.intervals) for item in found))
    rows = verdicts(found, tests)
    print(f"\n{len(rows)} pairs, {tests} intervals; '!' marks those that exclude 0 after correction")
    for row in rows:
        print(f"{row['suite']:<24} {row['corruption']:<18} n={row['images']:<4} {row['kind']:<13} {row['verdict']}")
        for severity, words in row["where"].items():
            print(f"    severity {severity}: {words}")
    for reason in missing.values():
        print(f"MISSING, not compared: {reason}")
    result = {
        "machine": {"platform": platform.platform(terse=True), "torch": torch.__version__},
        "rivals": {name: rival.versions for name, rival in rivals.items()},
        "missing": missing,
        "rows": rows,
        "summary": {
            "pairs": len(rows),
            "intervals": tests,
            "differ": sum(row["verdict"] == "DIFFERS" for row in rows),
        },
    }
    print(json.dumps(result["summary"]))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    for rival in rivals.values():
        rival.close()
    return 1 if missing or any(row["verdict"] == "DIFFERS" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
