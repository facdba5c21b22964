"""L2 budgets on stored images: the closed form of a linear model, the ball, and what lies outside it."""

import functools

import pytest
import torch
from torch import nn

from corruptions.adversarial import APGD, DDN, FAB, PGD
from robustlab.core.attack import project, round_inside, round_nearest, round_toward
from robustlab.core.model import wrap
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch, ImageSpec

SIZE = 96
SPEC = ImageSpec(channels=3, size=(SIZE, SIZE))


def grid(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(60, 200, (count, 3, SIZE, SIZE), generator=generator).float() / 255


def lengths(delta):
    return delta.double().flatten(1).norm(dim=1)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * SIZE * SIZE, generator=torch.Generator().manual_seed(1)))
        self.eval()

    def forward(self, x):
        z = (x - 0.5).flatten(1) @ self.weight
        return torch.stack([torch.zeros_like(z), z], 1)


def test_few_of_a_small_change_is_lost():
    """Every pixel of it lies near half a level: rounding toward the clean image would undo it."""
    clean = grid(4)
    eps = 0.3
    delta = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    moved = clean + eps * delta / lengths(delta).view(-1, 1, 1, 1).float()
    assert bool((lengths(round_toward(moved, clean, SPEC) - clean) < 0.5 * eps).all())
    stored = round_inside(moved, clean, SPEC, eps)
    assert bool((lengths(stored - clean) <= eps * (1 + 1e-6)).all())
    assert bool((lengths(stored - clean) >= 0.9 * eps).all())
    assert torch.equal(stored, round_nearest(stored, SPEC))


@pytest.mark.parametrize("attack", [PGD, functools.partial(APGD, loss="margin")], ids=["pgd", "apgd"])
def test_most_of_the_closed_form_is_reached(attack):
    net = Linear()
    model = wrap(net, output="logits", num_classes=2)
    images = grid(6)
    labels = (model.predict(Batch(images=images, labels=None, ids=torch.arange(6))).logits.argmax(1)).long()
    batch = Batch(images=images, labels=labels, ids=torch.arange(6))
    eps = 0.5
    made = attack(norm="l2", eps=(eps,), steps=20)
    for spec, least in ((None, 0.95), (SPEC, 0.6)):
        found = made.run(batch, ShiftContext(model=model, spec=spec), eps=eps)
        before = model.predict(batch).logits
        lead = (before[:, 1] - before[:, 0]) * (2 * labels - 1)
        fall = lead - found.margin
        best = eps * float(net.weight.norm())
        assert bool((fall >= least * best).all()), (spec, fall / best)
        assert bool((lengths(found.images - images) <= eps * (1 + 1e-6)).all())
        stored = made.on(batch, 5, ShiftContext(model=model, spec=SPEC)).images
        assert torch.equal(stored, round_nearest(stored, SPEC))
        assert bool((lengths(stored - images) <= eps + 1e-6).all())


def test_a_small_budget_changes_nothing_and_none_is_the_identity():
    clean = grid(2)
    delta = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    for eps in (0.0, 0.9 / 255):
        moved = clean + eps * delta / lengths(delta).view(-1, 1, 1, 1).float()
        assert torch.equal(round_inside(moved, clean, SPEC, eps), clean)


def test_what_lies_outside_keeps_its_own_length():
    clean = grid(2)
    delta = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3)) * 0.02
    stored = round_inside(clean + delta, clean, SPEC, 0.1)
    assert bool((lengths(stored - clean) > 0.95 * lengths(delta)).all())
    assert bool((lengths(stored - clean) <= lengths(delta) * (1 + 1e-6)).all())
    model = wrap(Linear(), output="logits", num_classes=2)
    labels = model.predict(Batch(images=clean, labels=None, ids=torch.arange(2))).logits.argmax(1)
    batch = Batch(images=clean, labels=labels, ids=torch.arange(2))
    found = DDN(steps=60).minimal(batch, ShiftContext(model=model, spec=SPEC))
    assert bool(torch.isfinite(found.distance).all())
    near = FAB(norm="l2", eps=(5.0,), steps=20).run(batch, ShiftContext(model=model, spec=SPEC), eps=5.0)
    assert bool(near.success.all())


def test_the_ball_holds_on_large_float_images():
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand((3, 3, 160, 160), generator=generator) * 0.2 + 0.4
    delta = torch.randn(clean.shape, generator=generator)
    for eps in (0.5, 3.0, 10.0):
        assert float((lengths(project(clean + delta, clean, eps, "l2") - clean) - eps).max()) <= 1e-6 * max(1.0, eps)
