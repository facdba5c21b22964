"""Compositions: draws by position, choices by key, order of stages, bytes, masks and boxes, device keys."""

import dataclasses
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from corruptions import JPEG, DefocusBlur, Gamma, GaussianNoise, PoissonNoise
from corruptions.compose import ByScanner, Compose, OneOf, SomeOf, Sometimes
from corruptions.fixed_pattern import FixedPattern
from robustlab.core.corruption import Corruption
from robustlab.core.errors import ConfigError, KindError, RangeError, RobustlabWarning, ShapeError, UnknownNameError
from robustlab.core.shift import Shift, ShiftContext, from_bytes, to_bytes
from robustlab.core.spec import canonical_json, fingerprint, from_dict
from robustlab.core.types import Batch, ImageSpec
from robustlab.evaluate.cache import shift_identity

COUNT = 24


@dataclass(frozen=True)
class Mark(Shift):
    """Writes its number into a row of the image, moves the mask, and shifts the boxes."""

    number: int = 0
    name: ClassVar[str] = "mark"
    seen: ClassVar[list[int]] = []

    def prepare(self, batch: Batch, ctx: ShiftContext) -> Any:
        return batch.ids

    def perform(self, batch: Batch, draws: Any, severity: float, ctx: ShiftContext) -> Batch:
        assert torch.equal(draws, batch.ids)
        self.seen.append(len(batch))
        images = batch.images.clone()
        images[:, :, self.number] = self.number / 10
        return dataclasses.replace(
            batch,
            images=images,
            masks=None if batch.masks is None else batch.masks + 10**self.number,
            boxes=None if batch.boxes is None else tuple(box + 10**self.number for box in batch.boxes),
        )

    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        return {}


@dataclass(frozen=True)
class Staged(Corruption):
    """Does nothing, at a stage."""

    where: str = ""
    name: ClassVar[str] = "staged"

    def draw(self, rng, shape):
        return {}

    def apply(self, images, draws, values):
        return images

    @property
    def label(self):
        return self.where or "unknown"

    @property
    def stages(self):
        return tuple(self.where.split())


@dataclass(frozen=True)
class Rounded(Corruption):
    """A reference operator: counts how often it is given bytes."""

    mode: ClassVar[str] = "reference"
    name: ClassVar[str] = "rounded"
    bytes_seen: ClassVar[list[bool]] = []

    def draw(self, rng, shape):
        return {}

    def apply(self, images, draws, values):
        self.bytes_seen.append(False)
        return from_bytes(255 - to_bytes(images))

    def apply_bytes(self, pixels, draws, values):
        self.bytes_seen.append(True)
        return 255 - pixels


@dataclass(frozen=True)
class Loose(Staged):
    """Its results leave [0, 1]."""

    name: ClassVar[str] = "loose"

    @property
    def storable(self):
        return False


def grey(count=COUNT, size=32, channels=1):
    return Batch(torch.full((count, channels, size, size), 0.5), None, torch.arange(7, 7 + count))


def rich(count=COUNT):
    return dataclasses.replace(
        grey(count, size=8),
        masks=torch.zeros(count, 8, 8, dtype=torch.int64),
        boxes=tuple(torch.zeros(1 + row % 2, 4) for row in range(count)),
    )


TREES = {
    "some-of": SomeOf([DefocusBlur(), GaussianNoise(), Gamma(), JPEG()], 2),
    "sometimes": Sometimes(GaussianNoise(), 0.6),
    "weighted": OneOf([GaussianNoise(), JPEG()], weights=(3, 1)),
    "by-scanner": ByScanner(Compose([FixedPattern(), JPEG()]), "site"),
    "nested": Compose([Sometimes(DefocusBlur(), 0.5), SomeOf([PoissonNoise(), GaussianNoise()], 1), JPEG()]),
}


@pytest.fixture(params=list(TREES), ids=list(TREES))
def tree(request):
    return TREES[request.param]


