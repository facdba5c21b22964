"""load_data: anything that holds images becomes a Source."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from robustlab.core.errors import ConfigError, DataFileError, KindError, UnknownNameError
from robustlab.core.source import Source
from robustlab.core.types import Task

from .assemble import Request, make_info
from .folder import load_folder
from .npz import load_medmnist, load_npz
from .phantoms import load_phantom
from .pixels import interpret, to_channels_first
from .sources import ArraySource
from .torch_data import load_dataset, load_loader, load_stream

_SCHEME = re.compile(r"^([a-z][a-z0-9]+):(.*)$")


def load_data(
    data: Any,
    *,
    labels: Any = None,
    split: str = "test",
    ids: Any = None,
    groups: Mapping[str, Any] | None = None,
    task: Task | None = None,
    class_names: Sequence[str] | None = None,
    modality: str | None = None,
    value_range: tuple[float, float] | None = None,
    name: str | None = None,
) -> Source:
    """Make a source of images, labels, ids and group columns.

    Args:
        data: One of: a ``Source`` (returned as it is); the path of an NPZ file in MedMNIST layout; the path of an image
            folder with one subfolder a class; ``"medmnist:NAME"`` (on disk already); ``"phantom:histology"`` or
            ``"phantom:radiograph"``; a torch ``Dataset`` or ``DataLoader``; a NumPy array (N, H, W[, C]), a tensor
            (N, [C,] H, W), or a pair (images, labels) of those.
        labels: Integers (N,), or (N, L) in {0, 1, -1} for several labels an image; win over labels in ``data``.
        split: Which part of files that have splits: ``"train"``, ``"val"`` or ``"test"``.
        ids: N different integers or strings; default are positions, or the hashes of relative paths for folders.
        groups: Column name to N values; None, NaN, "" and -1 are missing.
        task: ``"binary"``, ``"multiclass"`` or ``"multilabel"``; told by the labels if not given.
        class_names: Names of the classes or labels, in the order of the labels; for folders, their order.
        modality: Tag such as ``"xray"`` or ``"histology"``.
        value_range: Stored numbers that are black and white; needed unless the images are uint8, uint16 or floats in
            [0, 1].
        name: Name in reports.

    Returns:
        A source whose pixels are float32 in [0, 1]; what was left out or changed is in ``source.info.notes``.

    Raises:
        DataFileError: A file or split is missing or unreadable.
        ShapeError: Images, labels, ids or columns have the wrong shape, or images differ in size.
        RangeError: Pixels are NaN, infinite or out of range.
        LabelError: Labels are not class indices.
        KindError: An object of another kind.
        UnknownNameError: No such scheme, MedMNIST set or phantom.
        DuplicateNameError: Two samples have one id.
        MissingExtraError: The medmnist package is not installed.
    """
    if isinstance(data, tuple) and len(data) == 2:
        if labels is not None:
            raise ConfigError("load_data", "labels once", "a pair (images, labels) and labels=", "Leave one out.")
        data, labels = data
    request = Request(
        who=f"load_data({str(data)!r})" if isinstance(data, (str, Path)) else f"load_data({type(data).__name__})",
        split=split,
        labels=labels,
        ids=ids,
        groups=groups,
        task=task,
        class_names=class_names,
        modality=modality,
        value_range=value_range,
        name=name,
    )
    if isinstance(data, Source):
        return _unchanged(data, request)
    if isinstance(data, (str, Path)):
        return _load_path(data, request)
    if isinstance(data, (np.ndarray, Tensor)):
        return _load_array(data, request)
    if isinstance(data, DataLoader):
        return load_loader(data, request)
    if isinstance(data, IterableDataset):
        return load_stream(data, request, notes=["The stream was read once into memory; ids are positions in it."])
    if (
        hasattr(data, "__getitem__")
        and hasattr(data, "__len__")
        and not isinstance(data, (list, tuple, Mapping, bytes))
    ):
        return load_dataset(data, request)
    raise KindError(
        "load_data",
        "a path, 'medmnist:NAME', a torch Dataset or DataLoader, arrays, or a Source",
        type(data).__name__,
        "Stack lists of images with numpy.stack, or wrap them in a torch Dataset.",
    )


def _unchanged(source: Source, request: Request) -> Source:
    given = [
        key
        for key in ("labels", "ids", "groups", "task", "class_names", "modality", "value_range", "name")
        if getattr(request, key) is not None
    ]
    if given:
        raise ConfigError(
            request.who, "a Source alone", f"also {', '.join(given)}", "Pass them when the source is first loaded."
        )
    return source


def _load_path(data: str | Path, request: Request) -> Source:
    match = _SCHEME.match(data) if isinstance(data, str) else None
    if match is not None and not Path(data).exists():
        scheme, rest = match.groups()
        if scheme == "medmnist":
            return load_medmnist(rest, request)
        if scheme == "phantom":
            return load_phantom(rest, request)
        raise UnknownNameError(
            request.who, "one of the schemes medmnist:, phantom:, or a path", repr(f"{scheme}:"), "Check the spelling."
        )
    path = Path(data).expanduser()
    if path.is_dir():
        return load_folder(path, request)
    if not path.exists():
        raise DataFileError(request.who, "a file or folder that exists", "nothing there", "Check the path.")
    if path.suffix.lower() != ".npz":
        raise DataFileError(
            request.who,
            "an .npz file in MedMNIST layout, or a folder of images",
            f"a file {path.suffix or 'without suffix'}",
            "Load it yourself and pass the arrays.",
        )
    return load_npz(path, request)


def _load_array(images: np.ndarray[Any, Any] | Tensor, request: Request) -> Source:
    stored = to_channels_first(images, request.who)
    spec, scale = interpret(stored, value_range=request.value_range, modality=request.modality, who=request.who)
    info = make_info(request, spec, len(stored), name="array")
    return ArraySource(info, stored, scale)
