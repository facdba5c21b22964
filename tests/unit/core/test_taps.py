"""Features of networks: what the taps hear, and the last layer."""

import pytest
import torch
from torch import nn

import robustlab
from robustlab.core.errors import ConfigError, ModelError, UnknownNameError
from robustlab.core.taps import TappedModel
from robustlab.core.types import Batch


class Net(nn.Module):
    def __init__(self, outputs=3):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.side = nn.Linear(6, 4)
        self.head = nn.Linear(6, outputs)
        self.eval()

    def forward(self, x):
        h = torch.relu(self.conv(x)).mean((2, 3))
        self.side(h)
        return self.head(h)


def batch(count=5):
    images = torch.rand((count, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return Batch(images=images, labels=None, ids=torch.arange(count))


def wrapped(net=None, **options):
    return robustlab.wrap(net or Net(), **{"output": "logits"} | options)


def test_penultimate_and_modules_are_heard():
    net = Net()
    model = TappedModel(wrapped(net, mean=0.5, std=0.25), ("penultimate", "conv"))
    found = model.predict(batch())
    with torch.no_grad():
        maps = net.conv((batch().images - 0.5) / 0.25)
    assert torch.allclose(found.features["penultimate"], torch.relu(maps).mean((2, 3)), atol=1e-6)
    assert torch.allclose(found.features["conv"], maps.mean((2, 3)), atol=1e-6)
    assert torch.equal(found.logits, wrapped(net, mean=0.5, std=0.25).predict(batch()).logits)
    assert not [hook for module in net.modules() for hook in module._forward_hooks]


def test_the_last_layer_gives_the_logits():
    model = TappedModel(wrapped())
    head, found = model.head(batch()), model.predict(batch())
    assert torch.allclose(found.features["penultimate"] @ head.weight.T + head.bias, found.logits, atol=1e-6)
    single = TappedModel(wrapped(Net(1), task="binary"))
    head, found = single.head(batch()), single.predict(batch())
    assert head.weight.shape == (2, 6)
    assert torch.allclose(found.features["penultimate"] @ head.weight.T + head.bias, found.logits, atol=1e-6)


def test_no_last_layer_where_the_logits_are_made_otherwise():
    scaled = nn.Sequential(Net(), nn.Tanh()).eval()
    assert TappedModel(wrapped(scaled)).head(batch()) is None
    assert TappedModel(wrapped(nn.Sequential(Net(), nn.Softmax(1)).eval(), output="probs")).head(batch()) is None


def test_maps_and_tokens_are_averaged():
    class Tokens(nn.Module):
        def forward(self, x):
            return x.flatten(2).transpose(1, 2)

    net = nn.Sequential(Tokens(), nn.Flatten(), nn.Linear(64, 2)).eval()
    found = TappedModel(wrapped(net), ("0",)).predict(batch())
    assert torch.allclose(found.features["0"], batch().images.mean((2, 3)))


def test_what_has_no_features_says_so():
    with pytest.raises(UnknownNameError, match="penultimate, conv, side, head"):
        TappedModel(wrapped(), ("layer4",))
    with pytest.raises(ConfigError, match="function"):
        TappedModel(robustlab.wrap(lambda x: x.flatten(1)[:, :2], output="logits"))
    convolutional = nn.Sequential(nn.Conv2d(1, 2, 8), nn.Flatten()).eval()
    with pytest.raises(ModelError, match="Name a module"):
        TappedModel(wrapped(convolutional)).predict(batch())
    assert TappedModel(wrapped(convolutional), ("0",)).predict(batch()).features["0"].shape == (5, 2)


def test_hooks_go_away_after_an_error():
    class Failing(Net):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("planted")

    net = Failing()
    with pytest.raises(RuntimeError, match="planted"):
        TappedModel(wrapped(net)).predict(batch())
    assert not [hook for module in net.modules() for hook in module._forward_hooks]
