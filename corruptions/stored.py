"""Corrupted sets that others have stored, as shifts: CIFAR-10-C, MedMNIST-C and ImageNet-C files."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch

from robustlab.core.errors import (
    ConfigError,
    DataFileError,
    KindError,
    LabelError,
    RangeError,
    RobustlabWarning,
    ShapeError,
)
from robustlab.core.rng import stable_hash
from robustlab.core.shift import Shift, ShiftContext, from_bytes
from robustlab.core.source import Source
from robustlab.core.spec import array_fingerprint
from robustlab.core.types import Batch, ImageSpec
from robustlab.data.folder import SPLITS, SUFFIXES
from robustlab.data.sources import read_image

SEVERITIES = (1, 2, 3, 4, 5)
LABELS = "labels.npy"

_BLOCK, _BLOCKS, _SAMPLE = 1 << 16, 256, 16

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Stored(Shift):
    """A stored corrupted version of a data set: each sample is replaced by its stored one, found by its id.

    Made by ``stored_suite``. Only severities 1 to 5 exist. In a composition it must come first, because it does not
    look at the pixels that it is given.

    Args:
        title: Name of the corruption in the set, e.g. ``"gaussian_noise"``.
        layout: ``"npy"``, ``"npz"``, or ``"folder"``.
        path: Absolute path of the file, or of the folder that holds the severities.
        size: (channels, height, width) of the images.
        ids: int64 (N,) ids of the samples, in the order in which they are stored.
        name: Stands for all of this, and for what the files hold, in keys.
        files: Path of each sample below the folder of a severity; empty for arrays.
    """

    opaque: ClassVar[bool] = True
    ignores_pixels: ClassVar[bool] = True
    title: str
    layout: Literal["npy", "npz", "folder"]
    path: str
    size: tuple[int, int, int]
    ids: Array = field(repr=False, compare=False)
    name: str  # type: ignore[misc]  # pyright: ignore[reportIncompatibleVariableOverride] - one class, many sets
    files: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_order", np.argsort(self.ids))

    @property
    def label(self) -> str:
        return self.title

    @property
    def takes_bytes(self) -> bool:
        return True

    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        # severity 0 changes nothing, stored or not
        return {"severity": (float(severity and self._level(severity)), "severity")}

    def skip_reason(self, spec: ImageSpec) -> str | None:
        if (spec.channels, *spec.size) == self.size:
            return None
        return f"its images are {_times(self.size)}, those of the data {_times((spec.channels, *spec.size))}"

    @final
    def prepare(self, batch: Batch, ctx: ShiftContext) -> Array:
        del ctx
        wanted = batch.ids.cpu().numpy()
        order: Array = self._order  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        places = np.searchsorted(self.ids, wanted, sorter=order).clip(max=len(order) - 1)
        rows: Array = order[places]
        strange = wanted[self.ids[rows] != wanted]
        if len(strange):
            raise ConfigError(
                repr(self),
                f"ids among those of the {len(self.ids)} samples that are stored",
                f"id {strange[0]}" + (f" and {len(strange) - 1} others" if len(strange) > 1 else ""),
                "Make the suite with the data that is evaluated: stored_suite(path, data).",
            )
        return rows

    @final
    def perform(self, batch: Batch, draws: Array, severity: float, ctx: ShiftContext) -> Batch:
        del ctx
        level, images = self._level(severity), batch.images
        if tuple(images.shape[1:]) != self.size:
            raise ShapeError(
                repr(self), f"images of {_times(self.size)}", _times(images.shape[1:]), "Load the data at that size."
            )
        pixels = torch.from_numpy(self._read(draws, level)).permute(0, 3, 1, 2).contiguous().to(images.device)
        return batch.replace(pixels if images.dtype == torch.uint8 else from_bytes(pixels).to(images.dtype))

    def _level(self, severity: float) -> int:
        if severity not in SEVERITIES:
            raise RangeError(
                repr(self), "one of the stored severities 1, 2, 3, 4, 5", f"{severity:g}", "Nothing lies between them."
            )
        return int(severity)

    def _read(self, rows: Array, level: int) -> Array:
        """Return stored images, uint8 (len(rows), H, W, C)."""
        if self.layout == "folder":
            images = [_read_file(Path(self.path, str(level), self.files[row]), self.size) for row in rows.tolist()]
            return np.stack(images)
        stored: Array = _mapped(Path(self.path))[(level - 1) * len(self.ids) + rows]
        return stored[..., None] if stored.ndim == 3 else stored


def stored_suite(path: str | Path, source: Source) -> tuple[Stored, ...]:
    """Return every corruption of a stored corrupted set as a shift, sorted by name.

    Three layouts are known, each with five severities:

    - CIFAR-10-C: a folder of files ``NAME.npy``, uint8 (5N, H, W, 3), and ``labels.npy``; severity 1 of all samples
      first, then severity 2, and so on, in the order of the data set;
    - MedMNIST-C: a folder of files ``NAME.npz`` with ``test_images`` (5N, H, W) or (5N, H, W, 3) and ``test_labels``;
    - ImageNet-C: folders ``NAME/SEVERITY/CLASS/FILE``, also below one more folder for the family, with the class and
      file names of the clean folder.

    A path of one such file, or one folder ``NAME``, gives one shift. ``npy`` files are memory-mapped. ``npz`` files are
    unpacked once a process, into a temporary file.

    Args:
        path: File or folder.
        source: The clean data as ``load_data`` returned it, all samples in their order. To evaluate some of them,
            make the suite with all, and then a subset.

    Raises:
        DataFileError: Nothing of a known layout is there, or a file is missing or unreadable.
        ShapeError: The number, size or channels of images differ from the source's.
        LabelError: The labels differ from the source's: another order, or another split.
        KindError: The images are not uint8, or ``source`` is not a source.
    """
    who = f"stored_suite({str(path)!r})"
    if not isinstance(source, Source):
        raise KindError(who, "the clean data as a Source", type(source).__name__, "Load it with robustlab.load_data.")
    root = Path(path).expanduser().absolute()  # workers may stand in another folder
    if not root.exists():
        raise DataFileError(who, "a file or folder that exists", "nothing there", "Check the path.")
    found = [root] if root.is_file() else [file for file in sorted(root.iterdir()) if file.suffix in (".npy", ".npz")]
    arrays = [file for file in found if file.suffix in (".npy", ".npz") and file.name != LABELS]
    if arrays:
        return tuple(_from_array(file, source) for file in arrays)
    folders = _severity_folders(root) if root.is_dir() else []
    if not folders:
        raise DataFileError(
            who,
            "NAME.npy and labels.npy (CIFAR-10-C), NAME.npz (MedMNIST-C), or NAME/1 to NAME/5 (ImageNet-C)",
            "none of them",
            "Pass the folder that holds them.",
        )
    files = _match(_images_below(folders[0] / "1"), source, str(folders[0] / "1"))
    _check_classes(files, source, str(folders[0] / "1"))
    return tuple(_from_folder(folder, files, source) for folder in folders)


def _from_array(file: Path, source: Source) -> Stored:
    info, count = source.info, len(source)
    packed = file.suffix == ".npz"
    stored = _mapped(file)
    if stored.dtype != np.uint8:
        raise KindError(str(file), "uint8 images", f"dtype {stored.dtype}", "Store them as 8-bit images.")
    if stored.ndim not in (3, 4) or len(stored) != len(SEVERITIES) * count:
        raise ShapeError(
            str(file),
            f"{len(SEVERITIES)} x {count} images, five severities of the samples of {info.name!r}",
            f"an array of shape {stored.shape}",
            "Load the split that the set was made from, all of it.",
        )
    size = (1 if stored.ndim == 3 else stored.shape[3], stored.shape[1], stored.shape[2])
    _check_size(str(file), size, info.spec)
    beside = file.with_name(LABELS)
    if packed:
        _check_labels(file, _member(file, "test_labels"), source)
    elif beside.is_file():
        _check_labels(beside, _plain_array(beside), source)
    else:
        warnings.warn(
            f"{file.parent}: no {LABELS}, so the order of the samples could not be compared with {info.name!r}",
            RobustlabWarning,
            stacklevel=3,
        )
    ids = info.ids.numpy()
    name = f"stored/{file.stem}/{_short_hash(_content(file), array_fingerprint([('ids', ids)]))}"
    return Stored(file.stem, "npz" if packed else "npy", str(file), size, ids, name)


def _from_folder(folder: Path, files: tuple[str, ...], source: Source) -> Stored:
    digest = hashlib.blake2b(digest_size=16)
    chosen = {place * (len(files) - 1) // max(1, _SAMPLE - 1) for place in range(_SAMPLE)}
    for severity in SEVERITIES:
        missing = []
        for place, name in enumerate(files):
            file = folder / str(severity) / name
            try:
                digest.update(f"{name} {file.stat().st_size}\n".encode())
                if place in chosen:
                    digest.update(file.read_bytes())
            except OSError:
                missing.append(file)
        if missing:
            raise DataFileError(
                str(missing[0]),
                "a stored image of every sample",
                "no such file" + (f", and {len(missing) - 1} others are missing" if len(missing) > 1 else ""),
                "Download the set again, or load the clean images that it has.",
            )
    first = read_image(folder / "1" / files[0])
    size = (1 if first.ndim == 2 else 3, first.shape[0], first.shape[1])
    _check_size(str(folder / "1" / files[0]), size, source.info.spec)
    ids = source.info.ids.numpy()
    name = f"stored/{folder.name}/{_short_hash(digest.hexdigest(), array_fingerprint([('ids', ids)]))}"
    return Stored(folder.name, "folder", str(folder), size, ids, name, files)


def _short_hash(*parts: str) -> str:
    """Return a short hash of texts, for names."""
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def _check_size(who: str, size: tuple[int, int, int], spec: ImageSpec) -> None:
    wanted = (spec.channels, *spec.size)
    if size != wanted:
        raise ShapeError(
            who,
            f"images of {_times(wanted)}, as the clean ones",
            _times(size),
            "Load the clean data at the size, and with the channels, of the stored set.",
        )


def _check_labels(file: Path, stored: Array, source: Source) -> None:
    labels = source.info.labels
    if labels is None:
        return
    clean = labels.numpy()
    if stored.ndim == 2 and stored.shape[1] == 1 and clean.ndim == 1:
        stored = stored[:, 0]
    whole = np.concatenate([clean] * (len(stored) // len(clean)))
    if stored.shape != whole.shape or len(stored) not in (len(clean), len(SEVERITIES) * len(clean)):
        raise ShapeError(
            str(file),
            f"labels of {len(SEVERITIES)} x {len(clean)} samples",
            f"an array of shape {stored.shape}",
            "Load the split that the set was made from, all of it.",
        )
    differ = stored != whole
    rows = np.flatnonzero(differ if differ.ndim == 1 else differ.any(1))
    if len(rows):
        row = int(rows[0])
        raise LabelError(
            str(file),
            f"the labels of {source.info.name!r}, in its order",
            f"{len(rows)} others, the first in row {row}: {stored[row].tolist()} in place of {whole[row].tolist()}",
            "Load the clean data in the order of the stored set, without shuffling or sorting.",
        )


def _check_classes(files: Sequence[str], source: Source, who: str) -> None:
    info = source.info
    if info.labels is None or info.labels.ndim != 1 or info.class_names is None:
        return
    for place, (name, label) in enumerate(zip(files, info.labels.tolist(), strict=True)):
        folder = name.partition("/")[0]
        if folder in info.class_names and info.class_names[label] != folder:
            raise LabelError(
                who,
                f"the classes of {info.name!r}",
                f"sample {place} ({name}) in place of class {info.class_names[label]!r}",
                "Check class_names, or the labels that were passed to load_data.",
            )


def _severity_folders(root: Path) -> list[Path]:
    """Return the folders that hold the five severities: the root itself, or those up to two levels below it."""
    places = [root, *sorted(root.glob("*/")), *sorted(root.glob("*/*/"))]
    found: list[Path] = []
    for place in places:
        # what lies inside a corruption are its severities and classes, whatever their names
        if (place / "1").is_dir() and not any(holder in place.parents for holder in found):
            found.append(place)
    for place in found:
        lacking = [str(severity) for severity in SEVERITIES if not (place / str(severity)).is_dir()]
        if lacking:
            raise DataFileError(
                str(place), "folders 1, 2, 3, 4, 5", f"no {', '.join(lacking)}", "Download the set again."
            )
    return sorted(found, key=lambda place: place.name)


def _images_below(folder: Path) -> list[str]:
    files = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    return sorted(file.relative_to(folder).as_posix() for file in files)


def _match(files: Sequence[str], source: Source, who: str) -> tuple[str, ...]:
    """Return the file of each sample: ids of image folders are hashes of relative paths, with the split's folder."""
    ids = source.info.ids.tolist()
    splits = (word for name in SPLITS for word in (name, name.capitalize(), name.upper()))
    least = len(ids)
    for prefix in ("", *(f"{split}/" for split in splits)):
        codes = {stable_hash(prefix + file): file for file in files}
        missing = sum(code not in codes for code in ids)
        if not missing:
            return tuple(codes[code] for code in ids)
        least = min(least, missing)
    raise DataFileError(
        who,
        f"a file of the same class and name for each of the {len(ids)} samples of {source.info.name!r}",
        f"none for {least} of them, among {len(files)} files",
        "Load the clean images from a folder CLASS/FILE with the same names, suffixes included.",
    )


