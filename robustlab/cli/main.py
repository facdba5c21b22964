"""Entry point of ``robustlab``: collects the verbs and turns errors into exit codes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from robustlab import __version__
from robustlab.core.errors import RobustlabError

from . import attack, corrupt, demo, doctor, evaluate, listing, ood

app = typer.Typer(
    name="robustlab",
    help="Stress-test a torch image model: shifts, attacks, foreign inputs and calibration, with an interval on every "
    "number. Works offline; sends nothing anywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("attack")(attack.attack)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.command("evaluate")(evaluate.evaluate)
app.command("corrupt")(corrupt.corrupt)
app.command("list")(listing.list_)
app.command("ood")(ood.ood)
app.command("show")(listing.show)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"robustlab {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Stress-test a torch image model."""
    del version


def main() -> None:
    """Run the command line: exit code 0 done, 2 usage or input error, 3 incomplete."""
    try:
        app()
    except RobustlabError as error:
        typer.echo(f"robustlab: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
