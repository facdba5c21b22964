"""A defence that adds noise to its input, attacked with and without averaging over the noise, on PneumoniaMNIST.

Two mistakes make such a defence look different from what it is. An attack that looks at single draws of the noise
counts a sample as broken as soon as one lucky draw was wrong: its own flags claim too much. And its gradients are
noise in part, so what it finds is weaker than it could be: averaging over draws finds more. Success is only what holds
on draws that the search has not seen.

    python examples/attack_stochastic_defence.py --data ../shared/data
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import robustlab
from robustlab.core.shift import ShiftContext
from robustlab.corruptions import APGD, PGD
from robustlab.metrics.stats import wilson
from robustlab.train import fit, seeded_init
from robustlab.train.seeding import scoped_seed

SIGMA = 0.3
FRESH = 100


class NoisyInput(nn.Module):
    """A network behind Gaussian noise, in training and in use."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(3),
            nn.Flatten(), nn.Linear(144, 2),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images + SIGMA * torch.randn_like(images))


def accuracy(right: Tensor) -> str:
    """Return the share of right samples with its 95 % interval."""
    low, high = wilson(int(right.sum()), len(right))
    return f"{100 * right.double().mean():5.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def right_on_fresh_draws(model: robustlab.Model, batch: robustlab.Batch) -> Tensor:
    """Return whether most of 100 draws of the noise, which no attack has seen, leave the answer right; bool (N,)."""
    with scoped_seed("fresh draws"):
        answers = torch.stack([model.predict(batch).logits.argmax(1) for _ in range(FRESH)])
    return (answers == batch.labels).double().mean(0) > 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the NPZ files")
    parser.add_argument("--eps", type=float, default=6, help="budget in grey levels")
    parser.add_argument("--fast", action="store_true", help="two epochs, 64 images, 8 steps")
    options = parser.parse_args()

    train, test = (
        robustlab.load_data(options.data / "pneumoniamnist.npz", split=split, modality="xray")
        for split in ("train", "test")
    )
    model = robustlab.wrap(
        seeded_init(NoisyInput, seed=0), task="multiclass", output="logits", mean=0.5, std=0.25, name="noisy input"
    )
    fit(model, train, epochs=2 if options.fast else 3, lr=3e-3, progress=False)
    batch = test.read(range(64 if options.fast else 128))
    context = ShiftContext(model=model, spec=test.info.spec)
    eps = options.eps / 255

    print(f"{len(batch)} test images, noise of {SIGMA:g}, L-infinity budget of {options.eps:g} grey levels")
    print(f"{'no attack':25} right on fresh draws {accuracy(right_on_fresh_draws(model, batch))}")
    for attack in (PGD, APGD):
        for draws in (1, 20):
            search = attack(eps=(eps,), steps=8 if options.fast else 20, draws=draws)
            result = search.run(batch, context, eps=eps)
            found = right_on_fresh_draws(model, batch.replace(result.images))
            print(f"{search.label:12} draws = {draws:<4} right on fresh draws {accuracy(found)}", end="")
            # with one draw a look, the result's flags are those of the search
            print(f"; the search itself claims {accuracy(~result.success)}" if draws == 1 else "")


if __name__ == "__main__":
    main()
