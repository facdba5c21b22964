"""How far metrics lie from the reference libraries: the largest difference on five kinds of data, one row a metric.

Random, tied (logits in steps of one half), saturated (probabilities of 0 and 1), of a single class, and lacking a class
of the declared ones; 20 seeds each, 400 samples (3,000 for binned errors), two and five classes. Forecasts near an edge
of the 15 bins are left out for netcal, whose bins are closed on the other side. ``own`` marks data on which the library
raises, or says something else on purpose, as the page of validation tells; ``NaN`` that both are undefined.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax

from robustlab.core.registry import METRICS
from robustlab.metrics import Context, Frozen, PredictionStore, Resampler, bin_index

KINDS = ("random", "tied", "saturated", "single class", "class absent")
SEEDS, MANY = 20, 3000
EDGE = 1e-4  # ours takes what float32 puts 1e-6 beside an edge to be on it
CUT = 0.5
OF_TWO = {"sensitivity", "specificity", "ppv", "npv", "sensitivity-at-95-specificity", "calibration-slope",
          "calibration-intercept"}  # fmt: skip

Array = np.ndarray[Any, Any]
Reference = Callable[[PredictionStore, Array, Array, Array], float]
"""Maps store, labels, answers and float64 probabilities to the library's number."""


def make(kind: str, classes: int, seed: int, n: int) -> PredictionStore:
    """Return predictions of a kind."""
    rng = np.random.default_rng((seed, classes, n))
    held = 1 if kind == "single class" else max(2, classes - 2) if kind == "class absent" else classes
    labels = rng.choice(held, n, p=rng.dirichlet(np.full(held, 3.0)))
    labels[:held] = np.arange(held)
    logits = 1.5 * rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += 1
    if kind == "tied":
        logits = np.round(2 * logits) / 2
    if kind == "saturated":
        logits = 40 * logits
    task = "binary" if classes == 2 else "multiclass"
    return PredictionStore(torch.arange(n), torch.from_numpy(logits), torch.from_numpy(labels), task)


def ours(name: str, store: PredictionStore, target: str = "") -> float:
    """Return our number."""
    context = Context(Resampler(), Frozen(thresholds=torch.tensor([CUT], dtype=torch.float64)))
    return float(METRICS.get(name)().point(store, context).get(target, math.nan))


def away_from_edges(store: PredictionStore, *, every: bool) -> PredictionStore:
    """Return the rows none of whose looked-at probabilities lies near an edge of 15 bins, unless it is 0 or 1."""
    p = softmax(store.logits.numpy(), 1)
    seen = p if every else p[:, 1:] if p.shape[1] == 2 else p.max(1, keepdims=True)
    near = (np.abs(seen * 15 - np.round(seen * 15)) < EDGE) & (seen > 1e-12) & (seen < 1 - 1e-12)
    return store.select(torch.from_numpy(~near.any(1)))


