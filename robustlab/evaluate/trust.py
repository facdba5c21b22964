"""How far to trust adversarial results: a checklist that a harness can run by itself, beside the numbers.

Counts are compared on the same samples, all of which the model gets right. A difference counts when it exceeds the
stated points and is no matter of a single sample; where chance may favour either side it must also be significant in
the exact McNemar test at 0.05. What cannot be run is skipped with the reason, and never ticked.

References:
    N. Carlini, A. Athalye, N. Papernot, W. Brendel, J. Rauber, D. Tsipras, I. Goodfellow, A. Madry, A. Kurakin, "On
    evaluating adversarial robustness", 2019, 1902.06705. A. Athalye, N. Carlini, D. Wagner, "Obfuscated gradients give
    a false sense of security", 2018, 1802.00420. F. Croce, M. Hein, "Reliable evaluation of adversarial robustness with
    an ensemble of diverse parameter-free attacks", 2020, 2003.01690.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from corruptions.adversarial.base import attacking
from corruptions.adversarial.losses import decided_at, margin
from robustlab.core.attack import Norm, project, stored
from robustlab.core.checks import check_images, check_labels, check_seed
from robustlab.core.errors import ConfigError, KindError, RangeError
from robustlab.core.model import Model
from robustlab.core.registry import ATTACKS
from robustlab.core.rng import SampleRng
from robustlab.core.types import Batch, ImageSpec
from robustlab.metrics.stats import mcnemar
from robustlab.train.seeding import scoped_seed

from . import trust_checks as probes
from .trust_checks import CHUNK, FEW, REFUSALS, STEPS, Run, Status, Subject, Verdict, first_line, majority, share

_ALPHA = 0.05
_LOSS_STEPS = 30
_NOISE_DRAWS, _NOISE_SAMPLES = 100, 100
_QUERIES = 200


@dataclass(frozen=True)
class TrustCheck:
    """One item of the checklist.

    Args:
        name: Kebab-case name, e.g. ``"zero-gradients"``.
        question: What is asked.
        status: ``"passed"``, ``"warned"`` (read the numbers with care), ``"failed"`` (do not trust them),
            ``"not automatable"`` (for a person to answer) or ``"skipped"`` (could not be run).
        finding: One sentence with the numbers and the number of samples, or the reason.
        value: The number that the status rests on, or None.
    """

    name: str
    question: str
    status: Status
    finding: str
    value: float | None = None

    def to_dict(self) -> dict[str, str | float | None]:
        """Return the item as JSON types; a value that is not finite becomes None."""
        value = None if self.value is None or not math.isfinite(self.value) else self.value
        return {
            "name": self.name,
            "question": self.question,
            "status": self.status,
            "finding": self.finding,
            "value": value,
        }


def trust_checks(
    model: Model,
    batch: Batch,
    *,
    norm: Norm,
    eps: float,
    spec: ImageSpec | None = None,
    seed: int = 0,
    limit: int = 256,
    thresholds: tuple[float, ...] = (),
    draws: int = 1,
) -> tuple[TrustCheck, ...]:
    """Return the checklist for attacks on a model in a threat model.

    Attacks run on the first ``limit`` samples that the model gets right; a sample that withstands them costs some 460
    gradients and 300 forward passes more.

    Args:
        model: What ``robustlab.wrap`` returns, or a defence.
        batch: Samples with labels, on the model's device.
        norm: Norm of the budget.
        eps: Budget on the [0, 1] scale.
        spec: What the pixel values mean; attacked images are then rounded to the source's bits, as in an evaluation.
        seed: Of the attacks and of the probes' noise.
        limit: Right samples that are used at most.
        thresholds: Probability at which each label of a multi-label task is decided; empty for one half.
        draws: Forward passes a look, for models that are random.

    Raises:
        KindError: ``model`` is none, or the images are not floating point.
        ConfigError: No labels, or unknown norm.
        RangeError: ``eps`` or ``limit`` makes no sense, or pixels lie outside [0, 1].
        LabelError: A label is out of range.
        ModelError: The clean images cannot be evaluated.
    """
    labels = _checked(model, batch, norm, eps, limit)
    seed = check_seed(seed, "trust_checks")
    every = torch.arange(len(batch), device=batch.ids.device)
    with scoped_seed("trust", seed):  # a random model reads torch's generators
        logits = torch.cat([model.predict(batch.select(part)).logits for part in torch.split(every, CHUNK)])
    check_labels(labels, task=model.task, num_classes=logits.shape[1], count=len(batch), who="trust_checks")
    logits = decided_at(logits, thresholds if model.task == "multilabel" else ())
    right = margin(logits, labels, model.task) > 0
    subject = Subject(
        model,
        batch.select(every[right][:limit]),
        norm=norm,
        eps=eps,
        spec=spec,
        seed=seed,
        thresholds=thresholds if model.task == "multilabel" else (),
        draws=draws,
    )
    return (
        _named(("clean-accuracy", "Is clean accuracy stated?"), _clean(logits, labels, right)),
        _named(("threat-model", "Is the threat model stated?"), _threat(subject, len(batch))),
        *(_named((name, question), _outcome(check, subject)) for name, question, check in _CHECKS),
        _named(("adaptive-attack", "Was an attack designed against this very defence?"), _OPEN),
    )


def _named(item: tuple[str, str], verdict: Verdict) -> TrustCheck:
    return TrustCheck(*item, verdict.status, verdict.finding, verdict.value)


def _checked(model: object, batch: Batch, norm: object, eps: float, limit: int) -> Tensor:
    who = "trust_checks"
    if not isinstance(model, Model):
        raise KindError(who, "a wrapped model", type(model).__name__, "Pass robustlab.wrap(net).")
    check_images(batch.images, who)
    if batch.labels is None:
        raise ConfigError(who, "a labelled batch", "no labels", "Attacks need to know the right answer.")
    if norm not in ("linf", "l2"):
        raise ConfigError(who, "norm 'linf' or 'l2'", repr(norm), "Check the spelling.")
    if not 0 < eps < math.inf or (norm == "linf" and eps > 1):
        raise RangeError(who, "a positive eps on the [0, 1] scale", f"{eps}", "Divide grey levels by 255, e.g. 8/255.")
    if limit < FEW:
        raise RangeError(who, f"a limit of at least {FEW}", f"{limit}", "256 samples take seconds on small networks.")
    return batch.labels


def _outcome(check: Callable[[Subject], Verdict], subject: Subject) -> Verdict:
    if subject.n < FEW:
        return Verdict("skipped", f"The model gets only {subject.n} samples right; {FEW} are needed.")
    try:
        return check(subject)
    except REFUSALS as error:
        return Verdict("skipped", f"Could not be run on {subject.n} samples: {first_line(error)}.")


# what is stated


def _clean(logits: Tensor, labels: Tensor, right: Tensor) -> Verdict:
    n, count = len(labels), int(right.sum())
    frequent = int(torch.unique(labels, dim=0, return_counts=True)[1].max())
    broken = int((~torch.isfinite(logits).all(1)).sum())
    text = f"Clean accuracy is {share(count, n)}; the most frequent class has {share(frequent, n)}"
    if broken:
        text += f"; outputs of {broken} are not finite and count as wrong"
    if count > frequent or frequent == n:
        return Verdict("passed", f"{text}.", count / n)
    return Verdict("warned", f"{text}, so a constant answer would do as well.", count / n)


def _threat(s: Subject, given: int) -> Verdict:
    norm = {"linf": "L-infinity", "l2": "L2"}[s.norm]
    return Verdict(
        "passed",
        f"{norm}, {s.budget(s.eps)}, untargeted, with full knowledge of the model (gradients); {s.n} of {given} "
        f"samples, all of them right without attack; seed {s.seed}.",
        s.eps,
    )


def per_sample_worst(s: Subject) -> Verdict:
    """Whether each attack broke each sample is kept."""
    runs = [run for (_, eps, _), run in s.runs.items() if eps == s.eps]
    if not runs:
        return Verdict("skipped", f"No attack could be run on {s.n} samples.")
    matrix = torch.stack([run.success for run in runs], 1)
    worst, best = int((~matrix.any(1)).sum()), int((~matrix).sum(0).min())
    text = (
        f"{s.n} samples x {len(runs)} attacks (some on survivors only) are kept: the worst for each sample leaves "
        f"{s.share(worst)} right, the strongest single attack {s.share(best)}."
    )
    return Verdict("passed", text, worst / s.n)


def _beyond(extra: int, n: int, points: float) -> bool:
    """Tell whether a number of samples exceeds a number of points and is no matter of a single sample."""
    return extra >= 2 and 100 * extra / n > points


def _stuck(s: Subject) -> Verdict:
    dead = s.share(int(s.dead.sum()))
    return Verdict(
        "skipped", f"Gradients do not lead PGD anywhere, and are zero for {dead}: there is nothing to compare."
    )


# what gradient attacks of different strength say


def single_step(s: Subject) -> Verdict:
    """PGD must not fool fewer samples than FGSM."""
    if s.stuck:
        return _stuck(s)
    one, many = s.run("fgsm"), s.pgd()
    only_many, only_one = _only(many, one)
    if not one.fooled + many.fooled:
        return Verdict("skipped", f"Neither FGSM nor PGD fools any of {s.n} samples at {s.budget(s.eps)}.")
    p = mcnemar(only_many, only_one, kind="exact")
    text = (
        f"PGD with {STEPS} steps fools {s.share(many.fooled)}, one step (FGSM) {s.share(one.fooled)}; "
        f"{only_many} only PGD, {only_one} only FGSM (exact McNemar p = {p:.2g})."
    )
    failed = only_one > only_many and p < _ALPHA
    return Verdict("failed" if failed else "passed", text, (many.fooled - one.fooled) / s.n)


def iterations(s: Subject) -> Verdict:
    """Twice the steps must not find much more among the samples that PGD leaves."""
    if s.stuck:
        return _stuck(s)
    some, rows = s.pgd(), s.left(s.pgd())
    if not len(rows):
        return Verdict("passed", f"PGD with {STEPS} steps fools all {s.n} samples.", 0.0)
    more = s.run("pgd", rows=rows, settings={"steps": 2 * STEPS})
    gap = (some.margin[rows] - more.margin[rows].clamp_min(0)).double().nansum()
    lower = float(gap / s.margins.double().nansum().clamp_min(1e-12))
    text = (
        f"PGD with {STEPS} steps fools {s.share(some.fooled)}, twice the steps {s.share(some.fooled + more.fooled)} "
        f"({100 * more.fooled / s.n:+.1f} points); they lower the mean margin by {100 * lower:.1f} % of the clean one."
    )
    warned = _beyond(more.fooled, s.n, 1) or lower > 0.02
    return Verdict("warned" if warned else "passed", text, more.fooled / s.n)


def restarts(s: Subject) -> Verdict:
    """Four more starts must not find much more among the samples that PGD leaves."""
    if s.stuck:
        return _stuck(s)
    one, rows = s.pgd(), s.left(s.pgd())
    if not len(rows):
        return Verdict("passed", f"PGD from 1 start fools all {s.n} samples.", 0.0)
    extra = s.run("pgd", rows=rows, stop=True, seed=1, settings={"steps": STEPS, "restarts": 4}).fooled
    text = (
        f"PGD from 1 start fools {s.share(one.fooled)}, from 5 starts {s.share(one.fooled + extra)} "
        f"({100 * extra / s.n:+.1f} points)."
    )
    return Verdict("warned" if _beyond(extra, s.n, 1) else "passed", text, extra / s.n)


def two_losses(s: Subject) -> Verdict:
    """Cross-entropy and margin must find about the same."""
    if s.model.task == "multilabel":
        return Verdict("skipped", "Several labels an image: a sum of cross-entropies is no rival of the margin there.")
    if s.stuck:
        return _stuck(s)
    ce, gap = (s.run("apgd", stop=True, settings={"loss": loss, "steps": _LOSS_STEPS}) for loss in ("ce", "margin"))
    only_gap, only_ce = _only(gap, ce)
    p = mcnemar(only_gap, only_ce, kind="exact")
    differ = 100 * abs(ce.fooled - gap.fooled) / s.n
    warned = differ > 2 and p < _ALPHA
    text = (
        f"Auto-PGD fools {s.share(ce.fooled)} with cross-entropy and {s.share(gap.fooled)} with the margin "
        f"({differ:.1f} points apart, exact McNemar p = {p:.2g}){'; take the worst of both.' if warned else '.'}"
    )
    return Verdict("warned" if warned else "passed", text, differ / 100)


def _only(one: Run, other: Run) -> tuple[int, int]:
    """Return how many samples only the first run fools, and how many only the second one."""
    return int((one.success & ~other.success).sum()), int((other.success & ~one.success).sum())


# what budgets say


def curve(s: Subject) -> dict[float, Run]:
    """Return what PGD does at half, once and twice the budget."""
    return {eps: s.pgd(eps=eps) for eps in sorted({min(k * s.eps, s.box) for k in (0.5, 1.0, 2.0)})}


def budget_monotone(s: Subject) -> Verdict:
    """A larger budget, searched from scratch, must not leave significantly more samples right."""
    if s.stuck:
        return _stuck(s)
    runs = list(curve(s).values())
    if not any(run.fooled for run in runs):
        return Verdict("skipped", f"PGD fools none of {s.n} samples at up to {s.budget(max(curve(s)))}.")
    rise, p = 0, 1.0
    for small, large in pairwise(runs):
        gains, losses = _only(large, small)
        if losses > gains:
            rise, p = max(rise, losses - gains), min(p, mcnemar(gains, losses, kind="exact"))
    steps = ", ".join(f"{100 * run.fooled / s.n:.1f} % at {eps:.4g}" for eps, run in curve(s).items())
    text = f"PGD fools {steps} (n = {s.n}); " + (
        f"a larger budget fools up to {rise} fewer (exact McNemar p = {p:.2g})." if rise else "never fewer by more eps."
    )
    return Verdict("failed" if p < _ALPHA else "passed", text, rise / s.n)


def huge_budget(s: Subject) -> Verdict:
    """Where all images can become one grey image, accuracy is at most the share of the most frequent class."""
    if majority(s) == s.n:
        return Verdict("skipped", f"All {s.n} samples have the same label, which a constant answer gets right.")
    right = s.n - s.pgd(eps=max(s.half, s.eps)).fooled
    text = (
        f"At half the box ({s.budget(max(s.half, s.eps))}), where every image can become the same grey one, PGD leaves "
        f"{s.share(right)} right; the most frequent class is {s.share(majority(s))}."
    )
    return Verdict("failed" if right > majority(s) else "passed", text, right / s.n)


def full_success(s: Subject) -> Verdict:
    """Some budget must bring accuracy under 1 %."""
    tried = curve(s) | {s.half: s.pgd(eps=s.half)}
    if s.n - tried[s.half].fooled >= 0.01 * s.n:
        tried[s.box] = s.pgd(eps=s.box)
    enough = [eps for eps in sorted(tried) if s.n - tried[eps].fooled < 0.01 * s.n]
    here = f"At {s.budget(s.eps)} PGD leaves {s.share(s.n - s.pgd().fooled)} right"
    if not enough:
        left = s.n - tried[s.box].fooled
        return Verdict("warned", f"{here}, and still {s.share(left)} in the whole box: curve truncated.", left / s.n)
    return Verdict(
        "passed", f"{here}; under 1 % are left at {s.budget(enough[0])}, so draw curves that far.", enough[0]
    )


# what searches without gradients say


def black_box(s: Subject) -> Verdict:
    """Square must not break samples that gradient attacks leave."""
    if "square" not in ATTACKS:
        return Verdict("skipped", "The attack 'square' is not installed.")
    if s.random:
        return Verdict("skipped", "The model is random, so one pass more may break any sample (see randomised).")
    rows = s.survivors()
    broken = s.run("square", rows=rows, stop=True, settings={"queries": _QUERIES}).success.nonzero().squeeze(1)
    return _only_without_gradients(s, rows, broken, f"Square with {_QUERIES} queries", strict=False)


def random_noise(s: Subject) -> Verdict:
    """Random points of the sphere must not break samples that gradient attacks leave."""
    if s.random:
        return Verdict("skipped", "The model is random, so one pass more may break any sample (see randomised).")
    rows = s.survivors()[:_NOISE_SAMPLES]
    broken = rows[_noise(s, rows)] if len(rows) else rows
    return _only_without_gradients(s, rows, broken, f"noise ({_NOISE_DRAWS} draws of length eps)", strict=True)


def _noise(s: Subject, rows: Tensor) -> Tensor:
    """Return which of the samples at ``rows`` a draw of noise breaks, bool (n,); several draws share a forward pass."""
    few = s.batch.select(rows)
    rng = SampleRng.make(s.seed, "trust-noise", few.ids)
    shape = tuple(few.images.shape[1:])
    broken = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    together = max(1, CHUNK // len(rows))
    for first in range(0, _NOISE_DRAWS, together):
        draws = range(first, min(first + together, _NOISE_DRAWS))
        if s.norm == "linf":
            delta = torch.cat([rng.child(draw).sign("noise", shape) for draw in draws])
        else:
            delta = torch.cat([rng.child(draw).normal("noise", shape) for draw in draws])
            delta = delta / delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        many = few.select(torch.arange(len(rows), device=rows.device).repeat(len(draws)))
        images = project(many.images + s.eps * delta.to(many.images.dtype), many.images, s.eps, s.norm)
        many = many.replace(stored(images, many.images, s.spec, s.norm, s.eps))
        with attacking(s.model, s.seed, many) as (view, clean), torch.no_grad():
            logits = decided_at(view.outputs(clean).logits, s.thresholds)
        assert many.labels is not None  # noqa: S101 - for the type checkers
        wrong = margin(logits, many.labels, s.model.task) < 0
        broken |= wrong.view(len(draws), -1).any(0)
    return broken


def _only_without_gradients(s: Subject, rows: Tensor, broken: Tensor, what: str, *, strict: bool) -> Verdict:
    if not len(rows):
        return Verdict("passed", f"Gradient attacks fool all {s.n} samples, so none is left for {what}.", 0.0)
    count = len(broken)
    ids = ", ".join(str(i) for i in s.batch.ids[broken[:5]].tolist()) + (", ..." if count > 5 else "")
    ran = any(name != "square" for name, _, _ in s.runs)
    left = f"gradient attacks leave {len(rows)} of {s.n} samples right" if ran else "no gradient attack could be run"
    text = f"Where {left}, {what} breaks {count} of {len(rows)}"
    status: Status = "warned" if _beyond(count, s.n, 0.2) else "passed"
    if (strict and count) or _beyond(count, s.n, 2):
        status = "failed"
    return Verdict(status, f"{text} (ids {ids})." if count else f"{text}.", count / s.n)


_OPEN = Verdict("not automatable", "Open item: no program can tell; ask someone who knows the defence.")

_CHECKS: tuple[tuple[str, str, Callable[[Subject], Verdict]], ...] = (
    ("probabilities", "Does the network return logits, not probabilities?", probes.probabilities),
    ("one-hot", "Do outputs tell more than the answer?", probes.one_hot),
    ("saturated-logits", "Is cross-entropy free of saturation?", probes.saturated_logits),
    ("randomised", "Do repeated passes agree?", probes.randomised),
    ("optimisation", "Is the forward pass free of optimisation?", probes.optimisation),
    ("zero-gradients", "Do gradients reach the input?", probes.zero_gradients),
    ("shattered-gradients", "Do gradients of neighbours agree?", probes.shattered_gradients),
    ("finite-differences", "Are gradients the slopes of the output?", probes.finite_differences),
    ("non-differentiable", "Does the output follow small changes of the input?", probes.non_differentiable),
    ("single-step", "Do iterative attacks beat single steps?", single_step),
    ("iterations", "Are the iterations enough?", iterations),
    ("restarts", "Are the restarts enough?", restarts),
    ("two-losses", "Do two losses agree?", two_losses),
    ("budget-monotone", "Does more budget fool more samples?", budget_monotone),
    ("huge-budget", "Does a huge budget reach chance?", huge_budget),
    ("full-success", "Does some budget fool all samples?", full_success),
    ("black-box", "Do gradients beat a search without them?", black_box),
    ("random-noise", "Do gradients beat random noise?", random_noise),
    ("per-sample-worst", "Are results kept per sample and attack?", per_sample_worst),
)
