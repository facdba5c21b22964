"""The writer of corrupted data sets: one file or folder a condition, and a manifest."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from robustlab import __version__
from robustlab.core.checks import check_seed, check_severity
from robustlab.core.errors import ConfigError, DataFileError, KindError
from robustlab.core.shift import Shift, ShiftContext, quantize
from robustlab.core.source import Source
from robustlab.core.spec import to_dict

from .encode import NpzFile, PngFolder, write_text
from .folder import MANIFEST

SCHEMA = 1
Format = Literal["npz", "png"]


@dataclass(frozen=True, eq=False)
class _Condition:
    """One shift at one severity, and where it is stored."""

    shift: Shift
    severity: float
    path: Path
    label: str

    @property
    def key(self) -> str:
        """The condition as the evaluation and files of saved predictions call it."""
        return f"{self.label}@{self.severity:g}" if self.severity else "clean"

    def entry(self) -> dict[str, Any]:
        values = self.shift.parameters(self.severity)
        return {
            "condition": self.key,
            "shift": self.shift.label,
            "config": _config(self.shift),
            "severity": self.severity,
            "parameters": {name: [to_dict(value), unit] for name, (value, unit) in values.items()},
            "file": self.path.name,
        }


def write_corrupted(
    source: Source,
    shifts: Sequence[Shift],
    severities: Sequence[float],
    out: str | Path,
    *,
    seed: int = 0,
    format: Format = "npz",
    chunk: int = 256,
    progress: bool = True,
) -> Path:
    """Write a source under each shift and severity, as the evaluation would see it, bit for bit.

    Each condition becomes ``LABEL_sSEVERITY.npz`` in MedMNIST layout (test_images, test_labels, test_ids, group
    columns) or a folder ``LABEL_sSEVERITY/CLASS/ID.png``; ``manifest.json`` holds seed, configurations, physical
    parameters, checksums, what was skipped, and for each file the name of its condition in an evaluation, under which a
    file of saved predictions lists the answers (see ``load_predictions``). Files appear only when complete. Called
    again with the same arguments, finished conditions whose checksum is right are kept; the final files do not depend
    on interruptions.

    Args:
        source: Clean samples.
        shifts: Shifts that need no model. Those that do not apply to the source are listed as skipped.
        severities: From 0 to 5; 0 writes the clean images.
        out: Folder, made if missing.
        seed: Seed of the draws.
        format: ``"npz"``, or ``"png"`` for 8-bit grey or RGB and 16-bit grey sources.
        chunk: Samples worked on at once; has no influence on the files.
        progress: Show a progress bar.

    Returns:
        The folder.

    Raises:
        ConfigError: The folder holds another data set, or a format cannot hold the source.
        DataFileError: The folder cannot be made.
        RangeError: A severity outside [0, 5].
        KindError: The source is not a Source, or a shift not a Shift.
    """
    who = "write_corrupted"
    if not isinstance(source, Source):
        raise KindError(who, "a Source", type(source).__name__, "Make one: robustlab.load_data(path or arrays).")
    several: dict[str, object] = {"shifts": shifts, "severities": severities}
    for name, values in several.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise KindError(who, f"{name} as a sequence", f"{values!r}", f"Pass {name}=({values!r},).")
    levels = [check_severity(severity, who) for severity in severities]
    _check_request(source, shifts, levels, format, chunk, who)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataFileError(
            who, "a folder that can be written", f"{type(error).__name__}: {error}", "Choose another."
        ) from error
    reasons = [shift.skip_reason(source.info.spec) or _unstorable(shift) for shift in shifts]
    if all(why is not None for why in reasons):
        told = "; ".join(f"{shift.label}: {why}" for shift, why in zip(shifts, reasons, strict=True))
        raise ConfigError(who, "at least one shift that can be written for these images", told, "Choose other shifts.")
    plan = _plan([s for s, why in zip(shifts, reasons, strict=True) if why is None], levels, folder, format)
    head = _head(source, shifts, reasons, levels, seed, format)
    entries = _finished(folder, head, plan)
    context = ShiftContext(seed=check_seed(seed, who), spec=source.info.spec)
    todo = [condition for condition in plan if condition.path.name not in entries]
    with tqdm(total=len(todo) * len(source), desc="writing", unit="image", disable=not progress) as bar:
        for shift in dict.fromkeys(id(condition.shift) for condition in todo):
            group = [condition for condition in todo if id(condition.shift) == shift]
            for condition, digest in zip(group, _write_shift(source, group, context, chunk, bar), strict=True):
                entries[condition.path.name] = {**condition.entry(), "blake2b": digest}
            _write_manifest(folder, head, plan, entries)
    _write_manifest(folder, head, plan, entries)
    return folder


def _check_request(
    source: Source, shifts: Sequence[Shift], severities: Sequence[float], format: str, chunk: int, who: str
) -> None:
    spec = source.info.spec
    for shift in shifts:
        if not isinstance(shift, Shift):
            raise KindError(who, "shifts as Shift objects", f"{shift!r}", "Make it first, e.g. GaussianNoise().")
    if not shifts or not severities:
        raise ConfigError(who, "at least one shift and one severity", "none", "Pass e.g. severities=(1, 3, 5).")
    if len(set(severities)) != len(severities):
        raise ConfigError(who, "severities that are all different", f"{tuple(severities)}", "Leave the double one out.")
    if chunk < 1:
        raise ConfigError(who, "chunk of at least 1", f"{chunk}", "Leave it out.")
    if format not in ("npz", "png"):
        raise ConfigError(who, "format 'npz' or 'png'", repr(format), "Check the spelling.")
    if format == "png" and (spec.bits, spec.channels) not in ((8, 1), (8, 3), (16, 1)):
        bits = "float" if spec.bits is None else f"{spec.bits}-bit"
        raise ConfigError(
            who,
            "8-bit grey or RGB, or 16-bit grey images, for PNG files",
            f"{bits} images with {spec.channels} channels",
            "Use format='npz'.",
        )


def _plan(shifts: Sequence[Shift], severities: Sequence[float], folder: Path, format: Format) -> list[_Condition]:
    """Give every condition a file name; shifts that share a label are numbered."""
    seen: dict[str, int] = {}
    labels: Counter[str] = Counter()
    plan: list[_Condition] = []
    for shift in shifts:
        labels[shift.label] += 1
        label = shift.label if labels[shift.label] == 1 else f"{shift.label}#{labels[shift.label]}"
        slug = re.sub(r"[^A-Za-z0-9.+-]+", "-", shift.label).strip("-.") or "shift"
        seen[slug] = seen.get(slug, 0) + 1
        stem = slug if seen[slug] == 1 else f"{slug}_{seen[slug]}"
        suffix = ".npz" if format == "npz" else ""
        plan.extend(
            _Condition(shift, severity, folder / f"{stem}_s{severity:g}{suffix}", label) for severity in severities
        )
    return plan


def _unstorable(shift: Shift) -> str | None:
    if shift.storable:
        return None
    return "its results are floats that are not rounded, which files of this bit depth cannot hold"


def _config(shift: Shift) -> Any:
    """Return the shift's configuration; unregistered ones have their repr only."""
    try:
        return to_dict(shift)
    except KindError:
        return {"type": "unregistered", "name": shift.name, "version": shift.version, "repr": repr(shift)}


