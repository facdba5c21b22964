"""The checklist of attacks in a report: at the middle budget of each norm, in the manifest, the text and the page."""

import pytest

import robustlab
from corruptions import DDN, PGD
from robustlab.core.errors import ModelError
from robustlab.report.html.page import render
from tests.contracts.toys import Small, evaluate, source

EPS = (1 / 255, 4 / 255, 16 / 255)


def build():
    return robustlab.wrap(Small(), task="multiclass", output="logits", num_classes=3)


@pytest.fixture(scope="module")
def report():
    attacks = (PGD(eps=EPS, steps=3), DDN(eps=(0.2,), steps=3))
    return evaluate(build(), source(count=60), shifts=(), attacks=attacks, trust=None)


def test_each_norm_is_checked_at_its_middle_budget(report):
    found = report.manifest["trust"]
    assert [(item["norm"], item["eps"], item["budget"]) for item in found] == [
        ("linf", pytest.approx(4 / 255), "4 grey levels"),
        ("l2", pytest.approx(0.2), "0.2 on the [0, 1] scale"),
    ]
    for item in found:
        names = [check["name"] for check in item["checks"]]
        assert len(set(names)) == len(names) > 15
        assert (
            next(check for check in item["checks"] if check["name"] == "adaptive-attack")["status"] == "not automatable"
        )
        assert (
            "10 of 40 samples" in next(check for check in item["checks"] if check["name"] == "threat-model")["finding"]
        )


def test_text_and_page_show_what_speaks_against_the_numbers(report, tmp_path):
    text, page = report.summary(), render(report)
    assert "How far to trust the attacks (linf, 4 grey levels)" in text
    assert "NOT AUTOMATABLE adaptive-attack:" in text
    assert page.count("How far to trust these numbers") == 2
    loaded = robustlab.Report.load(report.save(tmp_path / "run"))
    assert loaded.manifest["trust"] == report.manifest["trust"]
    assert loaded.summary() == text
    assert not any("no checklist" in sentence for sentence in report.manifest["not_tested"])


def test_without_a_checklist_the_report_says_so():
    report = evaluate(build(), source(), shifts=(), attacks=PGD(eps=EPS, steps=2), trust=0)
    assert report.manifest["trust"] == []
    assert any("no checklist was run" in sentence for sentence in report.manifest["not_tested"])
    assert "How far to trust the attacks" not in report.summary()
    plain = evaluate(build(), source(), shifts=())
    assert not any("checklist" in sentence for sentence in plain.manifest["not_tested"])


def test_a_checklist_that_fails_loses_no_number(monkeypatch):
    def refuse(*args, **options):
        raise ModelError("trust_checks", "one thing", "another", "Do this.")

    monkeypatch.setattr("robustlab.evaluate.checklist.trust_checks", refuse)
    report = evaluate(build(), source(), shifts=(), attacks=PGD(eps=EPS, steps=2), trust=10)
    assert report.value("accuracy", shift="pgd-linf", severity=5).n > 0
    assert [check["status"] for check in report.manifest["trust"][0]["checks"]] == ["failed"]


def test_the_cache_keeps_the_findings_for_the_same_question(tmp_path, monkeypatch):
    options = {"shifts": (), "attacks": PGD(eps=EPS, steps=2), "trust": 10, "cache": tmp_path}
    first = evaluate(build(), source(), **options)
    asked = []

    def count(*args, **given):
        asked.append(given)
        raise ModelError("trust_checks", "one thing", "another", "Do this.")

    monkeypatch.setattr("robustlab.evaluate.checklist.trust_checks", count)
    assert evaluate(build(), source(), **options).manifest["trust"] == first.manifest["trust"]
    assert not asked
    for other in ({"seed": 1}, {"trust": 12}, {"attacks": PGD(eps=(2 / 255,), steps=2)}):
        evaluate(build(), source(), **options | other)
    evaluate(build(), source(seed=2), **options)
    assert len(asked) == 4
