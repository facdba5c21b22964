"""Published severities put into corruptions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from corruptions.reference.base import Reference

Table = Mapping[str, tuple[float, float, float, float, float]]


def make(kind: type[Reference], published: str, table: Table, side: int = 224) -> Reference:
    """Return a corruption with the published name and the published value of each parameter at severities 1 to 5."""
    levels = kind().levels()
    fields = {name: dataclasses.replace(levels[name], values=values) for name, values in table.items()}
    return dataclasses.replace(kind(), published=published, made_for=side, **fields)
