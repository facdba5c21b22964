"""Layers of several members at once: one matrix product for all, each with parameters of its own."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """A linear layer for each member.

    Args:
        members: K.
        inputs: Features that come in.
        outputs: Features that go out.
    """

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)  # as torch.nn.Linear
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Return (K, n, outputs).

        Args:
            x: float (K, n, inputs), or (n, inputs) that all members share.
        """
        return torch.baddbmm(self.bias, x.expand(len(self.weight), *x.shape[-2:]), self.weight)


class StackedNorm(nn.Module):
    """Batch normalisation of each member's features over the rows, with running statistics.

    Args:
        members: K.
        width: Features.
    """

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.shape = members, width
        self.norm = nn.BatchNorm1d(members * width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (K, n, width) of the same shape."""
        rows = x.transpose(0, 1)
        return self.norm(rows.flatten(1)).view(rows.shape).transpose(0, 1)  # type: ignore[no-any-return]

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return (scale, shift), both (K, 1, width): what it does in eval mode."""
        norm = self.norm
        assert norm.running_mean is not None  # noqa: S101 - made with statistics, for the type checkers
        assert norm.running_var is not None  # noqa: S101
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        members, width = self.shape
        return scale.view(members, 1, width), shift.view(members, 1, width)


class FlatEmbedding(nn.Module):
    """The image as one vector through three normalised linear layers for each member, as in the released code.

    Args:
        members: K.
        pixels: Channels x height x width.
        width: H.
    """

    def __init__(self, members: int, pixels: int, width: int) -> None:
        super().__init__()
        self.pixels = pixels
        sizes = (pixels, width, width, width)
        self.layers = nn.ModuleList(StackedLinear(members, a, b) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(StackedNorm(members, width) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        """Return (K, B, H).

        Args:
            images: float (B, C, height, width).
        """
        x = images.flatten(1)
        for place, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = norm(layer(x))
            if place < 2:
                x = F.softplus(x)
        return x


class GatedTrunk(nn.Module):
    """What a label diffusion asks: the noisy label and the guess, gated by the step and by the image.

    Three hidden layers of H units. Each is multiplied, unit by unit, by learned numbers of the step, and the first by
    the embedding of the image. Parameters are those of the released code, one set a member.

    Args:
        members: K.
        classes: A.
        width: H.
        steps: Steps of the diffusion.

    References:
        Han, Zheng, Zhou 2022, arXiv:2206.07275; Shen, Huang, Nichyporuk, Arbel 2025, arXiv:2310.15952.
    """

    def __init__(self, members: int, classes: int, width: int, steps: int) -> None:
        super().__init__()
        self.members, self.classes, self.width = members, classes, width
        self.first = StackedLinear(members, 2 * classes, width)
        self.second = StackedLinear(members, width, width)
        self.third = StackedLinear(members, width, width)
        self.last = StackedLinear(members, width, classes)
        self.gates = nn.ParameterList(nn.Parameter(torch.empty(steps, members, width).uniform_()) for _ in range(3))
        self.norms = nn.ModuleList(StackedNorm(members, width) for _ in range(3))

    def forward(self, y: Tensor, guess: Tensor, image: Tensor, steps: Tensor) -> Tensor:
        """Return float (K, n, A).

        Args:
            y: Noisy labels, float (K, n, A).
            guess: What the latent says of the classes, float (K, n, A).
            image: Embeddings of the images, float (K, n, H).
            steps: int64 (n,), from 1.
        """
        gates = [gate[steps - 1].transpose(0, 1) for gate in self.gates]
        h = F.softplus(self.norms[0](gates[0] * self.first(torch.cat((y, guess), -1))))
        h = F.softplus(self.norms[1](gates[1] * self.second(image * h)))
        h = F.softplus(self.norms[2](gates[2] * self.third(h)))
        out: Tensor = self.last(h)
        return out

    def folded(self, guess: Tensor, mean: Tensor, image: Tensor, dtype: torch.dtype | None = None) -> Folded:
        """Return the same in eval mode for one set of images, with all that does not change from step to step done.

        Args:
            guess: float (K, B, A).
            mean: What is added to u to give y, float (K, B, A).
            image: float (K, B, H).
            dtype: Precision of the two large matrix products; that of the parameters if None.
        """
        return Folded(self, guess, mean, image, dtype)


class Folded:
    """See ``GatedTrunk.folded``.

    Normalisation and gates become one factor and one shift a unit and step; guess, prior mean and bias one vector an
    image.
    """

    def __init__(
        self, trunk: GatedTrunk, guess: Tensor, mean: Tensor, image: Tensor, dtype: torch.dtype | None
    ) -> None:
        classes = trunk.classes
        weight = trunk.first.weight
        self.trunk = trunk
        self.image = image[:, :, None]
        self.of_label = weight[:, :classes]
        self.fixed = torch.baddbmm(trunk.first.bias, torch.cat((mean, guess), -1), weight)[:, :, None]
        self.affine = [norm.affine() for norm in trunk.norms if isinstance(norm, StackedNorm)]
        self.dtype = dtype or weight.dtype
        self.large = [layer.weight.to(self.dtype) for layer in (trunk.second, trunk.third)]

    def __call__(self, u: Tensor, step: int) -> Tensor:
        """Return float (K, B, M, A) for labels around their mean, u (K, B, M, A), all at one step."""
        members, images, count, _ = u.shape
        rows = members, images * count, -1
        trunk = self.trunk
        factor, shift = self._at(0, step)
        h = torch.bmm(u.reshape(rows), self.of_label).view(members, images, count, -1) + self.fixed
        h = F.softplus(torch.addcmul(shift[:, None], factor[:, None], h))
        h = (h * self.image).view(rows)
        for place, layer in ((1, trunk.second), (2, trunk.third)):
            factor, shift = self._at(place, step)
            h = torch.bmm(h.to(self.dtype), self.large[place - 1]).to(u.dtype)
            h = F.softplus(torch.addcmul(factor * layer.bias + shift, factor, h))
        return trunk.last(h).view(u.shape)  # type: ignore[no-any-return]

    def _at(self, place: int, step: int) -> tuple[Tensor, Tensor]:
        scale, shift = self.affine[place]
        return scale * self.trunk.gates[place][step - 1][:, None], shift
