"""FAB: projections against SciPy, closed-form distances of linear models, and what counts as found."""

import pytest
import torch
from scipy import optimize
from torch import nn

from corruptions.adversarial import FAB
from corruptions.adversarial.fab import Approach, to_plane
from corruptions.adversarial.losses import margin
from corruptions.adversarial.oracle import Oracle
from robustlab.core.errors import RangeError
from robustlab.core.model import wrap
from robustlab.core.registry import ATTACKS
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch, ImageSpec
from robustlab.train import seeded_init

NORMS = ("linf", "l2")


def size(values, norm):
    flat = values.double().flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def dual(values, norm):
    flat = values.double().flatten(1)
    return flat.abs().sum(1) if norm == "linf" else flat.norm(dim=1)


def drawn(count, shape=(1, 6, 6), low=0.35, high=0.65, seed=0):
    rng = SampleRng.make(seed, "fab", torch.arange(count))
    return low + (high - low) * rng.uniform("x", shape)


def linear(classes, seed=0):
    return seeded_init(lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, classes)), seed).eval()


def wavy():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.Tanh(), nn.Linear(32, 4))
    with torch.no_grad():
        net[1].weight.mul_(8)
        net[3].weight.mul_(4)
    return net.eval()


def predicted(net, images, classes, task="multiclass"):
    labels = net(images).argmax(1).detach()
    return Batch(images=images, labels=labels, ids=torch.arange(len(images))), wrap(net, num_classes=classes)


def oracle_of(model, batch, norm, eps=0.02, spec=None):
    oracle = Oracle(model, batch, spec, eps=eps, norm=norm)
    oracle.begin()
    return oracle


def distances(net, batch, norm):
    """Exact distances of a linear model to each class (N, C), infinity for the label's own."""
    weight, logits = net[1].weight.detach().double(), net(batch.images).detach().double()
    own = torch.arange(len(batch)), batch.labels
    gap = logits[own][:, None] - logits
    steep = torch.stack([dual(weight[batch.labels] - row, norm) for row in weight], 1)
    return (gap / steep).scatter(1, batch.labels[:, None], torch.inf)


def shortest(point, slope, value, norm):
    """The same problem by SciPy: the norm of the shortest move."""
    n = len(point)
    if norm == "linf":
        ends = torch.cat((torch.eye(n), -torch.eye(n))).double()
        rows = torch.cat((ends, -torch.ones(2 * n, 1).double()), 1)
        found = optimize.linprog(
            [0.0] * n + [1.0],
            A_ub=rows.numpy(),
            b_ub=[0.0] * 2 * n,
            A_eq=torch.cat((slope, torch.zeros(1).double()))[None].numpy(),
            b_eq=[-value],
            bounds=[(-p, 1 - p) for p in point.tolist()] + [(0, None)],
        )
        return found.fun
    found = optimize.minimize(
        lambda d: d @ d,
        torch.zeros(n).double().numpy(),
        jac=lambda d: 2 * d,
        bounds=[(-p, 1 - p) for p in point.tolist()],
        constraints={"type": "eq", "fun": lambda d: value + slope.numpy() @ d, "jac": lambda d: slope.numpy()},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.fun**0.5


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_the_shortest_move_in_the_box(norm):
    rng = SampleRng.make(0, "planes", torch.arange(24))
    points = rng.uniform("points", (1, 3, 4)).double()
    slope = rng.normal("slope", (1, 3, 4)).double()
    slope[:, :, 0, 0] = 0.0
    # from close planes to those that only the corners of the box reach
    share = torch.linspace(0.02, 0.98, 24).double()
    reach = (slope.abs() * torch.where(slope > 0, points, 1 - points)).flatten(1).sum(1)
    value = torch.where(torch.arange(24) % 2 == 0, 1.0, -1.0) * share * reach
    value[1::2] = -0.5 * share[1::2]
    moves = to_plane(points, slope, value, norm)
    assert (value + (slope * moves).flatten(1).sum(1)).abs().max() < 1e-12
    assert (points + moves).min() > -1e-12
    assert (points + moves).max() < 1 + 1e-12
    assert (moves[:, :, 0, 0] == 0).all()
    best = [shortest(p.flatten(), s.flatten(), v.item(), norm) for p, s, v in zip(points, slope, value, strict=True)]
    assert torch.allclose(size(moves, norm), torch.tensor(best).double(), rtol=1e-6)
    bound = ((points + moves).abs() < 1e-9) | ((points + moves - 1).abs() < 1e-9)
    assert bound.flatten(1).any(1).sum() > 8


@pytest.mark.parametrize("norm", NORMS)
def test_projection_on_a_plane_out_of_reach_uses_all_rooms(norm):
    points, slope = drawn(6), drawn(6, low=-1, high=1, seed=1)
    slope[:, :, 2] = 0.0
    moves = to_plane(points, slope, torch.tensor([1e3, -1e3, 1e30, -1e30, 40.0, -40.0]), norm)
    up = torch.tensor([-1.0, 1.0]).repeat(3).view(6, 1, 1, 1) * slope.sign()
    assert torch.allclose(points + moves, torch.where(up == 0, points, (up + 1) / 2))
    spread = (SampleRng.make(0, "planes", torch.arange(6)).normal("size", (1, 6, 6)) * 6).exp()
    just = (spread * points).flatten(1).sum(1) * 1.00001
    assert (to_plane(points, spread, just, norm) == -points).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_is_exact_for_gradients_of_any_scale_and_spread(norm, dtype):
    """Weights over ten orders of magnitude make Newton's method change its set of free pixels often."""
    rng = SampleRng.make(0, "planes", torch.arange(200))
    points = rng.uniform("points", (1, 8, 8)).to(dtype)
    slope = (rng.normal("size", (1, 8, 8)) * 4).exp().to(dtype) * rng.sign("sign", (1, 8, 8)).to(dtype)
    reach = (slope.abs() * torch.where(slope > 0, points, 1 - points)).flatten(1).sum(1)
    value = rng.uniform("share").to(dtype) * reach
    moves = to_plane(points, slope, value, norm)
    left = (value.double() + (slope.double() * moves.double()).flatten(1).sum(1)) / value.double()
    assert left.abs().max() < (2e-6 if dtype == torch.float32 else 1e-12)
    assert torch.allclose(to_plane(points, slope * 1e-25, value * 1e-25, norm), moves, atol=1e-5)
    assert (to_plane(points, slope * 0, value * 0, norm) == 0).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3])
