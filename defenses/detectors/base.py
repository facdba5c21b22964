"""What detectors share that learn from in-distribution data: blocks of outputs, what was learned, sampling."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from robustlab.core.detector import Detector, Folds, Head, Needs
from robustlab.core.errors import ConfigError, LabelError, NotFittedError, ShapeError
from robustlab.core.model import Model
from robustlab.core.rng import hashed
from robustlab.core.source import Source
from robustlab.core.taps import PENULTIMATE, TappedModel
from robustlab.core.types import Batch, ModelOutputs

BLOCK = 4096
"""Rows that are worked on at once."""

_CACHED = 1 << 17  # numbers of a block that stay in a processor's cache
_ON_DEVICE = 1 << 26
_KEPT = 1 << 27  # numbers of a first pass that are kept for a second one: 512 MB

BANK = 50_000
"""Rows of features that are kept at most, unless told otherwise."""


class ArrayFolds(Folds):
    """Blocks of outputs that are in memory.

    Args:
        outputs: Of in-distribution data.
        labels: int64 (N,), or (N, L) for multi-label.
        head: Last layer.
    """

    def __init__(self, outputs: ModelOutputs, labels: Tensor | None, head: Head | None) -> None:
        if labels is not None and len(labels) != len(outputs):
            raise ShapeError("fit_outputs", f"{len(outputs)} labels", f"{len(labels)}", "Give one row a sample.")
        self.outputs = outputs
        self.labels = labels
        self.head = head
        self.num_classes = outputs.logits.shape[1]

    def __iter__(self) -> Iterator[tuple[ModelOutputs, Tensor | None]]:
        whole = self.outputs
        for start in range(0, len(whole), BLOCK):
            part = slice(start, start + BLOCK)
            yield (
                ModelOutputs(
                    logits=whole.logits[part],
                    features={name: value[part] for name, value in whole.features.items()},
                    members=None if whole.members is None else whole.members[:, part],
                    scores={name: value[part] for name, value in whole.scores.items()},
                    task=whole.task,
                ),
                None if self.labels is None else self.labels[part],
            )


class ModelFolds(Folds):
    """Blocks of what a model answers to a source; the first time round they are run, and kept while they fit.

    Args:
        model: The model, on its device.
        source: In-distribution data.
        taps: Features to return.
        head: Whether the last layer is needed.
        batch: Samples of a forward pass.
    """

    def __init__(self, model: Model, source: Source, taps: tuple[str, ...], *, head: bool, batch: int = 64) -> None:
        self.model = TappedModel(model, taps) if taps or head else model
        self.source = source
        self.batch = batch
        self.head = None
        if head and isinstance(self.model, TappedModel):
            self.head = self.model.head(self._read(0))
            if self.head is None:
                raise ConfigError(
                    f"last layer of {model.model_name}",
                    "logits that one linear layer gives",
                    "logits that are made otherwise",
                    "Leave out detectors that need the last layer (vim, residual, react, dice, ash, scale, fdbd).",
                )
        self._kept: list[tuple[ModelOutputs, Tensor | None]] | None = []

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Classes, known once a batch was run."""
        return self.model.num_classes

    def _read(self, start: int) -> Batch:
        return self.source.read(range(start, min(start + self.batch, len(self.source)))).to(self.model.device)

    def __iter__(self) -> Iterator[tuple[ModelOutputs, Tensor | None]]:
        if self._kept:
            yield from self._kept
            return
        kept: list[tuple[ModelOutputs, Tensor | None]] | None = [] if self._kept is not None else None
        size = 0
        for start in range(0, len(self.source), self.batch):
            batch = self._read(start)
            block = (self.model.predict(batch), batch.labels)
            size += sum(value.numel() for value in (block[0].logits, *block[0].features.values()))
            if kept is not None and size <= _KEPT:
                kept.append(block)
            else:
                kept = None
            yield block
        self._kept = kept


