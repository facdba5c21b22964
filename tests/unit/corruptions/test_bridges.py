"""The bridges from torchvision, MONAI and TorchIO, and to torchvision and albumentations."""

import os
import pickle
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from corruptions import JPEG, Compose, FromAlbumentations, GaussianNoise
from corruptions.bridges import FromMONAI, FromTorchIO, FromTorchvision, as_albumentations, as_torchvision
from corruptions.fixed_pattern import FixedPattern
from robustlab.core.errors import ConfigError, KindError, MissingExtraError, RangeError, ShapeError
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch
from robustlab.data.torch_data import same_random_state
from robustlab.evaluate.cache import shift_identity

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A
import monai.transforms as mt
import torchio as tio

COUNT = 6


def batch_of(count=COUNT, channels=3, size=(24, 20)):
    levels = torch.randint(0, 256, (count, channels, *size), generator=torch.Generator().manual_seed(0))
    return Batch(levels.float() / 255, None, torch.arange(50, 50 + count))


class Anything(torch.nn.Module):
    """A transform that draws from every global generator."""

    def forward(self, image):
        level = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
        return (image * (level / 3)).to(image.dtype)


class Failing(torch.nn.Module):
    """Draws, and then fails at the third image."""

    calls = 0

    def forward(self, image):
        Anything()(image)
        Failing.calls += 1
        if Failing.calls == 3:
            raise ArithmeticError("the third image")
        return image


class InPlace(torch.nn.Module):
    """Writes into the image that it is given."""

    def forward(self, image):
        return image.mul_(0.5)


class Held(mt.Transform):
    """Holds a random part that it never seeds."""

    def __init__(self):
        self.part = mt.RandGaussianNoise(prob=1, std=0.2)

    def __call__(self, image):
        return self.part(image)


@dataclass(frozen=True)
class Case:
    """A random transform, and what the library makes of one image by hand with a seed."""

    shift: Any
    by_hand: Any


def by_hand(transform, seeded=None, *, pixels="float32", after=lambda image: image):
    def run(image, seed):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        if seeded is not None:
            seeded(transform, seed)
        given = (image * 255).round().to(torch.uint8) if pixels == "uint8" else image
        done = torch.as_tensor(after(transform(given)))
        return done.float() / 255 if done.dtype == torch.uint8 else done.clamp(0, 1)

    return run


def tv_jitter():
    return v2.Compose([v2.ColorJitter(0.5, 0.5, 0.5, 0.2), v2.RandomAffine(20)])


def monai_pipeline():
    either = mt.OneOf([mt.RandBiasField(prob=1), mt.RandAdjustContrast(prob=1)])
    return mt.Compose([mt.RandGaussianNoise(prob=1, std=0.1), either])


def monai_hand():
    return by_hand(monai_pipeline(), lambda pipeline, seed: pipeline.set_random_state(seed), after=mt.ToTensor())


def tio_pipeline():
    return tio.Compose([tio.RandomNoise(std=0.1), tio.OneOf([tio.RandomGhosting(), tio.RandomGamma()])])


def tio_hand():
    pipeline = tio_pipeline()
    return by_hand(lambda image: pipeline(image[..., None])[..., 0])


def albumentations_hand():
    transform = A.GaussNoise(std_range=(0.1, 0.2), p=1)

    def run(image):
        return transform(image=image.permute(1, 2, 0).numpy())["image"].transpose(2, 0, 1)

    return by_hand(run, lambda _, seed: transform.set_random_seed(seed), pixels="uint8")


