"""The keys of the prediction cache: what decides an answer is computed again, and nothing else is."""

import dataclasses
import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import robustlab
from corruptions import Compose, FromAlbumentations, Gamma, GaussianNoise
from defenses import TemperatureScaling
from robustlab.core.corruption import Corruption
from robustlab.core.defense import Defense
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.shift import Shift
from robustlab.evaluate.cache import shift_identity
from tests.contracts.toys import SIZE, Small, pixels, source
from tests.helpers_resume import (
    ATTACK,
    EVERYTHING,
    MAIN,
    PERTURBED,
    SHIFTED,
    SHIFTS,
    again,
    counted,
    evaluate,
    model,
    saved,
    shards,
)

from .engine_toys import Hungry, wrapped

VAL = {"clean": 2}


def columns():
    return source(count=24, groups={"site": ["a", "b"] * 12, "pid": [f"p{i // 2}" for i in range(24)]})


# ---- what needs no forward pass


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metrics": "all"},
        {"metrics": "default", "detectors": ("energy", "msp")},
        {"replicates": 300, "referral": 0.3, "plausible": 1, "margin": 0.1},
        {"val": None},
        {"attacks": ()},
        {"shifts": (Gamma(),), "severities": (3,)},
        {"shifts": SHIFTS[::-1]},
    ],
    ids=lambda options: ",".join(options) or "the same",
)
def test_answers_are_not_computed_twice(place, options):
    written, sizes, report = again(place, **options)
    assert written == {}
    assert sizes == [8], "one pass over the probe"
    assert report.manifest["conditions"]


def test_groups_and_clusters_need_no_forward_pass(place):
    written, sizes, report = again(place, data=columns(), groups=("site",), cluster="pid", metrics="all")
    assert (written, sizes) == ({}, [8])
    assert report.manifest["data"]["n_units"] == 12


def test_what_is_read_is_what_was_computed(place, tmp_path):
    cached = again(place, metrics="all")[2]
    fresh = evaluate(model(), None, attacks=ATTACK, metrics="all")
    assert saved(cached, tmp_path / "a") == saved(fresh, tmp_path / "b")


# ---- what changes everything


class Normed(Small):
    """With a layer whose statistics are buffers, a dropout, and a number that forward uses."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.scale = 1.0
        self.eval()

    def forward(self, x):
        return super().forward(self.drop(self.norm(x))) * self.scale


def normed(change=None, **options):
    net = Normed()
    if change is not None:
        with torch.no_grad():
            change(net)
    return robustlab.wrap(net, **{"output": "logits", "num_classes": 3} | options)


MODELS = {
    "one weight": lambda: normed(lambda net: net.conv.weight.view(-1)[7:8].add_(1e-7)),
    "one buffer": lambda: normed(lambda net: net.norm.running_mean[1:2].add_(1e-7)),
    "a dropout rate": lambda: normed(lambda net: setattr(net.drop, "p", 0.4)),
    "a number": lambda: normed(lambda net: setattr(net, "scale", 1.0 + 1e-9)),
    "mean": lambda: normed(mean=1e-9, std=1.0),
    "std": lambda: normed(mean=0.0, std=1.0 + 1e-9),
    "size": lambda: normed(size=SIZE),
    "bounds": lambda: normed(bounds=(0, 1 + 1e-9)),
    "output": lambda: normed(output=None),
    "temperature": lambda: TemperatureScaling(normed(), temperature=1.0 + 1e-9),
}


@pytest.mark.parametrize("what", MODELS)
def test_another_model_recomputes_everything(what, tmp_path):
    """Every change is too small for the probe, or changes nothing: the key alone has to notice."""
    options = {"shifts": (Gamma(),), "severities": (1,), "attacks": ()}
    written = again(tmp_path, normed(), **options)[0]
    assert written == {"clean": 5, "gamma@1": 3}
    assert again(tmp_path, normed(), **options)[0] == {}
    assert again(tmp_path, MODELS[what](), **options)[0] == written
    assert again(tmp_path, MODELS[what](), **options)[0] == {}
    assert again(tmp_path, normed(), **options)[0] == {}, "the first one is still there"


def test_names_decide_no_answer(tmp_path):
    options = {"shifts": (Gamma(),), "severities": (1,), "attacks": ()}
    assert again(tmp_path, normed(), **options)[0]
    assert again(tmp_path, normed(class_names=("a", "b", "c"), name="another"), **options)[0] == {}


class Remembers(Defense):
    """A defence whose own score is its distance from what it was fitted on."""

    name = "test-remembers"

    def __init__(self, bank):
        self.inner = normed()
        self._bank = torch.tensor([float(bank)])
        self.notes = Box(bank)

    task = "multiclass"
    num_classes = 3

    def modules(self):
        return self.inner.modules()

    def settings(self):
        return {}

    def outputs(self, batch):
        outputs = self.inner.outputs(batch)
        distance = (batch.images.mean((1, 2, 3)) - self._bank).abs()
        return dataclasses.replace(outputs, scores={"distance": distance})

    def fit(self, train, val):
        return self

    def save(self, folder):
        raise NotImplementedError


class Box:
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize("part", ["_bank", "notes", None])
def test_a_defence_that_was_fitted_anew_is_another_model(part, tmp_path, monkeypatch):
    """By its private array, by an object that it holds, and, where no hash could tell, by the probe's scores."""
    options = {"shifts": (Gamma(),), "severities": (1,), "attacks": (), "detectors": ("msp",)}
    first, second = Remembers(0.25), Remembers(0.75)
    if part == "_bank":
        second.notes = first.notes
    elif part == "notes":
        second._bank = first._bank
    else:
        monkeypatch.setattr("robustlab.core.identity._word", lambda value, above=None: "")
    if part is not None:  # the key alone has to notice
        monkeypatch.setattr("robustlab.evaluate.cache._same", lambda stored, fresh: True)
    assert again(tmp_path, first, **options)[0]
    written, _, report = again(tmp_path, second, **options)
    assert written
    score = report.predictions["clean"].scores["distance"]
    assert torch.allclose(score[:8], second.predict(source(count=24).read(range(8))).scores["distance"])


