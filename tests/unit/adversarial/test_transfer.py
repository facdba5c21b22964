"""Transfer: the recipe step by step, and the promises of every attack, for both models."""

import copy
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from corruptions.adversarial import Transfer
from corruptions.adversarial.losses import margin
from corruptions.adversarial.transfer import _resampling, shrunk, smoothed, usual_taps
from robustlab.core.errors import ConfigError, KindError, LabelError, ModelError, RangeError
from robustlab.core.model import wrap
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext
from robustlab.core.spec import to_dict
from robustlab.core.types import Batch, ImageSpec
from robustlab.evaluate.cache import shift_identity
from robustlab.train import seeded_init

BUDGETS = {"linf": (4 / 255, 8 / 255, 16 / 255), "l2": (0.1, 0.3, 0.6)}
SPEC = ImageSpec(channels=1, size=(8, 8))


def samples(count, seed=0):
    """Grey 8-bit images whose class is the brightest of three bands."""
    rng = SampleRng.make(seed, "toy", torch.arange(count))
    labels = rng.integers("label", 3)
    rows = torch.arange(8) // 2
    bright = (rows[None] == labels[:, None])[:, None, :, None]
    images = 0.5 + 0.12 * rng.normal("noise", (1, 8, 8)) + 0.1 * bright
    return Batch((images.clamp(0, 1) * 255).round() / 255, labels, torch.arange(count) + 100)


def build(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(64 * width, 3),
    )  # fmt: skip


