import math
import re
from dataclasses import replace

import pytest

from robustlab.report import Report, group_views, views, words
from tests.unit.report.sample import N, sample_report


def _without(report, metric, **manifest):
    rows = tuple(
        replace(row, value=math.nan, low=math.nan, high=math.nan, reason="no_val") if row.metric == metric else row
        for row in report.rows
    )
    return Report(rows, {**report.manifest, **manifest}, report.predictions)


def test_summary_has_verdict_n_and_interval_for_each_number(report):
    text = report.summary()
    clean, worst = report.value("silent-failure-rate"), report.value("silent-failure-rate", "worst plausible")
    sentence = views.verdict(report).sentence
    assert " ".join(text.split()).startswith(f"small-cnn on pneumoniamnist (test) {sentence}")
    for row in (clean, worst):
        assert f"{1000 * row.value:.0f} ({1000 * row.low:.0f} to {1000 * row.high:.0f})" in text
    assert "poisson-noise at 120 photons" in text
    numbers = [line for line in text.splitlines() if re.search(r"\d.*\(.* to .*\)", line) and line.startswith("  ")]
    table = [line for line in numbers if "truth" not in line]
    assert len(table) >= 2 + 8 + 5
    assert all(re.search(r"n=[\d,]+", line) for line in table)
    for sentence in report.manifest["not_tested"]:
        assert sentence.split()[0] in text.split("Not tested")[1]


def test_undefined_silent_failure_rate_says_why_and_what_to_pass(report):
    lost = _without(report, "silent-failure-rate", val=None)
    sentence = views.verdict(lost).sentence
    assert "undefined: no validation data. Pass val=" in sentence
    assert words.estimate(report.value("accuracy")) in sentence
    assert "nan" not in lost.summary().lower()
    assert " 0 (" not in lost.summary().split("Clean data (95")[0]


def test_units_are_images_where_patients_are_not_known(report):
    data = {**report.manifest["data"], "unit": "image"}
    assert views.verdict(Report(report.rows, {**report.manifest, "data": data})).sentence.startswith("Of 1,000 images")


def test_drops_are_sorted_and_words_follow_the_margin(report):
    found = views.drops(report)
    values = [item.drop.value for item in found]
    assert values == sorted(values, reverse=True)
    assert len(found) == 7 * 5 + 3
    strict = views.drops(Report(report.rows, {**report.manifest, "settings": {"margin": 0.9}}))
    assert {item.word for item in found} >= {"breaks", "holds"}
    assert "breaks" not in {item.word for item in strict}


def test_an_undefined_drop_is_no_decision_and_comes_last(report):
    rows = tuple(
        replace(r, value=math.nan, low=math.nan, high=math.nan)
        if r.metric == "accuracy-drop" and r.shift == "poisson-noise" and r.severity == 5
        else r
        for r in report.rows
    )
    last = views.drops(Report(rows, report.manifest))[-1]
    assert (last.condition.key, last.word) == ("poisson-noise@5", "no decision")


def test_curves_start_clean_and_put_the_worst_first(report):
    found = views.curves(report)
    lowest = [min(p.accuracy.value for p in curve.points) for curve in found]
    assert lowest == sorted(lowest)
    assert all(curve.points[0].accuracy == report.value("accuracy") for curve in found)
    assert [p.condition.severity for p in found[0].points] == sorted(p.condition.severity for p in found[0].points)


def test_conditions_come_from_the_rows_where_the_manifest_is_silent(report):
    bare = Report(report.rows, {})
    assert set(views.conditions(bare)) == set(views.conditions(report))
    assert views.verdict(bare).condition.label == "poisson-noise at 120 photons"


def test_gap_interval_is_newcombes(report):
    """Method 10 on 56/70 against 48/80: 0.0524 to 0.3339 (Newcombe 1998, table II)."""
    first = replace(report.value("accuracy", group="sex=F"), value=56 / 70, low=0.691798, high=0.876991, n=70)
    second = replace(report.value("accuracy", group="sex=M"), value=48 / 80, low=0.490447, high=0.700341, n=80)
    (table,) = group_views.groups(Report((first, second), {}))
    (gap,) = table.gaps
    assert (gap.best, gap.worst, gap.word) == ("F", "M", "gap")
    assert gap.low == pytest.approx(0.0524, abs=5e-4)
    assert gap.high == pytest.approx(0.3339, abs=5e-4)


def test_gap_of_three_levels_is_wider_than_of_two(report):
    rows = [report.value("accuracy", group=f"site={name}") for name in ("north", "centre", "south")]
    ends = sorted(rows, key=lambda row: row.value)
    two = group_views.groups(Report((ends[0], ends[2]), {}))[0].gaps[0]
    three = group_views.groups(Report(tuple(rows), {}))[0].gaps[0]
    assert three.value == two.value
    assert three.low < two.low
    assert three.word == "no decision"


def test_gap_of_a_rate_where_lower_is_better_names_the_lower_one_best(report):
    gap = next(g for g in group_views.groups(report)[0].gaps if g.metric == "silent-failure-rate")
    rows = {level: report.value("silent-failure-rate", group=f"sex={level}").value for level in ("F", "M")}
    assert gap.best == min(rows, key=rows.get)
    assert gap.value == pytest.approx(abs(rows["F"] - rows["M"]))


@pytest.mark.parametrize(
    ("value", "unit", "kind", "text"),
    [
        (60.0, "photons", "corruption", "60 photons"),
        (4 / 255, "linf, [0, 1] scale", "attack", "eps 4/255"),
        (0.013, "linf, [0, 1] scale", "attack", "eps 0.013"),
        (0.5, "l2, [0, 1] scale", "attack", "eps 0.5"),
        (math.nan, "", "corruption", ""),
        (12000.0, "photons", "corruption", "12,000 photons"),
    ],
)
def test_amounts_in_words(value, unit, kind, text):
    assert words.amount(value, unit, kind) == text


def test_an_empty_report_still_speaks():
    empty = Report((), {})
    assert "undefined" in empty.summary()
    assert views.headline(empty) == []


def test_sample_is_seeded():
    assert sample_report().to_json() == sample_report().to_json()
    assert sample_report().value("accuracy").n == N


def test_the_summary_tells_of_other_sets_and_of_groups(report):
    text = report.summary()
    auroc = report.value("auroc-ood", scorer="msp", data="ID vs far/photos")
    line = next(line for line in text.split("\n") if "far/photos, msp" in line)
    assert words.estimate(auroc) in line
    assert "surer" not in line
    low = {"value": 0.02, "low": 0.01, "high": 0.03}
    foreign = tuple(replace(row, **low) if row.metric == "auroc-ood" else row for row in report.rows)
    assert "surer on these than on the data" in Report(foreign, report.manifest, report.predictions).summary()
    gap = group_views.groups(report)[0].gaps[0]
    assert f"Groups of {group_views.groups(report)[0].column}: best minus worst" in text
    assert words.points(gap.value) in text


def test_a_mean_over_some_classes_says_of_how_many(report):
    rows = [
        replace(row, method=f"{row.method}; mean of 12 of 14 defined") if row.metric == "auroc" else row
        for row in report.rows
    ]
    titles = [line.title for line in views.headline(Report(tuple(rows), report.manifest, report.predictions))]
    assert "AUROC (mean of 12 of 14)" in titles
