"""Small parsers shared by the verbs."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustlab.core.errors import ConfigError

if TYPE_CHECKING:
    from robustlab.evaluate import ProcessPool

PREDICTIONS = (".jsonl", ".npz", ".parquet")


def parse_severities(text: str) -> tuple[float, ...]:
    """Parse ``"1-5"`` or ``"1,3,5"``.

    Raises:
        ConfigError: Neither form.
    """
    try:
        if "-" in text:
            low, high = text.split("-")
            return tuple(float(value) for value in range(int(low), int(high) + 1))
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            "--severities", "a range such as 1-5 or a list such as 1,3,5", repr(text), "Try 1-5."
        ) from None


def parse_pairs(items: list[str], option: str) -> dict[str, str]:
    """Parse repeated ``name=value`` options.

    Raises:
        ConfigError: No equals sign, or a name twice.
    """
    pairs: dict[str, str] = {}
    for item in items:
        name, sign, value = item.partition("=")
        if not sign or not name or name in pairs:
            raise ConfigError(
                option, "name=value, each name once", repr(item), f"For example {option} far/photos=photos.npz"
            )
        pairs[name] = value
    return pairs


def floats(text: str | None) -> list[float] | None:
    """Parse numbers, comma-separated; None for None.

    Raises:
        ConfigError: Something else.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError("--mean, --std", "numbers, comma-separated", repr(text), "For example 0.5,0.5,0.5.") from None


def parse_budgets(text: str, option: str) -> tuple[float, ...]:
    """Parse budgets, comma-separated, also as fractions: ``"0.5/255,2/255"``.

    Raises:
        ConfigError: Something else.
    """
    try:
        return tuple(_number(part) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            option, "budgets, comma-separated", repr(text), "For example 1/255,2/255, or 1,2 with --units native."
        ) from None


def _number(text: str) -> float:
    """Return a number, or a fraction of two: ``"1/255"``, ``"0.4/255"``."""
    above, _, below = text.partition("/")
    return float(Fraction(above.strip()) / Fraction(below.strip() or 1))


def parse_attack(text: str) -> tuple[str, str, tuple[float, ...]]:
    """Parse ``"pgd:linf:1/255,2/255"`` into name, norm and budgets.

    Raises:
        ConfigError: Another form.
    """
    try:
        name, norm, budgets = text.split(":")
        return name, norm, tuple(_number(part) for part in budgets.split(","))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            "--attack",
            "NAME:NORM:BUDGETS such as pgd:linf:1/255,2/255,4/255",
            repr(text),
            "Budgets are on the [0, 1] scale.",
        ) from None


def parse_arguments(items: list[str]) -> dict[str, Any]:
    """Parse repeated ``--arg name=value`` options; values are read as JSON where possible, else as text.

    Raises:
        ConfigError: No equals sign, or a name twice.
    """

    def value(text: str) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    return {name: value(text) for name, text in parse_pairs(items, "--arg").items()}


def parse_model(model: str, *, weights: Path | None, arguments: list[str], **declared: Any) -> Any:
    """Return what MODEL names: a specification with what was declared, or saved predictions.

    Raises:
        ConfigError: Unknown task or kind of output; saved predictions with options that only a network has.
    """
    from robustlab import load_predictions
    from robustlab.evaluate import ModelSpec

    task, output = declared.get("task"), declared.get("output")
    if task not in (None, "binary", "multiclass", "multilabel") or output not in (None, "logits", "log_probs", "probs"):
        raise ConfigError(
            f"model {model!r}",
            "--task binary, multiclass or multilabel and --output logits, log_probs or probs",
            f"--task {task} --output {output}",
            "Check the spelling.",
        )
    if Path(model).suffix.lower() not in PREDICTIONS:
        return ModelSpec(model, weights=weights, arguments=parse_arguments(arguments), **declared)
    odd = [f"--{key}" for key in ("mean", "std", "size") if declared.get(key) is not None]
    odd += [name for name, value in (("--weights", weights), ("--arg", arguments)) if value]
    if odd:
        raise ConfigError(
            f"predictions {model!r}",
            "only --task, --output and --name beside saved predictions",
            ", ".join(odd),
            "Drop them.",
        )
    return load_predictions(model, **{key: declared.get(key) for key in ("task", "output", "name")})


def has_splits(data: str) -> bool:
    """Tell whether a data set on the command line can have splits: an image folder is one set."""
    return not Path(data).expanduser().is_dir()


def parse_workers(text: str | None) -> AbstractContextManager[ProcessPool | None]:
    """Return the pool that ``--workers`` asks for, or none.

    Raises:
        ConfigError: Neither a number nor ``cuda``.
    """
    from robustlab.evaluate import ProcessPool

    if text is None:
        return nullcontext()
    if text == "cuda":
        return ProcessPool(devices="cuda")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError("--workers", "a number of processes, or 'cuda' for one a GPU", repr(text), "For example 4.")
    return ProcessPool(int(text))
