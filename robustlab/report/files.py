"""The files of a report: JSON, CSV and safetensors, written atomically; nothing is pickled."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from robustlab.core.errors import ConfigError, DataFileError, KindError, RobustlabError
from robustlab.core.spec import array_fingerprint
from robustlab.metrics.store import PredictionStore

from .rows import Row

SCHEMA = 1
COLUMNS = tuple(field.name for field in fields(Row))
_FLOATS = frozenset(field.name for field in fields(Row) if field.type == "float")
_INTS = frozenset(field.name for field in fields(Row) if field.type == "int")
_TENSORS = ("logits", "labels", "clusters")
PictureData = tuple[str, float, bytes, str]


def plain_json(value: Any) -> Any:
    """Return a value in JSON types: mappings with string keys, lists, NaN as None, infinities as "inf" and "-inf".

    Raises:
        KindError: The value has no JSON form.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    raise KindError(
        "Report", "a manifest of JSON types", type(value).__name__, "Convert it to numbers, strings, lists or mappings."
    )


def row_values(row: Row) -> list[Any]:
    """Return the fields of a row as plain Python values, in the order of ``COLUMNS``."""
    return [
        float(value) if name in _FLOATS else int(value) if name in _INTS else str(value)
        for name in COLUMNS
        for value in (getattr(row, name),)
    ]


def to_json(rows: Sequence[Row], manifest: Mapping[str, Any]) -> str:
    """Return the JSON text of a report: manifest, column names, and one line a row."""
    lines = ",\n".join(
        json.dumps([_number(v) if isinstance(v, float) else v for v in row_values(row)], ensure_ascii=False)
        for row in rows
    )
    head = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    return f'{{"manifest": {head},\n"columns": {json.dumps(COLUMNS)},\n"rows": [\n{lines}\n]}}\n'


def from_json(text: str, who: str) -> tuple[tuple[Row, ...], dict[str, Any]]:
    """Read what ``to_json`` wrote.

    Raises:
        ConfigError: Not a report, or another schema.
    """
    try:
        content = json.loads(text)
        manifest, columns, lines = content["manifest"], content["columns"], content["rows"]
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            who, "the JSON of a report", f"{type(error).__name__}: {error}", "Run the evaluation again."
        ) from error
    if schema != SCHEMA:
        raise ConfigError(
            who,
            f"a report of schema {SCHEMA}",
            f"schema {schema}",
            "Load it with the robustlab version that wrote it "
            f"({manifest.get('versions', {}).get('robustlab', 'see its manifest')}), or run the evaluation again.",
        )
    if tuple(columns) != COLUMNS:
        raise ConfigError(who, f"columns {', '.join(COLUMNS)}", ", ".join(map(str, columns)), "The file was changed.")
    return tuple(Row(*map(_field, COLUMNS, line)) for line in lines), manifest


def to_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV; NaN is an empty cell, and the row's reason says why."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow(["" if isinstance(v, float) and math.isnan(v) else v for v in row_values(row)])
    return text.getvalue()


def save(
    folder: Path,
    rows: Sequence[Row],
    manifest: Mapping[str, Any],
    predictions: Mapping[str, PredictionStore],
    pictures: Sequence[PictureData],
) -> Path:
    """Write the files of a report and return the folder.

    Raises:
        DataFileError: The folder cannot be written.
    """
    tensors, index = _pack(predictions)
    contents = {
        folder / "rows.csv": to_csv(rows).encode(),
        folder / "predictions.safetensors": safetensors.torch.save(tensors),
        folder / "predictions.json": json.dumps(index, indent=1).encode(),
        folder / "report.json": to_json(rows, manifest).encode(),
    }
    gallery = folder / "gallery.json"
    if pictures:
        entries = [
            {"condition": condition, "severity": severity, "caption": caption, "png": base64.b64encode(png).decode()}
            for condition, severity, png, caption in pictures
        ]
        contents[gallery] = json.dumps(entries, indent=1).encode()
    write_all(contents)
    if not pictures:
        gallery.unlink(missing_ok=True)  # pictures of an earlier run do not belong to this report
    return folder


def load(folder: Path) -> tuple[tuple[Row, ...], dict[str, Any], dict[str, PredictionStore], list[PictureData]]:
    """Read what ``save`` wrote.

    Raises:
        DataFileError: The folder holds no report, or a damaged one.
        ConfigError: Another schema.
    """
    who = f"Report.load({str(folder)!r})"
    try:
        rows, manifest = from_json((folder / "report.json").read_text(encoding="utf-8"), who)
        index = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(folder / "predictions.safetensors")
        predictions = {entry["key"]: _unpack(entry, tensors) for entry in index}
        gallery = folder / "gallery.json"
        entries = json.loads(gallery.read_text(encoding="utf-8")) if gallery.exists() else []
        pictures = [(e["condition"], e["severity"], base64.b64decode(e["png"]), e["caption"]) for e in entries]
    except OSError as error:
        raise DataFileError(
            who, "a folder that Report.save wrote", str(error), "Pass that folder; it holds report.json."
        ) from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, RobustlabError):
            raise
        raise DataFileError(
            who, "whole files", f"{type(error).__name__}: {error}", "The files are damaged: run the evaluation again."
        ) from error
    return rows, manifest, predictions, pictures


def write_all(contents: Mapping[Path, bytes]) -> list[Path]:
    """Write files so that each is either the old or the new one: all temporary files first, then the moves.

    Raises:
        DataFileError: A file cannot be written; the old ones are left as they were.
    """
    moves: list[tuple[Path, Path]] = []
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            spare = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            moves.append((spare, path))
            with spare.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for spare, path in moves:
            spare.replace(path)
    except OSError as error:
        raise DataFileError(
            f"writing {', '.join(str(path) for path in contents)}",
            "a place that can be written",
            str(error),
            "Check the path, the rights and the free space.",
        ) from error
    finally:
        for spare, _ in moves:
            with contextlib.suppress(OSError):
                spare.unlink(missing_ok=True)
    return list(contents)


def _number(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)


def _field(name: str, value: Any) -> Any:
    if name not in _FLOATS:
        return value
    return math.nan if value is None else float(value)


def _pack(predictions: Mapping[str, PredictionStore]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Name each distinct tensor by its content, so labels, hashed ids and groups are stored once."""
    tensors: dict[str, Tensor] = {}

    def keep(tensor: Tensor | None) -> str | None:
        if tensor is None:
            return None
        plain = tensor.detach().cpu().contiguous().clone()
        name = array_fingerprint([("", plain)])
        tensors[name] = plain
        return name

    index = [
        {
            "key": key,
            "n": len(store),
            "task": store.task,
            "ids": keep(store.keys),
            **{name: keep(getattr(store, name)) for name in _TENSORS},
            "scores": {name: keep(value) for name, value in store.scores.items()},
            "score_reasons": dict(store.score_reasons),
            "groups": {name: keep(codes) for name, codes in store.groups.items()},
        }
        for key, store in predictions.items()
    ]
    return tensors, index


def _unpack(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PredictionStore:
    def take(name: str | None) -> Tensor | None:
        return None if name is None else tensors[name]

    return PredictionStore(
        ids=tensors[entry["ids"]],
        logits=tensors[entry["logits"]],
        labels=take(entry["labels"]),
        task=entry["task"],
        scores={name: tensors[key] for name, key in entry["scores"].items()},
        score_reasons=entry["score_reasons"],
        groups={name: tensors[key] for name, key in entry["groups"].items()},
        clusters=take(entry["clusters"]),
        pseudonyms=True,
    )
