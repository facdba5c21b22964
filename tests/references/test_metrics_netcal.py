"""Calibration errors against netcal, in float64 and away from bin edges, whose closure differs ([a, b) there)."""

import numpy as np
import pytest
import torch

from robustlab.core.registry import METRICS
from robustlab.metrics import Context, PredictionStore, Resampler
from robustlab.metrics import calibration as _  # noqa: F401 - registers the metrics

pytest.importorskip("netcal", reason="netcal is a base dependency that imports slowly")


def ours(name: str, logits: np.ndarray, labels: np.ndarray) -> float:
    store = PredictionStore(
        torch.arange(len(logits)), torch.from_numpy(logits), torch.from_numpy(labels).long(), "multiclass"
    )
    return METRICS.get(name)().point(store, Context(Resampler()))[""]


def data(classes: int, kind: str, *, every: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return float64 logits, labels and probabilities, none of which lies near an edge of 15 bins."""
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, 2 if kind == "class absent" else classes, 3000)
    labels[:classes] = np.arange(classes)  # netcal takes two observed labels for a binary task
    logits = (30 if kind == "saturated" else 1.5) * rng.normal(size=(3000, classes))
    logits[np.arange(3000), labels] += 1.5
    p = torch.softmax(torch.from_numpy(logits), 1).numpy()
    seen = p if every else p[:, 1:] if classes == 2 else p.max(1, keepdims=True)
    near = np.abs(seen * 15 - np.round(seen * 15)) < 1e-5
    keep = ~(near & (seen > 1e-3) & (seen < 1 - 1e-3)).any(1)  # 0 and 1 themselves lie in the same bins
    assert keep.mean() > 0.98
    return logits[keep], labels[keep], p[keep]


@pytest.mark.parametrize("kind", ["random", "saturated", "class absent"])
@pytest.mark.parametrize("classes", [2, 7])
def test_ece_and_mce(classes: int, kind: str) -> None:
    from netcal.metrics import ECE, MCE

    logits, labels, p = data(classes, kind)
    given = p[:, 1] if classes == 2 else p
    assert ours("ece", logits, labels) == pytest.approx(ECE(15).measure(given, labels), abs=1e-9)
    counts = np.bincount((15 * (p[:, 1] if classes == 2 else p.max(1))).astype(int).clip(0, 14))
    if counts[counts > 0].min() >= 10:  # it knows no least count
        assert ours("mce", logits, labels) == pytest.approx(MCE(15).measure(given, labels), abs=1e-9)
    else:
        assert (classes, kind) != (2, "random")


def test_class_wise_is_the_mean_of_one_against_the_rest() -> None:
    from netcal.metrics import ECE

    logits, labels, p = data(5, "random", every=True)
    theirs = np.mean([ECE(15).measure(np.ascontiguousarray(p[:, k]), (labels == k).astype(int)) for k in range(5)])
    assert ours("ece-classwise", logits, labels) == pytest.approx(theirs, abs=1e-9)


def test_equal_mass() -> None:
    from netcal.metrics import ECE

    logits, labels, p = data(4, "random")
    count = len(p) // 15 * 15  # bins of the same size have the same boundaries there
    logits, labels, p = logits[:count], labels[:count], p[:count]
    # its quantile edges are observed values: a forecast on an edge may fall on the other side
    theirs = ECE(15, equal_intervals=False).measure(p, labels)
    assert ours("ece-equal-mass", logits, labels) == pytest.approx(theirs, abs=15 / count)