def test_linear_models_are_left_at_the_closed_form_distance(norm, classes):
    net = linear(classes)
    batch, model = predicted(net, drawn(40, low=0.45, high=0.55), classes)
    exact = distances(net, batch, norm)
    ranked = net(batch.images).sort(dim=1, descending=True).indices[:, 1:]
    for place in range(classes - 1):
        run = Approach(
            oracle_of(model, batch, norm), torch.arange(40), batch.images, ranked[:, place], FAB(), stop=False
        )
        run.run()
        found = run.distance.flatten().double()
        free = ((run.nearest > 0) & (run.nearest < 1)).flatten(1).all(1)
        assert free.sum() > 35, "the box does not bind"
        assert (net(run.nearest).argmax(1) != batch.labels).all()
        assert torch.allclose(size(run.nearest - batch.images, norm), found, rtol=1e-5)
        assert (found >= exact.amin(1) * (1 - 1e-4)).all()
        aimed = exact.gather(1, ranked[:, place, None]).squeeze(1)
        # on the way to a far class the point may be wrong by a nearer one
        assert (found <= aimed * (1 + 1e-3))[free].all()


@pytest.mark.parametrize("norm", NORMS)
def test_success_is_a_distance_within_the_budget_and_margins_are_those_of_the_sphere(norm):
    net = linear(3, seed=1)
    batch, model = predicted(net, drawn(100, seed=2), 3)
    exact = distances(net, batch, norm).amin(1)
    eps = exact.median().item()
    sure = (exact / eps - 1).abs() > 1e-3
    assert sure.sum() > 90
    result = FAB(norm=norm, eps=(eps,)).run(batch, ShiftContext(model=model), eps=eps)
    assert torch.equal(result.success[sure], (exact <= eps)[sure])
    assert size(result.images - batch.images, norm).max() <= eps * (1 + 1e-5)
    # of a linear model the smallest margin in the ball is known too
    logits, weight = net(batch.images).detach().double(), net[1].weight.detach().double()
    gap = logits.gather(1, batch.labels[:, None]) - logits
    lowest = torch.stack([gap[:, c] - eps * dual(weight[batch.labels] - weight[c], norm) for c in range(3)], 1)
    lowest = lowest.scatter(1, batch.labels[:, None], torch.inf).amin(1)
    assert torch.allclose(result.margin.double(), lowest, atol=2e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_without_refinement_only_what_the_steps_found_inside_the_ball_counts(norm):
    net = linear(2, seed=1)
    batch, model = predicted(net, drawn(100, seed=2), 2)
    exact = distances(net, batch, norm).amin(1)
    attack = FAB(norm=norm, refine=False)
    run = Approach(oracle_of(model, batch, norm), torch.arange(100), batch.images, 1 - batch.labels, attack, stop=False)
    run.run()
    found = run.distance.flatten().double()
    over = found / exact - 1
    assert (over.median() - 0.0053).abs() < 1e-3, "of the overshoot eta, on a linear model"
    eps = found.median().item()
    result = attack.run(batch, ShiftContext(model=model), eps=eps)
    sure = (found / eps - 1).abs() > 1e-5
    assert torch.equal(result.success[sure], (found <= eps)[sure])
    assert torch.equal(result.images[~result.success], batch.images[~result.success])
    moved = size(result.images - batch.images, norm)[result.success]
    assert torch.allclose(moved, found[result.success], rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_distance_is_that_of_the_plane_where_the_box_binds(norm):
    net = linear(2, seed=3)
    images = drawn(60, low=0.0, high=1.0, seed=3)
    images = torch.where(images < 0.4, images * 0.02, torch.where(images > 0.6, 1 - (1 - images) * 0.02, images))
    batch, model = predicted(net, images, 2)
    logits = net(images).detach()
    other = 1 - batch.labels
    value = (logits.gather(1, other[:, None]) - logits.gather(1, batch.labels[:, None])).squeeze(1).double()
    slope = (net[1].weight[other] - net[1].weight[batch.labels]).detach().view(images.shape).double()
    exact = size(to_plane(images.double(), slope, value, norm), norm)
    free = value.abs() / dual(slope, norm)
    assert (exact > 1.1 * free).double().mean() > 0.5
    run = Approach(oracle_of(model, batch, norm), torch.arange(60), images, other, FAB(steps=200), stop=False)
    run.run()
    assert torch.allclose(run.distance.flatten().double(), exact, rtol=5e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_stopping_early_finds_the_same_samples_with_fewer_passes(norm):
    net = seeded_init(wavy, 5)
    batch, model = predicted(net, drawn(48, low=0, high=1), 4)
    eps = 0.03 if norm == "linf" else 0.12
    attack, ctx = FAB(norm=norm, eps=(eps,), steps=40), ShiftContext(model=model)
    full = attack.run(batch, ctx, eps=eps)
    assert 0.2 < full.success.double().mean() < 0.9
    short = attack.run(batch, ctx, eps=eps, stop=True)
    assert torch.equal(short.success, full.success)
    assert (short.queries[full.success] < full.queries[full.success] / 2).all()
    assert (short.queries[full.success] < 2 * 40).any(), "dropped on the way"
    assert torch.equal(short.queries[~full.success], full.queries[~full.success])
    # the clean images twice; two passes a step, the halvings, and two points at the end, for each of three targets
    assert full.queries.unique().tolist() == [2 + 3 * (2 * 40 + 12 + 2)]


@pytest.mark.parametrize("norm", NORMS)
def test_finds_at_least_what_gradient_steps_find(norm):
    net = seeded_init(wavy, 5)
    batch, model = predicted(net, drawn(48, low=0, high=1), 4)
    eps = 0.03 if norm == "linf" else 0.12
    ctx = ShiftContext(model=model)
    steps = ATTACKS.get("apgd-t")(norm=norm, eps=(eps,)).run(batch, ctx, eps=eps)
    found = FAB(norm=norm, eps=(eps,), steps=50).run(batch, ctx, eps=eps)
    assert (found.success & ~steps.success).sum() + 1 >= (steps.success & ~found.success).sum()


def test_only_restarts_and_given_starts_depend_on_random_numbers():
    net = seeded_init(wavy, 5)
    batch, model = predicted(net, drawn(32, low=0, high=1), 4)

    def margins(seed, start=None, **arguments):
        attack = FAB(eps=(0.03,), steps=10, **arguments)
        return attack.run(batch, ShiftContext(model=model, seed=seed), eps=0.03, start=start).margin

    one, two = margins(0), margins(0, restarts=2)
    assert torch.equal(one, margins(1))
    assert (two <= one).all()
    assert (two < one).any()
    assert not torch.equal(two, margins(1, restarts=2))
    assert not torch.equal(one, margins(0, start=(batch.images + 0.03).clamp(0, 1)))
    assert torch.equal(one, margins(0, start=batch.images))


@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_wrong_image_is_kept_and_the_search_goes_back_from_wrong_ones(norm):
    net = seeded_init(wavy, 5)
    batch, model = predicted(net, drawn(48, low=0, high=1), 4)
    targets = net(batch.images).sort(dim=1, descending=True).indices[:, 1]
    run = Approach(oracle_of(model, batch, norm), torch.arange(48), batch.images, targets, FAB(), stop=False)
    nearest, later = torch.full((48,), torch.inf).double(), torch.zeros(48, dtype=torch.bool)
    for _ in range(25):
        run._move()
        images = run.images.clone()
        run._keep()
        wrong, length = net(images).argmax(1) != batch.labels, size(images - batch.images, norm)
        later |= wrong & (length > nearest)
        nearest = torch.where(wrong, torch.minimum(length, nearest), nearest)
        assert torch.equal(run.images[~wrong], images[~wrong])
        assert torch.allclose(size(run.images - batch.images, norm)[wrong], 0.9 * length[wrong], rtol=1e-4)
    assert torch.allclose(run.distance.flatten().double(), nearest, rtol=1e-6)
    assert torch.allclose(size(run.nearest - batch.images, norm), nearest, rtol=1e-6)
    assert later.sum() > 20


def test_more_targets_find_more():
    net = seeded_init(wavy, 5)
    batch, model = predicted(net, drawn(48, low=0, high=1), 4)
    margins = [
        FAB(eps=(0.03,), steps=15, targets=targets).run(batch, ShiftContext(model=model), eps=0.03).margin
        for targets in (1, 2, 3, 9)
    ]
    assert (margins[1] <= margins[0]).all()
    assert (margins[2] < margins[0]).any()
    assert torch.equal(margins[2], margins[3])


@pytest.mark.parametrize("norm", NORMS)
def test_images_with_a_bit_depth_are_judged_as_stored(norm):
    """Just behind the boundary, rounding toward the clean image leads back; the end of the ball does not."""
    net = linear(2, seed=4)
    images = (drawn(100, seed=4) * 255).round() / 255
    batch, model = predicted(net, images, 2)
    exact = distances(net, batch, norm).amin(1)
    eps = 5 / 255 if norm == "linf" else 1.25 * exact.median().item()
    ctx = ShiftContext(model=model, spec=ImageSpec(channels=1, size=(6, 6)))
    result = FAB(norm=norm, eps=(eps,)).run(batch, ctx, eps=eps)
    assert torch.allclose(result.images * 255, (result.images * 255).round(), atol=1e-3)
    assert torch.equal(result.success, net(result.images).argmax(1) != batch.labels)
    reached = exact <= (eps - 1e-4 if norm == "linf" else 0.8 * eps)
    assert 10 < reached.sum() < 90
    assert result.success[reached].all()


def test_several_labels_are_left_at_the_distance_of_the_closest():
    net = linear(5, seed=6)
    with torch.no_grad():
        net[1].weight.mul_(10)
    images = drawn(50, seed=6)
    labels = (net(images) > 0).long()
    labels[:, 4] = -1
    batch = Batch(images=images, labels=labels, ids=torch.arange(50))
    logits, weight = net(images).detach().double(), net[1].weight.detach().double()
    exact = (logits.abs() / dual(weight, "l2"))[:, :4].amin(1)
    eps = exact.median().item()
    sure = (exact / eps - 1).abs() > 1e-3
    model = wrap(net, task="multilabel", num_classes=5)
    result = FAB(norm="l2", eps=(eps,), steps=30).run(batch, ShiftContext(model=model), eps=eps)
    assert torch.equal(result.success[sure], (exact <= eps)[sure])


def test_a_mask_is_kept():
    net = linear(2, seed=1)
    images = drawn(40, low=0, high=1, seed=1)
    batch, model = predicted(net, images, 2)
    result = FAB(eps=(0.2,), restarts=2, mask=(0.5, 1.0)).run(batch, ShiftContext(model=model), eps=0.2)
    moved = result.images != images
    assert not moved[images < 0.5].any()
    assert moved[images > 0.5].double().mean() > 0.9
    assert result.success.any()


def test_a_flat_model_is_never_fooled():
    flat = wrap(lambda images: images.sum((1, 2, 3))[:, None] * 0 + torch.tensor([2.0, 1.0]), num_classes=2)
    images = drawn(5)
    batch = Batch(images=images, labels=torch.zeros(5, dtype=torch.int64), ids=torch.arange(5))
    result = FAB(eps=(0.1,), steps=5, restarts=2).run(batch, ShiftContext(model=flat), eps=0.1)
    assert not result.success.any()
    assert torch.equal(result.images, images)
    assert (result.margin == 1).all()


def test_double_precision_is_kept():
    net = linear(2, seed=1).double()
    images = drawn(20).double()
    batch, model = predicted(net, images, 2)
    run = Approach(oracle_of(model, batch, "l2"), torch.arange(20), images, 1 - batch.labels, FAB(), stop=False)
    run.run()
    assert run.nearest.dtype == torch.float64
    assert (margin(net(run.nearest), batch.labels, "multiclass") < 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps of at least 1"),
        ({"restarts": 0}, "restarts of at least 1"),
        ({"targets": 0}, "targets of at least 1"),
        ({"alpha_max": 1.1}, "alpha_max from 0 to 1"),
        ({"beta": -0.1}, "beta from 0 to 1"),
        ({"eta": 0.9}, "eta of 1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(RangeError, match=message):
        FAB(**arguments)
