"""Training: a plain, resumable loop, and seeded initialisation."""

from __future__ import annotations

from .fit import fit
from .history import EpochRecord, FitResult, FitSettings
from .seeding import scoped_seed, seeded_init

__all__ = ["EpochRecord", "FitResult", "FitSettings", "fit", "scoped_seed", "seeded_init"]
