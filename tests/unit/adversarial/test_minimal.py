"""DDN and FMN: nearest wrong images against closed forms, and what follows from them for budgets."""

import dataclasses

import pytest
import torch
from torch import nn

from corruptions.adversarial import DDN, FMN, PGD
from corruptions.adversarial.minimal import MinimalResult
from corruptions.adversarial.oracle import Oracle
from robustlab.core.errors import ConfigError, RangeError
from robustlab.core.model import wrap
from robustlab.core.registry import ATTACKS
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext
from robustlab.core.spec import from_dict, to_dict
from robustlab.core.types import Batch, ImageSpec
from robustlab.train import seeded_init

COUNT, PIXELS = 48, 36
SPEC = ImageSpec(channels=1, size=(6, 6))
ATTACKS_AND_NORMS = [
    pytest.param(DDN(), id="ddn-l2"),
    pytest.param(FMN(norm="l2", eps=(0.1,)), id="fmn-l2"),
    pytest.param(FMN(), id="fmn-linf"),
]
DUAL = {"l2": 2, "linf": 1}


FAR = {"l2": 0.05, "linf": 0.005}
CLOSE = {"ddn": 1.01, "fmn": 1.001}


def linear(classes, scale=1.0):
    layer = nn.Linear(PIXELS, classes)
    weight = scale * SampleRng.make(7, "weight", torch.arange(classes)).normal("w", (PIXELS,))
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(-0.5 * weight.sum(1))
    return nn.Sequential(nn.Flatten(), layer).eval(), weight


def wavy():
    net = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 32), nn.Tanh(), nn.Linear(32, 4))
    with torch.no_grad():
        net[1].weight.mul_(4)
        net[3].weight.mul_(4)
    return net.eval()


def batch_for(net, seed=0, levels=None, count=COUNT):
    """Images far from 0 and 1, so that the box does not bind, with the labels that the network gives them."""
    images = 0.4 + 0.2 * SampleRng.make(seed, "images", torch.arange(count)).uniform("x", (1, 6, 6))
    if levels:
        images = (images * levels).round() / levels
    with torch.no_grad():
        labels = net(images).argmax(1)
    return Batch(images=images, labels=labels, ids=torch.arange(count))


def lengths(change, norm):
    flat = change.double().flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def optimum(net, weight, batch, norm, beyond=None):
    """Samples farther than ``beyond`` from the nearest class of a linear model, and their distances to it."""
    with torch.no_grad():
        logits = net(batch.images)
    own = logits.gather(1, batch.labels[:, None])
    apart = (weight[batch.labels][:, None] - weight[None]).norm(p=DUAL[norm], dim=2)
    near = ((own - logits) / apart.clamp_min(1e-9)).masked_fill(apart < 1e-6, torch.inf).amin(1)
    far = near > (beyond or FAR[norm])
    assert far.sum() >= 16
    return far, near[far]


@pytest.mark.parametrize("attack", ATTACKS_AND_NORMS)
def test_two_classes_have_the_closed_form_distance(attack):
    net, weight = linear(2)
    batch = batch_for(net)
    result = attack.minimal(batch, ShiftContext(model=wrap(net, num_classes=2)))
    far, near = optimum(net, weight, batch, attack.norm)
    ratio = result.distance[far] / near
    assert torch.isfinite(result.distance).all()
    assert ratio.min() >= 1 - 1e-4, "nothing wrong is nearer than the boundary"
    assert ratio.max() <= CLOSE[attack.name]


@pytest.mark.parametrize("attack", ATTACKS_AND_NORMS)
def test_several_classes_have_the_distance_of_the_nearest_one(attack):
    net, weight = linear(5, scale=50.0)  # confident: the cross-entropy sees one wrong class
    batch = batch_for(net, count=128)
    result = attack.minimal(batch, ShiftContext(model=wrap(net, num_classes=5)))
    far, near = optimum(net, weight, batch, attack.norm)
    ratio = result.distance[far] / near
    assert torch.isfinite(result.distance).all()
    assert ratio.min() >= 1 - 1e-4
    assert ratio.median() <= CLOSE[attack.name]
    assert ratio.quantile(0.9) <= 1.2, "the class that is nearest at first need not be the nearest one"