def _read_file(file: Path, size: tuple[int, int, int]) -> Array:
    image = read_image(file)
    image = image[..., None] if image.ndim == 2 else image
    if (image.shape[2], *image.shape[:2]) != size or image.dtype != np.uint8:
        got = f"{image.dtype}, {_times((image.shape[2], *image.shape[:2]))}"
        raise ShapeError(str(file), f"uint8 pixels, {_times(size)}", got, "Download the set again.")
    return image


def _times(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]} x {size[2]} (channels, height, width)"


def _content(file: Path) -> str:
    """Return a hash of a file's size and of up to 256 blocks of 64 KiB, evenly spread: all of it up to 16 MiB."""
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    blocks = -(-size // _BLOCK)
    with file.open("rb") as handle:
        for block in sorted({place * (blocks - 1) // (_BLOCKS - 1) for place in range(_BLOCKS)} if blocks else ()):
            handle.seek(block * _BLOCK)
            digest.update(handle.read(_BLOCK))
    return digest.hexdigest()


def _mapped(file: Path) -> Array:
    facts = file.stat()
    return _mapped_once(file, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=64)
def _mapped_once(file: Path, size: int, time: int) -> Array:
    """Return the images of a file, memory-mapped; ``size`` and ``time`` tell a file that was written again."""
    del size, time
    return _plain_array(file) if file.suffix == ".npy" else _member(file, "test_images")


def _plain_array(file: Path) -> Array:
    try:
        array: Array = np.load(file, mmap_mode="r", allow_pickle=False)
        return array
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(file, error) from error


def _member(file: Path, key: str) -> Array:
    """Return an array of an NPZ file, mapped from a temporary file that goes when it is no longer used."""
    try:
        with zipfile.ZipFile(file) as archive, tempfile.TemporaryFile() as spare:
            if f"{key}.npy" not in archive.namelist():
                have = ", ".join(name.removesuffix(".npy") for name in archive.namelist()) or "none"
                raise DataFileError(str(file), f"an array {key}", f"arrays {have}", "See the layout of MedMNIST-C.")
            with archive.open(f"{key}.npy") as packed:
                shutil.copyfileobj(packed, spare, 1 << 20)
            spare.seek(0)
            version = np.lib.format.read_magic(spare)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, columns_first, dtype = read(spare)
            if dtype.hasobject:
                raise ValueError("it holds pickled objects")
            return np.memmap(spare, dtype, "r", spare.tell(), shape, "F" if columns_first else "C")
    except DataFileError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> DataFileError:
    return DataFileError(
        str(file),
        "a readable file without pickled objects",
        f"{type(error).__name__}: {error}",
        "Download it again, or write it with plain arrays.",
    )
