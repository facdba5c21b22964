"""From images to patients: one prediction for each from those of its images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from robustlab.core.errors import ConfigError, LabelError, RangeError

from .store import PredictionStore

Rule = Literal["max", "mean", "mean-of-top-m", "noisy-or", "count"]
NEVER = -100.0
"""Log-odds of a patient with fewer images than the count rule needs."""
TINY = 1e-9


@dataclass(frozen=True, eq=False)
class _Patients:
    """Images of patients.

    Args:
        codes: int64 (P,) patients, ascending.
        of: int64 (N,) patient of every image, as a place in ``codes``.
    """

    codes: Tensor
    of: Tensor

    def reduce(self, values: Tensor, how: Literal["amax", "amin", "sum"]) -> Tensor:
        """Return (P, ...), the values (N, ...) of each patient's images reduced."""
        shape = (len(self.codes), *values.shape[1:])
        place = self.of.reshape(-1, *[1] * (values.dim() - 1)).expand_as(values)
        if how == "sum":
            return values.new_zeros(shape).scatter_add_(0, place, values)
        return values.new_zeros(shape).scatter_reduce_(0, place, values, how, include_self=False)

    def log_sum(self, values: Tensor) -> Tensor:
        """Return (P, C), log sum exp of log-probabilities (N, C)."""
        top = self.reduce(values, "amax").clamp_min(torch.finfo(values.dtype).min)
        return top + self.reduce((values - top[self.of]).exp(), "sum").log()

    def ranks(self, values: Tensor) -> Tensor:
        """Return int64 (N, C), the place of every image among its patient's, 0 for the largest value."""
        by_value = values.argsort(dim=0, descending=True, stable=True)
        order = by_value.gather(0, self.of[by_value].argsort(dim=0, stable=True))
        counts = torch.bincount(self.of, minlength=len(self.codes))
        first = counts.cumsum(0) - counts
        place = torch.arange(len(values), device=values.device)[:, None] - first[self.of[order]]
        return torch.empty_like(order).scatter_(0, order, place)


def _patients(store: PredictionStore, who: str) -> _Patients:
    if store.clusters is None:
        raise ConfigError(who, "predictions with patients", "none", "Name the column with cluster=.")
    return _Patients(*torch.unique(store.clusters, return_inverse=True))


def conflicting_patients(store: PredictionStore) -> Tensor:
    """Return int64 (M,), the patients whose images have different labels; missing annotations (-1) do not count.

    Args:
        store: Labelled predictions with clusters.

    Raises:
        ConfigError: The store has no clusters or no labels.
    """
    patients = _patients(store, "conflicting_patients")
    if store.labels is None:
        raise ConfigError("conflicting_patients", "labelled predictions", "none", "Nothing can conflict.")
    return patients.codes[_conflicts(patients, store.labels)]


def _conflicts(patients: _Patients, labels: Tensor) -> Tensor:
    """Return bool (P,)."""
    columns = labels.reshape(len(labels), -1)
    largest = patients.reduce(columns, "amax")
    known = torch.where(columns >= 0, columns, torch.iinfo(columns.dtype).max)
    return ((largest >= 0) & (patients.reduce(known, "amin") != largest)).any(1)


