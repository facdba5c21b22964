"""``robustlab doctor`` as a user runs it: exit code 0 healthy, 1 findings, 2 usage."""

import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from robustlab.cli.main import main

NETWORK = """
import torch
from torch import nn

class Bright(nn.Module):
    def __init__(self, sign):
        super().__init__()
        self.sign = nn.Parameter(torch.tensor(float(sign)))

    def forward(self, x):
        z = self.sign * (x.mean((1, 2, 3)) - 0.5) * 20
        return torch.stack([-z, z], 1)

class Normalised(Bright):
    def forward(self, x):
        return super().forward((x - 0.5) / 0.25 + 0.5)

def bright(sign: int = 1):
    return Bright(sign)

def normalised():
    return Normalised(1)
"""


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def robustlab(*arguments: str, cwd: Path) -> Done:
    """Run the entry point of the console script in this process."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["robustlab", "doctor", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
    return Done(int(exit_.value.code or 0), out.getvalue(), err.getvalue())


def in_a_new_process(*arguments: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); from robustlab.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "doctor", *arguments],
        capture_output=True, text=True, cwd=cwd, check=False, env={**os.environ, "PYTHONPATH": str(path)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 80), ("val", 60), ("test", 200)):
        labels = generator.integers(0, 2, count)
        bright = generator.normal(90 + 70 * labels, 15, count)[:, None, None]
        images = generator.normal(bright, 30, (count, 16, 16)).clip(0, 255).astype(np.uint8)
        patient = np.array([f"{split}-{i // 4}" for i in range(count)])
        arrays |= {f"{split}_images": images, f"{split}_labels": labels[:, None].astype(np.uint8)}
        arrays[f"{split}_patient"] = patient
    np.savez(folder / "data.npz", **arrays)
    np.savez(folder / "alone.npz", **{key: value for key, value in arrays.items() if key.startswith("test_")})
    arrays["train_images"][3] = arrays["test_images"][9]
    arrays["train_patient"][3] = arrays["test_patient"][9]
    np.savez(folder / "leaky.npz", **arrays)
    (folder / "network.py").write_text(NETWORK)
    return folder


def test_healthy(folder):
    done = robustlab("network.py:bright", "data.npz", "--output", "logits", "--json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout)
    assert seen["healthy"]
    assert {"image-overlap-train", "image-overlap-val", "patient-overlap-train", "plugins"} <= set(seen["passed"])
    done = robustlab("network.py:bright", "alone.npz", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "found nothing" in done.stdout
    assert "No training data" in done.stderr


def test_findings(folder):
    done = robustlab("network.py:bright", "leaky.npz", "--arg", "sign=-1", cwd=folder)
    assert done.returncode == 1, done.stderr
    for text in ("labels-off-by-one", "image-overlap-train", "9 and 3", "patient-overlap-train", "1 of 50 units"):
        assert text in done.stdout
    assert "test-2" not in done.stdout
    spared = robustlab("network.py:bright", "leaky.npz", "--train", "none", "--val", "data.npz", cwd=folder)
    assert spared.returncode == 0, spared.stdout
    leaky = ("--train", "leaky.npz", "--cluster", "patient", "--json")
    other = robustlab("network.py:bright", "data.npz", *leaky, cwd=folder)
    assert [f["check"] for f in json.loads(other.stdout)["findings"]] == [
        "patient-overlap-train",
        "image-overlap-train",
    ]


def test_declared_preprocessing(folder):
    twice = robustlab("network.py:normalised", "data.npz", "--mean", "0.5", "--std", "0.25", cwd=folder)
    assert twice.returncode == 1, twice.stderr
    assert "double-normalisation" in twice.stdout
    plain = robustlab("network.py:bright", "data.npz", "--mean", "0", "--std", "1", "--split", "val", cwd=folder)
    assert plain.returncode == 0, plain.stdout + plain.stderr
    kind = robustlab("network.py:bright", "data.npz", "--output", "probs", cwd=folder)
    assert kind.returncode == 1
    assert "logits-as-probabilities" in kind.stdout


def test_a_broken_plugin_is_a_finding(folder, tmp_path):
    info = tmp_path / "broken_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[robustlab.detectors]\nacme:broken = no_such_module:Thing\n")
    done = in_a_new_process("network.py:bright", "data.npz", path=tmp_path, cwd=folder)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "The detector plugin 'acme:broken' failed to load: ModuleNotFoundError" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("network.py:bright",), "Missing argument"),
        (("network.py:bright", "none.npz"), "none.npz"),
        (("network.py:dark", "data.npz"), "bright"),
        (("network.py:bright", "data.npz", "--mean", "grey"), "--mean"),
        (("network.py:bright", "data.npz", "--output", "odds"), "output"),
        (("network.py:bright", "data.npz", "--task", "guess"), "task"),
        (("network.py:bright", "data.npz", "--cluster", "ward"), "ward"),
        (("network.py:bright", "alone.npz", "--train", "split:first"), "first"),
        (("network.py:bright", "data.npz", "--split", "extra"), "extra"),
    ],
)
def test_mistakes_exit_with_2_and_say_what_to_do(folder, arguments, text):
    done = robustlab(*arguments, cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert text in done.stderr
