"""A corruption of one's own: a collimator that closes over the image edges, checked, and put through an evaluation.

The class is all that it takes: lists, the command line, cache, writer and reports find it by its registered name.

    python examples/custom_corruption.py --data ../shared/data --out runs/custom
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import robustlab
from robustlab import Corruption, Levels, SampleRng, register_corruption
from robustlab.testing import check_corruption
from robustlab.train import fit, seeded_init


@register_corruption("collimator")
@dataclass(frozen=True)
class Collimator(Corruption):
    """A collimator that leaves a dark margin along all edges; how dark, is drawn for each image."""

    margin: Levels = Levels((3, 6, 10, 15, 20), identity=0, unit="% of each side")

    def draw(self, rng: SampleRng, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        return {"shade": rng.uniform("shade", (1, 1, 1))}

    def apply(self, images: Tensor, draws: dict[str, Tensor], values: dict[str, float]) -> Tensor:
        centres = [(2 * torch.arange(side, device=images.device) + 1) / side - 1 for side in images.shape[2:]]
        inside = torch.maximum(centres[0].abs()[:, None], centres[1].abs()[None]) <= 1 - values["margin"] / 50
        return torch.where(inside, images, images * (0.1 + 0.2 * draws["shade"]))


def small_cnn() -> nn.Module:
    """Return a small convolutional network for 28 px grey images and two classes."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(128, 2),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the NPZ files")
    parser.add_argument("--out", type=Path, default=Path("runs/custom"))
    parser.add_argument("--fast", action="store_true", help="one epoch")
    options = parser.parse_args()

    check_corruption(Collimator)
    print("collimator: every check of a corruption passed")
    file = options.data / "pneumoniamnist.npz"
    train, val, test = (
        robustlab.load_data(file, split=split, modality="xray", class_names=("normal", "pneumonia"))
        for split in ("train", "val", "test")
    )
    model = robustlab.wrap(seeded_init(small_cnn, seed=0), task="multiclass", output="logits", mean=0.5, std=0.25)
    fit(model, train, val, epochs=1 if options.fast else 6, batch_size=128, lr=2e-3, seed=0)
    report = robustlab.evaluate_under_shift(model, test, val=val, shifts=["collimator", "gaussian-noise"])
    report.save(options.out)
    report.to_html(options.out / "report.html")
    print(report.summary())


if __name__ == "__main__":
    main()
