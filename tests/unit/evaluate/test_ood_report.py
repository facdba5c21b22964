"""The report on foreign inputs: groups, full spectrum, corrupted data, differences, thresholds."""

import math

import pytest
import torch

import robustlab
from robustlab.core.errors import ConfigError
from robustlab.report import ood_views
from tests.contracts.toys import Small, source

SETS = {"near/a": 5, "near/b": 6, "far/c": 7, "other": 8}


def report_of(**options):
    settings = {
        "val": source(count=60, seed=1),
        "fit": source(count=60, seed=3),
        "ood": {name: source(count=20 + seed, seed=seed) for name, seed in SETS.items()},
        "detectors": ("msp", "energy", "knn"),
        "shifts": ("gaussian-noise",),
        "severities": (1, 5),
        "replicates": 100,
        "progress": False,
    }
    model = robustlab.wrap(Small(), task="multiclass", output="logits", num_classes=3)
    return robustlab.ood_report(model, source(), **settings | options)


@pytest.fixture(scope="module")
def report():
    return report_of()


def auroc(outside, inside):
    return float((outside[:, None] > inside).double().mean() + 0.5 * (outside[:, None] == inside).double().mean())


def value(report, name, scorer, metric="auroc-ood", **options):
    return report.value(metric, scorer=scorer, data=f"ID vs {name}", **options)


def test_means_over_groups(report):
    for scorer in ("msp", "energy", "knn"):
        near = [value(report, name, scorer).value for name in ("near/a", "near/b")]
        row = value(report, "near/*", scorer)
        assert row.value == pytest.approx(sum(near) / 2)
        assert row.low < row.value < row.high
        assert row.n == len(source()) + 25 + 26
        assert value(report, "far/*", scorer).value == pytest.approx(value(report, "far/c", scorer).value)


def test_differences_are_from_the_first_score(report):
    row = value(report, "near/a", "knn", "auroc-ood-difference", target="msp")
    assert row.value == pytest.approx(value(report, "near/a", "knn").value - value(report, "near/a", "msp").value)
    assert row.low <= row.value <= row.high
    assert value(report, "near/*", "energy", "auroc-ood-difference", target="msp").n > 0
    assert not [row for row in report.rows if row.metric == "auroc-ood-difference" and row.scorer == "msp"]


def test_corrupted_data_are_told_from_clean_ones_and_counted_as_known(report):
    clean, noisy = (report.predictions[key].scores["energy"] for key in ("clean", "gaussian-noise@5"))
    row = value(report, "shift/gaussian-noise@5", "energy")
    assert row.value == pytest.approx(auroc(noisy, clean), abs=1e-9)
    assert row.n == 2 * len(clean)
    assert row.n_units == len(clean), "an image and its corrupted copy are one unit"
    pooled = torch.cat([clean, report.predictions["gaussian-noise@1"].scores["energy"], noisy])
    row = value(report, "far/c", "energy", group="full spectrum")
    assert row.value == pytest.approx(auroc(report.predictions["ood:far/c"].scores["energy"], pooled), abs=1e-9)
    assert value(report, "near/*", "energy", group="full spectrum").n > 0


def test_thresholds_come_from_val(report):
    line = report.manifest["frozen"]["flags"]["energy"]
    for name in SETS:
        scores = report.predictions[f"ood:{name}"].scores["energy"]
        wanted = 0.0 if line is None else float((scores >= line).double().mean())
        assert value(report, name, "energy", "detected").value == pytest.approx(wanted)
    scores = report.predictions["gaussian-noise@5"].scores["energy"]
    row = report.value("false-alarms", "gaussian-noise", 5, scorer="energy")
    assert row.value == pytest.approx(float((scores >= line).double().mean()))


def test_labels_of_foreign_sets_play_no_part(report):
    assert all(report.predictions[f"ood:{name}"].labels is None for name in SETS)


def test_views_show_the_plain_table_and_the_page_opens(report, tmp_path):
    lines = ood_views.ood(report)
    assert len(lines) == 3 * (len(SETS) + 2 + 2)  # sets, groups, corrupted data
    text = report.summary()
    assert "near/*, knn" in text
    assert "Scores against msp" in text
    page = report.to_html(tmp_path / "page.html").read_text()
    assert "near/*" in page
    assert page.count("Full spectrum") == 1
    words = {item.word for item in ood_views.against_first(report)}
    assert words <= {"better", "worse", "no decision"}
    assert len(ood_views.full_spectrum(report)) == 3 * (len(SETS) + 2)


def test_without_val_nothing_is_flagged_and_the_reason_is_told():
    row = value(report_of(val=None, shifts=()), "far/c", "msp", "detected")
    assert math.isnan(row.value)
    assert row.reason == "no_val"


def test_no_set_is_an_error():
    with pytest.raises(ConfigError, match="at least one foreign set"):
        report_of(ood={})


def test_too_few_validation_images_flag_nothing():
    report = report_of(val=source(count=10, seed=1), shifts=())
    assert set(report.manifest["frozen"]["flags"].values()) == {None}
    assert value(report, "far/c", "msp", "detected").value == 0
    assert value(report, "near/*", "msp").n > 0
