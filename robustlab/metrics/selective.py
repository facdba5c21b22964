"""Referral and silent failures: how often an answer is wrong although nothing asked for a second look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from robustlab.core.errors import RangeError, ShapeError, UnknownNameError
from robustlab.core.registry import METRICS

from .base import Context, Estimate, Frozen, Metric, MetricValue, Share, Statistic
from .classification import decide_labels, labels_of
from .stats import proportion, ratio, rowwise
from .store import PredictionStore


def confidence(store: PredictionStore) -> Tensor:
    """Return float64 (N,) log-odds of the answer; for multi-label of the least sure label.

    It orders cases as the largest probability does (for multi-label the smallest max(p, 1 - p)), without its ties where
    probabilities saturate. NaN in rows that are not finite.
    """
    if store.task == "multilabel":
        return rowwise(store, lambda part: part.log_odds.abs().amin(1))
    if store.num_classes < 3 or store.answers_only:
        return rowwise(store, lambda part: part.log_odds.amax(1))
    return rowwise(store, _answer_odds)


def _answer_odds(store: PredictionStore) -> Tensor:
    """Return float64 (N,) log-odds of the largest of several logits; the odds of the others are not needed.

    The sum over the other classes is made of terms rounded to one grid, so it is exact: rows with the same logits in
    another order are equally sure, to the last digit.
    """
    grid = 1.5 * 2.0 ** store.num_classes.bit_length()
    logits = store.logits.to(torch.float64)
    top, answer = logits.max(1, keepdim=True)
    others = logits.scatter(1, answer, -torch.inf)
    second = others.amax(1, keepdim=True)
    odds = (top - second)[:, 0] - others.sub_(second).exp_().add_(grid).sub_(grid).sum(1).log_()
    return torch.where(store.finite, odds, math.nan)


def _scores(store: PredictionStore, detector: str) -> Tensor:
    if detector not in store.scores:
        have = ", ".join(store.scores) or "none"
        raise UnknownNameError("referral", f"a score among: {have}", repr(detector), "Add it to detectors=.")
    return store.scores[detector].to(torch.float64)


def fit_referral(store: PredictionStore, referral: float, detector: str = "") -> tuple[float, float]:
    """Return the thresholds on confidence and on a detector's score that refer a share of the cases together.

    Cases are referred for low confidence or for a high score; both criteria get the same marginal number k of cases,
    the largest one whose union is at most ``referral`` of the samples. Equal values are referred together, and only
    where all of them fit into k, so the agreed share is never exceeded.

    Args:
        store: Clean validation predictions.
        referral: Agreed share of cases, in [0, 1].
        detector: Name of the score; empty, or a score that is NaN throughout, leaves the share to confidence alone.

    Returns:
        (confidence, score): refer at or below the first (log-odds), at or above the second. The second is NaN without a
        usable detector; infinite thresholds refer nobody.

    Raises:
        RangeError: ``referral`` is not in [0, 1].
        ShapeError: No finite prediction.
        UnknownNameError: No such score.
    """
    if not 0 <= referral <= 1:
        raise RangeError("fit_referral", "referral as a share from 0 to 1", f"{referral}", "Pass e.g. referral=0.1.")
    rows = store.finite
    count = int(rows.sum())
    if count == 0:
        raise ShapeError("fit_referral", "at least one finite prediction", "none", "Check the validation data.")
    sure = confidence(store)[rows]
    doubts = [-sure]
    if detector:
        score = _scores(store, detector)[rows]
        if not bool(torch.isnan(score).all()):
            doubts.append(torch.nan_to_num(score, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf))
    ranks = [_rank_from_top(doubt) for doubt in doubts]
    needed = torch.sort(torch.stack(ranks).amin(0)).values
    # referring the first k of each criterion refers every case that needs at most k
    budget = math.floor(referral * count + 1e-9)
    k = count if budget >= count else int(needed[budget]) - 1
    lines = [
        float(doubt[rank <= k].min()) if bool((rank <= k).any()) else math.inf
        for doubt, rank in zip(doubts, ranks, strict=True)
    ]
    return -lines[0], lines[1] if len(lines) > 1 else math.nan


def _rank_from_top(values: Tensor) -> Tensor:
    """Return int64 (N,): how many values are at least as large."""
    ordered = torch.sort(values).values
    return len(values) - torch.searchsorted(ordered, values)


def referred(store: PredictionStore, frozen: Frozen) -> Tensor:
    """Return bool (N,), the cases that are passed on to a person.

    A row that is not finite is always passed on: software sees such an answer without knowing the truth, so it cannot
    be a silent failure. It still is an error in accuracy.
    """
    out = (confidence(store) <= frozen.confidence) | ~store.finite
    if frozen.detector:
        out = out | (_scores(store, frozen.detector) >= frozen.score)
    return out


def wrong_answers(store: PredictionStore, frozen: Frozen) -> tuple[Tensor, Tensor]:
    """Return (wrong, entered), both bool (N,): for multi-label any annotated label, where there is one."""
    if store.task != "multilabel":
        return store.predicted != labels_of(store), torch.ones_like(store.finite)
    made = decide_labels(store, frozen)
    return (~made.correct & made.annotated).any(1), made.annotated.any(1)


def _per_unit(store: PredictionStore, event: Tensor, entered: Tensor) -> tuple[Tensor, Tensor]:
    """Return (event of the row's unit, row stands for its unit), both bool (N,): any event among the entered rows."""
    if store.clusters is None:
        return event & entered, entered
    codes, unit = torch.unique(store.clusters, return_inverse=True)
    rows = torch.arange(len(unit), device=unit.device)
    first = torch.full_like(codes, len(unit)).scatter_reduce_(0, unit[entered], rows[entered], "amin")
    hit = torch.zeros_like(codes).scatter_reduce_(0, unit, (event & entered).to(codes.dtype), "amax")
    return hit[unit] > 0, (first[unit] == rows) & entered


@METRICS.register("silent-failure-rate")
class SilentFailureRate(Metric):
    """Share of patients (images where patients are unknown) with an answer that is wrong and not referred.

    A patient fails silently if any of the images does. Wrong means the most probable class for classes, and any
    annotated label at its frozen threshold for multi-label. Rows that are not finite count as referred.
    """

    default = True
    title = "Silent-failure rate"
    keeps_broken = True
    direction = "lower"

    def _events(self, store: PredictionStore, context: Context) -> tuple[Tensor, Tensor, int]:
        wrong, entered = wrong_answers(store, context.frozen)
        failed, stands = _per_unit(store, wrong & ~referred(store, context.frozen), entered)
        return failed, stands, int(entered.sum())

    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        if math.isnan(context.frozen.confidence):
            return [MetricValue(self.name, Estimate.undefined("no_val", n=len(store)), self.direction)]
        failed, stands, count = self._events(store, context)
        note = "" if store.clusters is None else " over clusters"
        estimate = proportion(
            failed[stands], None, confidence=context.resampler.confidence, samples=count, note=note + _basis(context)
        )
        return [MetricValue(self.name, estimate, self.direction)]

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        if math.isnan(context.frozen.confidence):
            return {}
        failed, stands, _ = self._events(store, context)
        rows = stands.to(torch.float64)[None]
        return {"": ratio(failed.to(torch.float64)[None] * rows, rows)}

    def shares(self, store: PredictionStore, context: Context) -> Mapping[str, Sequence[Share]]:
        if math.isnan(context.frozen.confidence):
            return {}
        failed, stands, _ = self._events(store, context)
        return {"": [(failed, stands)]}


@METRICS.register("referred-share")
class ReferredShare(Metric):
    """Share of images that are passed on to a person; rows that are not finite count as referred."""

    default = True
    title = "Referred share"
    keeps_broken = True
    direction = "none"

    def compute(self, store: PredictionStore, context: Context) -> list[MetricValue]:
        if math.isnan(context.frozen.confidence):
            return [MetricValue(self.name, Estimate.undefined("no_val", n=len(store)), self.direction)]
        estimate = proportion(
            referred(store, context.frozen),
            store.clusters,
            confidence=context.resampler.confidence,
            note=_basis(context),
        )
        return [MetricValue(self.name, estimate, self.direction)]

    def statistics(self, store: PredictionStore, context: Context) -> Mapping[str, Statistic]:
        if math.isnan(context.frozen.confidence):
            return {}
        out = referred(store, context.frozen).to(torch.float64)[None]
        return {"": ratio(out, torch.ones_like(out))}

    def shares(self, store: PredictionStore, context: Context) -> Mapping[str, Sequence[Share]]:
        if math.isnan(context.frozen.confidence):
            return {}
        out = referred(store, context.frozen)
        return {"": [(out, torch.ones_like(out))]}


def _basis(context: Context) -> str:
    frozen = context.frozen
    return f"; referral {frozen.referral:g} on val by confidence" + (
        f" or {frozen.detector}" if frozen.detector else ""
    )
