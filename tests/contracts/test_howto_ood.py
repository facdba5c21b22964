"""The snippets of the page on foreign inputs run and show what the page says."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import robustlab
from robustlab.core.registry import CORRUPTIONS, DETECTORS
from robustlab.core.shift import ShiftContext, to_bytes
from tests.contracts.toys import Small, source

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "ood.md").read_text(encoding="utf-8")
REPORT, TUNE, SITE, SAVE, THEIRS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


class Plain(Small):
    """A network whose logits its last layer gives."""

    def forward(self, x):
        return self.head(torch.relu(self.conv(x - 0.5)).mean((2, 3)))


@pytest.fixture
def names(tmp_path):
    net = Plain()
    photos = np.random.default_rng(1).integers(0, 255, (40, 12, 12, 3), dtype=np.uint8)
    return {
        "robustlab": robustlab,
        "net": net,
        "last": net.head,
        "data": source(count=60),
        "val": source(count=60, seed=1),
        "train": source(count=90, seed=3),
        "spare": source(count=50, seed=4),
        "other": source(count=30, seed=5),
        "photos": robustlab.load_data(photos),
        "site": brighter(source(count=40, seed=6)),
        "folder": tmp_path,
    }


def brighter(known):
    """Return the images of a site whose exposure is that of severity 3."""
    axis, batch = CORRUPTIONS.get("brightness")(), known.read(range(len(known)))
    draws = {name: torch.ones_like(value) for name, value in axis.prepare(batch, ShiftContext()).items()}
    moved = axis.perform(batch, draws, 3.0, ShiftContext()).images
    return robustlab.load_data(to_bytes(moved).permute(0, 2, 3, 1).numpy())


def run(code, names):
    exec(compile(code.replace("    detectors=(", "    progress=False,\n    detectors=("), "snippet", "exec"), names)
    return names


def test_a_report(names, capsys):
    report = run(REPORT, names)["report"]
    told = capsys.readouterr().out
    assert "near/pacemaker looks known to" in told
    assert report.value("auroc-ood", scorer="mds", data="ID vs near/pacemaker").n == 110
    assert report.value("auroc-ood", scorer="mds", data="ID vs far/photos").value > 0.95


def test_tuning_and_keeping(names, capsys):
    names = run(TUNE, names)
    assert re.search("the default|Chosen", capsys.readouterr().out)
    assert names["detector"].name == "knn"
    names = run(SAVE, names)
    assert names["loaded"] == names["detector"]
    assert torch.equal(names["loaded"].score(names["outputs"]), names["detector"].score(names["outputs"]))


def test_a_site_is_placed_and_seen_to_have_moved(names, capsys):
    names = run(SITE, names)
    assert abs(names["place"]["brightness"].severity - 3) < 0.5
    assert names["drift"].moved
    told = capsys.readouterr().out
    assert "brightness" in told
    assert "have moved" in told


def test_detectors_of_pytorch_ood(names):
    pytest.importorskip("pytorch_ood", reason="pytorch-ood is not installed")
    report = run(THEIRS, names)["report"]
    assert report.value("auroc-ood", scorer="their-energy", data="ID vs far/photos").n == 100
    assert isinstance(names["last"], nn.Linear)


def test_every_name_on_the_page_exists():
    listed = {name for name in re.findall(r"`([a-z]+)`", PAGE) if name in DETECTORS}
    assert {"scale", "react", "gen", "mds", "residual", "vim", "knn", "msp", "energy"} <= listed
    for name in re.findall(r"`(pasted_artefact|hold_out|load_data)", PAGE):
        assert hasattr(robustlab.data, name)
    for name in re.findall(r"`([A-Z][A-Za-z]+)\(", PAGE):
        assert hasattr(robustlab.defenses, name) or name == "ODIN"
