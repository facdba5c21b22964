"""What all tests of promises share."""

import functools

import pytest

from corruptions.adversarial import ensembles
from tests.contracts.quick import SHORT


@pytest.fixture(autouse=True)
def short_ensembles(monkeypatch):
    """Ensembles take few steps here; their own tests look at those that they take by themselves."""
    for name, fields in (("APGD", {"steps": 15}), ("TargetedAPGD", {"steps": 10}), ("FAB", {"steps": 5})):
        monkeypatch.setattr(ensembles, name, functools.partial(getattr(ensembles, name), **fields))
    monkeypatch.setattr(ensembles, "Square", functools.partial(ensembles.Square, queries=SHORT["queries"]))
