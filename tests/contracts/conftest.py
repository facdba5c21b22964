import os
import subprocess
import sys
from pathlib import Path

import pytest

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
