"""Attacks on random models: nobody is left out because one look at it was wrong on average."""

import pytest
import torch
from torch import nn

from corruptions.adversarial import APGD, PGD, Square
from corruptions.adversarial.ensembles import BinaryEnsemble
from robustlab.core.model import wrap
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch

COUNT = 40


class RarelyFar(nn.Module):
    """Right in four passes of five, and far off in the fifth: the mean margin is below 0, most answers are right."""

    def forward(self, x):
        lead = 8 * (x.mean((1, 2, 3)) - 0.5)
        far = 12.0 * (torch.rand(len(x)) < 0.2)
        return torch.stack([torch.zeros_like(lead), lead - far], 1)


def batch():
    images = torch.full((COUNT, 1, 4, 4), 0.6) + 0.01 * torch.arange(COUNT).view(-1, 1, 1, 1) / COUNT
    return Batch(images=images, labels=torch.ones(COUNT, dtype=torch.int64), ids=torch.arange(COUNT))


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize(
    "attack",
    [
        PGD(eps=(0.3,), steps=8, draws=20),
        APGD(eps=(0.3,), steps=8, loss="margin", draws=20, restarts=2),
        Square(eps=(0.3,), queries=70, draws=20),
    ],
    ids=lambda attack: attack.name,
)
def test_a_sample_that_is_mostly_right_is_attacked(attack, stop):
    model = wrap(RarelyFar().eval(), output="logits", num_classes=2)
    right = (model.predict(batch()).logits.argmax(1) == 1).double().mean()
    assert right > 0.6
    found = attack.run(batch(), ShiftContext(model=model), eps=0.3, stop=stop)
    assert (found.images != batch().images).flatten(1).any(1).double().mean() > 0.9
    # at the far end of the ball the lead is negative without any draw
    assert found.probability.mean() > 0.9
    assert found.success.double().mean() > 0.9


def test_an_ensemble_goes_on_with_all(monkeypatch):
    seen = []
    inner = PGD.search

    def search(self, oracle, rng, rows, start, *, stop):
        seen.append(len(rows))
        inner(self, oracle, rng, rows, start, stop=stop)

    monkeypatch.setattr(PGD, "search", search)

    class Two(BinaryEnsemble):
        def plan(self, num_classes, task):
            return (lambda **fields: PGD(steps=3, **fields),) * 2

    model = wrap(RarelyFar().eval(), output="logits", num_classes=2)
    Two(eps=(0.3,), draws=20).run(batch(), ShiftContext(model=model), eps=0.3, stop=True)
    assert seen == [COUNT, COUNT]
