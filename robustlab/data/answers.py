"""Files of saved answers: JSONL, NPZ and Parquet become one table of ids, conditions, and numbers or classes."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from robustlab.core.checks import check_severity
from robustlab.core.errors import (
    ConfigError,
    DataFileError,
    DuplicateNameError,
    KindError,
    LabelError,
    MissingExtraError,
    RobustlabError,
    ShapeError,
)
from robustlab.core.types import OUTPUTS

from .columns import Array, as_array, encode_ids

AnswerKind = Literal["logits", "log_probs", "probs", "label"]
KINDS: tuple[AnswerKind, ...] = (*OUTPUTS, "label")

_KEY = re.compile(r"(?P<label>.+)@(?P<severity>\d+(\.\d+)?)")
_STEM = re.compile(r"(?P<label>.+?)(_(?P<number>\d+))?_s(?P<severity>\d+(\.\d+)?)(\.npz)?")
_LABEL_TYPES = frozenset({"int", "float", "str", "NoneType", "NAType"})
_Place = Callable[[int], str]


@dataclass(frozen=True, eq=False)
class Answers:
    """What a file of saved answers holds, one entry a row.

    Args:
        kind: What was saved.
        ids: int64 (R,), encoded as ``load_data`` encodes ids.
        conditions: Names of the conditions.
        codes: int64 (R,), index into ``conditions``.
        values: float32 (R, C) numbers as they were saved, NaN for rows without an answer; (R, 0) for classes.
        labels: int64 (R,) class indices; -1 for numbers, texts and missing answers.
        texts: int64 (R,) index into ``words``; -1 for everything that is no text.
        words: Distinct texts, stripped and case-folded.
        digits: All ids are texts of digits.
    """

    kind: AnswerKind
    ids: Tensor
    conditions: tuple[str, ...]
    codes: Tensor
    values: Tensor
    labels: Tensor
    texts: Tensor
    words: tuple[str, ...]
    digits: bool

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class _Columns:
    """Columns of a file before they are understood; ``place`` names a row in messages."""

    ids: Any
    conditions: Any
    kind: AnswerKind
    answers: Any
    place: _Place


def read_answers(path: Path, output: AnswerKind | None, who: str) -> Answers:
    """Read a file of saved answers.

    Args:
        path: A ``.jsonl`` (``.ndjson``), ``.npz`` or ``.parquet`` file.
        output: Kind to read where the rows hold several.
        who: Name used in messages.

    Raises:
        DataFileError: The file is missing, damaged, empty or lacks a column, or its rows hold different kinds.
        ShapeError: Rows have different numbers of columns.
        KindError: An id is neither an integer nor a text, or a number is none.
        LabelError: A label is no class index.
        ConfigError: A condition cannot be understood.
        DuplicateNameError: Two rows have one id and one condition.
        MissingExtraError: pyarrow is needed.
    """
    readers = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".npz": _read_npz, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if not path.is_file():
        raise DataFileError(who, "a file that exists", "no such file", "Check the path.")
    if reader is None:
        raise DataFileError(
            who, f"a file {', '.join(readers)}", path.suffix or "no suffix", "Save the answers as one of those."
        )
    try:
        columns = reader(path, output, who)
    except RobustlabError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise DataFileError(
            who,
            "a readable file without pickled objects",
            f"{type(error).__name__}: {error}",
            "Save it again: JSON lines in UTF-8, plain arrays, or Parquet.",
        ) from error
    return _understand(columns, who)


def condition_name(text: str, who: str) -> str:
    """Return the name of a condition as an evaluation uses it.

    Args:
        text: ``"clean"`` or empty, ``"val"``, ``"ood:NAME"``, ``"LABEL@SEVERITY"``, or the stem of a file that
            ``write_corrupted`` wrote, such as ``"gaussian-noise_s3"``. Severity 0 is clean.
        who: Name used in messages.

    Raises:
        ConfigError: None of these.
        RangeError: The severity lies above 5.
    """
    name = text.strip()
    if name in ("", "clean"):
        return "clean"
    if name == "val" or (name.startswith("ood:") and name != "ood:"):
        return name
    found = _KEY.fullmatch(name) or _STEM.fullmatch(name)
    if found is None:
        raise ConfigError(
            who,
            "a condition 'clean', 'val', 'ood:NAME' or 'LABEL@SEVERITY'",
            repr(text),
            "Copy it from the manifest of write_corrupted, e.g. 'gaussian-noise@3'; write a second scanner as "
            "'scanner-b@1'.",
        )
    parts = found.groupdict()
    severity = check_severity(float(parts["severity"]), who)
    if severity == 0:
        return "clean"
    number = parts.get("number")
    return f"{parts['label']}{f'#{number}' if number else ''}@{severity:g}"


def _read_jsonl(path: Path, output: AnswerKind | None, who: str) -> _Columns:
    records: list[Any] = []
    lines: list[int] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise DataFileError(
                    f"{who}, line {number}", "one JSON object a line", str(error), "Write one object a line."
                ) from error
            lines.append(number)

    def place(row: int) -> str:
        return f"{who}, line {lines[row]}"

    odd = _first(type(record) is not dict for record in records)
    if odd is not None:
        raise DataFileError(place(odd), "a JSON object", type(records[odd]).__name__, "Write one object a line.")
    _some_rows(records, who)
    odd = _first(record.get("id") is None for record in records)
    if odd is not None:
        raise DataFileError(place(odd), "a key 'id'", ", ".join(records[odd]) or "no keys", "Name the sample.")
    kinds: list[tuple[AnswerKind, ...]] = [tuple(kind for kind in KINDS if kind in record) for record in records]
    kind = _one_kind(kinds[0], output, place(0))
    wanted = kinds[0] if output is None else (kind,)
    odd = _first(not set(wanted) <= set(row) if output else row != wanted for row in kinds)
    if odd is not None:
        raise DataFileError(
            place(odd),
            f"an answer under {kind!r}, as in the first row",
            ", ".join(map(repr, kinds[odd])) or "none",
            "Save one kind of answer in a file; pass output= where rows hold several.",
        )
    conditions = [record.get("condition") for record in records]
    return _Columns([r["id"] for r in records], conditions, kind, [r[kind] for r in records], place)


def _read_npz(path: Path, output: AnswerKind | None, who: str) -> _Columns:
    with np.load(path, allow_pickle=False) as archive:
        known = {"id", "ids", "condition", "conditions", "labels", *KINDS}
        arrays: dict[str, Any] = {name: archive[name] for name in archive.files if name in known}
        have = archive.files
    ids = _column(arrays, ("ids", "id"), have, who)
    _some_rows(ids, who)
    conditions = arrays.get("conditions", arrays.get("condition"))
    if conditions is not None and conditions.ndim == 0:
        conditions = np.full(len(ids), conditions)
    return _from_table({_singular(name): array for name, array in arrays.items()}, ids, conditions, output, who)


def _read_parquet(path: Path, output: AnswerKind | None, who: str) -> _Columns:
    import pandas as pd

    try:
        frame = pd.read_parquet(path, engine="pyarrow")
    except ImportError as error:
        raise MissingExtraError(
            who, "the package pyarrow, which reads Parquet", "no such package", "Run: pip install pyarrow"
        ) from error
    have = [str(name) for name in frame.columns]
    columns: dict[str, Any] = {str(name): frame[name].to_numpy() for name in frame.columns}
    ids = _column(columns, ("id", "ids"), have, who)
    _some_rows(ids, who)
    for kind in OUTPUTS:
        numbered = {int(name.removeprefix(f"{kind}_")): name for name in have if re.fullmatch(rf"{kind}_\d+", name)}
        if numbered and sorted(numbered) != list(range(len(numbered))):
            raise ShapeError(
                who,
                f"columns {kind}_0 to {kind}_{len(numbered) - 1}",
                ", ".join(numbered[index] for index in sorted(numbered)),
                "Number them from 0 without a gap, one a class.",
            )
        if numbered:
            columns[kind] = np.stack([_numbers(columns[numbered[i]], who) for i in range(len(numbered))], axis=1)
    conditions = columns.get("condition", columns.get("conditions"))
    return _from_table({_singular(name): array for name, array in columns.items()}, ids, conditions, output, who)


def _from_table(table: Mapping[str, Any], ids: Any, conditions: Any, output: AnswerKind | None, who: str) -> _Columns:
    """Pick the answers of one kind from named arrays, all of the length of ``ids``."""
    found: tuple[AnswerKind, ...] = tuple(kind for kind in KINDS if kind in table)
    kind = _one_kind(found, output, who)
    for name, column in (("conditions", conditions), (kind, table[kind])):
        if column is not None and (column.ndim == 0 or len(column) != len(ids)):
            raise ShapeError(
                who, f"{len(ids)} rows of {name}, one an id", f"shape {column.shape}", "Save them together."
            )
    return _Columns(ids, conditions, kind, table[kind], lambda row: f"{who}, row {row + 1}")


def _singular(name: str) -> str:
    return "label" if name == "labels" else name


def _column(columns: Mapping[str, Any], names: Sequence[str], have: Sequence[str], who: str) -> Any:
    for name in names:
        if name in columns:
            return columns[name]
    raise DataFileError(who, f"a column {names[0]!r}", ", ".join(have) or "none at all", "Name each row's sample.")


def _some_rows(rows: Any, who: str) -> None:
    if len(rows) == 0:
        raise DataFileError(who, "at least one answer", "an empty file", "Run the model again and save its answers.")


def _one_kind(found: tuple[AnswerKind, ...], output: AnswerKind | None, who: str) -> AnswerKind:
    if output is not None and output in found:
        return output
    if output is None and len(found) == 1:
        return found[0]
    raise DataFileError(
        who,
        f"answers under {output!r}" if output else f"one of {', '.join(map(repr, KINDS))}",
        " and ".join(map(repr, found)) or "none",
        f"Pass output={found[0]!r} to read that." if found else "Save the model's answers beside the ids.",
    )


def _understand(columns: _Columns, who: str) -> Answers:
    """Turn columns into tensors, and refuse what cannot be meant."""
    ids, digits = _ids(columns, who)
    names, codes = _conditions(columns, len(ids))
    order = np.lexsort((codes, ids))  # stable, so of equal rows the later ones follow
    twice = order[1:][(np.diff(ids[order]) == 0) & (np.diff(codes[order]) == 0)]
    if len(twice):
        first = int(twice.min())
        raise DuplicateNameError(
            columns.place(first),
            "one answer for a sample under a condition",
            f"a second one under {names[codes[first]]!r} ({len(twice)} such rows in all)",
            "Keep one of them; answers of the validation set belong under 'val'. Severity 0 is the clean data.",
        )
    nothing = torch.full((len(ids),), -1, dtype=torch.int64)
    words: tuple[str, ...] = ()
    labels = texts = nothing
    values = torch.empty((len(ids), 0))
    if columns.kind == "label":
        labels, texts, words = _labels(columns)
    else:
        values = torch.from_numpy(_matrix(columns)).to(torch.float32)
    return Answers(
        columns.kind, torch.from_numpy(ids), names, torch.from_numpy(codes), values, labels, texts, words, digits
    )


def _ids(columns: _Columns, who: str) -> tuple[Array, bool]:
    ids = columns.ids if isinstance(columns.ids, list) else columns.ids.tolist()
    kinds = set(map(type, ids))
    if kinds not in ({int}, {str}):
        odd = _first(type(item) is not (int if type(ids[0]) is int else str) for item in ids) or 0
        raise KindError(
            columns.place(odd),
            "ids that are all integers or all texts",
            type(ids[odd]).__name__,
            "Save the ids of the files that write_corrupted wrote, or those that load_data(ids=...) got.",
        )
    array = np.array(ids) if kinds == {int} else np.array(ids, dtype=object)
    codes, distinct = _factorize(array)
    encoded = encode_ids(distinct, len(distinct), who).numpy()
    digits = kinds == {str} and all(item.removeprefix("-").isdigit() for item in distinct.tolist())
    return encoded[codes], digits


def _conditions(columns: _Columns, count: int) -> tuple[tuple[str, ...], Array]:
    """Return the names of the conditions in the order of the file, and int64 codes (N,)."""
    if columns.conditions is None:
        return ("clean",), np.zeros(count, dtype=np.int64)
    codes, distinct = _factorize(np.array(columns.conditions, dtype=object))
    names = []
    for code, item in enumerate(distinct.tolist()):
        place = columns.place(int(np.argmax(codes == code)))
        if not isinstance(item, str):
            raise ConfigError(place, "a condition as a text", repr(item), "Write e.g. 'gaussian-noise@3'.")
        names.append(condition_name(item, place))
    names.append("clean")  # of rows without a condition, whose code is -1
    every, known = _factorize(np.array(names, dtype=object)[codes])
    return tuple(known.tolist()), every


def _labels(columns: _Columns) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return class indices, codes of texts, and the texts; -1 where there is none."""
    items = columns.answers
    array = items if isinstance(items, np.ndarray) else np.array([*items, None], dtype=object)[:-1]
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    plain = array.tolist()
    odd = _first(type(item).__name__ not in _LABEL_TYPES for item in plain)
    if odd is not None:
        _no_class(columns.place(odd), plain[odd])
    codes, distinct = _factorize(np.array(plain, dtype=object))
    labels, texts = (np.full(len(distinct) + 1, -1, dtype=np.int64) for _ in range(2))
    words: dict[str, int] = {}
    for code, item in enumerate(distinct.tolist()):
        if isinstance(item, str):
            word = item.strip().casefold()
            texts[code] = words.setdefault(word, len(words)) if word else -1
        elif item < 0 or item % 1 != 0:
            _no_class(columns.place(int(np.argmax(codes == code))), item)
        else:
            labels[code] = int(item)
    return torch.from_numpy(labels[codes]), torch.from_numpy(texts[codes]), tuple(words)


