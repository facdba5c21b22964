"""NPZ files in MedMNIST layout, and MedMNIST sets by name."""

from __future__ import annotations

import difflib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robustlab.core.errors import DataFileError, MissingExtraError, MissingSplitError, UnknownNameError
from robustlab.core.source import Source
from robustlab.core.types import ImageSpec

from .assemble import Request, make_info
from .columns import Array
from .pixels import Scale, interpret, to_channels_first
from .sources import ArraySource

META_KEY = "robustlab"
"""Key of the JSON text in which our own files keep what the MedMNIST layout has no place for."""


def load_npz(
    path: Path, request: Request, *, class_names: tuple[str, ...] | None = None, name: str | None = None
) -> Source:
    """Load one split of an NPZ file in MedMNIST layout.

    ``{split}_images`` is (N, H, W) or (N, H, W, C); ``{split}_labels`` is (N,), (N, 1), or (N, L) for several labels an
    image; ``{split}_ids`` and other arrays ``{split}_{column}`` of shape (N,) are ids and group columns. Arrays of
    other shapes are named in the notes.

    Raises:
        DataFileError: The file is missing or damaged, holds pickled objects, or lacks the split.
    """
    arrays, pool = _read_arrays(path, request)
    meta = json.loads(str(arrays.pop(META_KEY))) if META_KEY in arrays else None
    stored = arrays.pop("images")
    images = to_channels_first(stored, request.who)
    labels, ids = arrays.pop("labels", None), arrays.pop("ids", None)
    if labels is not None and labels.dtype == np.uint64:
        labels = labels.astype(np.int64)
    columns = {key: array for key, array in arrays.items() if array.shape == images.shape[:1]}
    notes = [
        f"Array {request.split}_{key} of shape {array.shape} was ignored."
        for key, array in arrays.items()
        if key not in columns
    ]
    if meta is None:
        spec, scale = interpret(images, value_range=request.value_range, modality=request.modality, who=request.who)
    else:
        spec, scale = spec_from_dict(meta["spec"])
        class_names = tuple(meta["class_names"]) if meta["class_names"] is not None else None
        name = meta["name"]
    info = make_info(
        request,
        spec,
        len(images),
        name=name or path.stem,
        labels=labels,
        ids=ids,
        groups=columns,
        pool=pool,
        task=None if meta is None else meta["task"],
        class_names=class_names,
        notes=notes,
    )
    return ArraySource(info, images, scale)


def _read_arrays(path: Path, request: Request) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the arrays of the split, without its prefix, and the numeric columns of all splits for quantiles."""
    prefix = f"{request.split}_"
    try:
        with np.load(path, allow_pickle=False) as archive:
            files = list(archive.files)
            if f"{prefix}images" not in files:
                splits = sorted(key.removesuffix("_images") for key in files if key.endswith("_images"))
                raise MissingSplitError(
                    request.who,
                    f"an array {prefix}images",
                    f"splits {', '.join(splits)}" if splits else f"arrays {', '.join(files) or 'none'}",
                    f"Pass split={splits[0]!r}." if splits else "Save it in MedMNIST layout: test_images, test_labels.",
                )
            arrays = {key.removeprefix(prefix): archive[key] for key in files if key.startswith(prefix)}
            if META_KEY in files:
                arrays[META_KEY] = archive[META_KEY]
            others = {key.removesuffix("_images") for key in files if key.endswith("_images")}
            pool = {
                column: np.concatenate([archive[f"{s}_{column}"] for s in sorted(others) if f"{s}_{column}" in files])
                for column, array in arrays.items()
                if array.ndim == 1 and array.dtype.kind in "iuf" and column not in ("labels", "ids")
            }
    except DataFileError:
        raise
    except FileNotFoundError as error:
        raise DataFileError(request.who, "a file or folder that exists", "nothing there", "Check the path.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise DataFileError(
            request.who,
            "a readable NPZ file without pickled objects",
            f"{type(error).__name__}: {error}",
            "Write it again with numpy.savez and plain arrays.",
        ) from error
    return arrays, pool


def spec_to_dict(spec: ImageSpec) -> dict[str, Any]:
    """Return the JSON form of a specification."""
    return {
        "channels": spec.channels,
        "size": list(spec.size),
        "range": list(spec.range),
        "unit": spec.unit,
        "bits": spec.bits,
        "modality": spec.modality,
    }


def spec_from_dict(data: Mapping[str, Any]) -> tuple[ImageSpec, Scale]:
    """Return the specification of a file that we wrote, and how its numbers are stored."""
    spec = ImageSpec(
        channels=data["channels"],
        size=(data["size"][0], data["size"][1]),
        range=(data["range"][0], data["range"][1]),
        unit=data["unit"],
        bits=data["bits"],
        modality=data["modality"],
    )
    return spec, Scale(0.0, 1.0 if spec.bits is None else float((1 << spec.bits) - 1))


def load_medmnist(name: str, request: Request) -> Source:
    """Load a MedMNIST set that the ``medmnist`` package has stored on this machine; nothing is downloaded.

    Raises:
        MissingExtraError: The package is not installed.
        UnknownNameError: No set of that name.
        DataFileError: The file is not on disk.
    """
    try:
        from medmnist import INFO
        from medmnist.dataset import DEFAULT_ROOT
    except ImportError as error:
        raise MissingExtraError(
            request.who, "the package medmnist", "no such package", "Run: pip install 'robustlab[medmnist]'"
        ) from error
    if name not in INFO:
        close = difflib.get_close_matches(name, INFO, n=3)
        raise UnknownNameError(
            request.who,
            f"one of {', '.join(sorted(INFO))}",
            repr(name),
            f"Did you mean {' or '.join(map(repr, close))}?" if close else "Check the spelling.",
        )
    facts = INFO[name]
    path = Path(str(DEFAULT_ROOT)) / f"{name}.npz"
    if not path.is_file():
        raise DataFileError(
            request.who,
            f"the file {name}.npz in the folder of the medmnist package",
            "no such file, and robustlab does not download",
            f"Run once: python -c \"import medmnist; medmnist.{facts['python_class']}(split='test', download=True)\"",
        )
    names = tuple(facts["label"][key] for key in sorted(facts["label"], key=int))
    return load_npz(path, request, class_names=names, name=name)
