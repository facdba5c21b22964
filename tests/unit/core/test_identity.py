"""The identity of a model: everything that is known to decide its answers changes it, and nothing else does."""

import copy
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defenses import DeepEnsemble, TemperatureScaling
from robustlab import wrap
from robustlab.core import identity
from robustlab.core.defense import Defense
from robustlab.core.identity import code_identity, model_identity

CODE = """
import torch
from torch import nn

class Base(nn.Module):
    def features(self, x):
        return x.mean((2, 3))

class Net(Base):
    def forward(self, x):
        return self.features(x) * 2
"""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(4, 3)
        self.register_buffer("unsaved", torch.ones(3), persistent=False)
        self.shift = torch.zeros(3)
        self.scale = 1.0
        self.names = ["a", "b"]
        self.config = {"power": 1, "deep": {"gates": (1, 2)}}
        self.table = np.arange(3.0)
        self.steps = [torch.zeros(2)]
        self.act = F.relu
        self.out = functools.partial(torch.mul, other=1)
        self.last = torch.relu
        self.kinds = {"x", "y", "z"}
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.eval()

    def forward(self, x):
        return self.head(self.drop(self.act(self.norm(self.conv(x)))).mean((2, 3)) * self.scale)


def closing_over(number):
    return lambda x: x * number


def of(net, **options):
    return model_identity(wrap(net, **{"output": "logits", "num_classes": 3} | options))


def set_weight(net):
    with torch.no_grad():
        net.head.weight[2, 1] += 1e-6


def setter(path, value):
    def change(net):
        *places, last = path.split(".")
        setattr(functools.reduce(getattr, places, net), last, value)

    return change


