"""What a caller asked of ``load_data``, and the making of a ``SourceInfo`` from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robustlab.core.source import SourceInfo
from robustlab.core.types import ImageSpec, Task

from .columns import Array, as_array, encode_groups, encode_ids, encode_labels


@dataclass(frozen=True)
class Request:
    """The keyword arguments of ``load_data``; ``who`` begins every message."""

    who: str
    split: str = "test"
    labels: Any = None
    ids: Any = None
    groups: Mapping[str, Any] | None = None
    task: Task | None = None
    class_names: Sequence[str] | None = None
    modality: str | None = None
    value_range: tuple[float, float] | None = None
    name: str | None = None

    def rows(self, keep: Sequence[int], total: int) -> dict[str, Any]:
        """Return labels, ids and groups at the positions ``keep``, for sources of which parts are left out.

        Columns of another length than ``total`` are passed on whole, so that the later check names them.
        """
        index = np.asarray(keep, dtype=np.int64)

        def take(values: Any) -> Any:
            if values is None:
                return None
            array = as_array(values)
            return array[index] if array.ndim and len(array) == total else array

        groups = None if self.groups is None else {name: take(values) for name, values in self.groups.items()}
        return {"labels": take(self.labels), "ids": take(self.ids), "groups": groups}


def make_info(
    request: Request,
    spec: ImageSpec,
    count: int,
    *,
    name: str,
    labels: Any = None,
    ids: Any = None,
    groups: Mapping[str, Any] | None = None,
    pool: Mapping[str, Array] | None = None,
    task: Task | None = None,
    class_names: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> SourceInfo:
    """Check and encode everything that travels with the pixels; what the request states wins over what data states."""
    names = request.class_names if request.class_names is not None else class_names
    wanted = request.labels if request.labels is not None else labels
    encoded, found = None, None
    if wanted is not None:
        encoded, found = encode_labels(
            wanted, count=count, task=request.task or task, class_names=names, who=request.who
        )
    codes, levels, more = encode_groups(
        {**(groups or {}), **(request.groups or {})}, count=count, who=request.who, pool=pool
    )
    return SourceInfo(
        name=request.name or name,
        spec=spec,
        ids=encode_ids(request.ids if request.ids is not None else ids, count, request.who),
        labels=encoded,
        task=found,
        class_names=None if names is None else tuple(str(item) for item in names),
        groups=codes,
        group_levels=levels,
        notes=(*notes, *more),
    )
