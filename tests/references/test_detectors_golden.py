"""Detectors against golden vectors (numpy float64, agreed with pytorch-ood 0.4.0 to float32) and textbook formulas."""

import numpy as np
import pytest
import torch
from scipy.special import expit, logsumexp, softmax

from defenses import MSP, Energy
from robustlab.core.rng import SampleRng
from robustlab.core.types import ModelOutputs

GOLDEN = torch.tensor([[2.15, 0.15, -1.5], [0.95, 0.65, 0.45], [4.7, 1.925, 1.2]])


def test_msp_has_the_golden_probabilities():
    score = MSP().score(ModelOutputs(logits=GOLDEN.double()))
    largest = torch.sigmoid(-score)
    assert torch.allclose(-largest, torch.tensor([-0.861084, -0.426013, -0.915293], dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(
    ("temperature", "golden"), [(1.0, [-2.299563, -1.803287, -4.788512]), (2.0, [-2.999355, -2.891186, -5.406199])]
)
def test_energy_has_the_golden_values(temperature, golden):
    score = Energy(temperature=temperature).score(ModelOutputs(logits=GOLDEN.double()))
    assert torch.allclose(score, torch.tensor(golden, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "odds", "energy"),
    [(torch.float64, 1e-9, 1e-12), (torch.float32, 2e-6, 2e-5)],  # in single precision, some units of the last digit
)
def test_scores_follow_the_textbook(dtype, odds, energy):
    logits = (SampleRng.make(0, "logits", torch.arange(500)).normal("z", (7,)) * 3).to(dtype)
    z = logits.double().numpy()
    p = softmax(z, 1).max(1)
    close = np.testing.assert_allclose
    close(MSP().score(ModelOutputs(logits=logits)), np.log((1 - p) / p), rtol=0, atol=odds)
    close(Energy().score(ModelOutputs(logits=logits)), -logsumexp(z, axis=1), rtol=0, atol=energy)
    several = ModelOutputs(logits=logits, task="multilabel")
    q = expit(z).max(1)
    close(MSP().score(several), np.log((1 - q) / q), rtol=0, atol=odds)
    close(Energy().score(several), -np.log1p(np.exp(z)).sum(1), rtol=0, atol=energy)


def test_msp_ignores_the_offset_and_energy_moves_with_it():
    logits = SampleRng.make(1, "logits", torch.arange(100)).normal("z", (4,)).double()
    shifted = ModelOutputs(logits=logits - 120.0)
    plain = ModelOutputs(logits=logits)
    assert torch.allclose(MSP().score(shifted), MSP().score(plain), atol=1e-12)
    assert torch.allclose(Energy().score(shifted), Energy().score(plain) + 120.0, atol=1e-12)


def test_equal_logits_have_an_even_chance():
    score = MSP().score(ModelOutputs(logits=torch.zeros(1, 4)))
    assert score.item() == pytest.approx(np.log(3))
