"""Detectors that shape features or the last layer before a score is taken: ReAct, DICE, ASH, SCALE.

Each wraps a score, energy unless told otherwise, which then sees the shaped features and the logits made of them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from robustlab.core.detector import Detector, Folds, Needs
from robustlab.core.errors import ConfigError, RangeError
from robustlab.core.registry import DETECTORS
from robustlab.core.rng import hashed
from robustlab.core.types import ModelOutputs

from .base import BANK, OnFeatures, Sampler, block_rows, by_blocks, undefined
from .logits import Energy

_SAMPLE = 1 << 16  # values that say where a quantile lies


@dataclass(frozen=True)
class Shaping(OnFeatures):
    """A change of the features, and a score of what the last layer makes of them.

    Args:
        scorer: The score; one that learns nothing.
        tap: See ``OnFeatures``; the last layer has to stand on it.
    """

    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.FEATURES, Needs.HEAD, Needs.OFFSET})

    scorer: Detector = field(default_factory=Energy, kw_only=True)

    def learn(self, folds: Folds) -> dict[str, Tensor]:
        """Return what is learned; the last layer is all there is to most."""
        assert folds.head is not None  # noqa: S101 - fit_folds has checked it, for the type checkers
        return {"weight": folds.head.weight.detach(), "bias": folds.head.bias.detach()}

    @abstractmethod
    def shaped(self, features: Tensor) -> Tensor:
        """Return the changed features (N, D)."""

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,); NaN in rows with NaN or infinite features."""
        features = self.features(outputs)
        weight, bias = self.numbers("weight", features), self.numbers("bias", features)

        def answers(block: Tensor) -> Tensor:
            logits = torch.addmm(bias, self.shaped(block), weight.T)
            return undefined(logits.T, block).T  # shaping may make infinite features finite

        logits = by_blocks(answers, features)
        shaped = {self.tap: by_blocks(self.shaped, features)} if Needs.FEATURES in self.scorer.needs else {}
        seen = ModelOutputs(logits=logits, features=shaped, task=outputs.task)
        return self.scorer.score(seen)


