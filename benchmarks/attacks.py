"""The reference ensemble and torchattacks beside ours: robust accuracy and time, where about half of the images hold.

    python -m benchmarks.attacks --autoattack A --torchattacks T --data D [--count 64] [--share 0.5] [--stages]

A is a checkout of github.com/fra31/auto-attack (a392200), T a folder that holds torchattacks 3.5.1, D the data sets.
The model is ResNet-20 on CIFAR-10 (32 px). A budget is found at which about this share of the images that are right
withstands PGD; both sides then attack the same images with all threads, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._cifar import cifar_images, cifar_network
from corruptions.adversarial import PGD
from robustlab.core.attack import Norm
from robustlab.core.model import Model, wrap
from robustlab.core.registry import ATTACKS
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch

NAMES = {"linf": "Linf", "l2": "L2"}
LARGEST = {"linf": 8 / 255, "l2": 1.0}


def withstanding(model: Model, batch: Batch, norm: Norm, share: float) -> float:
    """Return a budget at which about this share of the images that are right withstands PGD, by bisection."""
    low, high = 0.0, LARGEST[norm]
    right = model.predict(batch).logits.argmax(1) == batch.labels
    for _ in range(8):
        eps = (low + high) / 2
        found = PGD(norm=norm, eps=(eps,), steps=10).run(batch, ShiftContext(model=model), eps=eps, stop=True)
        left = float((~found.success & right).sum() / right.sum())
        low, high = (eps, high) if left > share else (low, eps)
    return (low + high) / 2


def timed(call: Any) -> tuple[Tensor, float]:
    """Return adversarial images and how long they took."""
    started = time.perf_counter()
    images: Tensor = call()
    return images, time.perf_counter() - started


def robust(net: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return how many answers are right."""
    with torch.no_grad():
        return int((net(images).argmax(1) == labels).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoattack", type=Path, required=True)
    parser.add_argument("--torchattacks", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.5, help="of the right images that withstand PGD")
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf")
    parser.add_argument("--network", choices=("resnet20", "resnet32"), default="resnet20")
    parser.add_argument("--stages", action="store_true", help="the attacks of the ensemble one by one instead")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path[:0] = [str(options.autoattack), str(options.torchattacks)]
    import torchattacks  # type: ignore[import-not-found]
    from autoattack import AutoAttack  # type: ignore[import-not-found]

    torch.set_num_threads(os.cpu_count() or 1)
    norm: Norm = options.norm
    net = cifar_network(options.data, options.network)
    images, labels = cifar_images(options.data, options.count)
    model = wrap(net, output="logits", num_classes=10)
    batch = Batch(images=images, labels=labels, ids=torch.arange(len(images)))
    eps = withstanding(model, batch, norm, options.share)
    ctx = ShiftContext(model=model)

    def ours(name: str, **fields: Any) -> Tensor:
        attack: Any = ATTACKS.get(name)(norm=norm, eps=(eps,), **fields)
        found: Tensor = attack.run(batch, ctx, eps=eps, stop=True).images
        return found

    def reference() -> Tensor:
        attack = AutoAttack(net, norm=NAMES[norm], eps=eps, seed=0, verbose=False, device="cpu", version="standard")
        made: Tensor = attack.run_standard_evaluation(images, labels, bs=len(images))
        return made

    def reference_stage(name: str) -> Tensor:
        attack = AutoAttack(net, norm=NAMES[norm], eps=eps, seed=0, verbose=False, device="cpu", version="custom",
                            attacks_to_run=[name])  # fmt: skip
        attack.fab.n_restarts = attack.apgd_targeted.n_restarts = attack.apgd.n_restarts = 1
        attack.fab.n_target_classes = attack.apgd_targeted.n_target_classes = 9
        attack.square.n_queries = 5000
        made: Tensor = attack.run_standard_evaluation(images, labels, bs=len(images))
        return made

    def torchattack(name: str, **fields: Any) -> Tensor:
        made: Tensor = getattr(torchattacks, name)(net, eps=eps, **fields)(images, labels)
        return made

    cases = [
        ("aa-standard", lambda: ours("aa-standard"), "auto-attack standard", reference),
        ("apgd ce, 100 steps", lambda: ours("apgd"), "torchattacks APGD", lambda: torchattack(
            "APGD", norm=NAMES[norm], steps=100, n_restarts=1, loss="ce")),
        ("pgd, 40 steps", lambda: ours("pgd", step_size=10.0), "torchattacks PGD", lambda: torchattack(
            "PGD" if norm == "linf" else "PGDL2", alpha=eps / 4, steps=40)),
    ]  # fmt: skip
    if options.stages:
        cases = [
            (f"{name} alone", partial(ours, name, **fields), f"auto-attack {theirs}", partial(reference_stage, theirs))
            for name, theirs, fields in (
                ("apgd", "apgd-ce", {}),
                ("apgd-t", "apgd-t", {}),
                ("fab-t", "fab-t", {"refine": False}),
                ("square", "square", {"edges": False}),
            )
        ]
    clean = robust(net, images, labels)
    print(f"{options.network}, {len(images)} images, {clean} right, {norm} eps {eps:.5f}")
    rows = []
    for title, mine, rival, theirs in cases:
        (a, seconds), (b, rival_seconds) = timed(mine), timed(theirs)
        row = {
            "case": title,
            "rival": rival,
            "robust": robust(net, a, labels),
            "rival_robust": robust(net, b, labels),
            "seconds": round(seconds, 2),
            "rival_seconds": round(rival_seconds, 2),
            "ratio": round(rival_seconds / seconds, 2),
        }
        rows.append(row)
        print(row, flush=True)
    if options.json:
        options.json.write_text(json.dumps({"eps": eps, "n": len(images), "clean": clean, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
