"""Saved defences: ``weights.safetensors`` and ``defense.json`` in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from robustlab.core.errors import ConfigError, DataFileError
from robustlab.core.model import Model
from robustlab.core.spec import array_fingerprint
from robustlab.train.checkpoint import load_weights, weights_of

WEIGHTS, CONFIG = "weights.safetensors", "defense.json"


def declared(model: Model) -> dict[str, Any]:
    """Return a model's settings as JSON gives them back, without class paths, which change between scripts."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items() if key != "network"}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    settings: dict[str, Any] = plain(model.settings())
    return settings


def save_models(folder: str | Path, models: Sequence[Model], config: Mapping[str, Any]) -> Path:
    """Write the weights of some models and a JSON configuration.

    The configuration is written last and an old one is removed first, so a folder with ``defense.json`` is complete.

    Args:
        folder: Made if missing.
        models: Their modules' weights are stored.
        config: JSON types.

    Raises:
        DataFileError: The folder cannot be written.
    """
    target = Path(folder)
    tensors = {
        f"{i}/{name}": value.cpu().contiguous()
        for i, model in enumerate(models)
        for name, value in weights_of(model.modules()).items()
    }
    document = {
        **config,
        "format": 1,
        "models": [declared(model) for model in models],
        "weights": array_fingerprint(sorted(tensors.items())),
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / CONFIG).unlink(missing_ok=True)
        for name in (WEIGHTS, CONFIG):
            partial = target / f"{name}.partial"
            if name == WEIGHTS:
                save_file(tensors, partial)
            else:
                partial.write_text(json.dumps(document, indent=1, sort_keys=True), encoding="utf-8")
            partial.replace(target / name)
    except OSError as error:
        raise DataFileError(f"save {target}", "a folder that can be written", str(error), "Choose another.") from error
    return target


def read_config(folder: str | Path, name: str, version: int) -> dict[str, Any]:
    """Return the stored configuration.

    Raises:
        DataFileError: Nothing was saved there, or the file is damaged.
        ConfigError: Another defence, or another version of it, was saved there.
    """
    path = Path(folder) / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataFileError(
            f"load {path}", "a folder written by Defense.save", str(error), "Check the path, or save again."
        ) from error
    got = (config.get("defense"), config.get("version"), config.get("format"))
    if got != (name, version, 1):
        raise ConfigError(
            f"load {path}",
            f"defence {name!r}, version {version}, format 1",
            f"{got[0]!r}, version {got[1]}, format {got[2]}",
            "Load it with the class, and the robustlab release, that wrote it.",
        )
    return config


def restore_models(folder: str | Path, models: Sequence[Model], config: Mapping[str, Any]) -> None:
    """Load stored weights into models, in place, after checking that they are the models that were saved.

    Raises:
        DataFileError: The weights are missing or damaged.
        ConfigError: Settings, parameter names or shapes differ.
    """
    path = Path(folder) / WEIGHTS
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # safetensors raises a class of its own, outside any builtin kind
        raise DataFileError(f"load {path}", "the weights of the defence", str(error), "Save again.") from error
    if array_fingerprint(sorted(tensors.items())) != config["weights"]:
        raise DataFileError(f"load {path}", "the weights that were saved", "other values", "Save again.")
    for i, (model, saved) in enumerate(zip(models, config["models"], strict=True)):
        now = declared(model)
        odd = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
        if odd:
            raise ConfigError(
                f"load {path}",
                ", ".join(f"{key}={saved.get(key)!r}" for key in odd) + " as saved",
                ", ".join(f"{key}={now.get(key)!r}" for key in odd),
                "Pass the model with the settings it was saved with.",
            )
        own = {name.removeprefix(f"{i}/"): value for name, value in tensors.items() if name.startswith(f"{i}/")}
        load_weights(model.modules(), own, f"load {path}")