@pytest.mark.parametrize("thresholds", [(), (0.3, 0.5, 0.8)], ids=["at one half", "thresholds"])
@pytest.mark.parametrize("attack", ATTACKS_AND_NORMS)
def test_several_labels_have_the_distance_of_the_one_that_flips_first(attack, thresholds):
    net, weight = linear(3)
    batch = batch_for(net, count=192)
    at = torch.tensor(thresholds or (0.5,) * 3).logit()
    logits = net(batch.images).detach() - at
    labels = (logits > 0).long()
    labels[::2, 1] = -1
    near = (logits.abs() / weight.norm(p=DUAL[attack.norm], dim=1)).masked_fill(labels < 0, torch.inf).amin(1)
    far = near > FAR[attack.norm]
    ctx = ShiftContext(model=wrap(net, task="multilabel", num_classes=3), thresholds=thresholds)
    result = attack.minimal(Batch(images=batch.images, labels=labels, ids=batch.ids), ctx)
    assert far.sum() >= 12
    assert (result.distance / near)[far].min() >= 1 - 1e-4
    assert (result.distance / near)[far].median() <= CLOSE[attack.name]


@pytest.mark.parametrize("spec", [None, SPEC], ids=["float", "8-bit"])
@pytest.mark.parametrize("attack", ATTACKS_AND_NORMS)
def test_images_are_wrong_as_stored_and_as_far_as_stated(attack, spec):
    net = seeded_init(wavy, 5)
    batch = batch_for(net, levels=255)
    result = attack.minimal(batch, ShiftContext(model=wrap(net, num_classes=4), spec=spec))
    assert torch.isfinite(result.distance).all()
    assert torch.allclose(result.distance.double(), lengths(result.images - batch.images, attack.norm), atol=1e-6)
    assert (net(result.images).argmax(1) != batch.labels).all()
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    grid = (result.images.double() * 255).round()
    assert torch.equal(result.images, (grid / 255).float()) == (spec is not None)


def test_small_changes_of_bytes_cost_little():
    """Changes of about one level: rounding them toward the clean image would lengthen the way by 9 % in the mean."""
    net, weight = linear(2)
    batch = batch_for(net, levels=255, count=160)
    far, near = optimum(net, weight, batch, "l2", beyond=4 / 255)
    small = near < 8 / 255  # a root mean square of 1.3 levels
    result = FMN(norm="l2", eps=(0.1,)).minimal(batch, ShiftContext(model=wrap(net, num_classes=2), spec=SPEC))
    assert small.sum() >= 20
    assert (result.distance[far] / near)[small].mean() < 1.08


@pytest.mark.parametrize("attack", ATTACKS_AND_NORMS)
def test_wrong_on_the_clean_image_is_distance_zero(attack):
    net = seeded_init(wavy, 5)
    batch = batch_for(net)
    labels = batch.labels.clone()
    labels[:5] = (labels[:5] + 1) % 4
    wrong = Batch(images=batch.images, labels=labels, ids=batch.ids)
    result = attack.minimal(wrong, ShiftContext(model=wrap(net, num_classes=4)))
    assert torch.equal(result.distance[:5], torch.zeros(5))
    assert (result.distance[5:] > 0).all()
    assert torch.equal(result.images[:5], batch.images[:5])
    assert result.queries[:5].tolist() == [1] * 5
    assert result.queries[5:].tolist() == [attack.steps + 2] * (COUNT - 5), "the clean image, each step, the last point"
    assert result.curve([0.0]).item() == 1 - 5 / COUNT


@pytest.mark.parametrize("attack", ATTACKS_AND_NORMS)
def test_a_model_that_never_errs_has_no_distance(attack):
    net = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 3)).eval()
    with torch.no_grad():
        net[1].weight.mul_(1e-3)
        net[1].bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    batch = batch_for(net)
    result = attack.minimal(batch, ShiftContext(model=wrap(net, num_classes=3)))
    assert torch.isinf(result.distance).all()
    assert torch.equal(result.images, batch.images)
    assert result.curve([0.1, 1e9]).tolist() == [1.0, 1.0]


