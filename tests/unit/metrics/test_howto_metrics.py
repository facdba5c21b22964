"""The snippets of the page on metrics run, and the metric of one's own is as good as the others."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import robustlab
from robustlab.core.registry import METRICS
from robustlab.metrics import Context, PredictionStore, Resampler, compare_metric, compute

PAGE = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "metrics.md"
EVALUATION, COMPARISON, STORE, STATES, OWN = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def run(code, **names):
    exec(compile(code, "snippet", "exec"), names)
    return names


def inputs():
    images = np.random.default_rng(0).integers(0, 256, (120, 8, 8)).astype(np.uint8)
    data, val = (robustlab.load_data(half, labels=np.arange(60) % 2) for half in (images[:60], images[60:]))
    net = robustlab.wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)).eval(), output="logits")
    return {"robustlab": robustlab, "net": net, "data": data, "val": val}


def test_an_evaluation_with_other_metrics():
    code = EVALUATION.replace("metrics=", 'shifts="gaussian-noise", progress=False, metrics=')
    report = run(code, **inputs())["report"]
    shown = {row.metric for row in report.rows} - {"accuracy-drop", "accuracy", "silent-failure-rate"}
    assert shown == {"auroc", "ece", "flip-rate"}


def test_a_model_before_and_after_a_defence(capsys):
    code = COMPARISON.replace("val=val)", 'val=val, shifts="gaussian-noise", progress=False)')
    names = run(code, **inputs())
    assert names["after"].value("accuracy").value == names["before"].value("accuracy").value
    assert "Brier score, paired by sample" in capsys.readouterr().out


def test_without_an_evaluation(capsys):
    run(STORE)
    told = capsys.readouterr().out
    assert "auroc" in told
    assert "n = 100" in told  # patients


def test_states(capsys):
    names = run(STATES)
    assert int(names["counts"].rows) == 2 * 4 * 32 * 32
    assert "tensor" in capsys.readouterr().out


def test_a_metric_of_ones_own(monkeypatch):
    monkeypatch.setattr(METRICS, "_items", dict(METRICS._items))
    run(OWN)
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn((200, 3), generator=generator), torch.arange(200) % 3
    store = PredictionStore(torch.arange(200), logits, labels, "multiclass", clusters=torch.arange(200) // 4)
    (made,) = compute(store, Context(Resampler()), ["mylab:mean-confidence"])
    assert made.estimate.value == pytest.approx(float(store.probs.amax(1).mean()))
    assert made.estimate.low < made.estimate.value < made.estimate.high
    assert made.estimate.n_units == 50
    other = PredictionStore(store.ids, 2 * logits, labels, "multiclass")
    assert compare_metric(store, other, "mylab:mean-confidence", Context(Resampler())).difference.low > 0
