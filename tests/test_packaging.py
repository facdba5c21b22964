"""What users import: three typed packages, no torch at import, a guard against shadowing, a wheel with all of it."""

import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=cwd or ROOT, check=False
    )


@pytest.mark.parametrize("module", ["robustlab", "robustlab.cli.main", "robustlab.core.errors"])
def test_import_brings_no_torch(module):
    done = run(
        f"""
        import sys
        import {module}
        heavy = {{"torch", "albumentations", "netcal", "timm", "pandas", "matplotlib"}} & set(sys.modules)
        print(heavy)
        raise SystemExit(bool(heavy))
        """
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_opens_no_socket():
    done = run(
        """
        import socket
        def refuse(*args, **kwargs):
            raise OSError("network touched")
        socket.socket.connect = refuse
        socket.getaddrinfo = refuse
        import robustlab, corruptions, defenses
        from robustlab.core.registry import REGISTRIES
        for registry in REGISTRIES.values():
            assert registry.names(), registry.kind
        robustlab.evaluate_under_shift
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sibling", ["corruptions", "defenses"])
def test_shadowed_sibling_is_refused(tmp_path, sibling):
    (tmp_path / f"{sibling}.py").write_text("value = 1\n")
    done = run(f"import robustlab.{sibling}", cwd=tmp_path) if _installed() else _shadow_from(tmp_path, sibling)
    assert done.returncode != 0
    assert f"robustlab: expected its own package '{sibling}'" in done.stderr


def _installed() -> bool:
    return "site-packages" in run("import robustlab; print(robustlab.__file__)", cwd=Path(sys.prefix)).stdout


def _shadow_from(folder: Path, sibling: str) -> subprocess.CompletedProcess[str]:
    return run(
        f"import sys; sys.path[:0] = [{str(folder)!r}]; sys.path.append({str(ROOT)!r}); import robustlab.{sibling}",
        cwd=folder,
    )


def test_facades_give_the_same_objects():
    import corruptions
    import defenses
    import robustlab.corruptions
    import robustlab.defenses

    assert set(robustlab.corruptions.__all__) == set(corruptions.__all__)
    assert set(robustlab.defenses.__all__) == set(defenses.__all__)
    for name in corruptions.__all__:
        assert getattr(robustlab.corruptions, name) is getattr(corruptions, name)


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree")
def test_wheel_has_three_typed_packages_and_the_template(tmp_path):
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"robustlab", "corruptions", "defenses"}
    assert {f"{top}/py.typed" for top in tops} <= set(names)
    assert any(name.startswith("robustlab/report/html/") and not name.endswith(".py") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
