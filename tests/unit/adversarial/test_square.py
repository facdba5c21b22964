"""Square: windows, what is accepted, and what a sample's result depends on."""

import itertools
import math

import pytest
import torch
from torch import nn

from corruptions.adversarial import Square
from corruptions.adversarial.losses import margin
from corruptions.adversarial.oracle import Oracle
from corruptions.adversarial.square import _Flat, _Round, pattern, share_after
from robustlab.core.errors import RangeError
from robustlab.core.model import wrap
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch
from robustlab.train import seeded_init

NORMS = ("linf", "l2")
WALKS = {"linf": _Flat, "l2": _Round}


def size(values, norm):
    flat = values.double().flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def drawn(count, shape=(1, 8, 8), low=0.0, high=1.0, seed=0):
    return low + (high - low) * SampleRng.make(seed, "square", torch.arange(count)).uniform("x", shape)


def wavy(shape, classes=4, seed=0):
    def build():
        net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 32), nn.Tanh(), nn.Linear(32, classes))
        with torch.no_grad():
            net[1].weight.mul_(6)
            net[3].weight.mul_(4)
        return net.eval()

    return seeded_init(build, seed)


def predicted(net, images):
    with torch.no_grad():
        return Batch(images=images, labels=net(images).argmax(1), ids=torch.arange(len(images)))


