"""How fast corruptions are beside imagecorruptions, medmnistc and albumentations, and beside a copy of the same bytes.

uint8 in and out, batch 64, severity 3, 224 px RGB (histology, 96 px enlarged by Pillow's bicubic filter), 224 px grey
(chest X-rays, likewise) and 28 px grey (PneumoniaMNIST). Ours is ``shift(images, severity, ids=ids)`` on a tensor whose
memory is as it came from the file; the rivals are looped over image by image, as their users do. Rounds alternate; the
medians count. Slow rivals do as many images a round as fit into a second, scaled up to the batch. A row says whether
both sides did the same kind of thing: equal pixels, or the same PSNR to the clean images (of their mean square error)
within 1 dB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks import _images
from benchmarks._rival import Array, Rival, RivalMissingError
from robustlab.core.registry import CORRUPTIONS

BATCH, SEVERITY, THREADS = 64, 3, 2
SECOND = 1.0  # of a rival's time a round
ALIKE_DB = 1.0
EPSILON = 1e-9

IMAGECORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
    "speckle_noise", "gaussian_blur", "spatter", "saturate",
)  # fmt: skip
_TONE = ("brightness_up", "brightness_down", "contrast_up", "contrast_down")
_GAMMA = ("gamma_corr_up", "gamma_corr_down")
_NOISE = ("gaussian_noise", "speckle_noise", "impulse_noise", "shot_noise")
_DIGITAL = ("pixelate", "jpeg_compression")
MEDMNISTC = {  # chest and pneumonia are both X-ray, organ a, c and s both CT with the same numbers
    "pathmnist": (*_DIGITAL, "defocus_blur", "motion_blur", *_TONE, "saturate", "stain_deposit", "bubble"),
    "bloodmnist": (*_DIGITAL, "defocus_blur", "motion_blur", *_TONE, "saturate", "stain_deposit", "bubble"),
    "dermamnist": (
        *_DIGITAL, *_NOISE, "defocus_blur", "motion_blur", "zoom_blur", *_TONE, "black_corner", "characters",
    ),
    "retinamnist": (
        *_DIGITAL, "gaussian_noise", "speckle_noise", "defocus_blur", "motion_blur", "brightness_down", "contrast_down",
    ),
    "tissuemnist": (*_DIGITAL, "impulse_noise", "gaussian_blur", *_TONE),
    "octmnist": (*_DIGITAL, "speckle_noise", "defocus_blur", "motion_blur", "contrast_down"),
    "breastmnist": (*_DIGITAL, "speckle_noise", "motion_blur", "brightness_up", "brightness_down", "contrast_down"),
    "chestmnist": (*_DIGITAL, *_NOISE, "gaussian_blur", *_TONE, *_GAMMA),
    "organamnist": (*_DIGITAL, *_NOISE, "gaussian_blur", *_TONE, *_GAMMA),
}  # fmt: skip
AT_28 = ("pneumoniamnist", (*_DIGITAL, *_NOISE, "gaussian_blur", *_TONE, *_GAMMA))

_AREA = {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_NEAREST}
_LINEAR = {"downscale": cv2.INTER_LINEAR, "upscale": cv2.INTER_LINEAR}
_GLASS: dict[str, Any] = {"sigma": 1.0, "max_delta": 2, "iterations": 3, "p": 1}
_STAIN: dict[str, Any] = {"intensity_scale_range": (1.35, 1.35), "intensity_shift_range": (0, 0), "p": 1}


def _fixed(value: float) -> tuple[float, float]:
    return (value, value)


# our corruption, its fixed parameters, the rival's transform, the bar (0: none), whether PSNR should match
Pair = tuple[str, dict[str, float], Callable[[], A.BasicTransform], float, bool]
ALBUMENTATIONS: tuple[Pair, ...] = (
    ("gaussian-noise", {"sigma": 0.1}, lambda: A.GaussNoise(std_range=_fixed(0.1), p=1), 3, True),
    ("ref:gaussian-noise", {"sigma": 0.1}, lambda: A.GaussNoise(std_range=_fixed(0.1), p=1), 3, True),
    ("poisson-noise", {"photons": 20}, lambda: A.ShotNoise(scale_range=_fixed(0.05), p=1), 3, False),  # in linear light
    ("ref:shot-noise", {"photons": 20}, lambda: A.ShotNoise(scale_range=_fixed(0.05), p=1), 3, False),
    ("impulse-noise", {"amount": 0.09}, lambda: A.SaltAndPepper(amount=_fixed(0.09), p=1), 3, True),
    ("ref:impulse-noise", {"amount": 0.09}, lambda: A.SaltAndPepper(amount=_fixed(0.09), p=1), 3, True),
    ("ref:speckle-noise", {"sigma": 0.2}, lambda: A.MultiplicativeNoise((0.6536, 1.3464), True, True, p=1), 3, True),
    ("stain-shift", {"alpha": 1.35}, lambda: A.HEStain(method="preset", preset="standard", **_STAIN), 3, False),
    ("stain-shift", {"alpha": 1.35}, lambda: A.HEStain(method="macenko", **_STAIN), 3, False),
    ("glass-blur", {}, lambda: A.GlassBlur(mode="fast", **_GLASS), 3, False),
    ("glass-blur", {}, lambda: A.GlassBlur(mode="exact", **_GLASS), 3, False),
    ("ref:glass-blur", {"sigma": 1, "reach": 2, "iterations": 3}, lambda: A.GlassBlur(mode="fast", **_GLASS), 3, False),
    ("ref:glass-blur", {"sigma": 1, "reach": 2, "iterations": 3}, lambda: A.GlassBlur(mode="exact", **_GLASS), 3, True),
    ("gamma", {"exponent": 1.8}, lambda: A.RandomGamma(gamma_limit=_fixed(180), p=1), 0.8, True),
    ("ref:gamma", {"gamma": 1.8}, lambda: A.RandomGamma(gamma_limit=_fixed(180), p=1), 0.8, True),
    ("ref:brightness", {"factor": 1.3}, lambda: A.ColorJitter(_fixed(1.3), _fixed(1), _fixed(1), _fixed(0), p=1), 0.8,
     True),
    ("ref:contrast", {"factor": 0.5}, lambda: A.ColorJitter(_fixed(1), _fixed(0.5), _fixed(1), _fixed(0), p=1), 0.8,
     True),
    ("brightness", {}, lambda: A.RandomBrightnessContrast(_fixed(0.2), _fixed(0), p=1), 0.8, False),
    ("contrast-loss", {"factor": 0.4}, lambda: A.RandomBrightnessContrast(_fixed(0), _fixed(-0.6), p=1), 0.8, False),
    ("contrast-gain", {"factor": 1.4}, lambda: A.RandomBrightnessContrast(_fixed(0), _fixed(0.4), p=1), 0.8, False),
    ("pixelate", {"factor": 0.25}, lambda: A.Downscale(_fixed(0.25), interpolation_pair=_AREA, p=1), 0.8, True),
    ("ref:pixelate", {"factor": 0.25}, lambda: A.Downscale(_fixed(0.25), interpolation_pair=_AREA, p=1), 0.8, True),
    ("down-up-sampling", {"factor": 4}, lambda: A.Downscale(_fixed(0.25), interpolation_pair=_LINEAR, p=1), 0.8,
     False),
    ("jpeg", {"quality": 15}, lambda: A.ImageCompression(quality_range=(15, 15), p=1), 0.8, True),
    ("ref:jpeg", {"quality": 15}, lambda: A.ImageCompression(quality_range=(15, 15), p=1), 0.8, True),
    ("gaussian-blur", {"sigma": 200 / 224}, lambda: A.GaussianBlur(sigma_limit=_fixed(2), p=1), 0.8, True),
    ("ref:gaussian-blur", {"sigma": 2}, lambda: A.GaussianBlur(sigma_limit=_fixed(2), p=1), 0.8, True),
    ("defocus-blur", {"radius": 600 / 224}, lambda: A.Defocus((6, 6), _fixed(0.5), p=1), 0.8, True),
    ("ref:defocus-blur", {"radius": 6, "alias": 0.5}, lambda: A.Defocus((6, 6), _fixed(0.5), p=1), 0.8, True),
    ("motion-blur", {"length": 1500 / 224}, lambda: A.MotionBlur((15, 15), False, (0, 360), _fixed(0), p=1), 0.8,
     False),
    ("ref:motion-blur", {"radius": 15, "sigma": 8}, lambda: A.MotionBlur((31, 31), p=1), 0.8, False),
    ("zoom-blur", {"zoom": 1.2}, lambda: A.ZoomBlur(_fixed(1.2), _fixed(0.02), p=1), 0, False),
    ("elastic", {}, lambda: A.ElasticTransform(alpha=50, sigma=5, p=1), 0, False),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One corruption on one batch, ours and a rival's."""

    title: str
    rival: str
    images: Array
    ours: Callable[[Tensor], Tensor]
    seconds: Callable[[int], float]
    theirs: Callable[[int], Array]
    bar: float = 0.9
    matched: bool = True


