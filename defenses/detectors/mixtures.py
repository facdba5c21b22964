"""GMM: minus the log density of a Gaussian mixture of in-distribution features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustlab.core.detector import Folds
from robustlab.core.errors import ConfigError, RangeError
from robustlab.core.registry import DETECTORS
from robustlab.core.rng import SampleRng
from robustlab.core.types import ModelOutputs

from .base import BANK, OnFeatures, Sampler, undefined

_FLOOR = 1e-6  # least variance of a unit, where all units together have a mean square of 1


@dataclass(frozen=True)
class _Mixture:
    log_weights: Tensor
    means: Tensor
    variances: Tensor

    def joint(self, points: Tensor) -> Tensor:
        """Return log weight + log density of every component, (N, K)."""
        inverse = 1 / self.variances
        # sum (x - m)^2 / v, in matrix products
        distance = (
            points.square() @ inverse.T - 2 * points @ (self.means * inverse).T + (self.means.square() * inverse).sum(1)
        ).clamp_min(0)
        constant = self.variances.log().sum(1) + points.shape[1] * math.log(2 * math.pi)
        return self.log_weights - 0.5 * (distance + constant)


@DETECTORS.register("gmm")
@dataclass(frozen=True)
class GMM(OnFeatures):
    """Minus the log density of a mixture of Gaussians with diagonal covariances, in nats.

    Fitted by expectation maximisation from centres that are far apart (k-means++), labels are not used. Features are
    centred and scaled by their overall spread first; a variance is at least 1e-6 of the mean one.

    Args:
        components: Gaussians; fewer where there are fewer samples.
        steps: Iterations at most; it is over when the mean log density rises by less than 1e-6.
        bank: In-distribution features that are used at most, a uniform sample of all.
        seed: Seed of the centres.
        tap: See ``OnFeatures``.

    Raises:
        RangeError: Numbers make no sense.

    References:
        Dempster, Laird, Rubin 1977; Arthur, Vassilvitskii 2007.
    """

    components: int = 10
    steps: int = 100
    bank: int = BANK
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.components, self.steps, self.bank) < 1:
            got = f"components={self.components}, steps={self.steps}, bank={self.bank}"
            raise RangeError("GMM", "numbers of 1 or more", got, "10 components are a start.")

    def learn(self, folds: Folds) -> dict[str, Tensor]:
        kept = Sampler(self.bank, self.seed)
        for outputs, _ in folds:
            kept.add(self.finite(outputs))
        if not kept.rows or len(kept.rows[0]) == 0:
            raise ConfigError("gmm", "in-distribution data with finite features", "none", "Pass some.")
        features = kept.rows[0].to(torch.float64)
        centre = features.mean(0)
        spread = (features - centre).square().mean().sqrt()
        scale = torch.where(spread > 0, spread, 1)
        mixture = self._fitted((features - centre) / scale)
        return {
            "centre": centre,
            "scale": scale,
            "log_weights": mixture.log_weights,
            "means": mixture.means,
            "variances": mixture.variances,
        }

    def _fitted(self, points: Tensor) -> _Mixture:
        means = self._apart(points)
        nearest = torch.cdist(points, means).argmin(1)
        shares = torch.nn.functional.one_hot(nearest, len(means)).to(points)
        before = -math.inf
        mixture = self._of(points, shares)
        for _ in range(self.steps):
            joint = mixture.joint(points)
            density = joint.logsumexp(1, keepdim=True)
            now = float(density.mean())
            if now - before < 1e-6:
                break
            before = now
            mixture = self._of(points, (joint - density).exp())
        return mixture

    @staticmethod
    def _of(points: Tensor, shares: Tensor) -> _Mixture:
        """Return the mixture of points that belong to each component with these shares, float64 (N, K)."""
        sizes = shares.sum(0).clamp_min(torch.finfo(points.dtype).tiny)
        means = (shares.T @ points) / sizes[:, None]
        spread = (shares.T @ points.square()) / sizes[:, None] - means.square()
        return _Mixture((sizes / len(points)).log(), means, spread.clamp_min(_FLOOR))

    def _apart(self, points: Tensor) -> Tensor:
        """Return starting centres: each a point, drawn in proportion to its squared distance from those before."""
        rng = SampleRng.make(self.seed, "gmm", torch.zeros(1, dtype=torch.int64))
        draws = rng.uniform("centres", (self.components,))[0].tolist()
        found = [points[int(draws[0] * len(points))]]
        distance = (points - found[0]).square().sum(1)
        for draw in draws[1 : min(self.components, len(points))]:
            total = distance.cumsum(0)
            if float(total[-1]) == 0:  # all points are centres already
                break
            place = int(torch.searchsorted(total, draw * total[-1]).clamp_max(len(points) - 1))
            found.append(points[place])
            distance = torch.minimum(distance, (points - points[place]).square().sum(1))
        return torch.stack(found)

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,); NaN in rows with NaN or infinite features."""
        features = self.features(outputs)
        points = (features - self.numbers("centre", features)) / self.numbers("scale", features)
        mixture = _Mixture(*(self.numbers(name, features) for name in ("log_weights", "means", "variances")))
        density = mixture.joint(points).logsumexp(1) - points.shape[1] * self.numbers("scale", features).log()
        return undefined(-density, features)
