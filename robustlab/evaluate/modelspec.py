"""A model by name: what the command line takes, and what travels to other processes instead of a network."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from robustlab.core.errors import ConfigError, DataFileError, KindError, ModelError, UnknownNameError
from robustlab.core.model import Model, wrap
from robustlab.core.types import OutputKind, Task


@dataclass(frozen=True)
class ModelSpec:
    """A model by name and weights: takes the place of a network in ``evaluate_under_shift``.

    Every process builds it for itself, so nothing of the network has to be picklable.

    Args:
        network: ``timm:NAME``, ``path/to/file.py:function``, a TorchScript file (``.pt``, ``.ts``) or an exported
            program (``.pt2``). Workers on other machines must find files under the same paths.
        weights: safetensors file, or a state dict that ``torch.load(weights_only=True)`` accepts.
        arguments: Keyword arguments for timm or for the function.
        task: As in ``wrap``, like all arguments below.
        output: See ``wrap``.
        num_classes: See ``wrap``.
        mean: See ``wrap``.
        std: See ``wrap``.
        size: See ``wrap``.
        channels: See ``wrap``.
        bounds: See ``wrap``.
        class_names: See ``wrap``.
        name: See ``wrap``.
    """

    network: str
    weights: str | Path | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    task: Task | None = None
    output: OutputKind | None = None
    num_classes: int | None = None
    mean: Sequence[float] | float | None = None
    std: Sequence[float] | float | None = None
    size: int | tuple[int, int] | None = None
    channels: int | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    class_names: Sequence[str] | None = None
    name: str | None = None

    def build(self) -> Model:
        """Load network and weights and wrap them.

        Raises:
            RobustlabError: The model or its weights cannot be loaded.
        """
        weights = None if self.weights is None else Path(self.weights)
        return wrap(
            load_model(self.network, weights=weights, arguments=self.arguments),
            task=self.task,
            output=self.output,
            num_classes=self.num_classes,
            mean=self.mean,
            std=self.std,
            size=self.size,
            channels=self.channels,
            bounds=self.bounds,
            class_names=self.class_names,
            name=self.name,
        )


def load_model(name: str, *, weights: Path | None = None, arguments: Mapping[str, Any] | None = None) -> Any:
    """Return the network that ``name`` stands for.

    Args:
        name: ``timm:NAME``, ``path/to/file.py:function``, a TorchScript file (``.pt``, ``.ts``) or an exported program
            (``.pt2``).
        weights: safetensors file, or a state dict that ``torch.load(weights_only=True)`` accepts.
        arguments: Keyword arguments for timm or for the function.

    Raises:
        RobustlabError: The model or its weights cannot be loaded.
    """
    options = dict(arguments or {})
    if name.startswith("timm:"):
        net = _from_timm(name.removeprefix("timm:"), options)
    elif ".py:" in name:
        net = _from_python(name, options)
    elif Path(name).suffix in (".pt2", ".pt", ".ts"):
        if options or weights is not None:
            raise ConfigError(
                f"model {name!r}", "no --arg and no --weights for a compiled model", "some", "Its weights are inside."
            )
        net = _from_compiled(Path(name))
    else:
        raise ConfigError(
            "model",
            "timm:NAME, path/to/file.py:function, or a .pt, .ts or .pt2 file",
            repr(name),
            "For a state dict, name the code that builds the network and pass the file with --weights.",
        )
    if weights is not None:
        load_weights(net, weights)
    if isinstance(net, nn.Module):
        for module in net.modules():  # not .eval(): exported programs refuse it
            module.training = False
    return net


def _from_timm(name: str, options: Mapping[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=4)) or "see timm.list_models()"
        raise UnknownNameError("timm", "a model that timm has", repr(name), f"Near it: {close}.")
    net: nn.Module = timm.create_model(name, pretrained=False, **options)
    return net


def _from_python(name: str, options: Mapping[str, Any]) -> Any:
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise DataFileError(f"model {name!r}", "a Python file", f"no file {file!r}", "Check the path.")
    spec = importlib.util.spec_from_file_location(f"robustlab_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise DataFileError(f"model {name!r}", "an importable Python file", repr(file), "Check the file's name.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    build: Callable[..., Any] | None = getattr(module, function, None)
    if not callable(build):
        names = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise UnknownNameError(
            f"model {name!r}", f"a function in {file} among: {names}", repr(function), "Check the name."
        )
    return build(**options)


def _from_compiled(path: Path) -> Any:
    if not path.is_file():
        raise DataFileError(f"model '{path}'", "a file", "none there", "Check the path.")
    try:
        if path.suffix == ".pt2":
            return torch.export.load(path).module(check_guards=False)
        load_script: Any = torch.jit.load
        return load_script(str(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        raise DataFileError(
            f"model '{path}'",
            "a TorchScript archive (.pt, .ts) or an exported program (.pt2)",
            f"{type(error).__name__}: {str(error).splitlines()[0]}",
            "A pickled network or state dict is not read: build the network in file.py:function and pass --weights.",
        ) from error


def load_weights(net: Any, path: Path) -> None:
    """Load a state dict into a network without running pickled code.

    Raises:
        DataFileError: The file is missing, or holds more than tensors.
        ModelError: Names or shapes do not fit.
    """
    if not isinstance(net, nn.Module):
        raise KindError(
            "--weights", "a model that is a torch module", type(net).__name__, "Load them in your function."
        )
    if not path.is_file():
        raise DataFileError(f"weights '{path}'", "a file", "none there", "Check the path.")
    try:
        state: Any
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataFileError(
            f"weights '{path}'",
            "safetensors, or a state dict that loads with weights_only=True",
            f"{type(error).__name__}: {str(error).splitlines()[0]}",
            "Save it with safetensors.torch.save_file(net.state_dict(), 'weights.safetensors').",
        ) from error
    if isinstance(state, dict) and "state_dict" in state:
        state = state["state_dict"]
    try:
        net.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ModelError(
            f"weights '{path}'",
            f"the parameters of {type(net).__name__}",
            " ".join(str(error).split())[:300],
            "Check the architecture and its arguments (--arg num_classes=2).",
        ) from error
