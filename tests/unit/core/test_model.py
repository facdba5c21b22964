"""wrap(): declared preprocessing, every output form, flags restored, capabilities measured."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustlab import wrap
from robustlab.core.errors import ConfigError, KindError, ModelError, RangeError, RobustlabWarning, ShapeError
from robustlab.core.model import probe
from robustlab.core.types import Batch


def images(count=6, channels=3, size=8):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def linear(outputs, channels=3, size=8):
    net = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, outputs))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return net.eval()


NET = linear(3)
LOGITS = NET(images()).detach()


@pytest.mark.parametrize(
    ("output", "call"),
    [
        ("logits", NET),
        ("logits", lambda x: (NET(x), "aux")),
        ("logits", lambda x: {"logits": NET(x), "loss": None}),
        ("logits", lambda x: SimpleNamespace(logits=NET(x))),
        ("log_probs", lambda x: F.log_softmax(NET(x), 1)),
        ("probs", lambda x: F.softmax(NET(x), 1)),
        ("logits", lambda x: NET(x).half()),
    ],
)
def test_output_forms_give_the_same_probabilities(output, call):
    model = wrap(call, output=output)
    tolerance = 2e-3 if call(images()).__class__ is torch.Tensor and call(images()).dtype == torch.float16 else 1e-6
    assert torch.allclose(model(images()).logits.softmax(1), LOGITS.softmax(1), atol=tolerance)
    assert model.has_offset == (output == "logits")


def test_one_sigmoid_logit_becomes_two():
    net = linear(1)
    z = net(images()).detach()
    for model in (
        wrap(net, task="binary", output="logits"),
        wrap(lambda x: net(x)[:, 0], task="binary", output="logits"),
        wrap(lambda x: torch.sigmoid(net(x)), task="binary", output="probs"),
    ):
        probability = model(images()).logits.double().softmax(1)[:, 1]
        assert torch.allclose(probability, torch.sigmoid(z[:, 0]).double(), atol=1e-6)
        assert model.num_classes == 2


def test_undeclared_probabilities_are_refused():
    with pytest.raises(ModelError, match="output='probs'"):
        wrap(lambda x: F.softmax(NET(x), 1))(images())
    with pytest.raises(ModelError, match="look like probabilities"):
        wrap(lambda x: torch.sigmoid(NET(x)), task="multilabel")(images())
    with pytest.raises(ModelError, match="output='logits'"):
        wrap(NET, output="probs")(images())


def test_preprocessing_order_is_channels_size_bounds_mean_std():
    seen = []

    def net(x):
        seen.append(x)
        return x.flatten(1)[:, :2]

    model = wrap(net, mean=(0.5,), std=(0.25,), size=16, channels=3, bounds=(0, 255), output="logits")
    grey = images(4, 1)
    model(grey)
    expected = F.interpolate(grey.expand(-1, 3, -1, -1), size=(16, 16), mode="bilinear", antialias=True)
    assert torch.allclose(seen[-1], (expected * 255 - 0.5) / 0.25)
    wrap(net, size=3, channels=3, output="logits")(rgb := images(4, 3))
    shrunk = F.interpolate(rgb, size=(3, 3), mode="bilinear", antialias=True)
    assert torch.allclose(seen[-1], shrunk), "shrinking averages, it does not pick pixels"
    luma = wrap(net, channels=1, output="logits")
    luma(images(4, 3))
    rgb = images(4, 3)
    assert torch.allclose(seen[-1][:, 0], 0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2], atol=1e-6)


def test_timm_facts_are_read():
    import timm

    model = wrap(timm.create_model("vit_tiny_patch16_224", num_classes=2).eval())
    assert model.settings()["size"] == (224, 224)
    assert model.settings()["mean"] == (0.5, 0.5, 0.5)
    assert model(images(2, 1, 28)).logits.shape == (2, 2)
    grey = wrap(timm.create_model("resnet18", num_classes=2, in_chans=1))
    assert grey.settings()["channels"] == 1
    assert grey.settings()["mean"] == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))


def test_training_flags_are_restored_one_by_one():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(2))
    net(images())
    net.train()
    net[1].eval()
    flags = [module.training for module in net.modules()]
    statistics = net[1].running_mean.clone()
    model = wrap(net, output="logits")
    with pytest.warns(RobustlabWarning, match="training mode"):
        first = model(images()).logits
    assert torch.equal(first, model(images()).logits)
    assert [module.training for module in net.modules()] == flags
    assert torch.equal(statistics, net[1].running_mean)


def batch():
    return Batch(images=images(8), labels=None, ids=torch.arange(8))


def test_capabilities_are_measured():
    assert all(vars(probe(wrap(NET, output="logits"), batch())).values())
    coupled = probe(wrap(lambda x: NET(x) - NET(x).mean(0), output="logits"), batch())
    assert not coupled.batch_independent
    noisy = probe(wrap(lambda x: NET(x) + torch.randn(len(x), 3), output="logits"), batch())
    assert not noisy.deterministic
    blocked = probe(wrap(lambda x: NET(x.detach()), output="logits"), batch())
    assert not blocked.supports_grad


@pytest.mark.parametrize(
    ("net", "options", "error", "text"),
    [
        (lambda x: NET(x)[:-1], {"output": "logits"}, ModelError, "one row an image"),
        (lambda x: "text", {}, ModelError, "object with .logits"),
        (NET, {"num_classes": 5, "output": "logits"}, ModelError, "5 classes"),
        (NET, {"mean": (0.1, 0.2), "std": (1.0, 1.0), "output": "logits"}, ShapeError, "1 or 3 values"),
        (NET, {"channels": 4, "output": "logits"}, ShapeError, "4 or 1 channels"),
    ],
)
def test_models_that_do_not_fit(net, options, error, text):
    with pytest.raises(error, match=text):
        wrap(net, **options)(images())


def test_arguments_that_make_no_sense():
    with pytest.raises(KindError, match="callable"):
        wrap("resnet18")
    with pytest.raises(ConfigError, match="task among"):
        wrap(NET, task="classification")
    with pytest.raises(RangeError, match="positive std"):
        wrap(NET, std=0.0)
    with pytest.raises(RangeError, match="low < high"):
        wrap(NET, bounds=(1, 0))


def test_fingerprint_sees_weights_and_settings():
    one, two = linear(3), linear(3)
    assert wrap(one).fingerprint() == wrap(two).fingerprint()
    assert wrap(one).fingerprint() != wrap(one, mean=0.5).fingerprint()
    with torch.no_grad():
        two[1].bias[0] += 1e-3
    assert wrap(one).fingerprint() != wrap(two).fingerprint()
