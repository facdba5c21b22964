"""Detectors that look at the logits only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.core.detector import Detector, Needs
from robustlab.core.errors import RangeError
from robustlab.core.registry import DETECTORS
from robustlab.core.types import ModelOutputs

from .base import block_rows, undefined


def over_classes(score: Callable[[Tensor], Tensor], logits: Tensor, least: torch.dtype = torch.float32) -> Tensor:
    """Return a score of blocks of logits that lie class by class, so that sums over classes are sums of long rows.

    Args:
        score: From float (C, n) to (n,).
        logits: float (N, C).
        least: Precision to work in, unless that of the logits is higher.

    Returns:
        float (N,), NaN in rows with NaN or infinite logits.
    """
    precision = torch.promote_types(logits.dtype, least)
    parts = []
    for block in torch.split(logits, block_rows(logits)):
        columns = block.T.to(precision, copy=True, memory_format=torch.contiguous_format)
        parts.append(undefined(score(columns), columns.T))
    return torch.cat(parts)


def _around_the_answer(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return, for logits (C, n), what confident answers do not make tie.

    Returns:
        Gaps z_c - z_y, -inf at the answer y (C, n); log((1 - p) / p) for p the largest probability (n,); probabilities
        of the others over the largest of them, 0 at the answer (C, n), and the gap of that one (n,).
    """
    best, answer = logits.max(0, keepdim=True)
    gaps = (logits - best).scatter(0, answer, -torch.inf)
    second = gaps.amax(0).clamp_min(torch.finfo(gaps.dtype).min)
    others = (gaps - second).exp()
    return gaps, second + others.sum(0).log(), others, second


@DETECTORS.register("msp")
@dataclass(frozen=True)
class MSP(Detector):
    """Maximum softmax probability, written as the log-odds against the answer so that confident samples do not tie.

    Classes: log sum_{c != y} exp(z_c - z_y) with y the answer, which is log((1 - p) / p) for p the largest softmax
    probability: the same order as -p. Multi-label: -max_l z_l, minus the largest log-odds of any label, the same
    order as minus the largest sigmoid (MaxLogit). An image without any finding thus looks unfamiliar to it; prefer
    other detectors where such images are common.

    References:
        Hendrycks, Gimpel 2017, arXiv:1610.02136. Multi-label: Hendrycks, Basart, Mazeika et al. 2022,
        arXiv:1911.11132.
    """

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,); NaN in rows with NaN or infinite logits."""
        if outputs.task == "multilabel":
            return _least_likely(outputs.logits)
        return over_classes(lambda logits: _around_the_answer(logits)[1], outputs.logits)


def _least_likely(logits: Tensor) -> Tensor:
    return undefined(-logits.to(torch.promote_types(logits.dtype, torch.float32)).amax(1), logits)


@DETECTORS.register("energy")
@dataclass(frozen=True)
class Energy(Detector):
    """Energy -T log sum_c exp(z_c / T); for multi-label the joint energy -T sum_l softplus(z_l / T).

    Undefined for models that return probabilities, as it needs the offset of the logits.

    Args:
        temperature: T, above 0.

    Raises:
        RangeError: T is not positive.

    References:
        Liu, Wang, Owens, Li 2020, arXiv:2010.03759. Multi-label: Wang, Liu, Bocchieri, Li 2021, arXiv:2109.14162.
    """

    temperature: float = 1.0

    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.LOGITS, Needs.OFFSET})

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise RangeError("Energy", "a positive temperature", f"{self.temperature}", "1 is the usual value.")

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,); NaN in rows with NaN or infinite logits."""
        temperature = self.temperature

        def joint(logits: Tensor) -> Tensor:
            return -temperature * F.softplus(logits / temperature).sum(0)

        def energy(logits: Tensor) -> Tensor:
            best = logits.amax(0)
            return -temperature * ((logits - best) / temperature).exp().sum(0).log() - best

        return over_classes(joint if outputs.task == "multilabel" else energy, outputs.logits)


@DETECTORS.register("max-logit")
@dataclass(frozen=True)
class MaxLogit(Detector):
    """Minus the largest logit; for several labels, minus that of the likeliest one.

    Undefined for models that return probabilities, as it needs the offset of the logits.

    References:
        Hendrycks, Basart, Mazeika et al. 2022, arXiv:1911.11132.
    """

    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.LOGITS, Needs.OFFSET})

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,); NaN in rows with NaN or infinite logits."""
        return _least_likely(outputs.logits)


@DETECTORS.register("entropy")
@dataclass(frozen=True)
class Entropy(Detector):
    """Entropy of the softmax, in nats; for several labels the sum of the entropies of each.

    Summed around the largest probability, so that confident samples do not tie.

    References:
        As a score for foreign inputs: Hendrycks, Mazeika, Dietterich 2019, arXiv:1812.04606, section 4.
    """

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float64 (N,), 0 or more; NaN in rows with NaN or infinite logits."""
        return over_classes(_doubts if outputs.task == "multilabel" else _doubt, outputs.logits)


def _doubt(logits: Tensor) -> Tensor:
    gaps, odds, others, second = _around_the_answer(logits)
    # -sum p (gap - total), with total = -log p of the answer: no term is negative, so that no digits are lost; what is
    # far below what single precision holds is one factor of the sum
    total = F.softplus(odds.to(torch.float64))
    return total - (second - total).exp() * (others * gaps.clamp_min(torch.finfo(gaps.dtype).min)).sum(0)


def _doubts(logits: Tensor) -> Tensor:
    # the same for z and -z; p log p of the smaller probability keeps its digits
    doubt = -logits.abs().to(torch.float64)
    return (F.softplus(doubt) - torch.sigmoid(doubt) * doubt).sum(0)


@DETECTORS.register("gen")
@dataclass(frozen=True)
class GEN(Detector):
    """Generalised entropy: the sum of p^gamma (1 - p)^gamma over the largest probabilities, or over all labels.

    Made from log p and log(1 - p): clamped probabilities tie for confident samples.

    Args:
        gamma: Exponent, in (0, 1].
        top: Largest probabilities that count; all where there are fewer.

    Raises:
        RangeError: Numbers make no sense.

    References:
        Liu, Lochman, Zach, GEN: pushing the limits of softmax-based out-of-distribution detection, 2023.
    """

    gamma: float = 0.1
    top: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1 or self.top < 1:
            got = f"gamma={self.gamma}, top={self.top}"
            raise RangeError("GEN", "gamma in (0, 1] and top of 1 or more", got, "The authors use 0.1 and 100.")

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,); NaN in rows with NaN or infinite logits."""
        return over_classes(self._labels if outputs.task == "multilabel" else self._classes, outputs.logits)

    def _labels(self, logits: Tensor) -> Tensor:
        logs = F.logsigmoid(logits) + F.logsigmoid(-logits)
        if len(logs) > self.top:
            logs = logs.gather(0, logits.topk(self.top, 0, sorted=False).indices)
        return (self.gamma * logs).exp().sum(0)

    def _classes(self, logits: Tensor) -> Tensor:
        gaps, odds, others, second = _around_the_answer(logits)
        total = F.softplus(odds)  # -log p of the answer
        probs = (others * (second - total).exp()).clamp_max(0.5)
        # log p + log(1 - p): -inf at the answer, whose own is odds - 2 total
        logs = gaps + torch.log1p(-probs) - total
        if len(logs) > self.top:
            logs = logs.gather(0, gaps.topk(self.top - 1, 0, sorted=False).indices)
        return (self.gamma * logs).exp().sum(0) + torch.exp(self.gamma * (odds - 2 * total))
