"""The public names are a promise: this list fails when one disappears or appears unannounced."""

import importlib
import inspect
import json
from pathlib import Path

import pytest

SURFACE = json.loads((Path(__file__).parent / "api_surface.json").read_text())


@pytest.mark.parametrize("module", sorted(SURFACE["modules"]))
def test_public_names(module):
    assert sorted(importlib.import_module(module).__all__) == SURFACE["modules"][module]


@pytest.mark.parametrize("kind", sorted(SURFACE["registries"]))
def test_registered_names(kind):
    from robustlab.core.registry import REGISTRIES

    names = REGISTRIES[kind].names()
    have = {name for name in names if name.startswith("ref:") or not (":" in name or name.startswith("test-"))}
    assert sorted(have) == SURFACE["registries"][kind]


def test_lazy_names_are_the_public_names():
    import robustlab

    assert set(robustlab._WHERE) | {"__version__"} == set(robustlab.__all__)


def test_every_public_name_resolves_and_is_documented():
    for module in SURFACE["modules"]:
        loaded = importlib.import_module(module)
        for name in loaded.__all__:
            value = getattr(loaded, name)
            if inspect.isclass(value) or inspect.isroutine(value):
                assert value.__doc__, f"{module}.{name} has no docstring"
