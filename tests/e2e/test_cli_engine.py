"""The engine from the shell: going on after a stop, workers, failures and saved predictions."""

import json

import numpy as np
import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

import robustlab
from robustlab.cli.main import app
from tests.contracts.toys import Small, pixels

NET = "from tests.contracts.toys import Small\nbuild = Small\n"
FUSSY = """
import torch
from tests.contracts.toys import Small

class Fussy(Small):
    def forward(self, x):
        if len(x) == 16 and (x[:, 0, 0, 0] == 0).any():
            raise ValueError("planted: a black corner")
        return super().forward(x)

build = Fussy
"""


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def work(tmp_path):
    images, score = pixels(count=60)
    images[:, 0, 0] = np.maximum(images[:, 0, 0], 1)
    arrays = {"test_images": images, "test_labels": (score.argsort().argsort() * 3 // 60)[:, None]}
    arrays |= {"val_images": images[::2], "val_labels": arrays["test_labels"][::2]}
    np.savez(tmp_path / "data.npz", **arrays)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "fussy.py").write_text(FUSSY)
    save_file(Small(seed=4).state_dict(), tmp_path / "w.safetensors")
    return tmp_path


def arguments(work, out, net="net.py"):
    shifts = ("--shifts", "gamma,jpeg", "--severities", "2,4", "--batch-size", 16, "--weights", work / "w.safetensors")
    return ("evaluate", f"{work / net}:build", work / "data.npz", "--out", out, *shifts)


def content(folder):
    """The files of a saved report without its times."""
    document = json.loads((folder / "report.json").read_text())
    document["manifest"] = {k: v for k, v in document["manifest"].items() if k not in ("created", "wall_seconds")}
    return document, (folder / "rows.csv").read_bytes(), (folder / "predictions.safetensors").read_bytes()


def test_answers_are_kept_in_the_folder_of_the_report(work):
    done = run(*arguments(work, work / "a"))
    assert done.exit_code == 0, done.output
    shards = sorted((work / "a" / "cache").rglob("0*.safetensors"))
    assert len(shards) == 4 * 5 + 2
    stamps = [shard.stat().st_mtime_ns for shard in shards]
    shards[3].unlink()
    again = run(*arguments(work, work / "a"), "--metrics", "all")
    assert again.exit_code == 0, again.output
    changed = [i for i, shard in enumerate(shards) if shard.stat().st_mtime_ns != stamps[i]]
    assert changed == [3]


def test_no_cache_keeps_nothing_and_changes_nothing(work):
    for out, more in (("a", ()), ("b", ("--no-cache",)), ("c", ("--cache", work / "kept"))):
        assert run(*arguments(work, work / out), *more).exit_code == 0
    assert not (work / "b" / "cache").exists()
    assert not (work / "c" / "cache").exists()
    assert (work / "kept" / "cache").is_dir()
    assert content(work / "a") == content(work / "b") == content(work / "c")


def test_workers_change_nothing(work):
    assert run(*arguments(work, work / "a")).exit_code == 0
    done = run(*arguments(work, work / "b"), "--workers", 2)
    assert done.exit_code == 0, done.output
    assert content(work / "a") == content(work / "b")


@pytest.mark.parametrize("text", ["0", "many", "-1"])
def test_workers_are_a_number_or_cuda(work, text):
    done = run(*arguments(work, work / "a"), f"--workers={text}")
    assert "--workers" in str(done.exception)


def test_samples_that_fail_are_listed_with_exit_code_3_and_tried_again(work):
    archive = dict(np.load(work / "data.npz"))
    archive["test_images"][20, 0, 0] = 0
    np.savez(work / "data.npz", **archive)
    for _ in range(2):
        done = run(*arguments(work, work / "a", "fussy.py"))
        assert done.exit_code == 3, done.output
        assert "samples 16 to 31" in done.output
        assert "planted" in done.output
    report = robustlab.Report.load(work / "a")
    assert report.value("accuracy").n == 44


def test_saved_predictions_make_the_same_report(work):
    assert run(*arguments(work, work / "a")).exit_code == 0
    live = robustlab.Report.load(work / "a")
    data = robustlab.load_data(work / "data.npz")
    val = robustlab.load_data(work / "data.npz", split="val")
    net = robustlab.wrap(Small(seed=4), output="logits")
    with (work / "answers.jsonl").open("w") as file:
        for name, store in live.predictions.items():
            for sample, logits in zip(data.info.ids.tolist(), store.logits.tolist(), strict=True):
                file.write(json.dumps({"id": sample, "condition": name, "logits": logits}) + "\n")
        for sample, logits in zip(val.info.ids.tolist(), net.predict(val.read(range(30))).logits.tolist(), strict=True):
            file.write(json.dumps({"id": sample, "condition": "val", "logits": logits}) + "\n")
    done = run("evaluate", work / "answers.jsonl", work / "data.npz", "--out", work / "b")
    assert done.exit_code == 0, done.output
    saved = robustlab.Report.load(work / "b")
    wanted = {(r.shift, r.severity, r.metric, r.group, r.target, r.scorer): r for r in live.rows}
    assert len(saved.rows) == len(live.rows)
    for row in saved.rows:
        other = wanted[row.shift, row.severity, row.metric, row.group, row.target, row.scorer]
        assert row.value == pytest.approx(other.value, nan_ok=True, abs=1e-6), (row, other)
    odd = run("evaluate", work / "answers.jsonl", work / "data.npz", "--out", work / "b", "--mean", "0.5")
    assert "--mean" in str(odd.exception)