def test_images_that_change_in_place_are_noticed(tmp_path):
    data = source(count=24)
    options = {"shifts": (Gamma(),), "severities": (1,), "attacks": (), "val": None, "data": data}
    assert again(tmp_path, normed(), **options)[0]
    assert again(tmp_path, normed(), **options)[0] == {}
    data.images[20] = 255 - data.images[20]
    assert again(tmp_path, normed(), **options)[0] == {"clean": 3, "gamma@1": 3}


def test_a_chunk_that_was_found_is_used_again(tmp_path, caplog):
    options = {"shifts": (Gamma(),), "severities": (1,), "attacks": (), "batch_size": None}
    first = again(tmp_path, wrapped(Hungry(9)), **options)
    assert first[2].manifest["chunk"] <= 9
    assert "memory ran out" in caplog.text
    caplog.clear()
    written, _, report = again(tmp_path, wrapped(Hungry(9)), **options)
    assert written == {}
    assert "memory ran out" not in caplog.text
    assert report.manifest["chunk"] == first[2].manifest["chunk"]


def test_another_temperature_recomputes_everything(tmp_path):
    def run(number):
        return again(tmp_path, TemperatureScaling(model(), temperature=number))[0]

    assert [bool(run(number)) for number in (2.0, 2.0, 2.0 + 1e-9, 2.0)] == [True, False, True, False]


def test_another_chunk_recomputes_everything(place):
    assert again(place, batch_size=6)[0] == {"clean": 4 + 3, **dict.fromkeys([*MAIN, *PERTURBED], 4)}
    for size in (24, 32):  # one pass each, but of another size
        assert again(place, batch_size=size)[0] == {"clean": 2, **dict.fromkeys([*MAIN, *PERTURBED], 1)}


# ---- what changes a part


@pytest.mark.parametrize("name", ["version", "level"])
def test_another_version_or_level_of_a_shift_recomputes_that_shift(place, monkeypatch, name):
    shifts = SHIFTS
    if name == "version":
        monkeypatch.setattr(GaussianNoise, "version", GaussianNoise.version + 1)
    else:
        (field, levels), *_ = GaussianNoise().levels().items()
        moved = dataclasses.replace(levels, values=(*levels.values[:4], levels.values[4] * 1.01))
        shifts = (dataclasses.replace(GaussianNoise(), **{field: moved}), Gamma())
    assert again(place, shifts=shifts)[0] == {"gaussian-noise@1": 3, "gaussian-noise@3": 3}


def test_the_version_of_a_part_recomputes_the_composition(tmp_path, monkeypatch):
    options = {"shifts": (Compose([GaussianNoise(), Gamma()]), Gamma()), "attacks": ()}
    again(tmp_path, **options)
    assert again(tmp_path, **options)[0] == {}
    monkeypatch.setattr(GaussianNoise, "version", GaussianNoise.version + 1)
    assert again(tmp_path, **options)[0] == {"gaussian-noise+gamma@1": 3, "gaussian-noise+gamma@3": 3}


