"""Data, networks and settings that the tests of promises share, and the work of their second process."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import robustlab
from corruptions import PGD, Compose, OneOf
from defenses import DeepEnsemble, TemperatureScaling
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.types import ImageSpec

COUNT, CHUNK, SIZE = 40, 16, 12
EVERY = tuple(CORRUPTIONS.get(name)() for name in CORRUPTIONS.names())
SHIFTS = (
    *(shift for shift in EVERY if shift.storable and shift.skip_reason(ImageSpec(3, (SIZE, SIZE))) is None),
    Compose([CORRUPTIONS.get(name)() for name in ("defocus-blur", "poisson-noise", "jpeg")]),
    OneOf([CORRUPTIONS.get(name)() for name in ("gaussian-noise", "gamma", "jpeg")]),
)
ORDER = np.random.default_rng(1).permutation(COUNT)
ATTACK = PGD(eps=(2 / 255, 8 / 255), steps=3)
SECRETS = [f"Jane Q. Patient {i:05d}" for i in range(COUNT)]


class Exact(nn.Module):
    """Projects the grey levels on random integers: exact in float32, so equal logits mean equal pixels."""

    def __init__(self):
        super().__init__()
        weight = np.random.default_rng(5).integers(-31, 32, (3 * SIZE * SIZE, 3))
        self.register_buffer("weight", torch.from_numpy(weight).double())
        self.eval()

    def forward(self, x):
        levels = x.double().flatten(1) * 255
        assert torch.allclose(levels, levels.round(), atol=1e-4), "an evaluated image is one that could be stored"
        return (levels.round() @ self.weight).float()


class Small(nn.Module):
    """A fixed convolutional network whose answers follow the brightness of the upper half."""

    def __init__(self, classes=3, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, classes)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.classes = classes
        self.eval()

    def forward(self, x):
        features = F.relu(self.conv(x - 0.5)).mean((2, 3))
        bright = (x[:, :, : SIZE // 2].mean((1, 2, 3)) - 0.5)[:, None] * 8
        return self.head(features) + bright * torch.linspace(-1, 1, self.classes)


def pixels(count=COUNT, seed=0):
    """RGB images with structure, and the class that their upper half suggests."""
    generator = np.random.default_rng(seed)
    coarse = generator.uniform(0, 255, (count, SIZE // 4, SIZE // 4, 3)).repeat(4, 1).repeat(4, 2)
    level = generator.uniform(20, 180, (count, 1, 1, 1))
    images = np.clip(0.4 * coarse + 0.6 * level + generator.normal(0, 9, coarse.shape), 0, 255).astype(np.uint8)
    noisy = images[:, : SIZE // 2].mean((1, 2, 3)) + generator.normal(0, 25, count)
    return images, noisy


def source(task="multiclass", count=COUNT, seed=0, **options):
    images, score = pixels(count, seed)
    rank = score.argsort().argsort() / count
    labels = {
        "binary": (rank > 0.5).astype(int),
        "multiclass": (rank * 3).astype(int),
        "multilabel": np.stack([rank > 0.5, rank < 0.3, rank > 0.8], 1).astype(int),
    }[task]
    given = {"labels": labels, "task": task, "ids": np.arange(count) * 7919 + 10**15 + seed} | options
    return robustlab.load_data(images, **given)


def evaluate(model, data, **options):
    settings = {"shifts": SHIFTS, "severities": (0.5, 3), "progress": False, "replicates": 100, "batch_size": CHUNK}
    settings["trust"] = 0  # the checklist of attacks has tests of its own
    return robustlab.evaluate_under_shift(model, data, **settings | options)


def by_id(report, condition):
    store = report.predictions[condition]
    return dict(zip(store.ids.tolist(), store.logits, strict=True))


def conditions(report):
    return [entry["key"] for entry in report.manifest["conditions"]]


def digest(report):
    """Everything that a second process must find again."""
    return {name: [row.tolist() for row in store.logits] for name, store in report.predictions.items()}


def fail(*args, **options):
    raise AssertionError("promised not to do this")


def secretive():
    """A data set whose ids and patients are names that may not leave the machine."""
    return source("multiclass", ids=SECRETS, groups={"pid": [name[:-1] for name in SECRETS], "sex": ["F", "M"] * 20})


def build():
    return robustlab.wrap(Small(), task="multiclass", output="logits", num_classes=3)


def work_elsewhere(place):
    """What the subprocess does: a whole evaluation without sockets, and every load without pickle."""
    import pickle
    import socket

    folder = Path(place)
    socket.socket = socket.create_connection = socket.getaddrinfo = fail
    report = evaluate(Exact(), source())
    (folder / "digest.json").write_text(json.dumps(digest(report)))
    settings = {"val": secretive(), "attacks": ATTACK, "cluster": "pid", "groups": ("sex",), "shifts": "standard"}
    for name, gallery in (("run", False), ("pictures", True)):
        report = evaluate(build(), secretive(), ood={"far/x": source(seed=2)}, gallery=gallery, **settings)
        report.to_html(report.save(folder / name) / "report.html")
    TemperatureScaling(build(), temperature=2.0).save(folder / "temperature")
    DeepEnsemble([build(), build()]).save(folder / "ensemble")
    report.summary()
    pickle.load = pickle.loads = pickle.Unpickler = torch.load = fail
    loaded = robustlab.Report.load(folder / "run")
    robustlab.compare(loaded, report)
    TemperatureScaling.load(folder / "temperature", model=build())
    DeepEnsemble.load(folder / "ensemble", build=build)