def once(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@lru_cache(maxsize=8)
def copy_seconds(size: int) -> float:
    """Return how long a plain copy of so many bytes takes, the shortest of many."""
    source, target = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))
    repeats = max(1, 10**7 // size)
    return min(once(lambda: [target.copy_(source) for _ in range(repeats)]) for _ in range(50)) / repeats


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Time both sides in turn and compare what they made."""
    pixels = _images.as_tensor(case.images)
    made = case.ours(pixels)
    repeats = max(1, min(200, int(0.02 / once(lambda: case.ours(pixels)))))
    images = max(2, min(len(case.images), int(SECOND / max(case.seconds(2) / 2, EPSILON))))
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(once(lambda: [case.ours(pixels) for _ in range(repeats)]) / repeats)
        theirs.append(case.seconds(images) * len(case.images) / images)
    a, b = statistics.median(ours), statistics.median(theirs)
    shown = images
    return {
        "case": case.title,
        "rival": case.rival,
        "ours_s": round(a, 6),
        "rival_s": round(b, 6),
        "ratio": round(b / a, 3),
        "copy_ratio": round(a / copy_seconds(case.images.nbytes), 2),
        "agree": agreement(_images.as_array(made)[:shown], case.theirs(shown), case.images[:shown], case.matched),
        "rival_images": images,
        "bar": case.bar,
    }


def agreement(ours: Array, theirs: Array, clean: Array, matched: bool) -> str:
    """Return in words whether both sides did the same kind of thing."""
    if ours.shape != theirs.shape:
        return f"DIFFERENT shapes {ours.shape}, {theirs.shape}"
    if np.array_equal(ours, theirs):
        return "equal pixels"
    first, second = (
        10 * np.log10(255**2 / float(np.square(side.astype(float) - clean).mean())) for side in (ours, theirs)
    )
    psnr = f"PSNR {first:.1f} and {second:.1f} dB"
    if not matched:
        return f"another operator, {psnr}"
    return psnr if abs(first - second) <= ALIKE_DB else f"DIFFERENT: {psnr}"


def published(rival: Rival, suite: str, names: tuple[str, ...], images: Array, title: str, dataset: str) -> list[Case]:
    """Return a case for every name that a suite of ours and a rival share."""
    shifts = _images.suite_of(suite)
    options: dict[str, Any] = {"dataset": dataset} if dataset else {}
    ids = torch.arange(len(images))
    rival.load(title, images)
    # elastic is another operator in imagecorruptions, and frost has other pictures
    other = ("elastic_transform", "frost")
    return [
        Case(
            f"{title}, {name}",
            rival.name,
            images,
            lambda pixels, shift=shifts[name]: shift(pixels, SEVERITY, ids=ids),
            lambda count, name=name: rival.seconds(title, name, SEVERITY, count=count, **options),
            lambda count, name=name: rival.images(title, name, SEVERITY, count=count, **options),
            matched=name not in other,
        )
        for name in names
        if name in shifts
    ]


def albumentations_cases(images: Array, missing: dict[str, str]) -> list[Case]:
    """Return a case for every pair of ``ALBUMENTATIONS`` that is registered here."""
    cases = []
    ids = torch.arange(len(images))
    for name, parameters, build, bar, matched in ALBUMENTATIONS:
        if name not in CORRUPTIONS:
            missing[f"albumentations: {name}"] = "not registered"
            continue
        kind = CORRUPTIONS.get(name)
        shift = kind.at(**parameters) if parameters else kind()
        transform = build()

        def loop(count: int, transform: A.BasicTransform = transform) -> Array:
            return np.stack([transform(image=image)["image"] for image in images[:count]])

        detail = f" {transform.mode}" if isinstance(transform, A.GlassBlur) else ""
        detail = f" {transform.method}" if isinstance(transform, A.HEStain) else detail
        cases.append(
            Case(
                f"224 px RGB, {name} / {type(transform).__name__}{detail}",
                "albumentations",
                images,
                lambda pixels, shift=shift: shift(pixels, SEVERITY, ids=ids),
                lambda count, loop=loop: once(lambda: loop(count)),
                loop,
                bar=bar,
                matched=matched,
            )
        )
    return cases


def all_cases(quick: bool, rivals: dict[str, Rival], missing: dict[str, str]) -> list[Case]:
    """Return every case; rivals that cannot be had are noted in ``missing``."""
    histology = _images.enlarged("oral_he_400x_96", BATCH, colour=True)
    for name in ("imagecorruptions", "medmnistc"):
        try:
            rivals[name] = Rival(name)
        except RivalMissingError as error:
            missing[name] = str(error)
    cases: list[Case] = []
    if rival := rivals.get("imagecorruptions"):
        for suite in ("imagenet-c", "imagenet-c-extra"):
            cases += published(rival, suite, IMAGECORRUPTIONS, histology, "224 px RGB", "")
    if rival := rivals.get("medmnistc"):
        seen: set[tuple[str, bool]] = set()
        for dataset, listed in MEDMNISTC.items():
            colour = dataset in _images.RGB_SETS
            images = histology if colour else _images.enlarged("nih_cxr_patients_96", BATCH, colour=False)
            names = tuple(name for name in listed if not (quick and (name, colour) in seen))
            seen |= {(name, colour) for name in names}
            title = f"224 px {'RGB' if colour else 'grey'}, {dataset}"
            cases += published(rival, f"medmnist-c/{dataset}", names, images, title, dataset)
        dataset, names = AT_28
        images = _images.stored(dataset, BATCH)
        cases += published(rival, f"medmnist-c/{dataset}", names, images, "28 px grey", dataset)
    return cases + albumentations_cases(histology, missing)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the geometric mean and the least ratio for each rival; glass blur stands apart."""
    found: dict[str, Any] = {}
    for rival in dict.fromkeys(row["rival"] for row in rows):
        mine = [row for row in rows if row["rival"] == rival]
        plain = [row["ratio"] for row in mine if "glass" not in row["case"]]
        glass = [row["ratio"] for row in mine if "glass" in row["case"]]
        found[rival] = {"geomean": round(statistics.geometric_mean(plain), 2), "min": min(plain)} if plain else {}
        found[rival] |= {"glass_min": min(glass)} if glass else {}
    shared = [row["ratio"] for row in rows if row["rival"] != "albumentations" and "glass" not in row["case"]]
    if shared:
        found["shared"] = {"geomean": round(statistics.geometric_mean(shared), 2), "min": min(shared)}
    found["below_bar"] = [row["case"] for row in rows if row["ratio"] < row["bar"]]
    found["different"] = [row["case"] for row in rows if row["agree"].startswith("DIFFERENT")]
    return found


def timed(cases: list[Case], rounds: int, only: str, missing: dict[str, str]) -> list[dict[str, Any]]:
    """Measure the cases and print a line each; what fails is noted in ``missing``."""
    rows = []
    print(f"{'rival: case, milliseconds an image':<82} {'ours':>9} {'rival':>9} {'ratio':>7} {'/copy':>7}  same thing?")
    for case in cases:
        name = f"{case.rival}: {case.title}"
        if only not in name:
            continue
        try:
            row = measure(case, rounds)
        except Exception as error:  # one that fails, ours or theirs, is told and must not hide the others
            missing[name] = f"{type(error).__name__}: {error}"
            print(f"{name:<82} FAILED", flush=True)
            continue
        rows.append(row)
        per = 1000 / len(case.images)
        print(
            f"{name:<82} {row['ours_s'] * per:9.4f} {row['rival_s'] * per:9.4f} {row['ratio']:7.2f} "
            f"{row['copy_ratio']:7.1f}  {row['agree']}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds; medmnistc's operators once each")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--only", default="", help="only cases with this in 'RIVAL: CASE'")
    options = parser.parse_args()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    rivals: dict[str, Rival] = {}
    missing: dict[str, str] = {}
    cases = all_cases(options.quick, rivals, missing)
    rows = timed(cases, 2 if options.quick else 5, options.only, missing)
    for name, reason in missing.items():
        print(f"MISSING, not compared: {name}: {reason}")
    result: dict[str, Any] = {
        "machine": {
            "platform": platform.platform(terse=True),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "albumentations": A.__version__,
            "opencv": cv2.__version__,
        },
        "rivals": {name: rival.versions for name, rival in rivals.items()},
        "missing": missing,
        "rows": rows,
        "summary": summary(rows),
    }
    if torch.cuda.is_available():
        from benchmarks._gpu import on_gpu

        result["gpu"] = on_gpu()
    print(json.dumps(result["summary"], indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    for rival in rivals.values():
        rival.close()


if __name__ == "__main__":
    main()