def trained(width, seed):
    net = seeded_init(lambda: build(width), seed).eval()
    train = samples(256, seed=1 + seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(net(train.images), train.labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net


@pytest.fixture(scope="module")
def victim():
    return wrap(trained(8, 0), num_classes=3)


@pytest.fixture(scope="module")
def surrogate():
    return wrap(trained(6, 1), num_classes=3)


@pytest.fixture(scope="module")
def batch():
    return samples(48)


def attack_of(surrogate, norm, **more):
    return Transfer(surrogate, norm=norm, eps=BUDGETS[norm], **{"kernel": 3, "steps": 5, "copies": 2, **more})


def lengths(images, clean, norm):
    delta = (images.double() - clean.double()).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


@pytest.mark.parametrize("norm", BUDGETS)
def test_what_is_returned_is_inside_and_judged_by_the_victim(norm, victim, surrogate, batch):
    attack = attack_of(surrogate, norm)
    clean = (victim.predict(batch).logits.argmax(1) != batch.labels).double().mean().item()
    rates = [clean]
    for severity, eps in attack.budgets:
        for spec in (None, SPEC):
            ctx = ShiftContext(model=victim, spec=spec)
            result = attack.run(batch, ctx, eps=eps)
            assert lengths(result.images, batch.images, norm).max() <= eps + 1e-6
            assert result.images.min() >= 0
            assert result.images.max() <= 1
            logits = victim.predict(batch.replace(result.images)).logits
            assert torch.equal(result.success, logits.argmax(1) != batch.labels)
            assert torch.allclose(result.margin, margin(logits, batch.labels, "multiclass"), atol=1e-5)
            assert result.queries.tolist() == [2] * len(batch), "the clean image, and the end"
        stored = attack.on(batch, severity, ctx).images
        assert torch.equal(stored, ((stored.double() * 255).round() / 255).float())
        assert torch.equal(stored, result.images)
        rates.append(result.success.double().mean().item())
    assert rates == sorted(rates)
    assert rates[-1] > clean + 0.5
    assert attack.on(batch, 0, ctx) is batch
    assert torch.equal(attack.run(batch, ctx, eps=0.0).images, batch.images)


@pytest.mark.parametrize("norm", BUDGETS)
def test_it_fools_more_than_random_points_of_the_sphere(norm, victim, surrogate, batch):
    eps = BUDGETS[norm][2]
    found = attack_of(surrogate, norm).run(batch, ShiftContext(model=victim), eps=eps)
    noise = SampleRng.make(0, "noise", batch.ids).normal("x", (1, 8, 8))
    noise = eps * (noise.sign() if norm == "linf" else noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    random = victim.predict(batch.replace((batch.images + noise).clamp(0, 1))).logits.argmax(1) != batch.labels
    assert found.success.double().mean() > random.double().mean() + 0.3


def test_each_step_is_the_published_one(victim, surrogate, batch):
    """Plain loops: gradient over scale copies, smoothing by a Gaussian of 5 taps, momentum, signed steps."""
    net = surrogate.modules()[0].eval()
    eps, steps, mu = 0.06, 4, 0.7
    places = torch.linspace(-3, 3, 5)
    kernel = torch.exp(-(places[:, None] ** 2 + places[None] ** 2) / 2)
    kernel = (kernel / kernel.sum())[None, None]
    x, v = batch.images, 0
    for _ in range(steps):
        x = x.detach().requires_grad_(True)
        loss = sum(F.cross_entropy(net(x / 2**i), batch.labels, reduction="sum") for i in range(3)) / 3
        g = F.conv2d(torch.autograd.grad(loss, x)[0], kernel, padding=2)
        v = mu * v + g / g.abs().mean((1, 2, 3), keepdim=True)
        x = (x.detach() + eps / steps * v.sign()).clamp(0, 1)
    attack = attack_of(surrogate, "linf", steps=steps, momentum=mu, kernel=5, copies=3, p=0.0)
    result = attack.run(batch, ShiftContext(model=victim), eps=eps)
    with torch.no_grad():
        own, there = (margin(victim.modules()[0].eval()(i), batch.labels, "multiclass") for i in (batch.images, x))
    better = (own >= 0) & (there < own)
    assert better.double().mean() > 0.8
    assert torch.allclose(result.images[better], x[better], atol=1e-6)
    assert torch.equal(result.images[~better], batch.images[~better]), "what does not help is not kept"


def test_each_ingredient_matters(victim, surrogate, batch):
    ctx = ShiftContext(model=victim)
    usual = attack_of(surrogate, "linf")
    images = usual.run(batch, ctx, eps=0.04).images
    changes = {"steps": 4, "step_size": 2.5, "momentum": 0.0, "resize": 0.5, "p": 0.0, "kernel": 1, "copies": 1}
    for name, value in changes.items():
        other = dataclasses.replace(usual, **{name: value})
        assert not torch.equal(other.run(batch, ctx, eps=0.04).images, images), name
        assert shift_identity(other) != shift_identity(usual), name


def test_every_copy_in_every_step_is_drawn_anew(victim, surrogate, batch):
    seen = []

    def spy(images):
        seen.append(images.detach())
        return surrogate.modules()[0].eval()(images)

    attack = attack_of(wrap(spy, num_classes=3), "linf", steps=2, copies=3, p=1.0, step_size=1e-6, resize=0.5)
    attack.run(batch, ShiftContext(model=victim), eps=0.05)
    assert torch.equal(seen[0], batch.images), "the check of the classes"
    placed = torch.stack([images != 0 for images in seen[1:]]).flatten(2)
    assert len(placed) == 6
    for one in range(6):
        for other in range(one):
            assert (placed[one] != placed[other]).any(1).double().mean() > 0.8
    for copy_of_image, images in enumerate(seen[1:4]):
        assert images.amax() <= 2.0**-copy_of_image
        assert images.amax() > 0.8 * 2.0**-copy_of_image


@pytest.mark.parametrize("norm", BUDGETS)
def test_a_result_belongs_to_its_sample(norm, victim, surrogate, batch):
    attack = attack_of(surrogate, norm)
    ctx = ShiftContext(model=victim, seed=3)
    first = attack.run(batch, ctx, eps=attack.eps[1])
    assert torch.equal(attack.run(batch, ctx, eps=attack.eps[1]).images, first.images)
    turned = torch.arange(len(batch) - 1, -1, -1)
    for rows in (turned, turned[:5], turned[7:8]):
        part = attack.run(batch.select(rows), ctx, eps=attack.eps[1])
        assert torch.allclose(part.margin, first.margin[rows], atol=2e-3)
        assert (part.images - first.images[rows]).abs().mean() < 1e-4
    assert not torch.equal(
        attack.run(batch, ShiftContext(model=victim, seed=4), eps=attack.eps[1]).images, first.images
    )


@pytest.mark.parametrize("norm", BUDGETS)
def test_both_models_inputs_and_global_state_are_left_alone(norm, victim, surrogate, batch):
    nets = [copy.deepcopy(model.modules()[0]) for model in (victim, surrogate)]
    for net in nets:
        net.train()
        net[1].eval()
        net[0].weight.requires_grad_(False)
        net[5].bias.grad = torch.ones(3)
    states = [copy.deepcopy(net.state_dict()) for net in nets]
    before, random = batch.images.clone(), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attack = attack_of(wrap(nets[1], num_classes=3), norm)
        found = attack.run(batch, ShiftContext(model=wrap(nets[0], num_classes=3)), eps=BUDGETS[norm][0])
    for net, state in zip(nets, states, strict=True):
        assert [module.training for module in net.modules()] == [True, True, False, True, True, True, True]
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
        assert [p.grad is None for p in net.parameters()] == [True] * 5 + [False]
        assert torch.equal(net[5].bias.grad, torch.ones(3))
        assert [p.requires_grad for p in net.parameters()] == [False] + [True] * 5
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(batch.images, before)
    usual = attack_of(surrogate, norm).run(batch, ShiftContext(model=victim), eps=BUDGETS[norm][0])
    assert torch.equal(usual.images, found.images), "both are seen in eval mode"
    with torch.inference_mode():
        inside = Batch(batch.images.clone(), batch.labels.clone(), batch.ids.clone())
        again = attack_of(surrogate, norm).run(inside, ShiftContext(model=victim), eps=BUDGETS[norm][0])
        assert torch.equal(again.images, found.images)


def test_the_victim_needs_no_gradient_and_the_surrogate_does(victim, surrogate, batch):
    deaf = wrap(lambda images: victim.modules()[0].eval()(images.detach()), num_classes=3)
    usual = attack_of(surrogate, "linf").run(batch, ShiftContext(model=victim), eps=0.05)
    assert torch.equal(attack_of(surrogate, "linf").run(batch, ShiftContext(model=deaf), eps=0.05).images, usual.images)
    with pytest.raises(ModelError, match="surrogate through which gradients"):
        attack_of(deaf, "linf").run(batch, ShiftContext(model=victim), eps=0.05)
    loose = nn.Parameter(torch.ones(3))
    apart = wrap(lambda images: loose.expand(len(images), 3), num_classes=3)
    with pytest.raises(ModelError, match="surrogate through which gradients"):
        attack_of(apart, "linf").run(batch, ShiftContext(model=victim), eps=0.05)


def test_a_surrogate_that_breaks_moves_nothing(victim, batch):
    broken = wrap(lambda images: images.flatten(1)[:, :3] * torch.nan, num_classes=3)
    result = attack_of(broken, "linf").run(batch, ShiftContext(model=victim), eps=0.05)
    assert torch.equal(result.images, batch.images)


def test_a_mask_a_start_and_wrong_samples_are_respected(victim, surrogate, batch):
    ctx = ShiftContext(model=victim)
    attack = attack_of(surrogate, "linf", mask=(0.5, 1.0))
    changed = (attack.run(batch, ctx, eps=0.05).images != batch.images).flatten(1)
    dark = (batch.images < 0.5).flatten(1)
    assert not (changed & dark).any()
    assert changed[~dark].double().mean() > 0.5
    one = attack_of(surrogate, "l2", mask=(0.5, 1.0), steps=1).run(batch, ctx, eps=0.05).images
    length = lengths(one, batch.images, "l2")
    assert torch.allclose(length[length > 0], torch.full((), 0.05, dtype=torch.float64), rtol=1e-3), "all of it inside"
    labels = batch.labels.clone()
    labels[:4] = (victim.predict(batch).logits.argmax(1)[:4] + 1) % 3
    result = attack_of(surrogate, "linf").run(Batch(batch.images, labels, batch.ids), ctx, eps=0.05)
    assert torch.equal(result.images[:4], batch.images[:4])
    assert result.success[:4].all()
    still = attack_of(surrogate, "linf", steps=1, step_size=1e-6)
    start = batch.images + 0.5
    held = still.run(batch, ctx, eps=0.05, start=start).images
    moved = (held != batch.images).flatten(1).any(1)
    assert moved.any()
    assert torch.allclose(held[moved], (batch.images + 0.05).clamp(0, 1)[moved], atol=1e-6)


def test_double_precision(victim, surrogate, batch):
    nets = [wrap(copy.deepcopy(model.modules()[0]).double(), num_classes=3) for model in (victim, surrogate)]
    wide = Batch(batch.images.double(), batch.labels, batch.ids)
    result = attack_of(nets[1], "linf").run(wide, ShiftContext(model=nets[0]), eps=0.05)
    assert result.images.dtype == torch.float64
    narrow = attack_of(surrogate, "linf").run(batch, ShiftContext(model=victim), eps=0.05)
    assert (result.success == narrow.success).double().mean() > 0.9


def test_shrinking_is_interpolation_and_padding():
    images = SampleRng.make(0, "x", torch.arange(3)).uniform("x", (2, 20, 20))
    scale, place = torch.tensor([0.9, 0.7, 1.0]), torch.tensor([0.5, 1.0, 0.3])
    matrix = _resampling(scale, place, 20)
    for i, (side, top) in enumerate(((18, 1), (14, 6), (20, 0))):
        small = F.interpolate(images[i : i + 1], size=(side, side), mode="bilinear", align_corners=False)
        expected = F.pad(small, (top, 20 - side - top, top, 20 - side - top))
        got = matrix[i] @ images[i] @ matrix[i].T
        assert torch.allclose(got, expected[0], atol=1e-5)


def test_some_images_are_shrunk_each_in_its_own_way():
    images = torch.full((1500, 1, 48, 40), 1.0)
    rng = SampleRng.make(0, "x", torch.arange(1500))
    seen = shrunk(images, rng, least=0.5, p=0.3)
    whole = (seen == 1).flatten(1).all(1)
    assert abs(whole.double().mean().item() - 0.7) < 0.03
    area = (seen[~whole] > 0.5).flatten(1).double().mean(1)
    assert 0.15 < area.min() < 0.35
    assert area.max() > 0.85
    darkness = 1 - seen[~whole].mean((0, 1))
    assert torch.allclose(darkness, darkness.flip(0), atol=0.06), "above as often as below"
    assert torch.allclose(darkness, darkness.flip(1), atol=0.06)
    assert torch.equal(shrunk(images[:9], rng.select(torch.arange(9)), least=0.5, p=0.3), seen[:9])
    one = torch.tensor([4])
    assert torch.equal(shrunk(images[one], rng.select(one), least=0.5, p=0.3), seen[one])
    odd = SampleRng.make(1, "x", torch.arange(2)).uniform("x", (3, 5, 8))
    assert torch.equal(shrunk(odd, SampleRng.make(0, "y", torch.arange(2)), least=0.5, p=0.0), odd)


def test_smoothing_is_a_gaussian_of_three_standard_deviations():
    point = torch.zeros(1, 2, 31, 31)
    point[0, 1, 15, 15] = 1
    spread = smoothed(point, 15)
    assert torch.equal(spread[0, 0], torch.zeros(31, 31)), "channels stay apart"
    assert abs(spread.sum().item() - 1) < 1e-5
    line = spread[0, 1, 15, 8:23]
    assert torch.allclose(line / line[7], torch.exp(-0.5 * (torch.arange(-7, 8) / (7 / 3)) ** 2), atol=1e-5)
    assert torch.equal(spread, spread.mT)
    assert spread[0, 1, :8].abs().max() == 0
    assert torch.equal(smoothed(point, 1), point)
    assert smoothed(torch.ones(1, 1, 4, 4), 15).shape == (1, 1, 4, 4)


def test_the_kernel_shrinks_with_the_images(victim, surrogate, batch):
    assert [usual_taps(side) for side in (8, 28, 96, 224, 299)] == [1, 3, 5, 11, 15]
    ctx = ShiftContext(model=victim)
    usual, none, fixed = (
        attack_of(surrogate, "linf", kernel=k, p=0.0).run(batch, ctx, eps=0.05).images for k in (None, 1, 15)
    )
    assert torch.equal(usual, none)
    assert not torch.equal(usual, fixed)


def test_caches_know_the_surrogate(surrogate):
    usual = attack_of(surrogate, "linf")
    assert usual.label == "transfer-linf"
    assert to_dict(usual)["name"] == usual.name
    same = attack_of(wrap(copy.deepcopy(surrogate.modules()[0]), num_classes=3), "linf")
    assert shift_identity(same) == shift_identity(usual)
    assert same.name == usual.name == dataclasses.replace(usual).name
    different = [
        attack_of(wrap(trained(6, 2), num_classes=3), "linf"),
        attack_of(surrogate, "l2"),
        dataclasses.replace(usual, eps=(0.5,)),
        dataclasses.replace(usual, units="native"),
        dataclasses.replace(usual, draws=3),
    ]
    assert len({shift_identity(attack) for attack in (usual, *different)}) == 6
    assert shift_identity(attack_of(wrap(lambda images: images, num_classes=3), "linf")) is None
    later = copy.deepcopy(surrogate.modules()[0])
    attack = attack_of(wrap(later, num_classes=3), "linf")
    with torch.no_grad():
        later[0].weight.add_(1)
    assert shift_identity(attack) is None, "trained on since"


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"steps": 0}, RangeError, "steps of at least 1"),
        ({"copies": 0}, RangeError, "copies of at least 1"),
        ({"kernel": 4}, RangeError, "odd kernel"),
        ({"kernel": -1}, RangeError, "kernel of at least 1"),
        ({"step_size": 0.0}, RangeError, "positive step_size"),
        ({"momentum": -0.1}, RangeError, "momentum of at least 0"),
        ({"resize": 0.0}, RangeError, "resize above 0"),
        ({"resize": 1.1}, RangeError, "resize above 0"),
        ({"p": 1.5}, RangeError, "p from 0 to 1"),
        ({"norm": "l1"}, ConfigError, "norm 'linf' or 'l2'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, kind, message, surrogate):
    with pytest.raises(kind, match=message):
        Transfer(surrogate, **arguments)


def test_mistakes_are_named(victim, surrogate, batch):
    with pytest.raises(KindError, match="surrogate model"):
        Transfer(surrogate.modules()[0])
    two = wrap(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval(), num_classes=2)
    with pytest.raises(LabelError, match="surrogate Sequential"):
        attack_of(two, "linf").run(batch, ShiftContext(model=victim), eps=0.1)
