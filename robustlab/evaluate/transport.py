"""What travels to other processes: a small message, and large arrays in raw files that workers map into memory."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustlab.core.errors import ConfigError

LARGE = 1 << 16
"""Arrays from this number of bytes on are written to files; smaller ones stay in the message."""

_BLOCK = 1 << 24


def pack(value: object, folder: Path, who: str) -> bytes:
    """Return a message from which ``unpack`` rebuilds a value in another process.

    The message goes from process to process only and is never stored; files hold raw numbers, named by their content.

    Args:
        value: Anything that can be pickled.
        folder: Where large arrays are written; workers must see it under the same path.
        who: What is packed, for the message.

    Raises:
        ConfigError: A part of it cannot be pickled, e.g. a lambda.
    """
    stream = io.BytesIO()
    try:
        _Packer(stream, folder).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"executor, {who}",
            "something that can be sent to another process: modules, functions and datasets that are defined at the "
            "top level of a file",
            f"{type(error).__name__}: {error}",
            "Leave executor= out to run in this process, move lambdas and local classes to the top level of a module, "
            "or name the model by robustlab.ModelSpec('file.py:function', weights=...).",
        ) from error
    return stream.getvalue()


def unpack(message: bytes) -> Any:
    """Rebuild what ``pack`` was given; arrays are mapped from their files, copied only where they are written to."""
    return _Unpacker(io.BytesIO(message)).load()


class _Packer(pickle.Pickler):
    """Replaces large tensors and arrays by the names of files."""

    def __init__(self, stream: io.BytesIO, folder: Path) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.folder = folder
        self._known: dict[int, tuple[object, tuple[Any, ...]]] = {}

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if type(obj) in (Tensor, nn.Parameter):
            tensor = obj.detach()
            plain = tensor.layout == torch.strided and not tensor.is_quantized
            small = tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() < LARGE
            if not plain or small or tensor.numel() == 0:
                return None
            kind = "parameter" if type(obj) is nn.Parameter else "tensor"
            facts = (kind, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), bool(obj.requires_grad))
            return self._stored(obj, facts, lambda: tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        if isinstance(obj, np.ndarray) and type(obj) in (np.ndarray, np.memmap) and obj.nbytes >= LARGE:
            if obj.dtype.hasobject:
                return None
            facts = ("array", obj.dtype.str, obj.shape, False)
            return self._stored(obj, facts, lambda: np.ascontiguousarray(obj).reshape(-1).view(np.uint8))
        return None

    def _stored(self, obj: object, facts: tuple[Any, ...], raw: Any) -> tuple[Any, ...]:
        if id(obj) not in self._known:  # the object is kept, or its address might be used again
            self._known[id(obj)] = (obj, (*facts, str(_spill(raw(), self.folder)), len(self._known)))
        return self._known[id(obj)][1]


class _Unpacker(pickle.Unpickler):
    """Maps files back to tensors and arrays; what was one object stays one."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._made: dict[int, Any] = {}

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, shape, gradient, path, number = pid
        if number not in self._made:
            raw = np.memmap(path, dtype=np.uint8, mode="c")
            if kind == "array":
                self._made[number] = raw.view(np.dtype(dtype)).reshape(shape)
            else:
                tensor = torch.from_numpy(raw).view(getattr(torch, dtype)).reshape(shape)
                made = nn.Parameter(tensor, gradient) if kind == "parameter" else tensor.requires_grad_(gradient)
                self._made[number] = made
        return self._made[number]


def _spill(raw: np.ndarray[Any, Any], folder: Path) -> Path:
    """Write bytes to a file named by their hash, once."""
    digest = hashlib.blake2b(raw, digest_size=16)  # type: ignore[arg-type]  # an array is a buffer
    path = folder / f"{digest.hexdigest()}.raw"
    if not (path.is_file() and path.stat().st_size == raw.nbytes):
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        with part.open("wb") as file:
            for start in range(0, len(raw), _BLOCK):
                file.write(raw[start : start + _BLOCK].data)
        part.replace(path)
    return path
