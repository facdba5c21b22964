"""Detectors that keep in-distribution features and look for the nearest ones: KNN, NNGuide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustlab.core.detector import Folds, Needs
from robustlab.core.errors import ConfigError, RangeError
from robustlab.core.registry import DETECTORS
from robustlab.core.types import ModelOutputs

from .base import BANK, OnFeatures, Sampler, finite_rows, undefined, unit
from .logits import Energy

_CELLS = 1 << 26  # similarities that are held at once


@dataclass(frozen=True)
class _Bank(OnFeatures):
    k: int = 50
    bank: int = BANK
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k < 1 or self.bank < 1:
            got = f"k={self.k}, bank={self.bank}"
            raise RangeError(type(self).__name__, "k and bank of 1 or more", got, "50 neighbours are usual.")

    def sampled(self, folds: Folds) -> Sampler:
        """Return a sample of unit features and their logits."""
        kept = Sampler(self.bank, self.seed)
        for outputs, _ in folds:
            features, logits = finite_rows(self.features(outputs), outputs.logits)
            kept.add(unit(features), logits)
        if not kept.rows or len(kept.rows[0]) == 0:
            raise ConfigError(self.name, "in-distribution data with finite features", "none", "Pass some.")
        return kept

    def blocks(self, features: Tensor, bank: Tensor) -> tuple[Tensor, ...]:
        """Return features in parts whose similarities with the bank fit into memory."""
        return tuple(torch.split(features, max(1, _CELLS // len(bank))))


@DETECTORS.register("knn")
@dataclass(frozen=True)
class KNN(_Bank):
    """Distance of the feature, scaled to length 1, from the k-th nearest in-distribution one.

    Args:
        k: Neighbour that counts; the last one where fewer were kept. The authors use 50 to 1000, more for more data.
        bank: In-distribution features that are kept at most, a uniform sample of all.
        seed: Seed of the sample.
        tap: See ``OnFeatures``.

    Raises:
        RangeError: Numbers make no sense.

    References:
        Sun, Ming, Zhu, Li 2022, arXiv:2204.06507.
    """

    def learn(self, folds: Folds) -> dict[str, Tensor]:
        return {"bank": self.sampled(folds).rows[0]}

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,) from 0 to 2; NaN in rows with NaN or infinite features."""
        features = self.features(outputs)
        bank = self.numbers("bank", features)
        k = min(self.k, len(bank))
        found = []
        for part in self.blocks(unit(features), bank):
            place = (part @ bank.T).topk(k, 1, sorted=True).indices[:, -1]
            # the difference itself: 2 - 2 cos has no digits left for near neighbours
            found.append((part - bank[place]).norm(dim=1))
        score = torch.cat(found)
        return undefined(score, score)


@DETECTORS.register("nnguide")
@dataclass(frozen=True)
class NNGuide(_Bank):
    """Energy, guided by the mean of energy times cosine over the k most similar in-distribution features.

    -lse(z) * mean over the top k of lse(z_i) cos(h_i, h).

    Args:
        k: Neighbours.
        bank: In-distribution features that are kept at most; the authors keep 1 % of ImageNet.
        seed: Seed of the sample.
        tap: See ``OnFeatures``.

    Raises:
        RangeError: Numbers make no sense.

    References:
        Park, Jung, Teoh 2023, arXiv:2309.14888.
    """

    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.FEATURES, Needs.LOGITS, Needs.OFFSET})

    k: int = 10

    def learn(self, folds: Folds) -> dict[str, Tensor]:
        features, logits = self.sampled(folds).rows
        return {"bank": features * torch.logsumexp(logits.to(features.dtype), 1)[:, None]}

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,); NaN in rows with NaN or infinite features or logits."""
        features = self.features(outputs)
        bank = self.numbers("bank", features)
        k = min(self.k, len(bank))
        parts = [(part @ bank.T).topk(k, 1, sorted=False).values.mean(1) for part in self.blocks(unit(features), bank)]
        score = Energy().score(outputs).to(features.dtype) * torch.cat(parts)
        return undefined(score, score)
