"""Attacks that look for the nearest wrong image: one run without a budget answers for every budget."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from robustlab.core.attack import Norm, round_nearest
from robustlab.core.errors import RangeError
from robustlab.core.registry import ATTACKS
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch, Task

from .base import Search, attacking
from .losses import attack_loss, margin, minus_margin
from .oracle import Oracle
from .steps import TINY, direction, lengths

SLACK = 1e-6
"""By how much a distance may exceed a budget that it is meant to equal, as float32 has it."""

_CHECK = 10  # steps between looks at what may be left alone


@dataclass(frozen=True, eq=False)
class MinimalResult:
    """The nearest wrong images that were found.

    Args:
        images: float (N, C, H, W), as they would be stored; the clean ones where none was found or needed.
        distance: float (N,), from the clean image in the attack's norm, on the [0, 1] scale: 0 where the model is wrong
            on the clean image, infinity where no wrong image was found.
        queries: int64 (N,), forward passes spent on each sample.
    """

    images: Tensor
    distance: Tensor
    queries: Tensor

    def curve(self, eps: Sequence[float]) -> Tensor:
        """Return robust accuracy, float64 (K,): the share of samples that are right within each of K budgets.

        Args:
            eps: Budgets on the [0, 1] scale, in any order.
        """
        budgets = torch.tensor(list(eps), dtype=torch.float64, device=self.distance.device)
        beyond: Tensor = self.distance.double()[None] > budgets[:, None] + SLACK
        return beyond.double().mean(1)


@dataclass(frozen=True)
class _Minimal(Search):
    """What both attacks share: how a path is walked, and what is made of it with and without a budget."""

    random: ClassVar[bool] = False
    steps: int = 100
    gamma: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("steps", self.steps, "The authors take 100.")
        if not 0 < self.gamma < 1:
            raise RangeError(type(self).__name__, "gamma between 0 and 1", f"{self.gamma}", "The authors use 0.05.")

    @staticmethod
    @abstractmethod
    def loss(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
        """Return what the path climbs, float (n,)."""

    @abstractmethod
    def move(self, path: Path, value: Tensor, gradient: Tensor, done: float) -> None:
        """Take one step: set the budgets and deltas of a path.

        Args:
            path: Where the samples stand.
            value: float (n,), loss there.
            gradient: float (n, C, H, W), of the loss.
            done: Share of the steps that have been taken, in [0, 1).
        """

    def minimal(self, batch: Batch, ctx: ShiftContext) -> MinimalResult:
        """Look for the nearest wrong image of each sample of a labelled batch, in one run without a budget.

        Where the model is random, distances rest on the passes that found them, and are too small; ``run`` judges anew.

        Args:
            batch: Clean samples with labels, on the model's device.
            ctx: Holds the model, the seed and, for rounding, the image specification; for several labels an image also
                the probabilities at which they are decided.

        Raises:
            ConfigError: No model or no labels.
            ModelError: No gradient reaches the input.
        """
        model = self._checked(batch, ctx, 0.0, None)
        with attacking(model, ctx.seed, batch) as (view, clean):
            oracle = Oracle(
                view,
                clean,
                ctx.spec,
                eps=math.inf,
                norm=self.norm,
                mask=self._mask(clean),
                draws=self.draws,
                thresholds=ctx.thresholds,
            )
            oracle.begin()
            images = clean.images.clone()
            distance = torch.zeros_like(oracle.margin)
            rows = (oracle.margin >= 0).nonzero().squeeze(1)
            if len(rows):
                path = self._walk(oracle, rows, None, within=None)
                images[rows], distance[rows] = path.nearest(images[rows]), path.distance
            return MinimalResult(images=images, distance=distance, queries=oracle.queries)

    @final
    def search(self, oracle: Oracle, rng: SampleRng, rows: Tensor, start: Tensor | None, *, stop: bool) -> None:
        del rng
        self._walk(oracle, rows, start, within=oracle.eps if stop else None).show()

    def _walk(self, oracle: Oracle, rows: Tensor, start: Tensor | None, *, within: float | None) -> Path:
        """Return a walked path; samples found wrong ``within`` a distance are shown to the oracle and left alone."""
        path = Path(oracle, rows, oracle.clean[rows] if start is None else start)
        for step in range(self.steps):
            if within is not None and step and step % _CHECK == 0:
                path.drop(within)
            if not len(path.rows):
                return path
            value, gradient, logits = oracle.slope(path.here(), path.rows, self.loss)
            path.note(logits)
            self.move(path, value, gradient, step / self.steps)
        path.note(oracle.ask(path.here(), path.rows))
        return path


class Path:
    """Where a walk stands; one row for each sample that is still searched.

    Args:
        oracle: The model on the batch.
        rows: int64 (n,), places in the batch.
        first: float (n, C, H, W), where it begins.

    Attributes:
        delta: float (n, C, H, W), from the clean images.
        budget: float (n, 1, 1, 1), length within which the walk now is; infinity at first.
        wrong: bool (n,), whether the model was wrong at the last point.
        distance: float (n,), of the nearest wrong point so far; infinity without one.
        widest: float (n, 1, 1, 1), distance to the farthest corner of the box.
    """

    def __init__(self, oracle: Oracle, rows: Tensor, first: Tensor) -> None:
        clean = oracle.clean[rows]
        self.oracle = oracle
        self.rows = rows
        self.clean = clean
        self.delta = first - clean
        self.widest = lengths(torch.maximum(clean, 1 - clean), oracle.norm)
        self.budget = torch.full_like(self.widest, torch.inf)
        self.distance = torch.full_like(self.widest.flatten(), torch.inf)
        self.wrong = torch.zeros_like(self.distance, dtype=torch.bool)
        self.best = clean

    def here(self) -> Tensor:
        """Return the points that the samples are at, as they would be stored.

        Rounded to the nearest value: rounding toward the clean image, as in a ball, would lengthen the way.
        """
        return round_nearest(self.clean + self.delta, self.oracle.spec)

    def note(self, logits: Tensor) -> None:
        """Keep what the model answered at these points."""
        oracle, here = self.oracle, self.here()
        self.wrong = margin(logits, oracle.labels[self.rows], oracle.model.task) < 0
        length = lengths(here - self.clean, oracle.norm).flatten()
        nearer = self.wrong & (length < self.distance)
        self.distance = torch.where(nearer, length, self.distance)
        self.best = torch.where(nearer.view(-1, 1, 1, 1), here, self.best)

    def step_to(self, delta: Tensor) -> None:
        """Go to clean + ``delta``, moved into the box."""
        self.delta = (self.clean + delta).clamp(0, 1) - self.clean

    def nearest(self, otherwise: Tensor) -> Tensor:
        """Return the nearest wrong points, and ``otherwise`` where there are none."""
        return torch.where(torch.isfinite(self.distance).view(-1, 1, 1, 1), self.best, otherwise)

    def show(self) -> None:
        """Let the oracle look at the nearest wrong points, and at where their directions leave the ball.

        Points outside the ball are moved into it first. Where no wrong point was found the last one stands for it.
        """
        oracle, rows = self.oracle, self.rows
        if not len(rows):
            return
        points = self.nearest(self.here())
        inside = (self.distance <= oracle.eps).view(-1, 1, 1, 1)
        oracle.forward(torch.where(inside, points, oracle.project(points, rows)), rows)
        change = points - self.clean
        farther = self.clean + change * (oracle.eps / lengths(change, oracle.norm).clamp_min(TINY))
        oracle.forward(oracle.project(farther, rows), rows)

    def drop(self, within: float) -> None:
        """Show the oracle the wrong points that are ``within`` a distance, and leave their samples alone."""
        left = self.distance > within
        keep = left.nonzero().squeeze(1)
        if len(keep) == len(self.rows):
            return
        done = (~left).nonzero().squeeze(1)
        self.oracle.forward(self.best[done], self.rows[done])
        for name in ("rows", "clean", "delta", "widest", "budget", "distance", "wrong", "best"):
            setattr(self, name, getattr(self, name)[keep])


@ATTACKS.register("ddn")
@dataclass(frozen=True)
class DDN(_Minimal):
    """Decoupled direction and norm: the nearest wrong image in L2, by unit gradient steps on a sphere that shrinks.

    After a step delta <- delta + a g / |g|_2, with a falling from 1 to 0.01 along a cosine, delta is scaled to a length
    that is multiplied by 1 - ``gamma`` where the model is wrong and by 1 + ``gamma`` where it is right. The loss is the
    cross-entropy, which heads for the nearest wrong class only where the model is confident; ``FMN`` always does. With
    a budget, the nearest wrong image counts where it lies inside the ball.

    Args:
        steps: Gradient steps.
        gamma: Relative change of the length in one step.
        first: Length before the first step, on the [0, 1] scale. Distances far below a twentieth of it are not found to
            the last percent in 100 steps.

    References:
        J. Rony, L. G. Hafemann, L. S. Oliveira, I. Ben Ayed, R. Sabourin, E. Granger, "Decoupling direction and norm
        for efficient gradient-based L2 adversarial attacks and defenses", 2019, 1811.09600.
    """

    norms: ClassVar[tuple[Norm, ...]] = ("l2",)
    norm: Norm = "l2"
    eps: tuple[float, ...] = (0.25, 0.5, 1.0)
    first: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.first > 0:
            raise RangeError("DDN", "a positive first length", f"{self.first}", "The authors use 1.")

    @staticmethod
    def loss(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
        return attack_loss(logits, labels, task)

    def move(self, path: Path, value: Tensor, gradient: Tensor, done: float) -> None:
        del value
        delta = path.delta + _falling(1.0, 0.01, done) * direction(gradient, "l2")
        budget = torch.where(torch.isinf(path.budget), self.first, path.budget)
        change = torch.where(path.wrong, 1 - self.gamma, 1 + self.gamma).view(-1, 1, 1, 1)
        path.budget = torch.minimum(budget * change, path.widest)
        path.step_to(delta * (path.budget / lengths(delta, "l2").clamp_min(TINY)))


@ATTACKS.register("fmn")
@dataclass(frozen=True)
class FMN(_Minimal):
    """Fast minimum-norm: the nearest wrong image in L-infinity or L2, by gradient steps in a ball that adapts.

    The margin falls along delta <- delta - a g / |g|_2, with a from 1 to 0.01 along a cosine; delta is then projected
    on a ball. Until a wrong image is found its radius is |delta| + m / |g|_q, the distance to the boundary if the model
    were linear (m the margin, q the dual norm), or (1 + gamma) |delta| if that is more. From then on the radius is
    multiplied by 1 - gamma where the model is wrong, and is at most the smallest distance found, and by 1 + gamma where
    the model is right; gamma falls along a cosine to 0.001. With a budget, the nearest wrong image counts where it lies
    inside the ball.

    Args:
        steps: Gradient steps.
        gamma: Relative change of the radius in the first step.

    References:
        M. Pintor, F. Roli, W. Brendel, B. Biggio, "Fast minimum-norm adversarial attacks through adaptive norm
        constraints", 2021, 2102.12827.
    """

    @staticmethod
    def loss(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
        return minus_margin(logits, labels, task)

    def move(self, path: Path, value: Tensor, gradient: Tensor, done: float) -> None:
        norm = path.oracle.norm
        gamma = _falling(self.gamma, min(self.gamma, 0.001), done)
        flat = gradient.flatten(1)
        dual = flat.abs().sum(1) if norm == "linf" else flat.norm(dim=1)
        away = torch.nan_to_num(value.abs() / dual.clamp_min(TINY), nan=0.0).view(-1, 1, 1, 1)
        found, nearest = (values.view(-1, 1, 1, 1) for values in (torch.isfinite(path.distance), path.distance))
        smaller = torch.minimum(path.budget * (1 - gamma), nearest)
        length = lengths(path.delta, norm)
        # the first step may end on the boundary itself, from where |delta| + m / |g| leads nowhere
        unknown = torch.maximum(length + away, length * (1 + gamma))
        larger = torch.where(found, path.budget * (1 + gamma), unknown)
        budget = torch.where(path.wrong.view(-1, 1, 1, 1), smaller, larger)
        path.budget = torch.minimum(budget, path.widest)
        delta = path.delta + _falling(1.0, 0.01, done) * direction(gradient, "l2")
        if norm == "linf":
            path.step_to(delta.clamp(-path.budget, path.budget))
        else:
            path.step_to(delta * (path.budget / lengths(delta, norm).clamp_min(TINY)).clamp_max(1.0))


def _falling(first: float, last: float, done: float) -> float:
    """Return a value on the half cosine from ``first`` to ``last``."""
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2
