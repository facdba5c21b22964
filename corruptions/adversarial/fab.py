"""FAB, the fast adaptive boundary attack: the nearest point behind a decision boundary, in L-infinity and L2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustlab.core.attack import Norm
from robustlab.core.errors import RangeError
from robustlab.core.registry import ATTACKS
from robustlab.core.rng import SampleRng
from robustlab.core.types import Task

from .apgd import aims
from .base import Search
from .losses import margin, signed
from .oracle import Oracle
from .steps import TINY, lengths, surface_start

_LEAST = 1e-8  # distances below it count as equal when two of them are weighed against each other
_WAIT = 10  # steps between looks at what was found, where samples may be dropped
_HALVINGS = 12  # of the last segment: the distance is known to 1 part in 4000
_NEWTON = 14  # steps; few need 8, also where most coordinates use all their room


@ATTACKS.register("fab-t")
@dataclass(frozen=True)
class FAB(Search):
    """Targeted FAB: for each of the likeliest wrong classes the nearest point that the model gets wrong.

    The lead of the target, z_t - z_y, is taken for linear around the iterate x_t. With d1 and d2 the shortest moves of
    x_t and of the clean image x_0 to the plane where it is 0, inside [0, 1], and
    a = min(|d1| / (|d1| + |d2|), ``alpha_max``), the next iterate is

        clip((1 - a) (x_t + ``eta`` d1) + a (x_0 + ``eta`` d2)).

    If it is wrong, no matter how, it is kept where it is the nearest so far, and the search goes on from
    x_0 + ``beta`` (x - x_0). The search does not know the budget: it is over at the nearest point, which is then drawn
    towards the clean image by halving the segment between them. That point counts if it lies in the ball. Just behind
    the boundary its margin is nearly 0, so the model is also asked about the place where the line from the clean image
    through it leaves the ball, and the smaller margin is kept.

    The first restart begins at the clean image, so that with one restart the seed does not matter; others begin at
    random points at a distance of eps / 2. For several labels an image the targets are labels, as in ``TargetedAPGD``.
    Where images have a bit depth, distances are those of the stored images.

    Args:
        steps: Steps of each run, of two forward passes and one backward pass.
        restarts: Runs for each target.
        targets: Most wrong classes, or labels, to aim at; all of them where there are fewer.
        alpha_max: Largest weight of the clean image's projection, from 0 to 1.
        eta: Length of a step beyond the plane, 1 or more.
        beta: Share of the way from the clean image that is kept after a success, from 0 to 1.
        refine: Draw the nearest point closer at the end, and look where the ball ends in its direction. The authors'
            code does neither.

    Raises:
        RangeError: Numbers make no sense.

    References:
        F. Croce, M. Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", 2020,
        1907.02044; the targeted form: F. Croce, M. Hein, 2020, 2003.01690.
    """

    random: ClassVar[bool] = False  # with one restart

    steps: int = 100
    restarts: int = 1
    targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    refine: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("steps", self.steps), ("restarts", self.restarts), ("targets", self.targets)):
            self.at_least_one(name, value, "The reference ensemble takes 100 steps, 1 restart and 9 targets.")
        for name, share in (("alpha_max", self.alpha_max), ("beta", self.beta)):
            if not 0 <= share <= 1:
                raise RangeError("FAB", f"{name} from 0 to 1", f"{share}", "The reference uses 0.1 and 0.9.")
        if not self.eta >= 1:
            raise RangeError("FAB", "eta of 1 or more", f"{self.eta}", "The reference uses 1.05.")

    def search(self, oracle: Oracle, rng: SampleRng, rows: Tensor, start: Tensor | None, *, stop: bool) -> None:
        for place, restart, left, targets in aims(oracle, rows, self.targets, self.restarts, stop=stop):
            if start is not None and place == restart == 0:
                first = start
            else:
                first = _start(oracle, left, rng.child(place).child(restart) if restart else None)
            Approach(oracle, left, first, targets, self, stop=stop).run()


def _start(oracle: Oracle, rows: Tensor, rng: SampleRng | None) -> Tensor:
    """Return the clean images, or with random numbers points at a distance of eps / 2, inside mask and box."""
    clean = oracle.clean[rows]
    if rng is None:
        return clean
    return oracle.project(surface_start(rng.select(rows), clean, oracle.eps / 2, oracle.norm), rows)


class Approach:
    """One run of FAB; one row of state for each sample that is still searched.

    Args:
        oracle: The model on the batch.
        rows: int64 (n,), places in the batch.
        first: float (n, C, H, W), where the run starts.
        targets: int64 (n,), classes (or labels) to aim at.
        attack: Holds the parameters.
        stop: Drop samples on the way once they are wrong inside the ball.

    Attributes:
        nearest: float (n, C, H, W), the nearest wrong images found, inside the ball or not.
        distance: float (n, 1, 1, 1), their distance from the clean images, infinity where none was found.
    """

    def __init__(
        self, oracle: Oracle, rows: Tensor, first: Tensor, targets: Tensor, attack: FAB, *, stop: bool
    ) -> None:
        self.oracle = oracle
        self.rows = rows
        self.images = first
        self.targets = targets
        self.attack = attack
        self.stop = stop
        self.clean = oracle.clean[rows]
        self.nearest = self.clean
        self.distance = torch.full_like(self.clean[:, :1, :1, :1], torch.inf)

    def run(self) -> None:
        """Search, and show the oracle what was found."""
        for step in range(1, self.attack.steps + 1):
            if not len(self.rows):
                return
            self._move()
            self._keep()
            if self.stop and step % _WAIT == 0:
                self._drop()
        if self.attack.refine:
            self.shorten()
        # where nothing was found, the last place is the best guess
        points = torch.where(torch.isfinite(self.distance), self.nearest, self.images)
        self._show(points, self.rows)

    def shorten(self) -> None:
        """Halve the segment from the clean images to the nearest wrong ones, and keep the nearest wrong end."""
        way = self.nearest - self.clean
        right, wrong = torch.zeros_like(self.distance), torch.ones_like(self.distance)
        for _ in range(_HALVINGS):
            share = (right + wrong) / 2
            images = self.oracle.stored(self.clean + share * way, self.rows)
            fooled = self._fooled(images)
            right, wrong = torch.where(fooled, right, share), torch.where(fooled, share, wrong)
            self._keep_nearer(images, fooled)

    def _move(self) -> None:
        value, slope, _ = self.oracle.slope(self.images, self.rows, self._lead)
        value = torch.where(torch.isfinite(value), value, 0.0).to(slope.dtype)
        there = value + (slope * (self.clean - self.images)).flatten(1).sum(1)
        norm = self.oracle.norm
        moves = to_plane(
            torch.cat((self.images, self.clean)), torch.cat((slope, slope)), torch.cat((value, there)), norm
        )
        onward, back = moves.chunk(2)
        near, far = lengths(moves, norm).clamp_min(_LEAST).chunk(2)
        share = (near / (near + far)).clamp_max(self.attack.alpha_max)
        eta = self.attack.eta
        self.images = ((self.images + eta * onward) * (1 - share) + (self.clean + eta * back) * share).clamp(0, 1)

    def _lead(self, logits: Tensor, labels: Tensor, task: Task) -> Tensor:
        """How far the target is ahead of the label; above 0 the answer is wrong."""
        if task == "multilabel":
            return -signed(logits, labels).gather(1, self.targets[:, None]).squeeze(1)
        own, aim = (logits.gather(1, which[:, None]).squeeze(1) for which in (labels, self.targets))
        return aim - own

    def _fooled(self, images: Tensor) -> Tensor:
        """Return where images are wrong, bool (n, 1, 1, 1); never where an output is not finite."""
        logits = self.oracle.ask(images, self.rows)
        return (margin(logits, self.oracle.labels[self.rows], self.oracle.model.task) < 0).view(-1, 1, 1, 1)

    def _keep(self) -> None:
        images = self.oracle.stored(self.images, self.rows)
        fooled = self._fooled(images)
        self._keep_nearer(images, fooled)
        back = self.clean + (self.images - self.clean) * self.attack.beta
        self.images = torch.where(fooled, back, self.images)

    def _keep_nearer(self, images: Tensor, fooled: Tensor) -> None:
        length = lengths(images - self.clean, self.oracle.norm)
        nearer = fooled & (length < self.distance)
        self.nearest = torch.where(nearer, images, self.nearest)
        self.distance = torch.where(nearer, length, self.distance)

    def _show(self, points: Tensor, rows: Tensor) -> None:
        """Look at points, moved into the ball, and at the ends of the ball in their directions."""
        oracle, clean = self.oracle, self.oracle.clean[rows]
        way, length = points - clean, lengths(points - clean, oracle.norm)
        if not self.attack.refine:
            # only what the search itself has found inside the ball
            oracle.forward(torch.where(length <= oracle.eps * (1 + 1e-6), points, clean), rows)
            return
        for images in (points, clean + way * (oracle.eps / (length + TINY))):
            oracle.forward(oracle.project(images, rows), rows)

    def _drop(self) -> None:
        near = (self.distance.flatten() <= self.oracle.eps).nonzero().squeeze(1)
        if not len(near):
            return
        self._show(self.nearest[near], self.rows[near])
        left = (~self.oracle.wrong(self.rows)).nonzero().squeeze(1)
        for name in ("rows", "targets", "images", "clean", "nearest", "distance"):
            setattr(self, name, getattr(self, name)[left])


def to_plane(points: Tensor, slope: Tensor, value: Tensor, norm: Norm) -> Tensor:
    """Return the shortest moves inside [0, 1] after which linear functions are 0.

    The move d has the smallest norm with value + <slope, d> = 0 and points + d in [0, 1]. Coordinate i moves against
    the value by min(r s_i, room_i), with s_i = 1 in L-infinity and s_i = |slope_i| in L2, and the rate r solves
    f(r) = sum_i |slope_i| min(r s_i, room_i) = |value|. As f is concave, Newton's method from 0 never goes too far, and
    each of its steps divides the product of f' and what is left of the value by 4 or more, so that a fixed number is
    enough. Where the plane cannot be reached, all rooms are used up.

    Args:
        points: float (N, C, H, W) in [0, 1].
        slope: float (N, C, H, W).
        value: float (N,), of the linear functions at the points.
        norm: Norm of the moves.

    References:
        F. Croce, M. Hein, 2020, 1907.02044, section 2.2, solve the same problem by sorting.
    """
    shape, tiny = points.shape, torch.finfo(points.dtype).tiny
    points, slope = points.flatten(1), slope.flatten(1)
    # squares of tiny gradients would underflow
    scale = slope.abs().amax(1).clamp_min(tiny)
    towards = -(slope / scale[:, None]) * value.sign()[:, None]
    goal = (value / scale).abs()[:, None]
    weight = towards.abs()
    room = torch.where(towards > 0, 1 - points, points) * (weight > 0)
    pace = torch.ones_like(weight) if norm == "linf" else weight
    rate = torch.zeros_like(goal)
    for _ in range(_NEWTON):
        free = pace * rate < room
        gain = (weight * pace * free).sum(1, keepdim=True)
        left = goal - (weight * torch.minimum(pace * rate, room)).sum(1, keepdim=True)
        rate = torch.where(gain > 0, rate + left.clamp_min(0) / gain.clamp_min(tiny), rate)
    reachable = (weight * room).sum(1, keepdim=True) > goal
    step = torch.where(reachable, torch.minimum(pace * rate, room), room)
    return (towards.sign() * step).view(shape)
