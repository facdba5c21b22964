"""Auto-PGD: projected gradient steps with momentum, whose length is halved where they stop helping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from robustlab.core.attack import Norm, just_inside
from robustlab.core.errors import ConfigError, RangeError
from robustlab.core.registry import ATTACKS
from robustlab.core.rng import SampleRng
from robustlab.core.types import Task

from .base import Search
from .losses import LOSSES, LossName, loss_named, signed, targeted_dlr
from .oracle import Loss, Oracle
from .steps import TINY, lengths, surface_start

_MOMENTUM = 0.75


@dataclass(frozen=True)
class Stepped(Search):
    """The schedule that both forms share."""

    steps: int = 100
    restarts: int = 1
    rho: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("steps", self.steps), ("restarts", self.restarts)):
            self.at_least_one(name, value, "The reference ensemble takes 100 steps and 1 restart.")
        if not 0 <= self.rho <= 1:
            raise RangeError(type(self).__name__, "rho from 0 to 1", f"{self.rho}", "The reference uses 0.75.")


@ATTACKS.register("apgd")
@dataclass(frozen=True)
class APGD(Stepped):
    """Auto-PGD, untargeted, from a keyed random start on the sphere.

    x_{t+1} = P(x_t + a (P(x_t + s d) - x_t) + (1 - a) (x_t - x_{t-1})), d the sign of the gradient (its direction in
    L2), a = 1 in the first step and 0.75 afterwards, s = 2 eps at first. At checkpoints that come ever closer, where
    the loss rose in at most ``rho`` of the steps since, or nothing improved with the same s, s is halved and the search
    goes on from the best point. With an injected start each step is that of the authors' code, bit for bit.

    Args:
        loss: ``"ce"`` cross-entropy, ``"dlr"`` the scale-free ratio for 3 or more classes, ``"margin"``.
        steps: Gradient steps of each restart.
        restarts: Independent starts.
        rho: Share of rising steps that is taken for progress.

    References:
        F. Croce, M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks", 2020, 2003.01690.
    """

    loss: LossName = "ce"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise ConfigError("APGD", f"loss among {', '.join(LOSSES)}", f"{self.loss!r}", "Check the spelling.")

    @property
    def label(self) -> str:
        return f"apgd-{self.loss}-{self.norm}"

    def search(self, oracle: Oracle, rng: SampleRng, rows: Tensor, start: Tensor | None, *, stop: bool) -> None:
        loss = loss_named(self.loss, oracle.model.task, oracle.num_classes, "APGD")
        for restart in range(self.restarts):
            if restart and stop:
                rows = oracle.open(rows)
            if not len(rows):
                return
            first = start if start is not None and restart == 0 else started(oracle, rows, rng.child(restart))
            Climb(oracle, rows, first, steps=self.steps, rho=self.rho, stop=stop).run(loss)


@ATTACKS.register("apgd-t")
@dataclass(frozen=True)
class TargetedAPGD(Stepped):
    """Auto-PGD towards each of the likeliest wrong classes in turn; any wrong answer is a success.

    The loss is -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2) for the target t, and -(z_y - z_t) below four classes.
    Targets are ranked by the clean logits. Where an image has several labels, the targets are the labels that are
    closest to flipping, each searched by itself.

    Args:
        steps: Gradient steps of each restart.
        restarts: Independent starts for each target.
        rho: Share of rising steps that is taken for progress.
        targets: Most wrong classes, or labels, to aim at; all of them where there are fewer.

    References:
        F. Croce, M. Hein, 2020, 2003.01690.
    """

    targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("targets", self.targets, "The reference ensemble aims at 9.")

    def search(self, oracle: Oracle, rng: SampleRng, rows: Tensor, start: Tensor | None, *, stop: bool) -> None:
        for place, restart, left, targets in aims(oracle, rows, self.targets, self.restarts, stop=stop):
            if start is not None and place == restart == 0:
                first = start
            else:
                first = started(oracle, left, rng.child(place).child(restart))
            Climb(oracle, left, first, steps=self.steps, rho=self.rho, stop=stop).run_towards(targets)


def aims(
    oracle: Oracle, rows: Tensor, most: int, restarts: int, *, stop: bool
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield the runs of a targeted search: rank of the target, restart, samples int64 (n,), their targets int64 (n,).

    Args:
        oracle: The model on the batch.
        rows: int64 (n,), places in the batch.
        most: Targets at most.
        restarts: Runs for each target.
        stop: Leave out samples that earlier runs made wrong; the first run then has all ``rows``, none of which is.
    """
    ranked = ranked_targets(oracle, rows)
    for place in range(min(most, ranked.shape[1])):
        for restart in range(restarts):
            if stop:
                left = ~oracle.wrong(rows)
                rows, ranked = rows[left], ranked[left]
            if not len(rows):
                return
            yield place, restart, rows, ranked[:, place]


def ranked_targets(oracle: Oracle, rows: Tensor) -> Tensor:
    """Return what a targeted search aims at, the closest first.

    For classes those after the first by clean logit, int64 (n, C - 1); for several labels an image the labels, by how
    far their clean logits are from flipping, int64 (n, C), those that are not annotated last.
    """
    logits = oracle.ask(oracle.clean[rows], rows)
    if oracle.model.task == "multilabel":
        return signed(logits, oracle.labels[rows]).sort(dim=1).indices
    return logits.sort(dim=1).indices.flip(1)[:, 1:]


