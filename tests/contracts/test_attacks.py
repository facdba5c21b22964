"""Every registered attack: inside its threat model, honest about success, and without side effects."""

import copy
import warnings

import pytest
import torch
from torch import nn

from corruptions.adversarial.losses import margin
from corruptions.staining import STAINS
from robustlab.core.errors import ConfigError, LabelError, ModelError
from robustlab.core.model import wrap
from robustlab.core.registry import ATTACKS
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch, ImageSpec
from robustlab.train import seeded_init
from tests.contracts.quick import for_three_classes, quick

BUDGETS = {"linf": (4 / 255, 8 / 255, 16 / 255), "l2": (0.1, 0.3, 0.6)}
CASES = [pytest.param(name, norm, id=f"{name}-{norm}") for norm in BUDGETS for name in for_three_classes(norm)]
PARAMETRIC = [name for name in ATTACKS.names() if "parameters" in ATTACKS.get(name).norms]
MORE = {
    "square": {"queries": 300},
    "pgd": {"steps": 40},
    "fab-t": {"steps": 15},
    "ddn": {"steps": 60},
    "fmn": {"steps": 60},
    "apgd": {"steps": 20},
    "apgd-t": {"steps": 20},
}
SPEC = ImageSpec(channels=1, size=(8, 8))


def attack_of(name, norm):
    return quick(name, norm=norm, eps=BUDGETS[norm], **MORE.get(name, {}))


def samples(count, seed=0, classes=3):
    """Grey 8-bit images whose class is the brightest of three bands."""
    rng = SampleRng.make(seed, "toy", torch.arange(count))
    labels = rng.integers("label", classes)
    images = 0.5 + 0.12 * rng.normal("noise", (1, 8, 8))
    bands = torch.stack([images[i, 0, 2 * c : 2 * c + 2] for i, c in enumerate(labels.tolist())])
    bands += 0.1
    for i, c in enumerate(labels.tolist()):
        images[i, 0, 2 * c : 2 * c + 2] = bands[i]
    return Batch(images=(images.clamp(0, 1) * 255).round() / 255, labels=labels, ids=torch.arange(count) + 100)


def build():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(512, 3),
    )


