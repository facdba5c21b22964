"""Detectors with the interface of pytorch-ood: whatever they do, touch or return, our rules hold."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import robustlab
from defenses.detectors import FromPytorchOOD, save_detector
from robustlab.core.errors import ConfigError, KindError, LabelError, ModelError, NotFittedError
from robustlab.core.model import wrap
from robustlab.core.taps import TappedModel
from robustlab.core.types import ModelOutputs
from robustlab.evaluate.scoring import detector_identity
from tests.contracts.toys import Small, source
from tests.unit.evaluate import engine_toys as toys


class RequiresFittingException(Exception):  # noqa: N818
    """As pytorch-ood's."""


class Sum:
    """As a LogitsDetector."""

    requires_fit = False

    def predict(self, x):
        raise AssertionError("logits are at hand")

    def predict_logits(self, logits):
        return -logits.logsumexp(1)


class Near:
    """As a FeaturesDetector: distance from the mean of fit data, in float64 on the CPU."""

    requires_fit = True

    def __init__(self, encoder=None):
        self.encoder = encoder
        self.mean = None
        self.classes = None

    def predict(self, x):
        raise AssertionError("features are at hand")

    def fit_features(self, z, y):
        assert torch.isfinite(z).all()
        assert (y >= 0).all()
        self.mean = z.double().mean(0)
        self.classes = y.unique()
        return self

    def predict_features(self, z):
        if self.mean is None:
            raise RequiresFittingException("You have to call fit() before predict()")
        return (torch.from_numpy(z.detach().numpy()).double() - self.mean).norm(dim=1)


class Slope:
    """As a GradientDetector that is careless: leaves gradients and training mode behind, and draws."""

    requires_fit = False

    def __init__(self, model):
        self.model = model

    def predict(self, x):
        assert not self.model.training
        x = x.requires_grad_(True)
        self.model(x).logsumexp(1).sum().backward()
        self.seen = x.detach()
        self.model.train()
        noise = torch.rand(1) + random.random() + float(np.random.rand())  # noqa: NPY002
        return -x.grad.flatten(1).norm(dim=1) + 0 * noise


class Means:
    """As a StructuredDetector: fitted and scored on images."""

    requires_fit = True

    def __init__(self, model):
        self.model = model
        self.mean = None

    def fit(self, loader):
        self.batches = [(len(x), y) for x, y in loader]
        self.mean = torch.cat([self.model(x) for x, _ in loader]).mean(0)
        return self

    def predict(self, x):
        if self.mean is None:
            raise RequiresFittingException
        return (self.model(x) - self.mean).norm(dim=1).detach()


def plain(net=None, **options):
    return wrap(net or Small(), num_classes=3, **options)


def whole(data):
    return data.read(range(len(data)))


def outputs(model, data):
    return TappedModel(model).predict(whole(data))


def test_features_of_the_one_forward_pass_are_scored():
    model, train, data = plain(), source(count=90, seed=4), source()
    near = Near(encoder=model.net)
    detector = FromPytorchOOD(near)
    assert (detector.name, detector.route, detector.taps) == ("pytorch-ood:near", "features", ("penultimate",))
    assert not detector.is_fitted
    assert detector.fit(model, train) is detector
    assert detector.is_fitted
    assert near.classes.tolist() == [0, 1, 2]
    seen = outputs(model, data)
    own = Near().fit_features(outputs(model, train).features["penultimate"], train.info.labels)
    wanted = own.predict_features(seen.features["penultimate"])
    assert torch.allclose(detector.score(seen), wanted, rtol=0, atol=1e-6)
    assert detector.score(seen).dtype == torch.float64
    report = toys.evaluate(model, detectors=("msp", detector), fit=train, shifts=(), ood=None)
    kept = report.predictions["clean"].scores["pytorch-ood:near"]
    assert torch.allclose(kept, detector.score(outputs(model, source(count=60))), atol=1e-5)


