"""Features of a network: what enters its last linear layer, or what a module returns, beside the logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .detector import Head
from .errors import ConfigError, ModelError, UnknownNameError
from .model import Model, WrappedModel, why_no_features
from .types import Batch, ModelOutputs, Task

PENULTIMATE = "penultimate"
"""The tap of what enters the last linear layer."""


class TappedModel(Model):
    """A wrapped network that also returns features.

    Features of four axes (N, D, H, W) are averaged over the last two, those of three (N, tokens, D) over the tokens.

    Args:
        model: The network.
        taps: ``"penultimate"``, or names of modules as in ``net.named_modules()``, whose output is taken.

    Raises:
        ConfigError: The model is no wrapped ``torch.nn.Module``.
        UnknownNameError: The network has no such module.
    """

    def __init__(self, model: Model, taps: Sequence[str] = (PENULTIMATE,)) -> None:
        reason = why_no_features(model)
        if reason is not None or not isinstance(model, WrappedModel) or not isinstance(model.net, nn.Module):
            raise ConfigError(
                f"features of {model.model_name}", "a wrapped torch.nn.Module", reason or "none", "Pass wrap(net)."
            )
        self.base = model
        self.taps = tuple(dict.fromkeys(taps))
        self.net = model.net
        have = dict(self.net.named_modules())
        for tap in self.taps:
            if tap != PENULTIMATE and tap not in have:
                names = ", ".join(name for name in have if name)
                raise UnknownNameError(f"features of {model.model_name}", f"a tap among {PENULTIMATE}, {names}",
                                       repr(tap), "Check the spelling.")  # fmt: skip
        self.class_names = model.class_names
        self.model_name = model.model_name
        self.model_id = model.model_id
        self.has_offset = model.has_offset

    @property
    def task(self) -> Task:  # type: ignore[override]
        """Task of the network."""
        return self.base.task

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Classes of the network."""
        return self.base.num_classes

    def modules(self) -> Sequence[nn.Module]:
        return self.base.modules()

    def settings(self) -> Mapping[str, Any]:
        return self.base.settings()

    def outputs(self, batch: Batch) -> ModelOutputs:
        with self._listening() as heard:
            outputs = self.base.outputs(batch)
        features = {tap: _pooled(value) for tap, value in heard.items() if tap in self.taps}
        lacking = [tap for tap in self.taps if tap not in features]
        if lacking:
            raise ModelError(
                f"features of {self.model_name}",
                f"a value at {', '.join(lacking)}",
                "a forward pass that does not come there (penultimate needs a linear layer that gives the logits)",
                "Name a module as tap=.",
            )
        odd = [f"{tap} {tuple(value.shape)}" for tap, value in features.items() if len(value) != len(batch)]
        if odd:
            raise ModelError(
                f"features of {self.model_name}", f"{len(batch)} rows", ", ".join(odd), "Name another tap."
            )
        return ModelOutputs(
            logits=outputs.logits,
            features=features,
            members=outputs.members,
            scores=outputs.scores,
            task=outputs.task,
        )

    def head(self, batch: Batch) -> Head | None:
        """Return the last linear layer, where the logits of a batch are what it gives for the penultimate features.

        The single output of a binary network stands for the logits (0, z).
        """
        with self.evaluating(), torch.no_grad(), self._listening() as heard:
            outputs = self.base.outputs(batch)
        last = self._last
        if last is None or PENULTIMATE not in heard:
            return None
        weight: Tensor = last.weight.detach()
        bias: Tensor = weight.new_zeros(len(weight)) if last.bias is None else last.bias.detach()
        if len(weight) == 1 and outputs.logits.shape[1] == 2:
            weight, bias = (torch.cat((torch.zeros_like(part), part)) for part in (weight, bias))
        if len(weight) != outputs.logits.shape[1]:
            return None
        made = heard[PENULTIMATE].to(weight.dtype) @ weight.T + bias
        size = outputs.logits.abs().amax().clamp_min(1)
        same = bool(((made.to(outputs.logits) - outputs.logits).abs() <= 1e-3 * size).all())
        return Head(weight, bias) if same else None

    @contextmanager
    def _listening(self) -> Iterator[dict[str, Tensor]]:
        """Collect what passes the taps in a forward pass; of modules that run more than once the last time counts."""
        heard: dict[str, Tensor] = {}
        handles = []
        self._last: nn.Linear | None = None

        def keep(tap: str, value: Any) -> None:
            if isinstance(value, (tuple, list)) and value:
                value = value[0]
            if isinstance(value, Tensor):
                heard[tap] = value

        def linear(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, nn.Linear) and isinstance(output, Tensor) and output.ndim == 2:
                self._last = module
                keep(PENULTIMATE, inputs[0])

        def output_of(tap: str) -> Any:
            return lambda module, inputs, output: keep(tap, output)

        for name, module in self.net.named_modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_hook(linear))
            if name in self.taps:
                handles.append(module.register_forward_hook(output_of(name)))
        try:
            yield heard
        finally:
            for handle in handles:
                handle.remove()


def _pooled(value: Tensor) -> Tensor:
    """Return features (N, D)."""
    if value.ndim == 4:
        return value.mean((2, 3))
    if value.ndim == 3:
        return value.mean(1)
    return value.flatten(1)
