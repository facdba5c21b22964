"""Distances of features from in-distribution classes: Mahalanobis, relative Mahalanobis, class templates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from robustlab.core.detector import Folds
from robustlab.core.errors import ConfigError, RangeError
from robustlab.core.registry import DETECTORS
from robustlab.core.types import ModelOutputs

from .base import OnFeatures, undefined, unit

_CELLS = 1 << 24  # numbers in one block of distances


@dataclass(frozen=True)
class _Gaussian(OnFeatures):
    """Class means and covariances, from sums in float64."""

    shrinkage: float | Literal["auto"] = "auto"
    normalise: bool = False

    def __post_init__(self) -> None:
        if self.shrinkage != "auto" and not 0 <= self.shrinkage <= 1:
            raise RangeError(
                type(self).__name__, "shrinkage from 0 to 1, or 'auto'", f"{self.shrinkage}", "Try 'auto'."
            )

    def prepared(self, features: Tensor) -> Tensor:
        """Return features, of length 1 if asked for."""
        return unit(features) if self.normalise else features

    def moments(self, folds: Folds) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return class means (K, D), class sizes (K,), covariance within classes and in all (D, D), float64.

        Classes are those with samples. Sums are taken around the first row, so that a large mean costs no digits.
        """
        origin: Tensor | None = None
        sums = sizes = squares = torch.empty(0)
        for outputs, labels in folds:
            features, labels = self.known(outputs, labels)
            features = self.prepared(features).to(torch.float64)
            if origin is None and len(features):
                origin = features[0]
                sums = features.new_zeros(folds.num_classes, len(origin))
                sizes = features.new_zeros(folds.num_classes)
                squares = features.new_zeros(len(origin), len(origin))
            if origin is not None and len(features):
                around = features - origin
                sums.index_add_(0, labels, around)
                sizes += torch.bincount(labels, minlength=len(sizes))
                squares += around.T @ around
        if origin is None:
            raise ConfigError(type(self).__name__, "in-distribution data with finite features", "none", "Pass some.")
        have = sizes > 0
        sums, sizes = sums[have], sizes[have]
        means = sums / sizes[:, None]
        count = sizes.sum()
        within = (squares - means.T @ sums) / count
        centre = sums.sum(0) / count
        total = squares / count - torch.outer(centre, centre)
        return means + origin, sizes, within, total

    def ridge(self, covariance: Tensor, count: float) -> tuple[float, float]:
        """Return (weight of a covariance, variance that is added to every unit)."""
        weight = oas(covariance, count) if self.shrinkage == "auto" else self.shrinkage
        return 1 - weight, weight * float(covariance.trace()) / len(covariance)

    def whitening(self, covariance: Tensor, ridge: tuple[float, float]) -> Tensor:
        """Return (D, D) that maps differences to those whose length is the Mahalanobis distance."""
        width = len(covariance)
        shrunk = ridge[0] * covariance + ridge[1] * torch.eye(width).to(covariance)
        values, vectors = torch.linalg.eigh((shrunk + shrunk.T) / 2)
        # directions without any spread say nothing where there is no shrinkage
        spread = values > values[-1].clamp_min(0) * width * torch.finfo(values.dtype).eps
        scale = torch.where(spread, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0)
        return torch.mul(vectors, scale)

    def squared(self, features: Tensor, means: Tensor, whitening: Tensor) -> Tensor:
        """Return the smallest squared distance (N,) from any of the means (K, D)."""
        # around their centre, as differences of large numbers lose digits
        centre = means.mean(0)
        points, centres = (features - centre) @ whitening, (means - centre) @ whitening
        rows = max(1, _CELLS // max(len(centres), points.shape[1]))
        parts = []
        for part in torch.split(points, rows):
            nearest = torch.cdist(part, centres).argmin(1)
            parts.append((part - centres[nearest]).square().sum(1))
        return torch.cat(parts) if parts else points.sum(1)


def oas(covariance: Tensor, count: float) -> float:
    """Return the weight of the scaled identity, from 0 to 1, by the oracle approximating shrinkage.

    References:
        Chen, Wiesel, Eldar, Hero, Shrinkage algorithms for MMSE covariance estimation, 2010, arXiv:0907.4698.
    """
    width = len(covariance)
    trace, squared = float(covariance.trace()), float(covariance.square().sum())
    above = (1 - 2 / width) * squared + trace**2
    below = (count + 1 - 2 / width) * (squared - trace**2 / width)
    return 1.0 if below <= 0 else min(1.0, above / below)


@DETECTORS.register("mds")
@dataclass(frozen=True)
class MDS(_Gaussian):
    """Mahalanobis distance, squared, from the nearest class mean, with one covariance of all classes.

    Args:
        shrinkage: Weight of the scaled identity in the covariance, 0 to 1; ``"auto"`` estimates it (Chen et al. 2010).
            It matters where there are not many more samples than features. With 0, directions in which nothing varies
            are left out.
        normalise: Scale features to length 1 first (Mahalanobis++).
        tap: See ``OnFeatures``.

    References:
        Lee, Lee, Lee, Shin 2018, arXiv:1807.03888. Unit length: Mueller, Hein 2025, arXiv:2505.18032.
    """

    def learn(self, folds: Folds) -> dict[str, Tensor]:
        means, sizes, within, _ = self.moments(folds)
        return {"means": means, "whitening": self.whitening(within, self.ridge(within, float(sizes.sum())))}

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,), 0 or more; NaN in rows with NaN or infinite features."""
        features = self.features(outputs)
        means, whitening = (self.numbers(name, features) for name in ("means", "whitening"))
        return undefined(self.squared(self.prepared(features), means, whitening), features)


@DETECTORS.register("rmd")
@dataclass(frozen=True)
class RMD(_Gaussian):
    """Relative Mahalanobis distance: that from the nearest class less that from all data taken as one Gaussian.

    Args:
        shrinkage: See ``MDS``; both covariances are given the same weight and the same identity.
        normalise: See ``MDS``.
        tap: See ``OnFeatures``.

    References:
        Ren, Fort, Liu et al. 2021, arXiv:2106.09022.
    """

    def learn(self, folds: Folds) -> dict[str, Tensor]:
        means, sizes, within, total = self.moments(folds)
        count = float(sizes.sum())
        # the same for both: where they differ, so do the distances of all that is far away
        ridge = self.ridge(within, count)
        return {
            "means": means,
            "whitening": self.whitening(within, ridge),
            "centre": (means * sizes[:, None]).sum(0, keepdim=True) / count,
            "whitening_all": self.whitening(total, ridge),
        }

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,); NaN in rows with NaN or infinite features."""
        features = self.features(outputs)
        points = self.prepared(features)
        means, whitening, centre, whitening_all = (
            self.numbers(name, features) for name in ("means", "whitening", "centre", "whitening_all")
        )
        near, far = self.squared(points, means, whitening), self.squared(points, centre, whitening_all)
        return undefined(near - far, features)


