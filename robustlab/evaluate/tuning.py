"""tune: the settings of a detector, chosen on validation data alone, and kept where nothing is shown to be better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from defenses.detectors.base import ModelFolds
from robustlab.core.detector import Detector, Needs
from robustlab.core.errors import ConfigError, KindError, RobustlabError
from robustlab.core.model import Model, wrap
from robustlab.core.source import Source
from robustlab.core.taps import TappedModel
from robustlab.core.types import ModelOutputs
from robustlab.data import load_data
from robustlab.data.predictions import SavedPredictions
from robustlab.metrics.base import Estimate
from robustlab.metrics.detectors import Areas, area_difference, areas_of, mean_area
from robustlab.metrics.store import PredictionStore
from robustlab.report import words

from .inputs import move, resolve_detectors
from .leaks import IMAGES, check_apart, contents
from .modelspec import ModelSpec
from .run import clusters_of

if TYPE_CHECKING:
    import pandas as pd

_BATCH = 64
_CONFIDENCE = 0.95
_IN_PASS = frozenset({Needs.INPUT_GRAD, Needs.EXTRA_FORWARD})

GRIDS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "ash": {"percentile": (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)},
    "dice": {"sparsity": (0.1, 0.3, 0.5, 0.7, 0.9)},
    "gen": {"gamma": (0.01, 0.1, 0.5, 1.0), "top": (2, 10, 100)},
    "knn": {"k": (1, 5, 10, 50, 200, 1000)},
    "nnguide": {"k": (1, 5, 10, 50, 100)},
    "odin": {"eps": (0.0, 0.0007, 0.0014, 0.0028, 0.004)},
    "react": {"quantile": (0.85, 0.9, 0.95, 0.99)},
    "residual": {"dim": (2, 8, 32, 64, 128, 256, 512)},
    "scale": {"percentile": (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)},
    "vim": {"dim": (2, 8, 32, 64, 128, 256, 512)},
}
"""Name of a detector to the values that are tried for its fields: the sweeps of papers and of OpenOOD."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One setting.

    Args:
        setting: The fields that differ between settings, e.g. ``"k=10"``.
        auroc: Mean AUROC over the foreign sets, with its interval.
        difference: Its difference from the default's, paired on the same images; the interval holds for all settings
            at once (Bonferroni). None for the default.
        sets: Name of a foreign set to the AUROC on it.
    """

    setting: str
    auroc: Estimate
    difference: Estimate | None
    sets: Mapping[str, Estimate]


@dataclass(frozen=True, eq=False, repr=False)
class TuningTable:
    """What was tried, in the order of the grid, the default first.

    Args:
        name: Name of the detector.
        trials: The settings.
        best: Place of the largest mean AUROC; the first of equal ones.
        chosen: Place of the setting that was taken: the best if it is shown to differ from the default, else 0.
    """

    name: str
    trials: tuple[Trial, ...]
    best: int
    chosen: int

    @property
    def verdict(self) -> str:
        """``"better"`` where the chosen setting is shown to beat the default, else ``"no decision"``."""
        return "no decision" if self.chosen == 0 else "better"

    def summary(self) -> str:
        """Return the table, and what was decided, as plain text."""
        lines = [f"{self.name}: mean AUROC on val_ood (95 % interval), difference from the default (all at once)"]
        for place, trial in enumerate(self.trials):
            change = ""
            if trial.difference is not None and not math.isnan(trial.difference.value):
                low, value, high = (
                    words.decimal(number, "+")
                    for number in (trial.difference.low, trial.difference.value, trial.difference.high)
                )
                change = f"{value} ({low} to {high})"
            mark = "default" if place == 0 else "chosen" if place == self.chosen else ""
            number = _words(trial.auroc)
            lines.append(f"  {trial.setting[:27]:<28}{number:<32}{change:<28}n={trial.auroc.n:<8,}{mark}".rstrip())
        default, best = self.trials[0].setting, self.trials[self.best].setting
        if self.chosen:
            lines.append(f"Chosen: {best}, which beats the default.")
        elif self.best:
            lines.append(f"No decision: {best} is not shown to differ from the default ({default}), which is kept.")
        else:
            lines.append(f"Nothing is above the default ({default}), which is kept.")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<TuningTable of {self.name}: {len(self.trials)} settings, {self.trials[self.chosen].setting} chosen>"

    def to_frame(self) -> pd.DataFrame:
        """Return a data frame: a row for each setting and foreign set, and one (``"mean"``) over all of them."""
        import pandas as pd

        rows = []
        for place, trial in enumerate(self.trials):
            for name, item in {**trial.sets, "mean": trial.auroc}.items():
                change = trial.difference if name == "mean" else None
                ends = (math.nan,) * 3 if change is None else (change.value, change.low, change.high)
                rows.append(
                    {
                        "setting": trial.setting,
                        "data": name,
                        "auroc": item.value,
                        "low": item.low,
                        "high": item.high,
                        "n": item.n,
                        "n_units": item.n_units,
                        "method": item.method,
                        "reason": item.reason,
                        "difference": ends[0],
                        "difference_low": ends[1],
                        "difference_high": ends[2],
                        "chosen": place == self.chosen,
                    }
                )
        return pd.DataFrame(rows)


def grid_of(detector: Detector) -> tuple[Detector, ...]:
    """Return a detector, the default, and what is tried beside it (see ``GRIDS``).

    Raises:
        ConfigError: Nothing is known to be worth trying.
    """
    fields = GRIDS.get(detector.name, {})
    if not fields:
        raise ConfigError(
            f"tune {detector.name!r}",
            f"a detector with a grid of its own ({', '.join(GRIDS)})",
            "one without",
            "Pass the settings themselves, the default first: [KNN(k=50), KNN(k=5)].",
        )
    tried = [
        replace(detector, **dict(zip(fields, values, strict=True)))  # type: ignore[type-var]  # detectors are dataclasses
        for values in itertools.product(*fields.values())
    ]
    return (detector, *(item for item in dict.fromkeys(tried) if item != detector))


def tune(
    detector: str | Detector | Sequence[Detector],
    model: Any,
    *,
    val_id: Any,
    val_ood: Mapping[str, Any],
    fit: Any = None,
    cluster: str | None = None,
    device: str | torch.device | None = None,
) -> tuple[Detector, TuningTable]:
    """Choose the settings of a detector on validation data, without a look at any test set.

    The criterion is the mean AUROC over the sets of ``val_ood``. The best setting is taken only if it is shown to beat
    the default: the interval of their paired difference, corrected for all settings that were tried, lies above 0.
    Else there is no decision, and the default is kept.

    The detector remembers the images that it was tuned on (hashes of their pixels, also in the file that
    ``save_detector`` writes), and an evaluation on any of them as ``data`` or ``ood`` is refused.

    The network runs once over each set for all settings, and over ``fit`` as often as one detector takes for a fit
    (features beyond 512 MB are not kept, but made again). ODIN, and detectors that score images themselves, also take
    their own passes for each setting.

    Args:
        detector: A name or a detector, whose own settings are the default and whose grid is in ``GRIDS``; or the
            settings themselves, the default first.
        model: As in ``evaluate_under_shift``.
        val_id: In-distribution validation data; labels are not used.
        val_ood: Name to foreign validation data, of other sources than the test sets: what is foreign there must not
            be known here.
        fit: In-distribution training data, for detectors that learn.
        cluster: Column with the independent unit, e.g. ``"patient"``, for the intervals; foreign sets without it are
            taken as independent images.
        device: Where to run; the model's device if None.

    Returns:
        The fitted detector, and a ``TuningTable`` of what was tried.

    Raises:
        ConfigError: There is no grid, no foreign set, no training data for a detector that learns, or the same images
            are in two sets.
        UnknownNameError: ``val_id`` has no such column.
        RobustlabError: Something does not fit.

    References:
        Zhang, Yang, Wang et al., OpenOOD v1.5: enhanced benchmark for out-of-distribution detection, 2023,
        arXiv:2306.09301 (automatic parameter search on an OOD validation set).
    """
    candidates = _candidates(detector)
    training = None if fit is None else load_data(fit, split="train")
    inside = load_data(val_id, split="val")
    if not isinstance(val_ood, Mapping) or not val_ood:
        got = type(val_ood).__name__ if val_ood else "none"
        hint = "For example val_ood={'photos': photos}."
        raise KindError("tune", "val_ood as a mapping from a name to data", got, hint)
    foreign = {name: load_data(other) for name, other in val_ood.items()}
    if cluster is not None:
        inside.column(cluster)  # foreign sets may do without
    wrapped = _ready(model, training or inside, device)
    reason = candidates[0].skip_reason(wrapped)
    if reason is not None:
        raise ConfigError(f"tune {candidates[0].name!r}", f"a detector that suits {wrapped.model_name}", reason,
                          "Tune another one.")  # fmt: skip
    if candidates[0].learns and training is None:
        raise ConfigError(f"tune {candidates[0].name!r}", "in-distribution training data", "fit=None",
                          "Pass fit=train, data that the model was trained on.")  # fmt: skip
    seen = {"val_id": contents(inside), **{f"val_ood/{name}": contents(source) for name, source in foreign.items()}}
    check_apart(seen, None if training is None else contents(training, IMAGES))
    judge = _Judge(wrapped, candidates, training, cluster)
    table = _table(candidates, judge.areas(inside, foreign), tuple(foreign))
    chosen = judge.fitted(candidates[table.chosen])
    chosen.remember(seen)
    return chosen, table


def _candidates(detector: str | Detector | Sequence[Detector]) -> tuple[Detector, ...]:
    """Return the settings, the default first."""
    if isinstance(detector, (str, Detector)):
        return grid_of(next(iter(resolve_detectors((detector,)).values())))
    found = tuple(resolve_detectors(detector).values())
    if len(found) < 2:
        raise ConfigError("tune", "two settings or more", f"{len(found)}", "Pass the default first, then the others.")
    return found


def _ready(model: Any, known: Source, device: str | torch.device | None) -> Model:
    """Return a model that can be run, on its device."""
    built = model.build() if isinstance(model, ModelSpec) else model
    if isinstance(built, SavedPredictions):
        raise ConfigError("tune", "a model that can be run", "saved predictions", "Pass the network itself.")
    wrapped = built if isinstance(built, Model) else wrap(built, task=known.info.task)
    move(wrapped, device, "tune")
    return wrapped


class _Judge:
    """Fits and scores every setting on what one pass over each set gives.

    Args:
        model: The model, on its device.
        candidates: The settings.
        training: In-distribution training data.
        cluster: Column with the independent unit.
    """

    def __init__(
        self, model: Model, candidates: Sequence[Detector], training: Source | None, cluster: str | None
    ) -> None:
        self.model = model
        self.candidates = candidates
        self.training = training
        self.cluster = cluster
        self.taps = tuple(dict.fromkeys(tap for item in candidates for tap in item.taps))
        self.folds: ModelFolds | None = None
        if training is not None and any(item.learns and hasattr(item, "fit_folds") for item in candidates):
            head = any(Needs.HEAD in item.needs for item in candidates)
            self.folds = ModelFolds(model, training, self.taps, head=head, batch=_BATCH)

    def fitted(self, candidate: Detector) -> Detector:
        """Return a setting, fitted anew."""
        fresh: Detector = replace(candidate)  # type: ignore[type-var]  # that of the user stays as it is
        if fresh.learns and self.training is not None:
            folds = getattr(fresh, "fit_folds", None)
            if folds is not None and self.folds is not None and not fresh.needs & _IN_PASS:
                folds(self.folds)
            else:
                fresh.fit(self.model, self.training)
        return fresh

    def areas(self, inside: Source, foreign: Mapping[str, Source]) -> list[Mapping[str, Areas | str]]:
        """Return, for every setting, the AUROC on each foreign set, or why there is none."""
        sources = [inside, *foreign.values()]
        failures: dict[int, RobustlabError] = {}
        scores: list[list[Tensor]] = [[] for _ in self.candidates]
        inside_pass = {place: self.fitted(item) for place, item in enumerate(self.candidates) if item.needs & _IN_PASS}
        outputs: list[ModelOutputs] = []
        for source in sources:
            kept, own = self._run(source, inside_pass)
            outputs.append(kept)
            for place, values in own.items():
                scores[place].append(values)
        for place, candidate in enumerate(self.candidates):
            if place in inside_pass:
                continue
            try:
                detector = self.fitted(candidate)
                scores[place] = [detector.score(kept) for kept in outputs]
            except RobustlabError as error:  # e.g. more dimensions than there are
                failures[place] = error
        if len(failures) == len(self.candidates):
            raise failures[0]
        found: list[Mapping[str, Areas | str]] = []
        for place in range(len(self.candidates)):
            if place in failures:
                found.append(dict.fromkeys(foreign, str(failures[place])))
                continue
            stores = [
                self._store(source, kept, values)
                for source, kept, values in zip(sources, outputs, scores[place], strict=True)
            ]
            pairs = zip(foreign, stores[1:], strict=True)
            found.append({name: areas_of(stores[0], store, "score") for name, store in pairs})
        return found

    def _run(self, source: Source, detectors: Mapping[int, Detector]) -> tuple[ModelOutputs, dict[int, Tensor]]:
        """Return what the network gives for a set, with the scores that are made in the pass."""
        view = TappedModel(self.model, self.taps) if self.taps else self.model
        kept: list[ModelOutputs] = []
        scores: dict[int, list[Tensor]] = {place: [] for place in detectors}
        for start in range(0, len(source), _BATCH):
            batch = source.read(range(start, min(start + _BATCH, len(source)))).to(self.model.device)
            outputs = view.predict(batch)
            kept.append(outputs)
            for place, detector in detectors.items():
                with torch.no_grad():
                    scores[place].append(detector.score_in_pass(self.model, batch, outputs))
        return _joined(kept), {place: torch.cat(parts) for place, parts in scores.items()}

    def _store(self, source: Source, outputs: ModelOutputs, score: Tensor) -> PredictionStore:
        unit = self.cluster if self.cluster in source.info.groups else None
        return PredictionStore(
            ids=source.info.ids,
            logits=outputs.logits.cpu(),
            labels=None,
            task=outputs.task,
            scores={"score": score.cpu()},
            clusters=clusters_of(source, unit),
        )


def _joined(parts: Sequence[ModelOutputs]) -> ModelOutputs:
    """Return the outputs of several batches as one."""
    first = parts[0]
    return ModelOutputs(
        logits=torch.cat([part.logits for part in parts]),
        features={name: torch.cat([part.features[name] for part in parts]) for name in first.features},
        members=None
        if first.members is None
        else torch.cat([part.members for part in parts if part.members is not None], 1),
        scores={name: torch.cat([part.scores[name] for part in parts]) for name in first.scores},
        task=first.task,
    )


def _table(
    candidates: Sequence[Detector],
    areas: Sequence[Mapping[str, Areas | str]],
    names: Sequence[str],
) -> TuningTable:
    """Return what was tried and what is chosen."""
    confidence = 1 - (1 - _CONFIDENCE) / max(1, len(candidates) - 1)
    default = _complete(areas[0])
    trials, values = [], []
    for place, (setting, found) in enumerate(zip(_settings(candidates), areas, strict=True)):
        own = _complete(found)
        mean = Estimate.undefined(own) if isinstance(own, str) else mean_area(own)
        change = None
        if place:
            reason = next((part for part in (default, own) if isinstance(part, str)), "no_samples")
            change = (
                Estimate.undefined(reason)
                if isinstance(default, str) or isinstance(own, str)
                else area_difference(default, own, confidence=confidence)
            )
        each = {name: _single(found[name]) for name in names}
        trials.append(Trial(setting, mean, change, each))
        values.append(-math.inf if math.isnan(mean.value) else mean.value)
    best = max(range(len(values)), key=lambda place: (values[place], -place))
    change = trials[best].difference
    # a default without a value cannot be kept
    chosen = best if change is not None and (change.low > 0 or math.isinf(values[0])) else 0
    return TuningTable(candidates[0].name, tuple(trials), best, chosen)


def _complete(found: Mapping[str, Areas | str]) -> list[Areas] | str:
    odd = next((part for part in found.values() if isinstance(part, str)), None)
    return odd if odd is not None else [part for part in found.values() if not isinstance(part, str)]


def _single(found: Areas | str) -> Estimate:
    return Estimate.undefined(found) if isinstance(found, str) else mean_area([found])


def _words(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return f"{words.DASH} ({words.reason(estimate.reason)})"
    if math.isnan(estimate.low):
        return f"{words.decimal(estimate.value)} (no interval: {words.reason(estimate.reason)})"
    ends = f"({words.decimal(estimate.low)} to {words.decimal(estimate.high)})"
    return f"{words.decimal(estimate.value)} {ends}"


def _settings(candidates: Sequence[Detector]) -> Iterator[str]:
    """Yield what tells each setting from the others."""
    fields = [_fields(item) for item in candidates]
    same_kind = len({type(item) for item in candidates}) == 1
    moving = [name for name in fields[0] if same_kind and any(item[name] != fields[0][name] for item in fields)]
    for item, have in zip(candidates, fields, strict=True):
        yield ", ".join(f"{name}={have[name]}" for name in moving) or item.name


def _fields(detector: Detector) -> dict[str, Any]:
    known = {} if getattr(detector, "opaque", False) else getattr(detector, "__dataclass_fields__", {})
    return {name: getattr(detector, name) for name, field in known.items() if field.init}
