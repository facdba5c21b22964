"""``robustlab evaluate``: stress-test a model from the shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="timm:NAME, file.py:function, a .pt, .ts or .pt2 file, or saved predictions (.jsonl, .npz, .parquet)."
        ),
    ],
    data: Annotated[str, typer.Argument(help="NPZ file (MedMNIST layout), image folder, or medmnist:NAME.")],
    out: Annotated[Path, typer.Option(help="Folder for report.json, rows.csv, predictions and report.html.")],
    weights: Annotated[Path | None, typer.Option(help="safetensors file or weights-only state dict.")] = None,
    arg: Annotated[list[str] | None, typer.Option(help="name=value for the model's constructor; repeatable.")] = None,
    split: Annotated[str, typer.Option(help="Split of DATA to evaluate.")] = "test",
    val: Annotated[
        str | None, typer.Option(help="Validation data; 'split:NAME' takes another split of DATA, 'none' nothing.")
    ] = "split:val",
    shifts: Annotated[str, typer.Option(help="Suite or corruption names, comma-separated.")] = "standard",
    severities: Annotated[str, typer.Option(help="1-5 or 1,3,5.")] = "1-5",
    attack: Annotated[
        list[str] | None, typer.Option(help="NAME:NORM:BUDGETS, e.g. pgd:linf:1/255,2/255; repeatable.")
    ] = None,
    ood: Annotated[list[str] | None, typer.Option(help="name=path, e.g. far/photos=photos.npz; repeatable.")] = None,
    detectors: Annotated[str, typer.Option(help="Detector names, comma-separated.")] = "msp,energy",
    metrics: Annotated[str, typer.Option(help="default, all, or names, comma-separated.")] = "default",
    groups: Annotated[str, typer.Option(help="Group columns, comma-separated.")] = "",
    cluster: Annotated[str | None, typer.Option(help="Column of the independent unit, e.g. patient.")] = None,
    task: Annotated[str | None, typer.Option(help="binary, multiclass or multilabel.")] = None,
    output: Annotated[str | None, typer.Option(help="logits, log_probs or probs.")] = None,
    mean: Annotated[str | None, typer.Option(help="Per-channel mean, comma-separated.")] = None,
    std: Annotated[str | None, typer.Option(help="Per-channel standard deviation.")] = None,
    size: Annotated[int | None, typer.Option(help="Resize images to this edge.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in the report.")] = None,
    referral: Annotated[float, typer.Option(help="Share of cases that may be referred.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="Samples of a forward pass; automatic if not given.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps the model's answers between runs; OUT if not given.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no answers; a stopped run starts over.")] = False,
    workers: Annotated[
        str | None, typer.Option(help="Number of processes, or 'cuda' for one a GPU; this process if not given.")
    ] = None,
    gallery: Annotated[bool, typer.Option(help="Put example pictures into the report.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON instead of the summary.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print conditions and forward passes, run nothing.")] = False,
) -> None:
    """Evaluate a model under shifts, attacks and foreign inputs; write a report.

    Run again after an interruption, it goes on where it stood. Exit code 3: something failed and is listed; run again.

    Example: robustlab evaluate timm:resnet18 data.npz --arg num_classes=2 --weights w.safetensors --out runs/a
    """
    from robustlab import evaluate_under_shift, load_data
    from robustlab.core.registry import ATTACKS

    from .parse import floats, parse_attack, parse_model, parse_pairs, parse_severities, parse_workers

    source = load_data(data, split=split)
    names = [part for part in shifts.split(",") if part and part != "none"]
    chosen: list[Any] = []
    for text in attack or []:
        label, norm, budgets = parse_attack(text)
        build: Any = ATTACKS.get(label)
        chosen.append(build(norm=norm, eps=budgets))
    levels = parse_severities(severities)
    foreign = parse_pairs(ood or [], "--ood")
    if dry_run:
        _dry_run(source, names, levels, chosen, list(foreign), as_json)
        return
    subject = parse_model(
        model,
        weights=weights,
        arguments=arg or [],
        task=task or source.info.task,
        output=output,
        mean=floats(mean),
        std=floats(std),
        size=size,
        name=name,
    )
    with parse_workers(workers) as executor:
        report = evaluate_under_shift(
            subject,
            source,
            val=validation(val, data),
            shifts=names,
            severities=levels,
            attacks=chosen,
            ood={key: load_data(path) for key, path in foreign.items()},
            detectors=[part for part in detectors.split(",") if part],
            metrics=metrics if metrics in ("default", "all") else metrics.split(","),
            groups=[part for part in groups.split(",") if part],
            cluster=cluster,
            referral=referral,
            seed=seed,
            batch_size=batch_size,
            device=device,
            cache=None if no_cache else cache or out,
            executor=executor,
            gallery=gallery,
        )
    report.save(out)
    page = report.to_html(out / "report.html")
    if as_json:
        typer.echo(report.to_json())
    else:
        typer.echo(report.summary())
        typer.echo(f"\nReport: {page}")
    if report.manifest["failures"]:
        raise typer.Exit(3)


def validation(val: str | None, data: str) -> Any:
    """Load validation data; a data set without that split is evaluated without, and the report says so."""
    from robustlab import load_data
    from robustlab.core.errors import MissingSplitError

    from .parse import has_splits

    if val is None or val == "none":
        return None
    if val == "split:val" and not has_splits(data):
        typer.echo("No validation data: an image folder has no splits (--val FOLDER).", err=True)
        return None
    if not val.startswith("split:"):
        return load_data(val, split="val")
    try:
        return load_data(data, split=val.removeprefix("split:"))
    except MissingSplitError as error:
        if val != "split:val":
            raise
        typer.echo(f"No validation data: {error}", err=True)
        return None


def _dry_run(source: Any, names: Any, levels: Any, attacks: Any, foreign: list[str], as_json: bool) -> None:
    from robustlab.evaluate.plan import make_plan, resolve_attacks, resolve_shifts

    plan = make_plan(resolve_shifts(names), levels, resolve_attacks(attacks), source.info.spec)
    facts = {
        "samples": len(source),
        "conditions": [condition.key for condition in plan.conditions],
        "evaluated_images": len(source) * len(plan.conditions),
        "ood_sets": foreign,
        "skipped": [{"what": what, "why": why} for what, why in plan.skipped],
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"{facts['samples']} samples x {len(plan.conditions)} conditions = {facts['evaluated_images']} images")
    typer.echo("\n".join(f"  {condition.key}" for condition in plan.conditions))
    for what, why in plan.skipped:
        typer.echo(f"  skipped {what}: {why}")
