"""What is registered, in words and pictures: entries for ``list`` and ``show``, and the gallery page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from robustlab.core.corruption import Corruption
from robustlab.core.errors import DataFileError
from robustlab.core.registry import CORRUPTIONS, Registry
from robustlab.core.shift import Shift, from_bytes, to_bytes
from robustlab.core.types import ImageSpec
from robustlab.data.phantoms import HistologyPhantom, RadiographPhantom

SEVERITIES = (1, 2, 3, 4, 5)
SIDE = 224


@dataclass(frozen=True, eq=False)
class Subject:
    """An image that the gallery shows.

    Args:
        title: What it is.
        pixels: uint8 (C, H, W).
        modality: Tag, or None.
    """

    title: str
    pixels: Tensor
    modality: str | None = None


def entries_of(registry: Registry[Any]) -> list[dict[str, Any]]:
    """Return what is known of every member, as JSON types, and of plugins that failed to load."""
    entries = [entry_of(name, item) for name, item in registry.items()]
    return entries + [{"name": name, "about": f"failed to load: {why}"} for name, why in registry.failures.items()]


def entry_of(name: str, item: Any) -> dict[str, Any]:
    """Return name and purpose of a member; of a corruption also what it is made for and its parameters."""
    doc = (getattr(item, "__doc__", None) or "").strip()
    entry: dict[str, Any] = {"name": name, "about": " ".join(doc.split("\n\n")[0].split()).replace("``", "")}
    if not (isinstance(item, type) and issubclass(item, Corruption)):
        return entry
    made = item()
    parameters = [
        {
            "name": parameter,
            "unit": levels.unit,
            "identity": levels.identity if math.isfinite(levels.identity) else str(levels.identity),
            "severities": [levels.at(severity) for severity in SEVERITIES],
        }
        for parameter, levels in made.levels().items()
    ]
    return entry | {
        "family": item.family,
        "mode": item.mode,
        "stage": item.stage,
        "domain": item.domain,
        "label_safety": item.label_safety,
        "made_for": None if item.modalities is None else list(item.modalities),
        "seen_in": None if item.seen_in is None else list(item.seen_in),
        "channels": None if item.channels is None else list(item.channels),
        "min_size": item.min_size,
        "version": item.version,
        "parameters": parameters,
    }


def shift_entry(shift: Shift) -> dict[str, Any]:
    """Return label, name and parameters of a shift of a suite, as JSON types."""
    table = [shift.parameters(severity) for severity in SEVERITIES]
    parameters = [
        {"name": name, "unit": unit, "severities": [values[name][0] for values in table]}
        for name, (_, unit) in table[0].items()
    ]
    return {"label": shift.label, "name": shift.name, "parameters": parameters}


def fits(entry: dict[str, Any], modality: str) -> bool:
    """Tell whether a corruption is made for a modality and met in it."""
    return all(entry.get(key) is None or modality in entry[key] for key in ("made_for", "seen_in"))


def amounts(parameter: dict[str, Any]) -> str:
    """Return one parameter's values in words, e.g. ``sigma 0.03, 0.06, 0.1, 0.16, 0.25 of full range``."""
    values = [f"{value:.4g}" for value in parameter["severities"]]
    return f"{parameter['name']} {', '.join(values)} {parameter['unit']}"


def read_subject(path: str | Path, side: int = SIDE) -> Subject:
    """Return a picture file for the gallery, its shorter side brought to ``side`` px and cut square.

    Raises:
        DataFileError: It is no readable picture.
    """
    file = Path(path).expanduser()
    try:
        with Image.open(file) as opened:
            picture = opened.convert(
                "L" if opened.mode in ("1", "L", "LA", "I", "F") or "I;16" in opened.mode else "RGB"
            )
    except (OSError, UnidentifiedImageError) as error:
        raise DataFileError(str(file), "a picture file (PNG, JPEG, TIFF ...)", str(error), "Check the path.") from error
    scale = side / min(picture.size)
    width, height = (max(side, round(edge * scale)) for edge in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    pixels = torch.from_numpy(np.array(picture.crop((left, top, left + side, top + side))))
    return Subject(file.name, pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous())


def phantoms(side: int = SIDE) -> tuple[Subject, Subject]:
    """Return an embedded chest radiograph phantom (grey) and a histology phantom (RGB)."""
    made = (RadiographPhantom(1, size=side), HistologyPhantom(1, size=side))
    titles = ("radiograph phantom", "histology phantom")
    return tuple(  # type: ignore[return-value]
        Subject(title, to_bytes(source.read([0]).images[0]), source.info.spec.modality)
        for title, source in zip(titles, made, strict=True)
    )


def gallery(names: Sequence[str], subjects: Iterable[Subject] = (), seed: int = 0) -> str:
    """Return one HTML page: every corruption at severities 1 to 5 on a phantom and on pictures of one's own.

    Args:
        names: Registered corruptions.
        subjects: Pictures to show beside the phantom.
        seed: Of the draws.

    Raises:
        UnknownNameError: A name is not registered.
    """
    radiograph, histology = phantoms()
    blocks = []
    for name in names:
        kind = CORRUPTIONS.get(name)
        entry = entry_of(name, kind)
        seen = entry["seen_in"] or entry["made_for"] or ("xray",)
        phantom = radiograph if 1 in (entry["channels"] or [1]) and "xray" in seen else histology
        strips = [_strip(kind(), subject, seed) for subject in (phantom, *subjects)]
        blocks.append({"entry": entry, "amounts": [amounts(item) for item in entry["parameters"]], "strips": strips})
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("robustlab.evaluate") / "gallery.html.j2").read_text(encoding="utf-8"))
    return template.render(blocks=blocks)


def _strip(corruption: Corruption, subject: Subject, seed: int) -> dict[str, Any]:
    channels, height, width = subject.pixels.shape
    reason = corruption.skip_reason(ImageSpec(channels, (height, width), modality=subject.modality))
    if reason is not None:
        return {"title": subject.title, "reason": reason, "pictures": []}
    ids = torch.zeros(1, dtype=torch.int64)
    pictures = []
    for severity in (0, *SEVERITIES):
        changed = to_bytes(corruption(from_bytes(subject.pixels[None]), severity, seed, ids))[0]
        pictures.append({"severity": severity, "source": _encoded(changed), "psnr": _psnr(subject.pixels, changed)})
    return {"title": subject.title, "reason": "", "pictures": pictures}


def _psnr(clean: Tensor, changed: Tensor) -> str:
    error = (clean.double() - changed.double()).square().mean().item()
    return "same" if error == 0 else f"{10 * math.log10(255**2 / error):.1f} dB"


def _encoded(pixels: Tensor) -> str:
    array = pixels.permute(1, 2, 0).numpy() if pixels.shape[0] == 3 else pixels[0].numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
