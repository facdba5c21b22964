"""Every registered detector: larger means further out, one finite score a sample, no state outside itself."""

import pytest
import torch

from robustlab.core.detector import Detector, Needs
from robustlab.core.model import wrap
from robustlab.core.registry import DETECTORS
from robustlab.core.rng import SampleRng
from robustlab.core.spec import from_dict, to_dict
from robustlab.core.types import ModelOutputs

LOGITS_ONLY = [
    pytest.param(DETECTORS.get(name)(), id=name)
    for name in DETECTORS.names()
    if DETECTORS.get(name).needs <= {Needs.LOGITS, Needs.OFFSET} and not hasattr(DETECTORS.get(name), "learn")
]
TASKS = ("binary", "multiclass", "multilabel")


def outputs(count=200, task="multiclass", scale=1.0):
    """Logits with one clear answer a sample; ``scale`` 0 is a model that cannot tell."""
    classes = 2 if task == "binary" else 5
    rng = SampleRng.make(0, "logits", torch.arange(count))
    logits = rng.uniform("noise", (classes,))
    logits[torch.arange(count), rng.integers("answer", classes)] += 6.0
    return ModelOutputs(logits=logits * scale, task=task)


@pytest.mark.parametrize("detector", LOGITS_ONLY)
@pytest.mark.parametrize("task", TASKS)
def test_confident_answers_are_in_distribution(detector, task):
    inside, outside = detector.score(outputs(task=task)), detector.score(outputs(task=task, scale=0.1))
    assert inside.shape == (200,)
    assert inside.is_floating_point()
    assert (outside[:, None] > inside[None]).double().mean() > 0.95


@pytest.mark.parametrize("detector", LOGITS_ONLY)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_scores_belong_to_samples_and_leave_the_logits_alone(detector, task, dtype, rtol):
    whole = ModelOutputs(logits=outputs(task=task).logits.to(dtype), task=task)
    before = whole.logits.clone()
    score = detector.score(whole)
    assert torch.equal(whole.logits, before)
    assert torch.allclose(detector.score(whole.head(7)), score[:7], rtol=rtol)
    turned = ModelOutputs(logits=whole.logits.flip(0), task=task)
    assert torch.allclose(detector.score(turned), score.flip(0), rtol=rtol)


@pytest.mark.parametrize("detector", LOGITS_ONLY)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_have_no_score(detector, task, value):
    broken = outputs(count=6, task=task)
    whole = detector.score(broken)
    broken.logits[2, 1] = value
    score = detector.score(broken)
    assert torch.isnan(score).tolist() == [False, False, True, False, False, False]
    assert torch.allclose(score[3:], whole[3:], rtol=1e-12)


@pytest.mark.parametrize("detector", LOGITS_ONLY)
@pytest.mark.parametrize("task", TASKS)
def test_half_precision_logits_lose_nothing_but_their_own_rounding(detector, task):
    half = ModelOutputs(logits=outputs(task=task, scale=30).logits.half(), task=task)
    single = ModelOutputs(logits=half.logits.float(), task=task)
    assert torch.equal(detector.score(half), detector.score(single))
    double = ModelOutputs(logits=half.logits.double(), task=task)
    assert torch.allclose(detector.score(half).double(), detector.score(double).double(), rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("detector", LOGITS_ONLY)
@pytest.mark.parametrize("task", TASKS)
def test_saturated_samples_do_not_tie(detector, task):
    score = detector.score(outputs(task=task, scale=40))
    assert torch.isfinite(score).all()
    assert len(score.unique()) == len(score)


@pytest.mark.parametrize("name", DETECTORS.names())
def test_configuration_round_trips_and_fit_returns_itself(name):
    detector = DETECTORS.get(name)()
    assert isinstance(detector, Detector)
    assert from_dict(to_dict(detector)) == detector


@pytest.mark.parametrize("name", DETECTORS.names())
def test_scores_that_need_the_offset_are_undefined_for_probabilities(name):
    detector = DETECTORS.get(name)()
    net = torch.nn.Linear(3, 2).eval()
    probabilities, logits = (wrap(net, output=kind, num_classes=2) for kind in ("probs", "logits"))
    reason = detector.skip_reason(probabilities)
    assert (reason is not None and "offset" in reason) == (Needs.OFFSET in detector.needs)
    reason = detector.skip_reason(logits)
    assert (reason is not None and "members" in reason) == (Needs.MEMBERS in detector.needs)


@pytest.mark.parametrize("name", [name for name in DETECTORS.names() if Needs.FEATURES in DETECTORS.get(name).needs])
def test_features_of_a_function_are_undefined(name):
    reason = DETECTORS.get(name)().skip_reason(wrap(lambda images: images, output="logits", num_classes=2))
    assert "features" in reason
