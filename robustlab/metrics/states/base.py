"""What streaming states share: layout, merging, saving, and sums of integers that no order can change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from robustlab.core.errors import ConfigError, RangeError, ShapeError

S = TypeVar("S", bound="State")

UNIT = 1 << 32
"""Fixed-point steps in 1: a value in [0, 1] is kept to 1.2e-10."""
MAX_ROWS = (1 << 31) - 1
"""So many values of at most 1 fit into an int64 sum."""

_BLOCK = 1 << 16  # values worked on at once on the CPU, so that temporaries stay in a core's cache


@dataclass(eq=False, kw_only=True)
class State(ABC):
    """Sums over rows, as int64 tensors that add.

    Args:
        refused: int64 (), values that the state cannot hold.
        rows: Rows seen.
    """

    refused: Tensor
    rows: int = 0
    sums: ClassVar[tuple[str, ...]]

    def merge(self: S, other: S) -> S:
        """Return a new state, on the device of this one, of the rows of both.

        Raises:
            ConfigError: The states are of different kinds or layouts.
            RangeError: Together they have more rows than a state can hold.
        """
        if type(self) is not type(other) or self._layout() != other._layout():
            raise ConfigError(
                type(self).__name__,
                f"a state of the layout {self._layout()}",
                f"{type(other).__name__} {other._layout()}",
                "Make all shards with the same arguments.",
            )
        made = type(self).from_dict({name: value.clone() for name, value in self.to_dict().items()})
        made.count_rows(other.rows)
        for name in ("refused", *self.sums):
            total: Tensor = getattr(made, name)
            total += getattr(other, name).to(total.device)
        return made

    def to_dict(self) -> dict[str, Tensor]:
        """Return all fields as tensors; the sums share the memory of the state."""
        made = {item.name: getattr(self, item.name) for item in fields(self)}
        # float64, because float32 would move the edges of a grid
        return {
            name: torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else torch.as_tensor(value)
            for name, value in made.items()
        }

    @classmethod
    def from_dict(cls: type[S], tensors: Mapping[str, Tensor]) -> S:
        """Return the state that ``to_dict`` described; it shares the memory of the tensors.

        Raises:
            ConfigError: The tensors are not those of this kind of state.
        """
        names = [item.name for item in fields(cls)]
        if set(names) != set(tensors):
            raise ConfigError(
                cls.__name__, f"tensors {', '.join(names)}", ", ".join(tensors), "Load a state with its own class."
            )
        kept = ("refused", *cls.sums)
        items: dict[str, Any] = {name: tensors[name] if name in kept else tensors[name].item() for name in names}
        return cls(**items)

    def count_rows(self, count: int) -> None:
        """Count rows before they are added.

        Raises:
            RangeError: A sum could overflow.
        """
        if self.rows + count > MAX_ROWS:
            raise RangeError(
                type(self).__name__,
                f"at most {MAX_ROWS} rows, so that no sum overflows",
                f"{self.rows + count}",
                "Keep one state a condition or a site.",
            )
        self.rows += count

    def check(self) -> None:
        """Wait for the device.

        Raises:
            RangeError: Some values were outside of what the state can hold.
        """
        refused = int(self.refused)
        if refused:
            raise RangeError(type(self).__name__, self._accepted(), f"{refused} others", "Check what update() gets.")

    @abstractmethod
    def _accepted(self) -> str:
        """Return the range of values that the state holds."""

    def _layout(self) -> tuple[object, ...]:
        made = [getattr(self, item.name) for item in fields(self) if item.name != "rows"]
        return tuple(tuple(value.shape) if isinstance(value, Tensor) else value for value in made)


def zeros(shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Return an empty sum."""
    return torch.zeros(shape, dtype=torch.int64, device=device)


def check_rows(who: str, rows: int, *others: Tensor | None) -> None:
    """Check that all arguments have one row a sample.

    Raises:
        ShapeError: One has not.
    """
    for value in others:
        if value is not None and len(value) != rows:
            raise ShapeError(who, f"{rows} rows", f"{len(value)}", "Give one row a sample.")


def columns(who: str, values: Tensor, truth: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Return two arguments as (N, C).

    Raises:
        ShapeError: They are not (N, C), or (N,) for one channel.
    """
    if values.shape != truth.shape or values.shape[1:] not in ((channels,), () if channels == 1 else (channels,)):
        raise ShapeError(
            who,
            f"two tensors (N, {channels})" + (" or (N,)" if channels == 1 else ""),
            f"{tuple(values.shape)} and {tuple(truth.shape)}",
            "Flatten dense outputs to rows, and state channels= when the state is made.",
        )
    return values.reshape(len(values), channels), truth.reshape(len(values), channels)


def blocks(rows: int, channels: int, device: torch.device) -> Iterator[slice]:
    """Yield the rows in pieces that fit a core's cache; all at once on other devices."""
    step = max(1, _BLOCK // channels) if device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, step):
        yield slice(start, start + step)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the values of a block go in a sum.

    Args:
        index: int64 (n,), 0 for values that do not enter.
        entered: int64 (n,), 1 for values that enter, 0 for others: nothing waits to learn how many there are.
    """

    index: Tensor
    entered: Tensor

    @staticmethod
    def find(
        cell: Tensor, groups: Tensor | None, shape: tuple[int, int], skip: Tensor, refuse: Tensor, refused: Tensor
    ) -> Places:
        """Return the places, and count those that are refused.

        Args:
            cell: int64 (n,) or (n, C), place within a group.
            groups: int64 (n,), -1 to skip, or None for group 0.
            shape: Groups, and cells a group.
            skip: bool, as ``cell``.
            refuse: bool, as ``cell``.
            refused: int64 (), counted up.
        """
        if groups is not None:
            code = groups.reshape(-1, *[1] * (cell.ndim - 1))
            cell = cell + code * shape[1]
            skip = skip | (code == -1)
            refuse = refuse | (code < -1) | (code >= shape[0])
        refused += refuse.sum()
        entered = (~(skip | refuse)).to(torch.int64)
        return Places((cell * entered).flatten(), entered.flatten())

    def add_counts(self, total: Tensor) -> None:
        """Count the values."""
        total.view(-1).scatter_add_(0, self.index, self.entered)

    def add_fixed(self, total: Tensor, values: Tensor) -> None:
        """Add round(2^32 values), for float64 values of at most 1 in size."""
        steps = (values * UNIT).round_().to(torch.int64).flatten()
        total.view(-1).scatter_add_(0, self.index, steps.mul_(self.entered))
