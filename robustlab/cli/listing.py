"""``robustlab list`` and ``robustlab show``: what is registered."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

KINDS = ("corruptions", "combinators", "attacks", "suites", "detectors", "defenses", "metrics")


def list_(
    kind: Annotated[str, typer.Argument(help=f"One of: {', '.join(KINDS)}.")] = "corruptions",
    modality: Annotated[
        str | None, typer.Option(help="Only corruptions that are met in this modality, e.g. xray, mr or photo.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List corruptions, attacks, suites, detectors, defenses or metrics.

    Example: robustlab list corruptions --modality xray
    """
    from robustlab.core.errors import ConfigError, UnknownNameError
    from robustlab.core.registry import REGISTRIES
    from robustlab.evaluate.catalogue import amounts, entries_of, fits

    singular = kind.removesuffix("s")
    if singular not in REGISTRIES:
        raise UnknownNameError("robustlab list", f"one of {', '.join(KINDS)}", repr(kind), "Check the spelling.")
    if modality is not None and singular != "corruption":
        raise ConfigError("robustlab list", "--modality with corruptions only", kind, "Leave it out.")
    entries = entries_of(REGISTRIES[singular])
    if modality is not None:
        tag = _known_modality(modality, entries)
        entries = [entry for entry in entries if fits(entry, tag)]
    if as_json:
        typer.echo(json.dumps(entries, indent=2))
        return
    if singular == "corruption":
        table = Table(Column("name", no_wrap=True), "labels", "severity 1 to 5", "about")
        for entry in entries:
            levels = "; ".join(map(amounts, entry.get("parameters", ())))
            table.add_row(entry["name"], entry.get("label_safety", ""), levels, entry["about"])
    else:
        table = Table(Column("name", no_wrap=True), "about")
        for entry in entries:
            table.add_row(entry["name"], entry["about"])
    Console().print(table)


def _known_modality(given: str, entries: list[dict[str, Any]]) -> str:
    """Return the tag of a modality that robustlab, or a corruption of an installed plugin, names."""
    from robustlab.core.errors import UnknownNameError
    from robustlab.core.types import MODALITIES, like_modality, modality_tag

    tag = modality_tag(given)
    known = {
        *MODALITIES,
        *(name for entry in entries for key in ("made_for", "seen_in") for name in entry.get(key) or ()),
    }
    if tag not in known:
        hint = like_modality(given) or "Check the spelling."
        raise UnknownNameError("--modality", f"one of {', '.join(sorted(known))}", repr(given), hint.strip())
    return tag


def show(
    names: Annotated[list[str], typer.Argument(help="Registered names; 'all' for every corruption.")],
    html: Annotated[
        Path | None, typer.Option(help="Write a page with pictures of these corruptions at severities 1 to 5.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Picture file to show beside the phantom; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is known of a corruption, a suite or another registered name, in words or as a page of pictures.

    Example: robustlab show gaussian-noise stain-shift --html page.html --image slide.png
    """
    from robustlab.core.errors import ConfigError, UnknownNameError
    from robustlab.core.registry import CORRUPTIONS, REGISTRIES
    from robustlab.evaluate.catalogue import gallery, read_subject
    from robustlab.report.folder import write_file

    wanted = list(CORRUPTIONS.names()) if names == ["all"] else names
    found = {name: _found(name) for name in wanted}
    missing = [name for name, entries in found.items() if not entries]
    if missing:
        known = sorted({name for registry in REGISTRIES.values() for name in registry.names()})
        close = difflib.get_close_matches(missing[0], known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise UnknownNameError(
            "robustlab show", "a registered name", repr(missing[0]), f"{hint}'robustlab list' shows all of them."
        )
    if html is not None:
        foreign = [name for name in wanted if name not in CORRUPTIONS]
        if foreign:
            raise ConfigError("--html", "names of corruptions", ", ".join(foreign), "Leave the others out.")
        write_file(html, gallery(wanted, [read_subject(path) for path in image or ()]).encode())
        typer.echo(f"{html}: {', '.join(wanted) if len(wanted) < 4 else f'{len(wanted)} corruptions'}")
        return
    if image:
        raise ConfigError("--image", "--html beside it", "--image alone", "Add --html page.html.")
    entries = [entry for several in found.values() for entry in several]
    if as_json:
        typer.echo(json.dumps(entries, indent=2))
        return
    for entry in entries:
        _print(entry)


def _found(name: str) -> list[dict[str, Any]]:
    """Return the entries of a name in all registries."""
    from robustlab.core.registry import REGISTRIES, SUITES
    from robustlab.evaluate.catalogue import entry_of, shift_entry

    entries = []
    for kind, registry in REGISTRIES.items():
        if name not in registry:
            continue
        entry = {"kind": kind, **entry_of(name, registry.get(name))}
        if kind == "suite":
            entry["shifts"] = [shift_entry(shift) for shift in SUITES.get(name)()]
        entries.append(entry)
    return entries


def _print(entry: dict[str, Any]) -> None:
    from robustlab.evaluate.catalogue import amounts

    console = Console()
    console.print(f"[bold]{entry['name']}[/bold] ({entry['kind']})", highlight=False)
    console.print(entry["about"], highlight=False)
    for key in ("family", "mode", "stage", "domain", "label_safety", "made_for", "seen_in", "channels", "min_size"):
        value = entry.get(key)
        if value not in (None, "", []):
            words = ", ".join(map(str, value)) if isinstance(value, list) else value
            console.print(f"  {key.replace('_', ' ')}: {words}", highlight=False)
    if entry.get("parameters"):
        table = Table("parameter", "unit", "no change", "1", "2", "3", "4", "5")
        for item in entry["parameters"]:
            values = [f"{value:.4g}" for value in item["severities"]]
            table.add_row(item["name"], item["unit"], str(item["identity"]), *values)
        console.print(table)
    if entry.get("shifts"):
        table = Table(Column("shift", no_wrap=True), Column("corruption", no_wrap=True), "severity 1 to 5")
        for shift in entry["shifts"]:
            table.add_row(shift["label"], shift["name"], "; ".join(map(amounts, shift["parameters"])))
        console.print(table)
