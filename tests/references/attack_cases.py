"""The small double-precision problem on which attacks are compared with reference implementations."""

import torch
from torch import nn

from robustlab.core.model import Model
from robustlab.core.rng import SampleRng
from robustlab.core.types import Batch, ModelOutputs

COUNT, SIDE, CLASSES, STEPS = 16, 6, 5, 40
EPS = {"linf": 0.08, "l2": 0.35}
SEED = 20


def network(dtype=torch.float64):
    """Two layers with 1,009 parameters from integer hashes, so that no weights need to be kept."""
    pixels, hidden = SIDE * SIDE, 24
    net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES)).to(
        torch.float64
    )
    with torch.no_grad():
        for place, parameter in enumerate(net.parameters()):
            drawn = SampleRng.make(SEED, f"parameter {place}", torch.zeros(1, dtype=torch.int64)).normal(
                "w", tuple(parameter.shape)
            )
            parameter.copy_(drawn[0] * (0.25 if parameter.ndim == 2 and parameter.shape[1] == pixels else 0.6))
    return net.to(dtype).eval()


def images():
    return SampleRng.make(SEED, "images", torch.arange(COUNT)).uniform("x", (1, SIDE, SIDE)).to(torch.float64)


def labels():
    """The network's own answers, but for three samples that it gets wrong."""
    found = network()(images()).argmax(1)
    found[:3] = (found[:3] + 1) % CLASSES
    return found


def starts(norm):
    """Points on the sphere, then in the box."""
    drawn = SampleRng.make(SEED, "starts", torch.arange(COUNT)).normal(norm, (1, SIDE, SIDE)).to(torch.float64)
    length = drawn.flatten(1).abs().amax(1) if norm == "linf" else drawn.flatten(1).norm(dim=1)
    return (images() + EPS[norm] * drawn / length.view(-1, 1, 1, 1)).clamp(0, 1)


class Double(Model):
    """A network whose logits stay in the precision of its images."""

    def __init__(self, net, classes=CLASSES):
        self.net = net
        self.task = "multiclass"
        self.num_classes = classes

    def outputs(self, batch):
        return ModelOutputs(logits=self.net(batch.images), task="multiclass")

    def modules(self):
        return (self.net,)

    def settings(self):
        return {}


def batch():
    return Batch(images=images(), labels=labels(), ids=torch.arange(COUNT))
