"""Agreement of answers with the truth: F1, Matthews' correlation, Cohen's kappa, from counts of a confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from robustlab.core.registry import METRICS

from .base import Context, Statistic
from .smooth import Part, SmoothMetric, everyone
from .stats import macro
from .store import PredictionStore
from .thresholds import Calls, calls, decide_labels, labels_of

_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Counts:
    """What the metrics need of a confusion matrix, for b sets of weights.

    Args:
        hits: (C, b), its diagonal.
        truth: (C, b), sums of rows.
        answers: (C, b), sums of columns; rows that are not finite are in none of them.
        costs: (b,), sum of the squared distances between class and answer over (C - 1)^2, 1 without an answer.
    """

    hits: Tensor
    truth: Tensor
    answers: Tensor
    costs: Tensor

    @property
    def total(self) -> Tensor:
        """(b,), all weight."""
        return self.truth.sum(0)

    @property
    def none(self) -> Tensor:
        """(b,), weight without an answer."""
        return self.total - self.answers.sum(0)


@dataclass(frozen=True, eq=False)
class Table:
    """Truth and answer of each sample.

    Args:
        labels: int64 (N,) in 0 .. C - 1, or -1 where there is none.
        answers: int64 (N,) in 0 .. C - 1, or -1 where there is none.
        classes: C.
    """

    labels: Tensor
    answers: Tensor
    classes: int

    def counts(self) -> Counts:
        """Return the counts of all samples, from one histogram of whole numbers."""
        k = self.classes
        # both start at -1, so that samples without one have a row or column of their own
        cells = torch.add(self.answers, self.labels, alpha=k + 1).add_(k + 2)
        matrix = torch.bincount(cells, minlength=(k + 1) ** 2).view(k + 1, k + 1, 1)[1:].to(torch.float64)
        known = matrix[:, 1:]
        place = torch.arange(k, dtype=torch.float64, device=cells.device)
        costs = (known[..., 0] * (place[:, None] - place).square()).sum() / max(1, k - 1) ** 2 + matrix[:, 0].sum()
        return Counts(known[..., 0].diagonal()[:, None], matrix.sum(1), known.sum(0), costs[None])

    @cached_property
    def _costs(self) -> Tensor:
        distance = (self.labels - self.answers).to(torch.float64) / max(1, self.classes - 1)
        return torch.where(self.labels < 0, 0, torch.where(self.answers < 0, 1, distance.square()))

    def weigh(self, weights: Tensor, *, costs: bool = False) -> Counts:
        """Return the counts under float64 weights (N, b), differentiable; costs are 0 unless asked for."""
        room = weights.new_zeros((self.classes + 1, weights.shape[1]))
        known = self.labels >= 0
        right = torch.where(known & (self.labels == self.answers), self.labels + 1, 0)
        said = torch.where(known, self.answers + 1, 0)
        hits, truth, answers = (room.index_add(0, at, weights)[1:] for at in (right, self.labels + 1, said))
        return Counts(hits, truth, answers, self._costs @ weights if costs else truth.new_zeros(weights.shape[1]))


class _Agreement(SmoothMetric):
    """A function of the counts; for multi-label of every label's two by two table, and its mean."""

    from_answers = True
    keeps_broken = True
    bounds = (-1.0, 1.0)
    costs = False

    def of(self, counts: Counts) -> Tensor:
        """Return (b,), NaN where undefined."""
        raise NotImplementedError

    def _tables(self, store: PredictionStore, context: Context) -> tuple[list[Table], str]:
        labels = labels_of(store)
        if store.task != "multilabel":
            return [Table(labels, store.predicted, store.num_classes)], ""
        made = decide_labels(store, context.frozen)
        called = torch.where(store.finite[:, None], (made.correct == (labels == 1)).to(torch.int64), -1)
        tables = [Table(labels[:, i], called[:, i], 2) for i in range(store.num_classes)]
        return tables, f"; decisions {made.rule}"

    def _values(self, tables: list[Table]) -> list[float]:
        return torch.cat([self.of(table.counts()) for table in tables]).tolist()

    def _statistic(self, table: Table) -> Statistic:
        return lambda weights: self.of(table.weigh(weights, costs=self.costs))

    def parts(self, store: PredictionStore, context: Context) -> Mapping[str, Part]:
        tables, note = self._tables(store, context)
        parts = [self._part(table, note) for table in tables]
        if store.task != "multilabel":
            return {"": parts[0]}
        return _with_mean(store, context, parts, note)

    def _part(self, table: Table, note: str) -> Part:
        entered = table.labels >= 0
        counts = table.counts()
        defined = not bool(torch.isnan(self.of(counts)).any())
        kinds = int((counts.truth > 0).sum())
        reason = "no_samples" if kinds == 0 else "single_class" if kinds == 1 else "no_variance"
        return Part(self._statistic(table) if defined else None, entered, reason, note)

    def point(self, store: PredictionStore, context: Context) -> Mapping[str, float]:
        tables, _ = self._tables(store, context)
        values = self._values(tables)
        if store.task != "multilabel":
            return {"": values[0]} if values[0] == values[0] else {}
        return _point_with_mean(context, values)


