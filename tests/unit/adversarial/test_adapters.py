"""Attacks of other libraries: whatever they return, claim or touch, our rules hold."""

import copy
import dataclasses
import random
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from corruptions.adversarial import PGD, FromFoolbox, FromTorchattacks
from corruptions.adversarial.losses import margin
from robustlab.core.errors import ConfigError, KindError, MissingExtraError, RobustlabWarning, ShapeError
from robustlab.core.model import wrap
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext
from robustlab.core.spec import to_dict
from robustlab.core.types import Batch, ImageSpec
from robustlab.evaluate.cache import shift_identity
from robustlab.train import seeded_init

EPS = {"linf": 0.05, "l2": 0.4}
SPEC = ImageSpec(channels=1, size=(6, 6))


def wavy():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.Tanh(), nn.Dropout(0.3), nn.Linear(32, 4))
    with torch.no_grad():
        net[1].weight.mul_(8)
        net[4].weight.mul_(4)
    return net.eval()


@pytest.fixture
def net():
    return seeded_init(wavy, 5)


@pytest.fixture
def model(net):
    return wrap(net, num_classes=4)


@pytest.fixture
def batch(net):
    images = (SampleRng.make(0, "images", torch.arange(32)).uniform("x", (1, 6, 6)) * 255).round() / 255
    return Batch(images=images, labels=net(images).argmax(1), ids=torch.arange(32))


class FakeModel:
    """As foolbox.PyTorchModel: refuses modules in training mode."""

    def __init__(self, module, bounds, device):
        assert isinstance(module, nn.Module)
        assert not module.training
        assert bounds == (0, 1)
        assert module.to(device) is module
        self.module = module

    def __call__(self, images):
        return self.module(images)


class FakeFoolbox:
    """As a foolbox attack: returns what ``change`` makes, and claims."""

    def __init__(self, change, claim=True):
        self.change = change
        self.claim = claim

    def __call__(self, model, images, labels, *, epsilons):
        changed = self.change(model, images, labels, epsilons)
        return images + 9, changed, torch.full((len(images),), self.claim)


def fake_torchattack(change):
    def make(model, eps):
        def attack(images, labels):
            assert next(model.parameters()).device == images.device
            before = model.training
            model.eval()
            changed = change(model, images, labels, eps)
            if before:
                model.train()
            return changed

        return attack

    return make


@pytest.fixture(params=["foolbox", "torchattacks"])
def adapt(request, monkeypatch):
    """A function from what a foreign attack does to our attack."""
    library = types.ModuleType("foolbox")
    library.PyTorchModel = FakeModel
    monkeypatch.setitem(sys.modules, "foolbox", library)

    def made(change, norm="linf", **more):
        eps = more.pop("eps", (EPS[norm] / 2, EPS[norm]))
        if request.param == "foolbox":
            return FromFoolbox(FakeFoolbox(change), norm=norm, eps=eps, **more)
        return FromTorchattacks(fake_torchattack(change), norm=norm, eps=eps, **more)

    return made


def ascent(model, images, labels, eps):
    """Five signed steps in the L-infinity ball."""
    found = images.clone()
    for _ in range(5):
        found.requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(model(found), labels, reduction="sum"), found)
        found = (found.detach() + eps / 3 * slope.sign()).clamp(images - eps, images + eps).clamp(0, 1)
    return found


def along(model, images, labels, eps):
    """One step to the sphere of the L2 ball."""
    found = images.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(F.cross_entropy(model(found), labels, reduction="sum"), found)
    return (images + eps * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)


def far(model, images, labels, eps):
    del model, labels
    return images + 3 * eps


def still(model, images, labels, eps):
    del model, labels, eps
    return images


def lengths(images, clean, norm):
    delta = (images.double() - clean.double()).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