def textured(count=COUNT, channels=3):
    generator = torch.Generator().manual_seed(3)
    levels = torch.randint(0, 256, (count, channels, 12, 10), generator=generator)
    return Batch(levels / 255, None, torch.arange(count), groups={"site": torch.arange(count) % 3})


def test_split_and_order_of_the_batch_change_no_bit(tree):
    batch, ctx = textured(), ShiftContext(seed=2)
    whole = tree.on(batch, 3, ctx).images
    for index in (
        torch.randperm(COUNT, generator=torch.Generator().manual_seed(1)),
        torch.tensor([5]),
        torch.arange(7),
    ):
        assert torch.equal(tree.on(batch.select(index), 3, ctx).images, whole[index])
    assert torch.equal(tree.on(batch, 0, ctx).images, batch.images)


def test_json_pickle_and_labels(tree):
    again = from_dict(json.loads(canonical_json(tree)))
    assert again == tree
    assert fingerprint(again) == fingerprint(tree)
    assert pickle.loads(pickle.dumps(tree)) == tree
    assert shift_identity(tree) is not None


def test_labels_parameters_and_reasons():
    assert Sometimes(JPEG(), 0.5).label == "jpeg?0.5"
    assert Sometimes(Compose([GaussianNoise(), JPEG()]), 0.25).label == "(gaussian-noise+jpeg)?0.25"
    assert TREES["some-of"].label == "2of(defocus-blur|gaussian-noise|gamma|jpeg)"
    assert Sometimes(JPEG(), 0.5).parameters(2)["p"] == (0.5, "probability")
    assert next(iter(Sometimes(JPEG(), 0.5).parameters(2))) == "1.jpeg.quality"
    assert list(SomeOf([GaussianNoise(), JPEG()], 1).parameters(1)) == ["1.gaussian-noise.sigma", "2.jpeg.quality"]
    for kind in (lambda part: Sometimes(part, 0.5), lambda part: SomeOf([part], 1), lambda part: OneOf([part], [1])):
        assert (kind(Only3()).skip_reason(ImageSpec(1, (8, 8))) or "").startswith("only3 needs 3 channels")


@dataclass(frozen=True)
class Only3(Staged):
    """For colour only."""

    name: ClassVar[str] = "only3"
    channels: ClassVar[tuple[int, ...] | None] = (3,)

    @property
    def label(self):
        return self.name


# ---- draws by position


def test_two_equal_noise_stages_add_up_to_root_two():
    noise = GaussianNoise.at(sigma=0.05)
    for pair in (Compose([noise, noise]), SomeOf([noise, noise], 2), Compose([Compose([noise]), Sometimes(noise, 1)])):
        assert (pair.on(grey(), 1, ShiftContext()).images - 0.5).std().item() == pytest.approx(0.05 * 2**0.5, rel=0.02)


def test_a_part_added_at_the_end_changes_no_other():
    batch, ctx = grey(), ShiftContext(seed=5)
    parts = [GaussianNoise(), GaussianNoise.at(sigma=0.1)]
    short, long = (Compose(each).prepare(batch, ctx) for each in (parts, [*parts, GaussianNoise()]))
    for one, two in zip(short, long, strict=False):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(long[0]["z"], long[2]["z"])


def test_parts_without_draws_of_their_own_do_not_disturb_the_others():
    # draws are keyed by position, so a part in the place of another of the same name draws the same
    batch, ctx = grey(), ShiftContext(seed=5)
    first = Compose([DefocusBlur(), GaussianNoise()]).prepare(batch, ctx)[1]
    other = Compose([Staged(""), GaussianNoise()]).prepare(batch, ctx)
    assert torch.equal(first["z"], other[1]["z"])


# ---- choices