def _with_mean(store: PredictionStore, context: Context, parts: list[Part], note: str) -> dict[str, Part]:
    """Return the parts of all labels behind their mean."""
    defined = [part for part in parts if part.statistic is not None]
    labels = {context.target(index): part for index, part in enumerate(parts)}
    if not defined:
        entered = torch.stack([part.entered for part in parts]).any(0) if parts else everyone(store)
        reason = parts[0].reason if parts else "no_samples"
        return {"": Part(None, entered, reason, note), **labels}
    entered = torch.stack([part.entered for part in defined]).any(0)
    if len(defined) < len(parts):
        note += f"; mean of {len(defined)} of {len(parts)} defined"
    mean = macro([part.statistic for part in defined if part.statistic is not None])
    return {"": Part(mean, entered, note=note), **labels}


def _point_with_mean(context: Context, values: list[float]) -> dict[str, float]:
    defined = {context.target(index): value for index, value in enumerate(values) if value == value}
    return {"": sum(defined.values()) / len(defined), **defined} if defined else {}


@METRICS.register("f1")
class F1(SmoothMetric):
    """2 TP / (2 TP + FP + FN): of the positive class, of every label and their mean, or the mean over several classes.

    Decisions are those of sensitivity: frozen thresholds, argmax for several classes. The mean is over the classes or
    labels that occur in the truth; without positives it is undefined.
    """

    title = "F1"
    from_answers = True
    keeps_broken = True

    def parts(self, store: PredictionStore, context: Context) -> Mapping[str, Part]:
        if store.task != "multilabel" and not store.positive_class:
            return {"": self._several(store)}
        parts = [self._one(made) for made in calls(store, context)]
        return {"": parts[0]} if store.positive_class else _with_mean(store, context, parts, "")

    def _several(self, store: PredictionStore) -> Part:
        table = Table(labels_of(store), store.predicted, store.num_classes)
        counts = table.counts()
        occurs = counts.truth[:, 0] > 0
        defined = int(occurs.sum())
        if not defined:
            return Part(None, everyone(store))
        note = ""
        if defined < store.num_classes:
            either = int(((counts.truth + counts.answers) > 0).sum())
            wider = float(_f1(counts, occurs).sum()) / either
            note = f"; mean of {defined} of {store.num_classes} defined; {wider:.4g} over {either} answered too"
        return Part(lambda weights: _f1(table.weigh(weights), occurs).mean(0), everyone(store), note=note)

    def _one(self, made: Calls) -> Part:
        entered = made.positive | made.negative
        reason = made.reason or "no_positives"
        if made.reason or not bool(made.positive.any()):
            return Part(None, entered, reason if bool(entered.any()) else "no_samples", made.note)
        sides = [made.called & made.positive, made.positive, made.called & entered]
        true, positive, called = (rows.to(torch.float64) for rows in sides)

        def statistic(weights: Tensor) -> Tensor:
            mass = positive @ weights
            return torch.where(mass > 0, 2 * (true @ weights) / (mass + called @ weights), torch.nan)

        return Part(statistic, entered, reason, made.note)

    def point(self, store: PredictionStore, context: Context) -> Mapping[str, float]:
        if store.task == "multilabel" or store.positive_class:
            return super().point(store, context)
        counts = Table(labels_of(store), store.predicted, store.num_classes).counts()
        values = _f1(counts, counts.truth[:, 0] > 0)
        return {"": float(values.mean())} if len(values) else {}