def _head(
    source: Source,
    shifts: Sequence[Shift],
    reasons: Sequence[str | None],
    severities: Sequence[float],
    seed: int,
    format: Format,
) -> dict[str, Any]:
    """Return the part of the manifest that tells one data set from another."""
    return {
        "schema": SCHEMA,
        "robustlab": __version__,
        "format": format,
        "seed": seed,
        "source": {"name": source.info.name, "fingerprint": source.fingerprint(), "count": len(source)},
        "severities": list(severities),
        "shifts": [_config(shift) for shift in shifts],
        "skipped": [
            {"shift": shift.label, "reason": why} for shift, why in zip(shifts, reasons, strict=True) if why is not None
        ],
    }


def _finished(folder: Path, head: dict[str, Any], plan: Sequence[_Condition]) -> dict[str, dict[str, Any]]:
    """Return the manifest entries of conditions that an earlier call finished and that are still intact."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    differing = [key for key in head if stored.get(key) != json.loads(json.dumps(head[key]))]
    if differing:
        raise ConfigError(
            f"write_corrupted, {path}",
            "the manifest of the same data set",
            f"one that differs in {', '.join(differing)}",
            "Choose another folder, or remove this one.",
        )
    entries = {entry["file"]: entry for entry in stored.get("conditions", [])}
    kept = {}
    for condition in plan:
        entry = entries.get(condition.path.name)
        if entry is not None and checksum(condition.path) == entry["blake2b"]:
            kept[condition.path.name] = {**condition.entry(), "blake2b": entry["blake2b"]}
    return kept


def _write_shift(
    source: Source, conditions: Sequence[_Condition], context: ShiftContext, chunk: int, bar: Any
) -> list[str]:
    """Write all severities of one shift in one pass: decode and draw once per chunk."""
    shift = conditions[0].shift
    sinks: list[NpzFile | PngFolder] = []
    try:
        for condition in conditions:
            kind = NpzFile if condition.path.suffix == ".npz" else PngFolder
            sinks.append(kind(condition.path, source.info))
        for start in range(0, len(source), chunk):
            batch = source.read(range(start, min(start + chunk, len(source))))
            with torch.no_grad():
                draws = shift.prepare(batch, context)
                for condition, sink in zip(conditions, sinks, strict=True):
                    changed = batch
                    if condition.severity > 0:
                        changed = shift.perform(batch, draws, condition.severity, context)
                    sink.append(quantize(changed.images, source.info.spec))
                    bar.update(len(batch))
        for sink in sinks:
            sink.finish()
    except BaseException:
        for sink in sinks:
            sink.abandon()
        raise
    return [checksum(condition.path) or "" for condition in conditions]


def checksum(path: Path) -> str | None:
    """Return the blake2b hash of a file, or of the names and contents of a folder; None if there is nothing."""
    digest = hashlib.blake2b(digest_size=16)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.relative_to(path).as_posix())
    else:
        return None
    for file in files:
        if path.is_dir():
            digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _write_manifest(
    folder: Path, head: dict[str, Any], plan: Sequence[_Condition], entries: dict[str, dict[str, Any]]
) -> None:
    conditions = [entries[c.path.name] for c in plan if c.path.name in entries]
    text = json.dumps({**head, "complete": len(conditions) == len(plan), "conditions": conditions}, indent=1)
    write_text(folder / MANIFEST, text + "\n")
