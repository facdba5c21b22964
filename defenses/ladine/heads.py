"""Member heads: from an image and a member's latent to draws of the label."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlab.core.errors import ConfigError

from .samplers import Sampler
from .schedule import LabelSchedule
from .stacked import FlatEmbedding, GatedTrunk, StackedLinear

Dialect = Literal["released", "paper"]


@dataclass(frozen=True, eq=False)
class Condition:
    """What members know of a batch of images, worked out once.

    Args:
        latents: Class logits of each member, float (K, B, A).
        guess: What the noise network sees of them, float (K, B, A).
        mean: Prior mean of the label, float (K, B, A).
        image: Embeddings of the images, float (K, B, H); empty for heads that do not look at images.
    """

    latents: Tensor
    guess: Tensor
    mean: Tensor
    image: Tensor

    def select(self, rows: Tensor) -> Condition:
        """Return the images at ``rows``, int64 (n,)."""
        return Condition(*(value[:, rows] for value in (self.latents, self.guess, self.mean, self.image)))


Draw = Callable[[str], Tensor]
"""Standard normal numbers (K, B, M, A) by the name of the draw."""


class Heads(nn.Module, ABC):
    """The heads of all members.

    Attributes:
        learns: There is something to train.
    """

    learns: ClassVar[bool] = True

    @abstractmethod
    def condition(self, images: Tensor, latents: Tensor) -> Condition:
        """Return what is known of images, once for all steps and draws.

        Args:
            images: float (B, C, height, width) in [0, 1].
            latents: Class logits of each member, float (K, B, A).
        """

    @abstractmethod
    def loss(self, condition: Condition, labels: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of each member, float (K,), a mean over the batch.

        Args:
            condition: Of the batch.
            labels: int64 (B,).
            steps: Steps of the diffusion, int64 (B,), from 1.
            noise: Standard normal, float (K, B, A).
        """

    @abstractmethod
    def sample(self, condition: Condition, sampler: Sampler, draw: Draw) -> Tensor:
        """Return label vectors, float (K, B, M, A)."""


def _known(dialect: str) -> None:
    if dialect not in get_args(Dialect):
        raise ConfigError("dialect", "'released' or 'paper'", repr(dialect), "The released code is the default.")


