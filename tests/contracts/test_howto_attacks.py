"""The snippets of the page on attacks run and show what the page says."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import robustlab
from robustlab.core.registry import ATTACKS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "attacks.md").read_text(encoding="utf-8")
EVALUATION, SUBSTITUTES, DETECTORS, ALONE = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture
def names():
    generator = np.random.default_rng(0)
    images = generator.integers(60, 120, (90, 8, 8)).astype(np.uint8)
    labels = np.arange(90) % 4
    for label in range(4):
        images[labels == label, 2 * label : 2 * label + 2] += 20
    data, val = (robustlab.load_data(images[part], labels=labels[part]) for part in (slice(60), slice(60, 90)))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4)).eval()
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.zero_()
        for label in range(4):
            net[1].weight[label, 16 * label : 16 * (label + 1)] = 4.0
    foreign = robustlab.load_data(generator.integers(60, 120, (30, 8, 8)).astype(np.uint8))
    return {"robustlab": robustlab, "torch": torch, "net": net, "data": data, "val": val, "foreign": foreign}


def run(code, names):
    exec(compile(code.replace("shifts=()", "shifts=(), trust=0, progress=False"), "snippet", "exec"), names)
    return names


def test_an_evaluation(names, capsys):
    report = run(EVALUATION, names)["report"]
    told = capsys.readouterr().out
    assert "holds_at" in told
    assert report.value("accuracy").value == 1
    worst = report.value("accuracy", "worst attack linf", severity=5).value
    assert worst <= min(report.value("accuracy", name, severity=5).value for name in ("pgd-linf", "auto-attack-linf"))


def test_a_step_without_gradient_is_replaced(names):
    names = run(SUBSTITUTES, names)
    found = names["report"].value("accuracy", "pgd-linf", severity=5).value
    without = robustlab.evaluate_under_shift(
        robustlab.wrap(names["defended"]), names["data"], shifts=(), attacks="pgd", trust=0, progress=False
    )
    assert found < without.value("accuracy", "pgd-linf", severity=5).value


def test_detectors(names, capsys):
    report = run(DETECTORS, names)["report"]
    assert "hide-energy-linf" in capsys.readouterr().out
    hidden = report.value("auroc-ood", "hide-energy-linf", severity=5, scorer="energy").value
    assert hidden < report.value("auroc-ood", scorer="energy").value


def test_one_attack_alone(names):
    found = run(ALONE, names)["found"]
    assert len(found.images) == 16


def test_every_name_on_the_page_exists():
    table = re.findall(r"^\| .*? \| `([a-z0-9-]+)` \|", PAGE, re.M)
    assert len(table) == 5
    assert set(table) <= set(ATTACKS.names())
    named = set(re.findall(r"`([A-Z][A-Za-z]+)[(`]", PAGE))
    missing = {name for name in named if not hasattr(robustlab.corruptions, name)}
    assert not missing