@pytest.fixture(scope="module")
def model():
    net = seeded_init(build, 0)
    train = samples(512, seed=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    net.eval()
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(train.images), train.labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return wrap(net, task="multiclass", output="logits", num_classes=3)


@pytest.fixture(scope="module")
def batch():
    return samples(48)


def lengths(images, clean, norm):
    delta = (images.double() - clean.double()).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_result_is_inside_ball_and_box_and_moves(name, norm, model, batch):
    attack = attack_of(name, norm)
    for _, eps in attack.budgets:
        images = attack.run(batch, ShiftContext(model=model), eps=eps).images
        assert lengths(images, batch.images, norm).max() <= eps + 1e-6
        assert images.min() >= 0
        assert images.max() <= 1
    right = model.predict(batch).logits.argmax(1) == batch.labels
    assert lengths(images, batch.images, norm)[right].min() > eps / 4


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_severity_zero_and_eps_zero_are_the_clean_images(name, norm, model, batch):
    attack = attack_of(name, norm)
    ctx = ShiftContext(model=model, spec=SPEC)
    assert attack.on(batch, 0, ctx) is batch
    assert torch.equal(attack.run(batch, ctx, eps=0.0).images, batch.images)


@pytest.mark.parametrize("spec", [None, SPEC], ids=["float", "8-bit"])
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_success_and_margin_hold_when_recomputed(name, norm, spec, model, batch):
    attack = attack_of(name, norm)
    result = attack.run(batch, ShiftContext(model=model, spec=spec), eps=attack.eps[1])
    logits = model.predict(batch.replace(result.images)).logits
    assert torch.equal(result.success, logits.argmax(1) != batch.labels)
    assert torch.allclose(result.margin, margin(logits, batch.labels, "multiclass"), atol=1e-5)
    assert result.queries.dtype == torch.int64
    assert result.queries.min() >= 1
    assert 0.1 < result.success.double().mean() < 1


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_stored_images_are_on_the_grid_and_inside_the_ball(name, norm, model, batch):
    attack = attack_of(name, norm)
    ctx = ShiftContext(model=model, spec=SPEC)
    for severity, eps in attack.budgets:
        stored = attack.on(batch, severity, ctx).images
        levels = (stored.double() * 255).round()
        assert torch.equal(stored, (levels / 255).float())
        assert lengths(stored, batch.images, norm).max() <= eps + 1e-6
        assert torch.equal(stored, attack.run(batch, ctx, eps=eps).images), "what was judged is what is stored"


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_more_budget_fools_more(name, norm, model, batch):
    attack = attack_of(name, norm)
    ctx = ShiftContext(model=model)
    clean = (model.predict(batch).logits.argmax(1) != batch.labels).double().mean().item()
    rates = [clean] + [attack.run(batch, ctx, eps=eps).success.double().mean().item() for _, eps in attack.budgets]
    assert rates == sorted(rates)
    assert rates[-1] > rates[0] + 0.3


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_model_and_inputs_are_left_as_they_were(name, norm, model, batch):
    net = copy.deepcopy(model.modules()[0])
    net.train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[5].bias.grad = torch.ones(3)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    flags = [(module.training) for module in net.modules()]
    before = batch.images.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = attack_of(name, norm).run(batch, ShiftContext(model=wrap(net, num_classes=3)), eps=BUDGETS[norm][0])
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert [p.grad is None for p in net.parameters()] == [True] * 5 + [False]
    assert torch.equal(net[5].bias.grad, torch.ones(3))
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * 5
    usual = attack_of(name, norm).run(batch, ShiftContext(model=model), eps=BUDGETS[norm][0])
    assert torch.equal(result.images, usual.images), "the attack sees the model in eval mode"
    assert torch.equal(batch.images, before)
    assert not batch.images.requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_outputs_that_are_not_finite_are_never_a_success(name, norm, value, model, batch):
    clean = batch.images

    def broken(images):
        """Every second image breaks the network as soon as it moves; the first one always does."""
        logits = model.modules()[0](images)
        distance, which = (images[:, None] - clean).flatten(2).abs().amax(2).min(1)
        bad = (distance > 0) & (which % 2 == 0) | (which == 0)
        return torch.where(bad[:, None] & (torch.arange(3) == 1), value, logits)

    eps = BUDGETS[norm][1]
    result = attack_of(name, norm).run(batch, ShiftContext(model=wrap(broken, num_classes=3)), eps=eps)
    right = model.predict(batch).logits.argmax(1) == batch.labels
    even = torch.arange(len(batch)) % 2 == 0
    assert not result.success[even & right].any()
    assert not result.success[0]
    assert torch.isnan(result.margin[0])
    assert torch.isfinite(result.images).all()
    assert torch.equal(result.images[even], clean[even])
    assert result.success[~even & right].any()


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_a_result_belongs_to_its_sample(name, norm, model, batch):
    attack = attack_of(name, norm)
    ctx = ShiftContext(model=model, seed=3)
    eps = attack.eps[0]
    first = attack.run(batch, ctx, eps=eps)
    again = attack.run(batch, ctx, eps=eps)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.margin, again.margin)
    turned = torch.arange(len(batch) - 1, -1, -1)
    other = attack.run(batch.select(turned), ctx, eps=eps)
    assert torch.allclose(other.margin, first.margin[turned], atol=2e-3)
    few = attack.run(batch.select(turned[:5]), ctx, eps=eps)
    assert torch.allclose(few.margin, first.margin[turned[:5]], atol=2e-3)
    elsewhere = attack.run(batch, ShiftContext(model=model, seed=4), eps=eps).images
    assert torch.equal(elsewhere, first.images) != attack.random


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_samples_that_are_wrong_already_stay_clean_and_count(name, norm, model, batch):
    labels = batch.labels.clone()
    labels[:4] = (model.predict(batch).logits.argmax(1)[:4] + 1) % 3
    wrong = Batch(images=batch.images, labels=labels, ids=batch.ids)
    result = attack_of(name, norm).run(wrong, ShiftContext(model=model), eps=BUDGETS[norm][2])
    assert torch.equal(result.images[:4], batch.images[:4])
    assert result.success[:4].all()


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_global_state_is_untouched_and_any_grad_mode_serves(name, norm, model, batch):
    attack = attack_of(name, norm)
    state = torch.get_rng_state()
    plain = attack.run(batch, ShiftContext(model=model), eps=attack.eps[0]).images
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert torch.equal(attack.run(batch, ShiftContext(model=model), eps=attack.eps[0]).images, plain)
    with torch.inference_mode():
        inside = Batch(images=batch.images.clone(), labels=batch.labels.clone(), ids=batch.ids.clone())
        assert torch.equal(attack.run(inside, ShiftContext(model=model), eps=attack.eps[0]).images, plain)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_mistakes_are_named(name, norm, model, batch):
    attack = attack_of(name, norm)
    unlabelled = Batch(images=batch.images, labels=None, ids=batch.ids)
    with pytest.raises(ConfigError, match="labelled batch"):
        attack.run(unlabelled, ShiftContext(model=model), eps=0.1)
    with pytest.raises(ConfigError, match="context with a model"):
        attack.run(batch, ShiftContext(), eps=0.1)
    beyond = Batch(images=batch.images, labels=batch.labels + 1, ids=batch.ids)
    with pytest.raises(LabelError, match="labels from 0 to 2"):
        attack.run(beyond, ShiftContext(model=model), eps=0.1)
    if attack.access == "gradients":
        deaf = wrap(lambda images: model.modules()[0](images.detach()), num_classes=3)
        with pytest.raises(ModelError, match="gradients reach the input"):
            attack.run(batch, ShiftContext(model=deaf), eps=0.1)


