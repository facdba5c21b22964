"""Images that a detector was tuned on must not judge it: hashes of their pixels are kept and looked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from robustlab.core.detector import Detector
from robustlab.core.errors import ConfigError
from robustlab.core.rng import content_ids
from robustlab.core.source import Source

from .overlap import FLAT, spread

IMAGES = 20_000
"""Images of a test set that are looked at, evenly spread; decoding all of a large one would cost as much as a run."""

_BLOCK_BYTES = 64 << 20


def contents(source: Source, limit: int | None = None) -> Tensor:
    """Return the sorted hashes, int64 (M,), of the different images of a set; images without contrast are left out.

    Args:
        source: The set.
        limit: Look only at so many images, evenly spread; None takes all.
    """
    rows = spread(len(source), limit)
    spec = source.info.spec
    block = max(1, min(512, _BLOCK_BYTES // (8 * spec.channels * spec.size[0] * spec.size[1])))
    parts = [torch.empty(0, dtype=torch.int64)]
    for part in torch.split(rows, block):
        images = source.pixels(part.tolist())
        low, high = images.flatten(1).aminmax(dim=1)
        parts.append(content_ids(images[high - low > FLAT]))
    found: Tensor = torch.unique(torch.cat(parts))
    return found


def check_apart(seen: Mapping[str, Tensor], training: Tensor | None) -> None:
    """Refuse to tune on sets that share images.

    Args:
        seen: Name of a validation set to its hashes, the in-distribution one first.
        training: Hashes of the data that detectors are fitted on, or None.

    Raises:
        ConfigError: A foreign set has images of the in-distribution one, or of the training data; or the latter two
            share some.
    """
    known, *foreign = seen.items()
    pairs = [(name, hashes, *known) for name, hashes in foreign]
    if training is not None:
        pairs += [(name, hashes, "fit", training) for name, hashes in seen.items()]
    for name, hashes, other, others in pairs:
        count = _shared(hashes, others)
        if count:
            fix = "Split the data first: settings that are chosen on such images mean nothing."
            raise ConfigError("tune", f"{name} and {other} without common images", f"{count} in both", fix)


def check_untuned(detectors: Mapping[str, Detector], data: Source, ood: Mapping[str, Source]) -> None:
    """Refuse to evaluate a detector on images that its settings were chosen on.

    Raises:
        ConfigError: ``data`` or a foreign set has such an image.
    """
    tuned = {name: detector for name, detector in detectors.items() if detector.tuned_on}
    if not tuned:
        return
    for role, source in {"data": data, **{f"ood {name!r}": other for name, other in ood.items()}}.items():
        hashes = contents(source, IMAGES)
        for name, detector in tuned.items():
            for origin, others in detector.tuned_on.items():
                count = _shared(hashes, others)
                if count:
                    raise ConfigError(
                        f"detector {name!r}",
                        "test data that it was not tuned on",
                        f"{role}, of which {count} images were in {origin} when its settings were chosen",
                        "Evaluate on other data, or tune on other data: such numbers flatter the detector.",
                    )


def _shared(first: Tensor, second: Tensor) -> int:
    return int(torch.isin(first, second).sum())
