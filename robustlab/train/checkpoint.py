"""A training run in one safetensors file, so that it is there as a whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from robustlab.core.errors import ConfigError, DataFileError

FILE = "checkpoint.safetensors"


def weights_of(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers, named ``"<module index>.<name>"``."""
    return {
        f"{i}.{name}": value.detach().clone()
        for i, module in enumerate(modules)
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor)
    }


def load_weights(modules: Sequence[nn.Module], weights: Mapping[str, Tensor], who: str) -> None:
    """Copy weights named by ``weights_of`` into modules.

    Raises:
        ConfigError: Names or shapes differ.
    """
    names = {f"{i}.{name}" for i, module in enumerate(modules) for name in module.state_dict()}
    if set(weights) != names:
        odd = sorted(set(weights) ^ names)[:3]
        raise ConfigError(
            who, "the network that was saved", f"other parameters: {', '.join(odd)}", "Build the same network again."
        )
    for i, module in enumerate(modules):
        prefix = f"{i}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise ConfigError(who, "the network that was saved", str(error), "Build the same network again.") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's per-parameter tensors, named ``"<parameter index>.<name>"``."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value
        for index, values in state.items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def write_checkpoint(folder: Path, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write named groups of tensors and a JSON state; a reader sees the old file or the new one, never a part."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flat = {
            f"{part}/{name}": value.detach().cpu().contiguous().clone()
            for part, group in parts.items()
            for name, value in group.items()
        }
        partial = folder / (FILE + ".partial")
        save_file(flat, partial, metadata={"state": json.dumps(state)})
        partial.replace(folder / FILE)
    except OSError as error:
        raise DataFileError(f"checkpoint {folder}", "a folder that can be written", str(error), "Free it.") from error


def read_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Return the groups of tensors and the state, or None where there is no checkpoint yet.

    Raises:
        DataFileError: The file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = json.loads(file.metadata()["state"])
            for key in file.keys():  # noqa: SIM118 - not a mapping
                part, name = key.split("/", 1)
                parts.setdefault(part, {})[name] = file.get_tensor(key)
    except Exception as error:  # safetensors raises a class of its own, outside any builtin kind
        raise DataFileError(
            f"checkpoint {path}", "a file written by robustlab.train.fit", str(error), "Delete it to start again."
        ) from error
    return parts, state
