import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustlab.core.errors import ConfigError, RangeError, ShapeError
from robustlab.metrics.states import MAX_ROWS, Bins, Confusion, Grid, Moments, answers

FEW = settings(max_examples=40, deadline=None)
PRICKLY = [
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    2.0**-16,
    -(2.0**-16),
    1.0,
    1.0 + 2.0**-23,
    65535.9,
    65536.0,
    1e30,
    np.inf,
    -np.inf,
]


def rows(seed, n=400, channels=3, groups=4):
    """Rows of everything that a state may meet, but for what it refuses."""
    rng = np.random.default_rng(seed)
    p = rng.choice([rng.random((n, channels)), rng.integers(0, 11, (n, channels)) / 10, np.ones((n, channels))])
    p = np.where(rng.random(p.shape) < 0.05, np.nan, p)
    y = rng.integers(-1, 2, p.shape)
    code = rng.integers(-1, groups, n)
    return torch.from_numpy(p), torch.from_numpy(y), torch.from_numpy(code)


def _confusion(p, y, code):
    return (y[:, 0] + 2 * (y[:, 1] > 0)).clamp_max(2), y[:, 2] + (y[:, 1] > 0), code


def _scores(p, y, code):
    return torch.where(y == 0, 30 * (p - 0.7), p), y, code


def _values(p, y, code):
    return torch.where(y[:, 0] > 0, -1e9 * p[:, 0], 7 * p[:, 0]), code


KINDS = {
    "confusion": (lambda device: Confusion.empty(3, groups=4, device=device), _confusion),
    "bins": (lambda device: Bins.empty(channels=3, groups=4, device=device), lambda *a: a),
    "signed-log": (lambda device: Grid.signed_log(64, channels=3, groups=4, device=device), _scores),
    "linear": (lambda device: Grid.linear(-8, 8, 41, channels=3, groups=4, device=device), _scores),
    "moments": (lambda device: Moments.empty(4, device=device), _values),
}


def filled(kind, parts, device="cpu"):
    make, arrange = KINDS[kind]
    state = make(device)
    for part in parts:
        state.update(*(value.to(device) for value in arrange(*part)))
    return state


def split(made, cuts):
    ends = [0, *sorted(cuts), len(made[0])]
    return [tuple(value[a:b] for value in made) for a, b in itertools.pairwise(ends)]


