"""What scoring holds: nothing derived outlives its condition, weights are drawn once, samples x replicates nowhere."""

import importlib
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustlab.core.registry import METRICS
from robustlab.data import load_data
from robustlab.evaluate.plan import CLEAN, Condition
from robustlab.evaluate.score import Subject, condition_rows, worst_rows
from robustlab.metrics import Context, PredictionStore, Resampler, compute, fit_frozen, resample, stats

SUBJECT = Subject("m", "d")
BOOTSTRAPPED = ["sensitivity-at-95-specificity", "risk-at-coverage"]  # neither is smooth in the weights

bootstrapping = importlib.import_module("robustlab.metrics.stats.bootstrap")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive after every operation."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                del storage
        self.live = {key: item for key, item in self.live.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def store_of(count, classes=2, seed=0, harm=0.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    logits = torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), labels] += 1.5 - harm
    task = "binary" if classes == 2 else "multiclass"
    return PredictionStore(torch.arange(count) * 7919, logits, labels, task, {"energy": -logits.logsumexp(1)})


def scored(stores, context, metrics=None):
    """Return the rows of the conditions ``stores``, the first one being clean."""
    images = np.zeros((len(stores[0]), 2, 2), dtype=np.uint8)
    source = load_data(images, labels=stores[0].labels.numpy())
    places = [CLEAN] + [Condition(f"s@{i}", "corruption", "s", float(i)) for i in range(1, len(stores))]
    by_key = {place.key: store for place, store in zip(places, stores, strict=True)}
    rows = []
    for place in places:
        rows += condition_rows(SUBJECT, place, by_key[place.key], stores[0], context, metrics, source, ())
    return rows + worst_rows(SUBJECT, places[1:], by_key, context, "worst")


def context_of(replicates=100):
    return Context(Resampler(replicates=replicates), fit_frozen(store_of(300, seed=9), 0.1, "energy"))


def derived(store):
    """Return the names of what a store keeps beside its fields."""
    return set(vars(store)) - {field.name for field in fields(store)}


def test_nothing_derived_outlives_the_scoring_of_its_condition():
    stores = [store_of(200, seed=i, harm=0.3 * i) for i in range(3)]
    assert len(scored(stores, context_of())) > 30
    assert [derived(store) for store in stores[1:]] == [set(), set()]
    assert derived(stores[0]) <= {"keys", "predicted", "finite"}


def test_the_default_set_draws_no_weights(monkeypatch):
    monkeypatch.setattr(Resampler, "_draw", lambda *_: pytest.fail("a bootstrap"))
    for classes in (2, 4):
        assert len(scored([store_of(200, classes, seed=i) for i in range(2)], context_of())) > 20


def test_weights_are_drawn_once_for_all_metrics_and_conditions(monkeypatch):
    drawn = []
    plain = Resampler._draw

    def counted(self, units, stream, start, count):
        drawn.append((stream, start))
        return plain(self, units, stream, start, count)

    monkeypatch.setattr(Resampler, "_draw", counted)
    monkeypatch.setattr(resample, "_WHOLE", 0)
    scored([store_of(200, seed=i) for i in range(3)], context_of(replicates=120), BOOTSTRAPPED)
    assert drawn == [("side 0", 0), ("side 0", 50), ("side 0", 100)]


def test_scoring_needs_no_array_of_samples_by_replicates(monkeypatch):
    """A sample more takes less than 600 bytes; in one float64 array of samples by 200 replicates it takes 1,600."""
    monkeypatch.setattr(resample, "_CHUNK", 1 << 17)
    monkeypatch.setattr(resample, "_ROWS", 1 << 9)
    peaks = []
    for count in (2000, 6000):
        stores, context = [store_of(count), store_of(count, seed=1, harm=0.5)], context_of(200)
        with LiveBytes() as live:
            scored(stores, context, ["accuracy", "auroc", "ece", *BOOTSTRAPPED])
        peaks.append(live.peak)
    assert 0 < peaks[1] - peaks[0] < 600 * 4000
    assert peaks[1] < 8 * resample._CHUNK * 8 + 600 * 6000


def test_many_classes_are_worked_on_in_blocks_of_rows_with_the_same_result(monkeypatch):
    whole, context = store_of(300, classes=40), context_of(60)
    blocks = replace(whole)
    names = [name for name, metric in METRICS.items() if metric.on == "labels"]
    expected = [str(value) for value in compute(whole, context, names)]  # NaN is not equal to itself
    assert "probs" in derived(whole)
    monkeypatch.setattr(bootstrapping, "_DENSE", 40 * 7)  # seven rows
    assert [str(value) for value in compute(blocks, context, names)] == expected
    assert not {"log_probs", "probs", "log_odds"} & derived(blocks)


def test_probabilities_of_many_classes_are_never_whole(monkeypatch):
    monkeypatch.setattr(bootstrapping, "_DENSE", 1 << 14)
    store, context = store_of(8000, classes=200), context_of(20)
    dense = len(store) * 200 * 8
    with LiveBytes() as live:
        compute(store, context, ["nll", "brier", "ece", "silent-failure-rate", "mean-entropy"])
    assert live.peak < dense


@pytest.mark.parametrize("classes", [2, 5])
def test_the_drop_of_many_units_needs_no_replicates(classes, monkeypatch):
    """The bootstrap only ever decided whether all weights of a replicate were 0."""
    clean, shifted = store_of(400, classes), store_of(400, classes, seed=1, harm=0.8)
    found = stats.paired_difference(shifted, clean, "accuracy", context_of(200))
    monkeypatch.setattr(stats, "FEW_CLUSTERS", 10**9)
    assert stats.paired_difference(shifted, clean, "accuracy", context_of(200)) == found
