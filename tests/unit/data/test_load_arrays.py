import sys

import numpy as np
import pytest
import torch

from robustlab.core.errors import (
    ConfigError,
    DuplicateNameError,
    KindError,
    LabelError,
    MissingExtraError,
    RangeError,
    ShapeError,
    UnknownNameError,
)
from robustlab.core.rng import stable_hash
from robustlab.core.shift import quantize
from robustlab.data import load_data, subset


def _grey(count=6, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size), dtype=np.uint8)


def test_uint8_arrays_become_the_same_floats_as_quantize_makes():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    source = load_data(images)
    pixels = source.pixels([0])
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels[0, 0].flatten(), torch.arange(256).float().div(255))
    assert torch.equal(quantize(pixels, source.info.spec), pixels)
    assert source.info.spec.bits == 8
    assert source.info.spec.range == (0.0, 255.0)
    assert source.info.labels is None
    assert source.info.task is None


def test_uint16_arrays_keep_all_65536_levels():
    images = np.arange(65536, dtype=np.uint16).reshape(1, 256, 256)
    source = load_data(images)
    pixels = source.pixels([0])
    assert source.info.spec.bits == 16
    assert source.info.spec.range == (0.0, 65535.0)
    assert torch.equal(quantize(pixels, source.info.spec), pixels)
    assert len(pixels.unique()) == 65536


def test_twelve_bit_images_are_told_by_their_range():
    source = load_data(np.array([[[0, 4095], [1, 2]]], dtype=np.uint16), value_range=(0, 4095))
    assert source.info.spec.bits == 12
    assert source.pixels([0]).max() == 1


def test_arrays_hold_channels_last_and_tensors_channels_first():
    colour = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    from_array = load_data(colour)
    from_tensor = load_data(torch.from_numpy(colour).permute(0, 3, 1, 2))
    assert from_array.info.spec.channels == 3
    assert from_array.info.spec.size == (6, 7)
    assert torch.equal(from_array.pixels([4, 1]), from_tensor.pixels([4, 1]))
    assert torch.equal(
        from_array.pixels([4])[0], torch.from_numpy(np.moveaxis(colour[4], -1, 0).copy()).float().div(255)
    )


def test_value_range_maps_hounsfield_units():
    images = np.array([[[-1000, 0], [1000, 3000]]], dtype=np.int16)
    source = load_data(images, value_range=(-1000, 3000))
    assert source.pixels([0]).flatten().tolist() == pytest.approx([0, 0.25, 0.5, 1])
    assert source.info.spec.bits is None
    assert source.info.spec.range == (-1000, 3000)
    assert source.info.spec.native(0.5) == 2000


def test_unit_floats_have_no_bit_depth():
    images = torch.linspace(0, 1, 32, dtype=torch.float64).reshape(2, 1, 4, 4)
    source = load_data(images)
    assert source.info.spec.bits is None
    assert source.info.spec.unit == "unit"
    assert torch.equal(source.pixels([0, 1]), images.float())


def test_reading_does_not_hand_out_the_stored_array():
    images = torch.zeros(2, 1, 4, 4)
    source = load_data(images)
    source.pixels([0]).add_(1)
    assert source.pixels([0]).max() == 0


def test_labels_ids_and_groups_travel_with_the_samples():
    source = load_data(
        (_grey(), [0, 1, 1, 0, 1, 0]),
        ids=[f"case-{i}" for i in range(6)],
        groups={"sex": ["F", "M", "", "F", "M", "F"], "ward": [10, 9, 10, -1, 9, 10], "scale": [0.5, 1.5, np.nan] * 2},
        class_names=("no", "yes"),
        modality="xray",
        name="mine",
    )
    batch = source.read([4, 2])
    assert batch.ids.tolist() == [stable_hash("case-4"), stable_hash("case-2")]
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 1]
    assert source.info.group_levels == {"sex": ("F", "M"), "ward": ("9", "10"), "scale": ("0.5", "1.5")}
    assert batch.groups["sex"].tolist() == [1, -1]
    assert batch.groups["ward"].tolist() == [0, 1]
    assert batch.groups["scale"].tolist() == [1, -1]
    assert source.column("ward").tolist() == [1, 0, 1, -1, 0, 1]
    assert (source.info.task, source.info.name, source.info.spec.modality) == ("binary", "mine", "xray")


def test_integers_with_missing_values_stay_whole_and_are_never_grouped():
    patients = np.where(np.arange(60) == 7, np.nan, np.arange(60) * 100.0)
    source = load_data(_grey(60), groups={"patient": patients})
    assert len(source.info.group_levels["patient"]) == 59
    assert source.info.group_levels["patient"][-1] == "5900"
    assert source.column("patient")[7] == -1
    assert source.info.notes == ()


def test_ages_become_quarters_named_by_their_range():
    ages = np.array([4, 10, 20, 33, 34, 40, 50, 51, 60, 66, 70, -1])
    source = load_data(_grey(12), groups={"age": ages})
    assert source.info.group_levels["age"] == ("4-20", "33-40", "50-60", "66-70")
    assert source.column("age").tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, -1]
    assert "4-20" in source.info.notes[0]


def test_two_dimensional_labels_are_multilabel():
    labels = np.array([[0, 0, 0], [1, 0, 1], [1, 1, 0], [0, 0, -1], [0, 1, 0], [0, 0, 1]])
    source = load_data(_grey(), labels=labels)
    assert source.info.task == "multilabel"
    assert source.info.labels is not None
    assert torch.equal(source.info.labels, torch.from_numpy(labels))
    one_column = load_data(_grey(), labels=labels[:, :1], task="multilabel")
    assert one_column.info.labels is not None
    assert one_column.info.labels.shape == (6, 1)


