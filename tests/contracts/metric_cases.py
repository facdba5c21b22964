"""Stores that every metric must cope with, and one way to ask any metric for its values."""

import dataclasses
import functools
import math

import numpy as np
import torch

from robustlab.core.registry import METRICS
from robustlab.metrics import Context, PredictionStore, Resampler, fit_frozen
from robustlab.metrics.base import Conditions, ConditionStore

TASKS = {"binary": 2, "multiclass": 4, "multilabel": 3}
KINDS = [
    *TASKS,
    *(f"{task} clustered" for task in TASKS),
    "multiclass absent",
    "multilabel absent",
    "binary gaps",
    "multiclass gaps",
    "multilabel gaps",
    "binary answers",
    "multiclass answers",
]
SEEDS = 5
N = 90


@dataclasses.dataclass(frozen=True, repr=False)
class Case:
    """A store with all that the metrics of any kind need beside it."""

    store: PredictionStore
    reference: PredictionStore
    shifted: tuple[ConditionStore, ...]
    context: Context
    label: str = "case"

    def __repr__(self):
        return self.label

    def mapped(self, change, **context):
        """Apply a function of stores to all stores that metrics look at."""
        shifted = tuple(dataclasses.replace(item, store=change(item.store)) for item in self.shifted)
        reference = change(self.reference)
        new = dataclasses.replace(self.context, reference=reference, **context)
        return Case(change(self.store), reference, shifted, new, self.label)


def fine(rng, shape):
    """Logits that float16 holds exactly, also when small whole numbers are added in float32."""
    return np.clip(np.round(2 * rng.normal(size=shape) * 128) / 128, -7.5, 7.5)


def make_store(rng, task, kind="", n=N, smooth=False, first=0):
    classes = TASKS[task]
    draw = (lambda rng, shape: 2 * rng.normal(size=shape)) if smooth else fine
    logits = draw(rng, (n, classes))
    if task == "multilabel":
        labels = rng.integers(0, 2, (n, classes))
        logits = logits + (2 * labels - 1)
        labels[rng.random((n, classes)) < 0.1] = -1
        if kind == "absent":
            labels[:, 1] = np.minimum(labels[:, 1], 0)
    else:
        labels = rng.integers(0, classes - 1 if kind == "absent" else classes, n)
        logits[np.arange(n), labels] += 2
    if kind == "gaps":
        logits[rng.random(n) < 0.1, rng.integers(classes)] = rng.choice([np.nan, np.inf, -np.inf])
    if kind == "answers":
        logits = np.eye(classes)[logits.argmax(1)]
    score = rng.normal(size=n)
    gappy = np.where(rng.random(n) < 0.1, np.nan, np.round(score))
    return PredictionStore(
        ids=torch.from_numpy(rng.permutation(5 * n)[:n] + first),
        logits=torch.from_numpy(logits).to(torch.float64 if smooth else torch.float32),
        labels=torch.from_numpy(labels).long(),
        task=task,
        scores={"fine": torch.from_numpy(score), "gappy": torch.from_numpy(gappy)},
        groups={"site": torch.from_numpy(rng.integers(-1, 3, n))},
        clusters=torch.from_numpy(rng.integers(0, 24, n)) if kind == "clustered" else None,
        answers_only=kind == "answers",
    )


def shifts_of(store, rng):
    """Two shifts at two severities: more and more noise, the same rows."""
    out = []
    for shift in ("blur", "noise"):
        for severity in (2.0, 4.0):
            noise = np.round(severity * rng.normal(size=tuple(store.logits.shape)) * 64) / 128
            logits = store.logits + torch.from_numpy(noise).to(store.logits.dtype)
            if store.answers_only:
                logits = torch.eye(store.num_classes)[logits.argmax(1)]
            made = dataclasses.replace(store, logits=logits)
            out.append(ConditionStore(f"{shift}@{severity}", shift, severity, severity / 10, "mm", made))
    return tuple(out)


def case(kind, seed, smooth=False):
    """Return the case of a kind, in memory of its own."""
    made = _case(kind, seed, smooth)
    return made.mapped(lambda store: dataclasses.replace(store, logits=store.logits.clone()))


@functools.cache
def _case(kind, seed, smooth):
    task, _, extra = kind.partition(" ")
    rng = np.random.default_rng([seed, KINDS.index(kind), smooth])
    store = make_store(rng, task, extra, smooth=smooth)
    reference = make_store(rng, task, extra, smooth=smooth, first=10**6)
    val = make_store(rng, task, "answers" if extra == "answers" else "", smooth=smooth)
    context = Context(Resampler(seed=seed, replicates=12), frozen=fit_frozen(val, 0.2), reference=reference)
    return Case(store, reference, shifts_of(store, rng), context, f"{kind}, seed {seed}")


