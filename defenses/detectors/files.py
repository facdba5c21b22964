"""Fitted detectors in one file: safetensors, with the configuration as JSON in its header."""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors.torch
from safetensors import safe_open

from robustlab.core.detector import Detector
from robustlab.core.errors import DataFileError, KindError
from robustlab.core.spec import array_fingerprint, canonical_json, from_dict

from .base import Learning

_FORMAT = "1"
_SEEN = "tuned on: "  # before the names of sets whose images the settings were chosen on


def save_detector(detector: Detector, path: str | Path) -> Path:
    """Write a detector, what it has learned and what images it was tuned on; the file appears complete or not at all.

    Raises:
        NotFittedError: The detector learns from data, and has not been fitted.
        KindError: Its configuration has no JSON form, or it is another library's.
        DataFileError: The file cannot be written.
    """
    if getattr(detector, "opaque", False):
        raise KindError(
            f"save_detector {path}",
            "a detector of robustlab, whose numbers go into safetensors",
            f"{detector.name!r}, an object of another library that only pickle could write",
            "Fit it again, or save the detector of robustlab that does the same.",
        )
    target = Path(path)
    learned = dict(detector.learned) if isinstance(detector, Learning) and detector.learns else {}
    seen = {f"{_SEEN}{name}": hashes for name, hashes in detector.tuned_on.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in {**learned, **seen}.items()}
    header = {
        "format": _FORMAT,
        "detector": canonical_json(detector),
        "checksum": array_fingerprint(sorted(tensors.items())),
    }
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(safetensors.torch.save(tensors, header))
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        who = f"save_detector {target}"
        raise DataFileError(who, "a file that can be written", str(error), "Choose another.") from error
    return target


def load_detector(path: str | Path) -> Detector:
    """Return a detector as ``save_detector`` wrote it; its scores are the same bits.

    Raises:
        DataFileError: There is no such file, or it is damaged.
        ConfigError: It was written by another version of the detector.
    """
    who = f"load_detector {path}"
    try:
        with safe_open(Path(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
        config = json.loads(header["detector"])
        sound = header["format"] == _FORMAT and array_fingerprint(sorted(tensors.items())) == header["checksum"]
    except Exception as error:  # safetensors raises a class of its own, outside any builtin kind
        raise DataFileError(
            who, "a file that save_detector wrote", str(error), "Check the path, or fit again."
        ) from error
    if not sound:
        raise DataFileError(who, "the numbers that were saved", "other ones", "Fit and save again.")
    detector: Detector = from_dict(config)
    seen = {name.removeprefix(_SEEN): value for name, value in tensors.items() if name.startswith(_SEEN)}
    if seen:
        detector.remember(seen)
    if isinstance(detector, Learning) and detector.learns:
        detector.keep({name: value for name, value in tensors.items() if not name.startswith(_SEEN)})
    return detector
