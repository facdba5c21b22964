"""Transfer: images made on one network, to see whether they fool another one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.core.attack import Norm
from robustlab.core.checks import check_labels
from robustlab.core.errors import KindError, ModelError, RangeError
from robustlab.core.identity import model_identity
from robustlab.core.model import Model
from robustlab.core.rng import SampleRng
from robustlab.core.types import Batch

from .adapters import stamped
from .base import Search
from .losses import attack_loss
from .oracle import Oracle
from .steps import direction


@dataclass(frozen=True)
class Transfer(Search):
    """Momentum steps on a surrogate; the model under attack sees only where they end, and judges it.

    v <- mu v + g / mean|g| from v = 0, x <- P(x + alpha sign(v)) (in the L2 ball alpha v / |v|_2) from the clean image,
    with alpha = ``step_size`` eps / ``steps``. g is the mean gradient of the surrogate's loss over ``copies`` of the
    image, divided by 1, 2, 4, ..., each with probability ``p`` shrunk and put at a random place on black; g is smoothed
    by a Gaussian kernel, which stands for the mean over shifted images. Draws are keyed by sample, so a sample's result
    does not depend on its batch. The surrogate is moved to the images' device and runs in eval mode; its flags are put
    back.

    Args:
        surrogate: A trained model with the classes of the model under attack; of several labels an image, its decisions
            are taken at one half. Caches know it by its parameters and code at the moment when the attack is made; if
            it is trained on afterwards, nothing is kept.
        norm: As of ``Search``.
        eps: As of ``Search``.
        steps: Gradient steps.
        step_size: Length of all steps together, in units of eps.
        momentum: mu; 0 for none.
        resize: Smallest side after shrinking, in units of the full side; it is drawn uniformly up to 1.
        p: Probability that a copy is shrunk; 0 for never.
        kernel: Taps of the smoothing kernel, odd, which reaches 3 standard deviations; 1 for none; None for the
            authors' 15 on their 299 pixels and in proportion on other sizes (3 on 28 pixels, where 15 blur all away).
        copies: Scale copies; 1 for the image alone.

    Raises:
        KindError: ``surrogate`` is no model.
        RangeError: Numbers make no sense.

    References:
        Momentum: Y. Dong et al. 2018, 1710.06081. Input diversity: C. Xie et al. 2019, 1803.06978. Translations:
        Y. Dong, T. Pang, H. Su, J. Zhu 2019, 1904.02884. Scale copies: J. Lin et al. 2020, 1908.06281.
    """

    opaque: ClassVar[bool] = True
    access: ClassVar[str] = "surrogate"

    norm: Norm = field(default="linf", kw_only=True)
    eps: tuple[float, ...] = field(default=(1 / 255, 2 / 255, 4 / 255), kw_only=True)
    surrogate: Model
    steps: int = field(default=10, kw_only=True)
    step_size: float = field(default=1.0, kw_only=True)
    momentum: float = field(default=1.0, kw_only=True)
    resize: float = field(default=0.9, kw_only=True)
    p: float = field(default=0.5, kw_only=True)
    kernel: int | None = field(default=None, kw_only=True)
    copies: int = field(default=5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        given: object = self.surrogate
        if not isinstance(given, Model):
            hint = "Pass surrogate=robustlab.wrap(net)."
            raise KindError("Transfer", "a surrogate model", type(given).__name__, hint)
        kernel = 1 if self.kernel is None else self.kernel
        for name, value in (("steps", self.steps), ("copies", self.copies), ("kernel", kernel)):
            self.at_least_one(name, value, "The papers take 10 steps, 5 copies and 15 taps.")
        if kernel % 2 == 0:
            raise RangeError("Transfer", "an odd kernel", f"{kernel}", "It must have a centre.")
        if not (self.step_size > 0 and self.momentum >= 0):
            got = f"{self.step_size} and {self.momentum}"
            raise RangeError("Transfer", "a positive step_size and momentum of at least 0", got, "Usual is 1 for both.")
        if not (0 < self.resize <= 1 and 0 <= self.p <= 1):
            got = f"{self.resize} and {self.p}"
            raise RangeError("Transfer", "resize above 0, at most 1, and p from 0 to 1", got, "Usual are 0.9 and 0.5.")
        known = model_identity(self.surrogate)
        object.__setattr__(self, "_known", known)
        weights = known or self.surrogate.fingerprint()
        object.__setattr__(self, "name", stamped("transfer", self, apart=("surrogate",), also=weights))

    @property
    def label(self) -> str:
        return f"transfer-{self.norm}"

    @property
    def cacheable(self) -> bool:
        known: str | None = self._known  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        return known is not None and known == model_identity(self.surrogate)

    def search(self, oracle: Oracle, rng: SampleRng, rows: Tensor, start: Tensor | None, *, stop: bool) -> None:
        del stop
        part, rng = oracle.batch.select(rows), rng.select(rows)
        images = part.images if start is None else start
        mask = None if oracle.mask is None else oracle.mask[rows]
        taps = usual_taps(min(images.shape[2:])) if self.kernel is None else self.kernel
        view = self.surrogate.to(images.device).for_attack()
        speed = torch.zeros_like(images)
        with self.surrogate.evaluating(), view.evaluating():
            _check_classes(view, part)
            for step in range(self.steps):
                slope = self._slope(view, part.replace(oracle.stored(images, rows)), rng.child(step))
                slope = smoothed(slope, taps) * (1 if mask is None else mask)
                size = slope.abs().mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
                speed = self.momentum * speed + slope / size
                move = self.step_size * oracle.eps / self.steps * direction(speed, oracle.norm)
                images = oracle.project(images + move, rows)
        oracle.forward(images, rows)

    def _slope(self, view: Model, part: Batch, rng: SampleRng) -> Tensor:
        """Return the gradient of the surrogate's loss, the sum over the scale copies, 0 where it is not finite."""
        assert part.labels is not None  # noqa: S101 - for the type checkers
        images = part.images.detach().requires_grad_(True)
        total = torch.zeros_like(images)
        for copy in range(self.copies):
            seen = shrunk(images / 2**copy, rng.child(copy), least=self.resize, p=self.p)
            loss = attack_loss(view.outputs(part.replace(seen)).logits, part.labels, view.task).sum()
            slope = torch.autograd.grad(loss, images, allow_unused=True)[0] if loss.requires_grad else None
            if slope is None:
                raise ModelError(
                    f"Transfer from {view.model_name}",
                    "a surrogate through which gradients reach the input",
                    "an output that does not depend on the input for autograd",
                    "Remove torch.no_grad() and .detach() from its forward pass, or take another surrogate.",
                )
            total = total + slope
        return torch.nan_to_num(total, nan=0.0, posinf=0.0, neginf=0.0)