def sklearn_rows() -> list[tuple[str, str, Reference]]:
    """Return (metric, our target, scikit-learn's number)."""
    import sklearn.metrics as sk

    def odds(store: PredictionStore, k: int) -> Array:
        return store.log_odds[:, k].numpy().round(9)  # rounding must not part what is equal

    def area(store: PredictionStore, y: Array, answer: Array, p: Array) -> float:
        del answer, p
        if store.num_classes == 2:
            return float(sk.roc_auc_score(y, odds(store, 1)))
        return float(np.mean([sk.roc_auc_score(y == k, odds(store, k)) for k in np.unique(y)]))

    def precision(store: PredictionStore, y: Array, answer: Array, p: Array) -> float:
        del answer, p
        if store.num_classes == 2:
            return float(sk.average_precision_score(y, odds(store, 1))) if y.any() else math.nan
        return float(np.mean([sk.average_precision_score(y == k, odds(store, k)) for k in np.unique(y)]))

    def at_specificity(store: PredictionStore, y: Array, answer: Array, p: Array) -> float:
        del answer, p
        if y.all() or not y.any():
            return math.nan
        fpr, tpr, _ = sk.roc_curve(y, odds(store, 1), drop_intermediate=False)
        return float(tpr[fpr <= 0.05].max())

    def rate(of: Callable[..., float], *, positive: int) -> Reference:
        def value(store: PredictionStore, y: Array, answer: Array, p: Array) -> float:
            del store, answer
            called = (p[:, 1] >= CUT).astype(int)
            return float(of(y, called, pos_label=positive, zero_division=math.nan))

        return value

    def f1(store: PredictionStore, y: Array, answer: Array, p: Array) -> float:
        if store.num_classes == 2:
            return float(sk.f1_score(y, p[:, 1] >= CUT)) if y.any() else math.nan
        return float(sk.f1_score(y, answer, labels=np.unique(y), average="macro"))

    def losses(of: Callable[..., float], **options: Any) -> Reference:
        return lambda store, y, answer, p: float(of(y, p, labels=np.arange(store.num_classes), **options))

    def kappa(weights: str | None) -> Reference:
        return lambda store, y, answer, p: float(
            sk.cohen_kappa_score(y, answer, labels=np.arange(store.num_classes), weights=weights)
        )

    return [
        ("accuracy", "", lambda store, y, answer, p: float(sk.accuracy_score(y, answer))),
        ("balanced-accuracy", "", lambda store, y, answer, p: float(sk.balanced_accuracy_score(y, answer))),
        ("sensitivity", "", rate(sk.recall_score, positive=1)),
        ("specificity", "", rate(sk.recall_score, positive=0)),
        ("ppv", "", rate(sk.precision_score, positive=1)),
        ("npv", "", rate(sk.precision_score, positive=0)),
        ("f1", "", f1),
        ("mcc", "", lambda store, y, answer, p: float(sk.matthews_corrcoef(y, answer))),
        ("kappa", "", kappa(None)),
        ("kappa-quadratic", "", kappa("quadratic")),
        ("auroc", "", area),
        ("average-precision", "", precision),
        ("sensitivity-at-95-specificity", "", at_specificity),
        ("nll", "", losses(sk.log_loss)),
        ("brier", "", losses(sk.brier_score_loss, scale_by_half=False)),
        ("failure-auroc", "", lambda store, y, answer, p: float(sk.roc_auc_score(y == answer, _surest(store)))),
    ]


def _surest(store: PredictionStore) -> Array:
    return store.log_odds.amax(1).numpy().round(9)


def other_rows() -> list[tuple[str, str, str, Reference]]:
    """Return (metric, package, name of the library, its number) of calibration."""
    import relplot
    import statsmodels.api as sm
    from calibration import utils
    from netcal.metrics import ECE, MCE

    def one_column(p: Array) -> Array:
        return p[:, 1] if p.shape[1] == 2 else p

    def classwise(store: PredictionStore, y: Array, answer: Array, p: Array) -> float:
        del store, answer
        return float(np.mean([ECE(15).measure(p[:, k], (y == k).astype(int)) for k in range(p.shape[1])]))

    def debiased(store: PredictionStore, y: Array, answer: Array, p: Array) -> float:
        seen, hit = (p[:, 1], y) if p.shape[1] == 2 else (p[np.arange(len(p)), answer], y == answer)
        index = bin_index(torch.from_numpy(seen)).numpy()
        bins = [list(zip(seen[index == m], hit[index == m].astype(int), strict=True)) for m in range(15)]
        bins = [found for found in bins if len(found) != 1]  # it divides by n - 1
        return float(utils.unbiased_square_ce(bins))

    def smooth(store: PredictionStore, y: Array, answer: Array, p: Array) -> float:
        del store
        seen, hit = (p[:, 1], y) if p.shape[1] == 2 else (p[np.arange(len(p)), answer], y == answer)
        return float(relplot.smECE(seen, hit.astype(int), eps=1e-6))

    def regression(*, slope: bool) -> Reference:
        def value(store: PredictionStore, y: Array, answer: Array, p: Array) -> float:
            del answer, p
            if y.all() or not y.any():
                return math.nan
            odds = store.log_odds[:, 1].numpy()
            if slope:
                return float(sm.GLM(y, sm.add_constant(odds), family=sm.families.Binomial()).fit(tol=1e-12).params[1])
            fit = sm.GLM(y, np.ones(len(y)), family=sm.families.Binomial(), offset=odds).fit(tol=1e-12)
            return float(fit.params[0])

        return value

    return [
        ("ece", "netcal", "netcal", lambda store, y, answer, p: float(ECE(15).measure(one_column(p), y))),
        ("mce", "netcal", "netcal", lambda store, y, answer, p: float(MCE(15).measure(one_column(p), y))),
        ("ece-classwise", "netcal", "netcal, one against the rest", classwise),
        ("ece-debiased", "uncertainty-calibration", "uncertainty-calibration", debiased),
        ("smooth-ece", "relplot", "relplot", smooth),
        ("calibration-slope", "statsmodels", "statsmodels", regression(slope=True)),
        ("calibration-intercept", "statsmodels", "statsmodels", regression(slope=False)),
    ]


