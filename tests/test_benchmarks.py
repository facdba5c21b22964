"""The parts of the benchmarks that need no rival: lists, verdicts, and the pipe to a rival's process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import _images, _rival, corruptions, fidelity
from corruptions import JPEG, GaussianNoise

CLEAN = np.random.default_rng(0).integers(0, 256, (160, 16, 16), dtype=np.uint8)


def labels(suite: str) -> set[str]:
    return set(_images.suite_of(suite))


def test_list_of_imagecorruptions_is_our_imagenet_c() -> None:
    assert set(corruptions.IMAGECORRUPTIONS) == labels("imagenet-c") | labels("imagenet-c-extra")
    assert len(corruptions.IMAGECORRUPTIONS) == 19


@pytest.mark.parametrize(("dataset", "names"), [*corruptions.MEDMNISTC.items(), corruptions.AT_28])
def test_list_of_medmnistc_is_our_suite(dataset: str, names: tuple[str, ...]) -> None:
    assert set(names) == labels(f"medmnist-c/{dataset}")


def test_agreement_in_words() -> None:
    noisy = np.clip(CLEAN + 8.0, 0, 255).astype(np.uint8)
    assert corruptions.agreement(noisy, noisy, CLEAN, True) == "equal pixels"
    assert corruptions.agreement(noisy, noisy[:, ::-1], CLEAN, True).startswith("DIFFERENT: PSNR")
    assert corruptions.agreement(noisy, noisy[:, ::-1], CLEAN, False).startswith("another operator")
    assert corruptions.agreement(noisy, noisy[:1], CLEAN, True).startswith("DIFFERENT shapes")


def test_slow_rival_does_fewer_images_scaled_up() -> None:
    asked: list[int] = []

    def seconds(count: int) -> float:
        asked.append(count)
        return 0.25 * count

    case = corruptions.Case("glass", "toy", CLEAN[:64], lambda x: x, seconds, lambda count: CLEAN[:count])
    row = corruptions.measure(case, 3)
    assert asked == [2, 4, 4, 4]
    assert row["rival_s"] == 0.25 * 64
    assert row["rival_images"] == 4
    assert row["agree"] == "equal pixels"


def test_summary_counts_glass_apart() -> None:
    rows = [
        {"case": case, "rival": rival, "ratio": ratio, "bar": 0.9, "agree": "equal pixels"}
        for case, rival, ratio in (("a", "x", 2.0), ("b", "x", 8.0), ("glass_blur", "x", 90.0), ("c", "y", 0.5))
    ]
    found = corruptions.summary(rows)
    assert found["x"] == {"geomean": 4.0, "min": 2.0, "glass_min": 90.0}
    assert found["shared"] == {"geomean": 2.0, "min": 0.5}
    assert found["below_bar"] == ["c"]


class Toy:
    """A rival that returns what it was given."""

    def __init__(self, result: np.ndarray) -> None:
        self.result = result

    def images(self, key: str, name: str, severity: int, **options: object) -> np.ndarray:
        return self.result


class Published(GaussianNoise):
    label = "gaussian_noise"


def compared(shift: object, result: np.ndarray) -> fidelity.Comparison:
    return fidelity.compare(shift, 3, Toy(result), "k", CLEAN, "s", "")


def test_deterministic_pair_differs_by_one_pixel() -> None:
    ours = JPEG()(torch.from_numpy(CLEAN)[:, None], 3, ids=torch.arange(160))[:, 0].numpy()
    same = compared(JPEG(), ours)
    assert (same.differing, same.passed(1000)) == (0, True)
    other = ours.copy()
    other[7, 3, 3] ^= 1
    found = compared(JPEG(), other)
    assert (found.differing, found.largest, found.passed(1000)) == (1, 1, False)


@pytest.mark.parametrize(("sigma", "agrees"), [(0.1, True), (0.105, False)])
def test_random_pair(sigma: float, agrees: bool) -> None:
    rng = np.random.default_rng(5)
    theirs = np.rint(np.clip(CLEAN + 255 * sigma * rng.standard_normal(CLEAN.shape), 0, 255)).astype(np.uint8)
    assert compared(Published(), theirs).passed(1000) is agrees


def test_interval_is_that_of_student() -> None:
    interval = fidelity.Interval("mean", 1.0, 0.5, 10)
    assert interval.bounds(1) == pytest.approx((1 - 0.5 * 2.262157, 1 + 0.5 * 2.262157))
    assert not interval.flagged(1)
    assert fidelity.Interval("mean", 1.2, 0.5, 10).flagged(1)
    assert not fidelity.Interval("mean", 1.2, 0.5, 10).flagged(100)


WORKER = """
import sys
sys.path.insert(0, {folder!r})
from _worker import serve

def prepare(images, name, severity, request):
    print("noise on standard output")
    if name == "broken":
        raise ValueError("no such thing")
    return lambda image: 255 - image

serve((), prepare)
"""


def test_pipe_to_a_rival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run_toy.py").write_text(WORKER.format(folder=str(_rival.FOLDER)))
    monkeypatch.setattr(_rival, "FOLDER", tmp_path)
    monkeypatch.setattr(_rival, "environment", lambda name: Path(sys.executable))
    rival = _rival.Rival("toy")
    try:
        rival.load("grey", CLEAN)
        assert np.array_equal(rival.images("grey", "invert", 1, count=5), 255 - CLEAN[:5])
        assert rival.seconds("grey", "invert", 1, count=5) > 0
        with pytest.raises(_rival.RivalError, match="toy: ValueError: no such thing"):
            rival.seconds("grey", "broken", 1, count=5)
        assert rival.images("grey", "invert", 1, count=1).shape == (1, 16, 16)
    finally:
        rival.close()


def test_rival_that_cannot_be_installed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "ERROR: No matching distribution found\n")
    monkeypatch.setattr(_rival.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(_rival.RivalMissingError, match="No matching distribution"):
        _rival.environment("medmnistc")