CASES = {
    "albumentations": Case(
        FromAlbumentations(A.GaussNoise(std_range=(0.1, 0.2), p=1), name="al-noise"), albumentations_hand()
    ),
    "torchvision": Case(FromTorchvision(tv_jitter(), name="tv-jitter"), by_hand(tv_jitter(), pixels="uint8")),
    "torchvision floats": Case(
        FromTorchvision(v2.GaussianNoise(sigma=0.1), name="tv-noise", pixels="float32"),
        by_hand(v2.GaussianNoise(sigma=0.1)),
    ),
    "module": Case(FromTorchvision(Anything(), name="module"), by_hand(Anything(), pixels="uint8")),
    "monai": Case(FromMONAI(monai_pipeline(), name="monai-mix"), monai_hand()),
    "monai held": Case(FromMONAI(Held(), name="monai-held"), None),
    "torchio": Case(FromTorchIO(tio_pipeline(), name="tio-mix"), tio_hand()),
}


@pytest.fixture(params=list(CASES), ids=list(CASES))
def case(request):
    return CASES[request.param]


def global_state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


# ---- from other libraries


@pytest.mark.parametrize("channels", [1, 3])
def test_a_result_depends_on_seed_id_and_severity_only(case, channels):
    batch, ctx, shift = batch_of(channels=channels), ShiftContext(seed=4), case.shift
    whole = shift.on(batch, 3, ctx).images
    assert whole.shape == batch.images.shape
    assert 0 <= whole.min().item() < whole.max().item() <= 1
    for index in (torch.tensor([5, 2, 0]), torch.tensor([3]), torch.arange(5, -1, -1)):
        assert torch.equal(shift.on(batch.select(index), 3, ctx).images, whole[index])
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        before = global_state()
        assert torch.equal(shift.on(batch, 3, ctx).images, whole)
        assert global_state() == before
    assert not torch.equal(shift.on(batch, 3, ShiftContext(seed=5)).images, whole)
    assert torch.equal(shift.on(batch, 0, ctx).images, batch.images)
    assert torch.equal(pickle.loads(pickle.dumps(shift)).on(batch, 3, ctx).images, whole)


def test_different_samples_get_different_draws(case):
    same = Batch(batch_of(1).images.expand(COUNT, -1, -1, -1), None, torch.arange(COUNT))
    images = case.shift.on(same, 3, ShiftContext()).images
    assert len(torch.unique(images.flatten(1), dim=0)) == COUNT


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.by_hand])
def test_it_is_what_the_library_makes_with_that_seed(name):
    case = CASES[name]
    batch, ctx = batch_of(), ShiftContext(seed=11)
    seeds = case.shift.prepare(batch, ctx).tolist()
    assert len(set(seeds)) == COUNT
    with same_random_state():
        expected = torch.stack([case.by_hand(image, seed) for image, seed in zip(batch.images, seeds, strict=True)])
    assert torch.equal(case.shift.on(batch, 2, ctx).images, expected)


def test_equal_parts_of_a_composition_are_independent():
    grey = Batch(torch.full((8, 1, 48, 48), 0.5), None, torch.arange(8))
    parts = {
        "albumentations": lambda: A.GaussNoise(std_range=(0.05, 0.05), p=1),
        "monai": lambda: mt.RandGaussianNoise(prob=1, std=0.05, sample_std=False),
        "torchio": lambda: tio.RandomNoise(std=(0.05, 0.05)),
        "torchvision": lambda: v2.GaussianNoise(sigma=0.05),
    }
    shifts = (
        FromAlbumentations(A.Compose([parts["albumentations"]() for _ in range(2)])),
        FromMONAI(mt.Compose([parts["monai"]() for _ in range(2)])),
        FromTorchIO(tio.Compose([parts["torchio"]() for _ in range(2)])),
        FromTorchvision(v2.Compose([parts["torchvision"]() for _ in range(2)]), pixels="float32"),
    )
    for shift in shifts:
        spread = (shift.on(grey, 1, ShiftContext()).images - 0.5).std().item()
        assert spread == pytest.approx(0.05 * 2**0.5, rel=0.05), shift.name


def test_global_state_is_put_back_when_a_transform_fails():
    Failing.calls = 0
    before = global_state()
    with pytest.raises(ArithmeticError, match="the third image"):
        FromTorchvision(Failing(), name="failing").on(batch_of(), 3, ShiftContext())
    assert Failing.calls == 3
    assert global_state() == before


