"""The known-answer demo, as a user runs it: no network, one file, every planted fact found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("the demo touched the network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
sys.path.insert(0, {root!r})
from robustlab.cli.main import main
sys.argv = ["robustlab", "demo", "--out", {out!r}]
main()
"""


def test_demo_runs_without_network_and_finds_everything(tmp_path):
    code = NO_NETWORK.format(root=str(ROOT), out=str(tmp_path / "demo"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "missed" not in done.stderr
    page = (tmp_path / "demo" / "report.html").read_text()
    assert len(page) < 4_000_000
    assert "http://" not in page.replace("http://www.w3.org", "")
    manifest = json.loads((tmp_path / "demo" / "report.json").read_text())["manifest"]
    said = {claim["claim"]: claim["verdict"] for claim in manifest["truth"]}
    assert said["This shift breaks the model"] == "breaks"
    assert said["This shift is harmless"] == "holds"
    assert said["The marker is a shortcut"] == "breaks"
    assert said["The twin is the same model"] == "no decision"
    for claim in manifest["truth"]:
        assert claim["claim"] in page
    assert all(claim["truth"] is not None for claim in manifest["truth"])
    assert manifest["defenses"][0]["name"] == "temperature scaling"


@pytest.mark.slow
def test_demo_is_right_in_at_least_18_of_20_seeds():
    from robustlab.demo import all_right, run_demo

    reports = [run_demo(seed, gallery=False, progress=False) for seed in range(20)]
    wrong = {
        seed: [claim for claim in report.manifest["truth"] if not claim["right"]]
        for seed, report in enumerate(reports)
        if not all_right(report)
    }
    assert len(wrong) <= 2, wrong
    inside = [report.manifest["truth"][0]["right"] for report in reports]
    assert sum(inside) >= 16, "the clean accuracy's interval misses the truth too often"
