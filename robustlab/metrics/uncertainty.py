"""Uncertainty: entropy of an answer, and how far the members of an ensemble (or stochastic passes) disagree.

Members are log-probabilities (S, N, C) over classes; any float type, computed in float64. Entropies are in nats. Where
a probability is 0 its term is 0. Rows in which a member has a NaN are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.core.errors import ShapeError
from robustlab.core.registry import METRICS

from .base import Context
from .smooth import Part, SmoothMetric
from .stats import ratio, rowwise
from .store import PredictionStore


@dataclass(frozen=True, eq=False)
class _Tally:
    """Sums over members: float64 (N, C) probabilities, float64 (N,) entropies, int64 (N, C) votes."""

    probs: Tensor
    entropy: Tensor
    votes: Tensor
    members: int

    @staticmethod
    def make(members: Iterable[Tensor]) -> _Tally:
        probs, entropy, votes, count = torch.empty(0), torch.empty(0), torch.empty(0), 0
        for member in members:
            logs = member.to(torch.float64)
            if logs.ndim != 2 or (count and logs.shape != probs.shape):
                raise ShapeError(
                    "members",
                    "log-probabilities (N, C), the same shape for every member",
                    f"{tuple(logs.shape)}" + (f" after {tuple(probs.shape)}" if count else ""),
                    "Stack them as (S, N, C).",
                )
            if count == 0:
                probs, entropy = torch.zeros_like(logs), logs.new_zeros(len(logs))
                votes = torch.zeros_like(logs, dtype=torch.int64)
            share = logs.exp()
            probs += share
            entropy -= torch.where(share == 0, 0.0, share * logs).sum(1)
            answer = torch.nan_to_num(logs, nan=-torch.inf).argmax(1, keepdim=True)
            votes.scatter_add_(1, answer, torch.ones_like(answer))
            count += 1
        if count == 0:
            raise ShapeError("members", "at least one member", "none", "Pass log-probabilities (S, N, C).")
        return _Tally(probs, entropy, votes, count)

    @cached_property
    def total(self) -> Tensor:
        """float64 (N,): entropy of the mean."""
        share: Tensor = torch.special.entr(self.probs / self.members)
        return share.sum(1)

    @property
    def expected(self) -> Tensor:
        """float64 (N,): mean of the entropies."""
        return self.entropy / self.members

    @property
    def information(self) -> tuple[Tensor, int]:
        """Mutual information, and how many were clamped at 0."""
        raw = self.total - self.expected
        return raw.clamp_min(0.0), int((raw < 0).sum())

    @property
    def variation(self) -> Tensor:
        """float64 (N,): share of votes outside the most frequent answer."""
        return self._known(1 - self.votes.amax(1).to(torch.float64) / self.members)

    @property
    def disagreement(self) -> Tensor:
        """float64 (N,): share of pairs with different answers."""
        if self.members < 2:
            return torch.full_like(self.entropy, math.nan)
        same = (self.votes * (self.votes - 1)).sum(1, dtype=torch.float64)
        return self._known(1 - same / (self.members * (self.members - 1)))

    def _known(self, values: Tensor) -> Tensor:
        return torch.where(torch.isnan(self.entropy), math.nan, values)


def predictive_entropy(members: Iterable[Tensor]) -> Tensor:
    """Return float64 (N,), H(mean over members of p): total uncertainty.

    Args:
        members: log-probabilities (S, N, C), or S tensors (N, C) in any order.
    """
    return _Tally.make(members).total


def expected_entropy(members: Iterable[Tensor]) -> Tensor:
    """Return float64 (N,), mean over members of H(p): what remains if the right member were known."""
    return _Tally.make(members).expected


def mutual_information(members: Iterable[Tensor]) -> tuple[Tensor, int]:
    """Return float64 (N,), predictive less expected entropy, and how many were below 0 by rounding and set to 0.

    References:
        Houlsby et al., Bayesian active learning for classification and preference learning, 2011, arXiv 1112.5745.
    """
    return _Tally.make(members).information


def variation_ratio(members: Iterable[Tensor]) -> Tensor:
    """Return float64 (N,), 1 - the share of the most frequent answer among the members' answers."""
    return _Tally.make(members).variation


def disagreement(members: Iterable[Tensor]) -> Tensor:
    """Return float64 (N,), the share of pairs of members with different answers; NaN for one member.

    From the votes n_k of S members: 1 - sum_k n_k (n_k - 1) / (S (S - 1)). Of equal probabilities the first class is
    the answer.
    """
    return _Tally.make(members).disagreement


def reduce_members(members: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the scores of an ensemble in one pass over its members, in memory that does not grow with their number.

    Args:
        members: log-probabilities (S, N, C), or S tensors (N, C) in any order.

    Returns:
        float64 (N,) each: ``predictive-entropy``, ``expected-entropy``, ``mutual-information``, ``disagreement``.

    Raises:
        ShapeError: No member, or members of different shapes.
    """
    tally = _Tally.make(members)
    return {
        "predictive-entropy": tally.total,
        "expected-entropy": tally.expected,
        "mutual-information": tally.information[0],
        "disagreement": tally.disagreement,
    }


def entropy(store: PredictionStore) -> Tensor:
    """Return float64 (N,) entropy of the answer in nats; for multi-label the mean of the labels' entropies."""
    if store.task == "multilabel":
        return rowwise(store, _label_entropy)
    return rowwise(store, lambda part: -torch.where(part.probs == 0, 0.0, part.probs * part.log_probs).sum(1))


def _label_entropy(store: PredictionStore) -> Tensor:
    odds = store.log_odds
    # H(p) = log(1 + e^z) - p z, without a difference of large numbers
    return (F.softplus(-odds.abs()) + odds.abs() * torch.sigmoid(-odds.abs())).mean(1)


class _MeanOf(SmoothMetric):
    """Mean of a value per sample."""

    direction = "none"
    bounds = (0.0, math.inf)

    def mean(self, values: Tensor, reason: str) -> Mapping[str, Part]:
        """Return the mean of the values that are not NaN."""
        known = ~torch.isnan(values)
        if not bool(known.any()):
            return {"": Part(None, known, reason)}
        rows = known.to(torch.float64)[None]
        return {"": Part(ratio(torch.where(known, values, 0.0)[None], rows), known, reason)}


@METRICS.register("mean-entropy")
class MeanEntropy(_MeanOf):
    """Mean entropy of the predictions in nats; for an ensemble that of its mean prediction."""

    title = "Mean entropy"

    def parts(self, store: PredictionStore, context: Context) -> Mapping[str, Part]:
        return self.mean(torch.where(store.finite, entropy(store), math.nan), "no_samples")


class _MeanScore(_MeanOf):
    """Mean of a score that ``reduce_members`` gave; NaN where the store has no members."""

    score: ClassVar[str]

    def parts(self, store: PredictionStore, context: Context) -> Mapping[str, Part]:
        if self.score not in store.scores:
            return {"": Part(None, torch.zeros_like(store.finite), "no_members")}
        return self.mean(store.scores[self.score].to(torch.float64), store.score_reasons.get(self.score, "no_samples"))


@METRICS.register("mean-mutual-information")
class MeanMutualInformation(_MeanScore):
    """Mean mutual information between answer and member, in nats."""

    title = "Mean mutual information"
    score = "mutual-information"


@METRICS.register("mean-disagreement")
class MeanDisagreement(_MeanScore):
    """Mean share of pairs of members with different answers."""

    title = "Mean disagreement"
    score = "disagreement"
    bounds = (0.0, 1.0)
