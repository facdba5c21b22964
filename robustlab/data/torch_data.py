"""Torch datasets and data loaders as sources."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
    default_collate,
)
from tqdm.auto import tqdm

from robustlab.core.errors import ConfigError, KindError, RobustlabWarning, ShapeError
from robustlab.core.source import Source, SourceInfo

from .assemble import Request, make_info
from .columns import as_array
from .pixels import Array, Scale, check_finite, check_range, decode, interpret, to_channels_first
from .sources import ArraySource

MEMORY_BYTES = 1 << 30
"""Datasets up to this size are kept in memory after the pass that collects their labels."""


@dataclass(frozen=True, eq=False)
class Item:
    """One decoded item: image (C, H, W) as stored, and its label or None."""

    image: Array
    label: Any


class DatasetSource(Source):
    """A torch map-style dataset too large to hold in memory; items are read when asked for.

    Args:
        info: What is known of the samples.
        dataset: Object with ``__getitem__``.
        rows: Position in the dataset of each sample.
        scale: Map to [0, 1].
        content: Hash of all images, taken when the dataset was loaded.
    """

    def __init__(self, info: SourceInfo, dataset: Any, rows: Sequence[int], scale: Scale, content: str = "") -> None:
        self.info = info
        self.content = content
        self.dataset = dataset
        self.rows = tuple(rows)
        self.scale = scale

    def state(self) -> str:
        return self.content

    def pixels(self, index: Sequence[int]) -> Tensor:
        spec = self.info.spec
        if not index:
            return torch.empty((0, spec.channels, *spec.size))
        with same_random_state():
            images = [split_item(self.dataset[self.rows[i]], self.info.name).image for i in index]
        stack = np.stack(images)
        if stack.dtype.kind == "f":
            check_finite(stack, self.info.name)
        if stack.dtype.kind == "f" or self.scale.high != np.iinfo(stack.dtype).max:
            check_range(stack, self.scale.low, self.scale.high, self.info.name)
        return self.scale.to_unit(stack)


@contextmanager
def same_random_state() -> Iterator[None]:
    """Put Python's, NumPy's and torch's global random state back afterwards: other people's transforms may draw."""
    python, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)


def split_item(item: Any, who: str) -> Item:
    """Take image and label out of a dataset item.

    Raises:
        KindError: The item has no image, or one that is neither a Pillow image, an array nor a tensor.
        ShapeError: The image is not (H, W), (C, H, W) as a tensor or (H, W, C) as an array.
    """
    label = None
    if isinstance(item, Mapping):
        if "image" not in item:
            raise KindError(
                who,
                "items with the keys 'image' and 'label'",
                f"keys {', '.join(map(str, item))}",
                "Rename the keys in the dataset.",
            )
        image, label = item["image"], item.get("label")
    elif isinstance(item, (tuple, list)):
        if not item:
            raise KindError(who, "items (image, label)", "an empty item", "Return (image, label).")
        image, label = item[0], item[1] if len(item) > 1 else None
    else:
        image = item
    if isinstance(image, Image.Image):
        image = decode(image, who)
    if not isinstance(image, (np.ndarray, Tensor)):
        raise KindError(
            who,
            "images as Pillow images, arrays (H, W, C) or tensors (C, H, W)",
            type(image).__name__,
            "Return (image, label), or a mapping with 'image' and 'label', from the dataset.",
        )
    return Item(to_channels_first(image[None], who)[0], label)


def load_dataset(
    dataset: Any, request: Request, *, rows: Sequence[int] | None = None, notes: Sequence[str] = ()
) -> Source:
    """Load a map-style dataset: one pass collects the labels, and the images too while they fit in memory."""
    positions = list(range(len(dataset))) if rows is None else list(rows)
    if not positions:
        raise ShapeError(request.who, "at least one sample", "an empty dataset", "Check the dataset's path and split.")
    notes = list(notes)
    with same_random_state():
        first, again = (split_item(dataset[positions[0]], request.who) for _ in range(2))
        if first.image.shape != again.image.shape or not np.array_equal(first.image, again.image, equal_nan=True):
            message = "The dataset's transforms are random: item 0 differed between two reads."
            warnings.warn(f"{request.who}: {message} Use the evaluation transforms.", RobustlabWarning, stacklevel=4)
            notes.append(message)
        items = (dataset[i] for i in positions)
        digest = hashlib.blake2b(digest_size=16)
        stack, labels = _collect(items, len(positions), first, request, keep_all=False, digest=digest)
    request = replace(request, **request.rows(positions, len(dataset)))
    names = _names(dataset, labels)
    if stack is not None:
        return _in_memory(stack, labels, request, type(dataset).__name__, ids=positions, names=names, notes=notes)
    spec, scale = interpret(
        first.image[None], value_range=request.value_range, modality=request.modality, who=request.who
    )
    info = make_info(
        request,
        spec,
        len(positions),
        name=type(dataset).__name__,
        labels=labels,
        ids=positions,
        class_names=names,
        notes=notes,
    )
    return DatasetSource(info, dataset, positions, scale, digest.hexdigest())


def load_loader(loader: DataLoader[Any], request: Request) -> Source:
    """Load a data loader: its dataset at the positions that its sampler visits, in dataset order.

    Loaders that cannot be indexed (an iterable dataset, a collate function of their own) are read once into memory.
    """
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        return load_stream(dataset, request, notes=["The stream was read once into memory; ids are positions in it."])
    if loader.collate_fn is not default_collate:
        note = "The DataLoader has a collate function of its own: its batches were read once into memory."
        if not isinstance(loader.sampler, SequentialSampler):
            message = "The DataLoader shuffles, so ids, which are positions, change from run to run."
            warnings.warn(f"{request.who}: {message} Pass shuffle=False.", RobustlabWarning, stacklevel=4)
            note += f" {message}"
        with same_random_state():
            return load_stream(_unbatch(loader, request.who), request, name=type(dataset).__name__, notes=[note])
    with same_random_state():
        rows = _visited(loader)
    note = "The DataLoader's dataset is read in its own order; shuffling and batch size have no effect."
    return load_dataset(dataset, request, rows=rows, notes=[note])


def load_stream(
    items: Iterable[Any], request: Request, *, name: str | None = None, notes: Sequence[str] = ()
) -> Source:
    """Read items once into memory.

    Raises:
        ConfigError: They need more than a gibibyte.
    """
    with same_random_state():
        iterator = iter(items)
        try:
            head = next(iterator)
        except StopIteration:
            raise ShapeError(request.who, "at least one sample", "an empty stream", "Check the dataset.") from None
        first = split_item(head, request.who)
        stack, labels = _collect(_chain(head, iterator), None, first, request, keep_all=True)
    if stack is None:
        raise ConfigError(
            request.who,
            f"a stream of at most {MEMORY_BYTES >> 20} MiB of images",
            "more",
            "Use a map-style dataset, which can be read at random.",
        )
    return _in_memory(stack, labels, request, name or type(items).__name__, notes=notes)


def _in_memory(
    stack: Array,
    labels: Any,
    request: Request,
    name: str,
    *,
    ids: Sequence[int] | None = None,
    names: tuple[str, ...] | None = None,
    notes: Sequence[str] = (),
) -> Source:
    spec, scale = interpret(stack, value_range=request.value_range, modality=request.modality, who=request.who)
    info = make_info(request, spec, len(stack), name=name, labels=labels, ids=ids, class_names=names, notes=notes)
    return ArraySource(info, stack, scale)


def _collect(
    items: Iterable[Any],
    count: int | None,
    first: Item,
    request: Request,
    *,
    keep_all: bool,
    digest: Any = None,
) -> tuple[Array | None, Any]:
    """Return the stacked images (None if too large) and labels (None if there are none) of all items.

    ``digest``, a hash, is fed with every image.
    """
    images: list[Array] = []
    labels: list[Any] = []
    size = 0
    fits = True
    for index, raw in enumerate(tqdm(items, total=count, desc="reading dataset", leave=False, delay=2)):
        item = split_item(raw, request.who)
        if item.image.shape != first.image.shape or item.image.dtype != first.image.dtype:
            raise ShapeError(
                request.who,
                f"images of one kind; item 0 is {first.image.dtype} of shape {first.image.shape}",
                f"item {index}: {item.image.dtype} of shape {item.image.shape}",
                "Add a transform that resizes and converts all images alike.",
            )
        if digest is not None:
            digest.update(np.ascontiguousarray(item.image).data)
        labels.append(item.label)
        size += item.image.nbytes
        if fits and size > MEMORY_BYTES:
            fits = False
            images.clear()
            if keep_all:
                return None, None
        if fits:
            images.append(np.array(item.image))
    if request.labels is not None or all(label is None for label in labels):
        return np.stack(images) if fits else None, None
    arrays = [as_array(label) for label in labels]
    odd = next((i for i, array in enumerate(arrays) if array.shape != arrays[0].shape), None)
    if odd is not None:
        raise ShapeError(
            request.who,
            f"labels of one shape; item 0 has {arrays[0].shape}",
            f"shape {arrays[odd].shape} at item {odd}",
            "Return one integer, or one row of 0 and 1, for each item.",
        )
    return np.stack(images) if fits else None, np.stack(arrays)


def _visited(loader: DataLoader[Any]) -> list[int] | None:
    """Return the sorted positions a loader visits, None for all of them."""
    sampler: Any = loader.sampler
    if type(loader.batch_sampler) is not BatchSampler and loader.batch_sampler is not None:
        return sorted({int(i) for batch in loader.batch_sampler for i in batch})
    if isinstance(sampler, (SequentialSampler, RandomSampler, WeightedRandomSampler)):
        return None
    return sorted({int(i) for i in sampler})


def _unbatch(loader: Iterable[Any], who: str) -> Iterator[Any]:
    for batch in loader:
        if isinstance(batch, Mapping):
            image, label = batch.get("image"), batch.get("label")
        elif isinstance(batch, (tuple, list)):
            image, label = batch[0], batch[1] if len(batch) > 1 else None
        else:
            image, label = batch, None
        if not isinstance(image, (Tensor, np.ndarray)):
            raise KindError(
                who,
                "batches (images, labels), or mappings with 'image' and 'label'",
                type(batch).__name__,
                "Pass the dataset, or arrays.",
            )
        for i in range(len(image)):
            yield (image[i],) if label is None else (image[i], label[i])


def _chain(head: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield head
    yield from rest


def _names(dataset: Any, labels: Any) -> tuple[str, ...] | None:
    """Return torchvision's ``classes`` where a dataset has them and its labels fit them."""
    classes = getattr(dataset, "classes", None)
    if labels is None or not isinstance(classes, (list, tuple)) or not all(isinstance(item, str) for item in classes):
        return None
    return tuple(classes) if labels.ndim == 1 and labels.max() < len(classes) else None