@dataclass(frozen=True)
class Learning(Detector):
    """A detector that learns from in-distribution data.

    ``learn`` is pure, so fitting again forgets everything before.
    """

    learns: ClassVar[bool] = True

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the features that are looked at."""
        return ()

    def fit(self, model: Model, source: Source) -> Self:
        """Fit on in-distribution training data, in as many passes as the method takes.

        Args:
            model: The model, on its device.
            source: Training data, with labels for detectors that use classes.

        Raises:
            ConfigError: The model has no features, or no last layer that gives the logits, where one is needed.
        """
        return self.fit_folds(ModelFolds(model, source, self.taps, head=Needs.HEAD in self.needs))

    def fit_outputs(self, outputs: ModelOutputs, labels: Tensor | None = None, head: Head | None = None) -> Self:
        """Fit on outputs of in-distribution data that are in memory.

        Args:
            outputs: With the features that the detector needs.
            labels: int64 (N,).
            head: Last layer of the network, for detectors that need it.
        """
        return self.fit_folds(ArrayFolds(outputs, labels, head))

    def fit_folds(self, folds: Folds) -> Self:
        """Fit on blocks of outputs.

        Raises:
            ConfigError: Something is missing that the detector needs.
        """
        if Needs.HEAD in self.needs and folds.head is None:
            raise ConfigError(
                type(self).__name__, "the last layer of the network", "none", "Pass head=Head(weight, bias)."
            )
        self.keep(self.learn(folds))
        return self

    @abstractmethod
    def learn(self, folds: Folds) -> dict[str, Tensor]:
        """Return what is learned, by name."""

    def keep(self, learned: Mapping[str, Tensor]) -> None:
        """Replace what was learned."""
        # equality and identity are those of the configuration
        object.__setattr__(self, "_learned", dict(learned))

    @property
    def is_fitted(self) -> bool:
        return not self.learns or getattr(self, "_learned", None) is not None

    @property
    def learned(self) -> Mapping[str, Tensor]:
        """What was learned, by name.

        Raises:
            NotFittedError: Nothing yet.
        """
        found: Mapping[str, Tensor] | None = getattr(self, "_learned", None)
        if found is None:
            name = self.name or type(self).__name__
            raise NotFittedError(name, "a fitted detector", "none", "Call fit() with in-distribution data first.")
        return found

    def numbers(self, name: str, like: Tensor) -> Tensor:
        """Return something learned on the device, and in the precision, of ``like``."""
        return self.learned[name].to(like.device, like.dtype)


@dataclass(frozen=True)
class OnFeatures(Learning):
    """A detector that looks at features.

    Args:
        tap: Name of the features: ``"penultimate"``, what enters the last linear layer, or a module of the network.
    """

    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.FEATURES})

    tap: str = field(default=PENULTIMATE, kw_only=True)

    @property
    def taps(self) -> tuple[str, ...]:
        return (self.tap,)

    def features(self, outputs: ModelOutputs) -> Tensor:
        """Return float32 or float64 (N, D).

        Raises:
            ShapeError: The outputs lack them.
        """
        return tapped(outputs, self.tap, self.name or type(self).__name__)

    def known(self, outputs: ModelOutputs, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the finite rows of (features, labels int64 (M,)).

        Raises:
            LabelError: There are no labels, or several a sample.
        """
        features = self.features(outputs)
        features, labels = finite_rows(features, self.one_label(labels).to(features.device))
        return features, labels

    def one_label(self, labels: Tensor | None) -> Tensor:
        """Return labels (N,).

        Raises:
            LabelError: There are none, or several a sample.
        """
        if labels is None or labels.ndim != 1:
            raise LabelError(
                self.name or type(self).__name__,
                "in-distribution data with one label a sample",
                "none" if labels is None else f"labels of shape {tuple(labels.shape)}",
                "Use a detector without classes, e.g. knn, vim or residual.",
            )
        return labels

    def finite(self, outputs: ModelOutputs) -> Tensor:
        """Return the finite rows of the features."""
        return finite_rows(self.features(outputs))[0]

    def mean_features(self, folds: Folds) -> Tensor:
        """Return the mean of the finite rows, float64 (D,).

        Raises:
            ConfigError: There are none.
        """
        total, count = torch.zeros(()), 0
        for outputs, _ in folds:
            features = self.features(outputs)
            for block in torch.split(features, block_rows(features)):
                rows = finite_rows(block)[0]
                total = total.to(features.device) + rows.sum(0).to(torch.float64)
                count += len(rows)
        if count == 0:
            raise ConfigError(self.name, "in-distribution data with finite features", "none", "Pass some.")
        return total / count


