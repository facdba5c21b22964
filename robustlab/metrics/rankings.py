"""Classes or labels against the rest, ranked by log-odds: what the metrics of discrimination count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .base import Statistic
from .stats import cumulative, rank_probability
from .store import PredictionStore
from .thresholds import labels_of

_CELLS = 1 << 15  # numbers that stay in a core's cache, and that torch leaves to one thread: waiting costs more
_MANY = 1 << 16


def rank_keys(store: PredictionStore, rows: Tensor) -> Tensor:
    """Return float64 (C, n), for each class or label numbers that order the rows (int64 (n,)) as its log-odds do.

    One row for two classes. From the logits, so saturated probabilities make no ties; the order is that of
    log p for p <= 1/2 and of the log-odds z_k - log sum_{j != k} exp(z_j) above, where log p would lose digits. The sum
    is made of terms rounded to one grid, so it is exact, and permuted classes change no digit.
    """
    logits, count = store.logits, store.num_classes
    if store.task == "multilabel" or count < 2:
        return logits[rows].T.to(torch.float64, memory_format=torch.contiguous_format)
    if count == 2:
        return (logits[rows, 1].to(torch.float64) - logits[rows, 0].to(torch.float64))[None]
    out = torch.empty((count, len(rows)), dtype=torch.float64, device=logits.device)
    # x + grid - grid rounds x in [0, 1] so that a sum of as many such terms as there are classes needs no rounding
    grid = 1.5 * 2.0 ** count.bit_length()
    step = max(1, _CELLS // count)
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        z = logits.index_select(0, rows[block]).T.to(torch.float64, memory_format=torch.contiguous_format)
        top, where = z.max(0, keepdim=True)
        z -= top
        z.scatter_(0, where, -torch.inf)
        second = z.amax(0)
        others = (z - second).exp_().add_(grid).sub_(grid).sum(0).log_()
        ahead = -second - others
        scale = torch.log1p((-ahead).exp_()) - math.log(2)
        # log p + log 2 meets the log-odds at p = 1/2, and is below them where p is larger
        z -= scale
        z.scatter_(0, where, torch.maximum(-scale, ahead)[None])
        out[:, block] = z
    return out


@dataclass(frozen=True, eq=False)
class Ranking:
    """One class or label against the rest.

    Args:
        index: Class or label.
        rows: int64 (n,), the rows that enter.
        scores: float64 (n,), larger for positives.
        inside: Where the positives are.
    """

    index: int
    rows: Tensor
    scores: Tensor
    inside: slice

    def _split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return values[self.inside], torch.cat([values[: self.inside.start], values[self.inside.stop :]])

    @property
    def counts(self) -> tuple[int, int]:
        """Positives and negatives."""
        positives = self.inside.stop - self.inside.start
        return positives, len(self.rows) - positives

    @cached_property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Rows of the positives (P,) and of the negatives (M,)."""
        return self._split(self.rows)

    @cached_property
    def values(self) -> tuple[Tensor, Tensor]:
        """Scores of the positives (P,) and of the negatives (M,)."""
        return self._split(self.scores)

    @cached_property
    def ordered(self) -> tuple[Tensor, Tensor]:
        """Scores of positives and of negatives, ascending."""
        if self.scores.device.type != "cpu":
            high, low = self._split(self.scores)
            return high.sort().values, low.sort().values
        # NumPy sorts several times faster than torch on a CPU
        scores = self.scores.numpy()
        low_values = np.concatenate([scores[: self.inside.start], scores[self.inside.stop :]])
        low_values.sort()
        return torch.from_numpy(np.sort(scores[self.inside])), torch.from_numpy(low_values)

    def by_score(self) -> list[tuple[Tensor, Tensor]]:
        """Return (rows, scores) of the positives and of the negatives, ascending by score."""
        orders = [torch.argsort(values, stable=True) for values in self.values]
        return [(r[o], v[o]) for r, v, o in zip(self.sides, self.values, orders, strict=True)]

    def wins(self) -> Tensor:
        """Return int64 (), pairs that are in order, counted twice, plus equal ones."""
        high, low = self.ordered
        below = torch.searchsorted(low, high)
        through = torch.searchsorted(low, high, right=True)
        return below.sum() + through.sum()

    def placements(self) -> tuple[Tensor, Tensor]:
        """Return the share of negatives below each positive, and of positives above each negative; ties count half."""
        first, second = (
            (torch.searchsorted(others, values) + torch.searchsorted(others, values, right=True)).to(torch.float64)
            / (2 * len(others))
            for values, others in zip(self.values, self.ordered[::-1], strict=True)
        )
        return first, 1 - second

    def precision(self) -> Tensor:
        """Return float64 (), the mean precision at the scores of the positives."""
        high, low = self.ordered
        true = len(high) - torch.searchsorted(high, high)
        false = len(low) - torch.searchsorted(low, high)
        return (true / (true + false).to(torch.float64)).mean()

    def area_statistic(self) -> Statistic:
        """Return the area under the ROC curve as a function of the weights of all samples."""
        (positives, high), (negatives, low) = self.by_score()
        area = rank_probability(high, low)
        return lambda weights: area(weights[positives], weights[negatives])

    def precision_statistic(self) -> Statistic:
        """Return the average precision as a function of the weights of all samples."""
        (positives, high), (negatives, low) = self.by_score()
        first, below = torch.searchsorted(high, high), torch.searchsorted(low, high)

        def statistic(weights: Tensor) -> Tensor:
            own = weights[positives]
            true, false = cumulative(own), cumulative(weights[negatives])
            hits = true[-1] - true[first]
            called = hits + (false[-1] - false[below])
            # where nothing of weight is called, the positive itself has none
            return (own * hits / called.clamp_min(torch.finfo(called.dtype).tiny)).sum(0) / true[-1]

        return statistic


