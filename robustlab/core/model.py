"""Models: any module or callable, with its task, output kind and preprocessing declared."""

from __future__ import annotations

import hashlib
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigError, KindError, ModelError, RangeError, RobustlabWarning, ShapeError
from .logits import to_logits
from .shift import luma
from .spec import array_fingerprint
from .types import OUTPUTS, TASKS, Batch, ModelOutputs, OutputKind, Task

logger = logging.getLogger("robustlab")


@dataclass(frozen=True)
class Capabilities:
    """What was measured of a model on up to eight images.

    Args:
        batch_independent: An image's output does not depend on the images beside it (to 1e-4).
        deterministic: Two passes give the same bits.
        supports_grad: A finite, non-zero gradient reaches the input.
    """

    batch_independent: bool
    deterministic: bool
    supports_grad: bool


class Model(ABC):
    """Anything that maps a batch to outputs: a wrapped network or a defence.

    Attributes:
        task: Declared task.
        num_classes: Classes, or labels for multi-label.
        class_names: Names of the classes, or None.
        has_offset: Logits keep their offset, as energy scores need (false when the network returns probabilities).
        has_members: Outputs hold the log-probabilities of members.
        answers_only: Only the answers are known, without probabilities: logits are 0 and 1 and say nothing else.
        model_name: Name used in reports.
        model_id: What the user calls this version of the model; stands for a function's code and weights in caches.
    """

    name: ClassVar[str] = ""
    task: Task
    num_classes: int
    class_names: tuple[str, ...] | None = None
    has_offset: bool = True
    answers_only: bool = False
    has_members: bool = False
    model_name: str = "model"
    model_id: str | None = None

    @abstractmethod
    def outputs(self, batch: Batch) -> ModelOutputs:
        """Run one differentiable forward pass; ``batch.images`` are float (N, C, H, W) in [0, 1]."""

    @abstractmethod
    def modules(self) -> Sequence[nn.Module]:
        """Return the torch modules inside, for device moves, eval mode and fingerprints."""

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """Return the declared settings as JSON types; part of the fingerprint and of every report."""

    def predict(self, batch: Batch) -> ModelOutputs:
        """Run one forward pass in eval mode without gradients."""
        with self.evaluating(), torch.no_grad():
            return self.outputs(batch)

    def __call__(self, images: Tensor) -> ModelOutputs:
        """Return the outputs for images (N, C, H, W) in [0, 1]."""
        ids = torch.arange(len(images), device=images.device)
        return self.predict(Batch(images=images, labels=None, ids=ids))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put every submodule in eval mode and restore each flag afterwards."""
        flags = [(module, module.training) for root in self.modules() for module in root.modules()]
        if not any(training for _, training in flags):
            yield
            return
        if not getattr(self, "_warned", False):
            self._warned = True
            warnings.warn(
                f"{self.model_name}: the network was in training mode; it is evaluated in eval mode and put back.",
                RobustlabWarning,
                stacklevel=4,
            )
        try:
            for module, _ in flags:  # not .eval(): exported programs refuse it, and some networks override it
                module.training = False
            yield
        finally:
            for module, training in flags:
                module.training = training

    @property
    def device(self) -> torch.device:
        """Device of the first parameter or buffer; CPU if there is none."""
        for module in self.modules():
            for tensor in (*module.parameters(), *module.buffers()):
                return tensor.device
        return torch.device("cpu")

    def to(self, device: torch.device | str) -> Model:
        """Move all modules to a device, in place."""
        for module in self.modules():
            module.to(device)
        return self

    def for_attack(self) -> Model:
        """Return the view that an adaptive attack differentiates; defences with randomness or blocks override it."""
        return self

    def parameter_count(self) -> int:
        """Return the number of parameters."""
        return sum(p.numel() for module in self.modules() for p in module.parameters())

    def fingerprint(self) -> str:
        """Return a hash of parameters, buffers, class names and settings."""
        digest = hashlib.blake2b(repr(sorted(self.settings().items())).encode(), digest_size=16)
        for module in self.modules():
            digest.update(repr(type(module)).encode())
            digest.update(array_fingerprint(module.state_dict().items()).encode())
        return digest.hexdigest()


class WrappedModel(Model):
    """A network with its preprocessing; made by ``wrap``."""

    def __init__(
        self,
        net: nn.Module | Callable[[Tensor], Any],
        *,
        task: Task | None,
        output: OutputKind | None,
        num_classes: int | None,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        size: tuple[int, int] | None,
        channels: int | None,
        bounds: tuple[float, float],
        class_names: tuple[str, ...] | None,
        model_name: str,
        model_id: str | None,
    ) -> None:
        self.net = net
        self._task: Task | None = task
        self._output: OutputKind | None = output
        self._classes = num_classes
        self.mean = mean
        self.std = std
        self.size = size
        self.channels = channels
        self.bounds = bounds
        self.class_names = class_names
        self.model_name = model_name
        self.model_id = model_id
        self.has_offset = output in (None, "logits")
        self.assumed_normalisation = False
        self._checked = output is not None

    @property
    def task(self) -> Task:  # type: ignore[override]
        """Declared task, or multiclass."""
        return "multiclass" if self._task is None else self._task

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of classes; known after the first forward pass if it was not declared."""
        if self._classes is None:
            raise ModelError(
                self.model_name,
                "a known number of classes",
                "none yet",
                "Run one batch, or pass num_classes to wrap().",
            )
        return self._classes

    def modules(self) -> Sequence[nn.Module]:
        return (self.net,) if isinstance(self.net, nn.Module) else ()

    def settings(self) -> Mapping[str, Any]:
        return {
            "network": f"{type(self.net).__module__}.{type(self.net).__qualname__}",
            "task": self.task,
            "output": self._output or "logits (assumed)",
            "mean": self.mean,
            "std": self.std,
            "size": self.size,
            "channels": self.channels,
            "bounds": self.bounds,
        }

    def prepare(self, images: Tensor) -> Tensor:
        """Map images in [0, 1] to what the network takes: channels, size, bounds, mean and standard deviation."""
        have = images.shape[1]
        if self.channels is not None and have != self.channels:
            if have == 1:
                images = images.expand(-1, self.channels, -1, -1)
            elif self.channels == 1 and have == 3:
                images = luma(images)
            else:
                raise ShapeError(
                    self.model_name,
                    f"images with {self.channels} or 1 channels",
                    f"{have}",
                    "Pass channels= to wrap(), or convert the images.",
                )
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, size=self.size, mode="bilinear", align_corners=False, antialias=True)
        low, high = self.bounds
        if (low, high) != (0.0, 1.0):
            images = images * (high - low) + low
        for values, operation in ((self.mean, torch.sub), (self.std, torch.div)):
            if values is not None:
                tensor = torch.tensor(values, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
                if tensor.shape[1] not in (1, images.shape[1]):
                    raise ShapeError(
                        self.model_name,
                        f"mean and std with 1 or {images.shape[1]} values",
                        f"{tensor.shape[1]}",
                        "Pass one value a channel to wrap().",
                    )
                images = operation(images, tensor)
        return images

    def outputs(self, batch: Batch) -> ModelOutputs:
        raw = _raw_logits(self.net(self.prepare(batch.images)), self.model_name)
        if raw.ndim == 1:
            raw = raw[:, None]
        if raw.ndim != 2 or len(raw) != len(batch):
            raise ModelError(
                self.model_name,
                f"an output of shape ({len(batch)}, classes)",
                f"shape {tuple(raw.shape)}",
                "The network must return one row an image.",
            )
        return ModelOutputs(logits=self._to_logits(raw), task=self.task)

    def _to_logits(self, raw: Tensor) -> Tensor:
        raw = raw.to(torch.float32)
        if not self._checked:
            self._refuse_probabilities(raw)
        kind: OutputKind = "logits" if self._output is None else self._output
        logits = to_logits(raw, kind, self.task, self.model_name)
        if self._classes is None:
            self._classes = logits.shape[1]
        elif self._classes != logits.shape[1]:
            raise ModelError(
                self.model_name,
                f"{self._classes} classes as declared",
                f"{logits.shape[1]} outputs",
                "Correct num_classes, or the network's last layer.",
            )
        return logits

    def _refuse_probabilities(self, raw: Tensor) -> None:
        """Stop when undeclared outputs look like probabilities: guessing silently would change every score."""
        values = raw.detach()
        values = values[torch.isfinite(values).all(1)]
        if len(values) < 4:
            return
        inside = bool((values >= 0).all() and (values <= 1).all())
        sums = values.sum(1)
        if inside and (values.shape[1] == 1 or self.task == "multilabel" or bool(((sums - 1).abs() < 1e-3).all())):
            raise ModelError(
                self.model_name,
                "logits (assumed, as no output kind was declared)",
                "a first batch whose values all look like probabilities",
                "Declare it: robustlab.wrap(net, output='probs'), or output='logits' if they really are logits.",
            )
        self._checked = True


def why_no_features(model: Model) -> str | None:
    """Return why a model has no features, or None."""
    if not isinstance(model, WrappedModel):
        return f"{type(model).__name__}, which returns no features"
    if not isinstance(model.net, nn.Module) or isinstance(model.net, torch.jit.ScriptModule):
        return f"{type(model.net).__name__}, whose layers cannot be looked at"
    return None


def _raw_logits(output: Any, who: str) -> Tensor:
    """Take the logits out of a tensor, a tuple, a mapping or an object with a ``logits`` attribute."""
    if isinstance(output, Tensor):
        return output
    for key in ("logits", "out"):
        if isinstance(output, Mapping) and isinstance(output.get(key), Tensor):
            value: Tensor = output[key]
            return value
    attribute = getattr(output, "logits", None)
    if isinstance(attribute, Tensor):
        return attribute
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ModelError(
        who,
        "a tensor, a tuple that starts with one, a mapping with 'logits' or an object with .logits",
        type(output).__name__,
        "Wrap the network in a function that returns its logits.",
    )


def wrap(
    net: nn.Module | Callable[[Tensor], Any] | Model,
    *,
    task: Task | None = None,
    output: OutputKind | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    class_names: Sequence[str] | None = None,
    name: str | None = None,
    model_id: str | None = None,
) -> Model:
    """Declare what a network expects and returns.

    What is not declared is read from the network where it states it (timm's ``pretrained_cfg``, the first
    convolution's channels), else left alone; everything used is logged and written into the report.

    Args:
        net: A module, or a callable on float tensors (N, C, H, W); a ``Model`` is returned unchanged.
        task: ``"binary"``, ``"multiclass"`` or ``"multilabel"``; multiclass if not given.
        output: ``"logits"``, ``"log_probs"`` or ``"probs"``. Logits are assumed if not given, and a first batch that
            looks like probabilities is then refused.
        num_classes: Number of outputs; read from the first batch if not given.
        mean: Per-channel mean, subtracted after mapping to ``bounds``.
        std: Per-channel standard deviation.
        size: Height and width in pixels that images are resized to (bilinear, antialiased); None keeps them.
        channels: Channels the network takes; grey images are repeated, RGB is reduced to luma for 1.
        bounds: Values of 0 and 1 before mean and std, e.g. (0, 255).
        class_names: Names of the outputs.
        name: Name in reports.
        model_id: Name of this version of the model, for caches. A module is known by its parameters and code; a
            function's answers are kept in a cache only under a ``model_id``, which must change when its answers do.

    Raises:
        KindError: ``net`` is not callable.
        ConfigError: An argument has no meaning.
    """
    if isinstance(net, Model):
        return net
    if not callable(net) or isinstance(net, type):
        hint = f"Make an instance: {net.__name__}(...)." if isinstance(net, type) else ""
        raise KindError(
            "wrap",
            "a torch module or a callable",
            f"the class {net.__name__}" if isinstance(net, type) else type(net).__name__,
            hint or "Load the network first, then pass it.",
        )
    for label, value, allowed in (("task", task, TASKS), ("output", output, OUTPUTS)):
        if value is not None and value not in allowed:
            raise ConfigError("wrap", f"{label} among {', '.join(allowed)}", repr(value), "Check the spelling.")
    if not bounds[0] < bounds[1]:
        raise RangeError("wrap", "bounds=(low, high) with low < high", f"{bounds}", "Swap the two.")
    if size is not None and (not (sizes := _as_size(size)) or min(sizes) < 1):
        raise ConfigError("wrap", "size as pixels, positive: one integer or two", f"{size!r}", "For example size=224.")
    stated: Mapping[str, Any] = getattr(net, "pretrained_cfg", None) or {}
    assumed = mean is None and std is None and "mean" in stated
    if mean is None and std is None and "mean" in stated:
        mean, std = stated["mean"], stated["std"]
    if size is None and stated.get("fixed_input_size"):
        size = tuple(stated["input_size"][-2:])
    if channels is None and isinstance(net, nn.Module):
        channels = _first_channels(net)
        if channels == 1 and mean is not None and not isinstance(mean, (int, float)) and len(tuple(mean)) == 3:
            mean, std = _average(mean), _average(std)
    std_values = _as_tuple(std)
    if std_values is not None and min(std_values) <= 0:
        raise RangeError("wrap", "positive std", f"{std_values}", "Use the training data's standard deviation.")
    model = WrappedModel(
        net,
        task=task,
        output=output,
        num_classes=num_classes,
        mean=_as_tuple(mean),
        std=std_values,
        size=(size, size) if isinstance(size, int) else size,
        channels=channels,
        bounds=(float(bounds[0]), float(bounds[1])),
        class_names=None if class_names is None else tuple(class_names),
        model_name=name or type(net).__name__,
        model_id=model_id,
    )
    model.assumed_normalisation = assumed
    logger.info("wrap: %s", dict(model.settings()))
    return model


def _as_size(size: object) -> tuple[int, ...]:
    """Return (height, width), or nothing where the numbers are not two integers."""
    pair = (size, size) if isinstance(size, int) else size
    if isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(side, int) for side in pair):
        return tuple(pair)
    return ()


