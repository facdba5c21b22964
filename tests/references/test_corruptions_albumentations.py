"""The bridge to albumentations, both ways."""

import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from corruptions import Compose, FromAlbumentations, GaussianNoise, as_albumentations
from robustlab.core.errors import KindError, RangeError, ShapeError
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch, ImageSpec

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A


def batch_of(count, channels=3, size=24):
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (count, channels, size, size), generator=generator)
    return Batch(levels.float() / 255, None, torch.arange(50, 50 + count))


def noisy():
    return FromAlbumentations(A.GaussNoise(std_range=(0.1, 0.1), p=1), name="al-noise")


@pytest.mark.parametrize("channels", [1, 3])
def test_results_do_not_depend_on_batch_order_or_earlier_calls(channels):
    batch, ctx = batch_of(6, channels), ShiftContext(seed=4)
    shift = noisy()
    whole = shift.on(batch, 3, ctx).images
    index = torch.tensor([5, 2, 0])
    assert torch.equal(shift.on(batch.select(index), 3, ctx).images, whole[index])
    assert torch.equal(noisy().on(batch, 3, ctx).images, whole)
    assert not torch.equal(whole[0] - batch.images[0], whole[1] - batch.images[1])
    assert not torch.equal(shift.on(batch, 3, ShiftContext(seed=5)).images, whole)


def test_a_deterministic_transform_gives_what_albumentations_gives():
    batch = batch_of(3)
    transform = A.InvertImg(p=1)
    expected = 1 - batch.images
    changed = FromAlbumentations(transform, name="invert").on(batch, 1, ShiftContext()).images
    assert torch.allclose(changed, expected, atol=1e-6)
    assert torch.equal(FromAlbumentations(transform, name="invert").on(batch, 0, ShiftContext()).images, batch.images)


def test_a_function_maps_severity_to_a_transform():
    seen = []

    def by_severity(severity):
        seen.append(severity)
        return A.GaussianBlur(sigma_limit=(severity, severity), blur_limit=0, p=1)

    shift = FromAlbumentations(by_severity, name="al-blur")
    batch = batch_of(2)
    spread = [shift.on(batch, severity, ShiftContext()).images.std().item() for severity in (0.5, 1.0, 3.0)]
    assert spread == sorted(spread, reverse=True)
    assert set(seen) == {0.5, 1.0, 3.0}


def test_children_of_a_composition_are_independent():
    grey = Batch(torch.full((8, 1, 64, 64), 0.5), None, torch.arange(8))
    pair = A.Compose([A.GaussNoise(std_range=(0.05, 0.05), p=1), A.GaussNoise(std_range=(0.05, 0.05), p=1)])
    two = FromAlbumentations(pair, name="twice")
    sigma = (two.on(grey, 1, ShiftContext()).images - 0.5).std().item()
    assert sigma == pytest.approx(0.05 * 2**0.5, rel=0.05)


def test_the_callers_transform_and_global_state_are_left_alone():
    class Global(A.ImageOnlyTransform):
        """A badly written transform that uses every global generator."""

        def apply(self, img, **params):
            shift = int(random.random() * 50 + np.random.rand() * 50 + torch.rand(()).item() * 50)  # noqa: NPY002
            return np.roll(img, shift, axis=0)

    batch = batch_of(5)
    shift = FromAlbumentations(Global(p=1), name="global")
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    first = shift.on(batch, 3, ShiftContext()).images
    assert before[0] == random.getstate()
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[2], torch.get_rng_state())
    random.seed(99)
    assert torch.equal(shift.on(batch, 3, ShiftContext()).images, first)
    assert torch.equal(shift.on(batch.select(torch.tensor([3])), 3, ShiftContext()).images[0], first[3])
    own = A.GaussNoise(p=1)
    own.set_random_seed(7)
    state = own.random_generator.bit_generator.state
    FromAlbumentations(own, name="own").on(batch, 3, ShiftContext())
    assert own.random_generator.bit_generator.state == state