def test_the_callers_transform_and_images_are_left_alone():
    own = mt.Compose([mt.RandGaussianNoise(prob=1)])
    own.set_random_state(7)
    states = [part.R.get_state()[1].tolist() for part in (own, own.transforms[0])]
    FromMONAI(own, name="own").on(batch_of(), 3, ShiftContext())
    assert [part.R.get_state()[1].tolist() for part in (own, own.transforms[0])] == states
    batch = batch_of()
    assert torch.equal(
        FromTorchvision(InPlace(), name="in-place", pixels="float32").on(batch, 3, ShiftContext()).images,
        batch_of().images * 0.5,
    )
    assert torch.equal(batch.images, batch_of().images)
    module = Anything()
    module.note = "before"
    FromTorchvision(module, name="own").on(batch_of(), 3, ShiftContext())
    assert vars(module)["note"] == "before"


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (FromTorchvision, lambda severity: v2.GaussianBlur(9, sigma=severity)),
        (FromMONAI, lambda severity: mt.GaussianSmooth(sigma=severity)),
        (FromTorchIO, lambda severity: tio.Blur((severity, severity, 0))),
    ],
)
def test_a_function_maps_severity_to_a_transform(kind, make):
    batch = batch_of(2)
    spreads = [
        kind(make, name="blur").on(batch, severity, ShiftContext()).images.std().item() for severity in (0.6, 1, 3)
    ]
    assert spreads == sorted(spreads, reverse=True)
    with pytest.raises(KindError, match="from the function"):
        kind(lambda severity: severity, name="bad").on(batch, 3, ShiftContext())


@pytest.mark.parametrize(
    "shift",
    [
        FromTorchvision(v2.CenterCrop(8), name="bad"),
        FromTorchvision(v2.ToDtype(torch.float32, scale=True), name="bad"),
        FromTorchvision(v2.ToDtype(torch.uint8, scale=True), name="bad", pixels="float32"),
        FromMONAI(mt.CenterSpatialCrop(8), name="bad"),
        FromTorchIO(tio.Crop((2, 2, 0)), name="bad"),
    ],
    ids=["torchvision crop", "to float", "to bytes", "monai crop", "torchio crop"],
)
def test_transforms_that_change_shape_or_type_are_refused(shift):
    with pytest.raises(ShapeError, match="Leave out crops"):
        shift.on(batch_of(1), 3, ShiftContext())


@pytest.mark.parametrize("kind", [FromAlbumentations, FromTorchvision, FromMONAI, FromTorchIO])
def test_things_that_are_no_transform_are_refused(kind):
    for thing in (None, 3, v2.GaussianBlur, "blur"):
        with pytest.raises(KindError, match=kind.__name__):
            kind(thing, name="bad")


def test_names_versions_and_caches():
    shift = FromMONAI(mt.RandGaussianNoise(prob=1))
    assert shift.label == "monai:rand-gaussian-noise"
    assert FromTorchIO(tio.RandomNoise()).label == "torchio:random-noise"
    assert FromTorchvision(v2.ColorJitter()).label == "torchvision:color-jitter"
    assert shift_identity(shift) is None  # nothing tells it from another one of its class
    named = [FromMONAI(mt.RandGaussianNoise(prob=1), name="haze", version=version) for version in (1, 2)]
    assert None is not shift_identity(named[0]) != shift_identity(named[1])
    batch = batch_of()
    one, two = (each.on(batch, 3, ShiftContext()).images for each in named)
    assert not torch.equal(one, two)


def test_other_nonsense_is_refused():
    with pytest.raises(ConfigError, match="pixels"):
        FromTorchvision(v2.ColorJitter(), pixels="float16")
    with pytest.raises(KindError, match="dictionary transform RandGaussianNoised"):
        FromMONAI(mt.RandGaussianNoised("image"), name="bad").on(batch_of(), 3, ShiftContext())