def _no_class(place: str, item: object) -> NoReturn:
    raise LabelError(
        place,
        "a class index from 0, a class name, or null",
        repr(item) if isinstance(item, (int, float)) else type(item).__name__,
        "Write null (NaN in NPZ files) for an answer that could not be parsed.",
    )


def _matrix(columns: _Columns) -> Array:
    """Return float64 (N, C) numbers; rows without an answer are NaN."""
    items = columns.answers
    if isinstance(items, np.ndarray) and items.dtype.kind != "O":
        numbers = _numbers(items, columns.place(0))
        return _checked(numbers[:, None] if numbers.ndim == 1 else numbers, columns)
    rows = [item if item is None or isinstance(item, (list, np.ndarray)) else [item] for item in items]
    given = [index for index, row in enumerate(rows) if row is not None]
    present = [row for row in rows if row is not None]
    if not present:
        raise DataFileError(columns.place(0), "an answer in some row", "none in any", "Save the model's answers.")
    width = len(present[0])
    odd = _first(len(row) != width for row in present)
    if odd is not None:
        raise ShapeError(
            columns.place(given[odd]),
            f"{width} numbers, as in the rows before",
            f"{len(present[odd])}",
            "Save one number a class in every row.",
        )
    flat = np.concatenate(present) if isinstance(present[0], np.ndarray) else np.array([*chain.from_iterable(present)])
    if flat.dtype.kind not in "iuf":
        odd = _first(any(not _is_number(value) for value in row) for row in present)
        flat = np.array([*chain.from_iterable(present)], dtype=np.float64) if odd is None else flat
        if odd is not None:
            _no_number(columns.place(given[odd]))
    out = np.full((len(rows), width), np.nan)
    out[given] = flat.reshape(len(present), width)
    return _checked(out, columns)


def _checked(numbers: Array, columns: _Columns) -> Array:
    if numbers.ndim != 2 or numbers.shape[1] == 0:
        raise ShapeError(
            columns.place(0), "one number a class in every row", f"shape {numbers.shape}", "Save (N, classes) numbers."
        )
    return numbers


def _numbers(column: Any, who: str) -> Array:
    array = as_array(column)
    if array.dtype.kind not in "iuf":
        _no_number(who)
    return array.astype(np.float64)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float, np.number)) and not isinstance(value, bool))


def _no_number(place: str) -> NoReturn:
    raise KindError(place, "numbers", "something else", "Save plain numbers, null or NaN for a missing one.")


def _factorize(values: Array) -> tuple[Array, Array]:
    """Return int64 codes (N,), -1 for missing values, and the distinct values in order of appearance."""
    import pandas as pd

    codes, distinct = pd.factorize(values, use_na_sentinel=True)
    return codes.astype(np.int64), np.asarray(distinct)


def _first(flags: Any) -> int | None:
    """Return the position of the first true flag."""
    return next((index for index, flag in enumerate(flags) if flag), None)
