"""The promises on what cannot be read, on outputs that are not finite, and on what is written to disk."""

import csv
import math
import re

import pytest
import torch
from PIL import Image
from torch import nn

import robustlab
from robustlab.core.registry import ATTACKS
from robustlab.data import subset
from tests.contracts.quick import for_three_classes, quick
from tests.contracts.toys import (
    COUNT,
    ORDER,
    SECRETS,
    Exact,
    Small,
    by_id,
    conditions,
    evaluate,
    pixels,
    secretive,
    source,
)

# ---- 7: what cannot be read is listed, and the rest is evaluated


def test_7_a_broken_file_is_quarantined_and_listed(tmp_path):
    images, _ = pixels()
    for place, image in enumerate(images):
        folder = tmp_path / "set" / ("dark" if place % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{place}.png")
    whole = evaluate(Exact(), robustlab.load_data(tmp_path / "set", task="multiclass"), ood={"far/x": tmp_path / "set"})
    assert whole.manifest["data"]["notes"] == []
    broken = tmp_path / "set" / "dark" / "7.png"
    broken.write_bytes(broken.read_bytes()[:60])
    report = evaluate(
        Exact(), robustlab.load_data(tmp_path / "set", task="multiclass"), ood={"far/x": tmp_path / "set"}
    )
    for described in (report.manifest["data"], report.manifest["ood"]["far/x"]):
        assert described["n"] == COUNT - 1
        assert any("dark/7.png" in note and "1 unreadable" in note for note in described["notes"])
    assert "dark/7.png" in report.to_html(tmp_path / "report.html").read_text()
    for condition in conditions(report):
        wanted, found = by_id(whole, condition), by_id(report, condition)
        assert len(wanted) == len(found) + 1
        assert all(torch.equal(found[key], wanted[key]) for key in found)


# ---- 8: outputs that are not finite


class Fragile(nn.Module):
    """Answers ``value`` for images whose upper left grey level is one of a few."""

    def __init__(self, inner, value, levels):
        super().__init__()
        self.inner, self.value, self.levels = inner, value, levels
        self.eval()

    def forward(self, x):
        corner = (x[:, 0, 0, 0] * 255).round().long()
        bad = torch.isin(corner, torch.tensor(self.levels))
        logits = self.inner(x)
        column = torch.arange(logits.shape[1]) == 1
        return torch.where(bad[:, None] & column, self.value, logits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_8_outputs_that_are_not_finite_are_errors_and_both_n_are_shown(task, value, tmp_path):
    data, val = source(task), source(task, seed=1)
    levels = sorted({int(level) for level in pixels()[0][::6, 0, 0, 0]})
    net = Small(2 if task == "binary" else 3)
    settings = {"shifts": (), "val": val, "metrics": "all"}
    healthy, report = (
        evaluate(robustlab.wrap(model, task=task, output="logits"), data, **settings)
        for model in (net, Fragile(net, value, levels))
    )
    finite = report.predictions["clean"].finite
    good = int(finite.sum())
    assert 20 < good < COUNT - 5
    shared = [row for row in report.rows if not row.scorer and not row.group]
    counts = {row.metric: row.n for row in shared}
    if task == "multilabel":
        assert report.predictions["clean"].logits.isfinite().all(1).sum() == good
    else:
        right = (healthy.predictions["clean"].predicted == data.info.labels) & finite
        row = report.value("accuracy")
        assert row.value == pytest.approx(right.double().mean().item(), abs=1e-9)
        assert row.n == COUNT
        assert counts["auroc"] == good
    assert report.value("silent-failure-rate").n == COUNT
    assert {counts[metric] for metric in ("nll", "brier", "ece")} == {good}
    assert all(math.isfinite(row.value) for row in shared if row.metric in ("nll", "brier", "ece", "auroc"))
    report.save(tmp_path)
    with (tmp_path / "rows.csv").open() as file:
        shown = {line["metric"]: int(line["n"]) for line in csv.DictReader(file) if line["shift"] == "clean"}
    assert shown["silent-failure-rate"] == COUNT
    assert shown["nll"] == good


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("output", ["probs", "log_probs"])
def test_8_holds_for_declared_probabilities(output, value):
    corner = sorted({int(level) for level in pixels()[0][::6, 0, 0, 0]})
    activation = nn.Softmax(1) if output == "probs" else nn.LogSoftmax(1)
    net = Fragile(nn.Sequential(Small(), activation), value, corner)
    report = evaluate(robustlab.wrap(net, output=output), source(), shifts=(), metrics=("accuracy", "nll"))
    assert report.value("accuracy").n == COUNT
    assert report.value("nll").n == int(report.predictions["clean"].finite.sum()) < COUNT - 5


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", for_three_classes())
def test_8_they_are_never_a_success_of_an_attack(name, value):
    images, _ = pixels()
    images[:, 0, 0, 0] = 40
    labels = source().info.labels
    data = robustlab.load_data(images, labels=labels)
    levels = [level for level in range(256) if level != 40]  # every change of this pixel breaks the network
    attack = quick(name, eps=({"linf": 8 / 255, "l2": 0.5, "parameters": 0.3}[ATTACKS.get(name).norms[0]],))
    plain, report = (
        evaluate(model, data, shifts=(), attacks=attack) for model in (Small(), Fragile(Small(), value, levels))
    )
    moved = f"{attack.label}@5"
    assert report.predictions[moved].finite.all()
    values = [each.value("accuracy", shift=attack.label, severity=5).value for each in (plain, report)]
    assert values[0] < plain.value("accuracy").value
    assert values[0] <= values[1] <= report.value("accuracy").value


# ---- 9: no network, no pickle, no pictures and no ids that were not asked for


def written(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def test_9_everything_runs_without_network_and_without_pickle(elsewhere):
    suffixes = {path.suffix for path in written(elsewhere)}
    assert suffixes == {".json", ".csv", ".html", ".safetensors"}
    for path in written(elsewhere):
        if path.suffix != ".safetensors":  # begins with the length of its header, which may be any byte
            assert not path.read_bytes().startswith((b"\x80", b"PK")), "a pickle, or an archive of pickles"
    page = (elsewhere / "run" / "report.html").read_text()
    assert not re.findall(
        r"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//|@import|url\(\s*["']?(?:https?:)?//""", page
    )


def test_9_pictures_enter_only_when_asked(elsewhere):
    plain, asked = ((elsewhere / name / "report.html").read_text() for name in ("run", "pictures"))
    assert "data:image" not in plain
    assert "<img" not in plain
    assert "data:image/png;base64," in asked
    assert not (elsewhere / "run" / "gallery.json").exists()
    assert (elsewhere / "pictures" / "gallery.json").exists()


def test_9_ids_are_hashed_in_every_file(elsewhere):
    info = secretive().info
    numbers = [*info.ids.tolist(), *source(seed=2).info.ids.tolist()]
    files = [path for path in written(elsewhere) if path.parent.name in ("run", "pictures")]
    assert len(files) == 11
    for path in files:
        content = path.read_bytes()
        assert b"Jane Q. Patient" not in content, path
        for number in numbers:
            assert str(number).encode() not in content, path
            assert number.to_bytes(8, "little", signed=True) not in content, path


def test_9_hashed_ids_still_pair_the_samples(tmp_path):
    data = source(ids=SECRETS)
    first = evaluate(Small(), data, shifts=())
    second = evaluate(Small(seed=4), subset(data, range(COUNT)), shifts=())
    loaded = [robustlab.Report.load(report.save(tmp_path / str(place))) for place, report in enumerate((first, second))]
    again = robustlab.Report.load(loaded[1].save(tmp_path / "again"))
    wanted = robustlab.compare(first, second).rows
    assert wanted[0].difference != 0
    for a, b in ((loaded[0], loaded[1]), (first, loaded[1]), (loaded[0], second), (loaded[0], again)):
        assert robustlab.compare(a, b).rows == wanted
    turned = evaluate(Small(seed=4), subset(data, ORDER.tolist()), shifts=()).predictions
    order = torch.from_numpy(ORDER)
    assert torch.equal(turned["clean"].keys, loaded[0].predictions["clean"].ids[order])
