"""Detectors on features, gradients and members in an evaluation: scored in the pass, kept, and sent to workers."""

import pytest
import torch

import robustlab
from defenses import DeepEnsemble
from defenses.detectors import KNN, MDS, ODIN, MutualInformation, ViM
from robustlab.core.errors import ConfigError
from robustlab.core.taps import TappedModel
from robustlab.evaluate.scoring import ScoringModel
from tests.contracts.toys import Small, source
from tests.unit.evaluate import engine_toys as toys
from tests.unit.evaluate.engine_toys import assert_same

DETECTORS = ("msp", "knn", "mds", "vim", "odin")


class Plain(Small):
    """A network whose logits its last layer gives."""

    calls = 0

    def forward(self, x):
        Plain.calls += 1
        bright = x[:, :, :6].mean((1, 2, 3), keepdim=True) - 0.5
        return self.head(torch.relu(self.conv(x - 0.5 + bright)).mean((2, 3)))


def wrapped(net=None):
    return toys.wrapped(net or Plain())


def evaluate(model=None, **options):
    return toys.evaluate(model or wrapped(), **options)


def train():
    return source(count=90, seed=4)


@pytest.fixture(scope="module")
def report():
    return evaluate(detectors=DETECTORS, fit=train(), shifts=("gamma",), severities=(3,))


def whole(data):
    return data.read(range(len(data)))


def test_features_are_not_carried_along():
    model = wrapped()
    detector = KNN().fit(model, train())
    outputs = ScoringModel(model, {"knn": detector}).predict(whole(source(count=20)))
    assert set(outputs.scores) == {"knn"}
    assert not outputs.features


def test_scores_are_those_of_the_features(report):
    model = wrapped()
    tapped = TappedModel(model)
    for name, detector in (("knn", KNN()), ("mds", MDS()), ("vim", ViM())):
        detector.fit(model, train())
        for key, data in (("clean", source(count=60)), ("ood:far/x", source(count=16, seed=2))):
            wanted = detector.score(tapped.predict(whole(data)))
            assert torch.allclose(report.predictions[key].scores[name].float(), wanted, rtol=1e-4, atol=1e-4), (
                name,
                key,
            )
        assert not torch.equal(report.predictions["gamma@3"].scores[name], report.predictions["clean"].scores[name])
    first = whole(source(count=60))
    wanted = ODIN().score_in_pass(model, first, model.predict(first))
    assert torch.allclose(report.predictions["clean"].scores["odin"], wanted, rtol=1e-6)
    assert list(report.predictions["clean"].scores) == list(DETECTORS)
    row = report.value("auroc-ood", scorer="knn", data="ID vs far/x")
    inside, outside = (report.predictions[key].scores["knn"] for key in ("clean", "ood:far/x"))
    assert row.value == pytest.approx(float((outside[:, None] > inside).double().mean()), abs=1e-3)


def test_the_second_score_refers_cases(report):
    assert report.manifest["frozen"]["detector"] == "knn"


def test_nothing_is_run_again(tmp_path):
    options = {"detectors": DETECTORS, "fit": train(), "shifts": ("gamma",), "severities": (3,), "cache": tmp_path}
    first = evaluate(wrapped(), **options)
    Plain.calls = 0
    second = evaluate(wrapped(), **options)
    fitting = -(-90 // 64) * 4 + 4  # three detectors and a head each at most; two probes
    assert Plain.calls <= fitting
    assert_same(first, second)
    other = evaluate(wrapped(), **options | {"fit": source(count=90, seed=9)})
    assert not torch.equal(other.predictions["clean"].scores["knn"], first.predictions["clean"].scores["knn"])
    assert torch.equal(other.predictions["clean"].logits, first.predictions["clean"].logits)


def test_workers_score_the_same(report):
    with robustlab.ProcessPool(1) as pool:
        there = evaluate(detectors=DETECTORS, fit=train(), shifts=("gamma",), severities=(3,), executor=pool)
    assert_same(there, report)


def test_training_data_or_a_fitted_detector_is_needed():
    with pytest.raises(ConfigError, match="fit=train"):
        evaluate(detectors=("msp", "knn"), shifts=())
    fitted = KNN().fit(wrapped(), train())
    made = evaluate(detectors=("msp", fitted), shifts=())
    again = evaluate(detectors=("msp", "knn"), shifts=(), fit=train())
    assert torch.equal(made.predictions["clean"].scores["knn"], again.predictions["clean"].scores["knn"])


def test_what_a_model_cannot_offer_is_nan_with_a_reason():
    ensemble = DeepEnsemble([wrapped(Small(seed=seed)) for seed in (0, 1)])
    with pytest.raises(ConfigError, match="made otherwise"):
        evaluate(wrapped(Small()), detectors=("msp", "vim"), shifts=(), fit=train())
    found = evaluate(ensemble, detectors=("msp", "knn", MutualInformation()), shifts=(), fit=train())
    row = found.value("auroc-ood", scorer="knn", data="ID vs far/x")
    assert "features of a network" in row.reason
    assert torch.isfinite(found.predictions["clean"].scores["mutual-information"]).all()
    plain = evaluate(detectors=("msp", MutualInformation()), shifts=())
    assert "members" in plain.value("auroc-ood", scorer="mutual-information", data="ID vs far/x").reason


def test_one_class_of_detector_with_two_settings():
    found = evaluate(detectors=(KNN(k=1), KNN(k=5)), shifts=(), fit=train())
    assert list(found.predictions["clean"].scores) == ["knn", "knn#2"]
    with pytest.raises(ConfigError, match="twice"):
        evaluate(detectors=(KNN(k=1), KNN(k=1)), shifts=(), fit=train())
