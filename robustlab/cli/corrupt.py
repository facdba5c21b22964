"""``robustlab corrupt``: write corrupted copies of a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def corrupt(
    data: Annotated[str, typer.Argument(help="NPZ file (MedMNIST layout), image folder, or medmnist:NAME.")],
    out: Annotated[Path, typer.Argument(help="Folder to write into.")],
    shifts: Annotated[str, typer.Option(help="Suite or corruption names, comma-separated.")] = "standard",
    severities: Annotated[str, typer.Option(help="1-5 or 1,3,5.")] = "1-5",
    split: Annotated[str, typer.Option(help="Split of DATA.")] = "test",
    form: Annotated[str, typer.Option("--format", help="npz or png.")] = "npz",
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Write corrupted copies with a manifest; finished files are kept when run again.

    Example: robustlab corrupt pneumoniamnist.npz corrupted/ --shifts gaussian-noise,jpeg --severities 1,3,5
    """
    from robustlab import load_data, write_corrupted
    from robustlab.core.errors import ConfigError
    from robustlab.evaluate.plan import resolve_shifts

    from .parse import parse_severities

    if form not in ("npz", "png"):
        raise ConfigError("robustlab corrupt", "--format npz or png", repr(form), "Check the spelling.")
    source = load_data(data, split=split)
    found = resolve_shifts([part for part in shifts.split(",") if part])
    folder = write_corrupted(source, found, parse_severities(severities), out, seed=seed, format=form)  # type: ignore[arg-type]
    manifest = json.loads((folder / "manifest.json").read_text())
    if as_json:
        typer.echo(json.dumps(manifest, indent=2))
    else:
        typer.echo(f"{len(source)} images x {len(manifest['conditions'])} conditions in {folder}")
        for entry in manifest.get("skipped", []):
            typer.echo(f"  skipped {entry['shift']}: {entry['reason']}")