def same(a, b):
    first, second = a.to_dict(), b.to_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value.cpu(), second[name].cpu()), name


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 400), max_size=4), data=st.data())
def test_any_split_order_and_merge_give_the_same_bits(kind, seed, cuts, data):
    made = rows(seed)
    whole = filled(kind, [made])
    order = torch.from_numpy(np.random.default_rng(seed).permutation(400))
    shuffled = tuple(value[order] for value in made)
    same(filled(kind, [shuffled]), whole)
    same(filled(kind, split(made, cuts)), whole)
    shards = [filled(kind, [part]) for part in split(shuffled, cuts)]
    shards = data.draw(st.permutations(shards))
    total = shards[0]
    for shard in shards[1:]:
        total = total.merge(shard)
    same(total, whole)
    same(shards[0].merge(shards[-1]), shards[-1].merge(shards[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_merge_leaves_both_sides_and_refuses_other_layouts(kind):
    a, b = (filled(kind, [rows(seed)]) for seed in (1, 2))
    before = {name: value.clone() for name, value in a.to_dict().items()}
    a.merge(b)
    assert all(torch.equal(value, before[name]) for name, value in a.to_dict().items())
    with pytest.raises(ConfigError, match="layout"):
        a.merge(Confusion.empty(7))


def test_grids_of_the_same_size_but_other_edges_do_not_merge():
    grid = Grid.linear(-8, 8, 64)
    for other in (Grid.linear(-8, 9, 64), Grid.signed_log(64)):
        with pytest.raises(ConfigError, match="layout"):
            grid.merge(other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_shard_goes_on_where_it_was(kind, tmp_path):
    first, second = split(rows(5), [123])
    torch.save(filled(kind, [first]).to_dict(), tmp_path / "shard.pt")
    make, arrange = KINDS[kind]
    loaded = type(make("cpu")).from_dict(torch.load(tmp_path / "shard.pt", weights_only=True))
    loaded.update(*arrange(*second))
    same(loaded, filled(kind, [first, second]))
    with pytest.raises(ConfigError, match="own class"):
        (Moments if kind != "moments" else Bins).from_dict(loaded.to_dict())


def test_a_linear_grid_keeps_its_edges_when_saved():
    grid = Grid.linear(-0.1, 0.3, 100)
    again = Grid.from_dict(grid.to_dict())
    assert (again.low, again.high) == (-0.1, 0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_of_a_long_update_change_nothing(kind):
    n = (1 << 16) + 77
    made = rows(3, n=n)
    same(filled(kind, [made]), filled(kind, split(made, range(1000, n, 9000))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["bins", "signed-log", "linear", "moments"])
def test_coarse_types_count_as_their_float64_values(kind, dtype):
    made = rows(11)
    arranged = KINDS[kind][1](*made)
    coarse = arranged[0].clamp(-60000, 60000).to(dtype)
    a, b = (KINDS[kind][0]("cpu") for _ in range(2))
    a.update(coarse, *arranged[1:])
    b.update(coarse.to(torch.float64), *arranged[1:])
    same(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_rows_are_refused_before_a_sum_can_overflow(kind):
    state = filled(kind, [rows(1)])
    state.rows = MAX_ROWS - 10
    before = {name: value.clone() for name, value in state.to_dict().items()}
    with pytest.raises(RangeError, match="overflow"):
        state.update(*KINDS[kind][1](*rows(2)))
    with pytest.raises(RangeError, match="overflow"):
        filled(kind, [rows(3)]).merge(state)
    assert all(torch.equal(value, before[name]) for name, value in state.to_dict().items())


def test_the_largest_sums_fit_into_int64():
    assert MAX_ROWS * (1 << 32) < 2**63
    state = Moments.empty(1)
    ends = torch.tensor([0.5 - 2.0**31] * 5 + [2.0**31 - 0.5], dtype=torch.float64)
    state.update(ends, torch.zeros(6, dtype=torch.int64))
    assert int(state.whole) == 5 * -(2**31) + 2**31 - 1
    assert MAX_ROWS * 2**31 < 2**63


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("confusion", ([3, 0], [0, 0], [0, 0])),
        ("confusion", ([0, 0], [3, 0], [0, 0])),
        ("confusion", ([-2, 0], [0, 0], [0, 0])),
        ("confusion", ([0, 0], [-2, 0], [0, 0])),
        ("confusion", ([0, 0], [0, 0], [4, 0])),
        ("moments", ([np.inf, 0.0], [0, 0])),
        ("moments", ([-(2.0**31), 0.0], [0, 0])),
        ("moments", ([1.0, 0.0], [4, 0])),
        ("moments", ([1.0, 0.0], [-2, 0])),
        ("bins", ([[1.1, 0, 0]], [[1, 0, 0]], [0])),
        ("bins", ([[-np.inf, 0, 0]], [[1, 0, 0]], [0])),
        ("bins", ([[0.5, 0, 0]], [[2, 0, 0]], [0])),
        ("bins", ([[0.5, 0, 0]], [[1, 0, 0]], [-2])),
        ("signed-log", ([[0.5, 0, 0]], [[2, 0, 0]], [0])),
        ("linear", ([[0.5, 0, 0]], [[1, 0, 0]], [4])),
    ],
)
def test_what_a_state_cannot_hold_is_told_when_a_number_is_asked_for(kind, bad):
    state = filled(kind, [rows(1)])
    state.update(*(torch.tensor(value) for value in bad))
    ask = {"confusion": "accuracy", "bins": "ece", "moments": "estimate"}.get(kind, "auroc")
    merged = filled(kind, [rows(2)]).merge(state)
    for item in (state, merged):
        with pytest.raises(RangeError, match="others"):
            getattr(item, ask)()


def test_wrong_shapes_are_refused():
    with pytest.raises(ShapeError, match=r"\(N, 2\)"):
        Bins.empty(channels=2).update(torch.rand(4, generator=torch.Generator()), torch.ones(4))
    with pytest.raises(ShapeError, match="rows"):
        Confusion.empty(2).update(torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(RangeError, match="power of two"):
        Grid.signed_log(100)
    with pytest.raises(RangeError, match="finite low < high"):
        Grid.linear(3, -3)


# --- confusion ---


def test_answers_take_the_first_of_equal_classes_and_no_row_that_is_not_finite():
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [np.nan, 5, 0], [0, np.inf, 0], [0, -np.inf, 1]])
    assert answers(logits).tolist() == [0, 1, -1, -1, -1]
    assert answers(logits.to(torch.bfloat16)).tolist() == [0, 1, -1, -1, -1]


def test_confusion_rates_in_closed_form():
    state = Confusion.empty(3, groups=2)
    predicted = torch.tensor([0, 1, 1, -1, 0, 2, 0])
    labels = torch.tensor([0, 0, 1, 1, -1, 0, 1])
    state.update(predicted, labels, torch.tensor([0, 0, 0, 0, 0, 0, 1]))
    assert state.counts[0].tolist() == [[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    nan = np.nan
    expect = {
        "accuracy": [2 / 5, 0],
        "recall": [[1 / 3, 1 / 2, nan], [nan, 0, nan]],
        "precision": [[1, 1 / 2, 0], [0, nan, nan]],
        # of two others of class 0 one was right and one has no answer; of three others of class 1 one was called 1
        "specificity": [[1 / 2, 2 / 3, 3 / 5], [0, nan, 1]],
        "dice": [[1 / 2, 1 / 2, 0], [0, 0, nan]],
        "iou": [[1 / 3, 1 / 3, 0], [0, 0, nan]],
    }
    for name, wanted in expect.items():
        got = getattr(state, name)()
        assert got.dtype == torch.float64
        np.testing.assert_allclose(got.numpy(), np.array(wanted, dtype=float), rtol=0, atol=1e-15, err_msg=name)


# --- bins ---


def _hand(p, y, bins):
    keep = ~np.isnan(p) & (y >= 0)
    p, y = p[keep], y[keep]
    index = np.clip(np.ceil((p - 1e-6) * bins).astype(int) - 1, 0, bins - 1)
    return p, y, index


@FEW
@given(seed=st.integers(0, 10**6))
def test_bins_are_the_sums_over_rows(seed):
    p, y, code = rows(seed)
    state = filled("bins", [(p, y, code)])
    pieces = state.decomposition()
    n = (state.counts.sum((2, 3))).numpy()
    for g in range(4):
        for c in range(3):
            chosen = (code == g).numpy()
            q, happened, index = _hand(p[chosen, c].numpy(), y[chosen, c].numpy(), 15)
            assert n[g, c] == len(q)
            if not len(q):
                assert torch.isnan(state.ece()[g, c])
                continue
            gap = np.array([(q - happened)[index == m].sum() for m in range(15)])
            spread = np.array([(q * (1 - q))[index == m].sum() for m in range(15)])
            got = {
                "ece": np.abs(gap).sum() / len(q),
                "brier": np.mean((q - happened) ** 2),
                "gaps": gap / len(q),
            }
            for name, wanted in got.items():
                np.testing.assert_allclose(getattr(state, name)()[g, c].numpy(), wanted, rtol=0, atol=1e-9)
            null = np.sqrt(2 / np.pi) * np.sqrt(spread).sum() / len(q)
            # the root of a sum that is 0 but for rounding
            np.testing.assert_allclose(float(state.ece_null()[g, c]), null, rtol=0, atol=2e-5)
            sums = (pieces.reliability, pieces.resolution, pieces.uncertainty)
            total = sums[0] - sums[1] + sums[2] + pieces.within_variance - pieces.within_covariance
            np.testing.assert_allclose(float(total[g, c]), np.mean((q - happened) ** 2), rtol=0, atol=1e-9)
            assert min(float(pieces.resolution[g, c]), float(pieces.within_variance[g, c])) >= -1e-9


def test_probabilities_a_rounding_outside_of_one_count_as_one():
    state = Bins.empty()
    state.update(torch.tensor([1 + 5e-7, -5e-7, 1.0]), torch.tensor([1, 0, 1]))
    assert float(state.brier()) == 0
    assert float(state.ece()) == 0


def test_small_bins_do_not_decide_the_largest_gap():
    p = torch.tensor([0.9] * 10 + [0.05])
    y = torch.tensor([1] * 8 + [0] * 2 + [1])
    state = Bins.empty()
    state.update(p, y)
    assert float(state.mce()) == pytest.approx(0.1, abs=1e-7)
    assert float(state.mce(1)) == pytest.approx(0.95, abs=1e-7)
    assert torch.isnan(state.mce(11)).all()


def test_the_curve_of_lattice_probabilities():
    state = Bins.empty(10)
    state.update(torch.tensor([0.3, 0.3, 0.3, 1.0]), torch.tensor([1, 0, 0, 1]))
    mean_p, frequency, n = state.reliability()
    assert n[0, 0].tolist() == [0, 0, 3, 0, 0, 0, 0, 0, 0, 1]
    assert float(mean_p[0, 0, 2]) == pytest.approx(0.3, abs=1e-7)
    assert float(frequency[0, 0, 2]) == pytest.approx(1 / 3)
    assert torch.isnan(mean_p[0, 0, 0])


# --- grid ---


def _exact(scores, y):
    """AUROC, both FPR95 and AP as exact fractions, by their definitions."""
    pos, neg = ([s for s, t in zip(scores, y, strict=True) if t == k] for k in (1, 0))
    wins = sum(Fraction(2 * (a > b) + (a == b), 2) for a in pos for b in neg)
    tau = max(s for s in pos if 20 * sum(t >= s for t in pos) >= 19 * len(pos))
    low = min(s for s in neg if 20 * sum(t <= s for t in neg) >= 19 * len(neg))
    precision = [Fraction(sum(t >= s for t in pos), sum(t >= s for t in scores)) for s in pos]
    return {
        "auroc": wins / (len(pos) * len(neg)),
        "fpr95_pos": Fraction(sum(t >= tau for t in neg), len(neg)),
        "fpr95_neg": Fraction(sum(t <= low for t in pos), len(pos)),
        "average_precision": sum(precision) / len(pos),
    }


SCORES = st.lists(
    st.tuples(st.one_of(st.sampled_from(PRICKLY), st.floats(-3, 3), st.floats(allow_nan=False)), st.integers(0, 1)),
    min_size=2,
    max_size=45,
).filter(lambda made: {0, 1} == {t for _, t in made})


@pytest.mark.parametrize(
    "make",
    [lambda: Grid.signed_log(), lambda: Grid.signed_log(64), lambda: Grid.linear(-2, 2, 5)],
    ids=["signed-log", "signed-log 64", "linear"],
)
@settings(max_examples=120, deadline=None)
@given(made=SCORES)
def test_exact_values_always_lie_in_the_bracket(make, made):
    scores, y = [s for s, _ in made], [t for _, t in made]
    grid = make()
    grid.update(torch.tensor(scores, dtype=torch.float64), torch.tensor(y))
    for name, exact in _exact(scores, y).items():
        bracket = getattr(grid, name)()
        assert float(bracket.low) <= float(exact) <= float(bracket.high), name
        assert 0 <= float(bracket.low) <= float(bracket.value) <= float(bracket.high) <= 1, name
        assert float(abs(bracket.value - float(exact))) <= float(bracket.error) * (1 + 1e-12) + 1e-300, name


@FEW
@given(seed=st.integers(0, 10**6))
def test_the_bound_is_the_share_of_pairs_within_bins(seed):
    rng = np.random.default_rng(seed)
    scores, y = torch.from_numpy(rng.normal(size=300)), torch.from_numpy(rng.integers(0, 2, 300))
    grid = Grid.linear(-2, 2, 42)
    grid.update(scores, y)
    p, n = grid.counts[0, 0, :, 1].double(), grid.counts[0, 0, :, 0].double()
    bound = float((p * n).sum() / (2 * p.sum() * n.sum()))
    assert float(grid.auroc().error) == pytest.approx(bound, rel=1e-9)
    # both ends are reached: every pair of a bin may be lost, or won
    middle = torch.where(scores < -2, -2.05, (scores * 10).floor() / 10 + 0.05).clamp(-2.05, 2.05)
    for sign, end in ((1, "high"), (-1, "low")):
        moved = middle + sign * (y - 0.5) * 0.01
        again = Grid.linear(-2, 2, 42)
        again.update(moved, y)
        assert torch.equal(again.counts, grid.counts)
        pos, neg = moved[y == 1], moved[y == 0]
        area = float((pos[:, None] > neg[None]).double().mean())
        assert area == pytest.approx(float(getattr(grid.auroc(), end)), abs=1e-12)


@pytest.mark.parametrize(
    "grid",
    [Grid.signed_log(), Grid.signed_log(64), Grid.linear(-5, 7, 100)],
    ids=["signed-log", "signed-log 64", "linear"],
)
def test_a_larger_score_never_has_a_lower_bin(grid):
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.normal(size=3000) * 10.0 ** rng.integers(-42, 38, 3000), PRICKLY, rng.normal(size=999)]
    )
    values = np.sort(np.concatenate([values, -values]))
    places = grid._bin(torch.from_numpy(values))
    assert bool((places.diff() >= 0).all())
    assert int(places[0]) == 0
    assert int(places[-1]) == grid.counts.shape[2] - 1
    zeros = grid._bin(torch.tensor([0.0, -0.0]))
    assert zeros[0] == zeros[1]


def test_bins_of_the_signed_log_grid_are_as_narrow_as_stated():
    grid = Grid.signed_log()
    values = torch.logspace(-15, 15.99, 4000, base=2.0, dtype=torch.float64)
    assert bool((grid._bin(values * 1.001) > grid._bin(values)).all())
    assert bool((grid._bin(-values * 1.001) < grid._bin(-values)).all())


def test_a_side_that_is_empty_has_no_rank_metric():
    grid = Grid.signed_log(64, groups=3)
    grid.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 1, 0]), torch.tensor([0, 0, 1]))
    for name in ("auroc", "fpr95_pos", "fpr95_neg"):
        bracket = getattr(grid, name)()
        assert torch.isnan(torch.stack([bracket.value, bracket.low, bracket.high])).all(), name
    ap = grid.average_precision()
    assert ap.high[0, 0] == 1
    assert float(ap.low[0, 0]) == pytest.approx(1, abs=1e-10)
    assert torch.isnan(ap.value[1:]).all()


def test_counts_beyond_float64_are_divided_exactly():
    rng = np.random.default_rng(0)
    grid = Grid.linear(0, 1, 3, groups=50)
    grid.counts += torch.from_numpy(rng.integers(0, 2**28, tuple(grid.counts.shape)))
    bracket = grid.auroc()
    for g, counts in enumerate(grid.counts[:, 0].tolist()):
        (n0, p0), (n1, p1), (n2, p2) = counts
        pairs = (n0 + n1 + n2) * (p0 + p1 + p2)
        won, tied = p1 * n0 + p2 * (n0 + n1), p0 * n0 + p1 * n1 + p2 * n2
        assert float(bracket.low[g]) == float(Fraction(won, pairs))
        assert float(bracket.high[g]) == float(Fraction(won + tied, pairs))


def test_exactly_95_percent_suffice():
    scores = torch.cat([torch.arange(1.0, 21), torch.tensor([1.5, 2.5])])
    positive = torch.arange(22) < 20
    for sign, name in ((1, "fpr95_pos"), (-1, "fpr95_neg")):
        grid = Grid.linear(-32, 32)
        grid.update(sign * scores, positive if sign == 1 else ~positive)
        bracket = getattr(grid, name)()
        assert float(bracket.low) == float(bracket.high) == 0.5


# --- moments ---


def test_values_beside_whole_numbers_keep_their_sum():
    values = [0.1, -0.1, 1e6 + 0.3, -2.0, 2.0**-33, -(2.0**-40)]
    state = Moments.empty(2)
    state.update(torch.tensor(values, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 1]))
    n, sums = state.totals()
    assert n.tolist() == [3, 3]
    np.testing.assert_allclose(sums.numpy(), [1e6 + 0.3, -2], rtol=0, atol=4e-10)
    estimate = state.estimate()
    assert estimate.value == pytest.approx(sum(values) / 6, abs=1e-9)


def test_degenerate_means_say_why():
    state = Moments.empty(3)
    assert state.estimate().reason == "no_samples"
    state.update(torch.tensor([1.0, 3.0, np.nan]), torch.tensor([1, 1, 0]))
    one = state.estimate()
    assert (one.value, one.reason, one.n, one.n_units) == (2.0, "too_few_units", 2, 1)
    assert np.isnan(one.low)
    state.update(torch.tensor([2.0]), torch.tensor([2]))
    assert state.estimate().reason == "no_variance"


# --- devices ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_both_devices_make_the_same_bits(kind):
    made = rows(8, n=70000)
    torch.use_deterministic_algorithms(True)
    try:
        same(filled(kind, [made], "cuda"), filled(kind, [made]))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_updates_do_not_wait_for_the_device(kind):
    make, arrange = KINDS[kind]
    state = make("cuda")
    moved = [value.cuda() for value in arrange(*rows(8))]
    torch.cuda.set_sync_debug_mode("error")
    try:
        state.update(*moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
