"""Attacks against what the reference implementations made of the same double-precision problem.

The arrays were written by ``python -m benchmarks.attack_reference golden``, which runs auto-attack and torchattacks.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from corruptions.adversarial.apgd import Climb
from corruptions.adversarial.losses import loss_named
from corruptions.adversarial.oracle import Oracle
from corruptions.adversarial.pgd import climb
from tests.references import attack_cases as cases

CASES = [("ce", 0), ("dlr", 0), ("targeted", 1), ("targeted", 2), ("targeted", 3)]


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).with_name("golden_attacks.npz")) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files if name != "made_by"}


def oracle_of(norm):
    oracle = Oracle(cases.Double(cases.network()), cases.batch(), None, eps=cases.EPS[norm], norm=norm)
    oracle.begin()
    return oracle


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("loss", "rank"), CASES)
def test_auto_pgd_is_the_references(golden, loss, rank, norm):
    oracle = oracle_of(norm)
    right = oracle.margin >= 0
    run = Climb(oracle, oracle.all, cases.starts(norm), steps=cases.STEPS, rho=0.75, stop=False)
    if rank:
        run.run_towards(oracle.ask(cases.images(), oracle.all).sort(dim=1).indices[:, -(rank + 1)])
    else:
        run.run(loss_named(loss, "multiclass", cases.CLASSES, "test"))
    name = f"apgd-{loss}{rank or ''}-{norm}"
    assert torch.allclose(run.best_images, golden[f"{name}-images"], rtol=0, atol=1e-6)
    assert torch.allclose(run.best, golden[f"{name}-loss"], rtol=0, atol=1e-6)
    # settled samples are left alone by ours; the reference attacks them too
    assert torch.equal((oracle.margin >= 0)[right], golden[f"{name}-right"].bool()[right])
    assert 0 < (oracle.margin >= 0)[right].double().mean() < 1, "the budget tells attacks apart"


@pytest.mark.parametrize(
    ("name", "norm", "steps", "share"),
    [("fgsm-linf", "linf", 1, 1), ("pgd-linf", "linf", 20, 8), ("pgd-l2", "l2", 20, 8)],
)
def test_plain_gradient_steps_are_the_references(golden, name, norm, steps, share):
    oracle = oracle_of(norm)
    last = climb(oracle, oracle.all, oracle.clean, steps=steps, alpha=cases.EPS[norm] / share)
    assert torch.allclose(last, golden[name], rtol=0, atol=1e-6)
