"""Temperature scaling: what it changes, what it leaves, and what it refuses."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from defenses import DeepEnsemble, TemperatureScaling
from defenses.recalibration import fit_temperature
from robustlab.core.errors import ConfigError, DataFileError, LabelError, NotFittedError
from robustlab.core.model import wrap
from robustlab.core.shift import ShiftContext
from robustlab.train import fit, seeded_init


@pytest.fixture
def overfitted(build, source):
    model = wrap(seeded_init(build, 0), task="multiclass", mean=0.5, std=0.25, num_classes=4)
    fit(model, source(80), epochs=30, batch_size=16, lr=1e-2, weight_decay=0.0, progress=False)
    return model


def nll(model, data):
    return F.cross_entropy(model(data.pixels(range(len(data)))).logits, data.info.labels).item()


def test_lowers_the_loss_of_an_overconfident_model_and_keeps_its_answers(overfitted, source):
    val, test = source(300, seed=1), source(300, seed=2)
    defense = TemperatureScaling(overfitted).fit(None, val)
    assert defense.temperature > 1.5
    assert nll(defense, val) < nll(overfitted, val) - 0.05
    assert nll(defense, test) < nll(overfitted, test) - 0.05
    images = test.pixels(range(300))
    before, after = overfitted(images), defense(images)
    assert torch.equal(before.logits.argmax(1), after.logits.argmax(1))
    assert torch.equal(after.logits, before.logits / defense.temperature)
    assert (defense.task, defense.num_classes, defense.has_offset) == ("multiclass", 4, True)


def test_fitting_again_forgets_the_first_fit(overfitted, source):
    first, second = source(300, seed=1), source(200, seed=3)
    twice = TemperatureScaling(overfitted).fit(None, first).fit(None, second)
    assert twice.temperature == TemperatureScaling(overfitted).fit(None, second).temperature


def test_multilabel_outputs_keep_their_task(build, source):
    data = source(300, seed=1, task="multilabel")
    model = wrap(seeded_init(build, 0), task="multilabel", output="logits")
    fit(model, source(80, task="multilabel"), epochs=20, batch_size=16, lr=1e-2, progress=False)
    defense = TemperatureScaling(model).fit(None, data)
    images = data.pixels(range(300))
    assert defense(images).task == "multilabel"

    def loss(logits):
        return F.binary_cross_entropy_with_logits(logits, data.info.labels.float()).item()

    assert loss(defense(images).logits) < loss(model(images).logits)


def test_is_refused_before_it_is_fitted_and_without_validation_data(overfitted, source, tmp_path):
    defense = TemperatureScaling(overfitted)
    with pytest.raises(NotFittedError, match="a fitted temperature"):
        defense(torch.zeros(2, 1, 6, 6))
    with pytest.raises(NotFittedError, match="a fitted temperature"):
        defense.save(tmp_path)
    with pytest.raises(ConfigError, match="clean validation data"):
        defense.fit(source(20), None)
    with pytest.raises(LabelError, match="labelled validation data"):
        defense.fit(None, source(20, labelled=False))
    with pytest.raises(ConfigError, match="positive temperature"):
        TemperatureScaling(overfitted, temperature=0.0)


def test_loading_gives_the_same_bits_and_refuses_another_network(overfitted, build, source, tmp_path):
    defense = TemperatureScaling(overfitted).fit(None, source(300, seed=1))
    defense.save(tmp_path / "t")
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["defense.json", "weights.safetensors"]
    fresh = wrap(seeded_init(build, 5).eval(), task="multiclass", mean=0.5, std=0.25)
    loaded = TemperatureScaling.load(tmp_path / "t", model=fresh)
    images = source(50, seed=2).pixels(range(50))
    assert loaded.temperature == defense.temperature
    assert torch.equal(loaded(images).logits, defense(images).logits)
    with pytest.raises(ConfigError, match="mean="):
        TemperatureScaling.load(tmp_path / "t", model=wrap(build(), task="multiclass", mean=0.4, std=0.25))
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 4))
    with pytest.raises(ConfigError, match="other parameters"):
        TemperatureScaling.load(tmp_path / "t", model=wrap(other, task="multiclass", mean=0.5, std=0.25))
    with pytest.raises(ConfigError, match="defence 'deep-ensemble'"):
        DeepEnsemble.load(tmp_path / "t", build=build)
    (tmp_path / "t" / "weights.safetensors").write_bytes(b"not weights")
    with pytest.raises(DataFileError, match="weights of the defence"):
        TemperatureScaling.load(tmp_path / "t", model=fresh)
    with pytest.raises(DataFileError, match="a folder written by"):
        TemperatureScaling.load(tmp_path / "nowhere", model=fresh)


@pytest.mark.parametrize("name", ["weights.safetensors", "defense.json"])
def test_a_save_that_is_cut_short_is_not_taken_for_a_whole_one(name, overfitted, build, tmp_path, monkeypatch):
    defense = TemperatureScaling(overfitted, temperature=2.0)
    defense.save(tmp_path)
    replace = Path.replace

    def killed(self, target):
        if Path(target).name == name:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        TemperatureScaling(overfitted, temperature=3.0).save(tmp_path)
    monkeypatch.undo()
    fresh = wrap(build().eval(), task="multiclass", mean=0.5, std=0.25)
    with pytest.raises(DataFileError, match="a folder written by"):
        TemperatureScaling.load(tmp_path, model=fresh)
    TemperatureScaling(overfitted, temperature=3.0).save(tmp_path)
    assert TemperatureScaling.load(tmp_path, model=fresh).temperature == 3.0


def test_an_attack_sees_through_it(overfitted, source):
    from corruptions.adversarial import PGD

    batch = source(40, seed=4).read(range(40))
    eps = 0.02
    plain = PGD(eps=(eps,)).run(batch, ShiftContext(model=overfitted), eps=eps)
    scaled = PGD(eps=(eps,)).run(batch, ShiftContext(model=TemperatureScaling(overfitted, temperature=3.0)), eps=eps)
    assert scaled.success.sum() >= plain.success.sum() - 1
    assert plain.success.sum() > 5


@pytest.mark.parametrize("scale", [0.05, 0.3, 3.0, 33.0, 100.0])
def test_known_scales_are_found(scale):
    logits = 4 * torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(1)).squeeze(1)
    assert fit_temperature(logits * scale, labels, "multiclass") == pytest.approx(scale, rel=0.1)


def test_perfect_answers_end_at_the_bracket_and_bad_rows_are_left_out():
    logits = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    labels = torch.tensor([0, 1, 0])
    assert fit_temperature(logits, labels, "binary") == pytest.approx(0.0024787, rel=1e-3)
    assert fit_temperature(-logits, labels, "binary") == pytest.approx(403.43, rel=1e-3)
    mixed = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [float("nan"), 0.0]])
    answer = fit_temperature(mixed, torch.tensor([0, 0, 1, 1]), "binary")
    assert answer == pytest.approx(2.0 / torch.log(torch.tensor(2.0)).item(), rel=1e-7)
    with pytest.raises(LabelError, match="finite logits"):
        fit_temperature(mixed[3:], torch.tensor([1]), "binary")
    with pytest.raises(LabelError, match="labels from 0 to 1"):
        fit_temperature(logits, labels + 1, "binary")
