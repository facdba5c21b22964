"""Guard against foreign modules that hide robustlab's sibling packages ``corruptions`` and ``defenses``."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from .core.errors import ShadowError


def check_sibling(module: ModuleType) -> None:
    """Check that ``module`` lies beside the package ``robustlab``, as in a checkout and in an installed wheel.

    Raises:
        ShadowError: Python found another module of that name first.
    """
    name = module.__name__
    expected = Path(__file__).resolve().parent.parent / name
    file = getattr(module, "__file__", None)
    if file is not None and Path(file).resolve().parent == expected:
        return
    found = file if file is not None else ", ".join(getattr(module, "__path__", ())) or "a built-in module"
    raise ShadowError(
        "robustlab",
        f"its own package {name!r} at {expected}",
        f"{found}, which comes first on sys.path",
        "Rename that folder or module, or run from another directory.",
    )