CHANGES = {
    "one weight": set_weight,
    "a running mean": lambda net: net.norm.running_mean.__setitem__(1, 0.5),
    "a buffer that is not saved": lambda net: net.unsaved.__setitem__(0, 2.0),
    "a tensor that is no buffer": lambda net: net.shift.__setitem__(0, 2.0),
    "a dropout rate": setter("drop.p", 0.2),
    "an epsilon of torch's own layer": setter("norm.eps", 1e-3),
    "a number": setter("scale", 1.5),
    "the kind of a number": setter("scale", 1),
    "a list of words": lambda net: net.names.append("c"),
    "a dictionary": lambda net: net.config["deep"].update(gates=(1, 3)),
    "an array": lambda net: net.table.__setitem__(1, 7.0),
    "a list of tensors": lambda net: net.steps[0].__setitem__(1, 7.0),
    "an activation": setter("act", F.gelu),
    "a built-in activation": setter("last", torch.tanh),
    "a partial function": setter("out", functools.partial(torch.mul, other=2)),
    "a set": lambda net: net.kinds.add("w"),
    "another layer": setter("drop", nn.AlphaDropout(0.1)),
    "a layer more": lambda net: net.add_module("more", nn.Identity()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_decides_answers_changes_the_identity(what):
    net, changed = Net(), Net()
    assert of(net) == of(changed) == of(copy.deepcopy(net))
    CHANGES[what](changed)
    assert of(changed.eval()) != of(net), what


@pytest.mark.parametrize(
    "options",
    [
        {"mean": 0.5, "std": 0.5},
        {"std": 0.25, "mean": 0.0},
        {"size": 32},
        {"channels": 1},
        {"bounds": (0, 255)},
        {"output": "probs"},
        {"task": "multilabel"},
        {"model_id": "2"},
    ],
)
def test_every_setting_of_wrap_is_part_of_it(options):
    assert of(Net(), **options) != of(Net())
    assert of(Net(), **options) == of(Net(), **options)


def test_what_decides_nothing_is_no_part_of_it():
    net = Net()
    before = of(net)
    net(torch.zeros(2, 3, 8, 8))
    assert of(net) == before, "running"
    assert of(net.train()) == before, "the mode, which predict sets"
    net.register_forward_hook(lambda *args: None)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    assert of(net) == before, "hooks, which the probe has to catch, and gradients"
    assert of(net, name="other") == before, "the name in reports"


def test_a_function_has_an_identity_only_if_one_is_stated():
    def answer(x):
        return x.mean((2, 3))

    assert of(answer) is None
    assert of(functools.partial(answer)) is None
    assert of(answer, model_id="1") == of(answer, model_id="1")
    assert of(answer, model_id="1") != of(answer, model_id="2")


def test_a_defence_has_the_identity_of_all_that_it_holds():
    def answer(x):
        return x.mean((2, 3))

    def held(inner, temperature=2.0):
        return model_identity(TemperatureScaling(inner, temperature=temperature))

    def stated(name):
        return wrap(answer, model_id=name, output="logits", num_classes=3)

    net, changed = wrap(Net(), num_classes=3), Net()
    changed.scale = 2.0
    assert held(net) == held(wrap(Net(), num_classes=3))
    different = [model_identity(net), held(net), held(net, 2.5), held(wrap(changed, num_classes=3))]
    different += [held(stated("1")), held(stated("2")), held(wrap(Net(), num_classes=3, mean=0.5, std=1.0))]
    different.append(model_identity(DeepEnsemble([net, wrap(changed, num_classes=3)])))
    different.append(model_identity(DeepEnsemble([wrap(changed, num_classes=3), wrap(changed, num_classes=3)])))
    assert None not in different
    assert len(set(different)) == len(different)
    assert held(wrap(answer, output="logits", num_classes=3)) is None
    assert model_identity(DeepEnsemble([net, wrap(answer, output="logits", num_classes=3)])) is None


class Sharper(Defense):
    """A defence of a user's own that does not state its number among its settings."""

    name = "test:sharper"

    def __init__(self, base, power):
        self.base, self.power, self._seen = base, power, 0
        self.task, self.num_classes = base.task, base.num_classes

    def modules(self):
        return self.base.modules()

    def settings(self):
        return {}

    def outputs(self, batch):
        self._seen += 1
        return self.base.outputs(batch)

    def fit(self, train, val):
        return self

    def save(self, folder):
        raise NotImplementedError


def test_public_attributes_of_a_defence_are_part_of_it():
    net = wrap(Net(), num_classes=3, output="logits")
    first, second = Sharper(net, 2.0), Sharper(net, 3.0)
    assert model_identity(first) != model_identity(second)
    before = model_identity(first)
    first(torch.zeros(2, 3, 8, 8))
    assert first._seen == 1
    assert model_identity(first) == before, "private notes are none of it"


def load(folder, text, name="made_for_test"):
    """Return the class Net of a file with this text, under the same module name every time."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where inspect looks for the file
    spec.loader.exec_module(module)
    return module.Net


@pytest.mark.parametrize(("old", "new"), [("* 2", "* 3"), ("x.mean((2, 3))", "x.amax((2, 3))")])
def test_the_source_of_a_class_and_of_its_bases_is_part_of_it(old, new, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "made_for_test", None)
    assert old in CODE
    first, same, other = (
        of(load(tmp_path / place, text)()) for place, text in [("a", CODE), ("b", CODE), ("c", CODE.replace(old, new))]
    )
    assert first == same, "where the file lies is no part of it"
    assert first != other


def test_a_file_that_is_edited_later_does_not_change_what_was_loaded_from_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "made_for_test", None)
    old = load(tmp_path, CODE)
    before = of(old())
    new = load(tmp_path, CODE.replace("* 2", "* 3333"))
    assert of(old()) == before
    assert of(new()) != before


PROMPT = """
import torch
from torch import nn

class Net(nn.Module):
    scale = {scale}

    @staticmethod
    def helper(x):
        return [part * {factor} for part in x.split(1)]

    @property
    def kinds(self):
        return "a" in {{"a", "b", "{kind}", "d", "e"}}

    def forward(self, x, power={power}):
        return torch.cat([(lambda y: y + {inner})(part) for part in self.helper(x)]).mean((2, 3)) ** power
"""
PLAIN = {"scale": 1, "factor": 1, "kind": "c", "power": 1, "inner": 1}


def typed(**changes):
    space = {"__name__": "__main__"}
    exec(PROMPT.format(**PLAIN | changes), space)
    return space["Net"]


@pytest.mark.parametrize("name", PLAIN)
def test_a_class_typed_into_a_prompt_is_told_by_its_compiled_code(name):
    assert of(typed()()) == of(typed()())
    assert of(typed()()) != of(typed(**{name: "z" if name == "kind" else 2})())


def test_the_identity_is_the_same_in_every_process():
    code = (
        "from tests.unit.core import test_identity as t\n"
        "print(t.of(t.Net()), t.of(t.typed()()), t.model_identity(t.TemperatureScaling(t.Net(), temperature=2.0)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3]), "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = [of(Net()), of(typed()()), model_identity(TemperatureScaling(Net(), temperature=2.0))]
    assert done.stdout.split() == here
    assert len(set(here)) == 3


def test_a_number_in_a_closure_is_part_of_a_function_that_a_module_holds():
    nets = [Net() for _ in range(3)]
    for net, number in zip(nets, (2, 2, 3), strict=True):
        net.act = closing_over(number)
    first, same, other = map(of, nets)
    assert first == same
    assert first != other


def test_library_code_is_told_by_its_version(monkeypatch):
    before = code_identity(nn.Linear)
    assert before.startswith("torch.nn.modules.linear.Linear ")
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert code_identity(nn.Linear) != before
    assert identity.is_library_code(TemperatureScaling)
    assert not identity.is_library_code(Net)


def test_a_traced_program_is_told_by_its_code():
    def traced(factor):
        class Line(nn.Module):
            def forward(self, x):
                return x.mean((2, 3)) * factor

        return torch.fx.symbolic_trace(Line().eval())

    assert of(traced(2.0)) == of(traced(2.0))
    assert of(traced(2.0)) != of(traced(3.0))
