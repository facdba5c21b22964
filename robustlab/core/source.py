"""Source: samples with stable ids that can be read at random."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import UnknownNameError
from .spec import array_fingerprint
from .types import Batch, ImageSpec, Task


@dataclass(frozen=True, eq=False, repr=False)
class SourceInfo:
    """What is known of a source without decoding an image.

    Args:
        name: Short name for reports.
        spec: Meaning of the pixels.
        ids: int64 (N,), unique.
        labels: int64 (N,), or (N, L) for multi-label, or None.
        task: Task the labels are made for; None without labels.
        class_names: Names of the classes or labels, or None.
        groups: Column to int64 codes (N,), -1 for missing.
        group_levels: Column to the names of codes 0, 1, ...
        posterior: float64 (N, C) true class probabilities, known for generated data only.
        notes: Sentences for the report, e.g. files that were quarantined.
    """

    name: str
    spec: ImageSpec
    ids: Tensor
    labels: Tensor | None = None
    task: Task | None = None
    class_names: tuple[str, ...] | None = None
    groups: Mapping[str, Tensor] = field(default_factory=dict)
    group_levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    posterior: Tensor | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


class Source(ABC):
    """Samples that can be read in any order; ids, labels and group columns travel with them.

    Attributes:
        info: What is known of the samples.
        in_memory: Reading is copying: nothing is decoded.
        thread_safe: ``pixels`` may run in another thread while a model runs in this one, because it neither reads nor
            changes global random state; what is read next is then decoded while the model works.
    """

    info: SourceInfo
    in_memory: bool = False
    thread_safe: bool = False
    _fingerprint: str | None = None
    _content: str | None = None

    @abstractmethod
    def pixels(self, index: Sequence[int]) -> Tensor:
        """Return the decoded images at positions ``index``: float32 (len(index), C, H, W) in [0, 1], on the CPU."""

    def __len__(self) -> int:
        return len(self.info)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.info.name!r}: {len(self)} images>"

    def read(self, index: Sequence[int]) -> Batch:
        """Return the samples at positions ``index`` as a CPU batch."""
        rows = torch.as_tensor(list(index), dtype=torch.int64)
        info = self.info
        return Batch(
            images=_plain_strides(self.pixels(index)),
            labels=None if info.labels is None else info.labels[rows],
            ids=info.ids[rows],
            groups={name: codes[rows] for name, codes in info.groups.items()},
        )

    def column(self, name: str) -> Tensor:
        """Return the codes (N,) of a group column.

        Raises:
            UnknownNameError: No such column.
        """
        if name not in self.info.groups:
            have = ", ".join(self.info.groups) or "none at all"
            raise UnknownNameError(
                f"data {self.info.name!r}",
                f"a group column among: {have}",
                repr(name),
                "Pass the column to load_data(..., groups={...}) or leave it out.",
            )
        return self.info.groups[name]

    def fingerprint(self) -> str:
        """Return a hash of ids, labels, group columns, the meaning of the pixels, and the pixels.

        Of sources that decode when read, 64 samples stand for all pixels.
        """
        stored = self._fingerprint
        if stored is None:
            info = self.info
            facts = torch.tensor(list(repr((info.spec, info.class_names, info.task)).encode()), dtype=torch.uint8)
            labels = [] if info.labels is None else [("labels", info.labels)]
            columns = sorted(info.groups.items())
            stored = array_fingerprint([("ids", info.ids), ("facts", facts), *labels, *columns, *self._hashed_pixels()])
            self._fingerprint = stored
        return stored

    def content_fingerprint(self) -> str:
        """Return a hash of what decides a prediction: ids, the meaning of the pixels, and the pixels.

        Labels, names and group columns have no part in it. Of sources that decode when read, 64 samples and
        ``state`` stand for all pixels.
        """
        stored = self._content
        if stored is None:
            facts = repr((self.info.spec, self.state())).encode()
            head = [("ids", self.info.ids), ("facts", torch.tensor(list(facts), dtype=torch.uint8))]
            stored = array_fingerprint([*head, *self._hashed_pixels()])
            self._content = stored
        return stored

    def refresh(self) -> None:
        """Forget hashes that were taken: the stored images may have changed since."""
        self._fingerprint = None
        self._content = None

    def state(self) -> str:
        """Return what else tells, without decoding, that stored images have changed, e.g. sizes and dates of files."""
        return ""

    def _hashed_pixels(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over all pixels where they are in memory, else over up to 64 samples, evenly spread."""
        count = len(self)
        if self.in_memory:
            rows: Sequence[int] = range(count)
        else:
            rows = sorted({i * (count - 1) // 63 for i in range(64)}) if count > 1 else [0]
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            try:
                yield "pixels", self.pixels(part)
            except OSError:
                yield from self._readable_pixels(part)

    def _readable_pixels(self, rows: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the pixels of samples one by one; what cannot be read is named by its position."""
        for row in rows:
            try:
                yield "pixels", self.pixels([row])
            except OSError:
                yield "unreadable", torch.tensor([row])


def _plain_strides(images: Tensor) -> Tensor:
    """Return images (N, C, H, W) with the strides of a new tensor.

    Axes of length 1 may have any stride, and convolutions choose their kernel, and with it the last bits of their
    result, by strides.
    """
    _, channels, height, width = images.shape
    return images.contiguous().as_strided(images.shape, (channels * height * width, height * width, width, 1))
