"""PGD against optima that are known: linear models in closed form, a small network by brute force."""

import pytest
import torch
from torch import nn

from corruptions.adversarial import PGD
from corruptions.adversarial.losses import margin
from robustlab.core.model import wrap
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch
from robustlab.train import seeded_init

COUNT, PIXELS = 32, 36


def linear(classes, scale=1.0):
    """A linear network on 6 x 6 pixels with known weights, and its weight matrix."""
    layer = nn.Linear(PIXELS, classes)
    weight = SampleRng.make(7, "weight", torch.arange(classes)).normal("w", (PIXELS,)) * scale
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(-0.5 * weight.sum(1))
    return nn.Sequential(nn.Flatten(), layer).eval(), weight


def inner_batch(labels):
    """Images far from 0 and 1, so that the box does not bind."""
    images = 0.4 + 0.2 * SampleRng.make(0, "images", torch.arange(COUNT)).uniform("x", (1, 6, 6))
    return Batch(images=images, labels=labels, ids=torch.arange(COUNT))


@pytest.mark.parametrize(("norm", "eps", "dual"), [("linf", 0.02, 1), ("l2", 0.1, 2)])
@pytest.mark.parametrize("scale", [1.0, 1000.0], ids=["plain", "saturated"])
def test_two_classes_reach_margin_minus_eps_times_the_dual_norm(norm, eps, dual, scale):
    net, weight = linear(2, scale)
    model = wrap(net, num_classes=2)
    batch = inner_batch(torch.zeros(COUNT, dtype=torch.int64))
    right = model.predict(batch).logits.argmax(1)
    batch = Batch(images=batch.images, labels=right, ids=batch.ids)
    before = margin(model.predict(batch).logits, right, "binary")
    gain = eps * (weight[0] - weight[1]).norm(p=dual)
    best = before - gain
    # in the L2 ball what the start has across the gradient fades by 1 / (1 + alpha / eps) a step
    longer = PGD(norm=norm, eps=(eps,), step_size=10.0).run(batch, ShiftContext(model=model), eps=eps)
    assert torch.allclose(longer.margin, best, rtol=1e-3, atol=1e-3 * scale)
    assert torch.equal(longer.success, best < 0)
    usual = PGD(norm=norm, eps=(eps,)).run(batch, ShiftContext(model=model), eps=eps)
    assert (usual.margin >= best - 1e-4 * scale).all()
    assert ((usual.margin - best) / gain).max() < 0.05


@pytest.mark.parametrize(("norm", "eps", "dual"), [("linf", 0.008, 1), ("l2", 0.03, 2)])
def test_multilabel_flips_whenever_one_label_can_be_flipped(norm, eps, dual):
    net, weight = linear(5)
    model = wrap(net, task="multilabel", output="logits", num_classes=5)
    batch = inner_batch(None)
    logits = model.predict(batch).logits
    labels = (logits > 0).long()
    labels[::2, 1] = -1
    known = labels >= 0
    signed = torch.where(known, logits * (2 * labels - 1), torch.inf)
    best = (signed - eps * weight.norm(p=dual, dim=1)).amin(1)
    batch = Batch(images=batch.images, labels=labels, ids=batch.ids)
    result = PGD(norm=norm, eps=(eps,), step_size=5.0, restarts=4).run(batch, ShiftContext(model=model), eps=eps)
    assert (result.margin >= best - 1e-4).all(), "below the optimum there is nothing"
    gain = eps * weight.norm(p=dual, dim=1).amax()
    # the label that is closest at first need not be the one that can be moved furthest: a local optimum
    assert ((result.margin - best) < 0.05 * gain).double().mean() > 0.8
    clear = best.abs() > 0.1 * gain
    assert torch.equal(result.success[clear], (best < 0)[clear])
    assert 0 < result.success.sum() < COUNT


def test_a_small_network_is_fooled_to_the_brute_force_optimum():
    net = seeded_init(lambda: nn.Sequential(nn.Flatten(), nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3)), 1).eval()
    with torch.no_grad():
        net[1].weight.mul_(6)
        net[3].weight.mul_(4)
    model = wrap(net, num_classes=3)
    eps = 0.15
    images = SampleRng.make(2, "images", torch.arange(24)).uniform("x", (1, 1, 2))
    labels = net(images).argmax(1)
    batch = Batch(images=images, labels=labels, ids=torch.arange(24))
    grid = torch.linspace(-eps, eps, 121)
    offsets = torch.cartesian_prod(grid, grid)
    points = (images.view(24, 1, 2) + offsets).clamp(0, 1)
    with torch.no_grad():
        logits = net(points.reshape(-1, 1, 1, 2))
    best = margin(logits, labels.repeat_interleave(len(offsets)), "multiclass").view(24, -1).amin(1)
    result = PGD(eps=(eps,), steps=60, restarts=5).run(batch, ShiftContext(model=model), eps=eps)
    spread = net(images).std().item()
    assert (result.margin - best).median() < 0.01 * spread
    assert torch.equal(result.success, best < 0)
    assert 0 < result.success.sum() < 24
