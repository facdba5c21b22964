"""Every example runs, in its fast form, on the real data sets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / ".." / "shared" / "data"


TABLE = ROOT / "examples" / "attack_stochastic_defence.py"  # prints a table, and writes no report

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the real image sets (../shared/data) are not there")


def printed(example, folder, *options):
    done = subprocess.run(
        [sys.executable, str(example), "--fast", "--data", str(DATA.resolve()), *options],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", sorted(set((ROOT / "examples").glob("*.py")) - {TABLE}), ids=lambda path: path.stem)
def test_example_writes_a_report(example, tmp_path):
    assert "Silent failures" in printed(example, tmp_path, "--out", str(tmp_path / "out"))
    assert (tmp_path / "out" / "report.html").stat().st_size > 50_000


def test_a_random_defence_is_judged_on_fresh_draws(tmp_path):
    lines = printed(TABLE, tmp_path).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["no", *["pgd-linf"] * 2, *["apgd-ce-linf"] * 2]
    fresh = [float(re.search(r"fresh draws +(\d+\.\d) %", line)[1]) for line in lines]
    claims = {i: float(re.search(r"claims +(\d+\.\d) %", lines[i])[1]) for i in (1, 3)}
    assert max(fresh[1:]) < fresh[0]
    assert all(claim <= fresh[i] for i, claim in claims.items()), "lucky draws flatter the search"
    assert sum(claims.values()) < fresh[1] + fresh[3]
