"""Attacks on the few parameters of changes that scanners, displays and laboratories make, without an Lp ball."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, final

import torch
from torch import Tensor

from corruptions.staining import _FLOOR, _TISSUE, _UNMIX, STAINS, _log_blank
from robustlab.core.attack import Norm
from robustlab.core.errors import ConfigError, RangeError, ShapeError
from robustlab.core.registry import ATTACKS
from robustlab.core.rng import SampleRng
from robustlab.core.shift import to_bytes
from robustlab.core.types import ImageSpec, modality_tag

from .base import Search
from .losses import attack_loss
from .oracle import Oracle
from .steps import TINY

_FIRST_STEP = 0.5  # of the way from no change to the bound
_OFFSET = 0.1  # natural-log optical density at a budget of 1, as in the levels of stain-shift
_CELLS = 16  # points along each side at which the bound of a smooth field is enforced
_ROUNDS = 20


@dataclass(frozen=True)
class ParameterAttack(Search):
    """A change of the whole image by few parameters, searched on a coarse grid and then by gradient steps.

    Parameters are searched as numbers of which 0 changes nothing and 1 is the bound. The grid is looked at without
    gradients; from its best point, or from no change, gradient steps go on whose length falls linearly to 0. The best
    image is kept, with its parameters in ``AttackResult.parameters``. Nothing is random. Images are rounded to the
    nearest stored value, as there is no ball to stay in.

    Args:
        steps: Gradient steps after the grid.
    """

    random: ClassVar[bool] = False
    norms: ClassVar[tuple[Norm, ...]] = ("parameters",)
    unit: ClassVar[str]
    norm: Norm = "parameters"
    eps: tuple[float, ...] = (0.05, 0.1, 0.2)
    steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("steps", self.steps, "20 follow the grid by default.")

    @abstractmethod
    def grid(self) -> Tensor:
        """Return what is looked at first, float (M, K), inside the bounds."""

    @abstractmethod
    def named(self, values: Tensor, eps: float) -> dict[str, Tensor]:
        """Return parameters, float (N, ...) by name, for numbers (N, K) in units of their bounds."""

    @abstractmethod
    def render(self, images: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return changed images (N, C, H, W), which may leave [0, 1]; differentiable in the parameters."""

    def inside(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Return numbers (N, K) moved inside the bounds, for images of ``size`` (height, width)."""
        del size
        return values.clamp(-1, 1)

    def direction(self, slope: Tensor) -> Tensor:
        """Return the direction of a step, (N, K), for the gradient of the loss."""
        return slope.sign()

    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        return {"eps": (self.eps_at(severity), self.unit)}

    @final
    def search(self, oracle: Oracle, rng: SampleRng, rows: Tensor, start: Tensor | None, *, stop: bool) -> None:
        del rng
        if start is not None:
            hint = "It searches parameters, and an image says nothing about them."
            raise ConfigError(type(self).__name__, "start=None", "images", hint)
        grid = self.grid().to(oracle.clean)
        best = grid.new_zeros(len(oracle.clean), grid.shape[1])
        for point in grid:
            self._look(oracle, rows, point.expand(len(rows), -1), best)
        if stop:
            rows = oracle.open(rows)
        if len(rows):
            self._climb(oracle, rows, best)
        oracle.parameters = self.named(best, oracle.eps)

    def _climb(self, oracle: Oracle, rows: Tensor, best: Tensor) -> None:
        height, width = oracle.clean.shape[2:]
        values = best[rows]
        for step in range(self.steps):
            values = values.requires_grad_(True)
            images = self._images(oracle, rows, values)
            before = oracle.margin[rows]
            _, gradient = oracle.gradient(images.detach(), rows, attack_loss)
            (slope,) = torch.autograd.grad(images, values, gradient)
            values = values.detach()
            _keep(oracle, rows, values, before, best)
            size = _FIRST_STEP * (1 - step / self.steps)
            values = self.inside(values + size * self.direction(slope), (height, width))
        self._look(oracle, rows, values, best)

    def _images(self, oracle: Oracle, rows: Tensor, values: Tensor) -> Tensor:
        return oracle.project(self.render(oracle.clean[rows], self.named(values, oracle.eps)), rows)

    def _look(self, oracle: Oracle, rows: Tensor, values: Tensor, best: Tensor) -> None:
        before = oracle.margin[rows]
        oracle.forward(self._images(oracle, rows, values), rows)
        _keep(oracle, rows, values, before, best)


def _keep(oracle: Oracle, rows: Tensor, values: Tensor, before: Tensor, best: Tensor) -> None:
    """Write ``values`` into ``best`` where the last look lowered the margin from ``before``: its image is now kept."""
    better = (oracle.margin[rows] < before)[:, None]
    best[rows] = torch.where(better, values, best[rows])


@ATTACKS.register("bias-field")
@dataclass(frozen=True)
class BiasField(ParameterAttack):
    """A smooth gain, as of a coil or of uneven exposure: x exp(sum_k c_k phi_k), the same in all channels.

    phi_k are the cosines of the discrete cosine transform of orders i down and j across with i + j <= ``order``, the
    constant among them, scaled to a mean square of 1. A budget eps bounds the field at every pixel:
    |sum_k c_k phi_k| <= log(1 + eps), so 0.1 allows gains from 1 / 1.1 to 1.1. Steps are unit gradient steps of the
    field, projected on the bound by Dykstra's algorithm on a 16 x 16 grid and then scaled to hold at every pixel.
    ``AttackResult.parameters`` has ``"coefficients"``, float (N, K), in the order of ``low_orders``.

    Args:
        steps: Gradient steps after the grid, which is each phi_k by itself, of both signs, as large as may be.
        order: Largest i + j, 0 to 3.

    References:
        B. Tian, Q. Guo, F. Juefei-Xu et al., "Bias field poses a threat to DNN-based X-ray recognition", 2020,
        2009.09247. C. Chen, C. Qin, H. Qiu et al., "Realistic adversarial data augmentation for MR image segmentation",
        2020, 2006.13322.
    """

    unit: ClassVar[str] = "gain change"
    order: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in range(4):
            raise RangeError("BiasField", "order from 0 to 3", f"{self.order}", "Higher orders are no longer smooth.")

    def bound(self, spec: ImageSpec) -> str:
        del spec
        return f"the gain, smoothly over the image, by up to a factor of {1 + max(self.eps):g}"

    def grid(self) -> Tensor:
        peaks = [_height(i) * _height(j) for i, j in low_orders(self.order)]
        alone = torch.diag(1 / torch.tensor(peaks, dtype=torch.float64))
        return torch.cat((alone, -alone))

    def named(self, values: Tensor, eps: float) -> dict[str, Tensor]:
        return {"coefficients": values * math.log1p(eps)}

    def render(self, images: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        size = (images.shape[2], images.shape[3])
        return images * smooth_field(parameters["coefficients"], size, self.order).exp()

    def direction(self, slope: Tensor) -> Tensor:
        # the cosines are orthogonal: a unit vector of coefficients is a field with a mean square of 1
        scaled = slope / slope.abs().amax(1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
        unit: Tensor = scaled / scaled.norm(dim=1, keepdim=True).clamp_min(TINY)
        return unit

    def inside(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        basis = smooth_field(torch.eye(values.shape[1]).to(values), (_CELLS, _CELLS), self.order).flatten(1)
        correction = torch.zeros((len(values), basis.shape[1]), dtype=values.dtype, device=values.device)
        for _ in range(_ROUNDS):
            field = values @ basis + correction
            clipped = field.clamp(-1, 1)
            correction = field - clipped
            values = clipped @ basis.T / basis.shape[1]
        peak = smooth_field(values, size, self.order).abs().amax((1, 2, 3))
        return values / peak.clamp_min(1)[:, None]


def low_orders(order: int) -> tuple[tuple[int, int], ...]:
    """Return the orders (down, across) of the cosines of a bias field."""
    return tuple((i, j) for i, j in product(range(order + 1), repeat=2) if i + j <= order)


def smooth_field(coefficients: Tensor, size: tuple[int, int], order: int) -> Tensor:
    """Return sum_k c_k phi_k.

    Args:
        coefficients: float (N, K).
        size: (height, width) in pixels.
        order: See ``BiasField``; K is the number of its ``low_orders``.

    Returns:
        float (N, 1, height, width).
    """
    table = coefficients.new_zeros(len(coefficients), order + 1, order + 1)
    down, across = zip(*low_orders(order), strict=True)
    table[:, list(down), list(across)] = coefficients
    rows, columns = (_waves(count, order).to(coefficients) for count in size)
    field: Tensor = rows.T @ table @ columns
    return field[:, None]


def _waves(count: int, order: int) -> Tensor:
    """Return the cosines of orders 0 to ``order`` at ``count`` pixels, float64 (order + 1, count)."""
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.stack([_height(i) * torch.cos(math.pi * i * places) for i in range(order + 1)])


def _height(order: int) -> float:
    return 1.0 if order == 0 else math.sqrt(2)


@ATTACKS.register("gamma-window")
@dataclass(frozen=True)
class GammaWindow(ParameterAttack):
    """Another display: a grey value window and a gamma, x' = clip((x - a) / (b - a), 0, 1)^g.

    A budget eps allows gamma g and the window's width b - a from 1 / (1 + eps) to 1 + eps, and its centre (a + b) / 2
    from 0.5 - eps / 2 to 0.5 + eps / 2, on the [0, 1] scale. ``AttackResult.parameters`` has ``"gamma"``, ``"low"``
    (a) and ``"high"`` (b), float (N,).

    Args:
        steps: Gradient steps after the grid of 26 points: each parameter at no change and at both bounds.
    """

    unit: ClassVar[str] = "relative change"

    def bound(self, spec: ImageSpec) -> str:
        top = max(self.eps)
        return (
            f"gamma and the width of the grey value window by up to a factor of {1 + top:g}, and its centre by up to "
            f"{spec.native(top / 2):g} {spec.unit}s"
        )

    def grid(self) -> Tensor:
        points = [point for point in product((-1.0, 0.0, 1.0), repeat=3) if any(point)]
        return torch.tensor(points, dtype=torch.float64)

    def named(self, values: Tensor, eps: float) -> dict[str, Tensor]:
        factors = (values * math.log1p(eps)).exp()
        centre, half = 0.5 + 0.5 * eps * values[:, 1], 0.5 * factors[:, 2]
        return {"gamma": factors[:, 0], "low": centre - half, "high": centre + half}

    def render(self, images: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        gamma, low, high = (parameters[name].view(-1, 1, 1, 1) for name in ("gamma", "low", "high"))
        inside = ((images - low) / (high - low)).clamp(0, 1)
        # at 0 the slope of x^g is infinite for g < 1
        positive = inside > 0
        return torch.where(positive, torch.where(positive, inside, 1.0) ** gamma, 0.0)


@ATTACKS.register("stain-attack")
@dataclass(frozen=True)
class StainAttack(ParameterAttack):
    """Stronger or weaker haematoxylin and eosin; the residual and the empty slide stay as they are. RGB only.

    The amounts c of both stains become c + w (alpha c - c + beta), in natural-log optical density, with the stain
    vectors, the colour of the empty slide and the tissue weight w of the corruption ``stain-shift``. A budget eps
    allows alpha from 1 / (1 + eps) to 1 + eps and beta from -0.1 eps to 0.1 eps, for each stain by itself.
    ``AttackResult.parameters`` has ``"alpha"`` and ``"beta"``, float (N, 2): haematoxylin, eosin.

    Args:
        steps: Gradient steps after the grid, which has the 16 corners of the bounds.

    References:
        A. C. Ruifrok, D. A. Johnston, "Quantification of histochemical staining by color deconvolution", 2001.
    """

    unit: ClassVar[str] = "stain change"
    eps: tuple[float, ...] = (0.1, 0.2, 0.4)

    def skip_reason(self, spec: ImageSpec) -> str | None:
        if spec.channels != 3:
            return f"needs 3 channels, the images have {spec.channels}"
        if spec.modality is not None and modality_tag(spec.modality) != "histology":
            return f"made for histology, the images are {spec.modality}"
        return None

    def bound(self, spec: ImageSpec) -> str:
        del spec
        top = max(self.eps)
        return f"the amount of each stain by up to a factor of {1 + top:g} and an optical density of {_OFFSET * top:g}"

    def grid(self) -> Tensor:
        return torch.tensor(list(product((-1.0, 1.0), repeat=4)), dtype=torch.float64)

    def named(self, values: Tensor, eps: float) -> dict[str, Tensor]:
        return {"alpha": (values[:, :2] * math.log1p(eps)).exp(), "beta": values[:, 2:] * (_OFFSET * eps)}

    def render(self, images: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return restained(images, parameters["alpha"], parameters["beta"])


def restained(images: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Return images with other amounts of haematoxylin and eosin, see ``StainAttack``.

    Args:
        images: float (N, 3, H, W) in [0, 1].
        alpha: float (N, 2), factors of the amounts.
        beta: float (N, 2), offsets, in natural-log optical density.

    Returns:
        float (N, 3, H, W), above 1 where an offset would lighten beyond that; differentiable in alpha and beta.

    Raises:
        ShapeError: Not three channels.
    """
    if images.shape[1] != 3:
        raise ShapeError("StainAttack", "images with 3 channels", f"{images.shape[1]}", "It is for RGB slides.")
    density = _log_blank(to_bytes(images)).to(images.dtype) - images.clamp_min(_FLOOR).log()
    tissue = -torch.expm1(-((density.mean(1, keepdim=True).clamp_min(0) / _TISSUE) ** 4))
    change = torch.zeros_like(images)
    for stain in (0, 1):
        unmix, vector = (images.new_tensor(row).view(1, 3, 1, 1) for row in (_UNMIX[stain], STAINS[stain].tolist()))
        amount = (density * unmix).sum(1, keepdim=True).clamp_min(0)
        factor, offset = (values[:, stain].view(-1, 1, 1, 1) for values in (alpha, beta))
        change = change + tissue * (amount * (factor - 1) + offset) * vector
    return images * torch.exp(-change)
