"""Attack: a shift that is searched for against a model, inside a stated threat model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from .errors import ConfigError, RangeError
from .levels import MAX_SEVERITY
from .shift import Shift, ShiftContext
from .types import Batch, ImageSpec

Norm = Literal["linf", "l2", "parameters"]
"""What a budget bounds: a norm of the change, or the parameters that make it."""

Goal = Literal["answer", "hide", "alarm"]
"""What is to go wrong: the answer, a detector that should flag foreign inputs, one that should not flag known ones."""


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What an attack found.

    Args:
        images: float32 (N, C, H, W), inside the ball and the box.
        success: bool (N,); NaN or infinite outputs are never a success.
        margin: float32 (N,), true-class logit minus the best other one; below 0 is a wrong answer.
        queries: int64 (N,), forward passes spent on each sample.
        found_by: int64 (N,), the attack of an ensemble, counted from 1, that first made the model wrong; 0 where it was
            wrong on the clean image, -1 where it is not wrong.
        probability: float32 (N,), for random models the share of fresh forward passes that were wrong; then success is
            more than half of them, and the margin is their mean. None where the model is not random.
        parameters: float (N, ...) by name, that made the images, for attacks on parameters; None for the others, and
            where nothing was searched.
    """

    images: Tensor
    success: Tensor
    margin: Tensor
    queries: Tensor
    found_by: Tensor | None = None
    probability: Tensor | None = None
    parameters: Mapping[str, Tensor] | None = None


class Attack(Shift):
    """A search for the worst input near a clean one.

    Subclasses are frozen dataclasses with the fields ``norm``, ``eps`` (increasing budgets) and ``units`` (``"unit"``:
    on the [0, 1] scale; ``"native"``: those of the source), and implement ``run``. Severity 5 k / B is the k-th of B
    budgets, with straight lines between. Those with another ``goal`` than the answer need no labels.
    """

    norm: Norm
    eps: tuple[float, ...]
    units: Literal["unit", "native"]
    goal: Goal = "answer"
    access: ClassVar[str] = "gradients"
    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2")

    @abstractmethod
    def run(self, batch: Batch, ctx: ShiftContext, *, eps: float, start: Tensor | None = None) -> AttackResult:
        """Attack each sample of a labelled batch within ``eps``.

        Args:
            batch: Clean samples with labels.
            ctx: Holds the model.
            eps: Budget on the [0, 1] scale.
            start: float (N, C, H, W) starting points inside the ball, instead of the attack's own.
        """

    @property
    def budgets(self) -> tuple[tuple[float, float], ...]:
        """(severity, eps) of each budget."""
        return tuple((MAX_SEVERITY * (i + 1) / len(self.eps), eps) for i, eps in enumerate(self.eps))

    def eps_at(self, severity: float) -> float:
        """Return the budget at a severity in [0, 5]."""
        position = severity * len(self.eps) / MAX_SEVERITY
        points = (0.0, *self.eps)
        low = min(int(position + 1e-9), len(self.eps) - 1)
        weight = position - low
        if abs(weight - 1) < 1e-9:
            return points[low + 1]
        return points[low] if abs(weight) < 1e-9 else points[low] + weight * (points[low + 1] - points[low])

    def budget(self, eps: float, spec: ImageSpec | None) -> float:
        """Return a budget on the [0, 1] scale.

        Raises:
            ConfigError: It is in native units, and what the pixel values mean is not known.
        """
        if self.units == "unit":
            return eps
        if spec is None:
            raise ConfigError(
                repr(self), "data that say what their values mean, for units='native'", "none", "Use units='unit'."
            )
        return eps / spec.native(1.0)

    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        unit = "[0, 1] scale" if self.units == "unit" else "native units"
        return {"eps": (self.eps_at(severity), f"{self.norm}, {unit}")}

    @property
    def label(self) -> str:
        return self.name if self.norm == "parameters" else f"{self.name}-{self.norm}"

    def bound(self, spec: ImageSpec) -> str:
        """Return what the largest budget allows, in words that follow "may change"."""
        top = max(self.eps)
        if self.norm == "linf":
            native = top if self.units == "native" else spec.native(top)
            return f"every pixel by up to {native:g} {spec.unit}s"
        scale = "the [0, 1] scale" if self.units == "unit" else f"the scale of {spec.unit}s"
        return f"the image (Euclidean length) by up to {top:g} on {scale}"

    def check(self) -> None:
        """Refuse budgets that make no sense.

        Raises:
            RangeError: Budgets are not positive and increasing, or an L-infinity budget exceeds 1.
        """
        eps = self.eps
        if not eps or any(not value > 0 for value in eps) or list(eps) != sorted(set(eps)):
            raise RangeError(
                type(self).__name__, "eps as increasing positive budgets", f"{eps}", "Severity 0 is the clean image."
            )
        if self.norm not in self.norms:
            known = " or ".join(map(repr, self.norms))
            raise ConfigError(type(self).__name__, f"norm {known}", repr(self.norm), "Check the spelling.")
        if self.units not in ("unit", "native"):
            raise ConfigError(
                type(self).__name__, "units 'unit' or 'native'", repr(self.units), "Native: 4 for 4 grey levels."
            )
        if self.norm == "parameters" and self.units == "native":
            hint = "Its budget bounds parameters, which do not depend on the units of pixels."
            raise ConfigError(type(self).__name__, "units='unit'", "'native'", hint)
        if self.norm == "linf" and self.units == "unit" and max(eps) > 1:
            raise RangeError(
                type(self).__name__, "eps on the [0, 1] scale", f"{max(eps)}", "Divide grey levels by 255, e.g. 8/255."
            )

    def skip_reason(self, spec: ImageSpec) -> str | None:
        del spec
        return None

    @final
    def prepare(self, batch: Batch, ctx: ShiftContext) -> Any:
        """An attack draws inside its own search."""
        return None

    @final
    def perform(self, batch: Batch, draws: Any, severity: float, ctx: ShiftContext) -> Batch:
        if ctx.model is None:
            raise ConfigError(
                repr(self), "a context with a model", "none", "Use it in evaluate_under_shift(..., attacks=...)."
            )
        if batch.labels is None and self.goal == "answer":
            raise ConfigError(repr(self), "a labelled batch", "no labels", "Attacks need to know the right answer.")
        eps = self.budget(self.eps_at(severity), ctx.spec)
        result = self.run(batch, ctx, eps=eps)
        inside = project(result.images, batch.images, eps, self.norm)
        return batch.replace(stored(inside, batch.images, ctx.spec, self.norm, eps))


