"""Bare timm networks work in five lines, also on images of another size and channel count."""

import numpy as np
import pytest
import timm
import torch

import robustlab


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [("resnet18", (96, 96), (3, 96, 96)), ("vit_tiny_patch16_224", (28, 28), (3, 224, 224))],
)
def test_five_lines(name, size, shape):
    net = timm.create_model(name, num_classes=2).eval()
    seen = []
    net.register_forward_pre_hook(lambda module, arguments: seen.append(tuple(arguments[0].shape[1:])))
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (12, *size), dtype=np.uint8), np.arange(12) % 2
    report = robustlab.evaluate_under_shift(
        net, (images, labels), shifts="gaussian-noise", severities=(3,), progress=False
    )
    assert set(seen) == {shape}
    assert report.value("accuracy", shift="gaussian-noise", severity=3).n == 12
    assert "gaussian-noise" in report.summary()
    mean = net.pretrained_cfg["mean"]
    assert tuple(report.manifest["model"]["settings"]["mean"]) == pytest.approx(mean)
    if name == "resnet18":
        mean, std = (torch.tensor(net.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        direct = net((torch.from_numpy(images[:, None]).expand(-1, 3, -1, -1) / 255 - mean) / std)
        assert torch.allclose(report.predictions["clean"].logits, direct, atol=1e-4)
