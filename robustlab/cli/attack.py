"""``robustlab attack``: robust accuracy over budgets from the shell, and how far to trust it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .evaluate import validation
from .parse import floats


def attack(
    model: Annotated[str, typer.Argument(help="timm:NAME, file.py:function, or a .pt, .ts or .pt2 file.")],
    data: Annotated[str, typer.Argument(help="NPZ file (MedMNIST layout), image folder, or medmnist:NAME.")],
    out: Annotated[Path, typer.Option(help="Folder for report.json, rows.csv, predictions and report.html.")],
    eps: Annotated[str, typer.Option(help="Budgets, comma-separated: 1/255,2/255 or, with --units native, 1,2,4.")],
    attacks: Annotated[
        str, typer.Option(help="Attack names, comma-separated; see robustlab list attacks.")
    ] = "auto-attack",
    norm: Annotated[
        str | None, typer.Option(help="linf or l2; that of the attack if not given, for most linf.")
    ] = None,
    units: Annotated[str, typer.Option(help="unit: the [0, 1] scale; native: grey levels, HU.")] = "unit",
    goal: Annotated[
        str,
        typer.Option(
            help="answer: make answers wrong; hide: foreign images (--ood) look familiar to a detector; alarm: the "
            "data look foreign to it. The last two use one search of their own instead of --attacks."
        ),
    ] = "answer",
    detector: Annotated[str, typer.Option(help="Whom to hide from or to alarm; see robustlab list detectors.")] = "msp",
    ood: Annotated[list[str] | None, typer.Option(help="name=DATA, e.g. far/photos=photos.npz; repeatable.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Attack only so many samples, spread over the data, and over each foreign set.")
    ] = None,
    draws: Annotated[
        int | None, typer.Option(help="Forward passes a look, for models that are random; 20 is usual.")
    ] = None,
    trust: Annotated[int | None, typer.Option(help="Samples of the checklist; 0 leaves it out.")] = None,
    weights: Annotated[Path | None, typer.Option(help="safetensors file or weights-only state dict.")] = None,
    arg: Annotated[list[str] | None, typer.Option(help="name=value for the model's constructor; repeatable.")] = None,
    split: Annotated[str, typer.Option(help="Split of DATA to attack.")] = "test",
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON instead of the summary.")] = False,
) -> None:
    """Attack a model within budgets; write a report with robust accuracy, its intervals and a checklist.

    Example: robustlab attack timm:resnet18 data.npz --weights w.safetensors --eps 1/255,2/255,4/255 --out runs/attack
    """
    from robustlab import evaluate_under_shift, load_data
    from robustlab.core.errors import ConfigError
    from robustlab.core.registry import ATTACKS
    from robustlab.data import subset

    from .parse import parse_budgets, parse_model, parse_pairs

    if limit is not None and limit < 1:
        raise ConfigError("--limit", "a number of samples above 0", f"{limit}", "Leave it out to attack all.")
    if goal not in ("answer", "hide", "alarm"):
        raise ConfigError("--goal", "answer, hide or alarm", repr(goal), "Check the spelling.")

    def few(whole: Any) -> Any:
        if limit is None or limit >= len(whole):
            return whole
        return subset(whole, [place * len(whole) // limit for place in range(limit)])

    source = few(load_data(data, split=split))
    fields: dict[str, Any] = {"eps": parse_budgets(eps, "--eps"), "units": units}
    if norm is not None:
        fields["norm"] = norm
    foreign = {key: few(load_data(path)) for key, path in parse_pairs(ood or [], "--ood").items()}
    if goal == "hide" and not foreign:
        raise ConfigError("--goal hide", "foreign images", "no --ood", "Pass e.g. --ood far/photos=photos.npz.")
    if draws is not None:
        fields["draws"] = draws
    if goal == "answer":
        builders: list[Any] = [ATTACKS.get(text.strip()) for text in attacks.split(",")]
    else:
        builders = [ATTACKS.get("detector-attack")]
        fields |= {"goal": goal, "detector": detector}
    chosen = [build(**fields) for build in builders]
    report = evaluate_under_shift(
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
        val=validation(val, data),
        shifts=(),
        attacks=chosen,
        trust=trust,
        ood=foreign,
        detectors=tuple(dict.fromkeys(("msp", detector))),
        cluster=cluster,
        seed=seed,
        batch_size=batch_size,
        device=device,
        cache=out,
    )
    report.save(out)
    page = report.to_html(out / "report.html")
    typer.echo(report.to_json() if as_json else f"{report.summary()}\n\nReport: {page}")
    if report.manifest["failures"]:
        raise typer.Exit(3)
