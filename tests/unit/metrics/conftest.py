from collections.abc import Callable

import numpy as np
import pytest
import torch

from robustlab.metrics import PredictionStore

MakeStore = Callable[..., PredictionStore]


def _make_store(
    n: int = 200,
    classes: int = 2,
    *,
    task: str = "multiclass",
    signal: float = 1.0,
    seed: int = 0,
    per_cluster: int = 0,
) -> PredictionStore:
    rng = np.random.default_rng(seed)
    if task == "multilabel":
        labels = rng.integers(0, 2, (n, classes))
        labels[rng.random((n, classes)) < 0.1] = -1
        logits = rng.normal(size=(n, classes)) + signal * (2 * labels - 1)
    else:
        labels = rng.integers(0, classes, n)
        logits = rng.normal(size=(n, classes))
        logits[np.arange(n), labels] += signal
    ids = torch.from_numpy(rng.permutation(10 * n)[:n])
    return PredictionStore(
        ids=ids,
        logits=torch.from_numpy(logits).float(),
        labels=torch.from_numpy(labels).long(),
        task=task,
        scores={"noise": torch.from_numpy(rng.normal(size=n)), "other": torch.from_numpy(rng.normal(size=n))},
        clusters=torch.arange(n) // per_cluster if per_cluster else None,
    )


@pytest.fixture(scope="session")
def make_store() -> MakeStore:
    return _make_store
