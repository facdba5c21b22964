"""Imports run one way: core <- metrics <- data, train <- corruptions, defenses; report on core, metrics; cli on top."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MAY_IMPORT = {
    "robustlab.core": {"robustlab.core"},
    "robustlab.metrics": {"robustlab.core", "robustlab.metrics"},
    "robustlab.data": {"robustlab.core", "robustlab.metrics", "robustlab.data"},
    "robustlab.train": {"robustlab.core", "robustlab.metrics", "robustlab.data", "robustlab.train"},
    "corruptions": {"robustlab.core", "robustlab.metrics", "robustlab.data", "robustlab.train", "corruptions"},
    "defenses": {"robustlab.core", "robustlab.metrics", "robustlab.data", "robustlab.train", "defenses"},
    "robustlab.report": {"robustlab.core", "robustlab.metrics", "robustlab.report"},
    "robustlab.evaluate": {
        "robustlab.core",
        "robustlab.metrics",
        "robustlab.data",
        "robustlab.train",
        "robustlab.report",
        "robustlab.evaluate",
        "corruptions",
        "defenses",
    },
}
CORE_OUTSIDE = {"torch", "numpy", "safetensors"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Return (absolute module, only for types) of every import of a file."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in typing_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "robustlab" else [module]
            found += [(name, id(node) in typing_only) for name in names]
    return found


def layer(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] in ("corruptions", "defenses"):
        return parts[0]
    if module == "robustlab.__version__":
        return None
    return ".".join(parts[:2]) if parts[0] == "robustlab" else None


FILES = sorted(
    path
    for top in ("robustlab", "corruptions", "defenses")
    for path in (ROOT / top).rglob("*.py")
    if layer(".".join(path.relative_to(ROOT).with_suffix("").parts)) in MAY_IMPORT
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    wrong = [
        module
        for module, typing_only in imports(path)
        if (target := layer(module)) is not None
        and target not in MAY_IMPORT[own]
        and not (typing_only and own == "robustlab.core" and target == "robustlab.metrics")
    ]
    assert not wrong, f"{path.name} ({own}) may not import {wrong}"


def test_core_imports_only_torch_numpy_and_safetensors():
    import sys

    for path in (ROOT / "robustlab" / "core").glob("*.py"):
        tops = {module.split(".")[0] for module, _ in imports(path)}
        outside = tops - set(sys.stdlib_module_names) - {"robustlab", "__future__"}
        assert outside <= CORE_OUTSIDE, f"{path.name} imports {outside - CORE_OUTSIDE}"


def test_every_module_and_class_is_small():
    for top in ("robustlab", "corruptions", "defenses"):
        for path in (ROOT / top).rglob("*.py"):
            source = path.read_text()
            assert source.count("\n") <= 500, f"{path} has {source.count(chr(10))} lines"
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.ClassDef):
                    assert node.end_lineno - node.lineno <= 200, f"{path}: {node.name}"
