"""Counts of true class and answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Places, State, blocks, check_rows, zeros


def answers(logits: Tensor) -> Tensor:
    """Return int64 (N,), the first most probable class of logits (N, K); -1 for rows that are not finite."""
    return torch.where(torch.isfinite(logits).all(1), logits.argmax(1), -1)


@dataclass(eq=False, kw_only=True)
class Confusion(State):
    """Counts of (group, true class, answer).

    For several labels, or one mask a class, the label is the group and the classes are 0 and 1.

    Args:
        counts: int64 (G, K, K + 1); the last column holds rows without an answer, which are errors.
        refused: int64 (), labels, answers or groups outside their range.
        rows: Rows seen.
    """

    counts: Tensor
    sums: ClassVar[tuple[str, ...]] = ("counts",)

    @staticmethod
    def empty(classes: int, *, groups: int = 1, device: torch.device | str = "cpu") -> Confusion:
        """Return a state without rows."""
        return Confusion(counts=zeros((groups, classes, classes + 1), device), refused=zeros((), device))

    def update(self, predicted: Tensor, labels: Tensor, groups: Tensor | None = None) -> None:
        """Add rows.

        Args:
            predicted: int64 (N,) answers in [0, K), -1 for none, as from ``answers``.
            labels: int64 (N,) in [0, K), -1 for rows that are not annotated, which do not enter.
            groups: int64 (N,) in [0, G), -1 for rows that do not enter; group 0 without it.
        """
        check_rows("Confusion", len(labels), predicted, groups)
        self.count_rows(len(labels))
        count, classes, _ = self.counts.shape
        for block in blocks(len(labels), 1, labels.device):
            y, answer = labels[block], predicted[block]
            cell = y * (classes + 1) + torch.where(answer == -1, classes, answer)
            refuse = (y < -1) | (y >= classes) | (answer < -1) | (answer >= classes)
            group = None if groups is None else groups[block]
            shape = (count, classes * (classes + 1))
            Places.find(cell, group, shape, y == -1, refuse, self.refused).add_counts(self.counts)

    def accuracy(self) -> Tensor:
        """Return float64 (G,), the share of right answers; NaN without rows."""
        right, true, _ = self._totals()
        return right.sum(1) / true.sum(1)

    def recall(self) -> Tensor:
        """Return float64 (G, K), the share of right answers in each true class; NaN for absent classes."""
        right, true, _ = self._totals()
        return right / true

    def specificity(self) -> Tensor:
        """Return float64 (G, K), the share of other cases not called this class; NaN where there are none.

        A missing answer is an error in both rates.
        """
        right, true, given = self._totals()
        others = true.sum(1, keepdim=True) - true
        missing = self.counts[..., -1].to(torch.float64)
        wrong = given - right + missing.sum(1, keepdim=True) - missing
        return (others - wrong) / others

    def precision(self) -> Tensor:
        """Return float64 (G, K), the share of each answer that is right; NaN for answers never given."""
        right, _, given = self._totals()
        return right / given

    def dice(self) -> Tensor:
        """Return float64 (G, K), 2 TP / (2 TP + FP + FN); NaN where neither truth nor answers have the class."""
        right, true, given = self._totals()
        return 2 * right / (true + given)

    def iou(self) -> Tensor:
        """Return float64 (G, K), TP / (TP + FP + FN); NaN where neither truth nor answers have the class."""
        right, true, given = self._totals()
        return right / (true + given - right)

    def _totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return float64 (G, K): right answers, true cases, answers given."""
        self.check()
        counts = self.counts.to(torch.float64)
        return counts[..., :-1].diagonal(dim1=1, dim2=2), counts.sum(2), counts[..., :-1].sum(1)

    def _accepted(self) -> str:
        count, classes, _ = self.counts.shape
        return f"labels and answers from -1 to {classes - 1}, groups from -1 to {count - 1}"