def rankings(store: PredictionStore) -> tuple[list[Ranking], Tensor]:
    """Return the classes or labels that have positives, and bool (N,), the rows that enter any of them."""
    labels = labels_of(store)
    finite = torch.zeros_like(store.finite) if store.answers_only else store.finite
    if store.task == "multilabel":
        known = labels >= 0
        keys = rank_keys(store, torch.arange(len(store), device=labels.device))
        made = []
        for index, key in enumerate(keys):
            sides = [(finite & (labels[:, index] == side)).nonzero()[:, 0] for side in (1, 0)]
            rows = torch.cat(sides)
            made.append(Ranking(index, rows, key[rows], slice(0, len(sides[0]))))
        return [item for item in made if item.counts[0]], finite & known.any(1)
    rows = _grouped(labels, store.num_classes)
    if not bool(finite.all()):
        rows = rows[finite[rows]]
    # rows of a class are neighbours from here on, so its negatives are all before and all behind
    keys = rank_keys(store, rows)
    ends = [0, *torch.bincount(labels[rows], minlength=store.num_classes).cumsum(0).tolist()]
    classes = (1,) if store.positive_class else range(store.num_classes)
    made = [
        Ranking(index, rows, key, slice(ends[index], ends[index + 1])) for key, index in zip(keys, classes, strict=True)
    ]
    return [item for item in made if item.counts[0]], finite


def values_of(function: Callable[[Ranking], Tensor], made: Sequence[Ranking]) -> Tensor:
    """Return float64 (k,), the value of every ranking, on the CPU."""
    threads = min(len(made), torch.get_num_threads())
    if threads > 1 and made[0].scores.device.type == "cpu" and len(made[0].rows) >= _MANY:
        with ThreadPoolExecutor(threads) as pool:  # a sort by NumPy takes one thread and leaves the interpreter free
            list(pool.map(lambda item: item.ordered, made))
    return torch.stack([function(item) for item in made]).cpu()


def _grouped(labels: Tensor, classes: int) -> Tensor:
    """Return the rows ordered by label, int64 (N,)."""
    if labels.device.type == "cpu" and classes < 1 << 15:  # small integers are sorted by radix there
        return torch.from_numpy(np.argsort(labels.numpy().astype(np.int16), kind="stable"))
    return torch.argsort(labels, stable=True)