@pytest.mark.parametrize("spec", [None, SPEC], ids=["float", "8-bit"])
@pytest.mark.parametrize(("norm", "change"), [("linf", ascent), ("l2", along)], ids=["linf", "l2"])
def test_a_good_attack_is_passed_on_and_judged(norm, change, spec, adapt, net, model, batch):
    attack = adapt(change, norm)
    ctx = ShiftContext(model=model, spec=spec)
    result = attack.run(batch, ctx, eps=EPS[norm])
    assert lengths(result.images, batch.images, norm).max() <= EPS[norm] + 1e-6
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    with torch.no_grad():
        logits = net(result.images)
    assert torch.equal(result.success, logits.argmax(1) != batch.labels)
    assert torch.allclose(result.margin, margin(logits, batch.labels, "multiclass"), atol=1e-5)
    assert result.success.double().mean() > 0.3
    foreign = change(net, batch.images, batch.labels, EPS[norm])
    kept = (result.images != batch.images).flatten(1).any(1)
    assert kept.double().mean() > 0.9
    assert (result.images - foreign)[kept].abs().max() <= (1e-6 if spec is None else 1 / 255)
    if spec is not None:
        assert torch.equal(result.images, ((result.images.double() * 255).round() / 255).float())
    assert torch.equal(attack.on(batch, 5, ctx).images, result.images)
    assert attack.on(batch, 0, ctx) is batch


def test_queries_are_the_images_that_passed_a_mean_over_the_batch(adapt, model, batch):
    assert adapt(ascent).run(batch, ShiftContext(model=model), eps=0.05).queries.tolist() == [7] * 32

    def uneven(network, images, labels, eps):
        network(images[:3])
        return still(network, images, labels, eps)

    assert adapt(uneven).run(batch, ShiftContext(model=model), eps=0.05).queries.tolist() == [3] * 32


@pytest.mark.parametrize("norm", EPS)
def test_images_outside_are_projected_and_told_once(norm, adapt, model, batch):
    attack = adapt(far, norm)
    ctx = ShiftContext(model=model)
    with pytest.warns(RobustlabWarning, match="leave the ball of radius"):
        result = attack.run(batch, ctx, eps=EPS[norm])
    again = attack.run(batch, ctx, eps=EPS[norm])  # a warning would be an error
    assert lengths(result.images, batch.images, norm).max() <= EPS[norm] + 1e-6
    assert result.images.max() <= 1
    assert torch.equal(result.images, again.images)
    moved = (result.images != batch.images).flatten(1).any(1)
    assert moved.any()
    if norm == "linf":
        assert torch.allclose(result.images[moved], (batch.images + 0.05).clamp(0, 1)[moved])


def test_leaving_the_box_inside_the_ball_is_told_too(adapt, model, batch):
    with pytest.warns(RobustlabWarning, match=r"or \[0, 1\] by up to 0.05"):
        adapt(lambda network, images, labels, eps: images + eps).run(batch, ShiftContext(model=model), eps=0.05)


