"""Attacks: one module a family, registered by name."""

from __future__ import annotations

from .pgd import PGD

__all__ = ["PGD"]