def frequencies(shift, count=4000):
    batch = Batch(torch.full((count, 1, 2, 2), 0.5), None, torch.arange(count))
    found = torch.zeros(count, len(getattr(shift, "shifts", (0,))), dtype=torch.bool)
    for place, index, _ in shift.prepare(batch, ShiftContext(seed=1)):
        found[index, place] = True
    return found


def test_weights_decide_how_often_a_part_is_chosen():
    chosen = frequencies(OneOf([Gamma(), JPEG(), DefocusBlur()], weights=(6, 3, 1)))
    assert bool((chosen.sum(1) == 1).all())
    for share, expected in zip(chosen.double().mean(0).tolist(), (0.6, 0.3, 0.1), strict=True):
        assert abs(share - expected) < 4.5 * (expected * (1 - expected) / 4000) ** 0.5


def test_equal_weights_choose_as_no_weights_do():
    parts = [Gamma(), JPEG()]
    assert torch.equal(frequencies(OneOf(parts)), frequencies(OneOf(parts, weights=(2, 2))))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_some_of_gives_each_sample_so_many_and_each_set_equally_often(count):
    chosen = frequencies(SomeOf([Staged("") for _ in range(4)], count))
    assert bool((chosen.sum(1) == count).all())
    sets = torch.unique(chosen, dim=0, return_counts=True)[1].double() / 4000
    number = [0, 4, 6, 4, 1][count]
    assert len(sets) == number
    assert bool(((sets - 1 / number).abs() < 4.5 * (1 / number / 4000) ** 0.5).all())


def test_some_of_applies_its_parts_in_order():
    batch = grey()
    parts = (GaussianNoise.at(sigma=0.2), Gamma.at(exponent=2.0), JPEG.at(quality=10))
    shift = SomeOf(parts, 2)
    ctx = ShiftContext(seed=9)
    got = shift.on(batch, 3, ctx).images
    chosen = torch.zeros(COUNT, 3, dtype=torch.bool)
    for place, index, _ in shift.prepare(batch, ctx):
        chosen[index, place] = True
    for row in range(COUNT):
        one = batch.select(torch.tensor([row]))
        for place in chosen[row].nonzero().squeeze(1).tolist():
            one = parts[place].on(one, 3, ctx.child(place))
        assert torch.equal(one.images[0], got[row])


def test_sometimes_computes_only_the_chosen_and_leaves_the_others():
    Mark.seen.clear()
    batch = rich(400)
    done = Sometimes(Mark(1), 0.3).on(batch, 3, ShiftContext())
    touched = (done.images != batch.images).flatten(1).any(1)
    assert Mark.seen == [int(touched.sum())]
    assert abs(Mark.seen[0] - 120) < 4.5 * (400 * 0.3 * 0.7) ** 0.5
    assert Sometimes(Mark(1), 0).on(batch, 3, ShiftContext()) is batch
    assert bool((Sometimes(Mark(1), 1).on(batch, 3, ShiftContext()).images != batch.images).flatten(1).any(1).all())


def test_equal_sometimes_in_one_composition_choose_independently():
    chain = Compose([Sometimes(Mark(1), 0.5), Sometimes(Mark(2), 0.5)])
    images = chain.on(rich(1000), 3, ShiftContext()).images
    one, two = (images[:, 0, row, 0] != 0.5 for row in (1, 2))
    assert abs((one & two).double().mean().item() - 0.25) < 4.5 * (0.25 * 0.75 / 1000) ** 0.5


@pytest.mark.parametrize(
    "shift",
    [OneOf([Mark(1), Mark(2)]), SomeOf([Mark(1), Mark(2), Mark(3)], 2), Sometimes(Mark(1), 0.5)],
    ids=["one-of", "some-of", "sometimes"],
)
def test_masks_and_boxes_go_the_way_of_their_image(shift):
    batch = rich()
    done = shift.on(batch, 3, ShiftContext())
    for row in range(COUNT):
        told = sum(10**number for number in (1, 2, 3) if done.images[row, 0, number, 0] != 0.5)
        assert bool((done.masks[row] == told).all())
        assert bool((done.boxes[row] == told).all())
        assert len(done.boxes[row]) == len(batch.boxes[row])
    assert bool((batch.masks == 0).all())
    assert bool((batch.images == 0.5).all())


