from pathlib import Path

import numpy as np
import pytest
import torch

from robustlab.core.errors import DataFileError, ShapeError, UnknownNameError
from robustlab.data import load_data

SHARED = Path(__file__).resolve().parents[3] / ".." / "shared" / "data"


def _shared(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} is not in ../shared/data")
    return path


def _write(path, **arrays):
    np.savez(path, **arrays)
    return path


def _images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)


def test_splits_labels_ids_and_columns(tmp_path):
    path = _write(
        tmp_path / "set.npz",
        train_images=_images(4, 1),
        train_labels=np.array([[0], [1], [2], [0]], dtype=np.uint8),
        train_age=np.array([20, 30, 40, 50]),
        test_images=_images(3, 2),
        test_labels=np.array([[2], [1], [0]], dtype=np.uint8),
        test_ids=np.array([30, 10, 20]),
        test_patient=np.array(["b", "a", "b"]),
        test_age=np.array([60, 70, 80]),
        test_masks=np.zeros((3, 8, 8), dtype=np.uint8),
    )
    test = load_data(path)
    assert test.info.name == "set"
    assert test.info.ids.tolist() == [30, 10, 20]
    assert test.info.labels is not None
    assert test.info.labels.tolist() == [2, 1, 0]
    assert test.info.group_levels["patient"] == ("a", "b")
    assert test.column("patient").tolist() == [1, 0, 1]
    assert "test_masks" in test.info.notes[0]
    assert torch.equal(test.pixels([1])[0, 0], torch.from_numpy(_images(3, 2)[1]).float().div(255))
    train = load_data(str(path), split="train")
    assert len(train) == 4
    assert train.info.ids.tolist() == [0, 1, 2, 3]
    assert train.info.task == "multiclass"


def test_age_groups_have_the_same_bounds_in_every_split(tmp_path):
    path = _write(
        tmp_path / "ages.npz",
        val_images=_images(4),
        val_age=np.array([1, 2, 3, 4]),
        test_images=_images(4),
        test_age=np.array([5, 6, 7, 8]),
    )
    assert load_data(path, split="val").info.group_levels["age"] == ("1-2", "3-4")
    assert load_data(path, split="test").info.group_levels["age"] == ("5-6", "7-8")


def test_what_the_call_states_wins_over_the_file(tmp_path):
    path = _write(tmp_path / "a.npz", test_images=_images(3), test_labels=np.array([0, 1, 0]), test_sex=np.arange(3))
    source = load_data(path, labels=[1, 1, 0], ids=[7, 8, 9], groups={"sex": ["F", "M", "F"]})
    assert source.info.labels is not None
    assert source.info.labels.tolist() == [1, 1, 0]
    assert source.info.ids.tolist() == [7, 8, 9]
    assert source.info.group_levels["sex"] == ("F", "M")


@pytest.mark.parametrize(
    ("arrays", "split", "message"),
    [
        ({"train_images": _images(2)}, "test", r"splits train. Pass split='train'"),
        ({"images": _images(2), "labels": np.zeros(2)}, "test", "test_images, test_labels"),
        ({"test_images": np.array([object(), object()])}, "test", "without pickled objects"),
    ],
)
def test_missing_splits_keys_and_pickles(tmp_path, arrays, split, message):
    path = _write(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataFileError, match=message):
        load_data(path, split=split)


def test_damaged_files_and_other_files(tmp_path):
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "table.csv").write_text("a,b")
    np.save(tmp_path / "single.npy", _images(2))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    with pytest.raises(DataFileError, match="readable NPZ"):
        load_data(tmp_path / "torn.npz")
    with pytest.raises(DataFileError, match="readable NPZ"):
        load_data(tmp_path / "single.npz")
    with pytest.raises(DataFileError, match=r"a file \.csv"):
        load_data(tmp_path / "table.csv")
    with pytest.raises(DataFileError, match="nothing there"):
        load_data(tmp_path / "absent.npz")


def test_a_truncated_npz_is_refused(tmp_path):
    path = _write(tmp_path / "whole.npz", test_images=_images(50))
    (tmp_path / "half.npz").write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataFileError, match="readable NPZ"):
        load_data(tmp_path / "half.npz")


def test_volumes_are_refused(tmp_path):
    path = _write(tmp_path / "volumes.npz", test_images=np.zeros((2, 28, 28, 28), dtype=np.uint8))
    with pytest.raises(ShapeError, match="Volumes"):
        load_data(path)


def test_medmnist_by_name_reads_the_file_on_disk(tmp_path, monkeypatch):
    medmnist_dataset = pytest.importorskip("medmnist.dataset")
    monkeypatch.setattr(medmnist_dataset, "DEFAULT_ROOT", str(tmp_path))
    with pytest.raises(DataFileError, match=r"does not download.*PneumoniaMNIST\(split='test', download=True\)"):
        load_data("medmnist:pneumoniamnist")
    _write(tmp_path / "pneumoniamnist.npz", test_images=_images(3), test_labels=np.array([[0], [1], [1]]))
    source = load_data("medmnist:pneumoniamnist")
    assert source.info.class_names == ("normal", "pneumonia")
    assert source.info.name == "pneumoniamnist"
    with pytest.raises(UnknownNameError, match="'pneumoniamnist'"):
        load_data("medmnist:pneumonia")


def test_official_pneumoniamnist():
    source = load_data(_shared("pneumoniamnist.npz"))
    assert len(source) == 624
    assert (source.info.spec.channels, source.info.spec.size, source.info.spec.bits) == (1, (28, 28), 8)
    assert source.info.task == "binary"
    assert source.info.labels is not None
    assert torch.bincount(source.info.labels).tolist() == [234, 390]
    with np.load(_shared("pneumoniamnist.npz")) as archive:
        expected = torch.from_numpy(archive["test_images"][[623, 5]]).float().div(255)
    assert torch.equal(source.pixels([623, 5])[:, 0], expected)
    assert len(load_data(_shared("pneumoniamnist.npz"), split="val")) == 524


def test_nih_patients_with_several_labels_and_attributes():
    source = load_data(_shared("nih_cxr_patients_96.npz"), modality="xray")
    info = source.info
    assert info.task == "multilabel"
    assert info.labels is not None
    assert info.labels.sum(0).tolist() == [17, 2, 14, 29, 4, 5, 81, 0, 3, 21, 1, 2, 8, 0]
    assert len(info.group_levels["patient"]) == 125
    assert info.group_levels["sex"] == ("0", "1")
    assert 2 <= len(info.group_levels["age"]) <= 4
    assert (source.column("age") >= 0).all()
    assert int(torch.bincount(source.column("age")).min()) > 20
