"""Corruptions on a CUDA device: images a second, and how far that is from the time that the bytes alone take."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import _images
from robustlab.core.registry import SUITES
from robustlab.core.shift import Shift

BATCH, SEVERITY, ROUNDS = 256, 3, 7
PUBLISHED = 1_458_145  # images of MedMNIST-C for chestmnist


def seconds(call: Callable[[], object]) -> float:
    """Return the median time of a call on the device, by its own clock."""
    call()
    times = []
    for _ in range(ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return statistics.median(times)


def copy_rate() -> float:
    """Return the device's own copy rate, bytes read and written a second."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def row(case: str, shift: Shift, pixels: Tensor, ids: Tensor, rate: float) -> dict[str, Any]:
    """Measure one corruption; ``floor_ratio`` is its time over that of reading and writing the bytes once."""
    try:
        took = seconds(lambda: shift(pixels, SEVERITY, ids=ids))
    except Exception as error:  # one that fails must not hide the others
        return {"case": case, "error": f"{type(error).__name__}: {error}"}
    floor = 2 * pixels.numel() / rate
    return {"case": case, "images_per_s": round(len(pixels) / took), "floor_ratio": round(took / floor, 1)}


def on_gpu() -> dict[str, Any]:
    """Return rows for ImageNet-C on RGB and MedMNIST-C (chest) on grey images of 224 px, and the whole chest suite."""
    rate = copy_rate()
    rgb = _images.as_tensor(_images.enlarged("oral_he_400x_96", BATCH, colour=True)).cuda()
    grey = _images.as_tensor(_images.enlarged("nih_cxr_patients_96", BATCH, colour=False)).cuda()
    ids = torch.arange(BATCH, device="cuda")
    rows = []
    for suite, pixels, title in (
        ("imagenet-c", rgb, "224 px RGB"),
        ("imagenet-c-extra", rgb, "224 px RGB"),
        ("medmnist-c/chestmnist", grey, "224 px grey, chestmnist"),
    ):
        for shift in SUITES.get(suite)():
            rows.append(row(f"{title}, {shift.label}", shift, pixels, ids, rate))
            print(rows[-1], flush=True)
    suite_shifts = SUITES.get("medmnist-c/chestmnist")()
    whole = seconds(lambda: [shift(grey, level, ids=ids) for shift in suite_shifts for level in range(1, 6)])
    made = BATCH * len(suite_shifts) * 5
    return {
        "device": torch.cuda.get_device_name(),
        "copy_rate_gb_s": round(rate / 1e9),
        "batch": BATCH,
        "rows": rows,
        "chestmnist_suite": {
            "images_per_s": round(made / whole),
            "seconds_for_1458145": round(1458145 / made * whole, 1),
        },
    }
