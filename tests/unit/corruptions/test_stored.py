"""Stored corrupted sets as shifts: three layouts, written here and read back."""

import dataclasses
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import robustlab
from corruptions import JPEG, Compose
from corruptions.stored import Stored, stored_suite
from robustlab.core.errors import (
    ConfigError,
    DataFileError,
    KindError,
    LabelError,
    RangeError,
    RobustlabWarning,
    ShapeError,
)
from robustlab.core.shift import ShiftContext
from robustlab.core.types import ImageSpec
from robustlab.data import subset
from robustlab.evaluate.cache import shift_identity

COUNT = 7
LABELS = np.array([0, 2, 1, 1, 0, 2, 1])
NAMES = ("fog", "gaussian_noise")


def pixels(name, severity, channels=3, size=(6, 5)):
    """What the set holds, (N, H, W[, C])."""
    seed = NAMES.index(name) * 10 + severity
    shape = (COUNT, *size, 3) if channels == 3 else (COUNT, *size)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def arrays(channels=3, **options):
    return robustlab.load_data(pixels("fog", 0, channels), labels=LABELS, ids=np.arange(90, 90 + COUNT), **options)


def write_npy(root, labels=LABELS):
    root.mkdir(exist_ok=True)
    for name in NAMES:
        np.save(root / f"{name}.npy", np.concatenate([pixels(name, severity) for severity in range(1, 6)]))
    np.save(root / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    return root


def write_npz(root, channels=1, save=np.savez_compressed, labels=LABELS):
    root.mkdir(exist_ok=True)
    for name in NAMES:
        images = np.concatenate([pixels(name, severity, channels) for severity in range(1, 6)])
        save(root / f"{name}.npz", test_images=images, test_labels=np.tile(labels[:, None], (5, 1)))
    return root


def sample(row):
    """Names whose natural order, that of a source, is not their plain one."""
    return f"class{LABELS[row]}/image{5 * row}.png"


def write_images(root, images):
    for row, image in enumerate(images):
        file = root / sample(row)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)


def write_folders(root, family="noise/"):
    for name in NAMES:
        for severity in range(1, 6):
            write_images(root / f"{family}{name}" / str(severity), pixels(name, severity))
    return root


def clean_folder(root, split=""):
    write_images(root / split, pixels("fog", 0))
    return robustlab.load_data(root, split=split or "test")


@pytest.fixture(params=["npy", "npz grey", "npz colour", "npz plain", "folder", "folder, no family", "folder, split"])
def made(request, tmp_path):
    """The clean source, the path of the stored set, and the order of its samples in the source."""
    kind, _, rest = request.param.partition(" ")
    if kind == "npy":
        return arrays(), write_npy(tmp_path / "c"), range(COUNT)
    if kind == "npz":
        channels = 1 if rest == "grey" else 3
        save = np.savez if rest == "plain" else np.savez_compressed
        return arrays(channels), write_npz(tmp_path / "c", channels, save), range(COUNT)
    source = clean_folder(tmp_path / "clean", "val" if rest == "split" else "")
    root = write_folders(tmp_path / "c", "" if rest == "no family" else "noise/")
    return source, root, sorted(range(COUNT), key=lambda row: (LABELS[row], row))


def test_every_stored_image_comes_back_bit_for_bit_by_its_id(made):
    source, path, rows = made
    suite = stored_suite(path, source)
    assert [shift.label for shift in suite] == list(NAMES)
    order = torch.tensor([3, 0, 6, 3, 5])  # any order, and one twice
    batch = source.read(order.tolist())
    for shift in suite:
        for severity in (1, 2, 3, 4, 5):
            stored = pixels(shift.label, severity, batch.images.shape[1]).reshape(COUNT, 6, 5, -1)
            expected = torch.from_numpy(stored[[rows[i] for i in order]]).permute(0, 3, 1, 2)
            assert torch.equal(shift.on(batch, severity, ShiftContext(seed=severity)).images, expected.float() / 255)
            whole = dataclasses.replace(batch, images=torch.zeros_like(expected))
            assert torch.equal(shift.on(whole, severity, ShiftContext()).images, expected)
        double = batch.replace(batch.images.double())
        assert shift.on(double, 5, ShiftContext()).images.dtype == torch.float64
        assert shift.on(batch, 0, ShiftContext()) is batch


def test_it_is_found_by_workers_and_caches(made):
    source, path, _ = made
    first, second = stored_suite(path, source)
    again = pickle.loads(pickle.dumps(first))
    assert len(pickle.dumps(first)) < 3000
    assert again == first
    assert again != second
    batch = source.read(range(COUNT))
    assert torch.equal(again.on(batch, 2, ShiftContext()).images, first.on(batch, 2, ShiftContext()).images)
    assert shift_identity(first) == shift_identity(stored_suite(path, source)[0])
    assert shift_identity(first) != shift_identity(second)


