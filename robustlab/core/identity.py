"""The identity of a model for a cache: parameters, buffers, code, plain attributes and settings."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .model import Model, WrappedModel
from .spec import array_fingerprint

_LIBRARIES = frozenset({"torch", "torchvision", "timm", "robustlab", "corruptions", "defenses"})
"""Code that is told by its version."""

_NOTES = frozenset({"_warned", "class_names", "model_name"})
"""Attributes of a model that decide no answer."""

_SCALARS = (bool, int, float, str, type(None))

_MODULE_STATE = frozenset(vars(nn.Module()))
"""What torch keeps in every module: mode, tensors and parts, which are looked at themselves, and hooks."""


def model_identity(model: Model) -> str | None:
    """Return a hash of everything that is known to decide a model's answers, or None where too little is known.

    It covers settings, parameters, buffers, the source of classes outside torch, torchvision, timm and robustlab, and
    attributes such as a dropout rate, with what lies in them. A wrapped function has no parameters to hash: it has an
    identity only if ``wrap(..., model_id=...)`` gave it one. What a hash cannot see (hooks, global variables), a stored
    probe pass has to catch.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(model):
        if part is None:
            return None
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _parts(model: Model) -> Iterator[str | None]:
    yield code_identity(type(model))
    yield repr(sorted(model.settings().items(), key=lambda item: item[0]))
    if not isinstance(model, WrappedModel):  # whose attributes are its settings, and notes on what it has seen
        own = not is_library_code(type(model))
        held = sorted(((key, value) for key, value in vars(model).items() if key not in _NOTES), key=lambda it: it[0])
        # private numbers are mostly notes such as counters; private arrays and objects are mostly what was fitted
        kept = (pair for pair in held if not pair[0].startswith("_") or (own and not isinstance(pair[1], _SCALARS)))
        yield repr([(key, _word(value)) for key, value in kept])
    wrapped: Sequence[Model] = wrapped_parts(model) or [model]
    yield repr([model.model_id, *(part.model_id for part in wrapped)])
    for part in wrapped:
        if not part.modules() and part.model_id is None:
            yield None
    for root in model.modules():
        yield array_fingerprint(_tensors(root))
        for name, module in root.named_modules():
            yield f"{name}|{code_identity(type(module))}|{_script(module)}|{_attributes(module)}"


def wrapped_parts(model: Model) -> list[WrappedModel]:
    """Return the wrapped networks of a model: itself, or those that a defence holds."""
    if isinstance(model, WrappedModel):
        return [model]
    held = [item for value in vars(model).values() for item in (value if isinstance(value, (list, tuple)) else [value])]
    return [part for item in held if isinstance(item, Model) for part in wrapped_parts(item)]


def is_library_code(code: type[Any] | Callable[..., Any]) -> bool:
    """Tell whether a class or function is part of torch, torchvision, timm or robustlab."""
    return code.__module__.partition(".")[0] in _LIBRARIES


def code_identity(code: type[Any] | Callable[..., Any]) -> str:
    """Return the qualified name of a class or function with its library's version or a hash of its source."""
    name = f"{code.__module__}.{code.__qualname__}"
    if is_library_code(code):
        return f"{name} {getattr(sys.modules.get(name.partition('.')[0]), '__version__', '')}"
    if isinstance(code, type):
        bases = [code_identity(base) for base in code.__bases__ if base is not object]
        return "|".join([name, _class_text(code), *bases])
    return f"{name}|{_text(code)}"


@functools.lru_cache(maxsize=1024)
def _class_text(cls: type[Any]) -> str:
    """Return a hash of a class's source, of the moment when it was first asked for: a file may be edited later."""
    return _text(cls)


def _text(code: type[Any] | Callable[..., Any]) -> str:
    try:
        text = inspect.getsource(code)
    except (OSError, TypeError):  # typed into a prompt, or built by another program
        text = _byte_code(code)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _byte_code(code: object) -> str:
    """Return compiled code as a text without addresses and file names, the same in every process."""
    if isinstance(code, type):
        own = ((key, value) for key, value in vars(code).items() if callable(value) or not key.startswith("__"))
        members = sorted(own, key=lambda item: item[0])
        return repr([(key, _byte_code(value)) for key, value in members])
    if isinstance(code, (staticmethod, classmethod)):
        return _byte_code(code.__func__)
    if isinstance(code, property):
        return _byte_code(code.fget)
    if isinstance(code, types.FunctionType):
        return _byte_code(code.__code__) + repr(_word(code.__defaults__))
    if isinstance(code, types.CodeType):
        return repr((code.co_code, code.co_names, [_byte_code(value) for value in code.co_consts]))
    return _word(code)


def object_identity(value: object) -> str:
    """Return a hash that differs where plain values, arrays, networks and functions inside an object differ."""
    return hashlib.blake2b(_word(value).encode(), digest_size=16).hexdigest()


def _tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over parameters and all buffers, also those that are not saved."""
    yield from root.named_parameters(remove_duplicate=False)
    yield from root.named_buffers(remove_duplicate=False)


def _script(module: nn.Module) -> str:
    """Return the text of a compiled or exported program, which no class has."""
    if isinstance(module, torch.jit.ScriptModule):
        try:
            text, constants = module.code_with_constants
        except (RuntimeError, AttributeError):  # a part without a method of its own
            return ""
        return text + array_fingerprint(sorted(constants.const_mapping.items()))
    return str(getattr(module, "code", "")) if isinstance(module, torch.fx.GraphModule) else ""


def _attributes(module: nn.Module) -> str:
    return repr([(key, _word(value)) for key, value in sorted(vars(module).items()) if key not in _MODULE_STATE])


def _word(value: object, above: frozenset[int] = frozenset()) -> str:
    """Return a text that differs where plain values, arrays, functions, or objects and containers of them differ.

    Of objects without attributes of their own, and of those that were met above, only the class is told.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, np.generic)):
        return repr(value)
    if isinstance(value, Tensor):
        return array_fingerprint([("", value)])
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return array_fingerprint([("", value)])
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if id(value) in above:
        return name
    above = above | {id(value)}
    if isinstance(value, Mapping):
        return repr(sorted((_word(key, above), _word(item, above)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return repr([_word(item, above) for item in value])
    if isinstance(value, (set, frozenset)):
        return repr(sorted(_word(item, above) for item in value))
    if isinstance(value, functools.partial):
        return repr([_word(part, above) for part in (value.func, value.args, value.keywords)])
    if isinstance(value, types.FunctionType):
        cells = [_word(_content(cell), above) for cell in value.__closure__ or ()]
        given = [_word(part, above) for part in (value.__defaults__, value.__kwdefaults__)]
        # two lambdas on one line share their source
        return code_identity(value) + _byte_code(value.__code__) + repr([cells, given])
    if isinstance(value, types.MethodType):
        return repr([_word(value.__func__, above), _word(value.__self__, above)])
    if isinstance(value, (types.BuiltinFunctionType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, nn.Module):
        return name + array_fingerprint(_tensors(value))
    if isinstance(value, Model) or is_library_code(type(value)):
        return name
    return name + repr([(key, _word(item, above)) for key, item in sorted(getattr(value, "__dict__", {}).items())])


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None
