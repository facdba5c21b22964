"""Named sets of shifts."""

from __future__ import annotations

from . import ladine
from .standard import standard

__all__ = ["ladine", "standard"]
