"""Diffusion over the label: how much of it is left, and how much noise there is, after each step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustlab.core.errors import RangeError


@dataclass(frozen=True)
class LabelSchedule:
    """A linear schedule of noise for one-hot labels that drift towards a prior mean.

    With m the prior mean, y_t = sqrt(a_t) y_0 + (1 - sqrt(a_t)) m + sqrt(1 - a_t) e with e standard normal, where a_t,
    here ``kept``, is the product of 1 - beta up to step t. Steps are counted from 1 to ``steps``; 0 is the label.

    Args:
        steps: Steps of the whole diffusion.
        first: beta of step 1.
        last: beta of the last step.

    Raises:
        RangeError: Numbers make no sense.

    References:
        Han, Zheng, Zhou, CARD: classification and regression diffusion models, 2022, arXiv:2206.07275; Shen, Huang,
        Nichyporuk, Arbel 2025, arXiv:2310.15952.
    """

    steps: int = 1000
    first: float = 1e-4
    last: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 2 or not 0 < self.first <= self.last < 1:
            got = f"steps={self.steps}, first={self.first}, last={self.last}"
            raise RangeError("LabelSchedule", "2 steps or more, 0 < first <= last < 1", got, "Leave out the defaults.")

    @cached_property
    def beta(self) -> NDArray[np.float64]:
        """Noise added at each step, float64 (T + 1,); 0 at step 0."""
        return np.concatenate(([0.0], np.linspace(self.first, self.last, self.steps)))

    @cached_property
    def kept(self) -> NDArray[np.float64]:
        """Share of the label's square that is left, float64 (T + 1,); 1 at step 0."""
        kept: NDArray[np.float64] = np.exp(np.cumsum(np.log1p(-self.beta)))
        return kept

    @cached_property
    def lost(self) -> NDArray[np.float64]:
        """Variance of the noise, 1 - ``kept`` with all its digits, float64 (T + 1,); 0 at step 0."""
        lost: NDArray[np.float64] = -np.expm1(np.cumsum(np.log1p(-self.beta)))
        return lost

    @cached_property
    def half_log_snr(self) -> NDArray[np.float64]:
        """Half the log of the ratio of label to noise, float64 (T + 1,); infinite at step 0."""
        with np.errstate(divide="ignore"):
            found: NDArray[np.float64] = 0.5 * np.log(self.kept / self.lost)
        return found

    def posterior(self, step: int) -> tuple[float, float, float, float]:
        """Return (A, B, C, variance): y_{t-1} given y_t and y_0 has the mean A y_t + B y_0 + C m.

        Args:
            step: t, from 1 to ``steps``.

        Raises:
            RangeError: There is no such step.
        """
        self.check(step)
        if step == 1:
            return 0.0, 1.0, 0.0, 0.0
        beta, lost, lost_before = self.beta[step], self.lost[step], self.lost[step - 1]
        from_now = np.sqrt(1 - beta) * lost_before / lost
        from_label = beta * np.sqrt(self.kept[step - 1]) / lost
        return float(from_now), float(from_label), float(1 - from_now - from_label), float(beta * lost_before / lost)

    def noisy(self, labels: Tensor, mean: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        """Return y_t.

        Args:
            labels: y_0, float (N, ..., A).
            mean: m, of the same shape.
            steps: int64 (N,) from 1 to ``steps``.
            noise: e, of the same shape.
        """
        signal, spread = self.scales(steps, labels)
        return signal * labels + (1 - signal) * mean + spread * noise

    def scales(self, steps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(a_t) and sqrt(1 - a_t), shaped to be multiplied with ``like`` (N, ..., A)."""
        shape = (-1, *[1] * (like.ndim - 1))
        steps = steps.to(like.device)
        kept, lost = (torch.from_numpy(values).to(like.device)[steps] for values in (self.kept, self.lost))
        return kept.sqrt().to(like.dtype).view(shape), lost.sqrt().to(like.dtype).view(shape)

    def check(self, step: int) -> None:
        """Raise if there is no such step.

        Raises:
            RangeError: It is below 1 or above ``steps``.
        """
        if not 1 <= step <= self.steps:
            raise RangeError("LabelSchedule", f"a step from 1 to {self.steps}", f"{step}", "Steps count from 1.")

    def grid(self, count: int) -> list[int]:
        """Return ``count`` steps from the last to the first, as even as whole numbers allow.

        Raises:
            RangeError: ``count`` is below 2 or above ``steps``.
        """
        if not 2 <= count <= self.steps:
            raise RangeError("LabelSchedule", f"2 to {self.steps} steps", f"{count}", "20 are usual.")
        return [int(step) for step in np.rint(np.linspace(self.steps, 1, count))]