def test_a_changed_attack_recomputes_that_attack(place):
    assert again(place, attacks=dataclasses.replace(ATTACK, steps=3))[0] == PERTURBED


def test_another_seed_recomputes_what_is_drawn_from_it(place):
    assert again(place, seed=1)[0] == {**SHIFTED, **PERTURBED}


def test_a_severity_more_is_computed_alone(place):
    assert again(place, severities=(1, 2, 3))[0] == {"gaussian-noise@2": 3, "gamma@2": 3}


def test_severities_of_the_same_name_are_told_apart(place):
    assert again(place, severities=(1 + 1e-9, 3))[0] == {"gaussian-noise@1": 3, "gamma@1": 3}


def relabelled():
    labels = source(count=24).info.labels.clone()
    labels[20] = (labels[20] + 1) % 3
    return source(count=24, labels=labels.numpy())


def test_other_labels_recompute_attacks(place):
    assert again(place, data=relabelled())[0] == PERTURBED


def test_other_labels_are_examined_anew(place):
    class Constant(Small):
        def forward(self, x):
            return super().forward(x) * 0 + torch.tensor([5.0, 0.0, 0.0])

    net = robustlab.wrap(Constant(), output="logits", num_classes=3)
    found = []
    for labels in (np.zeros(24, int), np.array([0, 1, 2, 2] * 6)):
        data = source(count=24, labels=labels, task="multiclass")
        doctors = [again(where, net, data=data, attacks=())[2].manifest["doctor"] for where in (place, None)]
        assert doctors[0] == doctors[1]
        found.append(doctors[0])
    assert found[0] != found[1]


def test_one_pixel_recomputes_its_source(place):
    images = pixels(24)[0]
    images[20, 3, 4, 1] ^= 1
    labels, ids = source(count=24).info.labels.numpy(), np.arange(24) * 7919 + 10**15
    data = robustlab.load_data(images, labels=labels, ids=ids)
    assert torch.equal(data.info.ids, source(count=24).info.ids)
    assert again(place, data=data)[0] == {**EVERYTHING, "clean": 3}


def test_other_ids_recompute_their_source(place):
    data = source(count=24, ids=np.arange(24) + 5)
    assert again(place, data=data)[0] == {**EVERYTHING, "clean": 3}


def test_other_validation_data_are_computed_alone(place):
    assert again(place, val=source(count=16, seed=4))[0] == VAL


def test_foreign_data_are_kept_too(place):
    foreign = {"far/x": source(count=16, seed=9)}
    assert again(place, ood=foreign)[0] == {"clean": 2}
    assert again(place, ood=foreign)[0] == {}


@pytest.mark.parametrize("late", [False, True], ids=["another image", "only another date"])
def test_an_edited_file_recomputes_its_folder(tmp_path, late):
    images, labels = pixels(24)[0], source(count=24).info.labels.tolist()
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = tmp_path / "images" / f"class{label}" / f"{place:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    options = {"data": tmp_path / "images", "attacks": ()}
    first = again(tmp_path / "run", **options)[0]
    assert again(tmp_path / "run", **options)[0] == {}
    if late:
        os.utime(file, ns=(1, 1))
    else:
        facts = file.stat()
        Image.fromarray(images[-1] ^ 1).save(file)
        os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert again(tmp_path / "run", **options)[0] == {**first, "clean": 3}


# ---- what is not kept


def test_a_function_is_kept_only_under_a_stated_name(tmp_path, caplog):
    net = Small()

    def run(**options):
        wrapped = robustlab.wrap(lambda x: net(x), output="logits", num_classes=3, **options)
        with counted() as found:
            evaluate(wrapped, tmp_path, attacks=ATTACK)
        return dict(found)

    assert run() == {}
    assert "model_id" in caplog.text
    assert [run(model_id=name) for name in ("1", "1", "2", "1")] == [EVERYTHING, {}, EVERYTHING, {}]


class Noisy(Small):
    def forward(self, x):
        return super().forward(x) + torch.randn(len(x), 3) * 0.01


def test_a_random_model_is_not_kept(tmp_path, caplog):
    net = robustlab.wrap(Noisy(), output="logits", num_classes=3)
    for _ in range(2):
        assert again(tmp_path, net)[0] == {}
    assert "nothing is kept" in caplog.text
    assert shards(tmp_path) == {}


def invert(severity):
    import albumentations

    return albumentations.InvertImg(p=1)


