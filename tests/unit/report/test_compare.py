import pytest
import torch

from robustlab.core.errors import ConfigError, UnknownNameError
from robustlab.metrics.base import Context
from robustlab.metrics.stats import Resampler, paired_difference
from robustlab.metrics.stats.compare import roughly
from robustlab.report import Report, compare
from tests.unit.report.sample import sample_report


def _few(report, keys=("clean", "poisson-noise@3", "jpeg@1")):
    settings = {**report.manifest["settings"], "replicates": 200}
    stores = {key: report.predictions[key] for key in keys}
    return Report(report.rows, {**report.manifest, "settings": settings}, stores)


@pytest.fixture(scope="module")
def plain():
    return _few(sample_report())


@pytest.fixture(scope="module")
def better():
    return _few(sample_report(skill=0.12))


def test_identical_predictions_are_no_decision_in_words(plain):
    found = compare(plain, plain)
    assert {row.verdict for row in found.rows} == {"no decision (identical predictions)"}
    assert all((row.difference, row.low, row.high) == (0.0, 0.0, 0.0) for row in found.rows)
    assert found.worst.verdict == "no decision (identical predictions)"
    assert "no decision (identical predictions) at n = 624" in found.summary()


def test_a_clearly_better_model_is_better_and_the_other_way_round_worse(plain, better):
    forth = {row.condition: row for row in compare(plain, better).rows}
    back = {row.condition: row for row in compare(better, plain).rows}
    assert forth["poisson-noise@3"].verdict == "better"
    assert back["poisson-noise@3"].verdict == "worse"
    assert forth["poisson-noise@3"].difference == pytest.approx(-back["poisson-noise@3"].difference)


def test_no_decision_says_how_many_would_decide(plain):
    close = _few(sample_report(skill=0.004))
    found = compare(plain, close)
    row = next(row for row in found.rows if row.verdict == "no decision" and row.difference != 0)
    spread = (row.high - row.low) / (2 * 1.959964)
    assert row.units_to_decide == pytest.approx(624 * ((1.959964 + 0.841621) * spread / row.difference) ** 2, abs=1)
    told = f"no decision at n = 624; about {roughly(row.units_to_decide)} would decide a difference of this size"
    assert told in found.summary()
    assert found.to_frame()["units_to_decide"].notna().all()


def test_lower_is_better_for_a_loss(plain, better):
    row = compare(plain, better, metric="nll").rows[1]
    assert row.difference < 0
    assert row.verdict == "better"


def test_pairing_ignores_the_order_of_samples(plain, better):
    order = torch.arange(624).flip(0)
    turned = Report(better.rows, better.manifest, {k: s.select(order) for k, s in better.predictions.items()})
    assert compare(plain, turned).rows == compare(plain, better).rows


def test_difference_is_that_of_the_accuracies(plain, better):
    row = compare(plain, better).rows[1]
    share = [
        (s.predicted == s.labels).double().mean() for s in (p.predictions["poisson-noise@3"] for p in (plain, better))
    ]
    assert row.difference == pytest.approx(float(share[1] - share[0]), abs=1e-12)


def test_the_worst_is_picked_against_the_second_model_and_widened(plain, better):
    found = compare(better, plain)
    rows = {row.condition: row for row in found.rows}
    picked = min(found.rows, key=lambda row: row.difference)
    assert found.worst.condition == f"worst of 3: {picked.condition}"
    assert found.worst.difference == picked.difference
    assert found.worst.low < rows[picked.condition].low
    assert found.worst.high > rows[picked.condition].high
    context = Context(Resampler(seed=0, replicates=1200, confidence=1 - 0.05 / 3))
    stores = (report.predictions[picked.condition] for report in (better, plain))
    estimate = paired_difference(*stores, "accuracy", context)
    assert (found.worst.low, found.worst.high) == (estimate.low, estimate.high)
    assert "Bonferroni over 3" in found.worst.method


def test_different_data_are_refused(plain):
    other = Report(plain.rows, {**plain.manifest, "data": {"name": "other", "fingerprint": "00"}}, plain.predictions)
    with pytest.raises(ConfigError, match="two reports on the same data"):
        compare(plain, other)


def test_reports_without_common_predictions_are_refused(plain):
    with pytest.raises(UnknownNameError, match="common condition"):
        compare(plain, Report(plain.rows, plain.manifest))


def test_conditions_of_one_report_only_are_listed(plain):
    fewer = Report(plain.rows, plain.manifest, {"clean": plain.predictions["clean"]})
    found = compare(plain, fewer)
    assert found.missing == ("jpeg@1", "poisson-noise@3")
    assert "jpeg@1" in found.summary()
    assert found.worst is None


def test_frame_holds_every_row(plain, better):
    frame = compare(plain, better).to_frame()
    assert len(frame) == 4
    assert list(frame.columns[:4]) == ["condition", "metric", "target", "difference"]


def test_a_number_of_samples_is_told_as_roughly_as_it_is_known():
    assert [roughly(n) for n in (7, 96, 510.0, 1234, 228_716, 1e9)] == [
        "7", "96", "510", "1,200", "230,000", "1,000,000,000",
    ]  # fmt: skip