def test_refitting_forgets():
    model = plain()
    detector = FromPytorchOOD(Near())
    seen = outputs(model, source())
    first = detector.fit(model, source(count=90, seed=4)).score(seen)
    identity = detector_identity(detector)
    other = detector.fit(model, source(count=90, seed=5)).score(seen)
    assert not torch.equal(first, other)
    assert detector_identity(detector) != identity
    assert torch.equal(detector.fit(model, source(count=90, seed=4)).score(seen), first)
    assert detector_identity(detector) == identity


def test_a_detector_that_was_fitted_elsewhere_is_used_as_it_is():
    near = Near().fit_features(torch.rand(9, 6), torch.zeros(9))
    detector = FromPytorchOOD(near)
    assert detector.is_fitted
    report = toys.evaluate(plain(), detectors=("msp", detector), shifts=())
    assert not report.predictions["clean"].scores[detector.name].isnan().any()
    with pytest.raises(ConfigError, match="fit=train"):
        toys.evaluate(plain(), detectors=("msp", FromPytorchOOD(Near())), shifts=())
    with pytest.raises(NotFittedError, match="pytorch-ood:near"):
        FromPytorchOOD(Near()).score(
            ModelOutputs(logits=torch.zeros(2, 3), features={"penultimate": torch.zeros(2, 6)})
        )


def test_logits_are_scored_afterwards_and_need_their_offset():
    detector = FromPytorchOOD(Sum(), name="sum")
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(detector.score(ModelOutputs(logits=logits)), -logits.logsumexp(1))
    assert detector.learns is False
    assert detector.fit(plain(), source()) is detector
    assert "offset" in detector.skip_reason(wrap(nn.Softmax(1), output="probs", num_classes=3))
    report = toys.evaluate(plain(), detectors=("energy", detector), shifts=())
    scores = report.predictions["clean"].scores
    assert torch.allclose(scores["sum"].double(), scores["energy"].double(), atol=1e-5)


def test_rows_that_are_not_finite_are_nan_and_not_fitted_on():
    h = torch.rand(9, 4)
    h[2, 1], h[5] = torch.nan, torch.inf
    seen = ModelOutputs(logits=torch.zeros(9, 3), features={"penultimate": h})
    detector = FromPytorchOOD(Near()).fit_outputs(seen, torch.arange(9) % 3)
    score = detector.score(seen)
    assert score.isnan().nonzero().flatten().tolist() == [2, 5]
    with pytest.raises(ConfigError, match="finite features"):
        detector.fit_outputs(ModelOutputs(logits=torch.zeros(1, 3), features={"penultimate": h[5:6]}), torch.zeros(1))


def test_images_come_as_the_network_takes_them_and_nothing_is_left_behind():
    net = Small()
    model = plain(net, mean=(0.2, 0.3, 0.4), std=(0.5, 0.5, 0.5), size=10)
    slope = Slope(net)
    detector = FromPytorchOOD(slope)
    assert detector.route == "images"
    net.head.weight.grad = torch.ones_like(net.head.weight)
    flags = [module.training for module in net.modules()]
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    batch = whole(source())
    score = detector.score_in_pass(model, batch, model.predict(batch))
    assert torch.equal(slope.seen, model.prepare(batch.images))
    assert not score.requires_grad
    assert score.std() > 0
    assert [module.training for module in net.modules()] == flags
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    assert net.conv.weight.grad is None
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    with pytest.raises(ConfigError, match="images"):
        detector.score(model.predict(batch))


def test_a_grey_image_is_repeated_for_the_network():
    model = plain()
    data = robustlab.load_data(np.random.default_rng(0).integers(0, 255, (9, 12, 12), dtype=np.uint8))
    batch = whole(data)
    assert batch.images.shape[1] == 1
    assert FromPytorchOOD(Slope(model.net)).score_in_pass(model, batch, model.predict(batch)).shape == (9,)


