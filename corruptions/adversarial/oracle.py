"""What an attack sees of a model on one batch, and the best images that it has found."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustlab.core.attack import AttackResult, Norm, project, stored
from robustlab.core.checks import check_labels
from robustlab.core.errors import ModelError
from robustlab.core.model import Model
from robustlab.core.types import Batch, ImageSpec, Task

from .losses import decided_at, margin

Loss = Callable[[Tensor, Tensor, Task], Tensor]
"""Of logits (N, C), labels and the task; float (N,), which the attack raises."""

Objective = Callable[[Tensor], Tensor]
"""Of logits (N, C); float (N,), which an attack on something else than the answer lowers; NaN where undefined."""


class Oracle:
    """Answers and gradients of a model on parts of a batch; keeps, for each sample, the image of the smallest margin.

    The clean image counts as the first look: samples that the model gets wrong there are settled, and left as they are.
    For sources with a bit depth every forward pass sees the image as it would be stored, and gradients pass straight
    through the rounding. Logits that are not finite are never the better ones.

    Args:
        model: The view that is attacked, in eval mode.
        batch: Samples with labels.
        spec: What the pixel values mean; None for no rounding.
        eps: Budget on the [0, 1] scale.
        norm: Norm of the budget.
        mask: float (N, 1 or C, H, W), 1 where pixels may change, 0 elsewhere; None for everywhere.
        draws: Forward passes that are averaged where the model is random.
        thresholds: Probability at which each label is decided, for several labels an image; empty for one half.
        objective: What takes the place of the margin, as its change from the clean image; labels are then not looked
            at, and no sample is settled.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,
        spec: ImageSpec | None,
        *,
        eps: float,
        norm: Norm,
        mask: Tensor | None = None,
        draws: int = 1,
        thresholds: tuple[float, ...] = (),
        objective: Objective | None = None,
    ) -> None:
        self.model = model
        self.batch = batch
        self.spec = spec
        self.eps = eps
        self.norm: Norm = norm
        self.mask = mask
        self.draws = draws
        self.thresholds = thresholds if model.task == "multilabel" and objective is None else ()
        self.objective = objective
        self.clean = batch.images
        count, device = len(batch), batch.images.device
        self.labels = torch.zeros(count, dtype=torch.int64, device=device) if batch.labels is None else batch.labels
        self.images = self.clean.clone()
        self.margin = torch.full((count,), torch.inf, device=device, dtype=self.clean.dtype)
        self.seen = torch.zeros(count, dtype=torch.bool, device=device)
        self.settled = torch.zeros(count, dtype=torch.bool, device=device)
        self.queries = torch.zeros(count, dtype=torch.int64, device=device)
        self.all = torch.arange(count, device=device)
        self.num_classes = 0
        self.parameters: dict[str, Tensor] | None = None  # of the best images, where an attack has them
        self.at_first = torch.zeros_like(self.margin)
        self.stage = 0
        self.found_by = torch.full((count,), -1, dtype=torch.int64, device=device)

    def begin(self) -> None:
        """Look at the clean images, and check the labels against the classes that the model has."""
        logits = self.forward(self.clean, self.all)
        self.num_classes = logits.shape[1]
        if self.objective is None:
            self.settled = self.wrong(self.all)
        else:
            self.at_first = self.margin.masked_fill(~self.seen, 0.0)
            self.margin = torch.full_like(self.margin, torch.inf).masked_fill(self.seen, 0.0)
            self.found_by.fill_(-1)

    def wrong(self, rows: Tensor) -> Tensor:
        """Return which samples are wrong already, bool (n,); none of a random model, where only fresh draws tell."""
        return (self.margin[rows] < 0) & (self.draws == 1)

    def open(self, rows: Tensor) -> Tensor:
        """Return those of the samples at ``rows``, int64, that are not yet wrong; this waits for the device."""
        return rows[~self.wrong(rows)]

    def stored(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return images as a source of this bit depth would store them."""
        return stored(images.detach(), self.clean[rows], self.spec, self.norm, self.eps).detach()

    def project(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return images moved inside the mask, the ball and the box."""
        clean = self.clean[rows]
        if self.mask is not None:
            images = clean + (images - clean) * self.mask[rows]
        return project(images, clean, self.eps, self.norm)

    def forward(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return logits (n, C), the mean over the draws, of images of the samples at ``rows``, and look at them."""
        with torch.no_grad():
            images = self.stored(images, rows)
            drawn = self._drawn(images, rows)
            self._look(drawn, images, rows)
            return _mean(drawn)

    def margins(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return the margins (n,), the mean over the draws, of images of the samples at ``rows``, and look at them."""
        with torch.no_grad():
            images = self.stored(images, rows)
            return self._look(self._drawn(images, rows), images, rows)

    def ask(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return ``forward`` without looking: for images that may lie outside the ball."""
        with torch.no_grad():
            return _mean(self._drawn(self.stored(images, rows), rows))

    def gradient(self, images: Tensor, rows: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """Return the loss (n,) and its gradient (n, C, H, W), 0 where it is not finite, and look at the images.

        Both are means over the draws: gradients are averaged, not logits (Athalye et al. 2018).
        """
        value, slope, drawn, images = self._sloped(images, rows, loss)
        self._look(drawn, images, rows)
        return value, slope

    def slope(self, images: Tensor, rows: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``gradient`` and the logits without looking: for images that may lie outside the ball."""
        value, slope, drawn, _ = self._sloped(images, rows, loss)
        return value, slope, _mean(drawn)

    def result(self, fresh: int = 0) -> AttackResult:
        """Return the best images, judged by the looks that found them, or by ``fresh`` draws of a random model."""
        probability = None
        success, smallest = self.seen & (self.margin < 0), torch.where(self.seen, self.margin, torch.nan)
        if fresh:
            with torch.no_grad():
                looks = (self._logits(self.images, self.all) for _ in range(fresh))
                drawn = torch.stack([self._margin(logits, self.all) for logits in looks])
            probability = (drawn < 0).to(smallest.dtype).mean(0)
            success, smallest = probability > 0.5, drawn.nanmean(0)
        return AttackResult(
            images=self.images,
            success=success,
            margin=smallest,
            queries=self.queries,
            found_by=torch.where(success, self.found_by, -1),
            probability=probability,
            parameters=self.parameters,
        )

    def _margin(self, logits: Tensor, rows: Tensor) -> Tensor:
        if self.objective is None:
            return margin(logits, self.labels[rows], self.model.task)
        return self.objective(logits) - self.at_first[rows]

    def _logits(self, images: Tensor, rows: Tensor) -> Tensor:
        part = self.batch if len(rows) == len(self.batch) else self.batch.select(rows)
        logits = self.model.outputs(part.replace(images)).logits
        if not self.num_classes and self.objective is None:
            check_labels(
                self.labels,
                task=self.model.task,
                num_classes=logits.shape[1],
                count=len(self.clean),
                who=f"attack on {self.model.model_name}",
            )
        self.queries[rows] += 1
        return decided_at(logits, self.thresholds)

    def _drawn(self, images: Tensor, rows: Tensor) -> list[Tensor]:
        return [self._logits(images, rows) for _ in range(self.draws)]

    def _sloped(self, images: Tensor, rows: Tensor, loss: Loss) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """Return loss, gradient, the logits of each draw, and the images as they were stored."""
        images = self.stored(images, rows).requires_grad_(True)
        drawn: list[Tensor] = []
        total, slope = torch.zeros(len(rows), device=images.device, dtype=images.dtype), torch.zeros_like(images)
        for _ in range(self.draws):
            logits = self._logits(images, rows)
            values = loss(logits, self.labels[rows], self.model.task)
            slope = slope + _slope(values, images, self.model.model_name)
            total = total + values.detach()
            drawn.append(logits.detach())
        if self.draws > 1:
            slope, total = slope / self.draws, total / self.draws
        slope = torch.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)
        if self.mask is not None:
            slope = slope * self.mask[rows]
        return total, slope, drawn, images.detach()

    def _look(self, drawn: list[Tensor], images: Tensor, rows: Tensor) -> Tensor:
        """Keep the images whose margin, the mean over the draws, is the smallest so far; return the margins."""
        margins = [self._margin(logits, rows).to(self.margin.dtype) for logits in drawn]
        now = margins[0] if len(margins) == 1 else torch.stack(margins).mean(0)
        finite, best = ~torch.isnan(now), self.margin[rows]
        better = finite & (now < best) & ~self.settled[rows]
        first = better & (now < 0) & (best >= 0)
        self.found_by[rows] = torch.where(first, self.stage, self.found_by[rows])
        self.seen[rows] |= finite
        self.margin[rows] = torch.where(better, now, best)
        self.images[rows] = torch.where(better.view(-1, 1, 1, 1), images, self.images[rows])
        return now


def _mean(drawn: list[Tensor]) -> Tensor:
    return drawn[0] if len(drawn) == 1 else torch.stack(drawn).mean(0)


def _slope(values: Tensor, images: Tensor, name: str) -> Tensor:
    slope = None
    if values.requires_grad:
        (slope,) = torch.autograd.grad(values.sum(), images, allow_unused=True)
    if slope is None:
        raise ModelError(
            f"attack on {name}",
            "a model through which gradients reach the input",
            "an output that does not depend on the input for autograd",
            "Remove torch.no_grad() and .detach() from the forward pass, or leave gradient attacks out.",
        )
    return slope