def test_a_curve_is_the_share_beyond_each_budget():
    distance = torch.tensor([0.0, 4 / 255, 0.5, torch.inf])
    result = MinimalResult(torch.zeros(4, 1, 1, 1), distance, torch.ones(4, dtype=torch.int64))
    assert result.curve([0.0, 4 / 255, 0.4, 0.5, 100.0]).tolist() == [0.75, 0.5, 0.5, 0.25, 0.25]
    assert result.curve((1.0, 0.0)).tolist() == [0.25, 0.75]
    assert result.curve([0.0]).dtype == torch.float64


@pytest.mark.parametrize("spec", [None, SPEC], ids=["float", "8-bit"])
@pytest.mark.parametrize("attack", ATTACKS_AND_NORMS)
def test_success_at_a_budget_follows_from_the_distance(attack, spec):
    net = seeded_init(wavy, 5)
    batch = batch_for(net, levels=255)
    attack = dataclasses.replace(attack, steps=50)
    ctx = ShiftContext(model=wrap(net, num_classes=4), spec=spec)
    distance = attack.minimal(batch, ctx).distance
    rates = []
    for eps in distance.quantile(torch.tensor([0.1, 0.4, 0.7, 0.95])).tolist():
        result = attack.run(batch, ctx, eps=eps)
        assert lengths(result.images - batch.images, attack.norm).max() <= eps + 1e-6
        assert result.success[distance <= eps].all()
        # beyond the distance the way out of the ball may still meet a wrong image that the path has not seen
        assert (result.success & (distance > eps)).double().mean() <= 0.05
        rates.append(result.success.double().mean().item())
    assert rates == sorted(rates)
    assert rates[0] < 0.3 < 0.9 < rates[-1]


@pytest.mark.parametrize("attack", ATTACKS_AND_NORMS)
def test_agrees_with_pgd_on_a_curved_network(attack):
    net = seeded_init(wavy, 5)
    batch = batch_for(net, count=128)
    ctx = ShiftContext(model=wrap(net, num_classes=4))
    result = attack.minimal(batch, ctx)
    for share in (0.3, 0.7):
        eps = result.distance.quantile(share).item()
        other = PGD(norm=attack.norm, eps=(eps,), restarts=2).run(batch, ctx, eps=eps)
        robust = result.curve([eps]).item()
        assert robust == pytest.approx(1 - share, abs=0.02)
        assert -0.04 < 1 - other.success.double().mean().item() - robust < 0.1


@pytest.mark.parametrize("attack", ATTACKS_AND_NORMS)
def test_a_stopped_search_finds_the_same_with_fewer_passes(attack):
    net = seeded_init(wavy, 5)
    batch = batch_for(net)
    ctx = ShiftContext(model=wrap(net, num_classes=4))
    eps = attack.minimal(batch, ctx).distance.median().item() * 1.2
    full = attack.run(batch, ctx, eps=eps)
    short = attack.run(batch, ctx, eps=eps, stop=True)
    assert torch.equal(short.success, full.success)
    assert 0.4 < full.success.double().mean() < 1
    assert lengths(short.images - batch.images, attack.norm).max() <= eps + 1e-6
    assert short.queries[full.success].double().mean() < 0.8 * full.queries[full.success].double().mean()
    assert (short.queries[~full.success] >= attack.steps).all()


@pytest.mark.parametrize("attack", ATTACKS_AND_NORMS)
def test_the_oracle_looks_only_inside_the_ball(attack, monkeypatch):
    net = seeded_init(wavy, 5)
    batch = batch_for(net)
    ctx = ShiftContext(model=wrap(net, num_classes=4))
    eps = attack.minimal(batch, ctx).distance.median().item()
    seen = []
    look = Oracle._look

    def spy(self, drawn, images, rows):
        seen.append(lengths(images - self.clean[rows], attack.norm).max().item())
        look(self, drawn, images, rows)

    monkeypatch.setattr(Oracle, "_look", spy)
    attack.run(batch, ctx, eps=eps)
    assert max(seen) <= eps + 1e-6
    assert max(seen) > 0.9 * eps


