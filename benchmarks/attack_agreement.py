"""Robust accuracy beside the reference ensemble, sample by sample, on real images.

A is a checkout of github.com/fra31/auto-attack (a392200), D the data sets:

    python -m benchmarks.attack_agreement ensemble --autoattack A --data D --network resnet20 --json FILE
    python -m benchmarks.attack_agreement fab --autoattack A --data D
    python -m benchmarks.attack_agreement square --autoattack A --data D
    python -m benchmarks.attack_agreement eot --autoattack A --data D

``ensemble`` attacks the first 200 test images at budgets where about 75, 50 and 25 % of the answers hold. Where the
reference ensemble fails (fewer than ten classes) its attacks are run one by one; ours must not be above the best of
them. Ours is run where the reference succeeded; with --whole everywhere. The rest are samples that the reference could
not break: they can only lower our robust accuracy, so without --whole the number printed for ours is an upper bound.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from benchmarks._cifar import cifar_images, cifar_network
from benchmarks._small import FILES, small_images, small_network
from benchmarks.attacks import NAMES, withstanding
from corruptions.adversarial import FAB, Square
from corruptions.adversarial.apgd import ranked_targets
from corruptions.adversarial.ensembles import RandomEnsemble
from corruptions.adversarial.fab import Approach
from corruptions.adversarial.oracle import Oracle
from corruptions.adversarial.steps import lengths
from robustlab.core.attack import Norm
from robustlab.core.model import Model, wrap
from robustlab.core.registry import ATTACKS
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch

SHARES = (0.5, 0.25, 0.75)
FRESH = 50  # draws of a random model that judge both sides
NOISE = 0.1


def problem(data: Path, name: str, count: int) -> tuple[nn.Module, Batch, Tensor]:
    """Return a network, images and their labels."""
    if name in FILES:
        net, (images, labels) = small_network(data, name), small_images(data, name, count)
    else:
        net, (images, labels) = cifar_network(data, name), cifar_images(data, count)
    return net, Batch(images=images, labels=labels, ids=torch.arange(len(images))), labels


def wrong(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return which answers are wrong, bool (N,)."""
    with torch.no_grad():
        return torch.cat([net(part).argmax(1) for part in images.split(100)]) != labels


def reference_plan(net: nn.Module, classes: int, norm: Norm, eps: float) -> dict[str, Callable[..., Tensor]]:
    """Return the reference attacks for a number of classes: the ensemble, or one by one where it fails."""
    from autoattack import AutoAttack  # type: ignore[import-not-found]
    from autoattack.autopgd_base import APGDAttack  # type: ignore[import-not-found]
    from autoattack.fab_pt import FABAttack_PT  # type: ignore[import-not-found]
    from autoattack.square import SquareAttack  # type: ignore[import-not-found]

    shared: dict[str, Any] = {"norm": NAMES[norm], "eps": eps, "device": "cpu"}
    if classes >= 10:
        ensemble = AutoAttack(net, norm=NAMES[norm], eps=eps, seed=0, verbose=False, device="cpu", version="standard")
        return {"standard": lambda x, y: ensemble.run_standard_evaluation(x, y, bs=50)}
    climbs = {f"apgd-{loss}": APGDAttack(net, n_iter=100, loss=loss, seed=0, **shared) for loss in ("ce", "dlr")}
    if classes < 3:
        del climbs["apgd-dlr"]
    fab = FABAttack_PT(net, n_restarts=1, n_iter=100, targeted=True, seed=0, n_target_classes=classes - 1, **shared)
    square = SquareAttack(net, p_init=0.8, n_queries=5000, n_restarts=1, seed=0, resc_schedule=False, **shared)
    return {**{name: climb.perturb for name, climb in climbs.items()}, "fab-t": fab.perturb, "square": square.perturb}


def ensemble(data: Path, name: str, norms: Sequence[Norm], shares: Sequence[float], count: int, target: Path | None,
             *, whole: bool) -> None:  # fmt: skip
    """Print robust accuracies for each budget; add a line of JSON to the file for each."""
    net, batch, labels = problem(data, name, count)
    classes = net(batch.images[:1]).shape[1]
    model = wrap(net, output="logits", num_classes=classes)
    ctx = ShiftContext(model=model)
    clean = ~wrong(net, batch.images, labels)
    for norm in norms:
        for share in shares:
            eps = withstanding(model, batch, norm, share / float(clean.float().mean()))
            started = time.perf_counter()
            broken = {
                title: wrong(net, attack(batch.images.clone(), labels.clone()).detach(), labels)
                for title, attack in reference_plan(net, classes, norm, eps).items()
            }
            seconds = time.perf_counter() - started
            theirs = torch.stack(list(broken.values())).any(0) | ~clean
            rows = torch.arange(count) if whole else theirs.nonzero().squeeze(1)
            attack: Any = ATTACKS.get("auto-attack")(norm=norm, eps=(eps,))
            started = time.perf_counter()
            found = attack.run(batch.select(rows), ctx, eps=eps, stop=True)
            ours = torch.zeros(count, dtype=torch.bool)
            ours[rows] = wrong(net, found.images, labels[rows])
            row = {
                "network": name,
                "n": count,
                "clean": int(clean.sum()),
                "norm": norm,
                "eps": eps,
                "reference": {title: count - int((flags | ~clean).sum()) for title, flags in broken.items()},
                "reference_robust": count - int(theirs.sum()),
                "ours_robust": count - int(ours.sum()),
                "whole": whole,
                "only_reference": int((theirs & ~ours).sum()),
                "only_ours": int((ours & ~theirs).sum()) if whole else None,
                "reference_seconds": round(seconds, 1),
                "seconds": round(time.perf_counter() - started, 1),
            }
            print(row, flush=True)
            if target:
                with target.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def paired(title: str, ours: Tensor, theirs: Tensor) -> None:
    """Print shares of success and the exact McNemar test."""
    mine, other = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    p = binomtest(mine, mine + other).pvalue if mine + other else 1.0
    print(
        f"{title}: n {len(ours)}, success ours {float(ours.float().mean()):.4f}, reference "
        f"{float(theirs.float().mean()):.4f}, only ours {mine}, only reference {other}, McNemar p {p:.3f}",
        flush=True,
    )


