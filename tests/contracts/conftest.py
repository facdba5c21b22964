import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from corruptions.adversarial import ensembles
from tests.contracts.quick import SHORT
from tests.contracts.toys import Exact, evaluate, source


@pytest.fixture(scope="session")
def exact():
    return evaluate(Exact(), source())


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    folder, root = tmp_path_factory.mktemp("elsewhere"), Path(__file__).resolve().parents[2]
    code = "import sys; from tests.contracts.toys import work_elsewhere; work_elsewhere(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "long work shows a bar and logs; it prints nothing"
    return folder


@pytest.fixture(autouse=True)
def short_ensembles(monkeypatch):
    """Ensembles take few steps here; their own tests look at those that they take by themselves."""
    for name, fields in (("APGD", {"steps": 15}), ("TargetedAPGD", {"steps": 10}), ("FAB", {"steps": 5})):
        monkeypatch.setattr(ensembles, name, functools.partial(getattr(ensembles, name), **fields))
    monkeypatch.setattr(ensembles, "Square", functools.partial(ensembles.Square, queries=SHORT["queries"]))
