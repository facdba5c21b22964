"""Named sets of shifts."""

from __future__ import annotations

from . import imagenet_c, ladine, medmnist_c
from .standard import standard

__all__ = ["imagenet_c", "ladine", "medmnist_c", "standard"]
