"""BPDA: attacks through parts of a network that have no useful gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustlab.core.errors import ConfigError, KindError, ShapeError
from robustlab.core.model import Model, WrappedModel


class BPDA(nn.Module):
    """A function whose values are its own, and whose gradient is that of a substitute.

    Forward is h(x), computed without a graph; backward goes through the substitute, as that of
    h~(x) + stop_gradient(h(x) - h~(x)), but with the very bits of h(x).

    Args:
        function: h, a module or a function from a tensor to a tensor; it need not be differentiable.
        backward: h~, which is, and returns the same shape; None for the identity.

    Raises:
        KindError: Something is not callable.

    References:
        A. Athalye, N. Carlini, D. Wagner, "Obfuscated gradients give a false sense of security", 2018, 1802.00420.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        for given in (function, backward):
            if given is not None and (isinstance(given, type) or not callable(given)):
                raise KindError("BPDA", "modules or functions", repr(given), "Pass e.g. BPDA(torch.round).")
        self.function = function
        self.substitute = backward

    def forward(self, images: Tensor) -> Tensor:
        """Return h of the images.

        Raises:
            ShapeError: The substitute returns another shape.
        """
        with torch.no_grad():
            values = self.function(images)
        if not torch.is_grad_enabled():
            return values
        stand_in = images if self.substitute is None else self.substitute(images)
        if stand_in.shape != values.shape:
            raise ShapeError(
                "BPDA",
                f"a substitute that returns {tuple(values.shape)}, as the function does",
                f"{tuple(stand_in.shape)}",
                "Pass one as backward=; the identity serves only functions that keep the shape.",
            )
        result: Tensor = _Detour.apply(stand_in, values)
        return result


class _Detour(torch.autograd.Function):
    """The second argument forward, the first one backward."""

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, values: Tensor) -> Tensor:
        del ctx, stand_in
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        del ctx
        return slopes[0], None


class Substituted(WrappedModel):
    """A wrapped network that attacks differentiate through substitutes; made by ``with_substitutes``."""

    def __init__(self, model: WrappedModel, substitutes: Mapping[str, nn.Module | None]) -> None:
        vars(self).update(vars(model))  # the same network, as it was wrapped
        self.substitutes = {**getattr(model, "substitutes", {}), **substitutes}

    def modules(self) -> Sequence[nn.Module]:
        return (*super().modules(), *(part for part in self.substitutes.values() if part is not None))

    def settings(self) -> Mapping[str, Any]:
        kinds = {
            path: "identity" if part is None else type(part).__qualname__ for path, part in self.substitutes.items()
        }
        return {**super().settings(), "substitutes": kinds}

    def for_attack(self) -> Model:
        view = copy.copy(self)
        view.substitutes = {}
        view._warned = True  # about training mode, which is for the model itself to tell
        for path, part in self.substitutes.items():
            assert isinstance(view.net, nn.Module)  # noqa: S101 - with_substitutes has checked it
            view.net = _replaced(view.net, path.split("."), part)
        return view


def with_substitutes(model: Model, substitutes: Mapping[str, nn.Module | None]) -> Model:
    """Return a model with the same predictions, bit for bit, that attacks differentiate through substitutes.

    Only gradients change, and those only for attacks: what an attack finds is judged by the true network.

    Args:
        model: A wrapped network, ``robustlab.wrap(net)``. Wrap the networks inside a defence before it is made.
        substitutes: Name of a part, as ``net.named_modules()`` gives it, to a differentiable module with the same
            output shape that takes its place backward; None for the identity. Substitutes move and change mode with
            the network.

    Raises:
        KindError: The model is not a wrapped ``torch.nn.Module`` that runs as Python, or a substitute is no module.
        ConfigError: The network has no part of that name, or one part lies in another.

    References:
        A. Athalye, N. Carlini, D. Wagner, 2018, 1802.00420.
    """
    who = "with_substitutes"
    net = model.net if isinstance(model, WrappedModel) else None
    if not isinstance(model, WrappedModel) or not isinstance(net, nn.Module):
        hint = "Pass robustlab.wrap(net) with a torch.nn.Module; wrap the networks of a defence before it is made."
        raise KindError(who, "a wrapped network", type(model).__name__, hint)
    if any(isinstance(part, torch.jit.ScriptModule) or hasattr(part, "_orig_mod") for part in net.modules()):
        hint = "Pass the network as it was before torch.compile or torch.jit: a compiled one would go on as it is."
        raise KindError(who, "a network that runs as Python", "a compiled one", hint)
    made = Substituted(model, substitutes)
    have = [name for name, _ in net.named_modules(remove_duplicate=False) if name]
    for path, part in made.substitutes.items():
        if path not in have:
            raise ConfigError(who, f"names of parts among {', '.join(have)}", repr(path), "Check the spelling.")
        if any(other.startswith(f"{path}.") for other in made.substitutes):
            raise ConfigError(who, "parts that lie side by side", repr(path), "Leave out those inside it.")
        if part is not None and not isinstance(part, nn.Module):
            raise KindError(who, "substitutes as torch modules, or None", repr(part), "Make it an nn.Module.")
        if part is not None:
            part.train(net.training)
    return made


def _replaced(module: nn.Module, path: Sequence[str], substitute: nn.Module | None) -> nn.Module:
    """Return a module that shares everything with ``module`` but the part at ``path``, which is put in BPDA."""
    if path:
        twin = copy.copy(module)
        parts = vars(module)["_modules"]
        vars(twin)["_modules"] = {**parts, path[0]: _replaced(parts[path[0]], path[1:], substitute)}
        return twin
    return BPDA(module, substitute)