def _f1(counts: Counts, classes: Tensor) -> Tensor:
    """Return (k, b) of some classes (bool (C,)), NaN where weights leave no positives."""
    truth = counts.truth[classes]
    return torch.where(truth > 0, 2 * counts.hits[classes] / (truth + counts.answers[classes]), torch.nan)


@METRICS.register("mcc")
class Matthews(_Agreement):
    """Correlation of answers and truth, R_K of several classes; decisions as for balanced accuracy.

    (c N - sum p_k t_k) / sqrt(N^2 - sum p_k^2) / sqrt(N^2 - sum t_k^2). A row that is not finite is an answer of its
    own. Undefined where truth or answers do not vary.

    References:
        Matthews, Comparison of the predicted and observed secondary structure of T4 phage lysozyme, 1975; Gorodkin,
        Comparing two K-category assignments by a K-category correlation coefficient, 2004.
    """

    title = "MCC"

    def of(self, counts: Counts) -> Tensor:
        total = counts.total
        square = total.square()
        truth = square - counts.truth.square().sum(0)
        answers = square - counts.answers.square().sum(0) - counts.none.square()
        scale = truth.clamp_min(0).sqrt() * answers.clamp_min(0).sqrt()
        value = (counts.hits.sum(0) * total - (counts.truth * counts.answers).sum(0)) / scale
        value = value.clamp(-1, 1)  # two square roots round to more than 1
        return torch.where((truth > _ROUNDING * square) & (answers > _ROUNDING * square), value, torch.nan)


@METRICS.register("kappa")
class Kappa(_Agreement):
    """Agreement beyond chance, 1 - observed / expected disagreement; decisions as for balanced accuracy.

    A row that is not finite disagrees. Undefined where chance agreement is complete.

    References:
        Cohen, A coefficient of agreement for nominal scales, 1960.
    """

    title = "Kappa"

    def of(self, counts: Counts) -> Tensor:
        total = counts.total
        observed = total - counts.hits.sum(0)
        expected = total - (counts.truth * counts.answers).sum(0) / total
        return torch.where(expected > _ROUNDING * total, 1 - observed / expected, torch.nan)


@METRICS.register("kappa-quadratic")
class QuadraticKappa(_Agreement):
    """Agreement beyond chance of ordered classes, weighted by the squared distance of class and answer.

    It takes the classes to be equally spaced grades. A row that is not finite disagrees as much as the two ends do. Not
    for multi-label.

    References:
        Cohen, Weighted kappa: nominal scale agreement with provision for scaled disagreement or partial credit, 1968.
    """

    title = "Kappa with quadratic weights"
    costs = True

    def of(self, counts: Counts) -> Tensor:
        total, classes = counts.total, len(counts.truth)
        place = torch.arange(classes, dtype=torch.float64, device=total.device) / max(1, classes - 1)
        truth, answers = counts.truth, counts.answers
        # sum_ij (i - j)^2 t_i p_j, about the middle of the scale
        first, second = place - 0.5, (place - 0.5).square()
        spread = (second @ truth) * answers.sum(0) + (second @ answers) * total
        spread = spread - 2 * (first @ truth) * (first @ answers) + counts.none * total
        expected = spread / total
        return torch.where(expected > _ROUNDING * total, 1 - counts.costs / expected, torch.nan)

    def parts(self, store: PredictionStore, context: Context) -> Mapping[str, Part]:
        return {} if store.task == "multilabel" else super().parts(store, context)

    def point(self, store: PredictionStore, context: Context) -> Mapping[str, float]:
        return {} if store.task == "multilabel" else super().point(store, context)