def right_ones(data: Path, count: int) -> tuple[nn.Module, Model, Batch, Tensor]:
    """Return the ten-class network, images that it has right, and their labels."""
    net, batch, labels = problem(data, "fashion", 1000)
    net.requires_grad_(False)
    right = (~wrong(net, batch.images, labels)).nonzero().squeeze(1)[:count]
    return net, wrap(net, output="logits", num_classes=10), batch.select(right), labels[right]


def fab(data: Path) -> None:
    """Print how far the distances that FAB-T finds are apart, before ours refines them."""
    from autoattack.fab_pt import FABAttack_PT

    net, model, batch, labels = right_ones(data, 200)
    norms: tuple[Norm, ...] = ("linf", "l2")
    for norm in norms:
        theirs = FABAttack_PT(net, norm=NAMES[norm], n_restarts=1, n_iter=100, eps=10.0, device="cpu")
        for place in (0, 3):
            theirs.target_class = place + 2
            moved = theirs.attack_single_run(batch.images, labels, is_targeted=True) - batch.images
            reference = lengths(moved, norm).flatten()
            oracle = Oracle(model, batch, None, eps=0.1, norm=norm)
            oracle.begin()
            targets = ranked_targets(oracle, oracle.all)[:, place]
            run = Approach(oracle, oracle.all, batch.images, targets, FAB(refine=False), stop=False)
            run.run()
            apart = run.distance.flatten() / reference - 1
            run.shorten()
            closer = float((run.distance.flatten() / reference - 1).mean())
            quantiles = [f"{v:.1e}" for v in apart.abs().quantile(torch.tensor([0.5, 0.9, 0.99])).tolist()]
            within = float((apart.abs() < 1e-4).float().mean())
            print(
                f"fab-t {norm}, target {place + 1}: n {len(batch)}, relative difference of distances, quantiles .5 "
                f".9 .99 {quantiles}, within 1e-4 {within:.3f}, mean {float(apart.mean()):+.1e}, refined {closer:+.1e}",
                flush=True,
            )


def square(data: Path) -> None:
    """Compare successes of Square, with the authors' windows and with windows everywhere."""
    from autoattack.square import SquareAttack

    net, model, batch, labels = right_ones(data, 600)
    norms: tuple[Norm, ...] = ("linf", "l2")
    for norm in norms:
        eps = withstanding(model, batch, norm, 0.25)
        for seed in (0, 1, 2):
            theirs = SquareAttack(net, norm=NAMES[norm], n_queries=1000, eps=eps, p_init=0.8, n_restarts=1, seed=seed,
                                  verbose=False, device="cpu", resc_schedule=False)  # fmt: skip
            broken = wrong(net, theirs.perturb(batch.images, labels), labels)
            for edges in (False, True):
                attack = Square(norm=norm, eps=(eps,), queries=1000, edges=edges)
                found = attack.run(batch, ShiftContext(model=model, seed=seed), eps=eps, stop=True)
                paired(f"square {norm} eps {eps:.4f} seed {seed} edges {edges}", found.success, broken)


class Noisy(nn.Module):
    """A network behind Gaussian noise, drawn anew in each forward pass."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + NOISE * torch.randn_like(x))  # type: ignore[no-any-return]


def eot(data: Path) -> None:
    """Compare the ensembles for random models; both are judged on the same fresh draws."""
    from autoattack import AutoAttack

    net, _, batch, labels = right_ones(data, 600)
    noisy = Noisy(net).eval()
    model = wrap(noisy, output="logits", num_classes=10)

    def fooled(images: Tensor) -> Tensor:
        torch.manual_seed(1)
        wrongs = torch.stack([wrong(noisy, images, labels) for _ in range(FRESH)])
        return wrongs.float().mean(0) > 0.5

    norms: tuple[Norm, ...] = ("linf", "l2")
    for norm in norms:
        eps = withstanding(wrap(net, output="logits", num_classes=10), batch, norm, 0.5)
        theirs = AutoAttack(noisy, norm=NAMES[norm], eps=eps, seed=0, verbose=False, device="cpu", version="rand")
        images = theirs.run_standard_evaluation(batch.images, labels, bs=200)
        found = RandomEnsemble(norm=norm, eps=(eps,)).run(batch, ShiftContext(model=model), eps=eps, stop=True)
        paired(f"aa-rand {norm} eps {eps:.4f}, {FRESH} fresh draws", fooled(found.images), fooled(images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ensemble", "fab", "square", "eot"))
    parser.add_argument("--autoattack", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=("resnet20", "resnet32", *FILES), default="pneumonia")
    parser.add_argument("--norm", choices=("linf", "l2"), nargs="+", default=["linf"])
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="robust accuracies to aim at")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--whole", action="store_true", help="run ours on every sample")
    parser.add_argument("--json", type=Path, help="a line for each budget is added")
    options = parser.parse_args()
    sys.path.insert(0, str(options.autoattack))
    if options.what == "ensemble":
        ensemble(options.data, options.network, options.norm, options.shares, options.count, options.json,
                 whole=options.whole)  # fmt: skip
    else:
        {"fab": fab, "square": square, "eot": eot}[options.what](options.data)


if __name__ == "__main__":
    main()
