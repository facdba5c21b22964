"""BPDA: true values, substitute gradients, and attacks that get through parts without a gradient."""

import copy

import pytest
import torch
from torch import nn

from corruptions.adversarial import APGD, BPDA, PGD, with_substitutes
from robustlab.core.errors import ConfigError, KindError, ModelError, RobustlabWarning, ShapeError
from robustlab.core.identity import model_identity
from robustlab.core.model import probe, wrap
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch
from robustlab.train import seeded_init


class Quantise(nn.Module):
    """Sixteen grey levels: the gradient is 0 wherever there is one."""

    def forward(self, images):
        return (images * 15).round() / 15


class Outside(nn.Module):
    """Leaves torch, as calls of a codec do."""

    def forward(self, images):
        return torch.from_numpy(images.numpy() * 0.9 + 0.01)


class Double(nn.Module):
    def forward(self, images):
        return 2 * images


class Defended(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.body = nn.Sequential()
        self.body.front = nn.Sequential(*parts)
        self.body.head = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.Tanh(), nn.Dropout(0.3), nn.Linear(24, 3))

    def forward(self, images):
        return self.body(images)


def defended(*parts):
    net = seeded_init(lambda: Defended(*parts), 3).eval()
    with torch.no_grad():
        net.body.head[1].weight.mul_(3)
        net.body.head[4].weight.mul_(3)
    return net


def batch_for(net, count=64):
    images = 0.2 + 0.6 * SampleRng.make(0, "images", torch.arange(count)).uniform("x", (1, 6, 6))
    with torch.no_grad():
        labels = net(images).argmax(1)
    return Batch(images=images, labels=labels, ids=torch.arange(count))


def rate(model, batch, attack):
    return attack.run(batch, ShiftContext(model=model), eps=attack.eps[0]).success.double().mean().item()


def test_values_are_the_functions_and_gradients_the_substitutes():
    images = SampleRng.make(0, "x", torch.arange(5)).uniform("x", (1, 4, 4)).requires_grad_(True)
    for function, substitute, slope in (
        (Quantise(), None, torch.ones_like(images)),
        (torch.sign, torch.tanh, 1 - torch.tanh(images) ** 2),
        (Outside(), lambda x: 0.9 * x, torch.full_like(images, 0.9)),
    ):
        part = BPDA(function, substitute)
        with torch.no_grad():
            true = function(images.detach())
            assert torch.equal(part(images), true)
        values = part(images)
        assert torch.equal(values, true)
        (gradient,) = torch.autograd.grad((3 * values).sum(), images)
        assert torch.allclose(gradient, 3 * slope)
        assert not values.is_leaf


def test_the_substitute_may_be_a_trained_module_that_changes_the_shape():
    pool = BPDA(lambda x: x[..., ::2, ::2].round(), nn.AvgPool2d(2))
    images = torch.full((1, 1, 4, 4), 0.7, requires_grad=True)
    values = pool(images)
    assert torch.equal(values, torch.ones(1, 1, 2, 2))
    assert torch.allclose(torch.autograd.grad(values.sum(), images)[0], torch.full((1, 1, 4, 4), 0.25))
    assert isinstance(pool.substitute, nn.Module)
    assert len(list(pool.modules())) == 2
    with pytest.raises(ShapeError, match=r"substitute that returns \(1, 1, 2, 2\)"):
        BPDA(lambda x: x[..., ::2, ::2])(images)


@pytest.mark.parametrize("arguments", [(3,), (torch.round, 3), (nn.Identity,)])
def test_what_cannot_be_called_is_refused(arguments):
    with pytest.raises(KindError, match="modules or functions"):
        BPDA(*arguments)


@pytest.mark.parametrize("attack", [PGD(eps=(0.08,), steps=20), APGD(eps=(0.08,), steps=20)], ids=["pgd", "apgd"])
def test_attacks_get_through_a_part_that_kills_gradients(attack):
    net = defended(Quantise())
    model = wrap(net, num_classes=3)
    batch = batch_for(net)
    images = batch.images.clone().requires_grad_(True)
    assert torch.autograd.grad(net(images).square().sum(), images)[0].abs().max() == 0
    blind = rate(model, batch, attack)
    guided = with_substitutes(model, {"body.front.0": None})
    result = attack.run(batch, ShiftContext(model=guided), eps=0.08)
    assert blind < 0.2
    assert result.success.double().mean() > blind + 0.5
    with torch.no_grad():
        assert torch.equal(result.success, net(result.images).argmax(1) != batch.labels), "the true network judges"
    assert not probe(model, batch).supports_grad
    assert probe(guided, batch).supports_grad


