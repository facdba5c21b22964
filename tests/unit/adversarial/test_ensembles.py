"""Ensembles: the right one for a model, the worst over their attacks for each sample, fresh draws for random models."""

import functools

import pytest
import torch
from torch import nn

from corruptions.adversarial import (
    APGD,
    PGD,
    AutoAttack,
    BinaryEnsemble,
    MultilabelEnsemble,
    RandomEnsemble,
    StandardEnsemble,
    TargetedAPGD,
    ThreeClassEnsemble,
    ensembles,
)
from robustlab.core.errors import ConfigError
from robustlab.core.model import wrap
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch
from robustlab.train import seeded_init

EPS = 0.06
NAMES = {
    "binary": ["apgd", "fab-t", "square"],
    "three": ["apgd", "apgd", "apgd-t", "fab-t", "square"],
    "standard": ["apgd", "apgd-t", "fab-t", "square"],
    "multilabel": ["apgd", "apgd-t", "square"],
}


@pytest.fixture
def short_square(monkeypatch):
    monkeypatch.setattr(ensembles, "Square", functools.partial(ensembles.Square, queries=200))


def wavy(classes):
    def build():
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.Tanh(), nn.Linear(32, classes))
        with torch.no_grad():
            net[1].weight.mul_(6)
            net[3].weight.mul_(4)
        return net.eval()

    return seeded_init(build, 5)


def problem(classes, count=48, task="multiclass"):
    net = wavy(classes)
    images = SampleRng.make(0, "images", torch.arange(count)).uniform("x", (1, 6, 6))
    logits = net(images).detach()
    labels = (logits > 0).long() if task == "multilabel" else logits.argmax(1)
    return wrap(net, task=task, output="logits", num_classes=classes), Batch(images, labels, torch.arange(count))


@pytest.mark.parametrize(
    ("kind", "classes", "task", "name"),
    [
        (BinaryEnsemble, 2, "binary", "binary"),
        (ThreeClassEnsemble, 3, "multiclass", "three"),
        (StandardEnsemble, 4, "multiclass", "standard"),
        (StandardEnsemble, 11, "multiclass", "standard"),
        (MultilabelEnsemble, 5, "multilabel", "multilabel"),
    ],
)
def test_each_number_of_classes_has_its_ensemble(kind, classes, task, name):
    attacks = kind().attacks(classes, task)
    assert [attack.name for attack in attacks] == NAMES[name]
    assert AutoAttack().attacks(classes, task) == attacks
    for other in (BinaryEnsemble, ThreeClassEnsemble, StandardEnsemble, MultilabelEnsemble):
        if other is not kind:
            with pytest.raises(ConfigError, match="auto-attack, which picks the right one"):
                other().attacks(classes, task)


def test_the_reference_takes_these_steps():
    ce, targeted, fab, square = StandardEnsemble().attacks(10, "multiclass")
    assert (ce.loss, ce.steps, ce.restarts, ce.rho) == ("ce", 100, 1, 0.75)
    assert (targeted.steps, targeted.restarts, targeted.targets) == (100, 1, 9)
    assert (fab.steps, fab.restarts, fab.targets, fab.refine) == (100, 1, 9, False)
    assert (square.queries, square.edges) == (5000, False)
    assert [attack.loss for attack in RandomEnsemble().attacks(10, "multiclass")] == ["ce", "dlr"]
    assert {attack.draws for attack in RandomEnsemble().attacks(10, "multiclass")} == {20}


@pytest.mark.parametrize(("classes", "task"), [(2, "binary"), (3, "multiclass"), (6, "multiclass"), (4, "multilabel")])
def test_a_sample_falls_to_the_ensemble_if_it_falls_to_one_attack(classes, task, short_square):
    model, batch = problem(classes, task=task)
    ensemble = AutoAttack(eps=(EPS,))
    ctx = ShiftContext(model=model)
    found = ensemble.run(batch, ctx, eps=EPS)
    assert 0 < found.success.double().mean() < 1
    assert (found.success == (found.margin < 0)).all()
    assert torch.equal(found.found_by > 0, found.success)
    single = [attack for attack in ensemble.attacks(classes, task) if attack.name != "square"]
    for attack in single:
        alone = attack.run(batch, ctx, eps=EPS, stop=True)
        # starts differ, so a sample at the edge may fall to one run only
        assert (alone.success & ~found.success).sum() <= 1
    by_first = single[0].run(batch, ctx, eps=EPS, stop=True)
    assert abs(int((found.found_by == 1).sum()) - int(by_first.success.sum())) <= 2
    assert found.queries[found.success].float().mean() < found.queries[~found.success].float().mean()


def test_samples_that_are_wrong_already_cost_one_look(short_square):
    model, batch = problem(4)
    labels = batch.labels.clone()
    labels[:5] = (labels[:5] + 1) % 4
    found = StandardEnsemble(eps=(EPS,)).run(Batch(batch.images, labels, batch.ids), ShiftContext(model=model), eps=EPS)
    assert found.queries[:5].tolist() == [1] * 5
    assert found.found_by[:5].tolist() == [0] * 5
    assert found.success[:5].all()


def test_stopping_early_changes_no_flag():
    model, batch = problem(5)
    for attack in (
        APGD(eps=(EPS,)),
        APGD(eps=(EPS,), loss="dlr", restarts=2),
        TargetedAPGD(eps=(EPS,)),
        PGD(eps=(EPS,)),
    ):
        whole = attack.run(batch, ShiftContext(model=model), eps=EPS)
        short = attack.run(batch, ShiftContext(model=model), eps=EPS, stop=True)
        assert torch.equal(whole.success, short.success)
        assert (whole.margin <= short.margin).all()
        assert short.queries.sum() < whole.queries.sum()


def test_random_models_are_judged_on_draws_that_the_search_has_not_seen():
    net = wavy(4)
    images = SampleRng.make(0, "images", torch.arange(40)).uniform("x", (1, 6, 6))

    def noisy(x):
        return net(x + 0.08 * torch.randn_like(x))

    model = wrap(noisy, output="logits", num_classes=4)
    batch = Batch(images, net(images).argmax(1), torch.arange(40))
    found = RandomEnsemble(eps=(0.03,)).run(batch, ShiftContext(model=model), eps=0.03)
    with torch.no_grad():
        share = torch.stack([noisy(found.images).argmax(1) != batch.labels for _ in range(200)]).double().mean(0)
    assert (found.probability - share).abs().mean() < 0.1
    assert torch.equal(found.success, found.probability > 0.5)
    again = RandomEnsemble(eps=(0.03,)).run(batch, ShiftContext(model=model), eps=0.03)
    assert torch.equal(again.images, found.images), "the model's randomness is seeded inside"
    one_draw = APGD(eps=(0.03,)).run(batch, ShiftContext(model=model), eps=0.03)
    with torch.no_grad():
        fresh = torch.stack([noisy(one_draw.images).argmax(1) != batch.labels for _ in range(50)]).double().mean(0)
    assert one_draw.success.double().mean() > fresh.mean() + 0.2, "the in-loop flag flatters the attack"