def test_rounding_of_the_last_digits_is_no_breach(adapt, model, batch):
    adapt(lambda network, images, labels, eps: (images + eps + 5e-5).clamp(0, 1)).run(
        batch, ShiftContext(model=model), eps=0.05
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_leave_their_sample_clean(value, adapt, model, batch):
    def broken(network, images, labels, eps):
        found = ascent(network, images, labels, eps)
        found[::2, 0, 3, 3] = value
        return found

    with pytest.warns(RobustlabWarning, match="16 of 32 images have pixels that are not finite"):
        result = adapt(broken).run(batch, ShiftContext(model=model), eps=0.05)
    assert torch.equal(result.images[::2], batch.images[::2])
    assert not result.success[::2].any()
    assert result.success[1::2].any()
    assert torch.isfinite(result.images).all()


def test_claims_are_not_believed(monkeypatch, model, batch):
    library = types.ModuleType("foolbox")
    library.PyTorchModel = FakeModel
    monkeypatch.setitem(sys.modules, "foolbox", library)
    ctx = ShiftContext(model=model)
    boast = FromFoolbox(FakeFoolbox(still, claim=True), norm="linf", eps=(0.05,))
    modest = FromFoolbox(FakeFoolbox(ascent, claim=False), norm="linf", eps=(0.05,))
    assert not boast.run(batch, ctx, eps=0.05).success.any()
    assert modest.run(batch, ctx, eps=0.05).success.any()


def test_an_image_that_helps_nothing_is_not_kept(adapt, net, model, batch):
    def descent(network, images, labels, eps):
        return (2 * images - ascent(network, images, labels, eps / 10)).clamp(0, 1)

    worse = descent(net, batch.images, batch.labels, 0.05)
    with torch.no_grad():
        before, after = (margin(net(images), batch.labels, "multiclass") for images in (batch.images, worse))
    result = adapt(descent).run(batch, ShiftContext(model=model), eps=0.05)
    stays = after > before
    assert stays.double().mean() > 0.5
    assert torch.equal(result.images[stays], batch.images[stays])
    assert torch.allclose(result.margin, torch.minimum(before, after), atol=1e-5)


def test_flags_parameters_and_gradients_are_put_back(adapt, net, model, batch):
    net[1].weight.requires_grad_(False)
    net[4].bias.grad = torch.ones(4)
    state = copy.deepcopy(net.state_dict())

    def meddle(network, images, labels, eps):
        getattr(network, "module", network).train()
        net.train()
        images = images.requires_grad_(True)
        F.cross_entropy(network(images), labels).backward()
        return ascent(network, images.detach(), labels, eps)

    result = adapt(meddle).run(batch, ShiftContext(model=model), eps=0.05)
    assert not any(module.training for module in net.modules())
    assert [weight.requires_grad for weight in net.parameters()] == [False, True, True, True]
    assert [weight.grad is None for weight in net.parameters()] == [True, True, True, False]
    assert torch.equal(net[4].bias.grad, torch.ones(4))
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    with torch.no_grad():
        logits = net(result.images)
    assert torch.equal(result.success, logits.argmax(1) != batch.labels), "judged in eval mode"


def test_flags_are_put_back_when_it_fails(adapt, net, model, batch):
    def fails(network, images, labels, eps):
        net.train()
        random.random()
        raise ArithmeticError("half way")

    before = random.getstate()
    with pytest.raises(ArithmeticError, match="half way"):
        adapt(fails).run(batch, ShiftContext(model=model), eps=0.05)
    assert not net.training
    assert all(weight.requires_grad for weight in net.parameters())
    assert random.getstate() == before


def test_a_network_in_training_mode_is_attacked_in_eval_mode(adapt, net, model, batch):
    usual = adapt(ascent).run(batch, ShiftContext(model=model), eps=0.05)
    net.train()
    with pytest.warns(RobustlabWarning, match="training mode"):
        result = adapt(ascent).run(batch, ShiftContext(model=wrap(net, num_classes=4)), eps=0.05)
    assert all(module.training for module in net.modules())
    assert torch.equal(result.images, usual.images)


def test_what_it_gets_is_its_own_copy(adapt, model, batch):
    def scribble(network, images, labels, eps):
        found = ascent(network, images.clone(), labels.clone(), eps)
        images.zero_()
        labels.zero_()
        return found

    images, labels = batch.images.clone(), batch.labels.clone()
    result = adapt(scribble).run(batch, ShiftContext(model=model), eps=0.05)
    assert torch.equal(batch.images, images)
    assert torch.equal(batch.labels, labels)
    assert torch.equal(result.images, adapt(ascent).run(batch, ShiftContext(model=model), eps=0.05).images)


def draw(model, images, labels, eps):
    """Draws from every global generator."""
    level = random.random() * np.random.rand() * torch.rand(())  # noqa: NPY002
    noise = torch.rand_like(images) + torch.from_numpy(np.random.rand(*images.shape)).float() - 1  # noqa: NPY002
    return ascent(model, (images + level * eps * noise).clamp(0, 1), labels, eps / 2).clamp(images - eps, images + eps)


def test_random_attacks_repeat_and_leave_the_global_state(adapt, model, batch):
    attack, ctx = adapt(draw), ShiftContext(model=model)
    random.seed(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first = attack.run(batch, ctx, eps=0.05).images
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(2)
    assert torch.equal(attack.run(batch, ctx, eps=0.05).images, first)
    assert not torch.equal(attack.run(batch, ShiftContext(model=model, seed=1), eps=0.05).images, first)
    other = Batch(batch.images, batch.labels, batch.ids + 7)
    assert not torch.equal(attack.run(other, ctx, eps=0.05).images, first), "another batch, another seed"


def test_only_samples_that_are_right_so_far_are_attacked(adapt, net, model, batch):
    seen = []

    def note(network, images, labels, eps):
        seen.append((len(images), eps))
        assert len(labels) == len(images)
        return ascent(network, images, labels, eps)

    labels = batch.labels.clone()
    labels[:5] = (labels[:5] + 1) % 4
    wrong = Batch(batch.images, labels, batch.ids)
    ctx = ShiftContext(model=model)
    result = adapt(note).run(wrong, ctx, eps=0.05)
    assert seen == [(27, 0.05)]
    assert torch.equal(result.images[:5], batch.images[:5])
    assert result.success[:5].all()
    assert torch.equal(adapt(note).run(wrong, ctx, eps=0.0).images, batch.images)
    everything = Batch(batch.images, (batch.labels + 1) % 4, batch.ids)
    assert adapt(note).run(everything, ctx, eps=0.05).success.all()
    assert len(seen) == 1
    found = adapt(ascent).run(batch, ctx, eps=0.05)
    again = adapt(still).run(batch, ctx, eps=0.05, start=found.images)
    assert torch.equal(again.images, found.images), "a start counts"


def test_budgets_and_masks_are_ours(adapt, model, batch):
    budgets = []

    def note(network, images, labels, eps):
        budgets.append(eps)
        return ascent(network, images, labels, eps)

    attack = adapt(note, eps=(0.01, 0.02, 0.04), mask=(0.5, 1.0))
    images = attack.on(batch, 10 / 3, ShiftContext(model=model)).images
    assert budgets == [pytest.approx(0.02)]
    changed = images != batch.images
    assert not changed[batch.images < 0.5].any()
    assert changed[batch.images >= 0.5].any()


def test_inference_mode_is_no_obstacle(adapt, model, batch):
    usual = adapt(ascent).run(batch, ShiftContext(model=model), eps=0.05)
    with torch.inference_mode():
        inside = Batch(batch.images.clone(), batch.labels.clone(), batch.ids.clone())
        assert torch.equal(adapt(ascent).run(inside, ShiftContext(model=model), eps=0.05).images, usual.images)


def test_double_precision(adapt, net, batch):
    wide = Batch(batch.images.double(), batch.labels, batch.ids)
    result = adapt(ascent).run(wide, ShiftContext(model=wrap(net.double(), num_classes=4)), eps=0.05)
    assert result.images.dtype == torch.float64
    assert lengths(result.images, wide.images, "linf").max() <= 0.05 + 1e-12


def test_random_models_are_judged_on_fresh_draws(adapt, net, batch):
    noisy = wrap(lambda images: net(images + 0.3 * torch.randn_like(images)), num_classes=4)
    result = adapt(ascent, draws=4).run(batch, ShiftContext(model=noisy), eps=0.05)
    assert result.probability is not None
    assert torch.equal(result.success, result.probability > 0.5)


def test_caches_tell_names_and_threat_models_apart(adapt):
    attack = adapt(ascent, name="mine", version=2)
    assert attack.label == "mine-linf"
    assert to_dict(attack) == {"type": "opaque", "name": attack.name, "version": 2, "fields": {}}
    same = dataclasses.replace(attack)
    assert same.name == attack.name
    assert same == attack
    assert shift_identity(same) == shift_identity(attack) is not None
    different = [
        adapt(ascent, name="yours", version=2),
        adapt(ascent, name="mine", version=3),
        adapt(ascent, name="mine", version=2, norm="l2", eps=attack.eps),
        *(
            dataclasses.replace(attack, **change)
            for change in ({"eps": (0.01,)}, {"units": "native"}, {"mask": (0.1, 1.0)}, {"draws": 5})
        ),
    ]
    assert len({shift_identity(item) for item in (attack, *different)}) == 8
    assert dataclasses.replace(attack, eps=(0.01,)).label == "mine-linf"
    assert shift_identity(adapt(ascent)) is None


def test_without_a_name_the_kind_is_the_name():
    class SparseL2Attack(FakeFoolbox):
        pass

    assert FromFoolbox(SparseL2Attack(still), norm="l2", eps=(1.0,)).label == "foolbox:sparse-l2-attack-l2"
    assert FromTorchattacks(lambda model, eps: None, norm="l2", eps=(1.0,)).label == "torchattacks:lambda-l2"
    assert FromTorchattacks(fake_torchattack, norm="linf", eps=(0.1,)).label == "torchattacks:fake-torchattack-linf"


def test_what_comes_back_must_be_images(adapt, model, batch):
    ctx = ShiftContext(model=model)
    with pytest.raises(ShapeError, match=r"images of shape \(32, 1, 6, 6\)"):
        adapt(lambda network, images, labels, eps: images[:3]).run(batch, ctx, eps=0.05)
    with pytest.raises(KindError, match="images as a torch tensor"):
        adapt(lambda network, images, labels, eps: images.numpy()).run(batch, ctx, eps=0.05)
    several = wrap(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).eval(), task="multilabel", num_classes=4)
    with pytest.raises(ConfigError, match="one class an image"):
        adapt(ascent).run(
            Batch(batch.images, torch.ones(32, 4).long(), batch.ids), ShiftContext(model=several), eps=0.1
        )


def test_what_is_no_attack_is_refused(model, batch, monkeypatch):
    threat = {"norm": "linf", "eps": (0.05,)}
    for cls in (FromFoolbox, FromTorchattacks):
        for wrong in ("pgd", FakeFoolbox):
            with pytest.raises(KindError, match=r"Pass e\.g\."):
                cls(wrong, **threat)
        with pytest.raises(TypeError, match="norm"):
            cls(ascent)
    made = type("PGD", (), {"__module__": "torchattacks.attacks.pgd", "__call__": still})()
    with pytest.raises(KindError, match="lambda model, eps"):
        FromTorchattacks(made, **threat)
    with pytest.raises(KindError, match="function that makes an attack"):
        FromTorchattacks(lambda net, eps: None, **threat).run(batch, ShiftContext(model=model), eps=0.05)
    monkeypatch.setitem(sys.modules, "foolbox", None)
    with pytest.raises(MissingExtraError, match="pip install foolbox"):
        FromFoolbox(FakeFoolbox(still), **threat).run(batch, ShiftContext(model=model), eps=0.05)


def test_a_foolbox_attack_in_another_norm_is_refused():
    attack = FakeFoolbox(still)
    attack.distance = types.SimpleNamespace(p=2)
    FromFoolbox(attack, norm="l2", eps=(0.5,))
    with pytest.raises(ConfigError, match="order 2"):
        FromFoolbox(attack, norm="linf", eps=(0.5,))


@pytest.mark.parametrize("norm", EPS)
def test_foolbox_itself(norm, model, batch):
    library = pytest.importorskip("foolbox")
    attacks = {
        "linf": [library.attacks.LinfPGD(steps=40), library.attacks.LinfFastGradientAttack()],
        "l2": [library.attacks.L2PGD(steps=50), library.attacks.L2DeepFoolAttack(), library.attacks.DDNAttack()],
    }
    compare_with_ours([FromFoolbox(a, norm=norm, eps=(EPS[norm],)) for a in attacks[norm]], norm, model, batch)


@pytest.mark.parametrize("norm", EPS)
def test_torchattacks_itself(norm, model, batch):
    library = pytest.importorskip("torchattacks")
    makers = {
        "linf": [
            lambda model, eps: library.PGD(model, eps=eps, alpha=eps / 10, steps=40),
            lambda model, eps: library.APGD(model, norm="Linf", eps=eps, steps=20),
            lambda model, eps: library.MIFGSM(model, eps=eps, alpha=eps / 10, steps=10),
        ],
        "l2": [
            lambda model, eps: library.PGDL2(model, eps=eps, alpha=eps / 5, steps=20),
            lambda model, eps: library.Square(model, norm="L2", eps=eps, n_queries=500),
        ],
    }
    compare_with_ours([FromTorchattacks(m, norm=norm, eps=(EPS[norm],)) for m in makers[norm]], norm, model, batch)


def compare_with_ours(attacks, norm, model, batch):
    ctx = ShiftContext(model=model)
    ours = PGD(norm=norm, eps=(EPS[norm],)).run(batch, ctx, eps=EPS[norm]).success.double().mean().item()
    rates = []
    for attack in attacks:
        result = attack.run(batch, ctx, eps=EPS[norm])
        assert torch.equal(attack.run(batch, ctx, eps=EPS[norm]).images, result.images)
        assert lengths(result.images, batch.images, norm).max() <= EPS[norm] + 1e-6
        assert torch.equal(result.success, model.predict(batch.replace(result.images)).logits.argmax(1) != batch.labels)
        rates.append(result.success.double().mean().item())
    assert abs(rates[0] - ours) < 0.1
    assert min(rates) > 0.2