@pytest.mark.parametrize("attack", ATTACKS_AND_NORMS)
def test_a_distance_belongs_to_its_sample(attack):
    net = seeded_init(wavy, 5)
    batch = batch_for(net)
    ctx = ShiftContext(model=wrap(net, num_classes=4))
    whole = attack.minimal(batch, ctx)
    part = torch.tensor([40, 3, 11])
    few = attack.minimal(batch.select(part), ctx)
    assert torch.allclose(few.distance, whole.distance[part], rtol=0.01)
    double = Batch(images=batch.images.double(), labels=batch.labels, ids=batch.ids)
    precise = attack.minimal(double, ShiftContext(model=wrap(lambda x: net(x.float()), num_classes=4)))
    assert precise.images.dtype == precise.distance.dtype == torch.float64
    assert torch.allclose(precise.distance.float(), whole.distance, rtol=0.05)


@pytest.mark.parametrize("attack", [DDN(mask=(0.5, 1)), FMN(mask=(0.5, 1))], ids=["ddn", "fmn"])
def test_nothing_moves_outside_the_mask(attack):
    net = seeded_init(wavy, 5)
    batch = batch_for(net)
    result = attack.minimal(batch, ShiftContext(model=wrap(net, num_classes=4)))
    outside = batch.images < 0.5
    assert torch.equal(result.images[outside], batch.images[outside])
    assert (result.distance < 1).double().mean() > 0.9


@pytest.mark.parametrize("attack", ATTACKS_AND_NORMS)
def test_outputs_that_are_not_finite_are_no_wrong_images(attack):
    net = seeded_init(wavy, 5)
    batch = batch_for(net)
    value = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(COUNT // 3)

    def broken(images):
        """Every image breaks the network as soon as it is darker anywhere."""
        logits = net(images)
        darker = (images < batch.images - 1e-6).flatten(1).any(1)
        return torch.where(darker[:, None] & (torch.arange(4) == 1), value[:, None], logits)

    result = attack.minimal(batch, ShiftContext(model=wrap(broken, num_classes=4)))
    assert torch.isinf(result.distance).all()
    assert torch.equal(result.images, batch.images)


def test_a_given_start_is_used():
    net = seeded_init(wavy, 5)
    batch = batch_for(net)
    ctx = ShiftContext(model=wrap(net, num_classes=4))
    eps = FMN().minimal(batch, ctx).distance.median().item()
    away = (batch.images + eps).clamp(0, 1)
    attack = FMN(steps=1)
    assert not torch.equal(attack.run(batch, ctx, eps=eps, start=away).images, attack.run(batch, ctx, eps=eps).images)


def test_registered_and_round_trip_through_json():
    for name, cls in (("ddn", DDN), ("fmn", FMN)):
        assert ATTACKS.get(name) is cls
        attack = cls(steps=7, gamma=0.1)
        assert from_dict(to_dict(attack)) == attack
    assert DDN().label == "ddn-l2"
    assert FMN().label == "fmn-linf"


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: DDN(norm="linf"), ConfigError, "norm 'l2', got 'linf'"),
        (lambda: FMN(norm="parameters"), ConfigError, "norm 'linf' or 'l2'"),
        (lambda: DDN(steps=0), RangeError, "steps of at least 1"),
        (lambda: FMN(gamma=0.0), RangeError, "gamma between 0 and 1"),
        (lambda: FMN(gamma=1.0), RangeError, "gamma between 0 and 1"),
        (lambda: DDN(first=0.0), RangeError, "positive first length"),
    ],
)
def test_settings_that_make_no_sense_are_refused(build, kind, message):
    with pytest.raises(kind, match=message):
        build()


def test_minimal_needs_labels_and_a_model():
    batch = batch_for(seeded_init(wavy, 5))
    unlabelled = Batch(images=batch.images, labels=None, ids=batch.ids)
    with pytest.raises(ConfigError, match="labelled batch"):
        FMN().minimal(unlabelled, ShiftContext(model=wrap(seeded_init(wavy, 5), num_classes=4)))
    with pytest.raises(ConfigError, match="context with a model"):
        FMN().minimal(batch, ShiftContext())
