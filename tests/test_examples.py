"""Every example runs, in its fast form, on the real data sets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / ".." / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the real image sets (../shared/data) are not there")
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_example_writes_a_report(example, tmp_path):
    done = subprocess.run(
        [sys.executable, str(example), "--fast", "--data", str(DATA.resolve()), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Silent failures" in done.stdout
    assert (tmp_path / "out" / "report.html").stat().st_size > 50_000
