"""``robustlab ood``: detectors of foreign inputs from the shell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .evaluate import validation
from .parse import floats, parse_severities


def ood(
    model: Annotated[str, typer.Argument(help="timm:NAME, file.py:function, or a .pt, .ts or .pt2 file.")],
    data: Annotated[str, typer.Argument(help="NPZ file (MedMNIST layout), image folder, or medmnist:NAME.")],
    sets: Annotated[
        list[str], typer.Option("--ood", help="name=DATA, e.g. near/site-b=b.npz or far/photos=photos/; repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.json, rows.csv, predictions and report.html.")],
    fit: Annotated[
        str | None, typer.Option(help="Training data for detectors that learn; 'split:NAME' takes a split of DATA.")
    ] = "split:train",
    detectors: Annotated[
        str | None,
        typer.Option(help="Names, comma-separated; see robustlab list detectors. Differences are from the first."),
    ] = None,
    shifts: Annotated[str | None, typer.Option(help="Corruptions that should not be flagged, comma-separated.")] = None,
    severities: Annotated[str, typer.Option(help="Their severities.")] = "1,3,5",
    weights: Annotated[Path | None, typer.Option(help="safetensors file or weights-only state dict.")] = None,
    arg: Annotated[list[str] | None, typer.Option(help="name=value for the model's constructor; repeatable.")] = None,
    split: Annotated[str, typer.Option(help="Split of DATA to evaluate.")] = "test",
    val: Annotated[
        str | None, typer.Option(help="Validation data; 'split:NAME' takes another split of DATA, 'none' nothing.")
    ] = "split:val",
    cluster: Annotated[str | None, typer.Option(help="Column of the independent unit, e.g. patient.")] = None,
    task: Annotated[str | None, typer.Option(help="binary, multiclass or multilabel.")] = None,
    output: Annotated[str | None, typer.Option(help="logits, log_probs or probs.")] = None,
    mean: Annotated[str | None, typer.Option(help="Per-channel mean, comma-separated.")] = None,
    std: Annotated[str | None, typer.Option(help="Per-channel standard deviation.")] = None,
    size: Annotated[int | None, typer.Option(help="Resize images to this edge.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in the report.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="Samples of a forward pass; automatic if not given.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    gallery: Annotated[bool, typer.Option(help="Put pictures of the most confusing images into the report.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON instead of the summary.")] = False,
) -> None:
    """Compare detectors of foreign inputs on a model; write a report with intervals.

    Example: robustlab ood timm:resnet18 data.npz --weights w.safetensors --ood far/photos=photos.npz --out runs/ood
    """
    from robustlab import load_data, ood_report
    from robustlab.evaluate.ood import DETECTORS

    from .parse import parse_model, parse_pairs

    source = load_data(data, split=split)
    report = ood_report(
        parse_model(
            model,
            weights=weights,
            arguments=arg or [],
            task=task or source.info.task,
            output=output,
            mean=floats(mean),
            std=floats(std),
            size=size,
            name=name,
        ),
        source,
        ood={key: load_data(path) for key, path in parse_pairs(sets, "--ood").items()},
        val=validation(val, data),
        fit=validation(fit, data),
        detectors=DETECTORS if detectors is None else tuple(detectors.split(",")),
        shifts=() if shifts is None else tuple(shifts.split(",")),
        severities=parse_severities(severities),
        cluster=cluster,
        seed=seed,
        batch_size=batch_size,
        device=device,
        cache=out,
        gallery=gallery,
    )
    report.save(out)
    page = report.to_html(out / "report.html")
    typer.echo(report.to_json() if as_json else f"{report.summary()}\n\nReport: {page}")
    if report.manifest["failures"]:
        raise typer.Exit(3)