_HALVINGS = 8


def project(images: Tensor, clean: Tensor, eps: float, norm: Norm) -> Tensor:
    """Return ``images`` moved into the ball of radius ``eps`` around ``clean`` (if the norm has one) and [0, 1]."""
    if norm == "parameters":
        return images.clamp(0, 1)
    delta = images - clean
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    else:
        delta = delta * (eps / _length(delta).clamp_min(1e-12)).clamp_max(1.0).to(delta.dtype)
        return just_inside((clean + delta).clamp(0, 1), clean, eps)
    return (clean + delta).clamp(0, 1)


def just_inside(images: Tensor, clean: Tensor, eps: float) -> Tensor:
    """Return images of the L2 ball, those that rounding has left outside by more than 5e-7 nearer by a bit.

    Scaling would not help: the last bits of many pixels round back to where they were. Images that are less far outside
    are left as they are, as the reference of Auto-PGD leaves them.
    """
    outside = _length(images - clean) > eps + 5e-7
    return torch.where(outside, torch.nextafter(images, clean), images)


def round_toward(images: Tensor, clean: Tensor, spec: ImageSpec | None) -> Tensor:
    """Round to the source's bit depth toward the clean image, so that the stored image stays inside the ball."""
    if spec is None or spec.bits is None:
        return images
    top = torch.full((), float((1 << spec.bits) - 1), device=images.device)  # see quantize
    base = torch.round(clean * top)
    steps = torch.trunc((images - clean) * top + torch.sign(images - clean) * 1e-4)
    return (base + steps).clamp_(0, float((1 << spec.bits) - 1)).div_(top)


def _length(delta: Tensor) -> Tensor:
    """Return float64 (N, 1, 1, 1): sums of 100,000 float32 squares are off by more than one part in a million."""
    length: Tensor = delta.flatten(1).to(torch.float64).norm(dim=1)
    return length.view(-1, 1, 1, 1)


def round_inside(images: Tensor, clean: Tensor, spec: ImageSpec | None, eps: float) -> Tensor:
    """Round to the nearest levels of the source that leave the change no longer than ``eps``, or than it is.

    A small change of many pixels is mostly below half a level, or below one: rounding every pixel toward the clean
    image would undo it, so all are rounded to the nearest level, of a change that is shortened just enough.
    """
    if spec is None or spec.bits is None:
        return images
    delta = images - clean
    # what lies outside the ball already keeps its own length
    room = _length(delta).clamp_min(eps) * (1 + 1e-6)
    low = torch.zeros_like(_length(delta))
    high = torch.ones_like(low)
    best = round_nearest(images, spec)
    fits = _length(best - clean) <= room
    low = torch.where(fits, high, low)
    best = torch.where(fits, best, round_nearest(clean, spec))
    for _ in range(_HALVINGS):
        # the length rises with the share, as every pixel's distance from its clean level does
        share = (low + high) / 2
        tried = round_nearest(clean + share.to(delta.dtype) * delta, spec)
        inside = _length(tried - clean) <= room
        better = inside & (share > low)
        low, high = torch.where(better, share, low), torch.where(inside, high, share)
        best = torch.where(better, tried, best)
    return best


def round_nearest(images: Tensor, spec: ImageSpec | None) -> Tensor:
    """Round to the source's bit depth (half to even), in the images' own floating point type."""
    if spec is None or spec.bits is None:
        return images
    top = torch.full((), float((1 << spec.bits) - 1), device=images.device)  # see quantize
    return torch.round(images * top).clamp_(0, float((1 << spec.bits) - 1)).div_(top)


def stored(images: Tensor, clean: Tensor, spec: ImageSpec | None, norm: Norm, eps: float) -> Tensor:
    """Return images as a source of this bit depth would store them, without leaving the threat model."""
    if norm == "parameters":
        return round_nearest(images, spec)
    return round_toward(images, clean, spec) if norm == "linf" else round_inside(images, clean, spec, eps)
