"""Ways from noise to a label: all steps with fresh noise, or a few without.

All work on u = y - m, the label around its prior mean, in which the diffusion is an ordinary one: nothing is divided by
the small share of the label that is left at the start.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .schedule import LabelSchedule

Noise = Callable[[Tensor, int], Tensor]
"""What a network takes for the noise in u at a step: from (u, t) to a tensor of the shape of u."""

Draws = Callable[[int], Tensor]
"""Standard normal numbers of the shape of u, for the way from step t to t - 1."""


class Sampler(ABC):
    """A way from standard normal u at the last step to u at step 0.

    The label's share at the last step, 0.6 %, is taken for nothing. Fresh noise forgets that; without it, a prior mean
    far outside the simplex makes classes up to 0.01 more or less likely.

    Attributes:
        random: It draws more than the start.
    """

    random: ClassVar[bool] = False

    @abstractmethod
    def sample(self, noise: Noise, start: Tensor, schedule: LabelSchedule, draws: Draws) -> Tensor:
        """Return u_0.

        Args:
            noise: Estimates the noise in u at a step.
            start: u at the last step, standard normal, float (..., A).
            schedule: The diffusion.
            draws: Normal numbers of the shape of ``start``; called once a step, by samplers that are ``random``.
        """

    @abstractmethod
    def evaluations(self, schedule: LabelSchedule) -> int:
        """Return how often the network is asked."""


def _label(u: Tensor, noise: Tensor, schedule: LabelSchedule, step: int) -> Tensor:
    """Return the estimate of u_0."""
    return (u - math.sqrt(schedule.lost[step]) * noise) / math.sqrt(schedule.kept[step])


@dataclass(frozen=True)
class Ancestral(Sampler):
    """Every step of the diffusion backwards, with fresh noise of the posterior's variance; the last without.

    References:
        Ho, Jain, Abbeel, Denoising diffusion probabilistic models, 2020, arXiv:2006.11239.
    """

    random: ClassVar[bool] = True

    def sample(self, noise: Noise, start: Tensor, schedule: LabelSchedule, draws: Draws) -> Tensor:
        u = start
        for step in range(schedule.steps, 1, -1):
            beta, spread = float(schedule.beta[step]), math.sqrt(schedule.posterior(step)[3])
            found = beta / math.sqrt(schedule.lost[step]) * noise(u, step)
            u = (u - found) / math.sqrt(1 - beta) + spread * draws(step)
        return _label(u, noise(u, 1), schedule, 1)

    def evaluations(self, schedule: LabelSchedule) -> int:
        return schedule.steps


@dataclass(frozen=True)
class DDIM(Sampler):
    """A few steps without noise, of first order.

    It makes probabilities too extreme: at 10 steps a true 0.7 comes out as 0.722. Take 100 steps or more, or
    ``Multistep``.

    Args:
        steps: Times that the network is asked.

    References:
        Song, Meng, Ermon, Denoising diffusion implicit models, 2021, arXiv:2010.02502.
    """

    steps: int = 100

    def sample(self, noise: Noise, start: Tensor, schedule: LabelSchedule, draws: Draws) -> Tensor:
        del draws
        grid = schedule.grid(self.steps)
        u = start
        for step, after in zip(grid, [*grid[1:], 0], strict=True):
            found = noise(u, step)
            label = _label(u, found, schedule, step)
            u = math.sqrt(schedule.kept[after]) * label + math.sqrt(schedule.lost[after]) * found
        return u

    def evaluations(self, schedule: LabelSchedule) -> int:
        return self.steps


@dataclass(frozen=True)
class Multistep(Sampler):
    """A few steps without noise, of second order: each also uses the estimate of the one before.

    Args:
        steps: Times that the network is asked.

    References:
        Lu, Zhou, Bao, Chen, Li, Zhu, DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models,
        2022, arXiv:2211.01095.
    """

    steps: int = 20

    def sample(self, noise: Noise, start: Tensor, schedule: LabelSchedule, draws: Draws) -> Tensor:
        del draws
        grid = schedule.grid(self.steps)
        ratio = schedule.half_log_snr
        u, before, width_before = start, start, 0.0
        for place, step in enumerate(grid):
            label = _label(u, noise(u, step), schedule, step)
            if place == len(grid) - 1:
                return label
            after = grid[place + 1]
            width = float(ratio[after] - ratio[step])
            ahead = label
            if place > 0:
                weight = 0.5 * width / width_before
                ahead = (1 + weight) * label - weight * before
            shrink = math.sqrt(schedule.lost[after] / schedule.lost[step])
            u = shrink * u - math.sqrt(schedule.kept[after]) * math.expm1(-width) * ahead
            before, width_before = label, width
        return u

    def evaluations(self, schedule: LabelSchedule) -> int:
        return self.steps