def test_a_foreign_transform_is_kept_under_its_name_and_version(tmp_path, caplog):
    pytest.importorskip("albumentations")

    def run(**options):
        return again(tmp_path, shifts=(FromAlbumentations(invert, **options), Gamma()), attacks=())[0]

    assert run() == {"clean": 5, "gamma@1": 3, "gamma@3": 3}
    assert "invert" in caplog.text
    kept = {"inverted@1": 3, "inverted@3": 3}
    assert [run(name="inverted") for _ in range(2)] == [kept, {}]
    assert [run(name="inverted", version=2) for _ in range(2)] == [kept, {}]
    assert run(name="inverted") == {}
    inside = Compose([Gamma(), FromAlbumentations(invert)])
    assert shift_identity(inside) is None
    assert shift_identity(Compose([Gamma(), FromAlbumentations(invert, name="inverted")])) is not None


@dataclass(frozen=True)
class Unregistered(Corruption):
    """A corruption whose class is not registered."""

    factor: Levels = Levels((0.9, 0.8, 0.7, 0.6, 0.5), identity=1.0, unit="of brightness")
    name = "unregistered"

    def draw(self, rng, shape):
        return {}

    def apply(self, images, draws, values):
        return images * values["factor"]


def test_a_corruption_that_is_not_registered_is_not_kept(tmp_path, caplog):
    written = again(tmp_path, shifts=(Unregistered(), Gamma()), attacks=())[0]
    assert written == {"clean": 5, "gamma@1": 3, "gamma@3": 3}
    assert "register its class" in caplog.text


@pytest.fixture
def registered(monkeypatch):
    """Register classes for one test."""
    monkeypatch.setattr(CORRUPTIONS, "_items", dict(CORRUPTIONS._items))
    return CORRUPTIONS.register


@dataclass(frozen=True)
class Painted(Shift):
    """Written from scratch, so it sees the whole batch."""

    name = "test:painted"

    def prepare(self, batch, ctx):
        return None

    def perform(self, batch, draws, severity, ctx):
        tone = (batch.labels + batch.groups["site"]).view(-1, 1, 1, 1) / 9
        return batch.replace(batch.images * 0.5 + tone * 0.5)

    def parameters(self, severity):
        return {"tone": (severity, "")}


def test_a_shift_from_scratch_is_recomputed_for_other_labels_or_groups(tmp_path, registered):
    registered("test:painted")(Painted)
    labels = source(count=24).info.labels.numpy()
    written = []
    for wanted, sites in [(labels, "ab"), (labels, "ab"), (labels[::-1].copy(), "ab"), (labels, "ba")]:
        data = source(count=24, labels=wanted, groups={"site": [sites[0], sites[1], "a", "b"] * 6})
        written.append(again(tmp_path, shifts=(Painted(), Gamma()), data=data, attacks=())[0])
    painted = {"test:painted@1": 3, "test:painted@3": 3}
    assert written == [{"clean": 5, "gamma@1": 3, "gamma@3": 3, **painted}, {}, painted, painted]


# ---- the probe

FACTOR = {"now": 1.0}


class Global(Small):
    """Its answers depend on a number that no hash can see."""

    def forward(self, x):
        return super().forward(x) * FACTOR["now"]


def test_the_probe_notices_what_the_identity_cannot(tmp_path, monkeypatch):
    net = robustlab.wrap(Global(), output="logits", num_classes=3)
    reports = [evaluate(net, None)]
    assert again(tmp_path, net, attacks=())[0]
    monkeypatch.setitem(FACTOR, "now", 1.5)
    reports.append(evaluate(net, None))
    written, _, found = again(tmp_path, net, attacks=())
    assert written == {"clean": 5, **SHIFTED}
    assert saved(found, tmp_path / "a") == saved(reports[1], tmp_path / "b")
    for factor, report in ((1.0, reports[0]), (1.5, reports[1])):
        monkeypatch.setitem(FACTOR, "now", factor)
        written, sizes, found = again(tmp_path, net, attacks=())
        assert (written, sizes) == ({}, [8])
        assert saved(found, tmp_path / "c") == saved(report, tmp_path / "d")
    assert len(list((tmp_path / "cache").glob("*/probe.safetensors"))) == 2


def test_a_hook_that_changes_answers_gets_an_entry_of_its_own(tmp_path):
    net = Small()
    wrapped = robustlab.wrap(net, output="logits", num_classes=3)
    again(tmp_path, wrapped, attacks=())
    handle = net.register_forward_hook(lambda module, inputs, output: output + torch.tensor([1e-3, 0, 0]))
    assert again(tmp_path, wrapped, attacks=())[0] == {"clean": 5, **SHIFTED}
    handle.remove()
    assert again(tmp_path, wrapped, attacks=())[0] == {}