def _as_tuple(value: Sequence[float] | float | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    return (float(value),) if isinstance(value, (int, float)) else tuple(float(v) for v in value)


def _average(values: Sequence[float] | float | None) -> float | None:
    if values is None or isinstance(values, (int, float)):
        return values
    return sum(values) / len(values)


def _first_channels(net: nn.Module) -> int | None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return None


def probe(model: Model, batch: Batch) -> Capabilities:
    """Measure a model on up to eight samples, without changing it or any global state.

    Args:
        model: The model.
        batch: Samples on the model's device.
    """
    first = batch.select(torch.arange(min(8, len(batch)), device=batch.ids.device))
    one = model.predict(first).logits
    two = model.predict(first).logits
    turned = torch.arange(len(first) - 1, -1, -1, device=batch.ids.device)
    half = turned[: max(1, len(first) // 2)]
    alone = model.predict(first.select(half)).logits
    independent = torch.allclose(alone, one[half], rtol=1e-4, atol=1e-4, equal_nan=True)
    return Capabilities(
        batch_independent=independent,
        deterministic=torch.equal(one.nan_to_num(), two.nan_to_num()),
        supports_grad=_has_gradient(model, first),
    )


def _has_gradient(model: Model, batch: Batch) -> bool:
    images = batch.images.detach().clone().requires_grad_(True)
    try:
        with model.evaluating(), torch.enable_grad():
            logits = model.for_attack().outputs(batch.replace(images)).logits
            (gradient,) = torch.autograd.grad(logits.square().sum(), images)
    except RuntimeError as error:
        logger.info("no input gradient: %s", error)
        return False
    return bool(torch.isfinite(gradient).all() and (gradient != 0).any())
