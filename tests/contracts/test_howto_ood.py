"""The snippets of the page on foreign inputs run and show what the page says."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import robustlab
from robustlab.core.registry import DETECTORS
from tests.contracts.toys import Small, source

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "ood.md").read_text(encoding="utf-8")
REPORT, TUNE, SAVE, THEIRS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


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
        "folder": tmp_path,
    }


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
