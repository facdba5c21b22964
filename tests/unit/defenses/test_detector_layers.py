"""LayerMDS by composition of MDS, and where it helps: foreign inputs that only one depth can see."""

import pytest
import torch

from defenses.detectors import MDS, LayerMDS, load_detector, save_detector
from robustlab.core.errors import ConfigError, RangeError, UnknownNameError
from robustlab.core.model import wrap
from robustlab.core.rng import SampleRng
from robustlab.core.taps import TappedModel
from robustlab.core.types import ModelOutputs
from tests.contracts.toys import Small, source
from tests.unit.evaluate import engine_toys as toys

LAYERS = ("early", "middle", "late")
WIDTHS = {"early": 5, "middle": 9, "late": 3}


def outputs(count, seed, foreign=None, scale=1.0):
    rng = SampleRng.make(seed, "layers", torch.arange(count))
    labels = rng.integers("label", 2)
    features = {}
    for name, width in WIDTHS.items():
        values = rng.normal(name, (width,)) + labels[:, None]
        features[name] = scale * (values + (6.0 if name == foreign else 0.0) * torch.eye(width)[0])
    return ModelOutputs(logits=torch.zeros(count, 2), features=features), labels


def test_it_is_the_mean_of_standardised_distances():
    fit, labels = outputs(400, 1)
    data, _ = outputs(50, 2)
    wanted = torch.zeros(50, dtype=torch.float64)
    for name in LAYERS:
        part = MDS(tap=name).fit_outputs(fit, labels)
        known = part.score(fit).double()
        wanted += (part.score(data).double() - known.mean()) / known.std(correction=0)
    found = LayerMDS(LAYERS).fit_outputs(fit, labels).score(data)
    assert torch.allclose(found.double(), wanted / 3, rtol=1e-5, atol=1e-5)


def test_the_order_and_the_scale_of_layers_do_not_matter():
    fit, labels = outputs(400, 1)
    data, _ = outputs(50, 2)
    first = LayerMDS(LAYERS, shrinkage=0.0).fit_outputs(fit, labels).score(data)
    turned = LayerMDS(LAYERS[::-1], shrinkage=0.0).fit_outputs(fit, labels).score(data)
    assert torch.allclose(first, turned, atol=1e-5)
    fit.features["early"].mul_(1000)
    data.features["early"].mul_(1000)
    scaled = LayerMDS(LAYERS, shrinkage=0.0).fit_outputs(fit, labels).score(data)
    assert torch.allclose(first, scaled, atol=1e-3)


@pytest.mark.parametrize("foreign", LAYERS)
def test_what_one_depth_sees_is_found_without_knowing_which(foreign):
    fit, labels = outputs(400, 1)
    detector = LayerMDS(LAYERS).fit_outputs(fit, labels)
    inside, outside = (detector.score(outputs(200, seed, place)[0]) for seed, place in ((2, None), (3, foreign)))
    assert float((outside[:, None] > inside).double().mean()) > 0.97
    blind = next(name for name in LAYERS if name != foreign)
    alone = MDS(tap=blind).fit_outputs(fit, labels)
    inside, outside = (alone.score(outputs(200, seed, place)[0]) for seed, place in ((2, None), (3, foreign)))
    assert abs(float((outside[:, None] > inside).double().mean()) - 0.5) < 0.1


def test_a_constant_layer_and_broken_rows():
    fit, labels = outputs(400, 1)
    data, _ = outputs(20, 2)
    for seen in (fit, data):
        seen.features["dead"] = torch.ones(len(seen), 4)
    data.features["early"][3, 1] = torch.inf
    score = LayerMDS(("early", "dead")).fit_outputs(fit, labels).score(data)
    assert score.isnan().nonzero().flatten().tolist() == [3]
    alone = LayerMDS(("early",)).fit_outputs(fit, labels).score(data)
    assert torch.allclose(score * 2, alone, atol=1e-5, equal_nan=True)


def test_layers_of_a_network_in_an_evaluation_and_in_a_file(tmp_path):
    model, train = wrap(Small(), num_classes=3), source(count=90, seed=4)
    detector = LayerMDS(("conv", "penultimate"))
    report = toys.evaluate(model, detectors=("msp", detector), fit=train, shifts=())
    batch = source(count=60).read(range(60))
    seen = TappedModel(model, ("conv", "penultimate")).predict(batch)
    assert seen.features["conv"].shape == (60, 6)
    wanted = detector.score(seen)
    assert torch.allclose(report.predictions["clean"].scores["mds-layers"].float(), wanted, atol=1e-3)
    loaded = load_detector(save_detector(detector, tmp_path / "d.safetensors"))
    assert loaded == detector
    assert torch.equal(loaded.score(seen), wanted)
    with pytest.raises(UnknownNameError, match="layer9"):
        LayerMDS(("layer9",)).fit(model, train)


def test_settings_that_make_no_sense():
    for layers in ((), ("a", "a")):
        with pytest.raises(ConfigError, match="different layers"):
            LayerMDS(layers)
    with pytest.raises(RangeError, match="shrinkage"):
        LayerMDS(shrinkage=2.0)
    assert LayerMDS(["a", "b"]).layers == ("a", "b")