@pytest.mark.parametrize("transform", [A.RandomCrop(8, 8, p=1), A.ToFloat(p=1)], ids=["crop", "float"])
def test_transforms_that_change_shape_or_type_are_refused(transform):
    with pytest.raises(ShapeError, match="Leave out crops"):
        FromAlbumentations(transform, name="bad").on(batch_of(1), 3, ShiftContext())


@pytest.mark.parametrize("transform", [None, A.GaussNoise, 3])
def test_things_that_are_no_transform_are_refused(transform):
    with pytest.raises(KindError, match="FromAlbumentations"):
        FromAlbumentations(transform, name="bad")


def test_a_function_must_return_a_transform():
    with pytest.raises(KindError, match="from the function"):
        FromAlbumentations(lambda severity: severity, name="bad").on(batch_of(1), 3, ShiftContext())


def test_other_channel_counts_are_skipped_with_a_reason():
    assert "1 or 3 channels" in (noisy().skip_reason(ImageSpec(4, (8, 8))) or "")
    with pytest.raises(ShapeError, match="1 or 3 channels"):
        noisy().on(batch_of(1, 4), 3, ShiftContext())


def test_it_composes_with_our_own_shifts():
    shift = Compose([noisy(), GaussianNoise()])
    batch = batch_of(3)
    assert shift.label == "al-noise+gaussian-noise"
    assert not torch.equal(shift.on(batch, 2, ShiftContext()).images, batch.images)


@pytest.mark.parametrize("shape", [(20, 24), (20, 24, 1), (20, 24, 3)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_corruption_works_inside_albumentations(shape, dtype):
    image = np.full(shape, 128 if dtype is np.uint8 else 0.5, dtype)
    pipeline = A.Compose([as_albumentations(GaussianNoise(), severity=4, p=1)], seed=3)
    changed = pipeline(image=image)["image"]
    assert changed.shape == shape
    assert changed.dtype == dtype
    spread = changed.astype(float).std() / (255 if dtype is np.uint8 else 1)
    assert spread == pytest.approx(0.16, rel=0.1)
    assert image.std() == 0


def test_albumentations_seeds_reproduce_and_successive_images_differ():
    image = np.full((16, 16, 3), 128, np.uint8)

    def run(seed):
        pipeline = A.Compose([as_albumentations(GaussianNoise(), severity=3, p=1)], seed=seed)
        return [pipeline(image=image)["image"] for _ in range(3)]

    first, again, other = run(1), run(1), run(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])


def test_p_is_honoured_and_arguments_are_checked():
    image = np.full((4, 4), 128, np.uint8)
    pipeline = A.Compose([as_albumentations(GaussianNoise(), severity=5, p=0.3)], seed=0)
    changed = sum(not np.array_equal(pipeline(image=image)["image"], image) for _ in range(400))
    assert 85 < changed < 155
    with pytest.raises(KindError, match="as_albumentations"):
        as_albumentations("jpeg")
    with pytest.raises(RangeError, match="severity"):
        as_albumentations(GaussianNoise(), severity=7)
    with pytest.raises(RangeError, match="p from 0 to 1"):
        as_albumentations(GaussianNoise(), p=1.5)


def test_the_transform_travels_to_worker_processes():
    transform = pickle.loads(pickle.dumps(as_albumentations(GaussianNoise(), severity=3, p=1)))
    image = np.full((8, 8, 3), 128, np.uint8)
    assert not np.array_equal(transform(image=image)["image"], image)
    assert "gaussian" in repr(transform).lower()


def test_importing_the_package_does_not_import_albumentations():
    code = "import sys, corruptions; sys.exit('albumentations' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_transform_without_a_name_is_called_after_its_class():
    import albumentations as A

    from corruptions import FromAlbumentations

    assert FromAlbumentations(A.GaussianBlur(p=1)).label == "albumentations:gaussian-blur"
    assert FromAlbumentations(A.GaussianBlur(p=1), name="haze").label == "haze"
