"""Detector: a score that is larger for inputs that are further out of distribution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Self

from torch import Tensor

from .model import Model, why_no_features
from .source import Source
from .spec import array_fingerprint
from .types import Batch, ModelOutputs


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
    """An out-of-distribution score; larger always means more out of distribution.

    Attributes:
        needs: What it has to see. Scores that need logits alone are made of stored answers, others in the forward pass.
        learns: It has to be fitted before it can score.
    """

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.LOGITS})
    learns: ClassVar[bool] = False

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the features that it looks at."""
        return ()

    @property
    def is_fitted(self) -> bool:
        """Whether it can score."""
        return not self.learns

    def fit(self, model: Model, source: Source) -> Self:
        """Fit on in-distribution training data; refitting forgets everything before. The default needs no fit."""
        del model, source
        return self

    def state(self) -> str:
        """Return a text that differs where what was learned differs; caches tell fitted detectors apart by it."""
        learned = getattr(self, "_learned", None) or {}
        return array_fingerprint(sorted(learned.items()))

    @property
    def tuned_on(self) -> Mapping[str, Tensor]:
        """Role of a validation set to the hashes, int64 (M,), of the images that the settings were chosen on."""
        found: Mapping[str, Tensor] = getattr(self, "_tuned_on", {})
        return found

    def remember(self, images: Mapping[str, Tensor]) -> None:
        """Note what images the settings were chosen on; an evaluation on any of them is refused."""
        # equality and identity are those of the configuration
        object.__setattr__(self, "_tuned_on", dict(images))

    @abstractmethod
    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,) scores."""

    def score_in_pass(self, model: Model, batch: Batch, outputs: ModelOutputs) -> Tensor:
        """Return float (N,) scores while the batch is at hand; ``score`` unless a method needs more passes."""
        del model, batch
        return self.score(outputs)

    def skip_reason(self, model: Model) -> str | None:
        """Return why the score is undefined for this model, or None."""
        if model.answers_only:
            return "answers_only"
        if Needs.OFFSET in self.needs and not model.has_offset:
            return "needs logits: the offset of the logits is lost in probabilities"
        if Needs.MEMBERS in self.needs and not model.has_members:
            return "needs the members of an ensemble"
        if self.needs & {Needs.FEATURES, Needs.HEAD}:
            reason = why_no_features(model)
            return None if reason is None else f"needs features of a network, not of {reason}"
        return None
