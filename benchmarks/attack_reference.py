"""Attacks beside the reference implementations: golden arrays, bit-equality, and robust accuracy of the ensembles.

The references are not installed: get a checkout of github.com/fra31/auto-attack (a392200) and a folder that holds
torchattacks 3.5.1 (``pip install --no-deps --target DIR torchattacks==3.5.1 requests tqdm``) and name them:

    python -m benchmarks.attack_reference golden --autoattack A --torchattacks T     # rewrites the arrays of the tests
    python -m benchmarks.attack_reference bits --autoattack A --data D               # float32, the CIFAR-10 networks
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._cifar import cifar_images, cifar_network
from corruptions.adversarial.apgd import Climb
from corruptions.adversarial.losses import LossName, loss_named
from corruptions.adversarial.oracle import Oracle
from corruptions.adversarial.steps import lengths
from robustlab.core.attack import Norm
from robustlab.core.model import Model, wrap
from robustlab.core.types import Batch
from tests.references import attack_cases as cases

GOLDEN = Path(__file__).parents[1] / "tests" / "references" / "golden_attacks.npz"
NORMS: tuple[Norm, ...] = ("linf", "l2")
RANKS = (1, 2, 3)


@contextlib.contextmanager
def double() -> Iterator[None]:
    """The references make some of their tensors in the default precision."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def reference_apgd(net: nn.Module, norm: Norm, loss: str, eps: float, steps: int, x: Tensor, y: Tensor, start: Tensor,
                   rank: int = 0) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the reference's best point, its loss and whether no step was wrong."""
    from autoattack.autopgd_base import APGDAttack, APGDAttack_targeted  # type: ignore[import-not-found]

    shared: dict[str, Any] = {
        "n_iter": steps, "norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "device": x.device
    }  # fmt: skip
    attack = APGDAttack_targeted(net, **shared) if rank else APGDAttack(net, loss=loss, **shared)
    attack.init_hyperparam(x)
    if rank:
        with torch.no_grad():
            attack.y_target = net(x).sort(dim=1)[1][:, -(rank + 1)]
    best, right, value, _ = attack.attack_single_run(x, y, x_init=start)
    return best, value, right


def our_apgd(model: Model, norm: Norm, loss: LossName, eps: float, steps: int, batch: Batch, start: Tensor,
             rank: int = 0) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the same of ours."""
    oracle = Oracle(model, batch, None, eps=eps, norm=norm)
    with torch.no_grad():
        targets = model.outputs(batch).logits.sort(dim=1).indices
    oracle.num_classes = targets.shape[1]
    climb = Climb(oracle, oracle.all, start, steps=steps, rho=0.75, stop=False)
    if rank:
        climb.run_towards(targets[:, -(rank + 1)])
    else:
        climb.run(loss_named(loss, "multiclass", targets.shape[1], "reference"))
    return climb.best_images, climb.best, oracle.margin >= 0


def reference_pgd(net: nn.Module, name: str, **options: Any) -> Tensor:
    """Return what torchattacks makes of the clean images, without a random start."""
    import torchattacks  # type: ignore[import-not-found]

    made: Tensor = getattr(torchattacks, name)(net, **options)(cases.images(), cases.labels())
    return made


def golden() -> None:
    """Write what the references make of the double-precision problem."""
    arrays: dict[str, Tensor] = {}
    net, x, y = cases.network(), cases.images(), cases.labels()
    with double():
        for norm in NORMS:
            eps, start = cases.EPS[norm], cases.starts(norm)
            for loss, rank in (("ce", 0), ("dlr", 0), *(("targeted", rank) for rank in RANKS)):
                names = (f"apgd-{loss}{rank or ''}-{norm}-{part}" for part in ("images", "loss", "right"))
                arrays |= zip(names, reference_apgd(net, norm, loss, eps, cases.STEPS, x, y, start, rank), strict=True)
        linf, l2 = cases.EPS["linf"], cases.EPS["l2"]
        arrays["fgsm-linf"] = reference_pgd(net, "FGSM", eps=linf)
        arrays["pgd-linf"] = reference_pgd(net, "PGD", eps=linf, alpha=linf / 8, steps=20, random_start=False)
        arrays["pgd-l2"] = reference_pgd(net, "PGDL2", eps=l2, alpha=l2 / 8, steps=20, random_start=False)
    stored = {name: value.detach().numpy() for name, value in arrays.items()}
    text = f"auto-attack a392200, torchattacks 3.5.1, torch {torch.__version__}; python -m benchmarks.attack_reference"
    np.savez_compressed(GOLDEN, made_by=np.array(text), **stored)
    print(f"{len(stored)} arrays, {GOLDEN.stat().st_size} bytes")


def bits(data: Path, count: int) -> None:
    """Print the largest difference in float32, steps and all, on the two CIFAR-10 networks."""
    x, y = cifar_images(data, count)
    for name in ("resnet20", "resnet32"):
        net = cifar_network(data, name)
        batch = Batch(images=x, labels=y, ids=torch.arange(count))
        model = wrap(net, output="logits", num_classes=10)
        for norm, eps in (("linf", 1 / 255), ("l2", 0.1)):
            drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            start = (x + eps * drawn / lengths(drawn, norm)).clamp(0, 1)  # type: ignore[arg-type]
            for loss, rank in (("ce", 0), ("dlr", 0), ("targeted", 1), ("targeted", 9)):
                theirs = reference_apgd(net, norm, loss, eps, 100, x, y, start, rank)  # type: ignore[arg-type]
                ours = our_apgd(model, norm, loss, eps, 100, batch, start, rank)  # type: ignore[arg-type]
                apart = [float((a.double() - b.double()).abs().max()) for a, b in zip(ours, theirs, strict=True)]
                robust = int(ours[2].sum()), int(theirs[2].sum())
                title = f"{name} {norm} eps {eps:.4f} {loss}{rank or ''}"
                right = f"right after it {robust[0]} and {robust[1]} of {count}"
                print(f"{title}: points, losses, flags differ by at most {apart}; {right}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("golden", "bits"))
    parser.add_argument("--autoattack", type=Path, required=True)
    parser.add_argument("--torchattacks", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--count", type=int, default=64)
    options = parser.parse_args()
    sys.path[:0] = [str(path) for path in (options.autoattack, options.torchattacks) if path]
    if options.what == "golden":
        golden()
    else:
        bits(options.data, options.count)


if __name__ == "__main__":
    main()
