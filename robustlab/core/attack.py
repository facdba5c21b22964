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

Norm = Literal["linf", "l2"]


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What an attack found.

    Args:
        images: float32 (N, C, H, W), inside the ball and the box.
        success: bool (N,); NaN or infinite outputs are never a success.
        margin: float32 (N,), true-class logit minus the best other one; below 0 is a wrong answer.
        queries: int64 (N,), forward passes spent on each sample.
        probability: float32 (N,), for random models the share of fresh forward passes that were wrong; then success is
            more than half of them, and the margin is their mean. None where the model is not random.
    """

    images: Tensor
    success: Tensor
    margin: Tensor
    queries: Tensor
    probability: Tensor | None = None


class Attack(Shift):
    """A search for the worst input near a clean one.

    Subclasses are frozen dataclasses with the fields ``norm``, ``eps`` (increasing budgets) and ``units`` (``"unit"``:
    on the [0, 1] scale; ``"native"``: those of the source), and implement ``run``. Severity 5 k / B is the k-th of B budgets, with straight lines between.
    """

    norm: Norm
    eps: tuple[float, ...]
    units: Literal["unit", "native"]
    access: ClassVar[str] = "gradients"

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

    def parameters(self, severity: float) -> Mapping[str, tuple[float, str]]:
        return {"eps": (self.eps_at(severity), f"{self.norm}, [0, 1] scale")}

    @property
    def label(self) -> str:
        return f"{self.name}-{self.norm}"

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
        if self.norm not in ("linf", "l2"):
            raise ConfigError(type(self).__name__, "norm 'linf' or 'l2'", repr(self.norm), "Check the spelling.")
        if self.norm == "linf" and max(eps) > 1:
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
        if batch.labels is None:
            raise ConfigError(repr(self), "a labelled batch", "no labels", "Attacks need to know the right answer.")
        eps = self.eps_at(severity)
        result = self.run(batch, ctx, eps=eps)
        return batch.replace(round_toward(project(result.images, batch.images, eps, self.norm), batch.images, ctx.spec))


def project(images: Tensor, clean: Tensor, eps: float, norm: Norm) -> Tensor:
    """Return ``images`` moved into the ball of radius ``eps`` around ``clean`` and into [0, 1]."""
    delta = images - clean
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    else:
        length = delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        delta = delta * (eps / length).clamp_max(1.0)
    return (clean + delta).clamp(0, 1)


def round_toward(images: Tensor, clean: Tensor, spec: ImageSpec | None) -> Tensor:
    """Round to the source's bit depth toward the clean image, so that the stored image stays inside the ball."""
    if spec is None or spec.bits is None:
        return images
    top = torch.full((), float((1 << spec.bits) - 1), device=images.device)  # see quantize
    base = torch.round(clean * top)
    steps = torch.trunc((images - clean) * top + torch.sign(images - clean) * 1e-4)
    return (base + steps).clamp_(0, float((1 << spec.bits) - 1)).div_(top)
