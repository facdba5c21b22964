"""Mahalanobis distances at several depths of a network, joined without foreign data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustlab.core.detector import Folds, Needs
from robustlab.core.errors import ConfigError
from robustlab.core.registry import DETECTORS
from robustlab.core.taps import PENULTIMATE
from robustlab.core.types import ModelOutputs

from .base import Learning
from .distances import MDS


@DETECTORS.register("mds-layers")
@dataclass(frozen=True)
class LayerMDS(Learning):
    """The mean, over layers, of the Mahalanobis distance as ``MDS`` takes it, standardised on the fit data.

    No single depth is best for every kind of foreign input: early layers see scanner and artefacts, late ones unknown
    findings. Each layer's squared distance, less its mean and over its standard deviation on the data it was fitted
    on, counts alike; the original weighs layers by a regression on foreign data, which this does not need. Feature maps
    are averaged over the image.

    Args:
        layers: Names of modules of the network, e.g. ``("layer1", "layer2", "layer3", "penultimate")``.
        shrinkage: See ``MDS``.
        normalise: See ``MDS``.

    Raises:
        ConfigError: No layer, or one twice.
        RangeError: ``shrinkage`` is no share.

    References:
        Lee, Lee, Lee, Shin 2018, arXiv:1807.03888. Several depths for medical images: Anthony, Kamnitsas 2023,
        arXiv:2309.01488.
    """

    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.FEATURES})

    layers: tuple[str, ...] = (PENULTIMATE,)
    shrinkage: float | Literal["auto"] = "auto"
    normalise: bool = False

    def __post_init__(self) -> None:
        given: object = self.layers
        object.__setattr__(self, "layers", (given,) if isinstance(given, str) else tuple(self.layers))
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ConfigError("LayerMDS", "different layers, one or more", f"{self.layers}", "Name modules.")
        self._parts()  # which checks the numbers

    @property
    def taps(self) -> tuple[str, ...]:
        return self.layers

    def _parts(self, learned: Mapping[str, Tensor] | None = None) -> list[MDS]:
        """Return the detector of each layer, with what it has learned if that is given."""
        parts = [MDS(shrinkage=self.shrinkage, normalise=self.normalise, tap=layer) for layer in self.layers]
        if learned is not None:
            for number, part in enumerate(parts):
                part.keep({name: learned[f"{number}.{name}"] for name in ("means", "whitening")})
        return parts

    def learn(self, folds: Folds) -> dict[str, Tensor]:
        learned: dict[str, Tensor] = {}
        for number, part in enumerate(self._parts()):
            learned |= {f"{number}.{name}": value for name, value in part.learn(folds).items()}
        parts = self._parts(learned)
        count = 0
        total = squares = torch.zeros(len(parts), dtype=torch.float64, device=learned["0.means"].device)
        for outputs, _ in folds:
            scores = self._scores(parts, outputs).to(torch.float64)
            scores = scores[:, torch.isfinite(scores).all(0)]
            count += scores.shape[1]
            total = total + scores.sum(1)
            squares = squares + scores.square().sum(1)
        mean = total / count
        spread = (squares / count - mean.square()).clamp_min(0).sqrt()
        # a layer that is the same for all images has nothing to say
        return {**learned, "mean": mean, "scale": torch.where(spread > 0, 1 / spread, 0)}

    @staticmethod
    def _scores(parts: list[MDS], outputs: ModelOutputs) -> Tensor:
        """Return the distances (L, N)."""
        return torch.stack([part.score(outputs) for part in parts])

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float (N,), about 0 for known images; NaN in rows with NaN or infinite features."""
        scores = self._scores(self._parts(self.learned), outputs)
        mean, scale = (self.numbers(name, scores)[:, None] for name in ("mean", "scale"))
        return ((scores - mean) * scale).mean(0)
