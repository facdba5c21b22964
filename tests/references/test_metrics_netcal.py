"""Calibration error against netcal, in float64 and away from bin edges, whose closure differs ([a, b) there)."""

import numpy as np
import pytest
import torch

from robustlab.metrics import Context, PredictionStore, Resampler, compute

pytest.importorskip("netcal", reason="netcal is a base dependency that imports slowly")


def ours(logits: np.ndarray, labels: np.ndarray, task: str) -> float:
    store = PredictionStore(torch.arange(len(logits)), torch.from_numpy(logits), torch.from_numpy(labels).long(), task)
    (value,) = compute(store, Context(Resampler(replicates=2)), ["ece"])
    return value.estimate.value


def away_from_edges(p: np.ndarray) -> np.ndarray:
    return np.abs(p * 15 - np.round(p * 15)) > 1e-4


@pytest.mark.parametrize("classes", [2, 7])
def test_ece(classes: int) -> None:
    from netcal.metrics import ECE

    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 3000)
    logits = 1.5 * rng.normal(size=(3000, classes))
    logits[np.arange(3000), labels] += 1.5
    logits = logits.astype(np.float32)
    exact = torch.softmax(torch.from_numpy(logits).double(), 1).numpy()
    keep = away_from_edges(exact[:, 1] if classes == 2 else exact.max(1))
    assert keep.mean() > 0.99
    logits, labels, exact = logits[keep], labels[keep], exact[keep]
    theirs = ECE(15).measure(exact[:, 1] if classes == 2 else exact, labels)
    assert ours(logits, labels, "multiclass") == pytest.approx(theirs, abs=1e-9)
