"""Attacks: one module a family, registered by name."""

from __future__ import annotations

from .apgd import APGD, TargetedAPGD
from .pgd import FGSM, PGD

__all__ = ["APGD", "FGSM", "PGD", "TargetedAPGD"]