def test_predictions_are_those_of_the_true_model_bit_for_bit():
    net = defended(Quantise(), Outside())
    model = wrap(net, num_classes=3, mean=0.4, std=0.3)
    batch = batch_for(net)
    made = with_substitutes(model, {"body.front.0": None, "body.front.1": nn.Identity()})
    true = model.predict(batch).logits
    assert torch.equal(made.predict(batch).logits, true)
    view = made.for_attack()
    assert torch.equal(view.predict(batch).logits, true)
    images = batch.images.clone().requires_grad_(True)
    logits = view.outputs(batch.replace(images)).logits
    assert torch.equal(logits.detach(), true), "what an attack sees of it, too"
    assert (torch.autograd.grad(logits.square().sum(), images)[0] != 0).all()
    assert made.task == model.task
    assert made.num_classes == 3
    assert made.mean == model.mean


def test_a_substitute_decides_the_gradient():
    net = defended(Quantise())
    batch = batch_for(net)
    slopes = []
    for part in (None, Double()):
        images = batch.images.clone().requires_grad_(True)
        view = with_substitutes(wrap(net, num_classes=3), {"body.front.0": part}).for_attack()
        slopes += torch.autograd.grad(view.outputs(batch.replace(images)).logits.square().sum(), images)
    assert torch.allclose(slopes[1], 2 * slopes[0])


def test_the_network_is_left_as_it_was():
    net = defended(Quantise())
    net.train()
    net.body.head[3].eval()
    net.body.head[1].weight.requires_grad_(False)
    parts = dict(net.named_modules())
    state = copy.deepcopy(net.state_dict())
    flags = [module.training for module in net.modules()]
    model = with_substitutes(wrap(net, num_classes=3), {"body.front.0": nn.Identity()})
    batch = batch_for(copy.deepcopy(net).eval())
    with pytest.warns(RobustlabWarning, match="training mode") as told:
        first = PGD(eps=(0.08,), steps=3).run(batch, ShiftContext(model=model), eps=0.08)
    assert len(told) == 1
    assert dict(net.named_modules()) == parts
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(weight.grad is None for weight in net.parameters())
    net.eval()
    again = PGD(eps=(0.08,), steps=3).run(batch, ShiftContext(model=model), eps=0.08)
    assert torch.equal(first.images, again.images), "the attack sees eval mode"


def test_later_changes_of_the_network_are_seen():
    net = defended(Quantise())
    model = with_substitutes(wrap(net, num_classes=3), {"body.front.0": None})
    batch = batch_for(net)
    before = model.for_attack().predict(batch).logits
    with torch.no_grad():
        net.body.head[4].bias.add_(1)
    assert torch.allclose(model.for_attack().predict(batch).logits, before + 1)


def test_substitutes_travel_with_the_network_and_count_for_its_identity():
    net = defended(Quantise())
    model = wrap(net, num_classes=3)
    learned = nn.Conv2d(1, 1, 1)
    made = with_substitutes(model, {"body.front.0": learned})
    assert not learned.training
    made.to("cpu")
    assert learned in made.modules()
    assert made.settings()["substitutes"] == {"body.front.0": "Conv2d"}
    others = [model, with_substitutes(model, {"body.front.0": None}), with_substitutes(made, {"body.head.2": None})]
    for look in (model_identity, lambda item: item.fingerprint()):
        assert len({look(item) for item in (made, *others)}) == 4
    with torch.no_grad():
        known = model_identity(made)
        learned.weight.add_(1)
    assert model_identity(made) != known
    assert set(others[2].substitutes) == {"body.front.0", "body.head.2"}


@pytest.mark.parametrize(
    ("substitutes", "kind", "message"),
    [
        ({"body.frnt": None}, ConfigError, "names of parts among body, body.front"),
        ({"": None}, ConfigError, "names of parts"),
        ({"body.front": None, "body.front.0": None}, ConfigError, "side by side"),
        ({"body.front.0": torch.round}, KindError, "torch modules, or None"),
    ],
)
def test_parts_that_are_not_there_are_named(substitutes, kind, message):
    with pytest.raises(kind, match=message):
        with_substitutes(wrap(defended(Quantise()), num_classes=3), substitutes)


def test_only_networks_that_run_as_python_are_taken():
    net = defended(Quantise())
    with pytest.raises(KindError, match="wrapped network"):
        with_substitutes(net, {})
    with pytest.raises(KindError, match="wrapped network"):
        with_substitutes(wrap(lambda images: net(images), num_classes=3), {})
    net._orig_mod = nn.Identity()  # what torch.compile leaves
    with pytest.raises(KindError, match="runs as Python"):
        with_substitutes(wrap(net, num_classes=3), {"body.front.0": None})


def test_a_substitute_without_a_path_to_the_input_is_noticed():
    class Deaf(nn.Module):
        def forward(self, images):
            return images.detach()

    net = defended(Quantise())
    model = with_substitutes(wrap(net, num_classes=3), {"body.front.0": Deaf()})
    with pytest.raises(ModelError, match="gradients reach the input"):
        PGD(eps=(0.08,), steps=1).run(batch_for(net), ShiftContext(model=model), eps=0.08)