class _Diffusion(Heads):
    """A diffusion over the label for each member.

    Args:
        members: K.
        classes: A.
        pixels: Channels x height x width of the images.
        width: Hidden units H; 4096 in the paper, far fewer do for few classes.
        schedule: The diffusion.
        dialect: ``"released"``: the prior mean is softmax(z), the noise network sees softmax(z). ``"paper"``: the mean
            is z plus a linear map of the image's embedding, which starts at 0, and the network sees z.
        dtype: Precision of the large matrix products when sampling; that of the parameters if None.
    """

    def __init__(
        self,
        members: int,
        classes: int,
        pixels: int,
        *,
        width: int = 256,
        schedule: LabelSchedule | None = None,
        dialect: Dialect = "released",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _known(dialect)
        self.schedule = schedule or LabelSchedule()
        self.dialect: Dialect = dialect
        self.dtype = dtype
        self.embedding = FlatEmbedding(members, pixels, width)
        self.trunk = GatedTrunk(members, classes, width, self.schedule.steps)
        self.to_mean: StackedLinear | None = None
        if dialect == "paper":
            self.to_mean = StackedLinear(members, width, classes)
            nn.init.zeros_(self.to_mean.weight)
            nn.init.zeros_(self.to_mean.bias)

    def condition(self, images: Tensor, latents: Tensor) -> Condition:
        image = self.embedding(images)
        if self.to_mean is None:
            guess = latents.softmax(-1)
            return Condition(latents, guess, guess, image)
        return Condition(latents, latents, latents + self.to_mean(image), image)

    def sample(self, condition: Condition, sampler: Sampler, draw: Draw) -> Tensor:
        folded = self.trunk.folded(condition.guess, condition.mean, condition.image, self.dtype)
        mean = condition.mean[:, :, None]
        noise = self._noise(folded, mean)
        u = sampler.sample(noise, draw("start"), self.schedule, lambda step: draw(f"step {step}"))
        return u + mean

    def _noisy(self, condition: Condition, labels: Tensor, steps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return (y_t, what the trunk makes of it), float (K, B, A)."""
        one_hot = F.one_hot(labels, noise.shape[-1]).to(noise)[:, None]
        rows = self.schedule.noisy(one_hot, condition.mean.transpose(0, 1), steps, noise.transpose(0, 1))
        y = rows.transpose(0, 1)
        return y, self.trunk(y, condition.guess, condition.image, steps)

    @abstractmethod
    def _noise(self, folded: Callable[[Tensor, int], Tensor], mean: Tensor) -> Callable[[Tensor, int], Tensor]:
        """Return the estimate of the noise in u."""


class EpsHeads(_Diffusion):
    """Diffusions whose network estimates the noise, as in the paper and its code; arguments as ``_Diffusion``.

    References:
        Shen, Huang, Nichyporuk, Arbel, Improving robustness and reliability in medical image classification with
        latent-guided diffusion and nested-ensembles, 2025, arXiv:2310.15952.
    """

    def loss(self, condition: Condition, labels: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        _, found = self._noisy(condition, labels, steps, noise)
        return (noise - found).square().mean((1, 2))

    def _noise(self, folded: Callable[[Tensor, int], Tensor], mean: Tensor) -> Callable[[Tensor, int], Tensor]:
        del mean
        return folded


class BayesSkipHeads(_Diffusion):
    """Diffusions whose network estimates the logits of the classes; what the noisy label says of them is added exactly.

    For one-hot labels the best estimate of the label is softmax(log p(class | x) + sqrt(a) (y - (1 - sqrt(a)) m) /
    (1 - a)): only the first term has to be learned, by cross-entropy. Own design; arguments as ``_Diffusion``.
    """

    def loss(self, condition: Condition, labels: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        y, logits = self._noisy(condition, labels, steps, noise)
        signal, spread = self.schedule.scales(steps, y.transpose(0, 1))
        signal, spread = signal.transpose(0, 1), spread.transpose(0, 1)
        whole = logits + signal / spread.square() * (y - (1 - signal) * condition.mean)
        classes = whole.shape[-1]
        each = F.cross_entropy(whole.reshape(-1, classes), labels.repeat(len(whole)), reduction="none")
        return each.view(len(whole), -1).mean(1)

    def _noise(self, folded: Callable[[Tensor, int], Tensor], mean: Tensor) -> Callable[[Tensor, int], Tensor]:
        def noise(u: Tensor, step: int) -> Tensor:
            signal, lost = math.sqrt(self.schedule.kept[step]), float(self.schedule.lost[step])
            label = (folded(u, step) + signal / lost * (u + signal * mean)).softmax(-1) - mean
            return (u - signal * label) / math.sqrt(lost)

        return noise


class SoftmaxHeads(Heads):
    """No diffusion: every draw is softmax(z), the mean of the mapping networks (the paper's ablation 1)."""

    learns: ClassVar[bool] = False

    def condition(self, images: Tensor, latents: Tensor) -> Condition:
        del images
        guess = latents.softmax(-1)
        return Condition(latents, guess, guess, latents[..., :0])

    def loss(self, condition: Condition, labels: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        del labels, steps, noise
        return condition.latents.new_zeros(len(condition.latents))

    def sample(self, condition: Condition, sampler: Sampler, draw: Draw) -> Tensor:
        del sampler
        return condition.guess[:, :, None].expand_as(draw("start"))


class GaussianHeads(Heads):
    """A Gaussian over the label vector for each member, its mean and variance made of the latent (ablation 2).

    Args:
        members: K.
        classes: A.
        width: Hidden units.
    """

    def __init__(self, members: int, classes: int, *, width: int = 256) -> None:
        super().__init__()
        self.hidden = StackedLinear(members, classes, width)
        self.mean, self.log_variance = (StackedLinear(members, width, classes) for _ in range(2))

    def condition(self, images: Tensor, latents: Tensor) -> Condition:
        del images
        hidden = F.relu(self.hidden(latents))
        # between e^-10 and e^5, so that a draw is always a number
        return Condition(latents, self.log_variance(hidden).clamp(-10, 5), self.mean(hidden), latents[..., :0])

    def loss(self, condition: Condition, labels: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        """Return minus the log density, in nats and without its constant."""
        del steps, noise
        one_hot = F.one_hot(labels, condition.mean.shape[-1]).to(condition.mean)
        off = (one_hot - condition.mean).square() / condition.guess.exp()
        return 0.5 * (off + condition.guess).sum(-1).mean(1)

    def sample(self, condition: Condition, sampler: Sampler, draw: Draw) -> Tensor:
        del sampler
        return condition.mean[:, :, None] + (0.5 * condition.guess).exp()[:, :, None] * draw("start")
