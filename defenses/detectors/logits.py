"""Detectors that look at the logits only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.core.detector import Detector, Needs
from robustlab.core.errors import RangeError
from robustlab.core.registry import DETECTORS
from robustlab.core.types import ModelOutputs


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
        """Return float64 (N,); NaN in rows with NaN or infinite logits."""
        logits = outputs.logits.to(torch.float64)
        best = logits.amax(1, keepdim=True)
        if outputs.task == "multilabel":
            score = -best.squeeze(1)
        else:
            answer = logits.argmax(1, keepdim=True)
            score = torch.logsumexp((logits - best).scatter(1, answer, -torch.inf), 1)
        return torch.where(torch.isfinite(logits).all(1), score, torch.nan)


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
        """Return float64 (N,); NaN in rows with NaN or infinite logits."""
        logits = outputs.logits.to(torch.float64)
        scaled = logits / self.temperature
        total = F.softplus(scaled).sum(1) if outputs.task == "multilabel" else torch.logsumexp(scaled, 1)
        return torch.where(torch.isfinite(logits).all(1), -self.temperature * total, torch.nan)


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
        """Return float64 (N,); NaN in rows with NaN or infinite logits."""
        logits = outputs.logits.to(torch.float64)
        return torch.where(torch.isfinite(logits).all(1), -logits.amax(1), torch.nan)


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
        logits = outputs.logits.to(torch.float64)
        finite = torch.isfinite(logits).all(1)
        logits = torch.where(finite[:, None], logits, 0)
        if outputs.task == "multilabel":
            # the same for z and -z; p log p of the smaller probability keeps its digits
            doubt = -logits.abs()
            score = (F.softplus(doubt) - torch.sigmoid(doubt) * doubt).sum(1)
        else:
            others, right, gaps = _around_the_answer(logits)
            # p log p of the answer, with log p = -log(1 + sum of the others over it)
            score = right * torch.log1p(others) + (right[:, None] * gaps.exp() * _minus_log(gaps, others)).sum(1)
        return torch.where(finite, score, torch.nan)


def _around_the_answer(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum of the other probabilities over that of the answer, probability of the answer, gaps of the others).

    Gaps are z_c - z_y, -inf at the answer: float64 (N,), (N,), (N, C).
    """
    best, answer = logits.max(1, keepdim=True)
    gaps = (logits - best).scatter(1, answer, -torch.inf)
    others = gaps.exp().sum(1)
    return others, 1 / (1 + others), gaps


def _minus_log(gaps: Tensor, others: Tensor) -> Tensor:
    """Return -log p of the classes beside the answer, 0 at the answer."""
    return torch.where(torch.isinf(gaps), 0, torch.log1p(others)[:, None] - gaps)


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
        """Return float64 (N,); NaN in rows with NaN or infinite logits."""
        logits = outputs.logits.to(torch.float64)
        finite = torch.isfinite(logits).all(1)
        logits = torch.where(finite[:, None], logits, 0)
        if outputs.task == "multilabel":
            logs = F.logsigmoid(logits) + F.logsigmoid(-logits)
            order = logits
        else:
            others, _, gaps = _around_the_answer(logits)
            below = -_minus_log(gaps, others)
            answer = torch.isinf(gaps)
            own = others.log() - 2 * torch.log1p(others)  # log p + log(1 - p) of the answer
            logs = torch.where(answer, own[:, None], below + torch.log1p(-below.exp().clamp_max(0.5)))
            order = torch.where(answer, torch.inf, gaps)
        if logs.shape[1] > self.top:
            logs = logs.gather(1, order.topk(self.top, 1).indices)
        return torch.where(finite, (self.gamma * logs).exp().sum(1), torch.nan)
