"""Attacks on detectors in an evaluation: run on the right sets, told apart from attacks on answers, and kept."""

import pytest
import torch

import robustlab
from corruptions import PGD
from corruptions.adversarial import DetectorAttack
from robustlab.metrics.base import Frozen
from robustlab.metrics.selective import referred
from robustlab.report import ood_views
from tests.contracts.toys import Small, evaluate, source

EPS = (4 / 255, 16 / 255)
HIDE = DetectorAttack(goal="hide", detector="energy", eps=EPS, steps=8)
ALARM = DetectorAttack(goal="alarm", eps=EPS, steps=8)


class Counting(Small):
    calls = 0

    def forward(self, x):
        Counting.calls += 1
        return super().forward(x)


def model(net=None, **options):
    settings = {"task": "multiclass", "output": "logits", "num_classes": 3} | options
    return robustlab.wrap(net or Small(), **settings)


def foreign():
    return {"far/a": source(count=24, seed=5), "near/b": source(count=16, seed=6)}


@pytest.fixture(scope="module")
def report():
    return evaluate(model(), source(), val=source(count=60, seed=1), shifts=(), attacks=(HIDE, ALARM), ood=foreign())


def referred_share(report, store):
    frozen = report.manifest["frozen"]
    made = Frozen(confidence=frozen["confidence"], detector=frozen["detector"], score=frozen["score"])
    return float(referred(store, made).double().mean())


def test_hidden_images_are_those_of_the_foreign_sets(report):
    for name, count in (("far/a", 24), ("near/b", 16)):
        before = report.predictions[f"ood:{name}"]
        for severity, shrink in ((2.5, 0.0), (5, 0.0)):
            after = report.predictions[f"ood:{name}@hide-energy-linf@{severity:g}"]
            assert len(after) == count
            assert after.labels is None
            assert torch.equal(after.ids, before.ids)
            assert bool((after.scores["energy"] < before.scores["energy"] - shrink).all())
            row = report.value("auroc-ood", "hide-energy-linf", severity, scorer="energy", data=f"ID vs {name}")
            inside = report.predictions["clean"].scores["energy"]
            wins = (after.scores["energy"][:, None] > inside).double().mean()
            assert row.value == pytest.approx(float(wins))
            assert row.low <= row.value <= row.high
            assert row.amount == pytest.approx(255 * EPS[0 if severity == 2.5 else 1])
            share = report.value("referred-share", "hide-energy-linf", severity, data=f"ID vs {name}")
            assert share.value == pytest.approx(referred_share(report, after))
            assert share.n == count
        assert report.value("referred-share", data=f"ID vs {name}").value == pytest.approx(
            referred_share(report, before)
        )


def test_alarms_are_raised_by_the_data(report):
    before, after = (report.predictions[key] for key in ("clean", "alarm-msp-linf@5"))
    assert bool((after.scores["msp"] > before.scores["msp"]).all())
    share = report.value("referred-share", "alarm-msp-linf", 5)
    assert share.value == pytest.approx(referred_share(report, after))
    assert share.value > report.value("referred-share", data="array").value
    row = report.value("auroc-ood", "alarm-msp-linf", 5, scorer="msp", data="ID vs far/a")
    outside = report.predictions["ood:far/a"].scores["msp"]
    assert row.value == pytest.approx(float((outside[:, None] > after.scores["msp"]).double().mean()))


def test_they_are_no_attacks_on_answers(report):
    attacked = {row.metric for row in report.rows if row.shift.startswith(("hide", "alarm"))}
    assert "accuracy" not in attacked
    assert "accuracy-drop" not in attacked
    assert not [row for row in report.rows if row.metric in ("minimal-budget", "failure-threshold")]
    assert report.manifest["trust"] == []
    kinds = {entry["shift"]: entry["kind"] for entry in report.manifest["conditions"]}
    assert kinds == {"clean": "clean", "hide-energy-linf": "detector attack", "alarm-msp-linf": "detector attack"}
    assert any("no attack on the answers was run" in sentence for sentence in report.manifest["not_tested"])
    assert "hide-energy-linf: may change every pixel by up to 16 grey levels" in report.manifest["threat_model"]


def test_text_and_page_show_them(report, tmp_path):
    text = report.summary()
    assert "Attacks on the detectors" in text
    assert "hide-energy-linf at eps 16 grey levels: far/a, energy" in text
    assert "eps 4 grey levels" not in text, "smaller budgets are on the page alone"
    page = report.to_html(tmp_path / "report.html").read_text()
    assert "Attacks on the detectors" in page
    assert page.count('<th scope="row">hide-energy-linf</th>') == 2 * 2 * 2 + 2 * 2  # sets, budgets, scores; shares
    assert page.count('<th scope="row">alarm-msp-linf</th>') == 2 * 2 * 2 + 2
    clean = [row for row in report.rows if row.metric == "auroc-ood" and row.shift == "clean"]
    assert len(ood_views.ood(report)) == len(clean) == 4, "the table of unfamiliar inputs is of clean sets"


def test_answers_are_kept_and_the_report_comes_back(report, tmp_path):
    options = {"val": source(count=60, seed=1), "shifts": (), "attacks": (HIDE, ALARM), "ood": foreign()}
    first = evaluate(model(Counting()), source(), cache=tmp_path, **options)
    first.save(tmp_path / "kept")
    Counting.calls = 0
    second = evaluate(model(Counting()), source(), cache=tmp_path, **options)
    assert Counting.calls == 1, "the probe, and nothing else"
    assert repr(first.rows) == repr(second.rows)
    loaded = robustlab.Report.load(tmp_path / "kept")
    assert loaded.summary() == first.summary()
    assert loaded.predictions.keys() == first.predictions.keys()


def test_beside_an_attack_on_answers():
    report = evaluate(
        model(), source(), val=source(count=60, seed=1), shifts=(), attacks=(PGD(eps=EPS, steps=3), ALARM)
    )
    assert report.value("accuracy", "pgd-linf", 5).n == len(source())
    assert report.value("referred-share", "alarm-msp-linf", 5).value > 0.1
    assert not [key for key in report.predictions if key.startswith("worst attack")]


def test_what_cannot_be_attacked_is_skipped_and_listed():
    report = evaluate(model(), source(), shifts=(), attacks=(HIDE,))
    assert report.manifest["skipped"] == [
        {"what": "hide-energy-linf", "why": "there is no OOD set whose images could hide (ood=)"}
    ]
    net = torch.nn.Sequential(Small(), torch.nn.Softmax(1)).eval()
    report = evaluate(model(net, output="probs"), source(), shifts=(), attacks=(HIDE, ALARM), ood=foreign())
    assert [item["what"] for item in report.manifest["skipped"]] == ["hide-energy-linf"]
    assert "offset" in report.manifest["skipped"][0]["why"]
    assert report.value("auroc-ood", "alarm-msp-linf", 5, scorer="msp", data="ID vs far/a").n > 0


def test_another_detector_of_the_same_name_is_another_attack(monkeypatch):
    from defenses.detectors.logits import Energy
    from robustlab.evaluate.cache import shift_identity

    first = shift_identity(HIDE)
    monkeypatch.setattr(Energy, "version", 99)
    assert shift_identity(HIDE) != first


def test_comparisons_of_accuracy_leave_them_out(report):
    keys = {row.condition for row in robustlab.compare(report, report).rows}
    assert keys == {"clean"}
