"""ROC curves and the most confusing samples: planted by hand, hashed ids, pictures only when asked for."""

import math
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_curve

import robustlab
from robustlab.metrics.store import PredictionStore
from robustlab.report import confusing, ood_views
from robustlab.report.report import Report
from robustlab.report.rows import Row
from tests.contracts.toys import Small, source

INSIDE = [0.0, 1.0, 2.0, 3.0, math.nan]
SETS = {"near/a": [2.5, -1.0, 9.0, math.inf], "far/b": [1.0, 7.0]}


def row(name, value):
    return Row(
        model="m", data=f"ID vs {name}", shift="clean", severity=0.0, amount=math.nan, unit="", group="", target="",
        scorer="s", metric="auroc-ood", value=value, low=0.1, high=0.9, n=9, n_units=9, method="", reason="",
        direction="higher",
    )  # fmt: skip


def store(scores, start):
    count = len(scores)
    return PredictionStore(
        ids=torch.arange(start, start + count),
        logits=torch.zeros(count, 2),
        labels=None,
        task="binary",
        scores={"s": torch.tensor(scores, dtype=torch.float64)},
    )


@pytest.fixture
def report():
    stores = {"clean": store(INSIDE, 100), **{f"ood:{name}": store(s, 7000) for name, s in SETS.items()}}
    manifest = {"model": {"name": "m"}, "data": {"name": "the data"}, "ood": {name: {} for name in SETS}}
    return Report(tuple(row(name, 0.5) for name in SETS), manifest, stores)


def test_the_most_confusing_are_those_at_the_wrong_ends(report):
    found = {(item.kind, item.data): item.samples for item in confusing.most_confusing(report, 2)}
    a, b = found["looks known", "near/a"], found["looks known", "far/b"]
    assert [(sample.row, sample.score, sample.share) for sample in a] == [(1, -1.0, 1.0), (0, 2.5, 0.25)]
    assert [(sample.row, sample.share) for sample in b] == [(0, 0.625), (1, 0.0)]  # equal scores count half
    known = found["looks foreign", "the data"]
    assert [(sample.row, sample.score, sample.share) for sample in known] == [(3, 3.0, 0.6), (2, 2.0, 0.4)]
    assert a[0].key == int(report.predictions["ood:near/a"].keys[1])
    assert int(a[0].name, 16) == a[0].key & (1 << 64) - 1


def test_a_frame_and_a_text_of_them(report):
    frame = report.most_confusing(1)
    assert frame[["scorer", "kind", "data", "row"]].to_numpy().tolist() == [
        ["s", "looks known", "near/a", 1], ["s", "looks known", "far/b", 0], ["s", "looks foreign", "the data", 3],
    ]  # fmt: skip
    text = report.summary()
    assert "near/a looks known to s" in text
    assert confusing.most_confusing(report, 1)[0].samples[0].name in text


def test_saved_reports_name_the_same_samples(report, tmp_path):
    report.save(tmp_path / "run")
    loaded = Report.load(tmp_path / "run")
    assert loaded.most_confusing().equals(report.most_confusing())


def test_without_predictions_there_are_none(report):
    bare = Report.from_json(report.to_json())
    assert len(bare.most_confusing()) == 0
    assert ood_views.rocs(bare) == {}


def test_roc_curves_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(0, 1, 60).round(1), rng.normal(1, 1, 45).round(1)
    x, y, _ = roc_curve(np.repeat([0, 1], [60, 45]), np.concatenate([inside, outside]), drop_intermediate=False)
    points = np.array(ood_views.roc_points(torch.tensor(inside), torch.tensor(outside)))
    assert np.allclose(points, np.stack([x, y], 1))
    inside, outside = torch.randn(5000), torch.randn(4000) + 1
    few = np.array(ood_views.roc_points(inside, outside))
    assert len(few) <= 96
    assert few[0].tolist() == [0, 0]
    assert few[-1].tolist() == [1, 1]
    area = np.trapezoid(few[:, 1], few[:, 0])
    assert area == pytest.approx(float((outside[:, None] > inside).double().mean()), abs=2e-3)


def test_infinite_scores_are_thresholds_and_nan_ones_are_not():
    points = ood_views.roc_points(torch.tensor([0.0, math.nan]), torch.tensor([math.inf, -1.0]))
    assert points == ((0.0, 0.0), (0.0, 0.5), (1.0, 0.5), (1.0, 1.0))
    assert ood_views.roc_points(torch.tensor([math.nan]), torch.tensor([1.0])) == ()


def test_curves_are_ordered_by_their_area(report):
    (first, *_), *_ = ood_views.rocs(report).values()
    assert first.scorer == "s"
    assert first.points[0] == (0.0, 0.0)


def evaluated(**options):
    model = robustlab.wrap(Small(), task="multiclass", output="logits", num_classes=3)
    return robustlab.ood_report(
        model, source(count=40), ood={"far/x": source(count=30, seed=2)}, detectors=("msp", "energy"), progress=False,
        **options,
    )  # fmt: skip


def test_the_page_shows_curves_and_samples_but_pictures_only_when_asked(tmp_path):
    report = evaluated()
    assert report.gallery == ()
    page = report.to_html(tmp_path / "plain.html").read_text()
    assert "ROC curves on far/x" in page
    assert "Most confusing samples" in page
    assert "gallery=True" in page
    assert "<img" not in page
    name = confusing.most_confusing(report)[0].samples[0].name
    assert name in page
    pictured = evaluated(gallery=True)
    titles = {picture.condition for picture in pictured.gallery}
    best = confusing.best_scorers(report)["far/x"]
    assert f"far/x looks known to {best}" in titles
    assert any(title.endswith(f"looks foreign to {best}") for title in titles)
    page = pictured.to_html(tmp_path / "pictures.html").read_text()
    assert len(re.findall("<img", page)) == len(pictured.gallery) == 9  # a clean example, four of each kind


def test_pictures_are_of_the_samples_that_are_named():
    from robustlab.evaluate.gallery import encode_png

    report = evaluated(gallery=True)
    best = confusing.best_scorers(report)["far/x"]
    sample = next(item for item in confusing.of_the_best(report, 4) if item.data == "far/x").samples[0]
    store = report.predictions["ood:far/x"]
    assert sample.row == int(store.scores[best].argmin())
    picture = next(item for item in report.gallery if item.condition == f"far/x looks known to {best}")
    assert picture.png == encode_png(source(count=30, seed=2).pixels([sample.row])[0])
