"""What all recalibrations share: fitting on validation data only, finite outputs, attacks, saving."""

from __future__ import annotations

import copy
import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from defenses.storage import read_config, restore_models, save_models
from robustlab.core.defense import Defense
from robustlab.core.errors import ConfigError, KindError, LabelError, NotFittedError
from robustlab.core.model import Model, wrap
from robustlab.core.source import Source
from robustlab.core.types import Batch, ModelOutputs, Task

logger = logging.getLogger("robustlab")

_BATCH = 256


class Recalibration(Defense):
    """A model whose logits pass through a map that was fitted on clean validation data.

    Args:
        model: The model to recalibrate; it is not changed. A bare module counts as multiclass with logits.
    """

    flat: ClassVar[bool] = False
    """The map has no useful gradient: an attack sees its values, and the gradient of the logits before it (BPDA)."""

    def __init__(self, model: Model | nn.Module) -> None:
        self.base = wrap(model)
        self.class_names = self.base.class_names
        self.model_name = f"{self.base.model_name} + {self.name}"
        self.fitted = nn.Module().eval()
        self._straight_through = False
        self._fallback_rows = 0

    @abstractmethod
    def learn(self, logits: Tensor, labels: Tensor) -> None:
        """Fit the map.

        Args:
            logits: float (N, C).
            labels: int64 (N,), or (N, C) in {0, 1, -1} for multi-label, on the logits' device.
        """

    @abstractmethod
    def calibrate(self, logits: Tensor) -> Tensor:
        """Map finite float64 logits (N, C) to calibrated logits of the same shape."""

    @property
    def task(self) -> Task:  # type: ignore[override]
        """Task of the model inside."""
        return self.base.task

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Classes of the model inside."""
        return self.base.num_classes

    @property
    def has_offset(self) -> bool:  # type: ignore[override]
        """Whether the outputs keep the offset of logits; log-probabilities do not."""
        return False

    @property
    def is_fitted(self) -> bool:
        """Whether there is a map."""
        return next(self.fitted.buffers(), None) is not None

    @property
    def fallback_rows(self) -> int:
        """Rows that kept the model's probabilities so far, as the map said 0 for every class."""
        return self._fallback_rows

    def modules(self) -> Sequence[nn.Module]:
        own = [self.fitted] if next(self.fitted.buffers(), None) is not None else []
        return [*self.base.modules(), *own]

    def options(self) -> Mapping[str, Any]:
        """Return the arguments other than the model, as JSON types."""
        return {}

    def settings(self) -> Mapping[str, Any]:
        return {"defense": self.name, **self.options(), "base": dict(self.base.settings())}

    def outputs(self, batch: Batch) -> ModelOutputs:
        outputs = self.base.outputs(batch)
        self._require_fit("Call fit(None, val) with clean validation data.")
        return dataclasses.replace(outputs, logits=self._mapped(outputs.logits))

    def for_attack(self) -> Model:
        view = copy.copy(self)
        view.base = self.base.for_attack()
        view._straight_through = self.flat
        return view

    def fit(self, train: Source | None, val: Source | None) -> Self:
        """Fit the map on clean validation data; training data are not used.

        Args:
            train: Ignored.
            val: Labelled clean validation data.

        Raises:
            ConfigError: No validation data, or a model or task that the method cannot serve.
            KindError: They are not a Source.
            LabelError: They have no labels, labels out of range, or too few outcomes for the method.
        """
        del train
        who = f"{type(self).__name__}.fit"
        if val is None:
            raise ConfigError(who, "clean validation data", "val=None", "Pass val=; training data mislead here.")
        if not isinstance(val, Source):
            raise KindError(
                who, "val as a Source", type(val).__name__, "Make one: robustlab.load_data(images, labels=labels)."
            )
        if val.info.labels is None or len(val) == 0:
            raise LabelError(who, "labelled validation data", "none", "Load val with labels.")
        if self.base.answers_only:
            raise ConfigError(who, "a model with probabilities", "answers only", "Answers alone cannot be calibrated.")
        device = self.base.device
        parts = [range(start, min(start + _BATCH, len(val))) for start in range(0, len(val), _BATCH)]
        logits = torch.cat([self.base.predict(val.read(rows).to(device)).logits for rows in parts])
        self.learn(logits, val.info.labels.to(logits.device))
        logger.info("%s: fitted on %d samples", self.model_name, len(val))
        return self

    def save(self, folder: str | Path) -> Path:
        """Write the map and the weights of the model inside.

        Raises:
            NotFittedError: There is no map yet.
            DataFileError: The folder cannot be written.
        """
        self._require_fit("Call fit(None, val) first.")
        shapes = {name: list(value.shape) for name, value in self.fitted.named_buffers()}
        config = {"defense": self.name, "version": self.version, "options": dict(self.options()), "shapes": shapes}
        return save_models(folder, [self], config)

    @classmethod
    def load(cls, folder: str | Path, *, model: Model | nn.Module) -> Self:
        """Return a saved defence.

        Args:
            folder: Where it was saved.
            model: The network inside, wrapped as it was; the saved weights are loaded into it, in place.

        Raises:
            DataFileError: Nothing was saved there, or it is damaged.
            ConfigError: ``model`` is not the network that was saved.
        """
        config = read_config(folder, cls.name, cls.version)
        defense = cls(model, **config["options"])
        empty = torch.zeros((), dtype=torch.float64, device=defense.base.device)
        defense.keep({name: empty.new_zeros(shape) for name, shape in config["shapes"].items()})
        restore_models(folder, [defense], config)
        return defense

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the fitted numbers, float64."""
        fitted = nn.Module().eval()
        for name, value in sorted(tensors.items()):  # one order, as hashes go by it
            # copied, as slices have strides that hashes of bytes refuse
            fitted.register_buffer(name, value.new_empty(value.shape).copy_(value))
        self.fitted = fitted

    def numbers(self, name: str, like: Tensor) -> Tensor:
        """Return fitted numbers on the device of ``like``."""
        return self.fitted.get_buffer(name).to(like.device)

    def note(self, rows: Tensor) -> None:
        """Count rows (N,) that the map could not serve; the first are logged."""
        count = int(rows.sum())
        if count and not self._fallback_rows:
            logger.warning(
                "%s: %d of %d rows have no class that was ever seen at such scores; they keep the model's "
                "probabilities, and so will others (counted in fallback_rows)",
                self.model_name,
                count,
                len(rows),
            )
        self._fallback_rows += count

    def _require_fit(self, fix: str) -> None:
        if not self.is_fitted:
            raise NotFittedError(self.model_name, f"a fitted {self.name}", "none", fix)

    def _mapped(self, logits: Tensor) -> Tensor:
        """Return calibrated logits, NaN where the model's were not finite: those stay errors."""
        finite = torch.isfinite(logits)
        if self.task != "multilabel":
            finite = finite.all(1, keepdim=True)
        changed = self.calibrate(torch.where(finite, logits, 0).to(torch.float64)).to(logits.dtype)
        if self._straight_through:
            changed = changed.detach() + (logits - logits.detach())
        return torch.where(finite, changed, torch.nan)
