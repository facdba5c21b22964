"""Small networks that are trained in a minute, and the test images to attack them with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import robustlab
from robustlab.train import fit, seeded_init

FILES = {"pneumonia": "pneumoniamnist", "cells": "bccd_cells_40", "fashion": "fashionmnist_subset"}
"""Two, three and ten classes."""

_CLASSES = {"pneumonia": 2, "cells": 3, "fashion": 10}
_EPOCHS = 6


def small_cnn(channels: int, classes: int, width: int = 16) -> nn.Module:
    """Return a convolutional network for images in [0, 1] of 28 to 40 px."""

    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(channels, width), *block(width, 2 * width), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(32 * width, classes),
    )  # fmt: skip


def small_network(data: Path, name: str) -> nn.Module:
    """Return a network trained on one of the ``FILES``, in eval mode, its parameters as training leaves them."""
    file = data / f"{FILES[name]}.npz"
    train, val = (robustlab.load_data(file, split=split) for split in ("train", "val"))
    channels, classes = (1 if name != "cells" else 3), _CLASSES[name]
    net = seeded_init(lambda: small_cnn(channels, classes), seed=0)
    model = robustlab.wrap(net, task="multiclass", output="logits", num_classes=classes, name=name)
    fit(model, train, val, epochs=_EPOCHS, batch_size=64, lr=2e-3, seed=0)
    return net.eval()


def small_images(data: Path, name: str, count: int) -> tuple[Tensor, Tensor]:
    """Return the first test images of a file, float32 (N, C, H, W) in [0, 1], and their labels."""
    with np.load(data / f"{FILES[name]}.npz") as stored:
        images, labels = stored["test_images"][:count], stored["test_labels"][:count]
    pixels = torch.from_numpy(images).to(torch.float32) / 255
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return pixels.contiguous(), torch.from_numpy(labels.reshape(-1).astype(np.int64))
