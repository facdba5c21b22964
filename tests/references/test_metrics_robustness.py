"""Robustness, groups and patients against scikit-learn, SciPy, pandas and statsmodels."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.special import expit, logit
from scipy.stats import permutation_test
from sklearn import metrics as sk

from robustlab.core.registry import METRICS
from robustlab.metrics import Context, Estimate, Frozen, PredictionStore, Resampler, wilson
from robustlab.metrics.base import Conditions, ConditionStore
from robustlab.metrics.groups import (
    AccuracyGap,
    DemographicParityDifference,
    EqualisedOddsDifference,
    WorstGroupAccuracy,
)
from robustlab.metrics.patients import aggregate_patients
from robustlab.metrics.relative_robustness import (
    condition_errors,
    corruption_error,
    effective_robustness,
    errors_over_baseline,
    relative_corruption_error,
)

KINDS = ("random", "tied", "saturated")
SEVERITIES = (1.0, 2.0, 3.0, 4.0, 5.0)
SHIFTS = ("blur", "noise", "contrast")


def scores(rng, labels, kind, noise):
    z = rng.normal(size=labels.shape) + 1.2 * (2 * labels - 1) + noise * rng.normal(size=labels.shape)
    return {"random": z, "tied": z.round(), "saturated": 40 * z}[kind]


def sweep(task, kind, n=150, seed=0):
    """Return (conditions, labels, {key: probabilities (N, C)})."""
    rng = np.random.default_rng(seed)
    if task == "multiclass":
        labels = rng.choice(4, n, p=(0.5, 0.3, 0.15, 0.05))
        truth = np.eye(4)[labels]
    elif task == "multilabel":
        labels = truth = (rng.random((n, 3)) < (0.5, 0.3, 0.15)).astype(int)
    else:
        labels = (rng.random(n) < 0.3).astype(int)
        truth = labels[:, None]

    def store(noise):
        z = torch.from_numpy(scores(rng, truth, kind, noise))
        if task == "binary":
            z = torch.cat([torch.zeros_like(z), z], 1)
        return PredictionStore(torch.arange(n), z, torch.from_numpy(labels).long(), task)

    clean = store(0.0)
    shifted = tuple(
        ConditionStore(f"{shift}@{severity:g}", shift, severity, math.nan, "", store(level * severity))
        for level, shift in enumerate(SHIFTS, 1)
        for severity in SEVERITIES
    )
    return Conditions(clean, shifted), labels


THRESHOLDS = {"binary": [0.37], "multilabel": [0.2, 0.5, 0.7]}


def context_for(task):
    given = THRESHOLDS.get(task)
    frozen = Frozen(thresholds=None if given is None else torch.tensor(given, dtype=torch.float64))
    return Context(Resampler(), frozen=frozen)


def balanced_error(task, store, labels):
    p = store.probs.numpy()
    if task == "multilabel":
        called = p >= np.array(THRESHOLDS[task])
        return 1 - np.mean([sk.balanced_accuracy_score(labels[:, k], called[:, k]) for k in range(labels.shape[1])])
    return 1 - sk.balanced_accuracy_score(labels, store.logits.numpy().argmax(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_balanced_errors_and_their_ratios(task, kind):
    model, labels = sweep(task, kind)
    other, other_labels = sweep(task, kind, seed=1)
    context = context_for(task)
    rows = []
    for item, rival in zip(model.shifted, other.shifted, strict=True):
        errors = balanced_error(task, item.store, labels), balanced_error(task, rival.store, other_labels)
        rows.append((item.shift, item.severity, *errors))
    table = pd.DataFrame(rows, columns=["shift", "severity", "ours", "base"])
    means = table.groupby("shift", sort=False)[["ours", "base"]].mean()
    clean, errors = condition_errors(model, context)
    base_clean, base = condition_errors(other, context)
    assert clean == pytest.approx(balanced_error(task, model.clean, labels), abs=1e-12)
    made = corruption_error(errors, base)
    assert made.mean == pytest.approx((means.ours / means.base).mean(), abs=1e-12)
    relative = relative_corruption_error(errors, base, clean=clean, baseline_clean=base_clean)
    known = (means.ours - clean) / (means.base - base_clean)
    for shift in SHIFTS:
        if shift in relative.reasons:
            assert means.base[shift] - base_clean <= 0.01
        else:
            assert relative.ratios[shift] == pytest.approx(known[shift], abs=1e-9)
    for rise, made_of in ((None, made), (base_clean, relative)):
        found = errors_over_baseline(model, context, base, baseline_clean=rise)
        for shift in SHIFTS:
            assert found[shift].value == pytest.approx(made_of.ratios[shift], abs=1e-9, nan_ok=True)
            told = made_of.reasons.get(shift, "")
            assert found[shift].reason == told
            assert bool(told) or found[shift].low < found[shift].value < found[shift].high
        assert found[""].value == pytest.approx(made_of.mean, abs=1e-9, nan_ok=True)
        assert f"mean of {len(made_of.defined)} of {len(SHIFTS)} shifts" in found[""].method or not made_of.defined
    everything = errors_over_baseline(model, context, base, baseline_clean=base_clean, minimum=-math.inf)
    assert everything[""].value == pytest.approx(known.mean(), rel=1e-9)  # as medmnistc does
    overall = {
        name: next(v for v in METRICS.get(name)().compute(model, context) if not v.shift).estimate.value
        for name in ("mean-corruption-error-balanced", "mean-corruption-error-relative-balanced")
    }
    assert list(overall.values()) == pytest.approx([means.ours.mean(), means.ours.mean() - clean], abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_area_and_errors_of_accuracy(kind):
    conditions, labels = sweep("multiclass", kind)
    accuracy = {item.key: sk.accuracy_score(labels, item.store.logits.numpy().argmax(1)) for item in conditions.shifted}
    clean = sk.accuracy_score(labels, conditions.clean.logits.numpy().argmax(1))
    for value in METRICS.get("severity-area")().compute(conditions, Context(Resampler())):
        curve = [clean, *(accuracy[f"{value.shift}@{severity:g}"] for severity in SEVERITIES)]
        assert value.estimate.value == pytest.approx(trapezoid(curve, (0, *SEVERITIES)) / 5, abs=1e-12)
    made = METRICS.get("mean-corruption-error")().compute(conditions, Context(Resampler()))
    assert made[0].estimate.value == pytest.approx(1 - np.mean(list(accuracy.values())), abs=1e-12)


def test_a_single_class_and_an_absent_one():
    conditions, labels = sweep("multiclass", "random")
    keep = torch.from_numpy(labels != 3)  # scikit-learn too takes the mean over the classes that occur
    part = Conditions(
        conditions.clean.select(keep),
        tuple(dataclasses.replace(item, store=item.store.select(keep)) for item in conditions.shifted),
    )
    clean, _ = condition_errors(part, Context(Resampler()))
    answers = part.clean.logits.numpy().argmax(1)
    with pytest.warns(UserWarning, match="y_pred contains classes"):
        assert clean == pytest.approx(1 - sk.balanced_accuracy_score(labels[keep.numpy()], answers), abs=1e-12)
    several, truth = sweep("multilabel", "random")
    truth = truth.copy()
    truth[:, 2] = 0
    store = dataclasses.replace(several.clean, labels=torch.from_numpy(truth))
    lacking = Conditions(store, ())
    ours, _ = condition_errors(lacking, context_for("multilabel"))
    # a label without positives is left out; scikit-learn would count its specificity as a balanced accuracy
    assert ours == pytest.approx(
        1
        - np.mean(
            [
                sk.balanced_accuracy_score(truth[:, k], store.probs.numpy()[:, k] >= THRESHOLDS["multilabel"][k])
                for k in range(2)
            ]
        ),
        abs=1e-12,
    )


def test_effective_robustness_and_its_fit_by_statsmodels():
    api = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 3, 15)
    y = 0.7 * x - 0.5 + 0.2 * rng.normal(size=15)
    pairs = list(zip(expit(x), expit(y), strict=True))
    fit = api.OLS(y, api.add_constant(x)).fit()
    at = logit(0.9)
    low, high = fit.get_prediction([[1.0, at]]).conf_int()[0]
    expected = float(expit(fit.predict([[1.0, at]])[0]))
    exact = Estimate(0.9, 0.9, 0.9, 10**6, 10**6, ""), Estimate(0.8, 0.8, 0.8, 10**6, 10**6, "")
    made = effective_robustness(*exact, pairs)
    assert made.value == pytest.approx(0.8 - expected, abs=1e-12)
    assert (made.low, made.high) == pytest.approx((0.8 - expit(high), 0.8 - expit(low)), abs=1e-12)
    ends = wilson(720, 900)
    wider = effective_robustness(exact[0], Estimate(0.8, *ends, 900, 900, ""), pairs)
    assert wider.high - wider.value == pytest.approx(math.hypot(made.high - made.value, ends[1] - 0.8), abs=1e-12)


def decisions(seed=0, n=300):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    z = torch.from_numpy(scores(rng, labels, "random", 0.5))
    store = PredictionStore(
        torch.arange(n), torch.stack([torch.zeros_like(z), z], 1), torch.from_numpy(labels), "binary"
    )
    frame = pd.DataFrame({"group": rng.integers(0, 3, n), "y": labels, "called": store.probs[:, 1].numpy() >= 0.37})
    return store, frame


def test_fairness_differences_by_pandas():
    store, frame = decisions()
    codes, context = torch.tensor(frame.group.to_numpy(copy=True)), context_for("binary")
    rate = frame.groupby("group").called.mean()
    made = DemographicParityDifference().difference(store, codes, "abc", context)
    assert made.estimate.value == pytest.approx(rate.max() - rate.min(), abs=1e-12)
    rates = frame.groupby(["y", "group"]).called.mean().unstack()
    made = EqualisedOddsDifference().difference(store, codes, "abc", context)
    assert made.estimate.value == pytest.approx((rates.max(axis=1) - rates.min(axis=1)).max(), abs=1e-12)


def test_permutation_null_by_scipy():
    store, frame = decisions(1, 240)
    codes = torch.tensor(frame.group.to_numpy(copy=True))
    right = (store.predicted == store.labels).numpy().astype(float)
    parts = [right[codes == group] for group in range(3)]

    def gap(*groups, axis):
        means = np.stack([group.mean(axis=axis) for group in groups])
        return means.max(0) - means.min(0)

    known = permutation_test(
        parts, gap, n_resamples=4000, alternative="greater", rng=np.random.default_rng(0), vectorized=True
    )
    made = AccuracyGap().difference(store, codes, "abc", Context(Resampler()))
    assert made.null == pytest.approx(known.null_distribution.mean(), rel=0.06)
    assert made.p == pytest.approx(known.pvalue, abs=0.06)
    worst = WorstGroupAccuracy().difference(store, codes, "abc", Context(Resampler()))
    assert worst.estimate.value == pytest.approx(min(part.mean() for part in parts), abs=1e-12)


@pytest.mark.parametrize("kind", ["random", "tied"])
def test_patients_by_pandas(kind):
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 300)
    z = torch.from_numpy(scores(rng, labels, kind, 0.0))
    store = PredictionStore(
        torch.arange(300),
        torch.stack([torch.zeros_like(z), z], 1),
        torch.from_numpy(labels),
        "binary",
        clusters=torch.from_numpy(rng.integers(0, 60, 300)),
    )
    p = pd.DataFrame({"patient": store.clusters.numpy(), "p": store.probs[:, 1].numpy(), "y": labels})
    by = p.groupby("patient")
    known = {
        "max": by.p.max(),
        "mean": by.p.mean(),
        "mean-of-top-m": by.p.apply(lambda group: group.nlargest(3).mean()),
        "noisy-or": by.p.apply(lambda group: 1 - (1 - group).prod()),
        "count": by.p.apply(lambda group: group.nlargest(3).iloc[-1] if len(group) >= 3 else 0.0),
    }
    for rule, values in known.items():
        made = aggregate_patients(store, rule)
        assert made.ids.tolist() == values.index.tolist()
        assert made.probs[:, 1].numpy() == pytest.approx(values.to_numpy(), abs=2e-7)
        assert made.labels.numpy().tolist() == by.y.max().tolist()
