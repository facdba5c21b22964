"""The sources: arrays in memory, image files decoded on read, and views of other sources."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from robustlab.core.errors import DataFileError, ShapeError
from robustlab.core.source import Source, SourceInfo

from .pixels import Array, Scale, decode, to_channels_first


class ArraySource(Source):
    """Images held in memory as they were stored; they become floats when read.

    Args:
        info: What is known of the samples.
        images: Numeric array (N, C, H, W), any memory layout.
        scale: Map to [0, 1].
    """

    in_memory = True
    thread_safe = True

    def __init__(self, info: SourceInfo, images: Array, scale: Scale) -> None:
        self.info = info
        self.images = images
        self.scale = scale

    def pixels(self, index: Sequence[int]) -> Tensor:
        return self.scale.to_unit(self.images[np.asarray(index, dtype=np.int64)])


class FolderSource(Source):
    """Image files that are decoded when read.

    Args:
        info: What is known of the samples.
        files: One path a sample.
        scale: Map to [0, 1].
    """

    thread_safe = True

    def __init__(self, info: SourceInfo, files: Sequence[Path], scale: Scale) -> None:
        self.info = info
        self.files = tuple(files)
        self.scale = scale

    def state(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            try:
                facts = file.stat()
                digest.update(f"{facts.st_size} {facts.st_mtime_ns}\n".encode())
            except OSError:  # the samples of a file that is gone fail later, one by one
                digest.update(b"missing\n")
        return digest.hexdigest()

    def pixels(self, index: Sequence[int]) -> Tensor:
        images = [read_image(self.files[i]) for i in index]
        spec = self.info.spec
        for i, image in zip(index, images, strict=True):
            if image.shape[:2] != spec.size or (image.ndim == 3) != (spec.channels == 3):
                raise ShapeError(
                    str(self.files[i]),
                    f"{spec.channels} x {spec.size[0]} x {spec.size[1]} pixels, as when the folder was opened",
                    f"shape {image.shape}",
                    "The file has changed; load the folder again.",
                )
        if not images:
            return torch.empty((0, spec.channels, *spec.size))
        return self.scale.to_unit(to_channels_first(np.stack(images), self.info.name))


class SubsetSource(Source):
    """Some samples of another source, with their ids.

    Args:
        source: The source.
        rows: int64 (M,) positions in it.
    """

    def __init__(self, source: Source, rows: Tensor) -> None:
        info = source.info
        self.source = source
        self.in_memory = source.in_memory
        self.thread_safe = source.thread_safe
        self.rows = rows.tolist()
        self.info = dataclasses.replace(
            info,
            ids=info.ids[rows],
            labels=None if info.labels is None else info.labels[rows],
            groups={name: codes[rows] for name, codes in info.groups.items()},
            posterior=None if info.posterior is None else info.posterior[rows],
        )

    def pixels(self, index: Sequence[int]) -> Tensor:
        return self.source.pixels([self.rows[i] for i in index])

    def state(self) -> str:
        return self.source.state()

    def refresh(self) -> None:
        super().refresh()
        self.source.refresh()


def subset(source: Source, rows: Sequence[int] | Tensor) -> Source:
    """Return some samples of a source; ids, labels and groups stay with them.

    Args:
        source: The source.
        rows: Positions, or a bool mask (N,).

    Raises:
        ShapeError: A mask of another length, a position outside the source, one given twice, or no sample.
    """
    index = torch.as_tensor(rows if isinstance(rows, Tensor) else list(rows))
    who, count = f"subset of {source.info.name!r}", len(source)
    if index.dtype == torch.bool:
        if index.shape != (count,):
            raise ShapeError(who, f"a mask of {count} values", f"shape {tuple(index.shape)}", "One value a sample.")
        index = index.nonzero()[:, 0]
    index = index.to(torch.int64)
    if index.ndim != 1 or len(index) == 0:
        raise ShapeError(who, "at least one position", f"shape {tuple(index.shape)}", "Check the selection.")
    if int(index.min()) < 0 or int(index.max()) >= count:
        bad = int(index.min()) if int(index.min()) < 0 else int(index.max())
        raise ShapeError(who, f"positions from 0 to {count - 1}", f"{bad}", "Check the selection.")
    if len(torch.unique(index)) != len(index):
        raise ShapeError(who, "every position at most once", "a position twice", "Ids must stay unique.")
    return SubsetSource(source, index)


def read_image(path: Path) -> Array:
    """Decode an image file to (H, W) or (H, W, 3).

    Raises:
        DataFileError: It cannot be read.
        ShapeError: Its colour mode is not supported.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return decode(image, str(path))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ShapeError):
            raise
        raise DataFileError(
            str(path), "a readable image file", f"{type(error).__name__}: {error}", "Repair or remove the file."
        ) from error
