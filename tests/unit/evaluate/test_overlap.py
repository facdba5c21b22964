"""Images that recur: found in the official BreastMNIST, found when copied with changes, and silence on other sets."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustlab.core.source import Source
from robustlab.data import HistologyPhantom, RadiographPhantom, load_data, subset
from robustlab.evaluate import overlap
from robustlab.evaluate.doctor import examine_data
from robustlab.evaluate.overlap import find_contradictions, find_overlap, spread

DATA = Path(__file__).resolve().parents[3] / ".." / "shared" / "data"


def real(name, split="test"):
    file = DATA / f"{name}.npz"
    if not file.is_file():
        pytest.skip(f"needs ../shared/data/{name}.npz")
    return load_data(file, split=split)


def pairs(found):
    return list(zip(found.rows.tolist(), found.partners.tolist(), strict=True))


def test_the_official_breastmnist_has_one_image_in_train_and_test():
    found = find_overlap(real("breastmnist"), real("breastmnist", "train"))
    exact = found.rows[found.exact].tolist(), found.partners[found.exact].tolist()
    assert exact == ([76], [115])
    # near-duplicates, each looked at by eye: other frames and exports of the same scan
    assert len(found) == 37
    assert {(37, 319), (65, 427), (115, 266), (98, 88), (71, 363)} <= set(pairs(found))
    seen = examine_data(
        real("breastmnist"), val=real("breastmnist", "val"), train=real("breastmnist", "train"), cluster=None,
        num_classes=2, thorough=False,
    )  # fmt: skip
    by_check = {finding.check: finding.text for finding in seen.findings}
    assert set(by_check) == {"image-overlap-train", "image-overlap-val"}
    text = by_check["image-overlap-train"]
    assert "37 of 156 images recur in train (546 images): 1 are bit-identical and 36 near-duplicates" in text
    assert "2 of the pairs have different labels" in text
    assert "76 and 115" in text


def test_the_official_pneumoniamnist_shares_eight_images_between_val_and_train():
    found = find_overlap(real("pneumoniamnist", "val"), real("pneumoniamnist", "train"))
    assert len(found) == 8
    assert bool(found.exact.all())


@pytest.mark.parametrize("other", ["train", "val"])
@pytest.mark.parametrize(
    "name",
    [
        "pneumoniamnist", "oral_he_400x_96", "busi_96", "chestxray_kermany_test_96", "bccd_cells_40",
        "dsb2018_nuclei_64", "fashionmnist_subset", "cifar10_jpeg_subset", "lgg_mri_64", "nih_cxr_patients_96",
        "nih_cxr_findings_64",
    ],
)  # fmt: skip
def test_silence_on_sets_that_share_nothing(name, other):
    assert pairs(find_overlap(real(name), real(name, other))) == []


def test_one_slice_of_mednist_is_there_twice():
    # the same slice of one scan in two reconstructions, by eye; its neighbours, which are in both splits, stay silent
    assert pairs(find_overlap(real("mednist_64"), real("mednist_64", "train"))) == [(30, 179)]
    assert pairs(find_overlap(real("mednist_64"), real("mednist_64", "val"))) == []


def test_phantoms_share_nothing():
    for kind in (HistologyPhantom, RadiographPhantom):
        assert pairs(find_overlap(kind(150, size=32), kind(150, size=32, split="train"))) == []


def jpeg(quality):
    def change(image):
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        return np.asarray(Image.open(buffer))

    return change


def noise(image):
    generator = np.random.default_rng(int(image.sum()))
    return (image + generator.normal(0, 2, image.shape)).clip(0, 255).astype(np.uint8)


CHANGES = {
    "none": lambda image: image,
    "jpeg": jpeg(95),
    "brighter": lambda image: (image * 1.1 + 5).clip(0, 255).astype(np.uint8),
    "gamma": lambda image: np.round(255 * (image / 255) ** 1.2).astype(np.uint8),
    "noise": noise,
}


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("name", ["pneumoniamnist", "oral_he_400x_96", "busi_96", "lgg_mri_64"])
def test_changed_copies_are_found(name, change):
    test, train = real(name), real(name, "train")
    rows = np.arange(20) * 7
    stored = [np.moveaxis(test.images[i], 0, -1) for i in rows]
    stored = [image[..., 0] if image.shape[-1] == 1 else image for image in stored]
    copies = np.stack([CHANGES[change](image) for image in stored])
    images = np.moveaxis(train.images[: max(100, len(train.images) // 4)], 1, -1)
    images = images[..., 0] if images.shape[-1] == 1 else images
    mixed = load_data(np.concatenate([images, copies]))
    found = find_overlap(test, mixed)
    wanted = {(int(row), len(images) + k) for k, row in enumerate(rows)}
    missed = wanted - set(pairs(found))
    assert len(missed) <= (0 if change in ("none", "gamma") else 3), missed
    assert set(pairs(found)) <= wanted
    assert bool(found.exact.all()) == (change == "none")


def test_copies_at_another_resolution_are_found():
    train = real("busi_96", "train")
    large = torch.nn.functional.interpolate(train.read(range(200)).images, size=(192, 160), mode="bicubic")
    other = load_data(large.clamp(0, 1))
    found = find_overlap(subset(train, range(0, 200, 10)), other)
    assert pairs(found) == [(k, 10 * k) for k in range(20)]
    assert not bool(found.exact.any())


def test_the_result_depends_on_no_block_and_on_no_order(monkeypatch):
    test, train = real("breastmnist"), real("breastmnist", "train")
    whole = find_overlap(test, train)
    monkeypatch.setattr(overlap, "_READ_BYTES", 300_000)
    monkeypatch.setattr(overlap, "_QUERY_ROWS", 40)
    parts = find_overlap(test, train)
    assert pairs(parts) == pairs(whole)
    assert torch.equal(parts.exact, whole.exact)
    order = np.random.default_rng(0).permutation(len(train)).tolist()
    turned = find_overlap(test, subset(train, order))
    assert [(row, order[partner]) for row, partner in pairs(turned)] == pairs(whole)


class Counting(Source):
    """Noise made when read; counts how many images are asked for at once."""

    def __init__(self, count, first=0):
        self.info = load_data(np.zeros((count, 16, 16), np.uint8), labels=np.zeros(count, int)).info
        self.first = first
        self.most = 0

    def pixels(self, index):
        self.most = max(self.most, len(index))
        made = [np.random.default_rng(self.first + i).integers(0, 256, (1, 16, 16)) for i in index]
        return torch.from_numpy(np.stack(made)).float() / 255


def test_sets_are_read_in_small_parts():
    data, other = Counting(700), Counting(1500, first=650)
    found = find_overlap(data, other)
    assert pairs(found) == [(650 + k, k) for k in range(50)]
    assert max(data.most, other.most) <= 512
    some = find_overlap(data, other, limits=(70, 1500))
    assert some.searched == (70, 1500)
    assert pairs(some) == [(int(row), int(row) - 650) for row in spread(700, 70) if row >= 650]


def test_pictures_without_contrast_and_tiny_ones():
    black = load_data(np.zeros((5, 16, 16), np.uint8), labels=np.arange(5) % 2)
    found = find_overlap(black, black)
    assert pairs(found) == []
    assert found.flat == 5
    assert len(find_contradictions(black)[0]) == 0
    generator = np.random.default_rng(0)
    tiny = load_data(generator.integers(0, 256, (30, 6, 6)).astype(np.uint8))
    found = find_overlap(tiny, subset(tiny, range(10, 20)))
    assert pairs(found) == [(10 + k, k) for k in range(10)]


def test_contradictions_name_the_first_copy():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (12, 9, 9)).astype(np.uint8)
    images[[5, 8, 11]] = images[2]
    labels = np.zeros(12, int)
    labels[[8, 11]] = 1
    found, looked = find_contradictions(load_data(images, labels=labels))
    assert found.tolist() == [[2, 8], [2, 11]]
    assert looked == 12
    several = np.zeros((12, 2), int)
    several[8, 1] = 1
    assert find_contradictions(load_data(images, labels=several, task="multilabel"))[0].tolist() == [[2, 8]]


def test_rows_are_spread_over_the_whole_set():
    assert spread(5, None).tolist() == [0, 1, 2, 3, 4]
    assert spread(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert spread(101, 3).tolist() == [0, 50, 100]
