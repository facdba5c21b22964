import numpy as np
import pytest
import torch
from PIL import Image

from robustlab.core.errors import ConfigError, DataFileError, ShapeError
from robustlab.core.rng import stable_hash
from robustlab.data import load_data


def _save(path, *, mode="L", size=(8, 6), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    if mode == "I;16":
        pixels = pixels.astype(np.uint16) * 256 + 7
    image = Image.fromarray(pixels)
    image.save(path)
    return pixels


def test_subfolders_are_classes_and_ids_are_path_hashes(tmp_path):
    second = _save(tmp_path / "pneumonia" / "b10.png", seed=1)
    _save(tmp_path / "pneumonia" / "b9.png", seed=2)
    first = _save(tmp_path / "normal" / "deep" / "a.png", seed=3)
    source = load_data(tmp_path)
    assert source.info.class_names == ("normal", "pneumonia")
    assert source.info.labels is not None
    assert source.info.labels.tolist() == [0, 1, 1]
    assert source.info.ids.tolist() == [
        stable_hash(name) for name in ("normal/deep/a.png", "pneumonia/b9.png", "pneumonia/b10.png")
    ]
    assert source.info.spec.size == (6, 8)
    expected = torch.from_numpy(np.stack([second, first])).float().div(255)[:, None]
    assert torch.equal(source.pixels([2, 0]), expected)


def test_every_kind_of_file_and_16_bits(tmp_path):
    for suffix in ("png", "bmp", "tif", "jpg", "jpeg", "TIFF"):
        _save(tmp_path / "colour" / "x" / f"a.{suffix}", mode="RGB")
    assert len(load_data(tmp_path / "colour")) == 6
    pixels = _save(tmp_path / "deep" / "x" / "a.png", mode="I;16")
    deep = load_data(tmp_path / "deep")
    assert deep.info.spec.bits == 16
    assert torch.equal(deep.pixels([0])[0, 0], torch.from_numpy(pixels.astype(np.int32)).float().div(65535))


def test_unreadable_files_are_named_and_the_others_kept_in_step(tmp_path):
    for i in range(4):
        _save(tmp_path / "x" / f"{i}.png", seed=i)
    whole = (tmp_path / "x" / "1.png").read_bytes()
    (tmp_path / "x" / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "x" / "4.png").write_text("not an image")
    source = load_data(tmp_path, groups={"site": list("abcde")})
    assert len(source) == 3
    assert [source.info.group_levels["site"][code] for code in source.column("site")] == ["a", "c", "d"]
    (note,) = source.info.notes
    assert note.startswith("2 unreadable files")
    assert "x/1.png" in note
    assert "x/4.png" in note


def test_files_beside_class_folders_are_named(tmp_path):
    _save(tmp_path / "a" / "1.png")
    _save(tmp_path / "stray.png")
    source = load_data(tmp_path)
    assert len(source) == 1
    assert "stray.png" in source.info.notes[0]


def test_a_flat_folder_is_unlabelled(tmp_path):
    _save(tmp_path / "1.png")
    assert load_data(tmp_path).info.labels is None


def test_split_folders(tmp_path):
    _save(tmp_path / "train" / "a" / "1.png")
    _save(tmp_path / "valid" / "a" / "1.png")
    _save(tmp_path / "valid" / "b" / "1.png")
    train, val = load_data(tmp_path, split="train"), load_data(tmp_path, split="val")
    assert (len(train), len(val)) == (1, 2)
    assert not set(train.info.ids.tolist()) & set(val.info.ids.tolist())
    with pytest.raises(DataFileError, match="Pass split='train'"):
        load_data(tmp_path)


def test_class_names_give_the_order(tmp_path):
    _save(tmp_path / "normal" / "1.png")
    _save(tmp_path / "cancer" / "1.png")
    source = load_data(tmp_path, class_names=("normal", "cancer"))
    assert source.info.labels is not None
    assert source.info.labels.tolist() == [1, 0]
    with pytest.raises(ConfigError, match="no cancer"):
        load_data(tmp_path, class_names=("normal", "tumour"))


def test_empty_and_wholly_unreadable_folders(tmp_path):
    with pytest.raises(DataFileError, match="no such file"):
        load_data(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_text("no")
    with pytest.raises(DataFileError, match="1 unreadable files"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"size": (9, 6)}, "grey, 8 bits, 6 x 9 pixels"),
        ({"mode": "RGB"}, "odd.png: RGB"),
        ({"mode": "I;16"}, "grey, 16 bits"),
    ],
)
def test_mixed_sizes_and_colours_are_refused_by_example(tmp_path, other, message):
    _save(tmp_path / "a" / "1.png")
    _save(tmp_path / "a" / "2.png")
    _save(tmp_path / "b" / "odd.png", **other)
    with pytest.raises(ShapeError, match=message):
        load_data(tmp_path)


def test_transparency_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (4, 4)).save(tmp_path / "a" / "1.png")
    with pytest.raises(ShapeError, match="'RGBA'"):
        load_data(tmp_path)


def test_a_file_that_changes_under_our_feet_is_an_error(tmp_path):
    _save(tmp_path / "a" / "1.png")
    source = load_data(tmp_path)
    _save(tmp_path / "a" / "1.png", size=(12, 12))
    with pytest.raises(ShapeError, match="has changed"):
        source.pixels([0])
    (tmp_path / "a" / "1.png").unlink()
    with pytest.raises(DataFileError, match=r"1\.png"):
        source.pixels([0])