def aggregate_patients(store: PredictionStore, rule: Rule = "max", *, m: int = 3) -> PredictionStore:
    """Return predictions of patients, one row each in the order of their codes.

    For two classes and for every label, from the probabilities p of the images:

    - ``"max"``: the largest p;
    - ``"mean"``: the mean of p, for several classes too, where it is the only rule;
    - ``"mean-of-top-m"``: the mean of the m largest p, of all where there are fewer;
    - ``"noisy-or"``: 1 - prod (1 - p), images as independent causes;
    - ``"count"``: the m-th largest p. It is at or above a threshold exactly where at least m images are, whatever the
      threshold; a patient with fewer images is negative (log-odds -100).

    All are computed from logarithms: probabilities that saturate make no ties. Thresholds belong to patients as well:
    fit them on validation predictions that went through the same rule.

    A patient's label is the largest one of its images (positive if any is; ``conflicting_patients`` tells who has
    several). Clusters become ids; groups are kept where all images agree, else missing (-1); scores are the largest
    one. An image whose output is not finite makes its patient's output NaN.

    Args:
        store: Predictions of images, with clusters.
        rule: How images are joined.
        m: Images that ``"mean-of-top-m"`` averages, or that ``"count"`` needs; at least 1.

    Raises:
        ConfigError: No clusters, no probabilities, an unknown rule, or one that is not for this task.
        LabelError: Several classes, and a patient has images of different ones.
        RangeError: ``m`` is below 1.
    """
    _check(store, rule, m)
    patients = _patients(store, "aggregate_patients")
    if store.labels is not None and store.task != "multilabel" and not store.positive_class:
        count = int(_conflicts(patients, store.labels).sum())
        if count:
            raise LabelError(
                "aggregate_patients", "one class a patient", f"{count} patients with several", "Aggregate by lesion."
            )
    broken = patients.reduce((~store.finite).to(torch.int64), "amax") > 0
    logits = _joined(store, patients, rule, m)
    return PredictionStore(
        ids=patients.codes,
        logits=torch.where(broken[:, None], torch.nan, logits).to(torch.float32),
        labels=None if store.labels is None else patients.reduce(store.labels, "amax"),
        task=store.task,
        scores={name: _largest(patients, values) for name, values in store.scores.items()},
        score_reasons=store.score_reasons,
        groups={name: _constant(patients, codes) for name, codes in store.groups.items()},
        pseudonyms=store.pseudonyms,
    )


def _check(store: PredictionStore, rule: str, m: int) -> None:
    who = "aggregate_patients"
    if rule not in get_args(Rule):
        raise ConfigError(who, f"rule as one of {', '.join(get_args(Rule))}", repr(rule), "The usual one is 'max'.")
    if store.answers_only:
        raise ConfigError(who, "probabilities or logits", "answers alone", "Save probabilities with the predictions.")
    if store.task != "multilabel" and not store.positive_class and rule != "mean":
        raise ConfigError(
            who, "rule='mean' for several classes", repr(rule), "The other rules need one finding that is there or not."
        )
    if m < 1:
        raise RangeError(who, "m of at least 1", f"{m}", "Give a number of images.")


def _joined(store: PredictionStore, patients: _Patients, rule: str, m: int) -> Tensor:
    """Return float64 (P, C), logits of the patients."""
    if store.task != "multilabel" and not store.positive_class:
        return patients.log_sum(store.log_probs)
    odds = store.log_odds if store.task == "multilabel" else store.log_odds[:, 1:]
    # broken rows are made NaN afterwards
    odds = odds.nan_to_num(nan=0.0, posinf=torch.finfo(odds.dtype).max, neginf=torch.finfo(odds.dtype).min)
    yes, no = torch.nn.functional.logsigmoid(odds), torch.nn.functional.logsigmoid(-odds)
    if rule == "max":
        joined = patients.reduce(odds, "amax")
    elif rule == "count":
        chosen = torch.where(patients.ranks(odds) == m - 1, odds, -torch.inf)
        joined = patients.reduce(chosen, "amax").clamp_min(NEVER)
    elif rule == "noisy-or":
        none = patients.reduce(no, "sum")
        # log(1 - e^s) without cancellation on either side of s = -log 2
        some = torch.where(none > -math.log(2), (-torch.expm1(none)).log(), torch.log1p(-none.exp()))
        some = torch.where(none > -TINY, patients.log_sum(yes), some)  # the sum of p, which may underflow
        joined = some - none
    else:
        if rule == "mean-of-top-m":
            top = patients.ranks(odds) < m
            yes, no = (torch.where(top, side, -torch.inf) for side in (yes, no))
        joined = patients.log_sum(yes) - patients.log_sum(no)
    return joined if store.task == "multilabel" else torch.cat([torch.zeros_like(joined), joined], 1)


def _largest(patients: _Patients, values: Tensor) -> Tensor:
    """Return (P,), the largest score that is not NaN; NaN where all are."""
    top = patients.reduce(torch.nan_to_num(values, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), "amax")
    known = patients.reduce((~torch.isnan(values)).to(torch.int64), "amax") > 0
    return torch.where(known, top, torch.nan)


def _constant(patients: _Patients, codes: Tensor) -> Tensor:
    low, high = patients.reduce(codes, "amin"), patients.reduce(codes, "amax")
    return torch.where(low == high, low, -1)