@DETECTORS.register("she")
@dataclass(frozen=True)
class SHE(OnFeatures):
    """Minus the inner product with the mean feature of the class that was answered.

    The means are of samples that the network gets right; where it gets none of a class right, of all of that class.
    A class without samples has the mean 0, so that such an answer looks foreign.

    Args:
        tap: See ``OnFeatures``.

    References:
        Zhang, Fu, Chen et al., Out-of-distribution detection based on in-distribution data patterns memorization with
        modern Hopfield energy, 2023.
    """

    tap: str = field(default="penultimate", kw_only=True)

    def learn(self, folds: Folds) -> dict[str, Tensor]:
        sums: Tensor | None = None
        sizes = torch.empty(0)
        for outputs, labels in folds:
            features, known = self.known(outputs, labels)
            answers = outputs.logits[torch.isfinite(self.features(outputs)).all(1)].argmax(1)
            if sums is None:
                sums = torch.zeros(2, folds.num_classes, features.shape[1], dtype=torch.float64, device=features.device)
                sizes = sums.new_zeros(2, folds.num_classes)
            for kind, rows in enumerate((answers == known, torch.ones_like(known, dtype=torch.bool))):
                sums[kind].index_add_(0, known[rows], features[rows].to(torch.float64))
                sizes[kind] += torch.bincount(known[rows], minlength=folds.num_classes)
        if sums is None:
            raise ConfigError("she", "in-distribution data", "no samples", "Pass some.")
        means = sums / sizes[..., None].clamp_min(1)
        return {"means": torch.where(sizes[0, :, None] > 0, means[0], means[1])}

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,); NaN in rows with NaN or infinite features or logits."""
        features = self.features(outputs)
        means = self.numbers("means", features)
        return undefined(-(features * means[outputs.logits.argmax(1)]).sum(1), features, outputs.logits)
