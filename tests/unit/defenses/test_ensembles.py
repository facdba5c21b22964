"""Deep ensembles: the mean, the disagreement, training, saving."""

import math

import pytest
import torch
from torch import nn

from defenses import DeepEnsemble, Energy
from defenses.ensembles import pool
from robustlab.core.errors import ConfigError
from robustlab.core.model import wrap
from robustlab.core.rng import SampleRng
from robustlab.train import seeded_init


def member_logits(members=3, count=20, classes=4):
    return SampleRng.make(0, "members", torch.arange(members)).normal("z", (count, classes)) * 2


def test_logits_are_the_log_of_the_mean_probability():
    logits = member_logits()
    pooled, members, information = pool(logits, "multiclass")
    p = logits.double().softmax(-1)
    assert torch.allclose(pooled.double().exp(), p.mean(0), atol=1e-6)
    assert torch.allclose(members.double().exp(), p, atol=1e-6)
    entropy = torch.special.entr(p.mean(0)).sum(-1) - torch.special.entr(p).sum(-1).mean(0)
    assert torch.allclose(information.double(), entropy, atol=1e-6)
    assert information.min() > 0


def test_multilabel_logits_are_the_logit_of_the_mean_sigmoid():
    logits = member_logits()
    pooled, members, information = pool(logits, "multilabel")
    p = logits.double().sigmoid()
    mean = p.mean(0)
    assert torch.allclose(pooled.double(), torch.logit(mean), atol=1e-5)
    assert torch.allclose(members.double().exp(), p, atol=1e-6)

    def entropy(q):
        return torch.special.entr(q) + torch.special.entr(1 - q)

    assert torch.allclose(information.double(), (entropy(mean) - entropy(p).mean(0)).sum(-1), atol=1e-6)


def test_saturated_members_stay_finite_and_their_disagreement_is_log_two():
    logits = torch.tensor([[[500.0, -500.0]], [[-500.0, 500.0]]])
    for task in ("binary", "multilabel"):
        pooled, _, information = pool(logits, task)
        assert torch.isfinite(pooled).all()
        assert information.item() == pytest.approx(math.log(2) * (2 if task == "multilabel" else 1), rel=1e-6)
    same = logits[:1].expand(2, -1, -1)
    assert pool(same, "binary")[2].item() == 0


def test_given_members_are_pooled_and_energy_is_undefined(build):
    members = [seeded_init(build, seed).eval() for seed in range(3)]
    ensemble = DeepEnsemble(members)
    images = SampleRng.make(0, "x", torch.arange(10)).uniform("x", (1, 6, 6))
    outputs = ensemble(images)
    with torch.no_grad():
        mean = torch.stack([net(images).softmax(1) for net in members]).mean(0)
    assert torch.allclose(outputs.logits.exp(), mean, atol=1e-6)
    assert outputs.members.shape == (3, 10, 4)
    assert set(outputs.scores) == {"mutual-information"}
    assert "offset" in Energy().skip_reason(ensemble)


def test_members_that_do_not_fit_together_are_refused(build):
    with pytest.raises(ConfigError, match="at least one member"):
        DeepEnsemble([])
    with pytest.raises(ConfigError, match="members of one task"):
        DeepEnsemble([wrap(build(), task="multilabel"), wrap(build(), task="multiclass")])
    odd = DeepEnsemble([build().eval(), nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).eval()])
    with pytest.raises(ConfigError, match="4 classes"):
        odd(torch.zeros(2, 1, 6, 6))


def test_training_beats_its_members_and_repeats(build, source, tmp_path):
    train, val, test = source(200), source(100, seed=1), source(400, seed=2)
    state = torch.get_rng_state()

    def make(**options):
        return DeepEnsemble.train(
            build, train, val, epochs=6, size=3, batch_size=32, lr=1e-2, progress=False, **options
        )

    ensemble = make()
    assert torch.equal(torch.get_rng_state(), state)
    images, labels = test.pixels(range(400)), test.info.labels
    outputs = ensemble(images)

    def nll(log_p):
        return -log_p.gather(1, labels[:, None]).mean().item()

    each = [nll(log_p) for log_p in outputs.members]
    assert len({round(value, 6) for value in each}) == 3, "members differ"
    assert nll(outputs.logits) < sum(each) / 3
    assert nll(outputs.logits) < math.log(4) - 0.1
    assert torch.equal(make(checkpoint=tmp_path)(images).logits, outputs.logits)
    assert not torch.equal(make(seed=1)(images).logits, outputs.logits)
    assert [len(result.history) for result in ensemble.history] == [6, 6, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["member-0", "member-1", "member-2"]
    assert torch.equal(ensemble.fit(train, val)(images).logits, outputs.logits), "fitting again starts afresh"
    with pytest.raises(ConfigError, match="training data"):
        ensemble.fit(None, val)
    with pytest.raises(ConfigError, match=r"DeepEnsemble\.train"):
        DeepEnsemble([build()]).fit(train, val)


def test_loading_gives_the_same_bits(build, source, tmp_path):
    ensemble = DeepEnsemble([seeded_init(build, seed).eval() for seed in range(3)])
    images = source(20).pixels(range(20))
    before = ensemble(images)
    ensemble.save(tmp_path)
    state = torch.get_rng_state()
    loaded = DeepEnsemble.load(tmp_path, build=build)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loaded(images).logits, before.logits)
    assert loaded.fingerprint() == ensemble.fingerprint()