def test_medmnist_columns_are_squeezed_and_more_than_two_classes_are_multiclass():
    source = load_data(_grey(), labels=np.array([[0], [1], [2], [2], [0], [1]], dtype=np.uint8))
    assert source.info.labels is not None
    assert source.info.labels.tolist() == [0, 1, 2, 2, 0, 1]
    assert source.info.task == "multiclass"


def test_a_source_is_returned_as_it_is():
    source = load_data(_grey())
    assert load_data(source) is source
    with pytest.raises(ConfigError, match="also labels, name"):
        load_data(source, labels=[0] * 6, name="x")


def test_subset_keeps_ids_labels_groups_and_pixels():
    source = load_data((_grey(), [0, 1, 1, 0, 1, 0]), groups={"sex": list("FMFMFM")})
    part = subset(source, [5, 2])
    assert part.info.ids.tolist() == [5, 2]
    assert part.info.labels is not None
    assert part.info.labels.tolist() == [0, 1]
    assert part.column("sex").tolist() == [1, 0]
    assert torch.equal(part.read([1]).images, source.read([2]).images)
    mask = torch.tensor([True, False, False, True, False, False])
    assert subset(source, mask).info.ids.tolist() == [0, 3]
    again = subset(part, [1])
    assert torch.equal(again.pixels([0]), source.pixels([2]))
    for bad in ([], [6], [-1], [1, 1], torch.tensor([True])):
        with pytest.raises(ShapeError, match="subset of 'array'"):
            subset(source, bad)


_NAN = np.zeros((3, 4, 4), dtype=np.float32)
_NAN[1, 2, 2] = np.nan


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: load_data(_grey().astype(np.float32)), RangeError, r"value_range=\(0, 255\)"),
        (lambda: load_data(_NAN), RangeError, "first at index 1"),
        (lambda: load_data(_NAN, value_range=(0, 9)), RangeError, "first at index 1"),
        (lambda: load_data(_grey().astype(np.int64)), KindError, "int64 with values"),
        (lambda: load_data(_grey() > 9), KindError, "dtype bool"),
        (lambda: load_data(_grey()[0]), ShapeError, r"images\[None\]"),
        (lambda: load_data(np.zeros((8, 8, 3), np.uint8)), ShapeError, r"One colour image\? Use images\[None\]"),
        (lambda: load_data(np.zeros((2, 3, 8, 8), np.uint8)), ShapeError, r"torch\.from_numpy"),
        (lambda: load_data(torch.zeros(2, 8, 8, 3)), ShapeError, r"permute\(0, 3, 1, 2\)"),
        (lambda: load_data(np.zeros((2, 8, 8, 8, 1), np.uint8)), ShapeError, "volumes"),
        (lambda: load_data(np.zeros((0, 8, 8), np.uint8)), ShapeError, "empty"),
        (lambda: load_data(_grey(), value_range=(255, 0)), RangeError, "Swap"),
        (lambda: load_data(_grey(), value_range=(0, 100)), RangeError, "Widen"),
        (lambda: load_data(_grey(), labels=[0, 1]), ShapeError, "6 labels"),
        (lambda: load_data(_grey(), labels=np.eye(6, dtype=int)), LabelError, "one-hot"),
        (lambda: load_data(_grey(), labels=np.eye(6), task="multiclass"), LabelError, "astype"),
        (lambda: load_data(_grey(), labels=["a"] * 6), LabelError, "return_inverse"),
        (lambda: load_data(_grey(), labels=[0, 1, -1, 0, 1, 0]), LabelError, "label -1"),
        (lambda: load_data(_grey(), labels=[1, 2, 1, 2, 1, 2], class_names=("a", "b")), LabelError, "Subtract 1"),
        (lambda: load_data(_grey(), labels=[0, 1, 2, 0, 1, 2], task="binary"), LabelError, "multiclass"),
        (lambda: load_data(_grey(), labels=[0] * 6, task="multi-class"), ConfigError, "multiclass"),
        (lambda: load_data(_grey(), labels=[0] * 6, task="multilabel"), ShapeError, "multi-label"),
        (lambda: load_data((_grey(), [0] * 6), labels=[0] * 6), ConfigError, "once"),
        (lambda: load_data(_grey(), ids=[1, 2, 3, 4, 5, 5]), DuplicateNameError, "id 5 twice"),
        (lambda: load_data(_grey(), ids=list("aabcde")), DuplicateNameError, "'a'"),
        (lambda: load_data(_grey(), ids=[1, 2]), ShapeError, "6 ids"),
        (lambda: load_data(_grey(), ids=[0.5] * 6), KindError, "integers or strings"),
        (lambda: load_data(_grey(), groups={"sex": ["F"]}), ShapeError, "group column 'sex'"),
        (lambda: load_data([_grey()]), KindError, r"numpy\.stack"),
        (lambda: load_data("zenodo:pneumonia"), UnknownNameError, "zenodo:"),
        (lambda: load_data("phantom:histlogy"), UnknownNameError, "histology"),
        (lambda: load_data("phantom:histology", split="all"), ConfigError, "'all'"),
        (lambda: load_data("phantom:histology", labels=[1]), ConfigError, "also labels"),
    ],
)
def test_mistakes_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_without_the_medmnist_package_the_message_has_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'robustlab\[medmnist\]'"):
        load_data("medmnist:pneumoniamnist")
