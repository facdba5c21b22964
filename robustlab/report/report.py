"""Report: frozen rows and a manifest; everything that people look at is a view of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustlab.core.errors import UnknownNameError
from robustlab.metrics.store import PredictionStore

from . import files
from .folder import write_file
from .rows import Row

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Picture:
    """One picture of the gallery.

    Args:
        condition: Shift label, or ``"clean"``.
        severity: 0 for clean.
        png: A PNG file's bytes.
        caption: A few words, e.g. the answer and its confidence.
    """

    condition: str
    severity: float
    png: bytes
    caption: str


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """What an evaluation found.

    Args:
        rows: All numbers, in long format.
        manifest: What was run, with what, and what was not tested; JSON types (NaN becomes null).
        predictions: Condition key (``"clean"``, ``"gaussian-noise@3"``, ``"ood:far/photos"``) to predictions.
        gallery: Pictures; empty unless they were asked for.
    """

    rows: tuple[Row, ...]
    manifest: Mapping[str, Any]
    predictions: Mapping[str, PredictionStore] = field(default_factory=dict)
    gallery: tuple[Picture, ...] = ()

    def __post_init__(self) -> None:
        plain = files.plain_json({"schema": files.SCHEMA, **self.manifest})
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "manifest", plain)

    def __repr__(self) -> str:
        model, data = (self.manifest.get(key) or {} for key in ("model", "data"))
        return f"<Report of {model.get('name', 'model')} on {data.get('name', 'data')}: {len(self.rows)} rows>"

    def value(
        self,
        metric: str,
        shift: str = "clean",
        severity: float = 0,
        group: str = "",
        target: str = "",
        scorer: str = "",
        data: str | None = None,
    ) -> Row:
        """Return the one row of a number.

        Args:
            metric: Metric name, e.g. ``"accuracy"``.
            shift: Shift label, ``"clean"``, ``"worst"`` or ``"worst plausible"``.
            severity: 0 for clean; ignored for the two worst rows, which name their condition in ``target``.
            group: ``"column=level"``, or empty for everybody.
            target: Class or label, or empty.
            scorer: Detector, or empty.
            data: Data name, or None for any.

        Raises:
            UnknownNameError: No row, or more than one, answers to that.
        """
        asked = {"metric": metric, "shift": shift, "group": group, "target": target, "scorer": scorer}
        worst = shift in ("worst", "worst plausible")
        if worst and not target:
            del asked["target"]
        found = [
            row
            for row in self.rows
            if all(getattr(row, name) == wanted for name, wanted in asked.items())
            and (worst or math.isclose(row.severity, severity, abs_tol=1e-9))
            and (data is None or row.data == data)
        ]
        if len(found) == 1:
            return found[0]
        question = ", ".join(f"{name}={wanted!r}" for name, wanted in asked.items() if wanted)
        raise UnknownNameError(
            f"Report.value({question}, severity={severity:g})",
            "exactly one row",
            f"{len(found) or 'no'} rows",
            _hint(self.rows, found, {**asked, "severity": severity}, data),
        )

    def summary(self) -> str:
        """Return the findings as plain text for a terminal."""
        from .text import summary

        return summary(self)

    def to_frame(self) -> pd.DataFrame:
        """Return the rows as a data frame, one column a field of ``Row``."""
        import pandas as pd

        return pd.DataFrame([files.row_values(row) for row in self.rows], columns=list(files.COLUMNS))

    def minimal_budgets(self) -> pd.DataFrame:
        """Return the smallest tested budget at which each sample was made wrong, for every attack.

        Columns: ``attack`` (of several that share budgets also the worst of them, sample by sample), ``sample`` (its
        hashed id), ``unit`` of the budgets, ``holds_at`` the largest budget below at which the answer was right (NaN
        where the clean answer is wrong), ``falls_at`` the smallest at which it was wrong (0 where the clean answer is,
        NaN where it held at all of them). The smallest budget that fools lies between the two: attacks find bounds.

        Needs the predictions, which ``save`` keeps. Empty for models whose answers are random: single passes fall by
        chance.
        """
        import pandas as pd

        from .budgets import minimal_budgets

        return pd.DataFrame(minimal_budgets(self))

    def most_confusing(self, count: int = 5) -> pd.DataFrame:
        """Return, for every score, the foreign samples that look most known, and the known ones that look most foreign.

        Columns: ``scorer``, ``kind`` (``"looks known"`` or ``"looks foreign"``), ``data`` the set, ``sample`` its
        hashed id, ``row`` its place in the predictions of that set, ``score``, and ``share``: of the known samples
        those that look stranger, or of the foreign ones those that look more familiar.

        Needs the predictions, which ``save`` keeps.

        Args:
            count: Samples of each set and score.
        """
        import pandas as pd

        from .confusing import table

        return pd.DataFrame(table(self, count))

    def to_json(self) -> str:
        """Return rows and manifest as JSON text; NaN is null, and the row's reason says why."""
        return files.to_json(self.rows, self.manifest)

    @staticmethod
    def from_json(text: str) -> Report:
        """Rebuild a report, without predictions and gallery, from ``to_json``.

        Raises:
            ConfigError: Not a report, or written under another schema.
        """
        rows, manifest = files.from_json(text, "Report.from_json")
        return Report(rows, manifest)

    def save(self, folder: str | Path) -> Path:
        """Write report.json, rows.csv, predictions.safetensors with predictions.json, and gallery.json if there is one.

        Sample ids are stored hashed (``PredictionStore.keys``); saved reports can still be compared, sample by sample.

        The files change as one: ``load`` finds the old report or the new one, also while this runs and after it was
        killed, and the next save removes what a killed one left.

        Raises:
            DataFileError: The folder cannot be written.
        """
        pictures = [(p.condition, p.severity, p.png, p.caption) for p in self.gallery]
        return files.save(Path(folder), self.rows, self.manifest, self.predictions, pictures)

    @staticmethod
    def load(folder: str | Path) -> Report:
        """Read what ``save`` wrote.

        Raises:
            DataFileError: The folder holds no report, or a damaged one.
            ConfigError: The report was written under another schema.
        """
        rows, manifest, predictions, pictures = files.load(Path(folder))
        return Report(rows, manifest, predictions, tuple(Picture(*picture) for picture in pictures))

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained HTML file that needs no network.

        Raises:
            DataFileError: The file cannot be written.
        """
        from .html.page import render

        return write_file(Path(path), render(self).encode())


def _hint(rows: tuple[Row, ...], found: list[Row], asked: dict[str, Any], data: str | None) -> str:
    """Say which value to change: the first field for which no row exists, with what exists instead."""
    if found:
        fields = ("data", "model", "target", "scorer")
        differ = {name: sorted({getattr(row, name) for row in found}) for name in fields}
        return "Choose among " + "; ".join(f"{k}: {', '.join(map(repr, v))}" for k, v in differ.items() if len(v) > 1)
    left = list(rows) if data is None else [row for row in rows if row.data == data]
    if not left:
        names = ", ".join(sorted({repr(row.data) for row in rows})) or "none at all"
        return f"data is one of: {names}."
    for name, wanted in asked.items():
        kept = [row for row in left if getattr(row, name) == wanted]
        if not kept:
            have = ", ".join(f"{v!r}" for v in sorted({getattr(row, name) for row in left})[:12])
            return f"With the rest as asked, {name} is one of: {have}."
        left = kept
    return "Look at Report.to_frame()."