def test_a_missing_library_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind, package in ((FromMONAI, "monai"), (FromTorchIO, "torchio"), (FromTorchvision, "torchvision")):
        with pytest.raises(MissingExtraError, match=f"pip install {package}"):
            kind(lambda severity: None, name="x")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingExtraError, match="pip install torchvision"):
        as_torchvision(GaussianNoise())


def test_importing_the_package_imports_none_of_the_libraries():
    code = (
        "import sys, corruptions.bridges; "
        "sys.exit(any(name in sys.modules for name in ('albumentations', 'torchvision', 'monai', 'torchio')))"
    )
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


# ---- to torchvision


def keys_of(seed, count=1):
    torch.manual_seed(seed)
    return torch.empty(count, dtype=torch.int64).random_()


@pytest.mark.parametrize("shift", [GaussianNoise(), Compose([GaussianNoise(), JPEG()])], ids=lambda shift: shift.label)
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_gets_what_the_shift_makes(shift, channels):
    floats = batch_of(4, channels).images
    whole = (floats * 255).round().to(torch.uint8)
    transform = as_torchvision(shift, severity=2.0, p=1)
    for images in (floats, whole, floats.double(), whole.view(2, 2, *whole.shape[1:])):
        flat = images.reshape(4, *images.shape[-3:])
        keys = keys_of(3, 4)
        torch.manual_seed(3)
        assert torch.equal(transform(images), shift(flat, 2.0, ids=keys).view(images.shape))
        assert images.dtype == transform(images).dtype
    key = keys_of(5)
    alone = shift(whole[:1], 2.0, ids=key)[0]
    torch.manual_seed(5)
    assert torch.equal(transform(whole[0]), alone)
    torch.manual_seed(5)
    assert torch.equal(transform(tv_tensors.Image(whole[0])), tv_tensors.Image(alone))
    picture = Image.fromarray(whole[0, 0].numpy() if channels == 1 else whole[0].permute(1, 2, 0).numpy())
    torch.manual_seed(5)
    changed = transform(picture)
    assert changed.mode == picture.mode
    assert np.array_equal(np.asarray(changed), alone[0].numpy() if channels == 1 else alone.permute(1, 2, 0).numpy())


def test_it_works_inside_a_torchvision_composition_and_leaves_labels_alone():
    noise, floats = as_torchvision(GaussianNoise(), severity=3, p=1), v2.ToDtype(torch.float32, scale=True)
    pipeline = v2.Compose([v2.ToImage(), noise, floats])
    picture, mask = Image.new("RGB", (20, 16), (128, 128, 128)), tv_tensors.Mask(torch.ones(16, 20))
    boxes = tv_tensors.BoundingBoxes([[1, 2, 3, 4]], format="XYXY", canvas_size=(16, 20))
    image, same, box, label = pipeline(picture, mask, boxes, 4)
    assert isinstance(image, tv_tensors.Image)
    assert image.std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(same, mask)
    assert torch.equal(box, boxes)
    assert label == 4
    assert "gaussian" in repr(pipeline).lower()


def test_images_of_a_batch_differ_and_p_holds_for_each():
    images = torch.full((600, 1, 4, 4), 0.5)
    torch.manual_seed(0)
    done = as_torchvision(GaussianNoise(), severity=5, p=0.3)(images)
    changed = (done != images).flatten(1).any(1)
    assert abs(int(changed.sum()) - 180) < 4.5 * (600 * 0.3 * 0.7) ** 0.5
    assert len(torch.unique(done[changed].flatten(1), dim=0)) == int(changed.sum())
    assert bool((images == 0.5).all())
    assert torch.equal(as_torchvision(GaussianNoise(), p=0)(images), images)