def test_the_identity_changes_with_what_is_stored(tmp_path):
    def identities():
        source = clean_folder(tmp_path / "clean")
        suites = stored_suite(tmp_path / "npy", arrays()), stored_suite(tmp_path / "folder", source)
        return [shift_identity(suite[0]) for suite in suites]

    write_npy(tmp_path / "npy")
    write_folders(tmp_path / "folder")
    before = identities()
    stack = np.load(tmp_path / "npy" / "fog.npy")
    stack[17, 2, 2, 0] ^= 1
    np.save(tmp_path / "npy" / "fog.npy", stack)
    image = pixels("fog", 5)[3]
    image[0, 0, 0] ^= 1
    Image.fromarray(image).save(tmp_path / "folder" / "noise" / "fog" / "5" / sample(3))
    after = identities()
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert not torch.equal(
        stored_suite(tmp_path / "npy", arrays())[0].on(arrays().read(range(COUNT)), 3, ShiftContext()).images[3],
        torch.from_numpy(pixels("fog", 3)[3]).permute(2, 0, 1) / 255,
    )


def test_a_subset_is_evaluated_with_the_suite_of_the_whole(tmp_path):
    source = arrays()
    suite = stored_suite(write_npy(tmp_path), source)
    part = subset(source, [5, 1])
    images = suite[0].on(part.read([0, 1]), 2, ShiftContext()).images
    assert torch.equal(images, torch.from_numpy(pixels("fog", 2)[[5, 1]]).permute(0, 3, 1, 2) / 255)


def test_an_evaluation_runs_on_it(tmp_path):
    source = arrays()
    seen = []

    def net(images):
        seen.append(images.clone())
        return images.mean((2, 3)) * 10

    shifts = stored_suite(write_npy(tmp_path), source)
    report = robustlab.evaluate_under_shift(
        robustlab.wrap(net, num_classes=3), source, shifts=shifts, severities=(1, 5), detectors=(), progress=False,
        batch_size=COUNT,
    )  # fmt: skip
    assert {row.shift for row in report.rows} >= set(NAMES)
    for name in NAMES:
        for severity in (1, 5):
            expected = torch.from_numpy(pixels(name, severity)).permute(0, 3, 1, 2) / 255
            assert any(torch.equal(images, expected) for images in seen), (name, severity)


# ---- what is refused


@pytest.mark.parametrize("severity", [0.5, 2.5, 4.999])
def test_other_severities_do_not_exist(made, severity):
    source, path, _ = made
    shift = stored_suite(path, source)[0]
    with pytest.raises(RangeError, match="1, 2, 3, 4, 5"):
        shift.on(source.read([0]), severity, ShiftContext())
    with pytest.raises(RangeError, match="1, 2, 3, 4, 5"):
        shift.parameters(severity)  # so that a plan is refused before it is run
    assert shift.parameters(3)["severity"] == (3.0, "severity")
    assert shift.parameters(0)["severity"] == (0.0, "severity")


def test_unknown_ids_are_refused(made):
    source, path, _ = made
    batch = dataclasses.replace(source.read([0, 1]), ids=torch.tensor([int(source.info.ids[0]), 12345]))
    with pytest.raises(ConfigError, match="id 12345"):
        stored_suite(path, source)[0].on(batch, 1, ShiftContext())


@pytest.mark.parametrize("layout", ["npy", "npz"])
def test_another_order_is_found_by_its_labels(tmp_path, layout):
    wrong = LABELS.copy()
    wrong[[4, 5]] = wrong[[5, 4]]
    path = write_npy(tmp_path, wrong) if layout == "npy" else write_npz(tmp_path, 3, labels=wrong)
    with pytest.raises(LabelError, match=r"2 others|10 others") as caught:
        stored_suite(path, arrays())
    assert ("labels.npy" if layout == "npy" else "fog.npz") in str(caught.value)
    assert "row 4: 2 in place of 0" in str(caught.value)


def test_labels_may_be_stored_once_or_be_missing(tmp_path):
    write_npy(tmp_path)
    np.save(tmp_path / "labels.npy", LABELS)
    assert len(stored_suite(tmp_path, arrays())) == 2
    (tmp_path / "labels.npy").unlink()
    with pytest.warns(RobustlabWarning, match="order of the samples could not be compared"):
        assert len(stored_suite(tmp_path, arrays())) == 2
    unlabelled = robustlab.load_data(pixels("fog", 0))
    assert len(stored_suite(write_npy(tmp_path, LABELS[::-1]), unlabelled)) == 2


