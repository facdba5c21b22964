"""The command line as a user runs it: real subprocesses, real files, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

NETWORK = """
from torch import nn

def tiny(outputs: int = 2) -> nn.Module:
    features = (nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(*features, nn.Linear(16, outputs))

number = 3
"""


def robustlab(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); from robustlab.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 20), ("val", 30), ("test", 40)):
        labels = generator.integers(0, 2, count)
        images = generator.normal(90 + 60 * labels[:, None, None], 30, (count, 16, 16)).clip(0, 255)
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels[:, None].astype(np.uint8)}
    np.savez(folder / "data.npz", **arrays)
    (folder / "network.py").write_text(NETWORK)
    namespace: dict = {}
    exec(NETWORK, namespace)
    net = namespace["tiny"]().eval()
    save_file(net.state_dict(), folder / "weights.safetensors")
    torch.save(net.state_dict(), folder / "weights.pth")
    torch.jit.trace(net, torch.zeros(2, 1, 16, 16)).save(str(folder / "net.pt"))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(net, (torch.zeros(4, 1, 16, 16),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "net.pt2")
    return folder


def rows_in(text: str) -> list[dict]:
    report = json.loads(text)
    return [dict(zip(report["columns"], row, strict=True)) for row in report["rows"]]


def evaluate(folder: Path, out: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return robustlab(
        "evaluate", *arguments, "--out", out, "--shifts", "gaussian-noise,jpeg", "--severities", "1,5",
        "--output", "logits", "--name", "tiny", cwd=folder,
    )  # fmt: skip


def test_every_way_to_name_a_model_gives_the_same_numbers(folder):
    ways = {
        "safetensors": ("network.py:tiny", "data.npz", "--weights", "weights.safetensors"),
        "state-dict": ("network.py:tiny", "data.npz", "--weights", "weights.pth"),
        "torchscript": ("net.pt", "data.npz"),
        "exported": ("net.pt2", "data.npz"),
    }
    found = {}
    for way, arguments in ways.items():
        done = evaluate(folder, way, *arguments)
        assert done.returncode == 0, f"{way}: {done.stderr}"
        assert (folder / way / "report.html").stat().st_size > 10_000
        rows = [row for row in rows_in((folder / way / "report.json").read_text()) if row["metric"] == "accuracy"]
        found[way] = [(row["shift"], row["severity"], row["value"]) for row in rows]
    assert len(found["safetensors"]) >= 5
    assert all(values == found["safetensors"] for values in found.values())
    assert "Report:" in done.stdout


def test_attack_and_ood_options(folder):
    done = evaluate(
        folder, "attacked", "network.py:tiny", "data.npz", "--weights", "weights.safetensors",
        "--attack", "pgd:linf:2/255,8/255", "--ood", "far/same=data.npz", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = rows_in(done.stdout)
    attacked = [row for row in rows if row["shift"] == "pgd-linf"]
    assert {row["amount"] for row in attacked if row["metric"] == "accuracy"} == {2.0, 8.0}
    assert sum(row["metric"] == "failure-threshold" for row in attacked) == 1
    assert any(row["data"] == "ID vs far/same" for row in rows)


def test_dry_run_counts_without_running(folder):
    done = robustlab("evaluate", "missing.py:f", "data.npz", "--out", "dry", "--dry-run", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["samples"] == 40
    assert facts["evaluated_images"] == 40 * len(facts["conditions"])
    assert any(item["what"] == "stain-shift" for item in facts["skipped"])
    assert not (folder / "dry").exists()


def test_corrupt_writes_what_load_data_reads(folder):
    done = robustlab("corrupt", "data.npz", "made", "--shifts", "gaussian-noise", "--severities", "1,5", cwd=folder)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / "made" / "manifest.json").read_text())
    assert len(manifest["conditions"]) == 2
    import robustlab as rl
    from robustlab.corruptions import GaussianNoise

    clean = rl.load_data(folder / "data.npz")
    batch = clean.read(range(40))
    for severity in (1, 5):
        file = next((folder / "made").rglob(f"*{severity}*.npz"))
        stored = rl.load_data(file)
        flying = GaussianNoise().on(batch, severity, rl.ShiftContext(seed=0)).images
        assert torch.equal(stored.read(range(40)).images, torch.round(flying * 255) / 255)


def test_list_names_what_is_registered(folder):
    done = robustlab("list", "corruptions", "--json", cwd=folder)
    assert "gaussian-noise" in {entry["name"] for entry in json.loads(done.stdout)}
    assert "pgd" in robustlab("list", "attacks", cwd=folder).stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("list", "corruption-kinds"), "corruptions"),
        (("evaluate", "resnet18", "data.npz", "--out", "x"), "timm:NAME"),
        (("evaluate", "timm:resnet181", "data.npz", "--out", "x"), "timm has"),
        (("evaluate", "network.py:huge", "data.npz", "--out", "x"), "tiny"),
        (("evaluate", "network.py:number", "data.npz", "--out", "x"), "a function"),
        (("evaluate", "nowhere.py:tiny", "data.npz", "--out", "x"), "no file"),
        (("evaluate", "network.py:tiny", "data.npz", "--out", "x", "--weights", "data.npz"), "safetensors"),
        (("evaluate", "network.py:tiny", "data.npz", "--out", "x", "--arg", "outputs=3", "--weights", "weights.pth"),
         "parameters"),
        (("evaluate", "network.py:tiny", "data.npz", "--out", "x", "--severities", "low"), "1-5"),
        (("evaluate", "network.py:tiny", "data.npz", "--out", "x", "--severities", "7"), "0 to 5"),
        (("evaluate", "network.py:tiny", "data.npz", "--out", "x", "--attack", "pgd:linf"), "NAME:NORM:BUDGETS"),
        (("evaluate", "network.py:tiny", "data.npz", "--out", "x", "--ood", "photos"), "name=value"),
        (("evaluate", "network.py:tiny", "data.npz", "--out", "x", "--shifts", "gausian-noise"), "gaussian-noise"),
        (("evaluate", "weights.pth", "data.npz", "--out", "x"), "file.py:function"),
        (("corrupt", "data.npz", "y", "--format", "tiff"), "npz or png"),
        (("corrupt", "none.npz", "y"), "none.npz"),
    ],
)  # fmt: skip
def test_mistakes_exit_with_2_and_say_what_to_do(folder, arguments, text):
    done = robustlab(*arguments, cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert text in done.stderr


def test_attack_writes_a_report_with_a_checklist(folder):
    arguments = ("network.py:tiny", "data.npz", "--weights", "weights.safetensors", "--out", "budgets")
    done = robustlab("attack", *arguments, "--attacks", "pgd,fgsm", "--eps", "2,8", "--units", "native", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "How far to trust the attacks (linf, 2 grey levels)" in done.stdout
    assert "worst attack linf" in done.stdout
    report = json.loads((folder / "budgets" / "report.json").read_text())
    amounts = {entry["key"]: entry["amount"] for entry in report["manifest"]["conditions"]}
    assert amounts["pgd-linf@2.5"] == pytest.approx(2)
    assert amounts["worst attack linf@5"] == pytest.approx(8)
    assert (folder / "budgets" / "report.html").exists()
    few = robustlab("attack", *arguments[:-1], "few", "--attacks", "fgsm", "--eps", "1/255", "--limit", "12",
                    "--trust", "0", "--json", cwd=folder)  # fmt: skip
    assert few.returncode == 0, few.stderr
    rows = rows_in(few.stdout)
    assert {row["n"] for row in rows if row["metric"] == "accuracy" and row["shift"] == "fgsm-linf"} == {12}
    wrong = robustlab("attack", *arguments, "--eps", "one", cwd=folder)
    assert wrong.returncode == 2
    assert "budgets, comma-separated" in wrong.stderr
    hidden = robustlab("attack", *arguments[:-1], "hidden", "--goal", "hide", "--detector", "energy", "--eps", "8/255",
                       "--ood", "far/same=data.npz", "--json", cwd=folder)  # fmt: skip
    assert hidden.returncode == 0, hidden.stderr
    scores = {row["scorer"] for row in rows_in(hidden.stdout) if row["shift"] == "hide-energy-linf"}
    assert scores == {"msp", "energy", ""}
    nothing = robustlab("attack", *arguments, "--goal", "hide", "--eps", "8/255", cwd=folder)
    assert nothing.returncode == 2
    assert "--ood far/photos=photos.npz" in nothing.stderr
    odd = robustlab("attack", *arguments, "--eps", "1/255", "--task", "two", cwd=folder)
    assert odd.returncode == 2
    assert "--task binary, multiclass or multilabel" in odd.stderr


def test_ood_compares_detectors(folder):
    np.savez(
        folder / "foreign.npz", test_images=np.random.default_rng(3).integers(0, 256, (30, 16, 16)).astype(np.uint8)
    )
    done = robustlab("ood", "network.py:tiny", "data.npz", "--weights", "weights.safetensors", "--ood",
                     "far/noise=foreign.npz", "--detectors", "msp,knn,mds", "--shifts", "gamma", "--out", "ood",
                     "--gallery", "--json", cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {
        row["scorer"] for row in rows_in(done.stdout) if row["data"] == "ID vs far/*" and row["metric"] == "auroc-ood"
    }
    assert found == {"msp", "knn", "mds"}
    assert "far/noise looks known to" in (folder / "ood" / "report.html").read_text(encoding="utf-8")
    assert (folder / "ood" / "gallery.json").exists()
    none = robustlab("ood", "network.py:tiny", "data.npz", "--weights", "weights.safetensors", "--ood",
                     "far/noise=foreign.npz", "--fit", "none", "--detectors", "msp,knn", "--out", "no",
                     cwd=folder)  # fmt: skip
    assert none.returncode == 2
    assert "fit=train" in none.stderr
