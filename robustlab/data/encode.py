"""Files of one condition, written chunk by chunk under a temporary name and renamed when complete."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustlab.core.source import SourceInfo

from .columns import Array
from .folder import SAMPLES
from .npz import META_KEY, spec_to_dict


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = _temporary(path)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def to_stored(images: Tensor, bits: int | None) -> Array:
    """Return quantised images (N, C, H, W) as uint8 or uint16, or float32 for float sources."""
    if bits is None:
        return images.to(torch.float32).cpu().numpy()
    levels = torch.round(images.to(torch.float32) * float((1 << bits) - 1)).to(torch.int32).cpu().numpy()
    return levels.astype(np.uint8 if bits <= 8 else np.uint16)


def _meta(info: SourceInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "spec": spec_to_dict(info.spec),
        "task": info.task,
        "class_names": None if info.class_names is None else list(info.class_names),
    }


def _level_names(info: SourceInfo, column: str) -> list[str]:
    """Return each sample's level by name; missing ones are empty."""
    names = (*info.group_levels.get(column, ()), "")
    count = len(names) - 1
    return [names[code] if code < 0 or count else str(code) for code in info.groups[column].tolist()]


class NpzFile:
    """An NPZ file in MedMNIST layout, streamed so that no condition has to fit in memory.

    Args:
        path: Final path.
        info: The source's samples.
    """

    def __init__(self, path: Path, info: SourceInfo) -> None:
        self.path = path
        self.info = info
        self.part = _temporary(path)
        self.archive = zipfile.ZipFile(self.part, "w", zipfile.ZIP_STORED, allowZip64=True)
        spec = info.spec
        dtype = np.dtype(np.float32 if spec.bits is None else np.uint8 if spec.bits <= 8 else np.uint16)
        shape = (len(info), *spec.size) if spec.channels == 1 else (len(info), *spec.size, spec.channels)
        self.stream = self.archive.open("test_images.npy", "w", force_zip64=True)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.stream, header)

    def append(self, images: Tensor) -> None:
        """Write the next chunk of quantised images (N, C, H, W)."""
        stored = to_stored(images, self.info.spec.bits)
        self.stream.write(np.ascontiguousarray(np.moveaxis(stored, 1, -1)).tobytes())

    def finish(self) -> None:
        """Write labels, ids and columns, and give the file its name."""
        self.stream.close()
        info = self.info
        arrays: dict[str, Array] = {"test_ids": info.ids.numpy()}
        if info.labels is not None:
            labels = info.labels.numpy()
            small = labels.size == 0 or (labels.min() >= 0 and labels.max() < 256)
            labels = labels.astype(np.uint8) if small else labels
            arrays["test_labels"] = labels[:, None] if labels.ndim == 1 else labels
        for column in info.groups:
            arrays[f"test_{column}"] = np.array(_level_names(info, column), dtype=np.str_)
        arrays[META_KEY] = np.array(json.dumps(_meta(info), sort_keys=True))
        for name, array in arrays.items():
            with self.archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
        self.archive.close()
        self.part.replace(self.path)

    def abandon(self) -> None:
        """Remove the unfinished file."""
        self.stream.close()
        self.archive.close()
        self.part.unlink(missing_ok=True)


class PngFolder:
    """A folder CLASS/ID.png with a table of ids, labels and columns.

    Args:
        path: Final path.
        info: The source's samples.
    """

    def __init__(self, path: Path, info: SourceInfo) -> None:
        self.path = path
        self.info = info
        self.part = _temporary(path)
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        folders = class_folders(info)
        self.files = [f"{folders[i]}{sample_id}.png" for i, sample_id in enumerate(info.ids.tolist())]
        for folder in sorted(set(folders)):
            (self.part / folder).mkdir(exist_ok=True)
        self.written = 0

    def append(self, images: Tensor) -> None:
        """Write the next chunk of quantised images (N, C, H, W)."""
        for image in to_stored(images, self.info.spec.bits):
            pixels = np.ascontiguousarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1))
            buffer = BytesIO()
            Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
            (self.part / self.files[self.written]).write_bytes(buffer.getvalue())
            self.written += 1

    def finish(self) -> None:
        """Write the table and give the folder its name."""
        info = self.info
        columns = {column: _level_names(info, column) for column in info.groups}
        labels = None if info.labels is None else info.labels.tolist()
        samples = [
            {
                "file": file,
                "id": sample_id,
                "label": None if labels is None else labels[i],
                "groups": {column: names[i] for column, names in columns.items()},
            }
            for i, (file, sample_id) in enumerate(zip(self.files, info.ids.tolist(), strict=True))
        ]
        table = {**_meta(info), "groups": sorted(columns), "samples": samples}
        (self.part / SAMPLES).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        if self.path.exists():
            shutil.rmtree(self.path)
        self.part.replace(self.path)

    def abandon(self) -> None:
        """Remove the unfinished folder."""
        shutil.rmtree(self.part, ignore_errors=True)


def class_folders(info: SourceInfo) -> list[str]:
    """Return each sample's subfolder with a slash, or "" where samples have no single class."""
    if info.labels is None or info.labels.ndim != 1:
        return [""] * len(info)
    names = info.class_names
    slugs: dict[int, str] = {}
    for label in sorted(set(info.labels.tolist())):
        slug = re.sub(r"[^\w.+-]+", "-", names[label]).strip("-.") if names is not None else ""
        slugs[label] = slug if slug and slug not in slugs.values() else f"{slug}{label}"
    return [f"{slugs[label]}/" for label in info.labels.tolist()]