# ---- the order of stages


def test_an_impossible_order_is_warned_of_once_and_kept():
    with pytest.warns(RobustlabWarning) as caught:
        chain = Compose([Staged("electronics"), Staged("optics"), Staged("compression")])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    assert "electronics (electronics) stands before optics (optics)" in text
    assert "the possible order is optics, electronics, compression" in text
    assert [shift.label for shift in chain.shifts] == ["electronics", "optics", "compression"]
    assert chain.stages == ("electronics", "optics", "compression")
    chain.on(grey(2), 3, ShiftContext())  # and not again


@pytest.mark.parametrize(
    "parts",
    [
        [Staged("optics"), Staged("electronics"), Staged("electronics"), Staged("compression")],
        [Staged("compression"), Staged("")],
        [Staged(""), Staged("optics")],
        [Staged("optics"), OneOf([Staged("sampling"), Staged("electronics")]), Staged("compression")],
        [Compose([Staged("subject"), Staged("optics")]), Sometimes(Staged("optics"), 0.5)],
        [Staged("electronics"), OneOf([Staged("subject"), Staged("compression")])],
        [OneOf([Staged("compression"), Staged("")]), Staged("optics")],
    ],
    ids=["right", "unknown last", "unknown first", "choice", "nested", "possible for some", "unknown for some"],
)
def test_a_possible_order_is_not_warned_of(parts):
    Compose(parts)  # warnings of ours are errors here


def test_the_order_is_seen_through_compositions():
    inner = Compose([Staged("optics"), Staged("compression")])
    with pytest.warns(RobustlabWarning, match="possible order is optics, overlay, compression"):
        Compose([inner, Staged("overlay")])
    with pytest.warns(RobustlabWarning, match="no order of the parts is possible"):
        Compose([OneOf([inner]), Staged("overlay")])
    either = Sometimes(OneOf([Staged("electronics"), Staged("optics")]), 0.5)
    with pytest.warns(RobustlabWarning, match=r"is optics\|sampling, \(electronics\|optics\)\?0.5, compression"):
        Compose([Staged("compression"), either, OneOf([Staged("optics"), Staged("sampling")])])
    with pytest.warns(RobustlabWarning, match="SomeOf: compression"):
        SomeOf([Staged("compression"), Staged("optics")], 2)
    SomeOf([Staged("compression"), Staged("optics")], 1)


# ---- bytes


def test_bytes_are_rounded_once_at_the_end():
    pixels = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    ids = torch.arange(4)
    noise = GaussianNoise.at(sigma=0.002)  # half a grey level: rounded twice, it is another distribution
    for chain in (Compose([noise, noise, noise]), SomeOf([noise, noise], 2), Compose([OneOf([noise]), noise])):
        floats = chain.on(Batch(from_bytes(pixels), None, ids), 3, ShiftContext()).images
        assert torch.equal(chain(pixels, 3, ids=ids), to_bytes(floats))
    twice = noise(noise(pixels, 3, ids=ids), 3, ids=ids)
    assert not torch.equal(Compose([noise, noise])(pixels, 3, ids=ids), twice)


def test_reference_parts_stay_in_bytes():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    batch = Batch(pixels, None, torch.arange(1))
    Rounded.bytes_seen.clear()
    assert torch.equal(
        Compose([Rounded(), Compose([Rounded(), Rounded()])]).on(batch, 3, ShiftContext()).images, 255 - pixels
    )
    assert Rounded.bytes_seen == [True] * 3
    Rounded.bytes_seen.clear()
    mixed = Compose([Rounded(), Gamma(), Rounded(), Gamma()])
    done = mixed.on(batch, 3, ShiftContext()).images
    assert done.dtype == torch.uint8
    assert Rounded.bytes_seen == [True, False]
    floats = mixed.on(batch.replace(from_bytes(pixels)), 3, ShiftContext()).images
    assert torch.equal(done, to_bytes(floats))


