"""PGD: moves, starts, losses and bookkeeping."""

import dataclasses

import pytest
import torch
from torch import nn

from corruptions.adversarial import PGD
from corruptions.adversarial.losses import attack_loss, margin
from corruptions.adversarial.pgd import random_start
from robustlab.core.errors import ConfigError, RangeError, ShapeError
from robustlab.core.model import wrap
from robustlab.core.registry import ATTACKS
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext
from robustlab.core.spec import from_dict, to_dict
from robustlab.core.types import Batch
from robustlab.train import seeded_init


class Counted(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return self.net(images)


def wavy():
    """A network whose loss surface is not linear."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.Tanh(), nn.Linear(32, 4))
    with torch.no_grad():
        net[1].weight.mul_(8)
        net[3].weight.mul_(4)
    return net.eval()


@pytest.fixture(scope="module")
def net():
    return seeded_init(wavy, 5)


@pytest.fixture(scope="module")
def batch(net):
    images = SampleRng.make(0, "images", torch.arange(64)).uniform("x", (1, 6, 6))
    return Batch(images=images, labels=net(images).argmax(1), ids=torch.arange(64))


def test_registered_and_round_trips_through_json():
    assert ATTACKS.get("pgd") is PGD
    attack = PGD(norm="l2", eps=(0.5, 1), steps=7)
    assert from_dict(to_dict(attack)) == attack
    assert attack.label == "pgd-l2"
    assert attack.parameters(5)["eps"][0] == 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.steps = 3


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"eps": (0.1, 0.1)}, RangeError, "increasing positive budgets"),
        ({"eps": ()}, RangeError, "increasing positive budgets"),
        ({"eps": (8,)}, RangeError, "Divide grey levels"),
        ({"norm": "l1"}, ConfigError, "norm 'linf' or 'l2'"),
        ({"steps": 0}, RangeError, "steps of at least 1"),
        ({"restarts": 0}, RangeError, "restarts of at least 1"),
        ({"step_size": 0.0}, RangeError, "positive step_size"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        PGD(**arguments)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.3)])
def test_beats_a_single_step_and_restarts_help(net, batch, norm, eps):
    model = wrap(net, num_classes=4)
    ctx = ShiftContext(model=model)
    single = PGD(norm=norm, eps=(eps,), steps=1, step_size=1.0).run(batch, ctx, eps=eps, start=batch.images)
    many = PGD(norm=norm, eps=(eps,)).run(batch, ctx, eps=eps)
    more = PGD(norm=norm, eps=(eps,), restarts=3).run(batch, ctx, eps=eps)
    assert many.margin.mean() < single.margin.mean() - 0.01
    assert many.success.sum() > single.success.sum()
    assert (more.margin <= many.margin).all()
    assert (more.margin < many.margin).any()


def test_one_step_from_a_given_start_is_the_signed_gradient(net, batch):
    x = batch.images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net(x), batch.labels, reduction="sum"), x)
    expected = (batch.images + 0.01 * gradient.sign()).clamp(0, 1)
    attack = PGD(eps=(0.01,), steps=1, step_size=1.0)
    result = attack.run(batch, ShiftContext(model=wrap(net, num_classes=4)), eps=0.01, start=batch.images)
    moved = (result.images != batch.images).flatten(1).any(1)
    assert moved.double().mean() > 0.9
    assert torch.allclose(result.images[moved], expected[moved], atol=1e-7)


def test_keeps_the_best_iterate_not_the_last(batch):
    """A step that is far too long throws later iterates away from the optimum."""
    net = seeded_init(wavy, 8)
    model = wrap(net, num_classes=4)
    labels = net(batch.images).argmax(1)
    own = Batch(images=batch.images, labels=labels, ids=batch.ids)
    seen = []
    plain = model.outputs

    def spy(part):
        outputs = plain(part)
        seen.append(margin(outputs.logits.detach(), labels, "multiclass"))
        return outputs

    model.outputs = spy
    result = PGD(eps=(0.05,), steps=8, step_size=16.0).run(own, ShiftContext(model=model), eps=0.05)
    assert torch.allclose(result.margin, torch.stack(seen).amin(0))
    assert (torch.stack(seen).amin(0) < seen[-1] - 1e-6).any()


def test_forward_passes_are_counted(net, batch):
    counted = Counted(net).eval()
    attack = PGD(eps=(0.05,), steps=3, restarts=2)
    result = attack.run(batch, ShiftContext(model=wrap(counted, num_classes=4)), eps=0.05)
    assert result.queries.tolist() == [counted.calls] * len(batch)


def test_start_of_another_shape_and_negative_eps_are_refused(net, batch):
    ctx = ShiftContext(model=wrap(net, num_classes=4))
    with pytest.raises(ShapeError, match="start of shape"):
        PGD().run(batch, ctx, eps=0.1, start=batch.images[:3])
    with pytest.raises(RangeError, match="eps of 0 or more"):
        PGD().run(batch, ctx, eps=-0.1)


def test_starts_fill_the_balls_evenly():
    clean = torch.full((4000, 1, 2, 2), 0.5)
    rng = SampleRng.make(0, "starts", torch.arange(4000))
    cube = (random_start(rng, clean, 0.1, "linf") - clean) / 0.1
    assert cube.abs().max() <= 1 + 1e-5
    assert abs(cube.mean().item()) < 0.02
    assert abs(cube.var().item() - 1 / 3) < 0.01
    ball = (random_start(rng, clean, 0.1, "l2") - clean).flatten(1) / 0.1
    radius = ball.norm(dim=1)
    assert radius.max() <= 1 + 1e-5
    # for a uniform point in a 4-ball the fourth power of the radius is uniform
    assert abs(radius.pow(4).mean().item() - 0.5) < 0.02
    assert ball.mean(0).abs().max() < 0.03


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_overconfident_models_are_fooled_as_often(net, batch, scale):
    def rate(factor):
        model = wrap(lambda images: net(images) * factor, num_classes=4)
        return PGD(eps=(0.04,)).run(batch, ShiftContext(model=model), eps=0.04).success.double().mean().item()

    plain = rate(1.0)
    assert 0.2 < plain < 0.95
    assert rate(scale) >= plain - 0.05


def test_margin_is_the_smallest_distance_to_a_wrong_answer():
    logits = torch.tensor([[2.0, 0.5, 1.0], [0.0, 3.0, 1.0], [float("nan"), 0.0, 1.0]])
    value = margin(logits, torch.tensor([0, 2, 1]), "multiclass")
    assert value[:2].tolist() == [1.0, -2.0]
    assert torch.isnan(value[2])
    several = margin(
        torch.tensor([[2.0, -3.0, 1.0], [2.0, -3.0, 1.0]]), torch.tensor([[1, 0, -1], [1, 1, 0]]), "multilabel"
    )
    assert several.tolist() == [2.0, -3.0]
    nothing = margin(torch.zeros(1, 2), torch.full((1, 2), -1), "multilabel")
    assert nothing.item() == float("inf")


def test_loss_is_cross_entropy_and_keeps_a_gradient_when_saturated():
    logits = torch.tensor([[1.0, 0.2, -0.5], [90.0, -40.0, -60.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    loss = attack_loss(logits, labels, "multiclass")
    assert torch.equal(loss[0], nn.functional.cross_entropy(logits[:1], labels[:1]))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient[1].abs().max() > 1e-4
    assert gradient[1, 0] < 0 < gradient[1, 1]
