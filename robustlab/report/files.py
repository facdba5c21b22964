"""The files of a report: JSON, CSV and safetensors, written as one set; nothing is pickled."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from robustlab.core.errors import ConfigError, DataFileError, KindError, RobustlabError
from robustlab.core.spec import array_fingerprint
from robustlab.metrics.store import PredictionStore

from .folder import bytes_part, read_bytes, read_tensors, tensors_part, write_folder
from .rows import Row

SCHEMA = 1
COLUMNS = tuple(field.name for field in fields(Row))
_FLOATS = frozenset(field.name for field in fields(Row) if field.type == "float")
_INTS = frozenset(field.name for field in fields(Row) if field.type == "int")
_RECORD, _INDEX, _TENSOR_FILE, _GALLERY = "report.json", "predictions.json", "predictions.safetensors", "gallery.json"
_TRIES = 3
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


def to_json(rows: Sequence[Row], manifest: Mapping[str, Any], names: Mapping[str, str] | None = None) -> str:
    """Return the JSON text of a report: manifest, digests of the files beside it, column names, and one line a row."""
    lines = ",\n".join(
        json.dumps([_number(v) if isinstance(v, float) else v for v in row_values(row)], ensure_ascii=False)
        for row in rows
    )
    head = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    beside = "" if names is None else f'"files": {json.dumps(names)},\n'
    return f'{{"manifest": {head},\n{beside}"columns": {json.dumps(COLUMNS)},\n"rows": [\n{lines}\n]}}\n'


def from_json(text: str, who: str) -> tuple[tuple[Row, ...], dict[str, Any]]:
    """Read what ``to_json`` wrote.

    Raises:
        ConfigError: Not a report, or another schema.
    """
    return _parse(text, who)[:2]


def _parse(text: str, who: str) -> tuple[tuple[Row, ...], dict[str, Any], dict[str, str] | None]:
    """Return rows, manifest and the digests of the other files, which older reports lack."""
    try:
        content = json.loads(text)
        manifest, columns, lines = content["manifest"], content["columns"], content["rows"]
        schema, names = manifest["schema"], content.get("files")
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
    return tuple(Row(*map(_field, COLUMNS, line)) for line in lines), manifest, names


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
    """Write the files of a report as one set and return the folder.

    Raises:
        DataFileError: The folder cannot be written.
    """
    tensors, index = _pack(predictions)
    parts = [
        bytes_part("rows.csv", to_csv(rows).encode()),
        tensors_part(_TENSOR_FILE, tensors),
        bytes_part(_INDEX, json.dumps(index, indent=1).encode()),
    ]
    if pictures:
        entries = [
            {"condition": condition, "severity": severity, "caption": caption, "png": base64.b64encode(png).decode()}
            for condition, severity, png, caption in pictures
        ]
        parts.append(bytes_part(_GALLERY, json.dumps(entries, indent=1).encode()))
    write_folder(folder, parts, lambda names: bytes_part(_RECORD, to_json(rows, manifest, names).encode()), _GALLERY)
    return folder


def load(folder: Path) -> tuple[tuple[Row, ...], dict[str, Any], dict[str, PredictionStore], list[PictureData]]:
    """Read what ``save`` wrote, while another process may be writing it anew: all of one report, never of two.

    Raises:
        DataFileError: The folder holds no report, or a damaged one.
        ConfigError: Another schema.
    """
    who = f"Report.load({str(folder)!r})"
    unmoved = 0
    while True:
        before = _identity(folder)
        try:
            return _load(folder, who, before)
        except (OSError, KeyError, TypeError, ValueError) as error:
            # a new report.json comes before all else that is new; a file that moved between two looks stays there
            unmoved = unmoved + 1 if _identity(folder) == before else 0
            if unmoved < _TRIES and not isinstance(error, RobustlabError):
                continue
            _refuse(error, who)


def _load(
    folder: Path, who: str, identity: tuple[int, ...]
) -> tuple[tuple[Row, ...], dict[str, Any], dict[str, PredictionStore], list[PictureData]]:
    rows, manifest, names = _parse((folder / _RECORD).read_text(encoding="utf-8"), who)

    def digest(name: str) -> str | None:
        return None if names is None else names[name]

    index = json.loads(read_bytes(folder, _INDEX, digest(_INDEX)))
    tensors = read_tensors(folder, _TENSOR_FILE, digest(_TENSOR_FILE))
    # the names of tensors are their digests: if all that the index asks for are there, they are the right ones
    predictions = {entry["key"]: _unpack(entry, tensors) for entry in index}
    pictured = (folder / _GALLERY).exists() if names is None else _GALLERY in names
    entries = json.loads(read_bytes(folder, _GALLERY, digest(_GALLERY))) if pictured else []
    pictures = [(e["condition"], e["severity"], base64.b64decode(e["png"]), e["caption"]) for e in entries]
    if names is None and _identity(folder) != identity:
        raise ValueError("replaced while being read")
    return rows, manifest, predictions, pictures


def _refuse(error: Exception, who: str) -> NoReturn:
    if isinstance(error, RobustlabError):
        raise error
    if isinstance(error, OSError):
        raise DataFileError(
            who, "a folder that Report.save wrote", str(error), "Pass that folder; it holds report.json."
        ) from error
    raise DataFileError(
        who, "whole files", f"{type(error).__name__}: {error}", "The files are damaged: run the evaluation again."
    ) from error


def _identity(folder: Path) -> tuple[int, ...]:
    """Return what tells one report.json from the next one."""
    try:
        facts = (folder / _RECORD).stat()
    except OSError:
        return ()
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


def _number(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)


def _field(name: str, value: Any) -> Any:
    if name not in _FLOATS:
        return value
    return math.nan if value is None else float(value)


def _pack(predictions: Mapping[str, PredictionStore]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Name each distinct tensor by its content, so labels, hashed ids and groups are stored once; copy none."""
    tensors: dict[str, Tensor] = {}
    known: dict[int, str] = {}  # of tensors that the predictions hold, so that no other one takes over an id

    def add(tensor: Tensor) -> str:
        name = array_fingerprint([("", tensor)])
        tensors.setdefault(name, tensor)
        return name

    def keep(tensor: Tensor | None) -> str | None:
        if tensor is None:
            return None
        if id(tensor) not in known:
            known[id(tensor)] = add(tensor)
        return known[id(tensor)]

    def describe(key: str, store: PredictionStore) -> dict[str, Any]:
        return {
            "key": key,
            "n": len(store),
            "task": store.task,
            "ids": add(store.keys),
            **{name: keep(getattr(store, name)) for name in _TENSORS},
            "scores": {name: keep(value) for name, value in store.scores.items()},
            "score_reasons": dict(store.score_reasons),
            "groups": {name: keep(codes) for name, codes in store.groups.items()},
            **({"answers_only": True} if store.answers_only else {}),
        }

    # of a copy, so that what is derived here is not kept with the report
    return tensors, [describe(key, replace(store)) for key, store in predictions.items()]


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
        answers_only=entry.get("answers_only", False),
    )