def degenerate(task):
    """Return name to store: what is left when something is missing."""
    rng = np.random.default_rng(3)
    base = make_store(rng, task, "clustered")
    whole = torch.arange(N)
    labels = base.labels
    first = labels.clamp_min(0) if task == "multilabel" else labels
    hot = first * 2.0 - 1 if task == "multilabel" else torch.nn.functional.one_hot(first, TASKS[task]).float()
    put = functools.partial(dataclasses.replace, base)
    empty = base.select(whole[:0])
    return {
        "no rows": empty,
        "no rows, no patients": dataclasses.replace(empty, clusters=None),
        "one row": base.select(whole[:1]),
        "one row, no patients": dataclasses.replace(base.select(whole[:1]), clusters=None),
        "two rows": base.select(whole[:2]),
        "class 0 alone": put(labels=torch.zeros_like(labels)),
        "class 1 alone": put(labels=torch.ones_like(labels)),
        "all ties": put(logits=torch.zeros_like(base.logits), scores={name: torch.zeros(N) for name in base.scores}),
        "certain": put(logits=1000 * torch.sign(base.logits)),
        "all right": put(logits=5 * hot.float()),
        "all right, certain": put(logits=1000 * hot.float()),
        "all wrong": put(logits=-5 * hot.float()),
        "all wrong, no patients": put(logits=-1000 * hot.float(), clusters=None),
        "one patient": put(clusters=torch.zeros(N, dtype=torch.int64)),
        "nothing finite": put(
            logits=torch.full_like(base.logits, math.nan),
            scores={name: torch.full((N,), math.nan) for name in base.scores},
        ),
        "one finite": put(logits=torch.where(whole[:, None] == 3, base.logits, math.inf)),
        "no annotation": put(labels=torch.full_like(labels, -1)) if task == "multilabel" else base,
        "separated scores": put(scores={name: torch.full((N,), 50.0) for name in base.scores}),
    }


def ask(name, made):
    """Return (target, scorer, shift) to estimate."""
    metric = METRICS.get(name)()
    context = made.context
    if metric.on == "labels":
        if made.store.answers_only and not metric.from_answers:
            return {}
        values = metric.compute(made.store, context)
    elif metric.on == "ood":
        values = metric.compute(dataclasses.replace(made.store, labels=None), context)
    elif metric.on == "groups":
        if made.store.answers_only and not metric.from_answers:
            return {}
        values = metric.compute(made.store, made.store.groups["site"], ("a", "b", "c"), context)
    else:
        if made.store.answers_only and not metric.from_answers:
            return {}
        shifted = made.shifted
        if metric.on == "attacks":
            shifted = tuple(dataclasses.replace(item, kind="attack", amount=item.severity) for item in shifted)
        values = metric.compute(Conditions(made.store, shifted), context)
    out = {(value.target, value.scorer, value.shift): value.estimate for value in values}
    assert len(out) == len(values), "two values have one place"
    assert {value.metric for value in values} <= {name}
    return out


def points(name, made):
    """Return place to value, by the fast way where the metric has one."""
    metric = METRICS.get(name)()
    if metric.on in ("groups", "conditions", "attacks"):
        return {place: estimate.value for place, estimate in ask(name, made).items()}
    if made.store.answers_only and not metric.from_answers:
        return {}
    store = dataclasses.replace(made.store, labels=None) if metric.on == "ood" else made.store
    return dict(metric.point(store, made.context))


def statistics(name, made):
    """Return target to statistic of a metric of labelled stores, else nothing."""
    metric = METRICS.get(name)()
    if metric.on != "labels" or (made.store.answers_only and not metric.from_answers):
        return {}
    return dict(metric.statistics(made.store, made.context))


def near(a, b, tolerance):
    return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def agree(first, second, tolerance):
    assert first.keys() == second.keys()
    for place, value in first.items():
        assert near(value, second[place], tolerance), (place, value, second[place])


def agree_estimates(first, second, tolerance):
    assert first.keys() == second.keys()
    for place, a in first.items():
        b = second[place]
        for part in ("value", "low", "high", "effective_n"):
            assert near(getattr(a, part), getattr(b, part), tolerance), (place, part, a, b)
        assert (a.n, a.n_units, a.reason) == (b.n, b.n_units, b.reason), place
