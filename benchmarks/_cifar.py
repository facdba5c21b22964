"""The two small CIFAR-10 networks and their images, from a folder of data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DEPTH = {"resnet20": 3, "resnet32": 5}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.more = stride, outside - inside

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more or self.stride > 1:
            # option A of He et al. 2016: every second pixel, padded with empty channels on both sides
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """He et al. 2016, the form for CIFAR-10; takes images in [0, 1].

    Args:
        blocks: Blocks in each of the three stages.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, 10)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    @staticmethod
    def _stage(inside: int, outside: int, stride: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(_Block(inside, outside, stride), *(_Block(outside, outside, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))  # type: ignore[no-any-return]


def cifar_network(data: Path, name: str) -> nn.Module:
    """Return a trained network, ``"resnet20"`` or ``"resnet32"``, in eval mode with frozen parameters."""
    net = CifarResNet(_DEPTH[name])
    with np.load(data / f"weights_cifar10_{name}.npz") as stored:
        state: dict[str, Any] = {key: torch.from_numpy(stored[key]) for key in stored.files}
    missing, left = net.load_state_dict(state, strict=False)
    if left or any("num_batches_tracked" not in key for key in missing):
        raise ValueError(f"{name}: weights do not fit, {missing}, {left}")
    return net.eval().requires_grad_(False)


def cifar_images(data: Path, count: int) -> tuple[Tensor, Tensor]:
    """Return the first test images, float32 (N, 3, 32, 32) in [0, 1], and their labels."""
    with np.load(data / "cifar10_jpeg_subset.npz") as stored:
        images, labels = stored["test_images"][:count], stored["test_labels"][:count]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 255
    return pixels.contiguous(), torch.from_numpy(labels.reshape(-1).astype(np.int64))