def _share(who: str, name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise RangeError(who, f"{name} from 0 to 1", f"{value}", "It is a share, e.g. 0.9.")


@DETECTORS.register("react")
@dataclass(frozen=True)
class ReAct(Shaping):
    """Features clipped at a quantile of all in-distribution activations, then a score.

    Args:
        quantile: Share of activations below the clip, over all units and a sample of ``bank`` rows.
        bank: Rows of which the quantile is taken.
        scorer: See ``Shaping``.
        tap: See ``OnFeatures``.

    Raises:
        RangeError: ``quantile`` is no share.

    References:
        Sun, Guo, Li 2021, arXiv:2111.12797.
    """

    quantile: float = 0.9
    bank: int = BANK

    def __post_init__(self) -> None:
        _share("ReAct", "quantile", self.quantile)

    def learn(self, folds: Folds) -> dict[str, Tensor]:
        kept = Sampler(self.bank)
        for outputs, _ in folds:
            kept.add(self.finite(outputs))
        parts = [features for (features,) in kept.parts if features.numel()]
        if not parts:
            raise ConfigError("react", "in-distribution data with finite features", "none", "Pass some.")
        return {**super().learn(folds), "clip": quantile(self.quantile, *parts)}

    def shaped(self, features: Tensor) -> Tensor:
        return torch.minimum(features, self.numbers("clip", features))


def quantile(share: float, *values: Tensor) -> Tensor:
    """Return a quantile of all values, between the two nearest by a straight line; ``torch.quantile`` ends at 2^24."""
    parts = [part.flatten() for part in values]
    count = sum(map(len, parts))
    place = share * (count - 1)
    low = int(place)
    skipped, near = _around(parts, count, low)
    first = near.kthvalue(low - skipped + 1).values
    if low + 1 >= count:
        return first
    return first + (place - low) * (near.kthvalue(low - skipped + 2).values - first)


def _around(parts: Sequence[Tensor], count: int, rank: int) -> tuple[int, Tensor]:
    """Return (how many values are smaller than all of the rest, the rest, with those of ``rank`` and ``rank`` + 1).

    A sample says where they lie; should it be wrong, all values are returned.
    """
    if count < 8 * _SAMPLE:
        return 0, torch.cat(list(parts))
    step = count // _SAMPLE
    sample = torch.cat(
        [part[hashed(torch.arange(-(-len(part) // step), device=part.device)) % len(part)] for part in parts]
    )
    sample = sample.sort().values
    share = rank / count
    margin = 6 * math.sqrt(share * (1 - share) * len(sample)) + 1
    low = sample[max(0, int(share * len(sample) - margin))]
    high = sample[min(len(sample) - 1, int(share * len(sample) + margin))]
    below, found = 0, []
    for part in parts:
        for block in torch.split(part, block_rows(part)):
            smaller = block < low
            below += int(torch.count_nonzero(smaller))
            found.append(block[~smaller & (block <= high)])
    near = torch.cat(found)
    return (below, near) if below <= rank and rank + 1 < below + len(near) else (0, torch.cat(list(parts)))


@DETECTORS.register("dice")
@dataclass(frozen=True)
class DICE(Shaping):
    """The last layer without its weak contributions, then a score.

    Of the products of weights and mean in-distribution activations the largest are kept, over all classes together.

    Args:
        sparsity: Share of the weights that is dropped. The authors use 0.9 for CIFAR, 0.7 for ImageNet.
        scorer: See ``Shaping``.
        tap: See ``OnFeatures``.

    Raises:
        RangeError: ``sparsity`` is no share.

    References:
        Sun, Li 2022, arXiv:2111.09805.
    """

    sparsity: float = 0.7

    def __post_init__(self) -> None:
        _share("DICE", "sparsity", self.sparsity)

    def learn(self, folds: Folds) -> dict[str, Tensor]:
        learned = super().learn(folds)
        weight = learned["weight"]
        share = weight.to(torch.float64) * self.mean_features(folds).to(weight.device)
        return {**learned, "weight": torch.where(share > quantile(self.sparsity, share), weight, 0)}

    def shaped(self, features: Tensor) -> Tensor:
        return features


@dataclass(frozen=True)
class _Pruning(Shaping):
    percentile: float = 0.9

    def __post_init__(self) -> None:
        _share(type(self).__name__, "percentile", self.percentile)

    def kept(self, features: Tensor) -> tuple[Tensor, int]:
        """Return features with all but the largest activations set to 0, and how many are kept (more if some tie)."""
        width = features.shape[1]
        count = max(1, width - round(self.percentile * width))
        if features.device.type == "cpu":
            ordered = np.partition(features.detach().numpy(), width - count, axis=1)  # a third of the time of topk
            least = torch.from_numpy(ordered[:, width - count, None])
        else:
            least = features.topk(count, 1).values[:, -1:]
        return torch.where(features >= least, features, 0), count

    @staticmethod
    def boost(features: Tensor, kept: Tensor) -> Tensor:
        """Return exp(sum of all / sum of the largest), (N, 1)."""
        before, after = (values.sum(1, keepdim=True) for values in (features, kept))
        return torch.exp(torch.where(after > 0, before / torch.where(after > 0, after, 1), 0))


@DETECTORS.register("ash")
@dataclass(frozen=True)
class ASH(_Pruning):
    """Only the largest activations of each sample kept, and their size changed, then a score.

    Variant ``"p"`` leaves them as they are, ``"b"`` makes all equal to the sum of all before over their number, ``"s"``
    multiplies them by exp(sum before / sum after). The authors prune feature maps before pooling; this is applied to
    pooled features, as in OpenOOD and pytorch-ood.

    Args:
        percentile: Share of activations that is set to 0.
        variant: ``"p"``, ``"b"`` or ``"s"``.
        scorer: See ``Shaping``.
        tap: See ``OnFeatures``.

    Raises:
        RangeError: ``percentile`` is no share.
        ConfigError: No such variant.

    References:
        Djurisic, Bozanic, Ashok, Liu 2023, arXiv:2209.09858.
    """

    variant: Literal["p", "b", "s"] = "s"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("p", "b", "s"):
            raise ConfigError("ASH", "variant 'p', 'b' or 's'", repr(self.variant), "The authors prefer 's'.")

    def shaped(self, features: Tensor) -> Tensor:
        kept, count = self.kept(features)
        if self.variant == "p":
            return kept
        if self.variant == "b":
            return torch.where(kept > 0, features.sum(1, keepdim=True) / count, 0)
        return kept * self.boost(features, kept)


@DETECTORS.register("scale")
@dataclass(frozen=True)
class SCALE(_Pruning):
    """Features times exp(sum of all / sum of the largest activations), none set to 0, then a score.

    Args:
        percentile: Share of activations that is not among the largest.
        scorer: See ``Shaping``.
        tap: See ``OnFeatures``.

    Raises:
        RangeError: ``percentile`` is no share.

    References:
        Xu, Chen, Franchi, Yao 2024, arXiv:2310.00227.
    """

    percentile: float = 0.85

    def shaped(self, features: Tensor) -> Tensor:
        return features * self.boost(features, self.kept(features)[0])
