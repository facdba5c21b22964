"""Defense: a model that was made, or wrapped, to fail less."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar, Self

from .model import Model
from .source import Source


class Defense(Model):
    """A model that can be dropped into ``evaluate_under_shift``, fitted, saved and loaded.

    Saving writes ``weights.safetensors`` and ``defense.json`` into a folder; loading never runs pickled code.
    """

    version: ClassVar[int] = 1
    order_dependent: ClassVar[bool] = False

    @abstractmethod
    def fit(self, train: Source | None, val: Source | None) -> Self:
        """Fit on training data, and on clean validation data where the method needs some."""

    @abstractmethod
    def save(self, folder: str | Path) -> Path:
        """Write parameters and configuration; the file set appears complete or not at all."""
