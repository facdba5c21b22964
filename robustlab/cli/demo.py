"""``robustlab demo``: the known-answer demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("robustlab-demo"),
    seed: Annotated[int, typer.Option(help="Seed of data, training and draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON instead of the summary.")] = False,
) -> None:
    """Train and test a network on embedded data whose truth is known; no network needed, under a minute.

    Example: robustlab demo --out robustlab-demo
    """
    from robustlab.demo import all_right, write_demo

    report, page = write_demo(out, seed)
    typer.echo(report.to_json() if as_json else report.summary())
    if not as_json:
        typer.echo(f"\nReport: {page}")
    if not all_right(report):
        typer.echo("A planted fact was missed; see 'known answers' in the report.", err=True)
