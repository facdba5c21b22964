"""Every registered defence is a model that can be dropped in, saved and loaded."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from defenses import DeepEnsemble
from robustlab.core.defense import Defense
from robustlab.core.model import wrap
from robustlab.core.registry import DEFENSES
from robustlab.core.rng import SampleRng
from robustlab.core.source import Source, SourceInfo
from robustlab.core.types import Batch, ImageSpec
from robustlab.train import seeded_init

CLASSES = {"binary": 2, "multiclass": 3, "multilabel": 3}


class Toy(Source):
    def __init__(self, count, task):
        rng = SampleRng.make(0, "toy", torch.arange(count))
        self.images = rng.uniform("x", (1, 6, 6))
        labels = rng.integers("y", 2, (3,)) if task == "multilabel" else rng.integers("y", CLASSES[task])
        self.info = SourceInfo("toy", ImageSpec(1, (6, 6), bits=None), torch.arange(count), labels, task)

    def pixels(self, index):
        return self.images[list(index)]


def network(task):
    body = [nn.Flatten(), nn.Dropout(0.3), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES[task])]
    return wrap(nn.Sequential(*body), task=task, output="logits", num_classes=CLASSES[task])


def recalibrated(name, task):
    base = network(task)
    base.modules()[0].eval()
    return DEFENSES.get(name)(base)


def ensemble(task):
    return DeepEnsemble.train(lambda: network(task), Toy(48, task), epochs=2, size=2, batch_size=16, progress=False)


# the tasks of each defence, how to make it unfitted, and how to load it: a new defence adds its line here
CLASSES_ONLY, ALL = ("binary", "multiclass"), ("binary", "multiclass", "multilabel")
RECALIBRATIONS = {
    "temperature": ALL,
    "platt": ("binary", "multilabel"),
    "vector-scaling": CLASSES_ONLY,
    "dirichlet": CLASSES_ONLY,
    "beta-calibration": ALL,
    "isotonic": ALL,
    "histogram-binning": ALL,
}
TASKS = {**RECALIBRATIONS, "deep-ensemble": ALL}
MAKE = {"deep-ensemble": ensemble, **{name: partial(recalibrated, name) for name in RECALIBRATIONS}}
LOAD = {"deep-ensemble": lambda folder, task: DeepEnsemble.load(folder, build=lambda: network(task))}
LOAD |= {
    name: lambda folder, task, name=name: DEFENSES.get(name).load(folder, model=seeded_init(lambda: network(task), 9))
    for name in RECALIBRATIONS
}


@pytest.fixture
def fitted(request):
    name, task = request.param
    return seeded_init(lambda: MAKE[name](task), 0).fit(Toy(48, task), Toy(40, task)), name, task


CASES = [(name, task) for name in DEFENSES.names() for task in TASKS.get(name, ())]
each = pytest.mark.parametrize("fitted", CASES, indirect=True, ids=["-".join(case) for case in CASES])


def test_every_registered_defence_is_covered():
    assert set(TASKS) == set(MAKE) == set(LOAD) == set(DEFENSES.names())


@each
def test_is_a_model_that_can_be_dropped_in(fitted):
    defense, name, task = fitted
    assert isinstance(defense, Defense)
    assert defense.name == name
    assert DEFENSES.get(name) is type(defense)
    batch = Toy(10, task).read(range(10))
    outputs = defense.predict(batch)
    assert outputs.logits.shape == (10, CLASSES[task])
    assert outputs.logits.dtype == torch.float32
    assert torch.isfinite(outputs.logits).all()
    assert outputs.task == defense.task == task
    assert defense.num_classes == CLASSES[task]
    assert torch.equal(defense.predict(batch).logits, outputs.logits)
    half = defense.predict(batch.select(torch.arange(5))).logits
    assert torch.allclose(half, outputs.logits[:5], atol=1e-5)


@each
def test_gradients_reach_the_input(fitted):
    defense, _, task = fitted
    batch = Toy(10, task).read(range(10))
    images = batch.images.clone().requires_grad_(True)
    moved = Batch(images=images, labels=batch.labels, ids=batch.ids)
    with defense.evaluating():
        (gradient,) = torch.autograd.grad(defense.for_attack().outputs(moved).logits.square().sum(), images)
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).any()


@each
def test_prediction_restores_every_training_flag_and_global_state(fitted):
    defense, _, task = fitted
    batch = Toy(10, task).read(range(10))
    before = defense.predict(batch).logits
    modules = [module for root in defense.modules() for module in root.modules()]
    for i, module in enumerate(modules):
        module.training = i % 2 == 0
    flags = [module.training for module in modules]
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = defense.predict(batch).logits
    assert [module.training for module in modules] == flags
    assert torch.equal(after, before)
    assert torch.equal(torch.get_rng_state(), state)


@each
def test_saving_and_loading_give_the_same_bits(fitted, tmp_path):
    defense, name, task = fitted
    batch = Toy(10, task).read(range(10))
    before = defense.predict(batch)
    folder = defense.save(tmp_path / "saved")
    defense.save(tmp_path / "saved")
    assert sorted(path.name for path in folder.iterdir()) == ["defense.json", "weights.safetensors"]
    loaded = LOAD[name](folder, task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = loaded.predict(batch)
    assert torch.equal(after.logits, before.logits)
    assert all(torch.equal(after.scores[key], value) for key, value in before.scores.items())
    assert loaded.task == task


@each
def test_fitting_leaves_global_state_alone(fitted):
    defense, _, task = fitted
    state = torch.get_rng_state()
    defense.fit(Toy(48, task), Toy(40, task))
    assert torch.equal(torch.get_rng_state(), state)
