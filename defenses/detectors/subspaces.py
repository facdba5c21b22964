"""Detectors that look at what lies outside the subspace of in-distribution features: Residual, ViM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustlab.core.detector import Folds, Needs
from robustlab.core.errors import ConfigError, RangeError
from robustlab.core.registry import DETECTORS
from robustlab.core.types import ModelOutputs

from .base import OnFeatures, block_rows, by_blocks, finite_rows, products, undefined
from .logits import Energy


@DETECTORS.register("residual")
@dataclass(frozen=True)
class Residual(OnFeatures):
    """Length of the feature's part outside the principal subspace of in-distribution features.

    The origin is the point whose logits are closest to 0, -W^+ b, and the subspace is spanned by the first ``dim``
    eigenvectors of the second moment around it.

    Args:
        dim: Dimensions of the subspace; None for 1000 of 2048 or more, 512 of 768 or more, half of fewer.
        tap: See ``OnFeatures``; the last layer has to stand on it.

    Raises:
        RangeError: ``dim`` makes no sense.

    References:
        Wang, Li, Feng, Zhang 2022, arXiv:2203.10807.
    """

    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.FEATURES, Needs.HEAD})

    dim: int | None = None

    def __post_init__(self) -> None:
        if self.dim is not None and self.dim < 1:
            raise RangeError(type(self).__name__, "dim of 1 or more", f"{self.dim}", "Leave it out for the default.")

    def learn(self, folds: Folds) -> dict[str, Tensor]:
        assert folds.head is not None  # noqa: S101 - fit_folds has checked it, for the type checkers
        weight, bias = folds.head.weight.to(torch.float64), folds.head.bias.to(torch.float64)
        origin = -(torch.linalg.pinv(weight) @ bias)
        moment, count = torch.zeros(len(origin), len(origin)).to(origin), 0
        for outputs, _ in folds:
            features = self.finite(outputs)
            for block in torch.split(features, 4 * block_rows(features)):  # a matrix product wants more rows
                moment += products(block - origin)
            count += len(features)
        if count == 0:
            raise ConfigError(self.name, "in-distribution data with finite features", "none", "Pass some.")
        dim = _usual(len(origin)) if self.dim is None else self.dim
        if dim >= len(origin):
            hint = f"The features have {len(origin)} dimensions."
            raise RangeError(self.name, f"dim below {len(origin)}", f"{dim}", hint)
        _, vectors = torch.linalg.eigh(moment / count)  # eigenvalues rise
        return {"origin": origin, "outside": vectors[:, : len(origin) - dim].contiguous()}

    def residual(self, features: Tensor, learned: dict[str, Tensor] | None = None) -> Tensor:
        """Return the length (N,) of the part outside the subspace."""
        if learned is None:
            origin, outside = (self.numbers(name, features) for name in ("origin", "outside"))
        else:
            origin, outside = (learned[name].to(features) for name in ("origin", "outside"))
        return by_blocks(lambda block: ((block - origin) @ outside).norm(dim=1), features)

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,), 0 or more; NaN in rows with NaN or infinite features."""
        score = self.residual(self.features(outputs))
        return undefined(score, score)


@DETECTORS.register("vim")
@dataclass(frozen=True)
class ViM(Residual):
    """Virtual-logit matching: the residual, scaled to the size of logits, less the log-sum-exp of the logits.

    The scale makes the mean residual of in-distribution data equal to their mean largest logit.

    Args:
        dim: See ``Residual``.
        tap: See ``OnFeatures``; the last layer has to stand on it.

    References:
        Wang, Li, Feng, Zhang 2022, arXiv:2203.10807.
    """

    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.FEATURES, Needs.HEAD, Needs.LOGITS, Needs.OFFSET})

    def learn(self, folds: Folds) -> dict[str, Tensor]:
        learned = super().learn(folds)
        largest, length = torch.zeros(2, dtype=torch.float64, device=learned["origin"].device)
        for outputs, _ in folds:
            features, logits = finite_rows(self.features(outputs), outputs.logits)
            largest = largest + logits.amax(1).sum(dtype=torch.float64)
            length = length + self.residual(features, learned).sum(dtype=torch.float64)
        tiny = torch.finfo(torch.float64).tiny
        return {**learned, "scale": largest / length.clamp_min(tiny)}

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,); NaN in rows with NaN or infinite features or logits."""
        features = self.features(outputs)
        score = self.numbers("scale", features) * self.residual(features) + Energy().score(outputs)
        return undefined(score, score)


def _usual(width: int) -> int:
    """Return the authors' dimensions of the principal subspace."""
    return 1000 if width >= 2048 else 512 if width >= 768 else max(1, width // 2)
