"""The snippets of the pages on other libraries and on stored sets run."""

import os
import re
from pathlib import Path

import numpy as np
import torch

import robustlab
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

DOCS = Path(__file__).resolve().parents[3] / "docs" / "how-to"


def snippets(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)


def run(code, **names):
    exec(compile(code, "snippet", "exec"), names)
    return names


def test_transforms_of_other_libraries_are_shifts():
    batch = Batch(torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)), None, torch.arange(2))
    for shift in run(snippets("other-libraries.md")[0])["shifts"]:
        weak, strong = (shift.on(batch, severity, ShiftContext()).images - batch.images for severity in (1, 5))
        assert 0 < weak.abs().mean() < strong.abs().mean()


def test_shifts_are_transforms_of_other_libraries():
    names = run(snippets("other-libraries.md")[1])
    image = np.full((16, 16, 3), 128, np.uint8)
    changed = [names["train"](image) for _ in range(30)]
    assert 5 < sum(bool((each != 128 / 255).any()) for each in changed) < 25
    assert names["other"](image=image)["image"].shape == image.shape


def test_a_stored_set_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = np.random.default_rng(0).integers(0, 256, (6, 8, 8)).astype(np.uint8), np.arange(6)[:, None] % 2
    (tmp_path / "medmnist-c" / "pneumoniamnist").mkdir(parents=True)
    (tmp_path / "medmnist").mkdir()
    np.savez(tmp_path / "medmnist" / "pneumoniamnist_224.npz", test_images=images, test_labels=labels)
    stack = {
        "test_images": np.concatenate([images // level for level in range(1, 6)]),
        "test_labels": np.tile(labels, (5, 1)),
    }
    np.savez_compressed(tmp_path / "medmnist-c" / "pneumoniamnist" / "brightness_down.npz", **stack)
    model = robustlab.wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)).eval(), num_classes=2)
    report = run(snippets("stored-sets.md")[0], model=model)["report"]
    rows = [row for row in report.rows if row.shift == "brightness_down" and row.metric == "accuracy"]
    assert {row.severity for row in rows} == {1, 2, 3, 4, 5}
