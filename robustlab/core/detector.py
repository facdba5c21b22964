"""Detector: a score that is larger for inputs that are further out of distribution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Self

from torch import Tensor

from .model import Model
from .source import Source
from .types import ModelOutputs


class Needs(Enum):
    """What a detector has to see of a model."""

    LOGITS = "logits"
    OFFSET = "logits with a meaningful offset"
    FEATURES = "features"
    HEAD = "last layer"
    INPUT_GRAD = "input gradient"
    EXTRA_FORWARD = "extra forward passes"
    MEMBERS = "members of an ensemble"


@dataclass(frozen=True, eq=False)
class Head:
    """The last linear layer of a network: logits are ``features @ weight.T + bias``.

    Args:
        weight: float (C, D).
        bias: float (C,).
    """

    weight: Tensor
    bias: Tensor


class Folds(ABC):
    """In-distribution outputs in blocks, that a fit may go through as often as it has to.

    Attributes:
        head: Last layer of the network; None where it is not known.
        num_classes: Classes, or labels for multi-label.
    """

    head: Head | None
    num_classes: int

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[ModelOutputs, Tensor | None]]:
        """Iterate over (outputs, labels)."""


class Detector(ABC):
    """An out-of-distribution score; larger always means more out of distribution."""

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.LOGITS})

    def fit(self, model: Model, source: Source) -> Self:
        """Fit on in-distribution training data; refitting forgets everything before. The default needs no fit."""
        del model, source
        return self

    @abstractmethod
    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,) scores."""

    def skip_reason(self, model: Model) -> str | None:
        """Return why the score is undefined for this model, or None."""
        if model.answers_only:
            return "answers_only"
        if Needs.OFFSET in self.needs and not model.has_offset:
            return "needs logits: the offset of the logits is lost in probabilities"
        unmet = sorted(need.value for need in self.needs - {Needs.LOGITS, Needs.OFFSET})
        if unmet:
            return f"needs {', '.join(unmet)}, which the evaluation does not offer yet"
        return None
