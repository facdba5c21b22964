"""Saved predictions as a model: the answers of a model that ran elsewhere, looked up by sample and condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from robustlab.core.errors import ConfigError, KindError, LabelError, ModelError, ShapeError
from robustlab.core.logits import to_logits
from robustlab.core.model import Model
from robustlab.core.source import Source
from robustlab.core.spec import array_fingerprint
from robustlab.core.types import TASKS, Batch, ModelOutputs, Task

from .answers import KINDS, AnswerKind, Answers, read_answers

_SUM_TOLERANCE = 0.02
"""By how much rounded probabilities may miss one."""


class SavedPredictions(Model):
    """Answers that a model gave elsewhere, on clean and on corrupted data; made by ``load_predictions``.

    Pass it to ``evaluate_under_shift`` in place of a model. It cannot run on images.

    Args:
        answers: The rows of the file.
        file: Name of the file.
        task: Declared task; None takes the data's.
        num_classes: Declared number of classes; None counts the saved numbers, or takes the data's classes.
        class_names: Declared names of the classes; None takes the data's where answers are texts.
        model_name: Name in reports.
        source: Data from which the rest is taken; see ``bind``.
    """

    def __init__(
        self,
        answers: Answers,
        *,
        file: str,
        task: Task | None,
        num_classes: int | None,
        class_names: tuple[str, ...] | None,
        model_name: str,
        source: Source | None = None,
    ) -> None:
        info = None if source is None else source.info
        self._answers = answers
        self._file = file
        self._declared = (task, num_classes)
        self._names = class_names if info is None else class_names or info.class_names
        self._highest = -1 if info is None or info.labels is None else int(info.labels.max())
        self.task = task or (info.task if info is not None else None) or "multiclass"
        self.class_names = class_names
        self.model_name = model_name
        self.has_offset = answers.kind == "logits"
        self.answers_only = answers.kind == "label"
        self._bound = info is not None
        self._lookup: dict[str, tuple[Tensor, Tensor]] = {}
        self._check()

    @property
    def kind(self) -> AnswerKind:
        """What was saved."""
        return self._answers.kind

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions with answers, in the order of the file."""
        return self._answers.conditions

    @cached_property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of classes; for classes saved without ``num_classes`` or names, as many as occur in file or data."""
        declared = self._declared[1]
        if declared is not None:
            return declared
        if not self.answers_only:
            return self._rows.shape[1]
        if self._names is not None:
            return len(self._names)
        if not self._bound:
            raise ModelError(
                self._who,
                "a known number of classes",
                "none yet",
                "Pass num_classes= or class_names=, or use .bind(data).",
            )
        return max(int(self._answers.labels.max()), self._highest, 1) + 1

    def bind(self, source: Source) -> SavedPredictions:
        """Return the same answers with what was not declared taken from the data: task, classes and their names.

        Raises:
            ConfigError: Classes were saved and the data have several labels an image, or texts and there are no names.
            LabelError: A class index or every text is none of the classes.
            ModelError: Saved numbers are no probabilities.
        """
        return SavedPredictions(
            self._answers,
            file=self._file,
            task=self._declared[0],
            num_classes=self._declared[1],
            class_names=self.class_names,
            model_name=self.model_name,
            source=source,
        )

    def answers(self, condition: str, source: Source) -> Tensor:
        """Return float32 (N, C) logits for the samples of a source, in its order.

        Rows are NaN where an answer is missing or could not be parsed. For classes a row is 1 at the answer and 0
        elsewhere.

        Args:
            condition: One of ``conditions``.
            source: The data; samples are found by id.

        Raises:
            ConfigError: There is no such condition, or a sample has no row.
        """
        wanted = source.info.ids
        rows, found = self._find(condition, wanted)
        if not bool(found.all()):
            raise _missing(condition, source, found, self._who, self._answers.digits)
        if not self.answers_only:
            return self._rows[rows]
        given = self._classes[rows]
        hot = torch.zeros((len(rows), self.num_classes)).scatter_(1, given.clamp_min(0)[:, None], 1.0)
        return torch.where(given[:, None] < 0, torch.nan, hot)

    def matches(self, condition: str, source: Source) -> tuple[int, int]:
        """Return how many samples of a source have a row under a condition, and how many rows belong to no sample."""
        _, found = self._find(condition, source.info.ids)
        count = int(found.sum())
        return count, len(self._index(condition)[0]) - count

    def outputs(self, batch: Batch) -> ModelOutputs:
        self._refuse_images()

    def predict(self, batch: Batch) -> ModelOutputs:
        """Refuse: saved answers cannot run on images."""
        self._refuse_images()

    def modules(self) -> Sequence[nn.Module]:
        return ()

    def settings(self) -> Mapping[str, Any]:
        return {
            "file": self._file,
            "answers": self.kind,
            "task": self.task,
            "rows": len(self._answers),
            "conditions": len(self.conditions),
        }

    def fingerprint(self) -> str:
        """Return a hash of the answers, their conditions, the task and the class names; the file's name has no part."""
        answers = self._answers
        facts = repr((answers.kind, answers.conditions, answers.words, self.task, self._declared[1], self.class_names))
        arrays = [(name, getattr(answers, name)) for name in ("ids", "codes", "values", "labels", "texts")]
        return array_fingerprint([("facts", torch.tensor(list(facts.encode()), dtype=torch.uint8)), *arrays])

    @property
    def _who(self) -> str:
        return f"saved predictions {self._file!r}"

    @cached_property
    def _rows(self) -> Tensor:
        """float32 (R, C) logits of the file's rows."""
        fix = "Save them under the name of what they are: 'logits', 'log_probs' or 'probs'."
        return to_logits(self._answers.values, self._answers.kind, self.task, self._who, fix)  # type: ignore[arg-type]

    @cached_property
    def _classes(self) -> Tensor:
        """int64 (R,) class of the file's rows; -1 where the answer could not be parsed."""
        return _classes(self._answers, self._names, self._who)

    def _check(self) -> None:
        """Refuse now what would fail in every condition."""
        if not self.answers_only:
            if self._bound or self._declared[0] is not None:
                _check_sums(self._answers, self.task, self._who)
            _check_columns(self._rows.shape[1], self._declared[1], self.class_names, self._who)
            return
        if self.task == "multilabel":
            raise ConfigError(
                self._who,
                "probabilities or logits of every label, for a multi-label task",
                "one class a row",
                "Save the model's probabilities.",
            )
        known = self._bound or self._declared[1] is not None or self._names is not None
        if known and int(self._answers.labels.max()) >= self.num_classes:
            raise _no_class(self._answers, self.num_classes, self._who)
        if self._bound or self._names is not None:
            _ = self._classes

    def _index(self, condition: str) -> tuple[Tensor, Tensor]:
        """Return the ids of a condition, ascending, and their rows."""
        if condition not in self._lookup:
            if condition not in self.conditions:
                raise _no_condition(condition, self.conditions, self._who)
            rows = (self._answers.codes == self.conditions.index(condition)).nonzero()[:, 0]
            ids, order = torch.sort(self._answers.ids[rows])
            self._lookup[condition] = (ids, rows[order])
        return self._lookup[condition]

    def _find(self, condition: str, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return int64 (N,) rows of the wanted ids, and bool (N,): the id was found."""
        ids, rows = self._index(condition)
        place = torch.searchsorted(ids, wanted).clamp_max(len(ids) - 1)
        return rows[place], ids[place] == wanted

    def _refuse_images(self) -> NoReturn:
        raise ModelError(
            self._who,
            "a model that runs",
            "saved answers, which cannot run on images",
            "Write the images with write_corrupted, run the model on those files, and add its answers to the file.",
        )


def _classes(answers: Answers, names: tuple[str, ...] | None, who: str) -> Tensor:
    """Return int64 (R,) class indices, with texts looked up among the class names; -1 for what is none."""
    if not answers.words:
        return answers.labels
    if names is None:
        raise ConfigError(
            who,
            "class_names, as answers are texts",
            "none declared and none in the data",
            "Pass class_names= to load_predictions, in the order of the labels.",
        )
    order = {name.strip().casefold(): index for index, name in enumerate(names)}
    table = torch.tensor([*(order.get(word, -1) for word in answers.words), -1])
    if int(table.max()) < 0 and int(answers.labels.max()) < 0:
        raise LabelError(
            who,
            f"answers among the class names {', '.join(names)}",
            f"{len(answers.words)} different texts, none of them one",
            "Pass the class_names= that the model answers with, in the order of the labels.",
        )
    return torch.where(answers.texts >= 0, table[answers.texts], answers.labels)


def _no_class(answers: Answers, classes: int, who: str) -> LabelError:
    return LabelError(
        who,
        f"class indices from 0 to {classes - 1}",
        f"class {int(answers.labels.max())}",
        "Count classes from 0, write null for what could not be parsed, or pass the right num_classes=.",
    )


def _check_sums(answers: Answers, task: Task, who: str) -> None:
    """Refuse several probabilities a row that do not sum to one."""
    values = answers.values
    if answers.kind not in ("probs", "log_probs") or values.shape[1] < 2 or task == "multilabel":
        return
    sums = (values if answers.kind == "probs" else values.exp()).double().sum(1)
    odd = (sums - 1).abs() > _SUM_TOLERANCE  # NaN is a broken answer, and counts as one
    if bool(odd.any()):
        raise ModelError(
            who,
            "probabilities that sum to 1",
            f"{int(odd.sum())} rows that do not, the first with a sum of {float(sums[odd][0]):.3g}",
            "Save logits, or pass task='multilabel' if every column stands for itself.",
        )


def _check_columns(columns: int, classes: int | None, names: tuple[str, ...] | None, who: str) -> None:
    for wanted, what in ((classes, "num_classes"), (None if names is None else len(names), "class_names")):
        if wanted is not None and wanted != columns:
            raise ShapeError(
                who,
                f"numbers for {wanted} classes, as {what} says",
                f"{columns} a row",
                f"Correct {what}, or save one number a class.",
            )


def _no_condition(condition: str, have: Sequence[str], who: str) -> ConfigError:
    return ConfigError(
        who,
        f"answers under {condition!r}",
        f"answers under {', '.join(map(repr, have))}",
        f"Run the model on those data too, and save its answers with the condition {condition!r}.",
    )


def _missing(condition: str, source: Source, found: Tensor, who: str, digits: bool) -> ConfigError:
    count = int((~found).sum())
    fix = f"Run the model on the missing ones too, e.g. the one at position {int((~found).nonzero()[0])} of the data."
    if count == len(found):
        fix = "Save the ids in the files of write_corrupted, or give the file's ids to load_data(ids=...)."
        if digits:
            fix = "The file's ids are texts of digits, which are hashed: save numbers where the data have numbers."
    return ConfigError(
        who,
        f"an answer under {condition!r} for all {len(found)} samples of {source.info.name!r}",
        f"none for {count} of {len(found)}",
        fix,
    )


def load_predictions(
    path: str | Path,
    *,
    task: Task | None = None,
    output: AnswerKind | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    name: str | None = None,
) -> SavedPredictions:
    """Load the answers of a model that ran elsewhere, to evaluate them like a model.

    The rows of a file have an id, a condition and an answer:

    - id: as in the files that ``write_corrupted`` wrote, or as given to ``load_data(ids=...)``: integers, or texts.
    - condition: ``"clean"`` (also where it is left out), ``"gaussian-noise@3"`` (shift and severity, as the manifest of
      ``write_corrupted`` says; the stem ``"gaussian-noise_s3"`` of its file means the same), any other ``"NAME@1"`` for
      data robustlab did not make, ``"val"`` for validation data, and ``"ood:NAME"`` for the set NAME of ``ood=``.
      Answers for validation data may also stand under ``"clean"``, if no id is in both sets and there is no ``"val"``.
    - answer: ``logits``, ``log_probs`` or ``probs`` with one number a class (one number alone is one sigmoid), or
      ``label``: a class index, or a class name (case and outer spaces do not matter). null, and a text that is no class
      name, is an answer that could not be parsed: it is wrong, and counted.

    JSONL has one object a line; NPZ arrays ``ids``, ``conditions``, and ``logits`` (R, C), ... or ``labels``, without
    pickle; Parquet columns ``id``, ``condition``, and ``logits`` as a list or ``logits_0``, ``logits_1``, ...

    Args:
        path: A ``.jsonl``, ``.npz`` or ``.parquet`` file.
        task: ``"binary"``, ``"multiclass"`` or ``"multilabel"``; the task of the data if not given.
        output: Which answer to read, where rows have several: ``"logits"``, ``"log_probs"``, ``"probs"``, ``"label"``.
        num_classes: Number of classes.
        class_names: Names of the classes, in the order of the labels.
        name: Name in reports; the file's name if not given.

    Raises:
        DataFileError: The file is missing, damaged or empty, or mixes kinds of answers.
        ShapeError: Rows differ in length, or do not fit ``num_classes``.
        KindError: An id is neither an integer nor a text, or a number is none.
        LabelError: A label is no class.
        ModelError: Numbers called probabilities are none.
        ConfigError: An argument or a condition has no meaning.
        DuplicateNameError: A sample has two answers under one condition.
        MissingExtraError: pyarrow, which reads Parquet, is not installed.
    """
    given: object = path
    if not isinstance(given, (str, Path)):
        raise KindError("load_predictions", "a path", type(given).__name__, "Save the answers to a file first.")
    who = f"load_predictions({str(path)!r})"
    for label, value, allowed in (("task", task, TASKS), ("output", output, KINDS)):
        if value is not None and value not in allowed:
            raise ConfigError(who, f"{label} among {', '.join(allowed)}", repr(value), "Check the spelling.")
    names = None if class_names is None else tuple(class_names)
    if names is not None and len({item.strip().casefold() for item in names}) != len(names):
        raise ConfigError(who, "class names that differ in more than case", ", ".join(names), "Name each class once.")
    if num_classes is not None and (num_classes < 1 or (names is not None and len(names) != num_classes)):
        have = f"{num_classes}" if names is None else f"{num_classes} and {len(names)} class_names"
        raise ConfigError(who, "num_classes as the number of classes", have, "Leave one of the two out.")
    file = Path(path).expanduser()
    return SavedPredictions(
        read_answers(file, output, who),
        file=file.name,
        task=task,
        num_classes=num_classes,
        class_names=names,
        model_name=name or file.stem,
    )
