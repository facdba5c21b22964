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

from .base import OnFeatures, block_rows, by_blocks, finite_rows, products, undefined, unit


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
            features, known = self.known(outputs, labels)
            if len(features) == 0:
                continue
            if origin is None:
                origin = self.prepared(features[:1])[0].to(torch.float64)
                sums = origin.new_zeros(folds.num_classes, len(origin))
                sizes = origin.new_zeros(folds.num_classes)
                squares = origin.new_zeros(len(origin), len(origin))
            rows = 4 * block_rows(features)  # a matrix product wants more of them
            for block, classes in zip(torch.split(features, rows), torch.split(known, rows), strict=True):
                around = self.prepared(block) - origin
                sums.index_add_(0, classes, around)
                squares += products(around)
            sizes += torch.bincount(known, minlength=len(sizes))
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
        return torch.mul(vectors, scale).contiguous()  # as it comes out of a file, for the same bits

    def squared(self, features: Tensor, means: Tensor, whitening: Tensor) -> Tensor:
        """Return the smallest squared distance (N,) from any of the means (K, D)."""
        # around their centre, as differences of large numbers lose digits
        centre = means.mean(0)
        centres = (means - centre) @ whitening
        half = centres.square().sum(1) / 2

        def nearest(block: Tensor) -> Tensor:
            points = (self.prepared(block) - centre) @ whitening
            near = torch.addmm(half, points, centres.T, alpha=-1).argmin(1) if len(centres) > 1 else [0]
            return (points - centres[near]).square().sum(1)

        return by_blocks(nearest, features)


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
        score = self.squared(features, means, whitening)
        return undefined(score, score)


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
        means, whitening, centre, whitening_all = (
            self.numbers(name, features) for name in ("means", "whitening", "centre", "whitening_all")
        )
        near, far = self.squared(features, means, whitening), self.squared(features, centre, whitening_all)
        return undefined(near - far, near, far)


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
            labels = self.one_label(labels).to(outputs.logits.device)
            features, known, logits = finite_rows(self.features(outputs), labels, outputs.logits)
            if sums is None:
                # of those answered right, then of the others
                sums = torch.zeros(2 * folds.num_classes, features.shape[1], dtype=torch.float64).to(features.device)
                sizes = sums.new_zeros(2 * folds.num_classes)
            places = known + folds.num_classes * (logits.argmax(1) != known)
            rows = 4 * block_rows(features)
            for block, place in zip(torch.split(features, rows), torch.split(places, rows), strict=True):
                sums.index_add_(0, place, block.to(torch.float64))
            sizes += torch.bincount(places, minlength=len(sizes))
        if sums is None:
            raise ConfigError("she", "in-distribution data", "no samples", "Pass some.")
        totals, counts = sums.view(2, folds.num_classes, -1), sizes.view(2, -1, 1)
        right = totals[0] / counts[0].clamp_min(1)
        return {"means": torch.where(counts[0] > 0, right, totals[1] / counts[1].clamp_min(1))}

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,); NaN in rows with NaN or infinite features or logits."""
        features = self.features(outputs)
        means = self.numbers("means", features)
        score = by_blocks(
            lambda block, answers: -torch.linalg.vecdot(block, means[answers]), features, outputs.logits.argmax(1)
        )
        return undefined(score, score, outputs.logits)
