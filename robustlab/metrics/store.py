"""PredictionStore: what one model answered on one data set under one condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.core.errors import ConfigError, ShapeError
from robustlab.core.rng import hashed
from robustlab.core.types import Task

_CELLS = 1 << 18  # float64 numbers worked on at once: 2 MB


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
        # a sum is finite only if all that is summed is, and costs a tenth; large outputs may overflow it
        if self.logits.is_floating_point() and bool(torch.isfinite(self.logits.sum())):
            return torch.ones(len(self), dtype=torch.bool, device=self.logits.device)
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
        answer = self.logits.argmax(1)
        return answer if bool(self.finite.all()) else answer.masked_fill(~self.finite, -1)

    @cached_property
    def answers(self) -> tuple[Tensor, Tensor]:
        """``predicted`` and the float64 (N,) probability of that class, made without the others.

        The probability is NaN in rows that are not finite, and for answers only. Not for multi-label.
        """
        count, classes = self.logits.shape
        sure = torch.full((count,), torch.nan, dtype=torch.float64, device=self.logits.device)
        step = max(1, _CELLS // max(classes, 1))
        for start in range(0, 0 if self.answers_only else count, step):
            rows = slice(start, start + step)
            # classes first: what runs over classes then runs along contiguous rows
            z = self.logits[rows].T.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
            sure[rows] = z.sub_(z.amax(0)).exp_().sum(0).reciprocal_()
        if not bool(self.finite.all()):
            sure.masked_fill_(~self.finite, torch.nan)
        return self.predicted, sure

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

    @staticmethod
    def concatenate(stores: Sequence[PredictionStore]) -> PredictionStore:
        """Return the samples of several stores, one after the other: parts of one data set, such as shards.

        Codes of groups and clusters must mean the same in all of them. A reason for missing scores is kept where every
        store gives one.

        Raises:
            ConfigError: The stores are not alike, or there is none.
        """
        if not stores:
            raise ConfigError("PredictionStore.concatenate", "at least one store", "none", "Pass the parts.")
        first = stores[0]
        for other in stores[1:]:
            if other._kind() != first._kind():
                raise ConfigError(
                    "PredictionStore.concatenate",
                    f"stores like the first one, {first._kind()}",
                    f"{other._kind()}",
                    "Join only parts of one data set, predicted by one model.",
                )
        labels = [store.labels for store in stores if store.labels is not None]
        clusters = [store.clusters for store in stores if store.clusters is not None]
        reasons = [name for name in first.score_reasons if all(name in store.score_reasons for store in stores)]
        return PredictionStore(
            ids=torch.cat([store.ids for store in stores]),
            logits=torch.cat([store.logits for store in stores]),
            labels=torch.cat(labels) if labels else None,
            task=first.task,
            scores={name: torch.cat([store.scores[name] for store in stores]) for name in first.scores},
            score_reasons={name: first.score_reasons[name] for name in reasons},
            groups={name: torch.cat([store.groups[name] for store in stores]) for name in first.groups},
            clusters=torch.cat(clusters) if clusters else None,
            pseudonyms=first.pseudonyms,
            answers_only=first.answers_only,
        )

    def _kind(self) -> dict[str, object]:
        """Return what stores must share to be joined."""
        return {
            "task": self.task,
            "classes": self.num_classes,
            "labels": self.labels is not None,
            "scores": sorted(self.scores),
            "groups": sorted(self.groups),
            "clusters": self.clusters is not None,
            "pseudonyms": self.pseudonyms,
            "answers only": self.answers_only,
        }
