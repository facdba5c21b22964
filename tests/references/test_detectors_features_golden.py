"""Detectors against golden vectors: numpy float64, agreed with pytorch-ood 0.4.0 to float32."""

import pytest
import torch

from defenses.detectors import (
    ASH,
    DICE,
    FDBD,
    GEN,
    KNN,
    MDS,
    RMD,
    SCALE,
    SHE,
    Entropy,
    GradNorm,
    KLMatching,
    MaxLogit,
    NNGuide,
    ReAct,
    Residual,
    ViM,
)
from robustlab.core.detector import Head
from robustlab.core.types import ModelOutputs


def numbers(text):
    return torch.tensor([[float(v) for v in row.split()] for row in text.strip().split("\n")], dtype=torch.float64)


HEAD = Head(numbers("1 0 .5 0\n0 1 -.5 .25\n-1 .5 0 1"), torch.tensor([0.1, 0.0, -0.1], dtype=torch.float64))
FIT = numbers("""
2 .1 .4 .3
1.5 .3 .2 .1
2.5 .2 .9 .6
1.8 .5 .1 .9
.2 2 .1 .4
.4 1.6 .3 .8
.1 2.4 .2 .1
.5 1.9 .6 .2
.1 .6 .2 2
.2 .9 .5 1.7
.3 .4 .1 2.3
.1 .8 .3 1.4
""")
LABELS = torch.arange(12) // 4
TEST = numbers("1.9 .2 .3 .4\n.6 .7 .5 .8\n3 2.8 3.2 2.9")


def outputs(features):
    return ModelOutputs(logits=features @ HEAD.weight.T + HEAD.bias, features={"penultimate": features})


GOLDEN = [
    (MaxLogit(), (-2.15, -0.95, -4.7)),
    (Entropy(), (0.464322, 1.077161, 0.343613)),
    (GEN(gamma=0.1, top=3), (2.287675, 2.574247, 2.217492)),
    (GEN(gamma=0.1, top=2), (1.60533, 1.726541, 1.520968)),
    (GradNorm(), (-2.955406, -0.481932, -13.850629)),
    (KLMatching(), (0.001261, 0.22688, 0.028233)),
    (MDS(shrinkage=0.0), (1.308567, 42.965056, 499.945569)),
    (RMD(shrinkage=0.0), (-1.37656, 38.176263, 135.897796)),
    (KNN(k=3), (0.186579, 0.506009, 0.653113)),
    (Residual(dim=2), (0.277716, 0.257974, 2.025164)),
    (ViM(dim=2), (-1.576739, -1.131847, 0.482463)),
    (ReAct(quantile=0.9), (-2.299563, -1.803287, -3.372086)),
    (DICE(sparsity=0.5), (-2.435939, -2.067238, -5.3499)),
    (ASH(percentile=0.5, variant="p"), (-2.162877, -1.859796, -4.702244)),
    (ASH(percentile=0.5, variant="b"), (-1.917745, -2.529195, -9.025006)),
    (ASH(percentile=0.5, variant="s"), (-6.520964, -6.647687, -31.456173)),
    (SCALE(percentile=0.5), (-7.027126, -5.276338, -31.456173)),
    (SHE(), (-4.07, -1.9425, -9.2775)),
    (NNGuide(k=3), (-5.816265, -3.841975, -9.953286)),
    (FDBD(), (-0.944226, -0.481309, -0.340756)),
]


@pytest.mark.parametrize(
    ("detector", "golden"), GOLDEN, ids=lambda value: repr(value) if not isinstance(value, tuple) else ""
)
def test_golden_vectors(detector, golden):
    if hasattr(detector, "fit_outputs"):
        detector.fit_outputs(outputs(FIT), LABELS, HEAD)
    score = detector.score(outputs(TEST))
    assert torch.allclose(score.double(), torch.tensor(golden, dtype=torch.float64), atol=1e-6, rtol=1e-7)


def test_learned_numbers_of_the_page():
    vim = ViM(dim=2).fit_outputs(outputs(FIT), LABELS, HEAD)
    assert vim.learned["scale"].item() == pytest.approx(2.60274, abs=1e-5)
    assert vim.learned["origin"].tolist() == pytest.approx([-0.08998, -0.014315, -0.020041, 0.017178], abs=1e-6)
    react = ReAct(quantile=0.9).fit_outputs(outputs(FIT), LABELS, HEAD)
    assert react.learned["clip"].item() == pytest.approx(2.0)
