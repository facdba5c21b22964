"""``robustlab list``: what is registered."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from robustlab.core.registry import Registry

KINDS = ("corruptions", "combinators", "attacks", "suites", "detectors", "defenses", "metrics")


def list_(
    kind: Annotated[str, typer.Argument(help=f"One of: {', '.join(KINDS)}.")] = "corruptions",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List corruptions, attacks, suites, detectors, defenses or metrics.

    Example: robustlab list corruptions --json
    """
    from robustlab.core.errors import UnknownNameError
    from robustlab.core.registry import REGISTRIES

    singular = kind.removesuffix("s")
    if singular not in REGISTRIES:
        raise UnknownNameError("robustlab list", f"one of {', '.join(KINDS)}", repr(kind), "Check the spelling.")
    entries = entries_of(REGISTRIES[singular])
    if as_json:
        typer.echo(json.dumps(entries, indent=2))
        return
    table = Table("name", "severity 1 to 5", "about")
    for entry in entries:
        table.add_row(entry["name"], entry["levels"], entry["about"])
    Console().print(table)


def entries_of(registry: Registry[Any]) -> list[dict[str, str]]:
    """Return name, levels and first docstring line of every member, and of plugins that failed to load."""
    entries = []
    for name, item in registry.items():
        about = (getattr(item, "__doc__", None) or "").strip().splitlines()
        entries.append({"name": name, "levels": _levels(item), "about": about[0] if about else ""})
    entries += [
        {"name": name, "levels": "", "about": f"failed to load: {why}"} for name, why in registry.failures.items()
    ]
    return entries


def _levels(item: Any) -> str:
    from robustlab.core.corruption import Corruption

    if not (isinstance(item, type) and issubclass(item, Corruption)):
        return ""
    parts = [
        f"{name} {', '.join(f'{value:g}' for value in levels.values)} {levels.unit}"
        for name, levels in item().levels().items()
    ]
    return "; ".join(parts)
