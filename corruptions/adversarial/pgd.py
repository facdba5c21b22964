"""Projected gradient descent in L-infinity and L2 balls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustlab.core.attack import Attack, AttackResult, Norm, project, round_toward
from robustlab.core.checks import check_labels
from robustlab.core.errors import ConfigError, KindError, ModelError, RangeError, ShapeError
from robustlab.core.model import Model
from robustlab.core.registry import ATTACKS
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch, ImageSpec

from .losses import attack_loss, margin


@ATTACKS.register("pgd")
@dataclass(frozen=True)
class PGD(Attack):
    """White-box, untargeted search by projected gradient steps from a keyed random start.

    x <- P(x + alpha sign(g)) in the L-infinity ball, x <- P(x + alpha g / |g|_2) in the L2 ball, with
    alpha = ``step_size`` eps / ``steps`` and P the projection on the ball around the clean image and on [0, 1]. The
    iterate with the smallest margin is kept for each sample; the clean image counts as the first iterate, and samples
    that the model gets wrong there are left as they are. Losses are summed, steps are fixed and draws are keyed by
    sample, so a sample's result does not depend on its batch. For sources with a bit depth every forward pass sees
    the image as it would be stored, and gradients pass straight through the rounding.

    Args:
        norm: ``"linf"`` or ``"l2"`` (length over all pixels and channels of an image).
        eps: Increasing budgets on the [0, 1] scale, e.g. 4/255 is 4 grey levels.
        steps: Gradient steps of each restart.
        restarts: Independent starts.
        step_size: Length of all steps together, in units of eps.

    Raises:
        RangeError: Budgets, steps, restarts or step size make no sense.
        ConfigError: Unknown norm.

    References:
        Madry, Makelov, Schmidt, Tsipras, Vladu 2018, arXiv:1706.06083. Straight-through gradients: Athalye, Carlini,
        Wagner 2018, arXiv:1802.00420.
    """

    norm: Norm = "linf"
    eps: tuple[float, ...] = (1 / 255, 2 / 255, 4 / 255)
    steps: int = 40
    restarts: int = 1
    step_size: float = 2.5

    def __post_init__(self) -> None:
        given: object = self.eps
        if isinstance(given, (int, float, str)):
            raise KindError("PGD", "eps as a sequence of budgets", f"{given!r}", f"Pass eps=({given!r},).")
        object.__setattr__(self, "eps", tuple(float(value) for value in self.eps))
        self.check()
        for name, value in (("steps", self.steps), ("restarts", self.restarts)):
            if value < 1:
                raise RangeError("PGD", f"{name} of at least 1", f"{value}", "Madry et al. use 40 steps, 1 restart.")
        if not self.step_size > 0:
            raise RangeError("PGD", "a positive step_size", f"{self.step_size}", "2.5 lets a path cross the ball.")

    def run(self, batch: Batch, ctx: ShiftContext, *, eps: float, start: Tensor | None = None) -> AttackResult:
        """Attack each sample of a labelled batch within ``eps``.

        Args:
            batch: Clean samples with labels, on the model's device.
            ctx: Holds the model, the seed and, for rounding, the image specification.
            eps: Budget on the [0, 1] scale; 0 returns the clean images.
            start: float (N, C, H, W), replaces the start of the first restart; it is projected first.

        Returns:
            Images inside the ball and the box, success, margin (NaN where no output was finite) and forward passes.

        Raises:
            ConfigError: No model or no labels.
            RangeError: ``eps`` is negative.
            ShapeError: ``start`` has another shape than the images.
            ModelError: No gradient reaches the input.
        """
        model, labels = _checked(batch, ctx, eps, start)
        # a caller may be in inference mode, whose tensors autograd refuses; copies made outside it are ordinary
        with torch.inference_mode(False), torch.enable_grad():
            clean, labels = batch.images.detach().to(torch.float32).clone(), labels.clone()
            view = model.for_attack()
            with model.evaluating(), view.evaluating():
                search = _Search(self.norm, eps, view, batch, clean, labels, ctx.spec)
                with torch.no_grad():
                    search.look(search.logits(clean), clean)
                rng = ctx.rng(self.name, self.version, batch.ids)
                for restart in range(self.restarts):
                    if start is not None and restart == 0:
                        first = project(start.detach().to(torch.float32), clean, eps, self.norm)
                    else:
                        first = random_start(rng.child(restart), clean, eps, self.norm)
                    search.climb(first, steps=self.steps, alpha=self.step_size * eps / self.steps)
            return search.result(1 + self.restarts * (self.steps + 1))


class _Search:
    """Best iterates of one batch, and the moves that improve them."""

    def __init__(
        self,
        norm: Norm,
        eps: float,
        model: Model,
        batch: Batch,
        clean: Tensor,
        labels: Tensor,
        spec: ImageSpec | None,
    ) -> None:
        self.norm: Norm = norm
        self.eps = eps
        self.model = model
        self.batch = batch
        self.clean = clean
        self.labels = labels
        self.spec = spec
        self.images = clean
        self.margin = torch.full((len(clean),), torch.inf, device=clean.device)
        self.seen = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
        self.settled: Tensor | None = None

    def stored(self, images: Tensor) -> Tensor:
        """Return images as a source of this bit depth would store them."""
        return round_toward(images.detach(), self.clean, self.spec).detach()

    def logits(self, images: Tensor) -> Tensor:
        """Run the model; labels are checked against its classes the first time."""
        logits = self.model.outputs(self.batch.replace(images)).logits
        if self.settled is None:
            check_labels(
                self.labels,
                task=self.model.task,
                num_classes=logits.shape[1],
                count=len(self.clean),
                who=f"attack on {self.model.model_name}",
            )
        return logits

    def look(self, logits: Tensor, images: Tensor) -> None:
        """Keep the images whose margin is the smallest so far; samples that are wrong at the first look stay."""
        now = margin(logits.detach(), self.labels, self.model.task)
        finite = ~torch.isnan(now)
        better = finite & (now < self.margin)
        self.seen = self.seen | finite
        if self.settled is None:
            self.settled = finite & (now < 0)
        else:
            better = better & ~self.settled
        self.margin = torch.where(better, now, self.margin)
        self.images = torch.where(better.view(-1, 1, 1, 1), images.detach(), self.images)

    def climb(self, images: Tensor, *, steps: int, alpha: float) -> None:
        """Take ``steps`` gradient steps from ``images``."""
        for _ in range(steps):
            seen = self.stored(images).requires_grad_(True)
            logits = self.logits(seen)
            direction = _direction(self.gradient(logits, seen), self.norm)
            self.look(logits, seen)
            images = project(images + alpha * direction, self.clean, self.eps, self.norm)
        with torch.no_grad():
            last = self.stored(images)
            self.look(self.logits(last), last)

    def gradient(self, logits: Tensor, images: Tensor) -> Tensor:
        """Return the input gradient of the summed loss, 0 where it is not finite."""
        gradient = None
        if logits.requires_grad:
            loss = attack_loss(logits, self.labels, self.model.task).sum()
            (gradient,) = torch.autograd.grad(loss, images, allow_unused=True)
        if gradient is None:
            raise ModelError(
                f"attack on {self.model.model_name}",
                "a model through which gradients reach the input",
                "an output that does not depend on the input for autograd",
                "Remove torch.no_grad() and .detach() from the forward pass, or leave gradient attacks out.",
            )
        return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)

    def result(self, queries: int) -> AttackResult:
        return AttackResult(
            images=self.images,
            success=self.seen & (self.margin < 0),
            margin=torch.where(self.seen, self.margin, torch.nan),
            queries=torch.full_like(self.labels.select(1, 0) if self.labels.ndim == 2 else self.labels, queries),
        )


def random_start(rng: SampleRng, clean: Tensor, eps: float, norm: Norm) -> Tensor:
    """Return points drawn uniformly in the ball around ``clean`` (N, C, H, W), then moved into [0, 1]."""
    shape = tuple(clean.shape[1:])
    if norm == "linf":
        delta = (2 * rng.uniform("start", shape) - 1) * eps
    else:
        normal = rng.normal("direction", shape)
        length = normal.flatten(1).norm(dim=1).clamp_min(1e-12)
        radius = rng.uniform("radius").pow(1.0 / clean[0].numel()) * eps
        delta = normal * (radius / length).view(-1, 1, 1, 1)
    return project(clean + delta, clean, eps, norm)


def _direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Return the steepest direction of unit length in the norm."""
    if norm == "linf":
        return gradient.sign()
    # scaled by the largest entry first: squares of tiny gradients would underflow to 0
    tiny = torch.finfo(gradient.dtype).tiny
    scaled = gradient / gradient.flatten(1).abs().amax(1).clamp_min(tiny).view(-1, 1, 1, 1)
    unit: Tensor = scaled / scaled.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return unit


def _checked(batch: Batch, ctx: ShiftContext, eps: float, start: Tensor | None) -> tuple[Model, Tensor]:
    if ctx.model is None:
        raise ConfigError("PGD", "a context with a model", "none", "Pass ShiftContext(model=robustlab.wrap(net)).")
    if batch.labels is None:
        raise ConfigError("PGD", "a labelled batch", "no labels", "Attacks need to know the right answer.")
    if not eps >= 0:
        raise RangeError("PGD", "eps of 0 or more", f"{eps}", "Pass a budget on the [0, 1] scale.")
    if start is not None and start.shape != batch.images.shape:
        raise ShapeError(
            "PGD", f"start of shape {tuple(batch.images.shape)}", f"{tuple(start.shape)}", "Give one start an image."
        )
    return ctx.model, batch.labels