def _check_classes(view: Model, part: Batch) -> None:
    with torch.no_grad():
        logits = view.outputs(part).logits
    if part.labels is not None:
        who = f"surrogate {view.model_name}"
        check_labels(part.labels, task=view.task, num_classes=logits.shape[1], count=len(part), who=who)


def shrunk(images: Tensor, rng: SampleRng, *, least: float, p: float) -> Tensor:
    """Return images, some of which are shrunk (bilinear) and put at a random place on black.

    Args:
        images: float (N, C, H, W).
        rng: Of the N samples.
        least: Smallest side, in units of the full one; the largest is 1.
        p: Probability of shrinking.
    """
    scale = torch.where(rng.uniform("whether") < p, least + (1 - least) * rng.uniform("scale"), 1.0)
    rows, columns = (
        _resampling(scale, rng.uniform(place), side).to(images.dtype)
        for place, side in zip(("top", "left"), images.shape[2:], strict=True)
    )
    # as products with matrices, since the gradient of torch's sampling by a grid is not repeatable on CUDA
    return rows[:, None] @ images @ columns[:, None].mT


def _resampling(scale: Tensor, place: Tensor, side: int) -> Tensor:
    """Return matrices (N, side, side) that shrink a line of pixels to ``scale`` of its length, black around it.

    Args:
        scale: float (N,), in (0, 1].
        place: float (N,), in [0, 1], where between both ends.
        side: Pixels.
    """
    pixels = torch.arange(side, device=scale.device, dtype=scale.dtype)
    scale, first = scale[:, None], (place * (1 - scale) * side)[:, None]
    within = pixels + 0.5 - first
    source = (within / scale - 0.5).clamp(0, side - 1)
    inside = (within >= 0) & (within <= scale * side)
    return (1 - (source[:, :, None] - pixels).abs()).clamp_min(0) * inside[:, :, None]


def usual_taps(side: int) -> int:
    """Return the odd number of taps that stands to ``side`` pixels as 15 to 299."""
    return 2 * round(7 * side / 299) + 1


def smoothed(slope: Tensor, taps: int) -> Tensor:
    """Return gradients (N, C, H, W) smoothed by a Gaussian that reaches 3 standard deviations, 0 outside the image."""
    if taps == 1:
        return slope
    places = torch.linspace(-3, 3, taps, device=slope.device, dtype=slope.dtype)
    line = torch.exp(-(places**2) / 2)
    channels = slope.shape[1]
    weight = (line / line.sum()).expand(channels, 1, 1, taps)
    across = F.conv2d(slope, weight, padding=(0, taps // 2), groups=channels)
    return F.conv2d(across, weight.mT, padding=(taps // 2, 0), groups=channels)