def test_labels_of_several_findings_are_compared_by_row(tmp_path):
    findings = np.eye(7, 4, dtype=np.int64)[:, :2] + np.eye(7, 2, dtype=np.int64)[::-1]
    source = robustlab.load_data(pixels("fog", 0, 1), labels=findings, task="multilabel")
    write_npz(tmp_path)
    for name in NAMES:
        images = np.concatenate([pixels(name, severity, 1) for severity in range(1, 6)])
        np.savez(tmp_path / f"{name}.npz", test_images=images, test_labels=np.tile(findings, (5, 1)))
    assert len(stored_suite(tmp_path, source)) == 2
    np.savez(tmp_path / "fog.npz", test_images=images, test_labels=np.tile(1 - findings, (5, 1)))
    with pytest.raises(LabelError, match="row 0"):
        stored_suite(tmp_path, source)


def test_classes_of_folders_are_compared(tmp_path):
    clean_folder(tmp_path / "clean")
    names = ("class2", "class1", "class0")
    source = robustlab.load_data(tmp_path / "clean", class_names=names)  # another order of the same names: right
    path = write_folders(tmp_path / "c")
    assert len(stored_suite(path, source)) == 2
    labels = sorted(LABELS.tolist())
    labels[3] = 0
    wrong = robustlab.load_data(tmp_path / "clean", labels=labels, class_names=names[::-1])
    with pytest.raises(LabelError, match="sample 3"):
        stored_suite(path, wrong)


def test_numbers_sizes_and_kinds_are_checked(tmp_path):
    write_npy(tmp_path)
    with pytest.raises(ShapeError, match=r"5 x 6 images.*35"):
        stored_suite(tmp_path, subset(arrays(), range(6)))
    with pytest.raises(ShapeError, match="1 x 6 x 5"):
        stored_suite(tmp_path, arrays(1))
    shift = stored_suite(tmp_path / "fog.npy", arrays())
    assert [each.label for each in shift] == ["fog"]
    assert "3 x 6 x 5" in (shift[0].skip_reason(ImageSpec(1, (6, 5))) or "")
    assert shift[0].skip_reason(ImageSpec(3, (6, 5))) is None
    with pytest.raises(ShapeError, match="3 x 6 x 5"):
        shift[0].on(arrays(1).read([0]), 1, ShiftContext())
    np.save(tmp_path / "fog.npy", np.zeros((35, 6, 5, 3)))
    with pytest.raises(KindError, match="uint8"):
        stored_suite(tmp_path, arrays())
    with pytest.raises(KindError, match="load_data"):
        stored_suite(tmp_path, LABELS)


def test_missing_files_are_named(tmp_path):
    source = clean_folder(tmp_path / "clean")
    path = write_folders(tmp_path / "c")
    (path / "noise" / "fog" / "4" / sample(2)).unlink()
    with pytest.raises(DataFileError, match=r"4/class1/image10\.png.*no such file"):
        stored_suite(path, source)
    shutil.rmtree(path / "noise" / "fog" / "4")
    with pytest.raises(DataFileError, match=r"no 4"):
        stored_suite(path, source)
    with pytest.raises(DataFileError, match="none of them"):
        stored_suite(tmp_path / "clean", source)
    with pytest.raises(DataFileError, match="Check the path"):
        stored_suite(tmp_path / "nothing", source)
    with pytest.raises(DataFileError, match="none for 7"):
        stored_suite(write_folders(tmp_path / "d"), arrays())


def test_a_file_that_changed_its_size_later_is_refused(tmp_path):
    source = clean_folder(tmp_path / "clean")
    shift = stored_suite(write_folders(tmp_path / "c"), source)[0]
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "c" / "noise" / "fog" / "2" / sample(0))
    with pytest.raises(ShapeError, match=r"image0\.png"):
        shift.on(source.read(range(COUNT)), 2, ShiftContext())


def test_pickled_objects_and_damage_are_refused(tmp_path):
    np.savez(tmp_path / "fog.npz", test_images=np.array([{}] * 35), test_labels=np.tile(LABELS, 5))
    with pytest.raises(DataFileError, match="pickled objects"):
        stored_suite(tmp_path, arrays())
    (tmp_path / "fog.npz").write_bytes(b"PK nothing")
    with pytest.raises(DataFileError, match=r"fog\.npz"):
        stored_suite(tmp_path, arrays())
    np.savez(tmp_path / "fog.npz", train_images=LABELS)
    with pytest.raises(DataFileError, match=r"test_images.*train_images"):
        stored_suite(tmp_path, arrays())
    np.save(tmp_path / "fog.npy", np.array([{}], dtype=object))
    with pytest.raises(DataFileError, match=r"fog\.npy"):
        stored_suite(tmp_path / "fog.npy", arrays())


def test_it_composes(tmp_path):
    source = arrays()
    shift = stored_suite(write_npy(tmp_path), source)[1]
    assert isinstance(shift, Stored)
    chain = Compose([shift, JPEG.at(quality=5)])
    assert chain.label == "gaussian_noise+jpeg"
    batch = source.read(range(COUNT))
    alone = shift.on(batch, 4, ShiftContext())
    assert torch.equal(
        chain.on(batch, 4, ShiftContext()).images, JPEG.at(quality=5).on(alone, 4, ShiftContext()).images
    )
