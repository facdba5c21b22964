"""What all searches share: the threat model, checks, and a model view that is left as it was."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from robustlab.core.attack import Attack, AttackResult, Norm
from robustlab.core.errors import ConfigError, KindError, RangeError, ShapeError
from robustlab.core.model import Model
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext, luma
from robustlab.core.types import Batch, ImageSpec
from robustlab.train.seeding import scoped_seed

from .oracle import Objective, Oracle

FRESH_DRAWS = 20
"""Forward passes, none of which the search has seen, that judge an attack on a random model."""

Mask = tuple[float, float] | Literal["masks"]


@dataclass(frozen=True)
class Search(Attack):
    """A search in a ball around each clean image, by a model that it may ask.

    Args:
        norm: ``"linf"``, or ``"l2"`` (length over all pixels and channels of an image).
        eps: Increasing budgets.
        units: Of the budgets: ``"unit"`` on the [0, 1] scale, e.g. 4/255 for 4 grey levels; ``"native"`` those of the
            source, e.g. 4 for 4 grey levels, 20 for 20 HU.
        mask: Where pixels may change: ``(low, high)`` where the clean image, as luma in [0, 1], lies between them, e.g.
            (0.05, 1) to spare the air around a body; ``"masks"`` where the sample's segmentation mask is not 0; None
            everywhere.
        draws: Forward passes a look, for models that are random: gradients and margins are averaged over them
            (expectation over transformation, Athalye et al. 2018), and what is found is judged on 20 fresh ones.

    Raises:
        RangeError: Numbers make no sense.
        ConfigError: Unknown norm, units or mask.
    """

    random: ClassVar[bool] = True  # whether results depend on the seed
    norm: Norm = "linf"
    eps: tuple[float, ...] = (1 / 255, 2 / 255, 4 / 255)
    units: Literal["unit", "native"] = field(default="unit", kw_only=True)
    mask: Mask | None = field(default=None, kw_only=True)
    draws: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        who = type(self).__name__
        given: object = self.eps
        if isinstance(given, (int, float, str)):
            raise KindError(who, "eps as a sequence of budgets", f"{given!r}", f"Pass eps=({given!r},).")
        object.__setattr__(self, "eps", tuple(float(value) for value in self.eps))
        self.check()
        if isinstance(self.mask, (list, tuple)):
            object.__setattr__(self, "mask", tuple(self.mask))
        mask: object = self.mask
        if (
            mask is not None
            and mask != "masks"
            and not (isinstance(mask, tuple) and len(mask) == 2 and mask[0] < mask[1])
        ):
            raise ConfigError(
                who, "mask=(low, high) with low < high, 'masks' or None", f"{mask!r}", "See its docstring."
            )
        self.at_least_one("draws", self.draws, "1 is right for models without randomness, 20 for others.")

    def at_least_one(self, name: str, value: int, hint: str) -> None:
        """Refuse counts below 1.

        Raises:
            RangeError: ``value`` is one.
        """
        if value < 1:
            raise RangeError(type(self).__name__, f"{name} of at least 1", f"{value}", hint)

    @abstractmethod
    def search(self, oracle: Oracle, rng: SampleRng, rows: Tensor, start: Tensor | None, *, stop: bool) -> None:
        """Show the oracle images of the samples at ``rows``; it keeps the best.

        Args:
            oracle: Of the whole batch, which has looked at the clean images.
            rng: One key for each sample of the whole batch.
            rows: int64 (n,), places in the batch.
            start: float (n, C, H, W), first starting points, inside the ball; None for the attack's own.
            stop: Whether samples may be left alone as soon as they are wrong.
        """

    def bound(self, spec: ImageSpec) -> str:
        where = (
            ""
            if self.mask is None
            else " inside the segmentation mask"
            if self.mask == "masks"
            else (f" where the clean image lies between {self.mask[0]:g} and {self.mask[1]:g} on the [0, 1] scale")
        )
        return super().bound(spec) + where

    def objective(self, model: Model) -> Objective | None:
        """Return what is lowered instead of the margin; None where the answer is attacked."""
        del model
        return None

    @final
    def run(
        self, batch: Batch, ctx: ShiftContext, *, eps: float, start: Tensor | None = None, stop: bool = False
    ) -> AttackResult:
        """Attack each sample of a labelled batch within ``eps``.

        Args:
            batch: Clean samples with labels, on the model's device.
            ctx: Holds the model, the seed and, for rounding, the image specification.
            eps: Budget on the [0, 1] scale; 0 returns the clean images.
            start: float (N, C, H, W), replaces the start of the first restart; it is projected first.
            stop: Leave samples alone as soon as they are wrong, which finds the same successes sooner, with margins
                that are not the smallest ones.

        Returns:
            Images inside the ball and the box, success, margin (NaN where no output was finite) and forward passes.

        Raises:
            ConfigError: No model or no labels.
            RangeError: ``eps`` is negative.
            ShapeError: ``start`` has another shape than the images.
            ModelError: No gradient reaches the input.
        """
        model = self._checked(batch, ctx, eps, start)
        rng = ctx.rng(self.name, self.version, batch.ids)
        with attacking(model, ctx.seed, batch) as (view, clean):
            oracle = Oracle(
                view,
                clean,
                ctx.spec,
                eps=eps,
                norm=self.norm,
                mask=self._mask(clean),
                draws=self.draws,
                thresholds=ctx.thresholds,
                objective=self.objective(view),
            )
            oracle.begin()
            if eps > 0:
                rows = oracle.open(oracle.all) if stop else oracle.all
                if start is not None:
                    start = oracle.project(start.detach().to(clean.images.dtype)[rows], rows)
                if len(rows):
                    self.search(oracle, rng, rows, start, stop=stop)
            return oracle.result(FRESH_DRAWS if self.draws > 1 else 0)

    def _mask(self, batch: Batch) -> Tensor | None:
        if self.mask is None:
            return None
        if self.mask == "masks":
            if batch.masks is None:
                raise ConfigError(
                    type(self).__name__, "samples with masks, for mask='masks'", "none", "Pass mask=(low, high)."
                )
            inside = batch.masks > 0
            return inside.view(len(batch), 1, *batch.images.shape[2:]).to(batch.images.dtype)
        low, high = self.mask
        grey = luma(batch.images) if batch.images.shape[1] == 3 else batch.images.mean(1, keepdim=True)
        return ((grey >= low) & (grey <= high)).to(batch.images.dtype)

    def _checked(self, batch: Batch, ctx: ShiftContext, eps: float, start: Tensor | None) -> Model:
        who = type(self).__name__
        if ctx.model is None:
            raise ConfigError(who, "a context with a model", "none", "Pass ShiftContext(model=robustlab.wrap(net)).")
        if batch.labels is None and self.goal == "answer":
            raise ConfigError(who, "a labelled batch", "no labels", "Attacks need to know the right answer.")
        if not eps >= 0:
            raise RangeError(who, "eps of 0 or more", f"{eps}", "Pass a budget on the [0, 1] scale.")
        if start is not None and start.shape != batch.images.shape:
            raise ShapeError(
                who, f"start of shape {tuple(batch.images.shape)}", f"{tuple(start.shape)}", "Give one start an image."
            )
        return ctx.model


@contextmanager
def attacking(model: Model, seed: int, batch: Batch) -> Iterator[tuple[Model, Batch]]:
    """Yield the view that is attacked and a copy of the batch, float32 or float64, where autograd may work.

    Every flag of the model is put back afterwards, and so is the global random state, which a random model reads: it
    is seeded from ``seed``, so that runs repeat.
    """
    images = batch.images.detach()
    # a caller may be in inference mode, whose tensors autograd refuses; copies made outside it are ordinary
    with torch.inference_mode(False), torch.enable_grad(), scoped_seed("attack", seed):
        images = images.clone() if images.dtype == torch.float64 else images.to(torch.float32, copy=True)
        labels = None if batch.labels is None else batch.labels.clone()
        view = model.for_attack()
        with model.evaluating(), view.evaluating():
            yield view, dataclasses.replace(batch, images=images, labels=labels, ids=batch.ids.clone())
