"""Attacks on detectors: the closed form of a linear model, both directions, no look at labels."""

import math

import pytest
import torch
from torch import nn

from corruptions.adversarial import DetectorAttack
from defenses.detectors.logits import MSP, Energy
from robustlab.core.errors import ConfigError, KindError, UnknownNameError
from robustlab.core.model import wrap
from robustlab.core.registry import ATTACKS
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch, ImageSpec

COUNT = 24
EPS = {"linf": 0.02, "l2": 0.1}


class Linear(nn.Module):
    def __init__(self, classes=2, scale=1.0):
        super().__init__()
        weight = torch.randn(classes, 36, generator=torch.Generator().manual_seed(3))
        self.layer = nn.Linear(36, classes)
        with torch.no_grad():
            self.layer.weight.copy_(scale * weight)
            self.layer.bias.copy_(-scale * weight.sum(1) / 2)
        self.eval()

    def forward(self, x):
        return self.layer(x.flatten(1))


def batch(labels=None):
    images = torch.rand((COUNT, 1, 6, 6), generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    return Batch(images=images, labels=labels, ids=torch.arange(COUNT) + 7)


def context(net=None, **fields):
    return ShiftContext(model=wrap(net or Linear(), task="multiclass", output="logits"), **fields)


def score(net, images, detector):
    model = wrap(net, task="multiclass", output="logits")
    return detector.score(model.predict(batch().replace(images)))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("goal", ["hide", "alarm"])
def test_confidence_of_a_linear_model_moves_by_the_dual_norm(goal, norm):
    """MSP of two classes is -|d| for d the difference of the logits, and d moves by at most eps times a norm."""
    net, eps = Linear(), EPS[norm]
    slope = (net.layer.weight[1] - net.layer.weight[0]).detach()
    reach = eps * float(slope.abs().sum() if norm == "linf" else slope.norm())
    before = -score(net, batch().images, MSP())
    found = DetectorAttack(goal=goal, norm=norm, eps=(eps,), steps=60).run(batch(), context(net), eps=eps)
    after = -score(net, found.images, MSP())
    best = before + reach if goal == "hide" else (before - reach).clamp_min(0)
    assert torch.allclose(after, best, atol=0.02 * reach)
    sign = 1 if goal == "hide" else -1
    assert torch.allclose(found.margin, sign * (before - after), atol=1e-5)
    assert bool(found.success.all())


@pytest.mark.parametrize("goal", ["hide", "alarm"])
@pytest.mark.parametrize("detector", ["msp", "energy", Energy(temperature=2.0)], ids=["msp", "energy", "energy T=2"])
def test_the_named_score_moves_and_the_ball_holds(goal, detector):
    net = Linear(classes=4)
    attack = DetectorAttack(goal=goal, detector=detector, eps=(0.02,), steps=20)
    found = attack.run(batch(), context(net), eps=0.02)
    before, after = (score(net, images, attack.resolved()) for images in (batch().images, found.images))
    assert bool((after < before).all() if goal == "hide" else (after > before).all())
    assert float((found.images - batch().images).abs().max()) <= 0.02 + 1e-6
    assert attack.label == f"{goal}-{'energy' if detector != 'msp' else 'msp'}-linf"


def test_labels_are_not_looked_at():
    attack = DetectorAttack(eps=(0.02,), steps=10)
    plain = attack.run(batch(), context(), eps=0.02).images
    absurd = torch.full((COUNT,), 99)
    assert torch.equal(attack.run(batch(absurd), context(), eps=0.02).images, plain)
    assert torch.equal(attack.on(batch(), 5, context()).images, plain)


def test_what_is_stored_is_what_was_searched():
    spec = ImageSpec(channels=1, size=(6, 6))
    clean = batch().replace((batch().images * 255).round() / 255)
    attack = DetectorAttack(eps=(4 / 255,), steps=10)
    ctx = context(spec=spec)
    stored = attack.on(clean, 5, ctx).images
    assert torch.equal(stored, attack.run(clean, ctx, eps=4 / 255).images)
    assert torch.equal(stored, ((stored.double() * 255).round() / 255).float())
    assert torch.equal(attack.run(clean, ctx, eps=0.0).images, clean.images)


def test_a_mask_is_kept_and_parts_of_a_batch_give_the_same():
    attack = DetectorAttack(eps=(0.02,), steps=10, mask=(0.5, 1.0))
    found = attack.run(batch(), context(), eps=0.02)
    changed = (found.images - batch().images).abs() > 0
    assert not bool((changed & (batch().images < 0.5)).any())
    assert bool(changed.any())
    rows = torch.arange(0, COUNT, 3)
    part = attack.run(batch().select(rows), context(), eps=0.02)
    assert torch.allclose(part.images, found.images[rows], atol=1e-6)


def test_outputs_that_are_not_finite_are_no_success():
    class Broken(Linear):
        def forward(self, x):
            out = super().forward(x).clone()
            out[::2] = math.nan
            return out

    found = DetectorAttack(eps=(0.02,), steps=5).run(batch(), context(Broken()), eps=0.02)
    even = torch.arange(COUNT) % 2 == 0
    assert not bool(found.success[even].any())
    assert bool(torch.isnan(found.margin[even]).all())
    assert torch.equal(found.images[even], batch().images[even])
    assert bool(found.success[~even].all())


def test_random_models_are_judged_on_fresh_draws():
    class Noisy(Linear):
        def forward(self, x):
            return super().forward(x + 0.01 * torch.randn_like(x))

    found = DetectorAttack(eps=(0.02,), steps=10, draws=4).run(batch(), context(Noisy()), eps=0.02)
    assert found.probability is not None
    assert float(found.probability.mean()) > 0.95


def test_restarts_search_from_other_points_and_keep_the_best():
    net = Linear(classes=5, scale=3.0)
    one, many = (
        DetectorAttack(eps=(0.05,), steps=2, restarts=restarts).run(batch(), context(net), eps=0.05).margin
        for restarts in (1, 6)
    )
    assert bool((many <= one + 1e-6).all())
    assert bool((many < one - 1e-4).any())


def test_several_labels():
    model = wrap(Linear(classes=3), task="multilabel", output="logits")
    found = DetectorAttack(detector="energy", eps=(0.02,), steps=20).run(batch(), ShiftContext(model=model), eps=0.02)
    before, after = (Energy().score(model.predict(batch().replace(x))) for x in (batch().images, found.images))
    assert bool((after < before).all())


def test_what_makes_no_sense_is_refused():
    assert ATTACKS.get("detector-attack") is DetectorAttack
    with pytest.raises(ConfigError, match="goal 'hide' or 'alarm'"):
        DetectorAttack(goal="answer")
    with pytest.raises(KindError, match="detector as a name"):
        DetectorAttack(detector=MSP)
    with pytest.raises(UnknownNameError):
        DetectorAttack(detector="mps")
    probabilities = wrap(nn.Sequential(Linear(), nn.Softmax(1)).eval(), task="multiclass", output="probs")
    with pytest.raises(ConfigError, match="offset"):
        DetectorAttack(detector="energy").run(batch(), ShiftContext(model=probabilities), eps=0.02)