# ---- attacks on parameters have no ball; the rest holds for them too


@pytest.fixture(scope="module")
def slides():
    """Images of two stains on an empty slide, 8 bits, and a network that is right on all but four of them."""
    ids = torch.arange(32)
    rng = SampleRng.make(0, "slides", ids)
    amounts = (0.1 + 0.5 * rng.uniform("amounts", (2, 12, 12))) * (0.3 + 1.4 * rng.uniform("slide", (2, 1, 1)))
    images = torch.exp(-torch.einsum("nshw,sc->nchw", amounts, torch.tensor(STAINS[:2], dtype=torch.float32)))
    images[:, :, :3] = 1
    images = (images * 255).round() / 255
    weight = SampleRng.make(1, "weight", torch.arange(3)).normal("w", (3, 1, 4)).repeat_interleave(3, 3)
    weight = (weight + SampleRng.make(2, "weight", torch.arange(3)).normal("w", (3, 12, 12))).flatten(1)
    layer = nn.Linear(432, 3)
    with torch.no_grad():
        layer.weight.copy_(weight / 10)
        layer.bias.copy_(-weight @ images.mean(0).flatten() / 10)
    net = nn.Sequential(nn.Flatten(), layer, nn.Softplus()).eval()
    labels = net(images).argmax(1)
    labels[:4] = (labels[:4] + 1) % 3
    return net, Batch(images=images, labels=labels, ids=ids)


@pytest.mark.parametrize("spec", [None, ImageSpec(3, (12, 12))], ids=["float", "8-bit"])
@pytest.mark.parametrize("name", PARAMETRIC)
def test_parameters_keep_the_promises_that_need_no_ball(name, spec, slides):
    net, batch = slides
    attack = ATTACKS.get(name)(eps=(0.03, 0.06, 0.12))
    ctx = ShiftContext(model=wrap(net, num_classes=3), spec=spec)
    assert attack.norms == ("parameters",)
    assert attack.on(batch, 0, ctx) is batch
    assert torch.equal(attack.run(batch, ctx, eps=0.0).images, batch.images)
    before, state = batch.images.clone(), torch.get_rng_state()
    rates = [4 / 32]
    for severity, eps in attack.budgets:
        with torch.inference_mode():
            result = attack.run(batch, ctx, eps=eps)
        logits = net(result.images).detach()
        assert torch.equal(result.success, logits.argmax(1) != batch.labels)
        assert torch.allclose(result.margin, margin(logits, batch.labels, "multiclass"), atol=1e-5)
        assert torch.equal(attack.on(batch, severity, ctx).images, result.images), "what was judged is what is stored"
        levels = (result.images.double() * 255).round()
        assert spec is None or torch.equal(result.images, (levels / 255).float())
        assert torch.equal(result.images[:4], batch.images[:4])
        assert (result.images[4:] != batch.images[4:]).flatten(1).any(1).all()
        assert 0 <= result.images.min() <= result.images.max() <= 1
        assert {len(value) for value in result.parameters.values()} == {32}
        rates.append(result.success.double().mean().item())
    assert rates == sorted(rates)
    assert rates[0] + 0.1 < rates[-1] < 1
    turned = torch.arange(31, -1, -1)
    other = attack.run(batch.select(turned[:9]), ShiftContext(model=ctx.model, spec=spec, seed=4), eps=eps)
    assert torch.allclose(other.margin, result.margin[turned[:9]], atol=2e-3)
    assert torch.equal(batch.images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("name", PARAMETRIC)
def test_parameters_never_succeed_by_outputs_that_are_not_finite(name, slides):
    net, batch = slides

    def broken(images):
        moved = (images - batch.images).flatten(1).abs().amax(1) > 0
        return torch.where((moved & (torch.arange(32) % 2 == 0))[:, None], torch.nan, net(images))

    attack = ATTACKS.get(name)()
    result = attack.run(batch, ShiftContext(model=wrap(broken, num_classes=3)), eps=max(attack.eps))
    assert not result.success[4::2].any()
    assert torch.equal(result.images[4::2], batch.images[4::2])
    assert result.success[5::2].any()
    assert all(torch.isfinite(value).all() for value in result.parameters.values())
