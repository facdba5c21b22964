"""Detectors of pytorch-ood, scored in our forward pass and held to our rules."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from robustlab.core.detector import Detector, Folds, Head, Needs
from robustlab.core.errors import (
    ConfigError,
    KindError,
    LabelError,
    ModelError,
    NotFittedError,
    RobustlabError,
    ShapeError,
)
from robustlab.core.identity import code_identity, object_identity
from robustlab.core.model import Model, WrappedModel, why_no_features
from robustlab.core.source import Source
from robustlab.core.taps import PENULTIMATE
from robustlab.core.types import Batch, ModelOutputs
from robustlab.data.torch_data import same_random_state
from robustlab.train.seeding import scoped_seed

from .base import ArrayFolds, ModelFolds, tapped

Route = Literal["logits", "features", "images"]

_NETWORKS = ("model", "encoder", "backbone")
_EXAMPLE = "Pass e.g. FromPytorchOOD(pytorch_ood.detector.KNN(None, k=50))."
_BLOCK = 64  # images of a forward pass while fitting


@dataclass(frozen=True)
class FromPytorchOOD(Detector):
    """Any detector of pytorch-ood, or of a library with its interface (larger means more out of distribution).

    One that can score logits (``predict_logits``) or features (``predict_features``) is given ours, from the one
    forward pass that serves all detectors: its own ``model=`` or ``encoder=`` is not run and may be None. All others
    (ODIN, GradNorm, Gram, RankFeat, ReAct on feature maps ...) run ``predict`` on images as our model would feed them
    to the network: resized, normalised, with as many channels as it takes. They must hold the network that is
    evaluated, or a part of it.

    The network is in eval mode; its flags and gradients are put back, and so is global random state, which starts anew
    for every batch: scores repeat, but those of a random detector depend on the samples beside. ``fit`` fits the object
    that was passed, in place, on in-distribution data only. Rows with NaN or infinite numbers score NaN, and are left
    out of fits. Fitted ones cannot be saved (their objects are no safetensors, and pickle is not used). Scores of
    logits need their offset, as it is not known which of them use it.

    Args:
        detector: The detector, e.g. ``pytorch_ood.detector.KNN(None, k=50)``.
        name: Kebab-case name for tables; ``"pytorch-ood:"`` and the name of the class if not given.
        version: Raise it when code changes that the caches cannot see.
        tap: Features that it is given: ``"penultimate"``, what enters the last linear layer, or a module of the
            network.

    Raises:
        KindError: ``detector`` has no interface of pytorch-ood.
        ConfigError: It scores images, and has no network.

    References:
        Kirchheim, Filax, Ortmeier, PyTorch-OOD: a library for out-of-distribution detection based on PyTorch, 2022.
    """

    opaque: ClassVar[bool] = True

    detector: Any
    name: str = field(default="", kw_only=True)  # type: ignore[misc]  # pyright: ignore[reportIncompatibleVariableOverride] - one class, many detectors
    version: int = field(default=1, kw_only=True)  # type: ignore[misc]  # pyright: ignore[reportIncompatibleVariableOverride]
    tap: str = field(default=PENULTIMATE, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.detector, type) or not callable(getattr(self.detector, "predict", None)):
            raise KindError("FromPytorchOOD", "a detector of pytorch-ood", repr(self.detector), _EXAMPLE)
        if not self.name:
            kebab = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", "-", type(self.detector).__name__).lower()
            object.__setattr__(self, "name", f"pytorch-ood:{kebab}")
        lacking = [name for name in _NETWORKS if getattr(self.detector, name, self) is None]
        if self.route == "images" and lacking:
            raise ConfigError(self.name, f"{lacking[0]}= the network or a part of it, as it scores images", "None",
                              f"Pass {lacking[0]}=net, the network that is evaluated.")  # fmt: skip

    @property
    def route(self) -> Route:
        """What it is given."""
        if callable(getattr(self.detector, "predict_logits", None)):
            return "logits"
        return "features" if callable(getattr(self.detector, "predict_features", None)) else "images"

    @property
    def needs(self) -> frozenset[Needs]:  # type: ignore[override]
        """What it has to see, by its route."""
        if self.route == "images":
            return frozenset({Needs.LOGITS, Needs.EXTRA_FORWARD})
        return frozenset({Needs.FEATURES} if self.route == "features" else {Needs.LOGITS, Needs.OFFSET})

    @property
    def learns(self) -> bool:  # type: ignore[override]
        """Whether it has to be fitted."""
        return bool(getattr(self.detector, "requires_fit", False))

    @property
    def taps(self) -> tuple[str, ...]:
        return (self.tap,) if self.route == "features" else ()

    @property
    def is_fitted(self) -> bool:
        if not self.learns or getattr(self, "_fitted", False):
            return True
        # it may have been fitted elsewhere, and says so only by not complaining
        probe = torch.zeros((1, 1, 8, 8) if self.route == "images" else (1, 1))
        try:
            with _borrowed(self.detector), torch.no_grad():
                self._predict(probe)
        except NotFittedError:
            return False
        except RobustlabError:  # the probe does not suit it
            return True
        return True

    def state(self) -> str:
        return f"{code_identity(type(self.detector))} {object_identity(self.detector)}"

    def skip_reason(self, model: Model) -> str | None:
        if model.task == "multilabel":
            return "needs one class a sample"
        if self.route == "images" and not model.answers_only:
            reason = why_no_features(model)
            if reason is not None:
                return f"needs a network, not {reason}"
            own = {id(weight) for part in _modules(self.detector) for weight in part.parameters()}
            if own and not own & {id(weight) for part in model.modules() for weight in part.parameters()}:
                return "was made with another network: none of its parameters is the model's"
        return super().skip_reason(model)

    def fit(self, model: Model, source: Source) -> Self:
        """Fit on in-distribution training data.

        Args:
            model: The model, on its device.
            source: Training data with one label a sample.

        Raises:
            LabelError: There are no labels, or several a sample.
            ConfigError: The model has no features, where some are needed.
            ModelError: The detector's own fit failed.
        """
        if not self.learns:
            return self
        if self.route != "images":
            return self.fit_folds(ModelFolds(model, source, self.taps, head=False))
        self._one_label(source.info.labels)
        with _borrowed(self.detector, model):
            _asked(self.name, "fit", lambda: self.detector.fit(_Loader(model, source)))
        object.__setattr__(self, "_fitted", True)
        return self

    def fit_outputs(self, outputs: ModelOutputs, labels: Tensor | None = None, head: Head | None = None) -> Self:
        """Fit on outputs of in-distribution data that are in memory; see ``Learning.fit_outputs``."""
        return self.fit_folds(ArrayFolds(outputs, labels, head))

    def fit_folds(self, folds: Folds) -> Self:
        """Fit on blocks of outputs, joined.

        Raises:
            LabelError: There are no labels, or several a sample.
            ConfigError: The detector scores images, or there are no finite rows.
            ModelError: The detector's own fit failed.
        """
        if not self.learns:
            return self
        seen, known = [], []
        for outputs, labels in folds:
            values = self._seen(outputs)
            rows = torch.isfinite(values).all(1)
            seen.append(values[rows].cpu())  # some of its detectors hand them to numpy
            known.append(self._one_label(labels).to(rows.device)[rows].cpu())
        if not sum(map(len, seen)):
            raise ConfigError(self.name, f"in-distribution data with finite {self.route}", "none", "Pass some.")
        fit = getattr(self.detector, f"fit_{self.route}")
        with _borrowed(self.detector):
            _asked(self.name, "fit", lambda: fit(torch.cat(seen), torch.cat(known)))
        object.__setattr__(self, "_fitted", True)
        return self

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,) as the detector gives them; NaN in rows with NaN or infinite logits or features.

        Raises:
            ConfigError: The detector scores images, which are at hand in a forward pass only.
            ModelError: The detector failed.
        """
        values = self._seen(outputs)
        rows = torch.isfinite(values).all(1)
        with _borrowed(self.detector):
            score = torch.where(rows, self._predict(torch.where(rows[:, None], values, 0)), torch.nan)
        return score if values.requires_grad else score.detach()

    def score_in_pass(self, model: Model, batch: Batch, outputs: ModelOutputs) -> Tensor:
        if self.route != "images":
            return self.score(outputs)
        with torch.inference_mode(False), torch.enable_grad(), _borrowed(self.detector, model):
            return self._predict(_prepared(model, batch.images).detach().clone()).detach()

    def _seen(self, outputs: ModelOutputs) -> Tensor:
        """Return what the detector scores, float (N, K)."""
        if self.route == "images":
            raise ConfigError(
                self.name,
                "images, as it runs the network itself",
                "outputs",
                "Score it in an evaluation or ood_report.",
            )
        return outputs.logits if self.route == "logits" else tapped(outputs, self.tap, self.name)

    def _one_label(self, labels: Tensor | None) -> Tensor:
        if labels is None or labels.ndim != 1:
            got = "none" if labels is None else f"labels of shape {tuple(labels.shape)}"
            raise LabelError(
                self.name, "in-distribution data with one label a sample", got, "Load it with labels of one class."
            )
        return labels

    def _predict(self, values: Tensor) -> Tensor:
        """Return the detector's own scores (N,) on the device of what it is given."""
        name = "predict" if self.route == "images" else f"predict_{self.route}"
        place = getattr(self.detector, "device", None)
        if place is not None and torch.device(place) != values.device:
            self.detector.to(values.device)
        found = _asked(self.name, "score", lambda: getattr(self.detector, name)(values))
        if not isinstance(found, Tensor) or found.shape != values.shape[:1]:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(self.name, f"{len(values)} scores as a tensor", got, "It must give one number an image.")
        return found.to(values.device)


