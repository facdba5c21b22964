"""Rules of the doctor: pure functions of counts, with stated false-alarm rates.

A test is exact and made at ALPHA = 0.001; where the doctor first looks at a few samples and goes on only if these look
suspicious, the samples of the test are all that it then looked at, so the first look can only lower the rate. A small
p-value alone does not tell a mistake from a network that is untrained, whose answers fit one wrong reading of the data
better than the right one by chance; so the better reading must also be good: its answers beat the most frequent class
(exact binomial test), and its mean recall and the median probability that it gives to the right answer are at least
halfway from chance to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import binom, chi2_contingency
from torch import Tensor

ALPHA = 0.001
HALFWAY = 0.5
RARE = 0.1
LITTLE_RECALL = 0.2


def p_above(hits: int, n: int, share: float) -> float:
    """Return P(X >= hits) for X ~ Binomial(n, share)."""
    return float(binom.sf(hits - 1, n, share))


def p_below(hits: int, n: int, share: float) -> float:
    """Return P(X <= hits) for X ~ Binomial(n, share)."""
    return float(binom.cdf(hits, n, share))


def p_paired(gained: int, lost: int) -> float:
    """Return the one-sided exact McNemar p-value: P(X >= gained) for X ~ Binomial(gained + lost, 1/2).

    References:
        McNemar, Note on the sampling error of the difference between correlated proportions, 1947.
    """
    return p_above(gained, gained + lost, 0.5) if gained + lost else 1.0


@dataclass(frozen=True)
class Comparison:
    """Two readings of the same answers, or the answers to two readings of the same images.

    Args:
        n: Samples.
        right: Samples the first reading gets right.
        other: Samples the second one gets right.
        gained: Samples that only the second one gets right.
        lost: Samples that only the first one gets right.
        majority: Share of the most frequent label.
        informed: Mean recall of the second reading, 0 at chance and 1 at the best.
        sure: Median probability that is given to what the second reading takes for right, likewise.
    """

    n: int
    right: int
    other: int
    gained: int
    lost: int
    majority: float
    informed: float
    sure: float

    @staticmethod
    def of(labels: Tensor, first: Tensor, second: Tensor, given: Tensor, outputs: int) -> Comparison:
        """Count.

        Args:
            labels: int64 (N,).
            first: bool (N,), right under the first reading.
            second: bool (N,), right under the second one.
            given: float (N,), probability given to what the second reading takes for right.
            outputs: Number of classes of the model.
        """
        _, codes, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        classes = len(counts)
        recall = torch.zeros(classes, dtype=torch.float64).index_add_(0, codes, second.double()) / counts
        typical = float(given.nan_to_num().median()) if len(given) else 0.0
        return Comparison(
            n=len(labels),
            right=int(first.sum()),
            other=int(second.sum()),
            gained=int((second & ~first).sum()),
            lost=int((first & ~second).sum()),
            majority=int(counts.max()) / max(len(labels), 1),
            informed=_above_chance(float(recall.mean()), classes),
            sure=_above_chance(typical, outputs),
        )

    @property
    def p(self) -> float:
        """Exact McNemar p-value of the second reading being the better one."""
        return p_paired(self.gained, self.lost)

    def second_is_right(self, alpha: float = ALPHA) -> bool:
        """Tell whether the second reading is the right one: significantly better, and good (see the module)."""
        above_majority = p_above(self.other, self.n, self.majority) <= alpha
        return self.p <= alpha and above_majority and min(self.informed, self.sure) >= HALFWAY

    def first_is_better(self) -> bool:
        """Tell whether the first reading is the better one (one-sided exact McNemar test at 0.05)."""
        return p_paired(self.lost, self.gained) <= 0.05

    def suspicious(self) -> bool:
        """Tell whether to look at more samples: the second reading is ahead by two samples or more."""
        return self.gained - self.lost >= 2


def _above_chance(share: float, classes: int) -> float:
    """Return where a share lies between chance (0) and 1."""
    return (share - 1 / classes) / (1 - 1 / classes) if classes > 1 else 0.0


def is_constant(moved: int, others: int) -> bool:
    """Tell whether a model gives one answer whatever it sees.

    That is so if, of images with another label than that answer, the share of other answers is below one in five at a
    one-sided 99.9 % confidence (exact binomial test), which takes at least 31 such images.

    Args:
        moved: Other answers.
        others: Images with another label.
    """
    return others > 0 and p_below(moved, others, LITTLE_RECALL) <= ALPHA


def below_majority(answers: Tensor, labels: Tensor) -> tuple[int, int, float] | None:
    """Tell whether a model is worse than always answering the most frequent class, and its answers tell nothing.

    The first by an exact binomial test at 0.001; the second if a chi-squared test finds no association of answers and
    labels at 0.05, so a model that trades accuracy for recall of a rare class is not meant.

    Returns:
        Right answers, samples with the most frequent label, and the p-value; or None.
    """
    right = int((answers == labels).sum())
    values, codes, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    most = int(counts.max())
    if len(values) < 2:
        return None
    p = p_below(right, len(labels), most / len(labels))
    if p > ALPHA:
        return None
    given, answer_codes = torch.unique(answers, return_inverse=True)
    if len(given) > 1:
        table = torch.bincount(codes * len(given) + answer_codes, minlength=len(values) * len(given))
        if chi2_contingency(table.reshape(len(values), len(given)).numpy()).pvalue <= 0.05:
            return None
    return right, most, p


def never_occurring(labels: Tensor, num_classes: int) -> tuple[int, ...]:
    """Return classes that never occur where they should have: each a tenth as frequent as in an even split, or more.

    Were the ``m`` classes above the highest label (or below the lowest) that frequent, ``n`` labels would miss all of
    them with probability (1 - m / (10 C))^n; that must be at most 0.001 / C, for the C places where labels can end.
    Single classes in between count likewise with m = 1.
    """
    n = len(labels)
    if n == 0 or num_classes < 2:
        return ()
    present = torch.bincount(labels.clamp(0, num_classes - 1), minlength=num_classes) > 0
    found = present.nonzero()[:, 0]
    low, high = int(found[0]), int(found[-1])

    def surprising(missing: int) -> bool:
        return missing > 0 and (1 - RARE * missing / num_classes) ** n * num_classes <= ALPHA

    out = [i for i in range(low) if surprising(low)]
    out += [i for i in range(low, high) if not bool(present[i]) and surprising(1)]
    return (*out, *(i for i in range(high + 1, num_classes) if surprising(num_classes - 1 - high)))