def started(oracle: Oracle, rows: Tensor, rng: SampleRng) -> Tensor:
    """Return the attack's own starts for the samples at ``rows``, inside the mask."""
    clean = oracle.clean[rows]
    first = surface_start(rng.select(rows), clean, oracle.eps, oracle.norm)
    return first if oracle.mask is None else clean + (first - clean) * oracle.mask[rows]


class Climb:
    """One run of Auto-PGD; one row of state for each sample that is still searched.

    Args:
        oracle: The model on the batch.
        rows: int64 (n,), places in the batch.
        first: float (n, C, H, W), where the run starts.
        steps: Gradient steps.
        rho: Share of rising steps that is taken for progress.
        stop: Drop samples at checkpoints once they are wrong.
    """

    def __init__(self, oracle: Oracle, rows: Tensor, first: Tensor, *, steps: int, rho: float, stop: bool) -> None:
        self.oracle = oracle
        self.rows = rows
        self.steps = steps
        self.rho = rho
        self.stop = stop
        self.images = first.clamp(0, 1)
        self.targets = rows  # of no meaning unless the run has targets

    def run_towards(self, targets: Tensor) -> None:
        """Raise the targeted loss, for target classes int64 (n,)."""
        self.targets = targets

        def loss(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
            if task == "multilabel":
                return -signed(logits, labels).gather(1, self.targets[:, None]).squeeze(1)
            return targeted_dlr(logits, labels, self.targets)

        self.run(loss)

    def run(self, loss: Loss) -> None:
        """Raise a loss."""
        oracle = self.oracle
        value, self.gradient = oracle.gradient(self.images, self.rows, loss)
        self.best, self.best_images, self.best_gradient = value, self.images, self.gradient
        self.best_at_check = value
        self.before = self.images
        self.size = torch.full_like(value, 2.0 * oracle.eps).view(-1, 1, 1, 1)
        self.halved = torch.ones_like(value, dtype=torch.bool)
        self.rises = torch.zeros_like(value)
        # the reference compares the first loss with an empty row of its history
        self.value = torch.zeros_like(value)
        wait, shorter, shortest = (max(int(share * self.steps), 1) for share in (0.22, 0.03, 0.06))
        since = 0
        for step in range(self.steps):
            if not len(self.rows):
                return
            self._move(1.0 if step == 0 else _MOMENTUM)
            value, self.gradient = oracle.gradient(self.images, self.rows, loss)
            self._compare(value)
            since += 1
            if since == wait:
                self._check(wait)
                since, wait = 0, max(wait - shorter, shortest)

    def _move(self, share: float) -> None:
        clean, eps, norm = self.oracle.clean[self.rows], self.oracle.eps, self.oracle.norm
        drift, self.before = self.images - self.before, self.images
        unit = self.gradient.sign() if norm == "linf" else self.gradient / (lengths(self.gradient, norm) + TINY)
        stepped = _inside(self.images + self.size * unit, clean, eps, norm)
        mixed = self.images + (stepped - self.images) * share + drift * (1 - share)
        self.images = _inside(mixed, clean, eps, norm)

    def _compare(self, value: Tensor) -> None:
        self.rises = self.rises + (value > self.value)
        self.value = value
        better = value > self.best
        wide = better.view(-1, 1, 1, 1)
        self.best = torch.where(better, value, self.best)
        self.best_images = torch.where(wide, self.images, self.best_images)
        self.best_gradient = torch.where(wide, self.gradient, self.best_gradient)

    def _check(self, waited: int) -> None:
        """Halve steps that do not help, and go on from the best point there."""
        idle = ~self.halved & (self.best_at_check >= self.best)
        self.halved = (self.rises <= waited * self.rho) | idle
        self.best_at_check = self.best
        self.rises = torch.zeros_like(self.rises)
        wide = self.halved.view(-1, 1, 1, 1)
        self.size = torch.where(wide, self.size / 2, self.size)
        self.images = torch.where(wide, self.best_images, self.images)
        self.gradient = torch.where(wide, self.best_gradient, self.gradient)
        if self.stop:
            self._drop()

    def _drop(self) -> None:
        left = (~self.oracle.wrong(self.rows)).nonzero().squeeze(1)
        if len(left) == len(self.rows):
            return
        for name in ("rows", "targets", "images", "before", "gradient", "best", "best_images", "best_gradient",
                     "best_at_check", "size", "halved", "rises", "value"):  # fmt: skip
            setattr(self, name, getattr(self, name)[left])


def _inside(images: Tensor, clean: Tensor, eps: float, norm: Norm) -> Tensor:
    """Return images moved into the ball and the box, with the reference's order of rounding."""
    if norm == "linf":
        return torch.min(torch.max(images, clean - eps), clean + eps).clamp(0, 1)
    delta = images - clean
    length = lengths(delta, norm)
    inside = (clean + delta / (length + TINY) * length.clamp_max(eps)).clamp(0, 1)
    return just_inside(inside, clean, eps)
