import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from robustlab.core.errors import ConfigError, KindError, RangeError, RobustlabWarning, ShapeError
from robustlab.data import ArraySource, DatasetSource, load_data, torch_data

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
LABELS = [0, 1, 2, 1, 0]
UNIT = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float().div(255)


class _Items(Dataset):
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return self.make(i)


class _Stream(IterableDataset):
    def __iter__(self):
        return iter([(PIXELS[i], LABELS[i]) for i in range(5)])


def _tensor(i):
    return torch.from_numpy(PIXELS[i]).permute(2, 0, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda i: (Image.fromarray(PIXELS[i]), LABELS[i]),
        lambda i: (PIXELS[i], np.int64(LABELS[i])),
        lambda i: (_tensor(i), torch.tensor(LABELS[i])),
        lambda i: (_tensor(i), torch.tensor([LABELS[i]])),
        lambda i: {"image": _tensor(i).float().div(255), "label": LABELS[i]},
        lambda i: (_tensor(i), LABELS[i], "ignored"),
    ],
)
def test_item_kinds_agree(make):
    source = load_data(_Items(make))
    assert isinstance(source, ArraySource)
    assert torch.equal(source.pixels(range(5)), UNIT)
    assert source.info.labels is not None
    assert source.info.labels.tolist() == LABELS
    assert source.info.ids.tolist() == [0, 1, 2, 3, 4]


def test_unlabelled_items_and_labels_from_the_call():
    assert load_data(_Items(lambda i: PIXELS[i])).info.labels is None
    assert load_data(_Items(lambda i: (PIXELS[i],)), labels=LABELS).info.task == "multiclass"


def test_large_datasets_are_read_when_asked_for(monkeypatch):
    monkeypatch.setattr(torch_data, "MEMORY_BYTES", 100)
    source = load_data(_Items(lambda i: (PIXELS[i], LABELS[i])))
    assert isinstance(source, DatasetSource)
    assert torch.equal(source.read([3, 1]).images, UNIT[[3, 1]])
    assert source.info.labels is not None
    assert source.info.labels.tolist() == LABELS
    with pytest.raises(ConfigError, match="map-style"):
        load_data(_Stream())


@pytest.mark.parametrize("limit", [100, 1 << 30])
def test_pixels_are_checked_whether_kept_or_not(monkeypatch, limit):
    monkeypatch.setattr(torch_data, "MEMORY_BYTES", limit)

    def item(i):
        image = _tensor(i).float().div(255)
        image[0, 0, 0] = 200.0 if i == 3 else 0.5
        return image, LABELS[i]

    with pytest.raises(RangeError, match="200"):
        load_data(_Items(item)).pixels([3])


def test_random_transforms_are_noticed_and_global_state_is_kept():
    def item(i):
        noise = np.random.rand(8, 8) + random.random() + torch.rand(8, 8).numpy()  # noqa: NPY002
        return (noise / 3).astype(np.float32), LABELS[i]

    before = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # noqa: NPY002
    with pytest.warns(RobustlabWarning, match="random"):
        source = load_data(_Items(item))
    assert any("random" in note for note in source.info.notes)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_shuffling_loader_is_read_in_dataset_order():
    dataset = TensorDataset(UNIT, torch.tensor(LABELS))
    state = torch.get_rng_state()
    source = load_data(DataLoader(dataset, batch_size=2, shuffle=True, drop_last=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(source.pixels(range(5)), UNIT)
    assert "in its own order" in source.info.notes[0]


def test_a_loader_with_a_subset_sampler_keeps_to_its_subset():
    dataset = TensorDataset(UNIT, torch.tensor(LABELS))
    source = load_data(DataLoader(dataset, sampler=SubsetRandomSampler([4, 1])), groups={"sex": list("FMFMF")})
    assert source.info.ids.tolist() == [1, 4]
    assert torch.equal(source.pixels([0, 1]), UNIT[[1, 4]])
    assert source.info.labels is not None
    assert source.info.labels.tolist() == [1, 0]
    assert source.column("sex").tolist() == [1, 0]
    nested = load_data(DataLoader(Subset(dataset, [3, 0])))
    assert torch.equal(nested.pixels([0]), UNIT[[3]])


def test_streams_and_own_collate_functions_are_read_once():
    streamed = load_data(_Stream())
    through = load_data(DataLoader(_Stream(), batch_size=2))
    collated = load_data(
        DataLoader(
            _Items(lambda i: (i, "anything")),
            batch_size=2,
            collate_fn=lambda items: {"image": UNIT[[i for i, _ in items]], "label": [LABELS[i] for i, _ in items]},
        )
    )
    for source in (streamed, through, collated):
        assert torch.equal(source.pixels(range(5)), UNIT)
        assert source.info.labels is not None
        assert source.info.labels.tolist() == LABELS
        assert "read once into memory" in source.info.notes[0]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda i: PIXELS[i][: 8 - i % 2], ShapeError, "item 1"),
        (lambda i: {"picture": PIXELS[i]}, KindError, "picture"),
        (lambda i: ("file.png", 1), KindError, "str"),
        (lambda i: (PIXELS[i].astype(np.float32), 1), RangeError, "255"),
        (lambda i: (PIXELS[i], [0] * (1 + i)), ShapeError, "at item 1"),
    ],
)
def test_bad_items(make, kind, message):
    with pytest.raises(kind, match=message):
        load_data(_Items(make))


def test_empty_datasets():
    with pytest.raises(ShapeError, match="empty"):
        load_data(Subset(TensorDataset(UNIT), []))


def test_every_image_of_a_large_dataset_has_a_part_in_its_content(monkeypatch):
    monkeypatch.setattr("robustlab.data.torch_data.MEMORY_BYTES", 0)

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, odd=None):
            self.odd = odd

        def __len__(self):
            return 200

        def __getitem__(self, i):
            return torch.full((1, 4, 4), (i % 7) / 10 + (0.05 if i == self.odd else 0)), i % 2

    prints = [load_data(Pictures(odd), name="x").content_fingerprint() for odd in (None, None, 38, 39)]
    assert len(set(prints)) == 3
    assert prints[0] == prints[1]
