import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from robustlab.core.errors import ConfigError, DataFileError, KindError, UnknownNameError
from robustlab.core.rng import hashed
from robustlab.report import Picture, Report, files, folder

FILES = {"report.json", "rows.csv", "predictions.safetensors", "predictions.json"}


@pytest.fixture
def undefined(report):
    """The report with two undefined numbers: one in value, one in the interval."""
    rows = list(report.rows)
    rows[0] = replace(rows[0], value=math.nan, low=math.nan, high=math.nan, reason="single_class")
    rows[1] = replace(rows[1], low=math.nan, high=math.inf, reason="too_few_units")
    return Report(tuple(rows), report.manifest, report.predictions)


def test_json_round_trip_is_exact_with_nan_and_reasons(undefined):
    text = undefined.to_json()
    assert "NaN" not in text
    assert "Infinity" not in text
    again = Report.from_json(text)
    assert again.to_json() == text
    assert again.rows == undefined.rows  # NaN is one object, so tuples of fields compare equal
    assert math.isnan(again.rows[0].value)
    assert again.rows[0].reason == "single_class"
    assert again.rows[1].high == math.inf
    assert again.manifest == undefined.manifest


def test_csv_has_an_empty_cell_and_the_reason_for_nan(undefined, tmp_path):
    undefined.save(tmp_path)
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(undefined.rows)
    assert lines[0]["value"] == ""
    assert lines[0]["reason"] == "single_class"
    for line, row in zip(lines[2:], undefined.rows[2:], strict=True):
        assert float(line["value"]) == row.value
        assert int(line["n"]) == row.n
        assert line["metric"] == row.metric


def test_load_after_save_is_equal(undefined, tmp_path):
    pictured = Report(
        undefined.rows, undefined.manifest, undefined.predictions, (Picture("clean", 0.0, b"\x89PNG\x00", "a cell"),)
    )
    assert pictured.save(tmp_path / "deep" / "run") == tmp_path / "deep" / "run"
    again = Report.load(tmp_path / "deep" / "run")
    assert again.to_json() == pictured.to_json()
    assert again.gallery == pictured.gallery
    assert list(again.predictions) == list(pictured.predictions)
    for key, store in pictured.predictions.items():
        loaded = again.predictions[key]
        assert loaded.task == store.task
        assert torch.equal(loaded.ids, hashed(store.ids))
        assert torch.equal(loaded.keys, store.keys)
        assert torch.equal(loaded.logits, store.logits)
        assert (loaded.labels is None) == (store.labels is None)
        assert {k: v.tolist() for k, v in loaded.scores.items()} == {k: v.tolist() for k, v in store.scores.items()}
        assert {k: v.tolist() for k, v in loaded.groups.items()} == {k: v.tolist() for k, v in store.groups.items()}


def test_saving_twice_gives_the_same_bytes_and_stores_shared_tensors_once(report, tmp_path):
    report.save(tmp_path / "a")
    Report.load(tmp_path / "a").save(tmp_path / "b")
    assert {p.name for p in (tmp_path / "a").iterdir()} == FILES
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    index = json.loads((tmp_path / "a" / "predictions.json").read_text())
    assert len({entry["ids"] for entry in index if entry["labels"]}) == 1


def test_pictures_of_an_earlier_run_do_not_stay(report, tmp_path):
    Report(report.rows, {}, {}, (Picture("clean", 0.0, b"x", ""),)).save(tmp_path)
    assert Report.load(tmp_path).gallery
    Report(report.rows, {}).save(tmp_path)
    assert not Report.load(tmp_path).gallery


def test_a_failed_save_leaves_the_old_files(report, tmp_path, monkeypatch):
    report.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == FILES
    changed = Report(report.rows[:5], report.manifest)
    synced = []

    def full_disk(descriptor):
        synced.append(descriptor)
        if len(synced) == len(FILES):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder.os, "fsync", full_disk)
    with pytest.raises(DataFileError, match="No space left"):
        changed.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_reader_meets_half_a_file(report, tmp_path, monkeypatch):
    report.save(tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("stopped here")))
    with pytest.raises(DataFileError, match="stopped here"):
        Report(report.rows[:5], {}).save(tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before


def test_another_schema_is_refused_in_four_parts(report):
    text = report.to_json().replace('"schema": 1', '"schema": 0')
    with pytest.raises(
        ConfigError, match=r"Report\.from_json: expected a report of schema 1, got schema 0\. Load it"
    ) as caught:
        Report.from_json(text)
    assert caught.value.fix


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"manifest": 3}', "not json"])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ConfigError, match="the JSON of a report"):
        Report.from_json(text)


def test_a_folder_without_a_report_is_refused(tmp_path):
    with pytest.raises(DataFileError, match=r"a folder that Report\.save wrote"):
        Report.load(tmp_path / "nothing")


def test_damaged_predictions_are_refused(report, tmp_path):
    report.save(tmp_path)
    (tmp_path / "predictions.safetensors").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(DataFileError, match="whole files"):
        Report.load(tmp_path)


def test_a_manifest_that_is_not_json_is_refused(report):
    with pytest.raises(KindError, match="JSON types"):
        Report(report.rows, {"device": torch.device("cpu")})


def test_value_returns_the_row(report):
    row = report.value("accuracy", "poisson-noise", 3)
    assert (row.metric, row.shift, row.severity, row.amount) == ("accuracy", "poisson-noise", 3.0, 120.0)
    assert report.value("accuracy", group="sex=F").n == 312
    assert report.value("auroc-ood", scorer="energy", data="ID vs far/photos").value > 0.5
    assert report.value("silent-failure-rate", "worst plausible").target == "poisson-noise@3"


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ({"metric": "acuracy"}, "metric is one of:.*'accuracy'"),
        ({"metric": "accuracy", "shift": "fog"}, "shift is one of:.*'jpeg'"),
        ({"metric": "accuracy", "shift": "jpeg", "severity": 7}, "severity is one of: 1\\.0, 2\\.0"),
        ({"metric": "sensitivity"}, "target is one of: 'pneumonia'"),
        ({"metric": "accuracy", "data": "elsewhere"}, "data is one of:"),
        ({"metric": "auroc-ood", "scorer": "msp"}, "Choose among data:.*near/breastmnist"),
    ],
)
def test_value_says_what_there_is(report, asked, hint):
    with pytest.raises(UnknownNameError, match=hint):
        report.value(**asked)


def test_frame_has_all_rows(report):
    frame = report.to_frame()
    assert list(frame.columns) == list(files.COLUMNS)
    assert len(frame) == len(report.rows)
    assert frame["value"].dtype == "float64"
    assert frame.loc[0, "n"] == report.rows[0].n


def test_budgets_of_different_units_get_charts_of_their_own(tmp_path, report):
    rows, entries = list(report.rows), list(report.manifest["conditions"])
    for entry in [entry for entry in entries if entry["shift"] == "pgd-linf"]:
        entries.append(
            {**entry, "shift": "pgd-l2", "key": entry["key"].replace("linf", "l2"), "unit": "l2, [0, 1] scale"}
        )
    rows += [replace(row, shift="pgd-l2") for row in rows if row.shift == "pgd-linf"]
    both = replace(report, rows=tuple(rows), manifest={**report.manifest, "conditions": entries})
    page = both.to_html(tmp_path / "both.html").read_text()
    assert page.count('<figcaption class="sub">budget:') == 2
    assert report.to_html(tmp_path / "one.html").read_text().count('<figcaption class="sub">budget:') == 1
