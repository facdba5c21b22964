"""Image folders: one subfolder a class, or the folders that the writer makes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from robustlab.core.errors import ConfigError, DataFileError, MissingSplitError, ShapeError
from robustlab.core.rng import hash_ids
from robustlab.core.source import Source
from robustlab.core.types import ImageSpec

from .assemble import Request, make_info
from .columns import natural_key
from .npz import spec_from_dict
from .pixels import Scale
from .sources import FolderSource, read_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
MANIFEST = "manifest.json"
"""The table of all conditions that the writer made."""

SAMPLES = "samples.json"
"""Ids, labels and groups of a folder that the writer made."""


@dataclass(frozen=True)
class _Looks:
    """What all images of a folder must share."""

    size: tuple[int, int]
    channels: int
    bits: int

    def __str__(self) -> str:
        kind = "RGB" if self.channels == 3 else "grey"
        return f"{kind}, {self.bits} bits, {self.size[0]} x {self.size[1]} pixels"


def load_folder(root: Path, request: Request) -> Source:
    """Load an image folder.

    ``root/CLASS/**/file`` gives labels in sorted order of class names; a folder of files without subfolders is
    unlabelled; ``root/SPLIT/CLASS/file`` is recognised by its folder names (train, val, test). Files that cannot be
    decoded are left out and named in the notes.

    Raises:
        DataFileError: No readable image, or the split is missing.
        ShapeError: Images differ in size, bit depth or colour.
        ConfigError: ``class_names`` and folder names differ.
    """
    if (root / SAMPLES).is_file():
        return _load_written(root, request)
    if (root / MANIFEST).is_file():
        raise DataFileError(
            request.who,
            "one condition of a corrupted data set",
            f"the folder of all of them ({MANIFEST})",
            "Pass the path of one file or folder in it.",
        )
    base = _split_folder(root, request)
    files = sorted((p for p in base.rglob("*") if _is_image(p, base)), key=lambda p: natural_key(p.as_posix()))
    if not files:
        raise DataFileError(
            request.who,
            f"images ({', '.join(SUFFIXES)}) in class subfolders",
            "no such file",
            "Check the path; each class is a subfolder.",
        )
    tops = [p.relative_to(base).parts[0] if p.parent != base else "" for p in files]
    notes = []
    keep = range(len(files))
    if any(tops) and not all(tops):
        keep = [i for i, top in enumerate(tops) if top]  # type: ignore[assignment]
        loose = [files[i].name for i, top in enumerate(tops) if not top]
        notes.append(f"{len(loose)} images outside of class folders were left out: {_some(loose)}.")
    looks, broken = _inspect([files[i] for i in keep])
    notes.extend(_quarantine_note(root, broken))
    if not looks:
        raise DataFileError(
            request.who, "at least one readable image", f"{len(broken)} unreadable files", "Repair the files."
        )
    spec = _common_spec(looks, request)
    kept = [i for i in keep if files[i] in looks]
    found = sorted({tops[i] for i in keep}) if any(tops) else None  # plain order, as torchvision's ImageFolder
    names = _class_order(found, request)
    given = request.rows(kept, len(files))
    labels = None if names is None or found is None else [names.index(tops[i]) for i in kept]
    relative = [files[i].relative_to(root).as_posix() for i in kept]
    info = make_info(
        _with_rows(request, given),
        spec,
        len(kept),
        name=root.resolve().name,
        labels=labels,
        ids=hash_ids(relative),
        class_names=names,
        notes=notes,
    )
    return FolderSource(info, [files[i] for i in kept], Scale(0.0, spec.range[1]))


def _load_written(root: Path, request: Request) -> Source:
    """Load a folder that ``write_corrupted`` made, in the order of the source."""
    meta = json.loads((root / SAMPLES).read_text(encoding="utf-8"))
    samples: list[dict[str, Any]] = meta["samples"]
    files = [root / sample["file"] for sample in samples]
    looks, broken = _inspect(files)
    if not looks:
        raise DataFileError(
            request.who, "at least one readable image", f"{len(broken)} unreadable files", "Write the folder again."
        )
    _common_spec(looks, request)
    kept = [i for i, file in enumerate(files) if file in looks]
    spec, scale = spec_from_dict(meta["spec"])
    labels = None if meta["task"] is None else [samples[i]["label"] for i in kept]
    groups = {name: [samples[i]["groups"][name] for i in kept] for name in meta["groups"]}
    info = make_info(
        _with_rows(request, request.rows(kept, len(files))),
        spec,
        len(kept),
        name=meta["name"],
        labels=labels,
        ids=[samples[i]["id"] for i in kept],
        groups=groups,
        task=meta["task"],
        class_names=meta["class_names"],
        notes=_quarantine_note(root, broken),
    )
    return FolderSource(info, [files[i] for i in kept], scale)


def _with_rows(request: Request, given: dict[str, Any]) -> Request:
    return replace(request, **given)


def _is_image(path: Path, base: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(base).parts)
    return path.suffix.lower() in SUFFIXES and path.is_file() and not hidden


def _split_folder(root: Path, request: Request) -> Path:
    folders = [p.name for p in root.iterdir() if p.is_dir()]
    splits = sorted(name for name in folders if name.lower() in SPLITS)
    if not splits:
        return root
    wanted = [name for name in splits if SPLITS[name.lower()] == request.split]
    if not wanted:
        raise MissingSplitError(
            request.who,
            f"a folder {request.split!r}",
            f"folders {', '.join(splits)}",
            f"Pass split={SPLITS[splits[0].lower()]!r}.",
        )
    return root / wanted[0]


def _inspect(files: Sequence[Path]) -> tuple[dict[Path, _Looks], dict[Path, str]]:
    """Decode every file once, so that a damaged one is found now and not in the middle of a run."""

    def look(path: Path) -> _Looks | str:
        try:
            image = read_image(path)
        except DataFileError as error:
            return error.got
        return _Looks((image.shape[0], image.shape[1]), 3 if image.ndim == 3 else 1, 8 * image.dtype.itemsize)

    looks: dict[Path, _Looks] = {}
    broken: dict[Path, str] = {}
    with ThreadPoolExecutor() as pool:
        results: Iterable[_Looks | str] = pool.map(look, files)
        for path, result in zip(
            files, tqdm(results, total=len(files), desc="reading images", leave=False, delay=2), strict=True
        ):
            if isinstance(result, str):
                broken[path] = result
            else:
                looks[path] = result
    return looks, broken


def _quarantine_note(root: Path, broken: dict[Path, str]) -> list[str]:
    if not broken:
        return []
    listed = [f"{path.relative_to(root).as_posix()} ({why})" for path, why in broken.items()]
    return [f"{len(listed)} unreadable files were left out: {'; '.join(listed)}."]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _common_spec(looks: dict[Path, _Looks], request: Request) -> ImageSpec:
    tally = Counter(looks.values())
    common = tally.most_common(1)[0][0]
    odd = [(path, look) for path, look in looks.items() if look != common]
    if odd:
        path, look = odd[0]
        raise ShapeError(
            request.who,
            f"images of one size and kind; {tally[common]} are {common}",
            f"{len(odd)} others, e.g. {path.name}: {look}",
            "Resize all images to one size and save all as grey or all as RGB, or load them through a torch Dataset.",
        )
    if request.value_range is not None:
        raise ConfigError(
            request.who,
            "no value_range for image files",
            f"{request.value_range}",
            "Their range follows from the bit depth; leave it out.",
        )
    return ImageSpec(
        channels=common.channels,
        size=common.size,
        range=(0.0, float((1 << common.bits) - 1)),
        bits=common.bits,
        modality=request.modality,
    )


def _class_order(found: Sequence[str] | None, request: Request) -> tuple[str, ...] | None:
    """Return class names: sorted folder names, or the user's order of the same names."""
    if found is None:
        return None
    if request.class_names is None or request.labels is not None:
        return tuple(found)
    missing = [name for name in found if name not in request.class_names]
    if missing:
        raise ConfigError(
            request.who,
            f"class_names that include the folder names {', '.join(found)}",
            f"no {', '.join(missing)}",
            "Use the folder names, in the order of the model's outputs.",
        )
    return tuple(request.class_names)
