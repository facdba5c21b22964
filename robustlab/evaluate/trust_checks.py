"""What ``trust`` looks at: a model on some samples that it gets right, its outputs and its gradients.

Each check is a function of a subject. Where a model refuses to be differentiated it raises; ``trust`` turns that into
words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from corruptions.adversarial.base import attacking
from corruptions.adversarial.losses import decided_at, margin
from robustlab.core.attack import Norm
from robustlab.core.errors import ModelError
from robustlab.core.model import Model
from robustlab.core.registry import ATTACKS
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch, ImageSpec

Status = Literal["passed", "warned", "failed", "not automatable", "skipped"]

REFUSALS = (RuntimeError, TypeError, ValueError)
"""What a network may raise where autograd is asked to go through it."""

CHUNK = 128
"""Samples of one forward pass."""

FEW = 10
"""Samples that a check needs at least."""

STEPS = 40
"""Of PGD."""

_NEAR = 1e-3
_TINY_STEP, _STEPS_UP = 0.02, (0.5, 2.0, 8.0, 32.0)


class Verdict(NamedTuple):
    """Outcome of one check: its status, one sentence, and the number it rests on."""

    status: Status
    finding: str
    value: float | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """What one attack did to the samples: bool (n,) success and float (n,) smallest margins."""

    success: Tensor
    margin: Tensor

    @property
    def fooled(self) -> int:
        """Number of samples that are wrong afterwards."""
        return int(self.success.sum())


class Subject:
    """A model on n labelled samples that it gets right, inside a threat model; attacks are run once.

    Args:
        model: The model.
        batch: Samples with labels, on the model's device.
        norm: Norm of the budget.
        eps: Budget on the [0, 1] scale.
        spec: What the pixel values mean, or None.
        seed: Of the attacks and probes.
        thresholds: Probability at which each label is decided; empty for one half.
        draws: Forward passes a look.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,
        *,
        norm: Norm,
        eps: float,
        spec: ImageSpec | None,
        seed: int,
        thresholds: tuple[float, ...] = (),
        draws: int = 1,
    ) -> None:
        assert batch.labels is not None  # noqa: S101 - callers have checked it, for the type checkers
        self.model = model
        self.batch = batch
        self.labels = batch.labels
        self.norm: Norm = norm
        self.eps = eps
        self.spec = spec
        self.seed = seed
        self.thresholds = thresholds
        self.draws = draws
        self.n = len(batch)
        self.runs: dict[tuple[str, float, str], Run] = {}

    def run(
        self,
        name: str,
        *,
        eps: float | None = None,
        rows: Tensor | None = None,
        stop: bool = False,
        seed: int = 0,
        settings: Mapping[str, int | str] | None = None,
    ) -> Run:
        """Return what a registered attack does to all samples or to ``rows``; ``seed`` is added to the subject's."""
        eps = self.eps if eps is None else eps
        key = (name, eps, repr(sorted((settings or {}).items())))
        if key not in self.runs:
            make: Any = ATTACKS.get(name)
            fields = {"draws": self.draws, **(settings or {})} if self.draws > 1 else (settings or {})
            attack = make(norm=self.norm, eps=(eps,), **fields)
            ctx = ShiftContext(seed=self.seed + seed, spec=self.spec, model=self.model, thresholds=self.thresholds)
            success, smallest = torch.zeros_like(self.margins, dtype=torch.bool), self.margins.clone()
            every = torch.arange(self.n, device=self.labels.device) if rows is None else rows
            for part in torch.split(every, CHUNK) if len(every) else ():
                result = attack.run(self.batch.select(part), ctx, eps=eps, stop=stop)
                success[part], smallest[part] = result.success, result.margin.to(smallest.dtype)
            self.runs[key] = Run(success, smallest)
        return self.runs[key]

    def pgd(self, *, eps: float | None = None) -> Run:
        """Return what PGD from one start does to all samples."""
        return self.run("pgd", eps=eps, settings={"steps": STEPS})

    def left(self, *runs: Run) -> Tensor:
        """Return the places, int64, of samples that none of some attacks has fooled."""
        fooled = torch.zeros_like(self.margins, dtype=torch.bool)
        for run in runs:
            fooled |= run.success
        return (~fooled).nonzero().squeeze(1)

    def survivors(self) -> Tensor:
        """Return the places, int64, of samples that no gradient attack has fooled at ``self.eps`` so far."""
        return self.left(*(run for (name, eps, _), run in self.runs.items() if eps == self.eps and name != "square"))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, C) of the attacked view; a random model draws the same numbers in every call."""
        found = []
        for part in torch.split(torch.arange(self.n, device=images.device), CHUNK):
            few = self.batch.select(part).replace(images[part])
            with attacking(self.model, self.seed, few) as (view, clean), torch.no_grad():
                found.append(decided_at(view.outputs(clean).logits, self.thresholds))
        return torch.cat(found)

    def margins_of(self, logits: Tensor) -> Tensor:
        """Return margins (n,) of logits of all samples."""
        return margin(logits, self.labels, self.model.task)

    def slopes(self, images: Tensor) -> Tensor:
        """Return the input gradient (n, C, H, W) of the margin; random models draw as in ``forward``.

        Raises:
            ModelError: None reaches the input.
        """
        found = []
        for part in torch.split(torch.arange(self.n, device=images.device), CHUNK):
            few = self.batch.select(part).replace(images[part])
            with attacking(self.model, self.seed, few) as (view, clean):
                pixels = clean.images.requires_grad_(True)
                logits = decided_at(view.outputs(clean.replace(pixels)).logits, self.thresholds)
                assert clean.labels is not None  # noqa: S101 - for the type checkers
                value = margin(logits, clean.labels, self.model.task).sum()
                slope = torch.autograd.grad(value, pixels, allow_unused=True)[0] if value.requires_grad else None
            if slope is None:
                raise ModelError(
                    f"attack on {self.model.model_name}",
                    "a model through which gradients reach the input",
                    "an output that does not depend on the input for autograd",
                    "Remove torch.no_grad() and .detach() from the forward pass, or attack a differentiable stand-in.",
                )
            found.append(slope.detach())
        return torch.cat(found)

    @cached_property
    def logits(self) -> Tensor:
        """Clean logits, float (n, C)."""
        return self.forward(self.batch.images)

    @cached_property
    def margins(self) -> Tensor:
        """Clean margins, float (n,)."""
        return self.margins_of(self.logits)

    @cached_property
    def slope(self) -> Tensor:
        """Input gradient of the margin at the clean images."""
        return self.slopes(self.batch.images)

    @cached_property
    def near(self) -> Tensor:
        """The images with normal noise of standard deviation 0.001, clipped to [0, 1]."""
        images = self.batch.images
        noise = SampleRng.make(self.seed, "trust", self.batch.ids).normal("near", tuple(images.shape[1:]))
        return (images + _NEAR * noise.to(images.dtype)).clamp(0, 1)

    @cached_property
    def near_slope(self) -> Tensor:
        """Input gradient of the margin there."""
        return self.slopes(self.near)

    @cached_property
    def dead(self) -> Tensor:
        """Samples, bool (n,), whose gradient is zero, not finite, or does not reach the input at all."""
        try:
            flat = self.slope.flatten(1)
        except REFUSALS:
            return torch.ones(self.n, dtype=torch.bool, device=self.labels.device)
        return (flat == 0).all(1) | ~torch.isfinite(flat).all(1)

    @cached_property
    def wobble(self) -> float:
        """Largest difference of logits of unit length between 5 passes."""
        with attacking(self.model, self.seed, self.batch.select(self.first(CHUNK))) as (_, clean), torch.no_grad():
            passes = [F.normalize(self.model.outputs(clean).logits.double().nan_to_num(), dim=1) for _ in range(5)]
        return max(float((other - passes[0]).abs().max()) for other in passes[1:])

    @property
    def random(self) -> bool:
        """Two passes over one image differ."""
        return self.wobble > 1e-4

    @property
    def stuck(self) -> bool:
        """Gradients lead PGD nowhere: most are zero, or it lowers the margin of no sample."""
        lowered = self.pgd().margin < self.margins
        return 2 * int(self.dead.sum()) > self.n or not bool(lowered.any())

    @property
    def box(self) -> float:
        """Budget that reaches every image."""
        return 1.0 if self.norm == "linf" else math.sqrt(self.batch.images[0].numel())

    @property
    def half(self) -> float:
        """Budget within which every image can become the same grey one, as it is stored."""
        bits = None if self.spec is None else self.spec.bits
        return self.box * 0.5 * (1.0 if bits is None else 1 + 1 / ((1 << bits) - 1))

    def share(self, count: int) -> str:
        """Write a count as a share of the samples."""
        return share(count, self.n)

    def budget(self, eps: float) -> str:
        """Write a budget, in native units too where they are known."""
        if self.spec is None:
            return f"eps {eps:.4g}"
        unit = self.spec.unit + ("s" if self.spec.unit.endswith("level") else "")
        return f"eps {eps:.4g} ({self.spec.native(eps):.4g} {unit})"

    def first(self, count: int) -> Tensor:
        """Return the places of the first samples."""
        return torch.arange(min(count, self.n), device=self.labels.device)


def majority(subject: Subject) -> int:
    """Return the number of samples of the most frequent class."""
    return int(torch.unique(subject.labels, dim=0, return_counts=True)[1].max())


def moved(subject: Subject, label: str, step: float) -> Tensor:
    """Return the images with each pixel moved by ``step``, up or down at random, clipped to [0, 1]."""
    images = subject.batch.images
    sign = SampleRng.make(subject.seed, "trust", subject.batch.ids).sign(label, tuple(images.shape[1:]))
    return (images + step * sign.to(images.dtype)).clamp(0, 1)


# what gradients look like


def zero_gradients(s: Subject) -> Verdict:
    """Gradients must reach the input."""
    try:
        flat = s.slope.flatten(1)
    except REFUSALS as error:
        what = f"{error.got}" if isinstance(error, ModelError) else f"{type(error).__name__}: {first_line(error)}"
        return Verdict("failed", f"No gradient reaches the input (n = {s.n}): {what}.", 1.0)
    broken = ~torch.isfinite(flat).all(1)
    bad, nan = int((broken | (flat == 0).all(1)).sum()), int(broken.sum())
    text = f"The input gradient of the margin is zero for {s.share(bad - nan)} and not finite for {s.share(nan)}."
    status: Status = "failed" if 2 * bad > s.n else "warned" if 20 * bad > s.n else "passed"
    return Verdict(status, text, bad / s.n)


def shattered_gradients(s: Subject) -> Verdict:
    """Gradients of neighbours must point the same way."""
    here, there = s.slope.flatten(1).double(), s.near_slope.flatten(1).double()
    cosine = F.cosine_similarity(_unit(here), _unit(there), dim=1)[~s.dead & torch.isfinite(there).all(1)]
    if len(cosine) < FEW:
        return Verdict("skipped", f"Only {len(cosine)} of {s.n} samples have a gradient.")
    mean = float(cosine.mean())
    text = (
        f"Gradients at an image and with noise of {_NEAR:g} on it have a mean cosine of {mean:.2f} (n = {len(cosine)})."
    )
    return Verdict("warned" if mean < 0.1 else "passed", text, mean)


def finite_differences(s: Subject) -> Verdict:
    """The margin must change along the gradient as the gradient says."""
    slope = s.near_slope.double()
    steep = slope.flatten(1).norm(dim=1)
    off = torch.full_like(steep, torch.inf)
    spread = torch.maximum(s.logits.std(1, correction=0), s.margins.abs()).double()
    finest = 200 * torch.finfo(torch.float32).eps * s.logits.abs().amax(1).double()
    seen = torch.zeros_like(s.dead)
    for part in (1e-2, 1e-3):
        # a change of a set part of the logits' spread, by a grey level a pixel at most
        unit = _unit(slope.flatten(1)).view_as(slope)
        step = torch.minimum(part * spread / steep.clamp_min(1e-300), 1 / 255 / unit.flatten(1).abs().amax(1))
        delta = (step.view(-1, 1, 1, 1) * unit).to(s.near.dtype)
        up, down = (s.near + delta).clamp(0, 1), (s.near - delta).clamp(0, 1)
        told = (slope * (up.double() - down.double())).flatten(1).sum(1)
        found = (s.margins_of(s.forward(up)) - s.margins_of(s.forward(down))).double()
        clear = told.abs() > finest
        seen |= clear
        off = torch.where(clear, torch.minimum(off, (found - told).abs() / told.abs()), off)
    off = off[seen].nan_to_num(nan=torch.inf)
    if len(off) < FEW:
        return Verdict("skipped", f"Only {len(off)} of {s.n} samples have a gradient that float32 can check.")
    wrong = int((off > 0.2).sum())
    text = f"A step along the gradient changes the margin by more than 20 % off for {share(wrong, len(off))}"
    if 20 * wrong <= len(off):
        return Verdict("passed", f"{text}.", wrong / len(off))
    return Verdict("warned", f"{text}: what autograd returns is not the slope.", wrong / len(off))


def non_differentiable(s: Subject) -> Verdict:
    """The output must follow small changes of the input, and the gradient must see that."""
    grey = 1 / 255 if s.spec is None or s.spec.bits is None else 1 / ((1 << s.spec.bits) - 1)
    still = (s.forward(moved(s, "shift", _TINY_STEP * grey)) == s.logits).all(1)
    doubtful = still | s.dead
    moves, first = torch.zeros_like(still), 0.0
    for step in _STEPS_UP if bool(doubtful.any()) else ():
        moves |= (s.forward(moved(s, "shift", step * grey)) != s.logits).any(1)
        if not first and bool((moves & doubtful).any()):
            first = step
    bad, constant = int((moves & doubtful).sum()), int((doubtful & ~moves).sum())
    if 2 * constant > s.n:
        return Verdict(
            "skipped", f"Steps of up to {_STEPS_UP[-1]:g} grey levels do not move {s.share(constant)} at all."
        )
    if 2 * bad <= s.n:
        text = f"Steps of {_TINY_STEP:g} grey levels change the output, and the gradient is not zero, for "
        return Verdict("passed", f"{text}{s.share(s.n - int(doubtful.sum()))}.", bad / s.n)
    return Verdict(
        "warned",
        f"The output of {s.share(bad)} changes by steps of {first:g} grey levels, but the gradient is zero or missing "
        f"({int((s.dead & moves).sum())}) or {_TINY_STEP:g} grey levels change nothing ({int((still & moves).sum())}): "
        "give attacks a differentiable substitute of that part (BPDA, for_attack).",
        bad / s.n,
    )


# what outputs look like


def randomised(s: Subject) -> Verdict:
    """Two passes over one image must give the same logits."""
    text = f"Logits of unit length differ by up to {s.wobble:.1e} between 5 passes (n = {min(s.n, CHUNK)})"
    if not s.random:
        return Verdict("passed", f"{text}.", s.wobble)
    if s.draws > 1:
        return Verdict("passed", f"{text}: the model is random, and attacks average over {s.draws} draws.", s.wobble)
    return Verdict("warned", f"{text}: the model is random, so use draws=20 in every attack.", s.wobble)


class _Watch(TorchFunctionMode):
    """Counts calls of autograd."""

    calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        self.calls += func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
        return func(*args, **(kwargs or {}))


def optimisation(s: Subject) -> Verdict:
    """A forward pass must not call autograd itself."""
    with attacking(s.model, s.seed, s.batch.select(s.first(CHUNK))) as (_, clean), torch.no_grad(), _Watch() as watch:
        s.model.outputs(clean)
    text = f"Calls of autograd in a forward pass of {len(clean)} samples: {watch.calls}"
    if not watch.calls:
        return Verdict("passed", f"{text}.", 0.0)
    advice = "it optimises while it predicts, which gradient attacks do not see through unless they unroll it"
    return Verdict("warned", f"{text}: {advice}.", float(watch.calls))


def probabilities(s: Subject) -> Verdict:
    """Networks should return logits, and must not pass off probabilities as such."""
    kind = str(s.model.settings().get("output", "logits"))
    sums = s.logits.sum(1)
    low, high = float(s.logits.min()), float(s.logits.max())
    if kind == "probs":
        certain = int((s.logits.softmax(1).amax(1) == 1).sum()) if s.model.task != "multilabel" else 0
        return Verdict(
            "warned",
            f"Softmax given; converted: the network returns probabilities, whose logarithms are attacked (n = {s.n}); "
            f"{s.share(certain)} are exactly 1, where float32 has lost the logits.",
            certain / s.n,
        )
    if s.model.task != "multilabel" and low >= 0 and high <= 1 and bool(((sums - 1).abs() < 1e-3).all()):
        advice = "they are mere answers (see one-hot)" if _distinct(s) <= 2 else "declare output='probs'"
        return Verdict(
            "failed",
            f"Softmax given; not converted: all {s.n} rows lie in [{low:.3g}, {high:.3g}] and sum to 1, and are taken "
            f"for logits: {advice}.",
            1.0,
        )
    text = f"Outputs of {s.n} samples, from {low:.3g} to {high:.3g}, are no probabilities"
    return Verdict("passed", f"{text}{' but their logarithms, as declared' if kind == 'log_probs' else ''}.")


def one_hot(s: Subject) -> Verdict:
    """Outputs must tell more than the answer."""
    values = _distinct(s)
    if values > 2 and not s.model.answers_only:
        return Verdict("passed", f"Outputs of {s.n} samples take {values} different values.", float(values))
    return Verdict(
        "failed",
        f"Outputs of {s.n} samples take {values} different values, so they tell the answer only (argmax): attacks need "
        "the logits before it.",
        float(values),
    )


def _distinct(s: Subject) -> int:
    """Return the number of different values in the columns of the logits that are not the same for all samples."""
    return len(torch.unique(s.logits[:, (s.logits != s.logits[:1]).any(0)]))


def saturated_logits(s: Subject) -> Verdict:
    """Cross-entropy must have a gradient."""
    if s.model.task == "multilabel":
        return Verdict("skipped", "Several labels an image: attacks use the margin, which does not saturate.")
    error = (s.logits.softmax(1) - F.one_hot(s.labels, s.logits.shape[1])).abs().amax(1)
    count = int((error < torch.finfo(torch.float32).eps).sum())
    text = f"For {s.share(count)} the cross-entropy is flat in float32"
    if 10 * count <= s.n:
        return Verdict("passed", f"{text}.", count / s.n)
    advice = "attacks on plain cross-entropy stall there; trust losses that do not depend on the scale (margin, DLR)"
    return Verdict("warned", f"{text}: {advice}.", count / s.n)


def share(count: int, n: int) -> str:
    """Write a count as a share of n."""
    return f"{100 * count / n:.1f} % ({count} of {n})"


def first_line(error: BaseException) -> str:
    """Return the first line of a message, without a full stop at its end."""
    return (str(error).strip().splitlines() or ["no message"])[0][:200].rstrip(".")


def _unit(flat: Tensor) -> Tensor:
    """Return rows of length 1, or 0; divided by the largest entry first, since squares of tiny numbers vanish."""
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(1e-300)
    unit: Tensor = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return unit