def test_severity_is_drawn_for_each_image_between_its_ends():
    torch.manual_seed(1)
    images = torch.full((300, 1, 24, 24), 0.5)
    done = as_torchvision(GaussianNoise(), severity=(1, 4), p=1)(images)
    spread = (done - 0.5).flatten(1).std(1)
    ends = [GaussianNoise().parameters(severity)["sigma"][0] for severity in (1, 4)]
    assert 0.8 * ends[0] < spread.min().item() < 1.3 * ends[0]
    assert 0.8 * ends[1] < spread.max().item() < 1.2 * ends[1]
    pipeline = A.Compose([as_albumentations(GaussianNoise(), severity=(1, 4), p=1)], seed=2)
    stds = [(pipeline(image=np.full((24, 24), 0.5, np.float32))["image"] - 0.5).std() for _ in range(300)]
    assert 0.8 * ends[0] < min(stds) < 1.3 * ends[0]
    assert 0.8 * ends[1] < max(stds) < 1.2 * ends[1]


def test_every_image_has_a_scanner_of_its_own():
    done = as_torchvision(FixedPattern(), severity=4, p=1)(torch.full((5, 1, 12, 12), 0.5))
    assert len(torch.unique(done.flatten(1), dim=0)) == 5


class Grey(Dataset):
    """One grey image, many times, under a random transform."""

    def __init__(self):
        self.transform = as_torchvision(GaussianNoise(), severity=3, p=1)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.transform(torch.full((1, 6, 6), 128, dtype=torch.uint8))


def test_workers_draw_differently_and_repeat_with_a_seed():
    def epoch(seed):
        loader = DataLoader(Grey(), batch_size=4, num_workers=2, generator=torch.Generator().manual_seed(seed))
        return torch.cat(list(loader))

    first = epoch(1)
    assert len(torch.unique(first.flatten(1), dim=0)) == 8
    assert torch.equal(epoch(1), first)
    assert not torch.equal(epoch(2), first)


def test_it_travels_and_other_input_is_refused():
    transform = pickle.loads(pickle.dumps(as_torchvision(GaussianNoise(), p=1)))
    with pytest.raises(RangeError, match=r"pixels in \[0, 1\]"):
        transform(torch.full((1, 4, 4), -2.0))
    with pytest.raises(ShapeError, match=r"C, H, W"):
        transform(torch.zeros(4, 4))
    with pytest.raises(KindError, match="as_torchvision"):
        transform(torch.zeros(1, 4, 4, dtype=torch.int64))
    with pytest.raises(ShapeError, match="'RGBA'"):
        transform(Image.new("RGBA", (4, 4)))


@pytest.mark.parametrize("make", [as_torchvision, as_albumentations])
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"severity": 7}, RangeError, "severity"),
        ({"severity": "3"}, KindError, "severity"),
        ({"severity": (1, 2, 3)}, KindError, "pair"),
        ({"severity": (4, 1)}, RangeError, "Swap"),
        ({"severity": (0, 9)}, RangeError, "severity"),
        ({"p": 1.5}, RangeError, "p from 0 to 1"),
        ({"p": None}, KindError, "p as a number"),
    ],
)
def test_arguments_are_checked(make, options, error, match):
    with pytest.raises(error, match=match):
        make(GaussianNoise(), **options)
    with pytest.raises(KindError, match=make.__name__):
        make("jpeg")


# ---- to albumentations


def test_albumentations_gets_what_the_shift_makes():
    image = (batch_of(1).images[0] * 255).round().to(torch.uint8)
    transform = as_albumentations(Compose([GaussianNoise(), JPEG()]), severity=2.0, p=1)
    transform.set_random_seed(3)
    twin = as_albumentations(GaussianNoise(), p=1)
    twin.set_random_seed(3)
    key = torch.tensor([twin.get_params()["key"]])
    expected = Compose([GaussianNoise(), JPEG()])(image[None], 2.0, ids=key)[0]
    changed = transform(image=image.permute(1, 2, 0).numpy())["image"]
    assert torch.equal(torch.from_numpy(changed).permute(2, 0, 1), expected)