def _asked(who: str, what: str, call: Callable[[], Any]) -> Any:
    """Call the other library, and tell whose an error is."""
    try:
        return call()
    except (RobustlabError, MemoryError):
        raise
    except Exception as error:  # of any kind
        if type(error).__name__ == "RequiresFittingException":
            hint = "Pass fit= in-distribution data, or fit it first."
            raise NotFittedError(who, "a fitted detector", "one that says it is not", hint) from error
        raise ModelError(
            who,
            f"its own {what} to succeed",
            f"{type(error).__name__}: {error}",
            "Fit it on data in which every class 0, 1, ... occurs, with more samples than neighbours.",
        ) from error


def _modules(detector: Any) -> list[nn.Module]:
    """Return the modules that a detector holds."""
    found: list[nn.Module] = []
    for value in vars(detector).values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            owner = getattr(item, "__self__", item)  # of a method such as net.features
            if isinstance(owner, nn.Module):
                found.append(owner)
    return found


@contextmanager
def _borrowed(detector: Any, model: Model | None = None) -> Iterator[None]:
    """Put networks in eval mode, and their flags, gradients and global random states back afterwards."""
    roots = [*_modules(detector), *(() if model is None else model.modules())]
    flags = [(module, module.training) for root in roots for module in root.modules()]
    slopes = [(weight, weight.grad) for root in roots for weight in root.parameters()]
    with same_random_state(), scoped_seed("foreign detector"):
        random.seed(0)
        np.random.set_state(np.random.RandomState(0).get_state())  # noqa: NPY002
        try:
            for module, _ in flags:
                module.training = False
            for weight, _ in slopes:
                weight.grad = None
            yield
        finally:
            for module, training in flags:
                module.training = training
            for weight, slope in slopes:
                weight.grad = slope


class _Loader:
    """Batches (images as the network takes them, labels) of a source, as a data loader of torch gives them."""

    def __init__(self, model: Model, source: Source) -> None:
        self.model = model
        self.source = source

    def __len__(self) -> int:
        return -(-len(self.source) // _BLOCK)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for start in range(0, len(self.source), _BLOCK):
            batch = self.source.read(range(start, min(start + _BLOCK, len(self.source)))).to(self.model.device)
            with torch.no_grad():
                yield _prepared(self.model, batch.images), batch.labels


def _prepared(model: Model, images: Tensor) -> Tensor:
    """Return images as the network takes them."""
    return model.prepare(images) if isinstance(model, WrappedModel) else images