@pytest.mark.parametrize("shift", [OneOf([Mark(1), Gamma()]), Sometimes(Mark(1), 0.5), SomeOf([Mark(1), Gamma()], 1)])
def test_parts_that_take_no_bytes_are_given_floats(shift):
    pixels = torch.full((20, 1, 8, 8), 128, dtype=torch.uint8)
    done = shift(pixels, 3, ids=torch.arange(20))
    assert done.dtype == torch.uint8
    floats = shift.on(Batch(from_bytes(pixels), None, torch.arange(20)), 3, ShiftContext()).images
    assert torch.equal(done, to_bytes(floats))


def test_storable_is_what_comes_last():
    assert not Compose([Staged(""), Loose()]).storable
    assert Compose([Loose(), Staged("")]).storable
    assert not OneOf([Loose(), Staged("")]).storable
    assert not Sometimes(Loose(), 0.5).storable
    assert SomeOf([Loose(), Staged(""), Staged("")], 2).storable
    assert not SomeOf([Staged(""), Loose(), Staged("")], 2).storable


# ---- scanners


def test_images_of_one_scanner_share_their_pattern():
    batch = dataclasses.replace(grey(6), groups={"site": torch.tensor([0, 1, 0, 1, -1, -1])})
    images = ByScanner(FixedPattern(), "site").on(batch, 4, ShiftContext(seed=1)).images
    same = torch.tensor([[bool(torch.equal(one, two)) for two in images] for one in images])
    assert torch.equal(same, batch.groups["site"][:, None] == batch.groups["site"][None])
    only = Compose([ByScanner(FixedPattern(), "site")])
    assert not torch.equal(only.on(batch, 4, ShiftContext(seed=2)).images, only.on(batch, 4, ShiftContext()).images)
    with pytest.raises(UnknownNameError, match="'ward'"):
        ByScanner(FixedPattern(), "ward").on(batch, 3, ShiftContext())


# ---- bad input


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: SomeOf([], 1), ConfigError, "at least one"),
        (lambda: SomeOf(["jpeg"], 1), KindError, "'jpeg'"),
        (lambda: SomeOf([JPEG()], 2), RangeError, "count from 1 to 1"),
        (lambda: SomeOf([JPEG()], 0), RangeError, "count"),
        (lambda: SomeOf([JPEG()], 1.0), KindError, "integer"),
        (lambda: Sometimes(JPEG, 0.5), KindError, "add \\(\\)"),
        (lambda: Sometimes(JPEG(), 1.5), RangeError, "p from 0 to 1"),
        (lambda: Sometimes(JPEG(), float("nan")), RangeError, "p from 0 to 1"),
        (lambda: Sometimes(JPEG(), "half"), KindError, "number"),
        (lambda: OneOf([JPEG(), Gamma()], weights=(1,)), ShapeError, "2 weights"),
        (lambda: OneOf([JPEG(), Gamma()], weights=(1, 0)), RangeError, "positive"),
        (lambda: OneOf([JPEG(), Gamma()], weights=(1, float("inf"))), RangeError, "positive"),
        (lambda: OneOf([JPEG(), Gamma()], weights=(1, "2")), KindError, "numbers"),
        (lambda: OneOf([JPEG(), Gamma()], weights=3), KindError, "list of numbers"),
        (lambda: ByScanner(JPEG(), 3), KindError, "group column"),
        (lambda: ByScanner("jpeg"), KindError, "'jpeg'"),
    ],
)
def test_nonsense_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_device_keys_must_be_one_a_sample():
    with pytest.raises(ShapeError, match="24 device keys"):
        FixedPattern().on(grey(), 3, ShiftContext(device_keys=torch.arange(3)))
