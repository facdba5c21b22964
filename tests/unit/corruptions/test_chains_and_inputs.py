"""What goes into corruptions and from one to the next: seeds, layouts, unclipped and stored images, published sizes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import robustlab
from robustlab.core.errors import ConfigError, KindError, RangeError, ShapeError
from robustlab.core.shift import ShiftContext, from_bytes, to_bytes
from robustlab.core.types import Batch
from robustlab.corruptions import (
    Compose,
    Elastic,
    Gamma,
    GaussianNoise,
    RefLadineContrast,
    RefLadineNoise,
    RefLadineResolution,
    stored_suite,
)
from robustlab.testing import textured
from tests.contracts.toys import Small, source

PIXELS = to_bytes(textured(4, 3, 40, 36))
IDS = torch.arange(4)


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3), torch.tensor(3)], ids=lambda seed: type(seed).__name__)
def test_a_seed_is_a_number_whatever_its_type(seed):
    assert torch.equal(GaussianNoise()(PIXELS, 3, seed, IDS), GaussianNoise()(PIXELS, 3, 3, IDS))


@pytest.mark.parametrize("seed", [1.5, None, "3", True])
def test_what_is_no_integer_is_no_seed(seed):
    with pytest.raises(KindError, match="seed as an integer"):
        GaussianNoise()(PIXELS, 3, seed, IDS)


@pytest.mark.parametrize("severity", [np.float32(2.5), np.float64(2.5)])
def test_a_severity_may_be_of_any_real_type(severity):
    assert torch.equal(GaussianNoise()(PIXELS, severity, 0, IDS), GaussianNoise()(PIXELS, 2.5, 0, IDS))


def test_channels_in_the_wrong_place_are_noticed():
    with pytest.raises(ShapeError, match=r"looks like \(N, H, W, C\).*permute"):
        GaussianNoise()(PIXELS.permute(0, 2, 3, 1), 3)


def test_normalised_images_are_told_so():
    with pytest.raises(RangeError, match="before Normalize"):
        GaussianNoise()((from_bytes(PIXELS) - 0.5) / 0.2, 3)


def test_a_refusal_names_the_corruption_and_not_its_levels():
    with pytest.raises(ConfigError, match=r"^stain-shift: expected images with 3 channels"):
        robustlab.resolve("corruption", "stain-shift")()(PIXELS[:, :1], 3)


def test_bytes_are_neither_clipped_nor_rounded_between_unclipped_parts():
    chain = Compose([RefLadineNoise(), RefLadineContrast()])
    assert torch.equal(chain(PIXELS, 5, ids=IDS), to_bytes(chain(from_bytes(PIXELS), 5, ids=IDS)))


def test_parts_that_are_promised_pixels_get_them():
    noise = RefLadineNoise()
    chain = Compose([noise, Gamma()])
    images = chain(from_bytes(PIXELS), 5, ids=IDS)
    assert bool(torch.isfinite(images).all())
    first = noise.on(Batch(from_bytes(PIXELS), None, IDS), 5, ShiftContext().child(0)).images
    assert first.min() < -0.5
    wanted = Gamma().on(Batch(first.clamp(0, 1), None, IDS), 5, ShiftContext().child(1)).images
    assert torch.equal(images, wanted)


@pytest.mark.parametrize("factor", [2.0, 3.0, 4.0])
def test_low_resolution_takes_the_same_sums_with_any_number_of_threads(factor):
    images = textured(2, 3, 224, 224)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(RefLadineResolution.at(factor=factor)(images, 1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_an_evaluation_shows_unrounded_pixels_to_the_model():
    seen = []

    class Watch(Small):
        def forward(self, x):
            seen.append(x.detach().clone())
            return super().forward(x)

    robustlab.evaluate_under_shift(
        Watch(), source(count=16), shifts="ladine", severities=(5,), progress=False, replicates=100
    )
    assert min(images.min().item() for images in seen) < -1
    last = seen[-1] * 255
    assert (last - last.round()).abs().max() > 0.1


def test_what_no_file_holds_is_not_written(tmp_path):
    with pytest.raises(ConfigError, match="floats that are not rounded"):
        robustlab.write_corrupted(source(count=6), [RefLadineNoise()], (3,), tmp_path / "a", progress=False)
    out = robustlab.write_corrupted(
        source(count=6), [RefLadineNoise(), GaussianNoise()], (3,), tmp_path / "b", progress=False
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert [entry["shift"] for entry in manifest["skipped"]] == ["ref:ladine-noise"]
    assert [entry["shift"] for entry in manifest["conditions"]] == ["gaussian-noise"]


def test_a_stored_set_comes_first(tmp_path):
    data = source(count=6)
    pixels = to_bytes(data.pixels(range(6))).permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "fog.npy", np.concatenate([255 - pixels] * 5))
    np.save(tmp_path / "labels.npy", np.concatenate([data.info.labels.numpy()] * 5))
    stored = stored_suite(tmp_path, data)[0]
    assert Compose([stored, GaussianNoise()]).label == "fog+gaussian-noise"
    with pytest.raises(ConfigError, match="first place"):
        Compose([GaussianNoise(), stored])


def test_classes_with_numbers_for_names_are_no_severities(tmp_path):
    """Grades 0 to 5 as folders, in the layout of ImageNet-C."""
    generator = np.random.default_rng(0)
    images = {f"{grade}/image{grade}.png": generator.integers(0, 256, (9, 8, 3), dtype=np.uint8) for grade in range(6)}

    def write(root, change):
        for name, image in images.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(change(image)).save(root / name)

    write(tmp_path / "clean", lambda image: image)
    for severity in range(1, 6):
        write(tmp_path / "c" / "fog" / str(severity), lambda image, s=severity: image // (s + 1))
    data = robustlab.load_data(tmp_path / "clean")
    for place in (tmp_path / "c", tmp_path / "c" / "fog"):
        suite = stored_suite(place, data)
        assert [shift.label for shift in suite] == ["fog"]
        changed = suite[0].on(data.read(range(6)), 2, ShiftContext()).images
        assert torch.equal(to_bytes(changed), to_bytes(data.pixels(range(6))) // 3)


def test_whole_boxes_still_hold_their_content():
    images = torch.full((6, 1, 64, 64), 0.5)
    whole = (torch.tensor([[10, 12, 30, 40]]),) * 6
    floats = tuple(box.float() for box in whole)
    moved, exact = (
        Elastic().on(Batch(images, None, torch.arange(6), boxes=boxes), 5, ShiftContext()).boxes
        for boxes in (whole, floats)
    )
    for box, true in zip(moved, exact, strict=True):
        assert box.dtype == torch.int64
        assert (box[:, :2] <= true[:, :2]).all()
        assert (box[:, 2:] >= true[:, 2:]).all()
        assert (box - true).abs().max() < 1


def test_a_report_says_that_published_severities_were_made_for_another_size():
    def gaps(shifts):
        report = robustlab.evaluate_under_shift(
            Small(), source(count=16), shifts=shifts, severities=(2, 3), progress=False, replicates=100
        )
        return report, " ".join(report.manifest["not_tested"])

    report, told = gaps("cifar-10-c")
    assert "made for 32 x 32 px, used here on 12 x 12 px" in told
    rows = {(row.shift, row.severity): row.amount for row in report.rows}
    assert rows["gaussian_noise", 3] == 0.08
    assert np.isnan(rows["motion_blur", 2])  # its radius is 6 px at both severities
    assert "made for" not in gaps("standard")[1]
