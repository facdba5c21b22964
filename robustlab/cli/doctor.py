"""``robustlab doctor``: look for mistakes in a model and its data from the shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from robustlab.core.source import Source
    from robustlab.evaluate.diagnosis import Diagnosis


def doctor(
    model: Annotated[str, typer.Argument(help="timm:NAME, file.py:function, or a .pt, .ts or .pt2 file.")],
    data: Annotated[str, typer.Argument(help="NPZ file (MedMNIST layout), image folder, or medmnist:NAME.")],
    weights: Annotated[Path | None, typer.Option(help="safetensors file or weights-only state dict.")] = None,
    arg: Annotated[list[str] | None, typer.Option(help="name=value for the model's constructor; repeatable.")] = None,
    split: Annotated[str, typer.Option(help="Split of DATA to examine.")] = "test",
    val: Annotated[
        str, typer.Option(help="Validation data; 'split:NAME' takes another split of DATA, 'none' nothing.")
    ] = "split:val",
    train: Annotated[str, typer.Option(help="Training data, likewise.")] = "split:train",
    task: Annotated[str | None, typer.Option(help="binary, multiclass or multilabel.")] = None,
    output: Annotated[str | None, typer.Option(help="logits, log_probs or probs.")] = None,
    mean: Annotated[str | None, typer.Option(help="Per-channel mean, comma-separated.")] = None,
    std: Annotated[str | None, typer.Option(help="Per-channel standard deviation.")] = None,
    size: Annotated[int | None, typer.Option(help="Resize images to this edge.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Column of the independent unit, e.g. patient.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the diagnosis as JSON.")] = False,
) -> None:
    """Look for mistakes in a model and its data; exit code 1 if there are any.

    Example: robustlab doctor timm:resnet18 data.npz --arg num_classes=2 --weights w.safetensors
    """
    from robustlab import doctor as examine
    from robustlab import load_data
    from robustlab.evaluate.modelspec import ModelSpec

    from .parse import parse_arguments

    source = load_data(data, split=split)
    spec = ModelSpec(
        model,
        weights=weights,
        arguments=parse_arguments(arg or []),
        task=task or source.info.task,  # type: ignore[arg-type]  # wrap checks it
        output=output,  # type: ignore[arg-type]  # wrap checks it
        mean=_numbers(mean, "--mean"),
        std=_numbers(std, "--std"),
        size=size,
    )
    seen = examine(
        spec,
        source,
        val=_other("val", val, data, split),
        train=_other("train", train, data, split),
        cluster=cluster,
        device=device,
    )
    seen = _plugins().merged(seen)
    typer.echo(json.dumps(seen.to_dict(), indent=2) if as_json else seen.summary())
    if not seen.healthy:
        raise typer.Exit(1)


def _numbers(text: str | None, option: str) -> list[float] | None:
    from robustlab.core.errors import ConfigError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(option, "numbers, comma-separated", repr(text), "For example 0.5,0.5,0.5.") from None


def _other(role: str, text: str, data: str, examined: str) -> Source | None:
    """Load the set of a role; a default split that the data lacks, or that is itself examined, is left out."""
    from robustlab import load_data
    from robustlab.core.errors import MissingSplitError

    from .parse import has_splits

    if text == "none":
        return None
    if not text.startswith("split:"):
        return load_data(text, split=role)
    name, default = text.removeprefix("split:"), text == f"split:{role}"
    if default and (name == examined or not has_splits(data)):
        return None
    try:
        return load_data(data, split=name)
    except MissingSplitError as error:
        if not default:
            raise
        typer.echo(f"No {'training' if role == 'train' else 'validation'} data: {error}", err=True)
        return None


def _plugins() -> Diagnosis:
    """Return a finding for every third-party plugin that failed to load."""
    from robustlab.core.registry import REGISTRIES
    from robustlab.evaluate.diagnosis import Diagnosis, Finding, Outcome

    outcomes: list[tuple[str, Outcome]] = []
    for registry in REGISTRIES.values():
        registry.load()
        for name, why in registry.failures.items():
            text = f"The {registry.kind} plugin {name!r} failed to load: {why}"
            outcomes.append(("plugins", Finding("plugins", text, "Repair, update or uninstall the plugin.")))
    return Diagnosis.of(outcomes or [("plugins", None)])
