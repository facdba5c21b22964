"""ood_report: does the model notice what it was never meant for, by which score, and is the difference noise?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from robustlab.core.detector import Detector
from robustlab.core.errors import ConfigError
from robustlab.core.shift import Shift
from robustlab.metrics import compute, full_spectrum
from robustlab.metrics.base import Context, Estimate, Frozen
from robustlab.metrics.detectors import Areas, area_difference, areas_of, mean_area
from robustlab.metrics.resample import Resampler
from robustlab.metrics.stats import delong
from robustlab.metrics.store import PredictionStore
from robustlab.report.report import Report
from robustlab.report.rows import Row

from .api import evaluate_under_shift
from .plan import CLEAN
from .score import Subject, make_row

DETECTORS = ("msp", "energy", "gen", "react", "scale", "mds", "rmd", "knn", "vim", "residual")
METRICS = (
    "accuracy", "silent-failure-rate", "referred-share", "false-alarms", "score-failure-auroc", "auroc-ood",
    "aupr-ood-pos", "aupr-id-pos", "fpr95-ood-pos", "fpr95-id-pos", "detected",
)  # fmt: skip
FULL_SPECTRUM = "full spectrum"
AUROC, DIFFERENCE = "auroc-ood", "auroc-ood-difference"
GROUPS = ("near", "far", "shift")


def ood_report(
    model: Any,
    data: Any,
    *,
    ood: Mapping[str, Any],
    val: Any = None,
    fit: Any = None,
    detectors: Sequence[str | Detector] = DETECTORS,
    shifts: str | Shift | Sequence[str | Shift] = (),
    severities: Sequence[float] = (1, 3, 5),
    cluster: str | None = None,
    referral: float = 0.1,
    seed: int = 0,
    replicates: int = 1000,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    cache: str | Path | None = None,
    executor: Executor | None = None,
    gallery: bool = False,
    progress: bool = True,
) -> Report:
    """Evaluate detectors of foreign inputs, with an interval on every number.

    Beside what ``evaluate_under_shift`` says of the data and of each set (AUROC, AUPR and FPR95 both ways), it holds
    for every score: what is detected at the threshold that flags at most 5 % of ``val``, and the false alarms there;
    whether the score also finds wrong answers; means over the sets of a group (rows ``"ID vs near/*"``); AUROC against
    clean and corrupted data together (``group="full spectrum"``); how well corrupted data are told from clean ones,
    which is best near 0.5 (rows ``"ID vs shift/..."``); and how much each other score differs from the first, paired on
    the same images (``auroc-ood-difference``, ``target`` the first score).

    Args:
        model: As in ``evaluate_under_shift``.
        data: Labelled in-distribution test data.
        ood: Name to foreign data. Names that begin with ``near/``, ``far/`` or ``shift/`` are also taken together.
        val: Clean validation data: sets the thresholds. Nothing is ever tuned on the sets of ``ood``.
        fit: In-distribution training data, for detectors that learn.
        detectors: Scores to compare; differences are from the first.
        shifts: Corruptions that the data may have and that should not be flagged.
        severities: At which they are run.
        cluster: Column with the independent unit, e.g. ``"patient"``.
        referral: See ``evaluate_under_shift``, like all arguments below.
        seed: Seed of every draw.
        replicates: Bootstrap replicates.
        batch_size: Samples of a forward pass.
        device: Where to run.
        cache: Folder that keeps answers and scores.
        executor: Where to run.
        gallery: Put pictures into the report: an example, and the most confusing images.
        progress: Show a progress bar.

    Returns:
        A ``Report``.

    Raises:
        RobustlabError: Something does not fit.
        ConfigError: There is no foreign set.

    References:
        Yang et al., Full-spectrum out-of-distribution detection, 2022, arXiv 2204.05306; Zhang et al., OpenOOD v1.5,
        2023, arXiv 2306.09301; DeLong et al. 1988.
    """
    if not ood:
        hint = "Pass ood={'near/other-site': b, 'far/photos': p}."
        raise ConfigError("ood_report", "at least one foreign set", "none", hint)
    report = evaluate_under_shift(
        model,
        data,
        val=val,
        shifts=shifts,
        severities=severities,
        ood=ood,
        detectors=detectors,
        fit=fit,
        metrics=METRICS,
        cluster=cluster,
        referral=referral,
        seed=seed,
        replicates=replicates,
        batch_size=batch_size,
        device=device,
        cache=cache,
        executor=executor,
        gallery=gallery,
        progress=progress,
    )
    return with_ood_rows(report)


def with_ood_rows(report: Report) -> Report:
    """Return a report with the rows that ``ood_report`` adds, from its predictions."""
    clean = report.predictions[CLEAN.key]
    names = [name for name in (report.manifest.get("ood") or {}) if f"ood:{name}" in report.predictions]
    foreign = {name: report.predictions[f"ood:{name}"] for name in names}
    maker = _Maker(report, clean)
    rows = list(report.rows)
    groups = {group: [name for name in names if name.startswith(f"{group}/")] for group in GROUPS}
    groups = {group: members for group, members in groups.items() if members}
    shifted = _corrupted(report)
    rows += maker.shifted_rows(shifted)
    rows += maker.mean_rows(foreign, groups)
    rows += maker.difference_rows(foreign, groups)
    if shifted:
        rows += maker.full_spectrum_rows(foreign, groups, list(shifted.values()))
    return replace(report, rows=tuple(rows))


def _corrupted(report: Report) -> dict[str, PredictionStore]:
    """Return the predictions on corrupted data by their condition."""
    keys = [entry["key"] for entry in report.manifest["conditions"] if entry["kind"] == "corruption"]
    return {key: report.predictions[key] for key in keys if key in report.predictions}


class _Maker:
    """Makes rows of one report.

    Args:
        report: The report.
        clean: Predictions on clean in-distribution data.
    """

    def __init__(self, report: Report, clean: PredictionStore) -> None:
        self.subject = Subject(report.manifest["model"]["name"], report.manifest["data"]["name"])
        self.clean = clean
        self.scorers = list(clean.scores)
        settings = report.manifest["settings"]
        self.confidence = float(settings["confidence_level"])
        resampler = Resampler(seed=int(report.manifest["seed"]), replicates=int(settings["replicates"]))
        self.context = Context(resampler=resampler, frozen=Frozen())

    def row(self, name: str, scorer: str, metric: str, estimate: Estimate, *, target: str = "", group: str = "") -> Row:
        """Return a row about an OOD set."""
        data = f"ID vs {name}"
        return make_row(
            self.subject, CLEAN, metric, estimate, "higher", group=group, target=target, scorer=scorer, data=data
        )

    def shifted_rows(self, shifted: Mapping[str, PredictionStore]) -> list[Row]:
        """Return how well scores tell corrupted images from the same ones clean: the two are one unit."""
        units = self.clean.keys if self.clean.clusters is None else self.clean.clusters
        rows = []
        for key, store in shifted.items():
            for scorer in self.scorers:
                sides = [part.scores[scorer].to(torch.float64) for part in (self.clean, store)]
                known = [~torch.isnan(values) for values in sides]
                if len(store) != len(self.clean) or not all(bool(side.any()) for side in known):
                    estimate = Estimate.undefined(self.clean.score_reasons.get(scorer, "no_samples"))
                else:
                    scores = torch.cat([values[side] for values, side in zip(sides, known, strict=True)])
                    moved = torch.arange(len(scores)) >= int(known[0].sum())
                    estimate = delong(scores, moved, torch.cat([units[side] for side in known])).estimate(
                        confidence=self.confidence
                    )
                rows.append(self.row(f"shift/{key}", scorer, AUROC, estimate))
        return rows

    def mean_rows(self, foreign: Mapping[str, PredictionStore], groups: Mapping[str, list[str]]) -> list[Row]:
        """Return the mean AUROC over the sets of every group."""
        rows = []
        for group, members in groups.items():
            for scorer in self.scorers:
                parts = self._areas(foreign, members, scorer)
                estimate = (
                    Estimate.undefined(parts)
                    if isinstance(parts, str)
                    else mean_area(parts, confidence=self.confidence)
                )
                rows.append(self.row(f"{group}/*", scorer, AUROC, estimate))
        return rows

    def difference_rows(self, foreign: Mapping[str, PredictionStore], groups: Mapping[str, list[str]]) -> list[Row]:
        """Return how much every score differs from the first, on each set and in each group."""
        rows = []
        for name, members in {**{name: [name] for name in foreign}, **{f"{g}/*": m for g, m in groups.items()}}.items():
            first = self._areas(foreign, members, self.scorers[0])
            for scorer in self.scorers[1:]:
                second = self._areas(foreign, members, scorer)
                reason = next((part for part in (first, second) if isinstance(part, str)), None)
                if isinstance(first, str) or isinstance(second, str):
                    estimate = Estimate.undefined(reason or "no_samples")
                else:
                    estimate = area_difference(first, second, confidence=self.confidence)
                rows.append(self.row(name, scorer, DIFFERENCE, estimate, target=self.scorers[0]))
        return rows

    def full_spectrum_rows(
        self,
        foreign: Mapping[str, PredictionStore],
        groups: Mapping[str, list[str]],
        shifted: Sequence[PredictionStore],
    ) -> list[Row]:
        """Return AUROC against clean and corrupted data together, for each set and the mean of each group."""
        reference = full_spectrum(self.clean, shifted)
        context = replace(self.context, reference=reference)
        rows = []
        for name, store in foreign.items():
            for value in compute(store, context, [AUROC]):
                rows.append(self.row(name, value.scorer, AUROC, value.estimate, group=FULL_SPECTRUM))
        for group, members in groups.items():
            for scorer in self.scorers:
                parts = self._areas(foreign, members, scorer, reference)
                estimate = (
                    Estimate.undefined(parts)
                    if isinstance(parts, str)
                    else mean_area(parts, confidence=self.confidence)
                )
                rows.append(self.row(f"{group}/*", scorer, AUROC, estimate, group=FULL_SPECTRUM))
        return rows

    def _areas(
        self,
        foreign: Mapping[str, PredictionStore],
        members: Sequence[str],
        scorer: str,
        reference: PredictionStore | None = None,
    ) -> list[Areas] | str:
        parts = [areas_of(reference or self.clean, foreign[name], scorer) for name in members]
        odd = next((part for part in parts if isinstance(part, str)), None)
        return odd if odd is not None else [part for part in parts if not isinstance(part, str)]
