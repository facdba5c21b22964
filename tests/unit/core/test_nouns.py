"""Levels, registries, specifications, errors and checks."""

import math
import pickle
from dataclasses import dataclass, replace

import pytest
import torch

from robustlab.core.checks import check_images, check_labels, check_severity
from robustlab.core.corruption import Corruption
from robustlab.core.errors import (
    ConfigError,
    DataFileError,
    DuplicateNameError,
    KindError,
    LabelError,
    RangeError,
    RobustlabError,
    ShapeError,
    UnknownNameError,
)
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS, Registry
from robustlab.core.shift import ShiftContext, quantize
from robustlab.core.spec import canonical_json, fingerprint, from_dict, to_dict
from robustlab.core.types import Batch, ImageSpec


@dataclass(frozen=True)
class Darken(Corruption):
    """Multiply by a factor."""

    factor: Levels = Levels((0.9, 0.8, 0.7, 0.6, 0.5), identity=1.0, unit="of brightness")

    def draw(self, rng, shape):
        return {}

    def apply(self, images, draws, values):
        return images * values["factor"]


def test_levels_hit_their_anchors_and_interpolate():
    linear = Levels((1, 2, 4, 8, 16), identity=0, unit="px")
    log = Levels((1, 2, 4, 8, 16), identity=0, unit="px", scale="log")
    for i, value in enumerate((1, 2, 4, 8, 16), start=1):
        assert linear.at(i) == log.at(i) == value
    assert linear.at(2.5) == 3
    assert log.at(2.5) == pytest.approx(math.sqrt(8))
    assert linear.at(0.25) == 0.25
    assert linear.at(0) == 0
    photons = Levels((1000, 500, 200, 100, 50), identity=math.inf, unit="photons", scale="log")
    assert photons.at(0.5) == 2000
    assert linear.fix(3.0).at(0.1) == linear.fix(3.0).at(5) == 3.0


def test_severity_zero_is_the_identity_and_at_fixes_values():
    images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    shift = Darken()
    assert shift(images, severity=0) is images
    assert torch.equal(shift(images, severity=2), images * 0.8)
    fixed = Darken.at(factor=0.25)
    assert torch.equal(fixed(images, severity=1), images * 0.25)
    with pytest.raises(ConfigError, match="factor"):
        Darken.at(sigma=1.0)


def test_registry_refuses_duplicates_and_proposes_names():
    registry = Registry("thing", providers=(), group="robustlab.test-things")
    registry.register("blue-box")(Darken)
    assert registry.register("blue-box")(Darken) is Darken
    with pytest.raises(DuplicateNameError, match="belongs to"):
        registry.register("blue-box")(Levels)
    with pytest.raises(DuplicateNameError, match="kebab-case"):
        registry.register("Blue_Box")
    with pytest.raises(UnknownNameError, match="blue-box") as caught:
        registry.get("blue-bx")
    assert isinstance(caught.value, KeyError)
    assert "Did you mean 'blue-box'" in str(caught.value)


def test_specs_round_trip_and_fingerprints_see_every_field():
    shift = CORRUPTIONS.get("gaussian-noise")()
    assert from_dict(to_dict(shift)) == shift
    other = replace(shift, sigma=Levels((0.1, 0.2, 0.3, 0.4, 0.5), 0.0, "of full range"))
    assert fingerprint(other) != fingerprint(shift)
    assert canonical_json({"b": 1, "a": (1, 2.5, None)}) == '{"a":[1,2.5,null],"b":1}'
    stored = to_dict(shift) | {"version": 99}
    with pytest.raises(ConfigError, match="version 99"):
        from_dict(stored)
    with pytest.raises(KindError, match="registered"):
        to_dict(Darken())


def test_errors_are_builtin_kinds_and_survive_pickling():
    for cls, builtin in ((ShapeError, ValueError), (UnknownNameError, KeyError), (DataFileError, OSError)):
        error = cls("who", "this", "that", "Do so.")
        assert isinstance(error, builtin)
        assert isinstance(error, RobustlabError)
        assert str(error) == "who: expected this, got that. Do so."
        again = pickle.loads(pickle.dumps(error))
        assert str(again) == str(error)
        assert (again.who, again.fix) == ("who", "Do so.")


@pytest.mark.parametrize(
    ("images", "error", "text"),
    [
        (torch.zeros(3, 8, 8), ShapeError, r"images\[None\]"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), KindError, "/ 255"),
        (torch.full((1, 1, 8, 8), 200.0), RangeError, r"\[200, 200\]"),
        (torch.full((1, 1, 8, 8), math.nan), RangeError, "finite"),
        (torch.zeros(0, 1, 8, 8), ShapeError, "empty"),
    ],
)
def test_check_images(images, error, text):
    with pytest.raises(error, match=text):
        check_images(images, "test")


def test_check_labels_tells_labels_that_start_at_one():
    with pytest.raises(LabelError, match="subtract 1"):
        check_labels(torch.tensor([1, 2, 3]), task="multiclass", num_classes=3, count=3, who="test")
    with pytest.raises(ShapeError, match="one-hot"):
        check_labels(torch.eye(3).long(), task="multiclass", num_classes=3, count=3, who="test")
    with pytest.raises(LabelError, match="0, 1 or -1"):
        check_labels(torch.full((2, 3), 2), task="multilabel", num_classes=3, count=2, who="test")
    check_labels(torch.tensor([[0, 1, -1]]), task="multilabel", num_classes=3, count=1, who="test")


@pytest.mark.parametrize("severity", [-0.1, 5.01, math.nan, True, "3"])
def test_check_severity(severity):
    with pytest.raises((RangeError, KindError)):
        check_severity(severity, "test")


def test_quantize_equals_storing_and_reading():
    spec = ImageSpec(channels=1, size=(4, 4))
    images = torch.linspace(0, 1, 4096).reshape(1, 1, 64, 64)
    stored = torch.round(images * 255).to(torch.uint8)
    assert torch.equal(quantize(images, spec), stored.float().div(255))
    assert quantize(images, replace(spec, bits=None)) is images


def test_batch_select_and_replace_keep_everything_else():
    batch = Batch(
        images=torch.arange(4.0).view(4, 1, 1, 1),
        labels=torch.arange(4),
        ids=torch.arange(10, 14),
        groups={"sex": torch.tensor([0, 1, 0, -1])},
    )
    part = batch.select(torch.tensor([3, 1]))
    assert part.ids.tolist() == [13, 11]
    assert part.groups["sex"].tolist() == [-1, 1]
    assert part.images.flatten().tolist() == [3, 1]
    with pytest.raises(ShapeError, match="ids"):
        Batch(images=torch.zeros(2, 1, 1, 1), labels=None, ids=torch.arange(3))
    with pytest.raises(RangeError):
        ImageSpec(channels=1, size=(2, 2), range=(1.0, 0.0))


def test_context_children_have_other_streams():
    ids = torch.arange(2)
    ctx = ShiftContext(seed=1)
    draws = [c.rng("a", 1, ids).bits("z", 4) for c in (ctx, ctx.child(0), ctx.child(1), ctx.child(0).child(0))]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == 4
