"""PredictionStore: what one model answered on one data set under one condition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.core.errors import ConfigError, ShapeError
from robustlab.core.rng import hashed
from robustlab.core.types import Task


@dataclass(frozen=True, eq=False)
class PredictionStore:
    """Predictions of one (model, data, condition); every metric is a pure function of it.

    Args:
        ids: int64 (N,).
        logits: float32 (N, C); rows with NaN or infinity count as errors in accuracy-type metrics and are left out of
            the others.
        labels: int64 (N,), (N, L) in {0, 1, -1} for multi-label, or None (e.g. OOD sets).
        task: Declared task.
        scores: Scorer name to float (N,); larger means more out of distribution. NaN where undefined.
        score_reasons: Scorer name to the reason why all its scores are NaN.
        groups: Column to int64 codes (N,), -1 for missing.
        clusters: int64 (N,) codes of the resampling unit (patient), or None for images.
        pseudonyms: ``ids`` are hashed already, as they are in saved reports.
        answers_only: Only answers are known: a row of ``logits`` is 1 at the answer and 0 elsewhere, NaN where there is
            none, and no probability follows from it. Not for multi-label.
    """

    ids: Tensor
    logits: Tensor
    labels: Tensor | None
    task: Task
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    score_reasons: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, Tensor] = field(default_factory=dict)
    clusters: Tensor | None = None
    pseudonyms: bool = False
    answers_only: bool = False

    def __post_init__(self) -> None:
        if self.answers_only and self.task == "multilabel":
            raise ConfigError(
                "PredictionStore",
                "probabilities or logits for a multi-label task",
                "answers without probabilities",
                "Answers alone are one class a sample: use task='multiclass', or pass probabilities.",
            )
        count = len(self.logits)
        for name, value in (("ids", self.ids), ("labels", self.labels), ("clusters", self.clusters)):
            if value is not None and len(value) != count:
                raise ShapeError("PredictionStore", f"{count} {name}", f"{len(value)}", "Give one row a sample.")

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def num_classes(self) -> int:
        """Classes, or labels for multi-label."""
        return self.logits.shape[1]

    @property
    def positive_class(self) -> bool:
        """The task has one positive class: two classes, of which 1 is the finding."""
        return self.task != "multilabel" and self.num_classes == 2

    @cached_property
    def keys(self) -> Tensor:
        """int64 (N,) hashed ids, that pair and resample samples: the same before saving and after loading."""
        return self.ids if self.pseudonyms else hashed(self.ids)

    @cached_property
    def finite(self) -> Tensor:
        """bool (N,): every output of the row is finite."""
        return torch.isfinite(self.logits).all(1)

    @property
    def _numbers(self) -> Tensor:
        """float64 (N, C) logits that mean more than the answer."""
        logits = self.logits.to(torch.float64)
        return torch.full_like(logits, torch.nan) if self.answers_only else logits

    @cached_property
    def log_probs(self) -> Tensor:
        """float64 (N, C) log-softmax; for multi-label the log of each label's sigmoid. NaN for answers only."""
        logits = self._numbers
        return F.logsigmoid(logits) if self.task == "multilabel" else F.log_softmax(logits, 1)

    @cached_property
    def probs(self) -> Tensor:
        """float64 (N, C) probabilities; for multi-label one independent probability a label."""
        return self.log_probs.exp()

    @cached_property
    def log_odds(self) -> Tensor:
        """float64 (N, C) log p / (1 - p) of each class or label, from logits: no ties where probabilities saturate.

        NaN for answers only.
        """
        logits = self._numbers
        if self.task == "multilabel" or self.num_classes < 2:
            return logits
        if self.num_classes == 2:
            return logits - logits.flip(1)
        odds = self.log_probs - torch.log1p(-self.probs)
        top = torch.nan_to_num(logits, nan=-torch.inf).argmax(1, keepdim=True)
        others = logits.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)
        return odds.scatter(1, top, logits.gather(1, top) - others)

    @cached_property
    def predicted(self) -> Tensor:
        """int64 (N,) most probable class, first index at ties; -1 for rows that are not finite. Not for multi-label."""
        answer = torch.nan_to_num(self.logits, nan=-torch.inf).argmax(1)
        return torch.where(self.finite, answer, -1)

    def select(self, rows: Tensor) -> PredictionStore:
        """Return the samples at ``rows`` (bool (N,) or int64 (M,))."""
        return PredictionStore(
            ids=self.ids[rows],
            logits=self.logits[rows],
            labels=None if self.labels is None else self.labels[rows],
            task=self.task,
            scores={name: value[rows] for name, value in self.scores.items()},
            score_reasons=self.score_reasons,
            groups={name: codes[rows] for name, codes in self.groups.items()},
            clusters=None if self.clusters is None else self.clusters[rows],
            pseudonyms=self.pseudonyms,
            answers_only=self.answers_only,
        )
