"""A small labelled source and networks for it."""

import pytest
import torch
from torch import nn

from robustlab.core.rng import SampleRng
from robustlab.core.source import Source, SourceInfo
from robustlab.core.types import ImageSpec


class ToySource(Source):
    """Grey noise whose class, or labels, are the sign of fixed projections plus noise."""

    def __init__(self, count, *, seed=0, task="multiclass", labelled=True):
        rng = SampleRng.make(seed, "toy", torch.arange(count))
        self.images = rng.uniform("x", (1, 6, 6))
        directions = SampleRng.make(9, "directions", torch.arange(4)).normal("d", (36,))
        scores = (self.images.flatten(1) - 0.5) @ directions.T + rng.normal("noise", (4,))
        labels = (scores > 0).long() if task == "multilabel" else scores.argmax(1)
        self.info = SourceInfo(
            name="toy",
            spec=ImageSpec(channels=1, size=(6, 6), bits=None),
            ids=torch.arange(count) + 1000 * seed,
            labels=labels if labelled else None,
            task=task,
        )

    def pixels(self, index):
        return self.images[list(index)]


@pytest.fixture
def source():
    return ToySource


@pytest.fixture
def build():
    def make():
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))

    return make