def measured(name: str, target: str, theirs: Reference, kind: str, seeds: int, n: int) -> str:
    """Return the largest difference on a kind of data, in words."""
    worst, undefined, refused = -1.0, 0, 0
    for classes in (2,) if name in OF_TWO else (2, 5):
        for seed in range(seeds):
            store = make(kind, classes, seed, n)
            if name in ("ece", "mce", "ece-classwise"):
                store = away_from_edges(store, every=name == "ece-classwise")
            p = softmax(store.logits.numpy(), 1)
            y = store.labels.numpy() if store.labels is not None else np.zeros(0)
            answer = store.logits.numpy().argmax(1)
            found = ours(name, store, target)
            try:
                other = theirs(store, y, answer, p)
            except Exception:  # whatever a library raises on such data
                refused += 1
                continue
            if math.isnan(found) and math.isnan(other):
                undefined += 1
            elif math.isnan(found) or math.isnan(other):
                refused += 1
            else:
                worst = max(worst, abs(found - other))
    if worst >= 0:
        return f"{worst:.1e}" + (" (own in part)" if refused else "")
    return "own" if refused else "NaN" if undefined else "-"


def ood_row(name: str, kind: str, seeds: int) -> str:
    """Return the largest difference of an OOD metric from pytorch-ood."""
    from pytorch_ood.metrics import OODMetrics

    key = {"auroc-ood": "AUROC", "fpr95-ood-pos": "FPR95TPR"}[name]
    if kind in ("single class", "class absent"):
        return "-"
    worst = 0.0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        sides = [rng.normal(size=400), rng.normal(0.8, 1.4, 150)]
        if kind == "tied":
            sides = [np.round(2 * side) / 2 for side in sides]
        if kind == "saturated":
            sides = [np.round(expit(12 * side), 6) for side in sides]
        scores = torch.from_numpy(np.concatenate(sides))
        known = torch.cat([torch.zeros(400), -torch.ones(150)]).long()
        theirs = float(OODMetrics().update(scores, known).compute()[key])
        reference, store = (
            PredictionStore(torch.arange(len(side)), torch.zeros(len(side), 2), None, "binary",
                            scores={"s": torch.from_numpy(side)})
            for side in sides
        )  # fmt: skip
        context = Context(Resampler(), reference=reference)
        worst = max(worst, abs(METRICS.get(name)().point(store, context)["s"] - theirs))
    return f"{worst:.1e}"


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two seeds instead of 20")
    seeds = 2 if parser.parse_args().quick else SEEDS
    warnings.simplefilter("ignore")
    print(f"| metric | reference | {' | '.join(KINDS)} |\n| --- | --- |{' --- |' * len(KINDS)}")
    for name, target, theirs in sklearn_rows():
        cells = [measured(name, target, theirs, kind, seeds, 400) for kind in KINDS]
        print(f"| {name} | scikit-learn {version('scikit-learn')} | {' | '.join(cells)} |", flush=True)
    for name, package, text, theirs in other_rows():
        cells = [measured(name, "", theirs, kind, seeds, MANY) for kind in KINDS]
        print(f"| {name} | {text} {version(package)} | {' | '.join(cells)} |", flush=True)
    for name in ("auroc-ood", "fpr95-ood-pos"):
        cells = [ood_row(name, kind, seeds) for kind in KINDS]
        print(f"| {name} | pytorch-ood {version('pytorch-ood')} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
