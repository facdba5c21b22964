"""Detectors that look at decision boundaries and the gradient of the last layer: fDBD, GradNorm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from robustlab.core.detector import Folds, Needs
from robustlab.core.registry import DETECTORS
from robustlab.core.types import ModelOutputs

from .base import OnFeatures, by_blocks, undefined


@DETECTORS.register("fdbd")
@dataclass(frozen=True)
class FDBD(OnFeatures):
    """Minus the mean distance of the feature from the decision boundaries, over its distance from the mean feature.

    -1/(C-1) sum over c != y of (z_y - z_c) / (|w_y - w_c| |h - mean|), with y the answer. Classes with the weights of
    the answer have no boundary with it and are left out.

    Args:
        tap: See ``OnFeatures``; the last layer has to stand on it.

    References:
        Liu, Qin 2024, arXiv:2312.11536.
    """

    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.FEATURES, Needs.HEAD, Needs.LOGITS})

    tap: str = field(default="penultimate", kw_only=True)

    def learn(self, folds: Folds) -> dict[str, Tensor]:
        assert folds.head is not None  # noqa: S101 - fit_folds has checked it, for the type checkers
        mean = self.mean_features(folds)
        weight = folds.head.weight.detach().to(torch.float64)
        apart = torch.stack([(weight - row).norm(dim=1) for row in weight])
        return {"mean": mean, "apart": apart}

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,); NaN in rows with NaN or infinite features or logits."""
        features = self.features(outputs)
        logits = outputs.logits.to(features.dtype)
        best, answer = logits.max(1, keepdim=True)
        apart = self.numbers("apart", features)
        # 1 / (distance x classes that have a boundary with the answer), 0 where there is none
        share = torch.where(apart > 0, 1 / apart, 0) / (apart > 0).sum(1, keepdim=True).clamp_min(1)
        mean = torch.linalg.vecdot(best - logits, share[answer.squeeze(1)])
        centre = self.numbers("mean", features)
        length = by_blocks(lambda block: (block - centre).norm(dim=1), features)
        return undefined(-mean / length.clamp_min(torch.finfo(length.dtype).tiny), length, logits)


@DETECTORS.register("gradnorm")
@dataclass(frozen=True)
class GradNorm(OnFeatures):
    """Minus the L1 norm of the gradient of the last layer for the KL divergence of the uniform from the softmax.

    In closed form -|h|_1 |p - 1/C|_1, the mean over classes of that gradient.

    Args:
        tap: See ``OnFeatures``; the last layer has to stand on it.

    References:
        Huang, Geng, Li 2021, arXiv:2110.00218.
    """

    learns: ClassVar[bool] = False
    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.FEATURES, Needs.LOGITS})

    tap: str = field(default="penultimate", kw_only=True)

    def learn(self, folds: Folds) -> dict[str, Tensor]:
        del folds
        return {}

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,), 0 or less; NaN in rows with NaN or infinite features or logits."""
        features = self.features(outputs)
        probs = outputs.logits.to(torch.float64).softmax(1)
        away = (probs - 1 / probs.shape[1]).abs().sum(1).to(features.dtype)
        length = by_blocks(lambda block: block.abs().sum(1), features)
        return undefined(-length * away, length, outputs.logits)
