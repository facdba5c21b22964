"""Gradient steps of fixed length: FGSM and projected gradient descent, in L-infinity and L2 balls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustlab.core.errors import RangeError
from robustlab.core.registry import ATTACKS
from robustlab.core.rng import SampleRng

from .base import Search
from .losses import attack_loss
from .oracle import Oracle
from .steps import direction, random_start

_LOOK_AROUND = 5  # steps between two looks for samples that are done, which wait for the device


@ATTACKS.register("fgsm")
@dataclass(frozen=True)
class FGSM(Search):
    """One gradient step of full length, x + eps sign(g), or x + eps g / |g|_2 in the L2 ball, untargeted.

    Cheap and weak: it is for checks that stronger attacks must pass, not for measuring robustness.

    References:
        I. Goodfellow, J. Shlens, C. Szegedy, "Explaining and harnessing adversarial examples", 2015, 1412.6572.
    """

    random: ClassVar[bool] = False

    def search(self, oracle: Oracle, rng: SampleRng, rows: Tensor, start: Tensor | None, *, stop: bool) -> None:
        del rng, stop
        climb(oracle, rows, oracle.clean[rows] if start is None else start, steps=1, alpha=oracle.eps)


@ATTACKS.register("pgd")
@dataclass(frozen=True)
class PGD(Search):
    """White-box, untargeted search by projected gradient steps from a keyed random start.

    x <- P(x + alpha sign(g)) in the L-infinity ball, x <- P(x + alpha g / |g|_2) in the L2 ball, with
    alpha = ``step_size`` eps / ``steps`` and P the projection on the ball around the clean image and on [0, 1]. The
    iterate with the smallest margin is kept for each sample; the clean image counts as the first iterate, and samples
    that the model gets wrong there are left as they are. Losses are summed, steps are fixed and draws are keyed by
    sample, so a sample's result does not depend on its batch.

    Args:
        steps: Gradient steps of each restart.
        restarts: Independent starts.
        step_size: Length of all steps together, in units of eps.

    References:
        Madry, Makelov, Schmidt, Tsipras, Vladu 2018, arXiv:1706.06083. Straight-through gradients: Athalye, Carlini,
        Wagner 2018, arXiv:1802.00420.
    """

    steps: int = 40
    restarts: int = 1
    step_size: float = 2.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("steps", self.steps), ("restarts", self.restarts)):
            self.at_least_one(name, value, "Madry et al. use 40 steps, 1 restart.")
        if not self.step_size > 0:
            raise RangeError("PGD", "a positive step_size", f"{self.step_size}", "2.5 lets a path cross the ball.")

    def search(self, oracle: Oracle, rng: SampleRng, rows: Tensor, start: Tensor | None, *, stop: bool) -> None:
        alpha = self.step_size * oracle.eps / self.steps
        for restart in range(self.restarts):
            if restart and stop:
                rows = oracle.open(rows)
            if not len(rows):
                return
            if start is not None and restart == 0:
                first = start
            else:
                first = random_start(rng.child(restart).select(rows), oracle.clean[rows], oracle.eps, oracle.norm)
            climb(oracle, rows, oracle.project(first, rows), steps=self.steps, alpha=alpha, stop=stop)


def climb(oracle: Oracle, rows: Tensor, images: Tensor, *, steps: int, alpha: float, stop: bool = False) -> Tensor:
    """Take ``steps`` gradient steps of length ``alpha`` from ``images`` (n, C, H, W); return where they end.

    With ``stop`` samples are left alone soon after they are wrong, and only the others are returned.
    """
    for step in range(steps):
        if stop and step % _LOOK_AROUND == 0 and step:
            left = (~oracle.wrong(rows)).nonzero().squeeze(1)
            rows, images = rows[left], images[left]
            if not len(rows):
                return images
        _, gradient = oracle.gradient(images, rows, attack_loss)
        images = oracle.project(images + alpha * direction(gradient, oracle.norm), rows)
    oracle.forward(images, rows)
    return images