def tapped(outputs: ModelOutputs, tap: str, who: str) -> Tensor:
    """Return features float32 or float64 (N, D).

    Raises:
        ShapeError: The outputs lack them.
    """
    found = outputs.features.get(tap)
    if found is None or found.ndim != 2:
        have = ", ".join(f"{name} {tuple(value.shape)}" for name, value in outputs.features.items()) or "none"
        raise ShapeError(who, f"features {tap!r} of shape (N, D)", have, "Name another tap.")
    return found if found.dtype == torch.float64 else found.to(torch.float32)


def block_rows(values: Tensor) -> int:
    """Return how many rows (N, D) to work on at once.

    On a processor what one step leaves is then still in the cache for the next; a GPU is filled.
    """
    numbers = _CACHED if values.device.type == "cpu" else _ON_DEVICE
    return max(1, numbers // max(1, values[:1].numel()))


def by_blocks(score: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """Return ``score`` (n,) of blocks of rows of columns (N, ...), joined.

    Args:
        score: Takes as many blocks as there are columns.
        columns: The first decides how many rows a block has.
    """
    rows = block_rows(columns[0])
    return torch.cat([score(*parts) for parts in zip(*(torch.split(column, rows) for column in columns), strict=True)])


def undefined(score: Tensor, *seen: Tensor) -> Tensor:
    """Return scores (N,), NaN where what was looked at, (N,) or the sum of a row (N, D), is not finite.

    That is where a number is not finite, or where numbers are such that nothing sensible can be made of them.
    """
    for values in seen:
        score = torch.where(torch.isfinite(values if values.ndim == 1 else values.sum(1)), score, torch.nan)
    return score


def finite_rows(*columns: Tensor) -> tuple[Tensor, ...]:
    """Return columns (N, ...) without the rows in which one of the floating-point ones has NaN or infinite numbers."""
    seen = [column for column in columns if column.is_floating_point()]
    if all(bool(torch.isfinite(values.sum(1)).all()) for values in seen):  # cheaper than to look at every number
        return columns
    rows = torch.stack([torch.isfinite(values).all(1) for values in seen]).all(0)
    return tuple(column[rows] for column in columns)


def unit(features: Tensor) -> Tensor:
    """Return rows of length 1; rows of zeros stay zeros."""
    length = features.norm(dim=1, keepdim=True)
    return features / torch.where(length > 0, length, 1)


def products(rows: Tensor) -> Tensor:
    """Return ``rows.T @ rows`` (D, D) of float64 (n, D)."""
    if rows.device.type == "cpu":
        array = rows.numpy()
        return torch.from_numpy(array.T @ array)  # numpy sees the symmetry and does half of the work
    return rows.T @ rows


class Sampler:
    """Keeps a uniform sample of the rows of a stream, the same for every cut into blocks.

    Args:
        limit: Rows to keep; all of a shorter stream.
        seed: Seed of the choice.
    """

    def __init__(self, limit: int, seed: int = 0) -> None:
        self.limit = limit
        self.seed = seed
        self.seen = 0
        self._parts: list[tuple[Tensor, tuple[Tensor, ...]]] = []  # keys, and the columns
        self._held = 0

    def add(self, *columns: Tensor) -> None:
        """Offer rows of one or more columns of equal length."""
        count = len(columns[0])
        places = torch.arange(self.seen, self.seen + count, dtype=torch.int64, device=columns[0].device)
        self.seen += count
        self._parts.append((hashed(places + (self.seed << 40)), columns))
        self._held += count
        if self._held > 2 * self.limit:
            self._cut()

    @property
    def parts(self) -> list[tuple[Tensor, ...]]:
        """The columns of the sample in pieces, in the order of the stream."""
        if self._held > self.limit:
            self._cut()
        return [columns for _, columns in self._parts]

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """The columns of the sample, in the order of the stream; empty if nothing was offered."""
        if len(self._parts) > 1:
            self._cut()
        return self.parts[0] if self._parts else ()

    def _cut(self) -> None:
        keys = torch.cat([part for part, _ in self._parts])
        columns = [torch.cat(parts) for parts in zip(*(part for _, part in self._parts), strict=True)]
        if len(keys) > self.limit:
            # places rise within the sample, so that the order does not depend on the blocks
            kept = keys.topk(self.limit, largest=False, sorted=False).indices.sort().values
            keys, columns = keys[kept], [column[kept] for column in columns]
        self._parts = [(keys, tuple(columns))]
        self._held = len(keys)