def test_images_are_fitted_on_in_batches():
    model = plain(mean=0.5, std=0.5)
    means = Means(model.net)
    detector = FromPytorchOOD(means)
    assert not detector.is_fitted
    detector.fit(model, source(count=90))
    assert [count for count, _ in means.batches] == [64, 26]
    batch = whole(source())
    score = detector.score_in_pass(model, batch, model.predict(batch))
    assert torch.equal(score, (model.net(model.prepare(batch.images)) - means.mean).norm(dim=1).detach())


def test_what_cannot_work_is_refused_early(tmp_path):
    for odd in (3, Near, nn.Linear(2, 2)):
        with pytest.raises(KindError, match="detector of pytorch-ood"):
            FromPytorchOOD(odd)
    with pytest.raises(ConfigError, match="model="):
        FromPytorchOOD(Slope(None))
    model = plain()
    assert "another network" in FromPytorchOOD(Slope(Small())).skip_reason(model)
    assert "needs a network" in FromPytorchOOD(Slope(Small())).skip_reason(
        wrap(lambda x: x.mean((2, 3)), num_classes=3)
    )
    assert "one class" in FromPytorchOOD(Near()).skip_reason(wrap(Small(), task="multilabel", num_classes=3))
    assert FromPytorchOOD(Slope(model.net)).skip_reason(model) is None
    with pytest.raises(LabelError, match="one label"):
        FromPytorchOOD(Near()).fit_outputs(outputs(model, source()))
    with pytest.raises(KindError, match="pytorch-ood:near"):
        save_detector(FromPytorchOOD(Near()), tmp_path / "d.safetensors")
    assert not list(tmp_path.iterdir())


def test_errors_of_the_other_library_say_whose_they_are():
    near = Near()
    near.fit_features = lambda z, y: (_ for _ in ()).throw(AssertionError())
    with pytest.raises(ModelError, match=r"pytorch-ood:near: expected its own fit to succeed, got AssertionError"):
        FromPytorchOOD(near).fit(plain(), source())
    hungry = Sum()
    hungry.predict_logits = lambda z: (_ for _ in ()).throw(RuntimeError("CUDA out of memory"))
    from robustlab.evaluate.units import is_out_of_memory

    with pytest.raises(ModelError) as error:
        FromPytorchOOD(hungry).score(ModelOutputs(logits=torch.zeros(2, 3)))
    assert is_out_of_memory(error.value)
    odd = Sum()
    odd.predict_logits = lambda z: z
    with pytest.raises(ValueError, match="2 scores"):
        FromPytorchOOD(odd).score(ModelOutputs(logits=torch.zeros(2, 3)))


def test_a_saved_name_is_refused_by_name():
    from robustlab.core.spec import from_dict, to_dict

    with pytest.raises(ConfigError, match="pytorch-ood:near"):
        from_dict(to_dict(FromPytorchOOD(Near())))


def test_answers_are_kept_and_told_apart(tmp_path):
    model, train = plain(), source(count=90, seed=4)
    first, again, other = (
        toys.evaluate(model, detectors=("msp", FromPytorchOOD(Near())), fit=data, shifts=(), cache=tmp_path)
        for data in (train, train, source(count=90, seed=5))
    )
    scores = [item.predictions["clean"].scores["pytorch-ood:near"] for item in (first, again, other)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_an_attack_on_logits_has_a_gradient():
    logits = torch.zeros(2, 3, requires_grad=True)
    FromPytorchOOD(Sum()).score(ModelOutputs(logits=logits)).sum().backward()
    assert logits.grad.abs().sum() > 0


def test_workers_score_the_same():
    train = source(count=90, seed=4)
    detectors = ("msp", FromPytorchOOD(Near()))
    here = toys.evaluate(plain(), detectors=detectors, fit=train, shifts=())
    there = toys.evaluate(plain(), detectors=detectors, fit=train, shifts=(), executor=toys.Pickling())
    for key, store in here.predictions.items():
        assert torch.equal(store.scores["pytorch-ood:near"], there.predictions[key].scores["pytorch-ood:near"])
