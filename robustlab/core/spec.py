"""Canonical JSON and fingerprints of configurations and arrays; dictionaries that turn back into objects."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError, KindError
from .levels import Levels
from .registry import REGISTRIES

_PLAIN: dict[str, type[Any]] = {"levels": Levels}


def to_dict(value: Any) -> Any:
    """Turn a configuration (frozen dataclass of plain values and other configurations) into JSON types.

    Raises:
        KindError: A value has no JSON form.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if getattr(value, "opaque", False):
        return {"type": "opaque", "name": value.name, "version": value.version, "fields": {}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        for kind, cls in _PLAIN.items():
            if type(value) is cls:
                return {"type": kind, "fields": fields}
        name = getattr(value, "name", None)
        for kind, registry in REGISTRIES.items():
            if isinstance(name, str) and name in registry and registry.get(name) is type(value):
                return {"type": kind, "name": name, "version": getattr(value, "version", 1), "fields": fields}
    raise KindError(
        "to_dict",
        "numbers, strings, lists, mappings and registered frozen dataclasses",
        f"{type(value).__name__}",
        "Register the class, or give it a name= and version= of its own.",
    )


def from_dict(data: Any) -> Any:
    """Rebuild what ``to_dict`` wrote.

    Raises:
        ConfigError: The stored version differs from the installed one.
    """
    if isinstance(data, list):
        return tuple(from_dict(item) for item in data)
    if not isinstance(data, dict):
        return data
    if set(data) == {"float"}:
        return float(data["float"])
    if "type" not in data:
        return {key: from_dict(item) for key, item in data.items()}
    if data["type"] == "opaque":
        raise ConfigError(
            f"from_dict, {data['name']!r}",
            "a configuration that can be rebuilt",
            "a foreign object known by name and version only",
            "Build it in Python again, with the same name= and version=.",
        )
    fields = {key: from_dict(item) for key, item in data["fields"].items()}
    if data["type"] in _PLAIN:
        return _PLAIN[data["type"]](**fields)
    cls: Any = REGISTRIES[data["type"]].get(data["name"])
    if getattr(cls, "version", 1) != data["version"]:
        raise ConfigError(
            f"{data['type']} {data['name']!r}",
            f"version {getattr(cls, 'version', 1)} (installed)",
            f"version {data['version']} (stored)",
            "Install the robustlab version that wrote the file, or run again.",
        )
    return cls(**fields)


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a configuration: sorted keys, no spaces, no NaN."""
    return json.dumps(to_dict(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return a 32-digit hexadecimal hash of a configuration's canonical JSON."""
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=16).hexdigest()


def array_fingerprint(arrays: Iterable[tuple[str, Tensor | np.ndarray[Any, Any]]]) -> str:
    """Return a 32-digit hexadecimal hash of named arrays: names, shapes, dtypes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in arrays:
        tensor = _plain(array) if isinstance(array, Tensor) else np.ascontiguousarray(array)
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
        if isinstance(tensor, Tensor):
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
        else:
            digest.update(tensor.tobytes())
    return digest.hexdigest()


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor of any layout as contiguous numbers on the CPU."""
    tensor = tensor.detach().cpu()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return tensor.contiguous()