class Watched(nn.Module):
    """A network that remembers what it was asked, and what it said."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.images = []
        self.logits = []
        self.eval()

    def forward(self, images):
        self.images.append(images.clone())
        self.logits.append(self.net(images).detach())
        return self.logits[-1]


def test_shares_are_halved_after_the_stated_numbers_of_proposals():
    ends = (0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001, 6000, 6001, 8000, 8001, 99999)
    halved = [round(math.log2(0.8 / share_after(at, 0.8))) for at in ends]
    assert halved == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9]


@pytest.mark.parametrize(
    ("norm", "share", "shape", "side"),
    [
        ("linf", 0.8, (28, 28), 25),
        ("linf", 0.1, (32, 32), 10),
        ("linf", 0.8, (10, 90), 10),
        ("linf", 0.0001, (28, 28), 1),
        ("l2", 0.8, (28, 28), 25),
        ("l2", 0.1, (32, 32), 11),
        ("l2", 0.0001, (28, 28), 3),
        ("l2", 0.8, (2, 9), 2),
        ("l2", 1.0, (4, 4), 4),
    ],
)
def test_sides_cover_the_share(norm, share, shape, side):
    assert WALKS[norm].side(share, *shape) == side


@pytest.mark.parametrize("side", [1, 2, 3, 5, 6, 11])
def test_pattern_is_two_nested_pyramids_of_opposite_sign_and_unit_length(side):
    values = torch.zeros(side, side, dtype=torch.float64)
    for sign, rows in ((1, range(side // 2)), (-1, range(side // 2, side))):
        half = torch.zeros(len(rows), side, dtype=torch.float64)
        middle = len(rows) // 2, side // 2
        for k in range(side):
            top, left = max(middle[0] - k, 0), max(middle[1] - k, 0)
            if k <= max(len(rows) // 2, side // 2):
                half[top : middle[0] + k + 1, left : middle[1] + k + 1] += 1 / (k + 1) ** 2
        if len(rows):
            values[rows.start : rows.stop] = sign * half / half.norm()
    values /= values.norm()
    assert torch.allclose(pattern(side, torch.zeros(1, dtype=torch.float64)), values)


@pytest.mark.parametrize("norm", NORMS)
def test_windows_start_everywhere_with_equal_chance(norm):
    images = drawn(4000, (1, 6, 9))
    batch = predicted(wavy((1, 6, 9)), images)
    oracle = Oracle(wrap(wavy((1, 6, 9)), num_classes=4), batch, None, eps=0.1, norm=norm)
    oracle.begin()
    rng = SampleRng.make(0, "walk", torch.arange(4000))
    walk = WALKS[norm](oracle, torch.arange(4000), rng, None)
    top, left = walk.corners(rng, "window", [4, 3, 6, 1])
    for corner, extent in ((top, 6), (left, 9)):
        for i, side in enumerate([4, 3, 6, 1]):
            counts = torch.bincount(corner[:, i], minlength=extent).double() / 4000
            expected = torch.zeros(extent).double()
            expected[: extent - side + 1] = 1 / (extent - side + 1)
            assert torch.allclose(counts, expected, atol=0.035)
    pairs = torch.stack((top[:, 3].double(), left[:, 3].double(), top[:, 0].double(), top[:, 1].double()))
    assert (torch.corrcoef(pairs) - torch.eye(4)).abs().max() < 0.07


@pytest.mark.parametrize("norm", NORMS)
def test_windows_are_drawn_anew_all_the_time(norm, monkeypatch):
    net, kind, tops = wavy((1, 30, 30)), WALKS[norm], []
    plain = kind.corners

    def spy(self, rng, label, sides):
        top, left = plain(self, rng, label, sides)
        tops.append((label, top))
        return top, left

    monkeypatch.setattr(kind, "corners", spy)
    attack = Square(norm=norm, eps=(0.01,), queries=192, p_init=1e-4)
    batch = predicted(net, drawn(3, (1, 30, 30)))
    attack.run(batch, ShiftContext(model=wrap(net, num_classes=4)), eps=0.01)
    drawn_tops = [top for _, top in tops]
    assert len(tops) == 3 * len({label for label, _ in tops})
    for one, other in itertools.combinations(drawn_tops, 2):
        assert (one == other).double().mean() < 0.15


def best_before(watched, labels, norm):
    """For each proposal: the image of the smallest margin among the start and the proposals before it."""
    margins = torch.stack([margin(logits, labels, "multiclass") for logits in watched.logits[1:]])
    images = torch.stack(watched.images[1:])
    for at in range(1, len(images)):
        kept = margins[:at].argmin(0)
        yield at - 1, images[kept, torch.arange(len(labels))], images[at]


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 9, 14)])
def test_linf_proposals_set_one_window_of_the_best_image_to_the_ends_of_the_ball(shape):
    watched = Watched(wavy(shape))
    images = drawn(16, shape)
    batch = predicted(watched.net, images)
    eps = 0.05
    Square(eps=(eps,), queries=300).run(batch, ShiftContext(model=wrap(watched, num_classes=4)), eps=eps)
    low, high = (images - eps).clamp(0, 1), (images + eps).clamp(0, 1)
    stripes = (watched.images[1] - images).sign()
    assert (stripes == stripes[:, :, :1]).all()
    assert 0.4 < (stripes > 0).double().mean() < 0.6
    windows, moved = set(), 0
    for at, best, proposal in best_before(watched, batch.labels, "linf"):
        side = _Flat.side(share_after(at, 0.8), *shape[1:])
        changed = proposal != best
        moved += changed.flatten(1).any(1).sum().item()
        for axis in (2, 3):
            other = changed.any(1).any(2 if axis == 2 else 1)
            first = other.long().argmax(1)
            last = shape[axis - 1] - 1 - other.flip(1).long().argmax(1)
            extent = torch.where(other.any(1), last - first + 1, 0)
            assert extent.max() <= side
            windows.add((at, axis, extent.max().item() == side))
        at_end = torch.isclose(proposal, low, atol=1e-6) | torch.isclose(proposal, high, atol=1e-6)
        assert at_end.all()
    assert moved > 1000
    assert sum(full for _, _, full in windows) > 300


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 9, 14)])
def test_l2_proposals_move_length_from_one_window_to_another(shape):
    watched = Watched(wavy(shape))
    images = drawn(16, shape, low=0.3, high=0.7)
    batch = predicted(watched.net, images)
    eps = 0.2
    Square(norm="l2", eps=(eps,), queries=300).run(batch, ShiftContext(model=wrap(watched, num_classes=4)), eps=eps)
    emptied = 0
    for at, best, proposal in best_before(watched, batch.labels, "l2"):
        side = _Round.side(share_after(at, 0.8), *shape[1:])
        before, after = best - images, proposal - images
        assert torch.allclose(size(after, "l2"), torch.full((16,), eps).double(), rtol=1e-4)
        changed = ~torch.isclose(before, after, rtol=1e-4, atol=1e-6)
        assert changed.flatten(2).sum(2).max() <= 2 * side * side
        # nothing, where both windows are empty
        assert changed.flatten(1).any(1).double().mean() > 0.6
        emptied += ((after.abs() < 1e-7) & (before.abs() > 1e-4)).flatten(1).any(1).sum().item()
    assert emptied > 500


def test_the_window_of_an_l2_proposal_is_its_old_content_and_the_pattern():
    shape, eps, side = (2, 9, 11), 0.4, 5
    images = drawn(12, shape, low=0.4, high=0.6)
    oracle = Oracle(wrap(wavy(shape), num_classes=4), predicted(wavy(shape), images), None, eps=eps, norm="l2")
    oracle.begin()
    rng = SampleRng.make(0, "walk", torch.arange(12))
    walk = _Round(oracle, torch.arange(12), rng, None)
    walk.images = images + 0.9 * (walk.images - images)  # leaves a part of the budget
    corners = [walk.corners(rng, label, [side]) for label in ("one", "two")]
    filled, emptied = (walk._places(top[:, 0], left[:, 0], side) for top, left in corners)
    signs = rng.sign("signs", (2, 1))
    moved = walk._moved(filled, emptied, pattern(side, images).flatten() * signs)
    for i in range(12):
        (a, b), (c, d) = ((top[i, 0].item(), left[i, 0].item()) for top, left in corners)
        delta = (walk.images - images)[i].double()
        spare = max(eps**2 - delta.square().sum().item(), 0) / 2
        both = torch.zeros(9, 11, dtype=torch.bool)
        both[a : a + side, b : b + side] = both[c : c + side, d : d + side] = True
        new = torch.zeros(2, side, side).double()
        for channel in range(2):
            old = delta[channel, a : a + side, b : b + side]
            new[channel] = signs[i, channel] * pattern(side, delta) + old / old.norm()
            new[channel] *= (spare + delta[channel][both].square().sum()).sqrt() / new[channel].norm()
        delta[:, c : c + side, d : d + side] = 0
        delta[:, a : a + side, b : b + side] = new
        assert torch.allclose((moved - images)[i].double(), eps * delta / delta.norm(), atol=1e-6)


def test_a_change_is_kept_only_if_the_margin_falls():
    """The label's lead falls with one pixel, whatever happens elsewhere: in the end that pixel is at its upper end."""
    images = torch.full((6, 1, 7, 7), 0.5)
    asked = []

    def scripted(images):
        asked.append(images[:, 0, 4, 2].clone())
        return torch.stack((torch.full((len(images),), 0.8), images[:, 0, 4, 2]), 1)

    batch = Batch(images=images, labels=torch.zeros(6, dtype=torch.int64), ids=torch.arange(6))
    attack = Square(eps=(0.1,), queries=200)
    result = attack.run(batch, ShiftContext(model=wrap(scripted, num_classes=2)), eps=0.1)
    values = torch.stack(asked[1:])
    assert torch.allclose(values.amax(0), torch.full((6,), 0.6))
    assert (values.amin(0) < 0.45).all()
    assert torch.allclose(result.images[:, 0, 4, 2], torch.full((6,), 0.6))
    assert torch.allclose(result.margin, torch.full((6,), 0.2))
    assert not result.success.any()
    # once at its upper end the pixel only leaves it inside proposals, which are refused
    reached = values.cummax(0).values > 0.59
    assert (values[1:][reached[:-1]] > 0.59).double().mean() > 0.7


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 12, 20), (3, 20, 12), (1, 3, 3), (2, 1, 1), (1, 2, 7), (1, 5, 31)])
def test_any_size_stays_inside_ball_and_box_and_gets_somewhere(norm, shape):
    net = wavy(shape)
    batch = predicted(net, drawn(24, shape))
    eps = 0.15 if norm == "linf" else 0.15 * math.sqrt(math.prod(shape))
    attack = Square(norm=norm, eps=(eps,), queries=150)
    watched = Watched(net)
    result = attack.run(batch, ShiftContext(model=wrap(watched, num_classes=4)), eps=eps)
    for images in watched.images:
        assert size(images - batch.images, norm).max() <= eps * (1 + 1e-5)
        assert images.min() >= 0
        assert images.max() <= 1
    start, clean = (margin(watched.logits[at], batch.labels, "multiclass") for at in (1, 0))
    assert result.margin.mean() < start.mean() - 0.1 * clean.mean()
    assert result.success.double().mean() > 0.2


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 12, 20), (1, 33, 27)])
def test_l2_starts_from_tiles_of_the_pattern(shape):
    images = torch.full((40, *shape), 0.5)
    net = wavy(shape)
    oracle = Oracle(wrap(net, num_classes=4), predicted(net, images), None, eps=0.7, norm="l2")
    oracle.begin()
    rng = SampleRng.make(0, "walk", torch.arange(40))
    delta = _Round(oracle, torch.arange(40), rng, None).first(rng) - images
    assert torch.allclose(size(delta, "l2"), torch.full((40,), 0.7).double(), rtol=1e-4)
    side = min(shape[1:]) // 5
    down, across = (extent // side for extent in shape[1:])
    top, left = ((extent % side) // 2 for extent in shape[1:])
    tiles = delta[:, :, top : top + down * side, left : left + across * side]
    assert torch.allclose(size(tiles, "l2"), size(delta, "l2"))
    tiles = tiles.reshape(40, shape[0], down, side, across, side).transpose(3, 4)
    tiles = tiles / tiles.square().sum((4, 5), keepdim=True).sqrt()
    shapes = torch.stack([sign * each for sign in (1, -1) for each in (pattern(side, images), pattern(side, images).T)])
    fits = torch.stack([(tiles - each).abs().amax((4, 5)) < 1e-3 for each in shapes])
    assert fits.any(0).all()
    assert (fits.double().flatten(1).mean(1) > 0.15).all()
    assert not (fits[:, 0] == fits[:, 1]).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("stop", [False, True])
def test_a_result_does_not_depend_on_the_batch(norm, stop):
    shape = (2, 6, 7)
    weight = SampleRng.make(1, "weight", torch.arange(1)).normal("w", (3, *shape))[0].double()

    def net(images):
        # summed so that no kernel choice depends on the batch
        return torch.stack([(torch.sin(9 * images) * row).flatten(1).cumsum(1)[:, -1] for row in weight], 1)

    images = drawn(20, shape).double()
    batch = predicted(net, images)
    model = wrap(net, num_classes=3)
    eps = 0.01 if norm == "linf" else 0.08
    attack = Square(norm=norm, eps=(eps,), queries=150)
    full = attack.run(batch, ShiftContext(model=model, seed=7), eps=eps, stop=stop)
    assert 0 < full.success.double().mean() < 1
    some = torch.tensor([17, 3, 4, 11])
    few = attack.run(batch.select(some), ShiftContext(model=model, seed=7), eps=eps, stop=stop)
    assert torch.equal(few.images, full.images[some])
    assert torch.equal(few.queries, full.queries[some])
    other = attack.run(batch, ShiftContext(model=model, seed=8), eps=eps, stop=stop)
    assert not torch.equal(other.images, full.images)


@pytest.mark.parametrize("norm", NORMS)
def test_more_proposals_continue_the_search(norm):
    net = wavy((1, 8, 8))
    batch = predicted(net, drawn(48))
    model = wrap(net, num_classes=4)
    eps = 0.06 if norm == "linf" else 0.35
    results = [
        Square(norm=norm, eps=(eps,), queries=queries).run(batch, ShiftContext(model=model), eps=eps)
        for queries in (1, 40, 70, 300)
    ]
    for few, more in itertools.pairwise(results):
        assert (more.margin <= few.margin).all()
        assert (more.margin < few.margin).any()
        assert (more.success | ~few.success).all()
    assert results[-1].success.sum() > results[0].success.sum() + 5


@pytest.mark.parametrize("norm", NORMS)
def test_stopping_early_leaves_wrong_samples_alone(norm):
    net = wavy((1, 8, 8))
    batch = predicted(net, drawn(48))
    model = wrap(net, num_classes=4)
    eps = 0.06 if norm == "linf" else 0.35
    attack = Square(norm=norm, eps=(eps,), queries=400)
    full = attack.run(batch, ShiftContext(model=model), eps=eps)
    short = attack.run(batch, ShiftContext(model=model), eps=eps, stop=True)
    assert 0.2 < full.success.double().mean() < 0.95
    assert full.queries.unique().tolist() == [402]
    assert torch.equal(short.success, full.success)
    assert torch.equal(short.margin[~full.success], full.margin[~full.success])
    assert (short.queries[~full.success] == 402).all()
    assert (short.queries[full.success] < 402).double().mean() > 0.8
    assert short.queries[full.success].unique().remainder(64).unique().tolist() in ([2], [2, 402 % 64])
    assert full.margin[full.success].mean() < short.margin[full.success].mean()


def test_needs_no_gradients_and_takes_a_start_and_a_mask():
    net = wavy((1, 8, 8))
    images = drawn(32)
    batch = predicted(net, images)
    watched = Watched(net)
    ctx = ShiftContext(model=wrap(watched, num_classes=4))
    assert Square.access == "scores"
    for norm, eps in (("linf", 0.1), ("l2", 0.6)):
        attack = Square(norm=norm, eps=(eps,), queries=100, mask=(0.5, 1.0))
        watched.images.clear()
        result = attack.run(batch, ctx, eps=eps, start=images + 0.01)
        assert torch.allclose(watched.images[1], torch.where(images >= 0.5, (images + 0.01).clamp(0, 1), images))
        moved = result.images != images
        assert not moved[images < 0.5].any()
        assert moved[images > 0.5].double().mean() > 0.6
        assert result.success.any()
        assert size(result.images - images, norm).max() > 0.9 * eps


def test_several_labels_are_searched_too():
    net = wavy((1, 8, 8))
    images = drawn(32)
    with torch.no_grad():
        labels = (net(images) > 0).long()
    batch = Batch(images=images, labels=labels, ids=torch.arange(32))
    model = wrap(net, task="multilabel", num_classes=4)
    result = Square(eps=(0.05,), queries=100).run(batch, ShiftContext(model=model), eps=0.05)
    with torch.no_grad():
        assert torch.equal(result.success, ((net(result.images) > 0).long() != labels).any(1))
    assert result.success.double().mean() > 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": 0}, "queries of at least 1"),
        ({"p_init": 0.0}, "p_init above 0, at most 1"),
        ({"p_init": 1.5}, "p_init above 0, at most 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(RangeError, match=message):
        Square(**arguments)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_windows_of_the_authors_spare_the_last_row_and_column(norm):
    images = torch.full((6, 1, 12, 12), 0.5)
    model = wrap(lambda x: x.flatten(1)[:, :2], num_classes=2)
    batch = Batch(images, torch.zeros(6).long(), torch.arange(6))
    oracle = Oracle(model, batch, None, eps=0.1, norm=norm)
    walk = (_Flat if norm == "linf" else _Round)(oracle, torch.arange(6), SampleRng.make(0, "w", torch.arange(6)), None)
    for edges, last in ((True, 9), (False, 8)):
        walk.edges = edges
        found = torch.stack([torch.stack(walk.corners(walk.rng.child(i), "window", [3] * 60)) for i in range(8)])
        assert (found.min().item(), found.max().item()) == (0, last)
    walk.edges = False
    assert torch.stack(walk.corners(walk.rng, "window", [12])).max() == 0
