"""Detectors: one module a family, registered by name."""

from __future__ import annotations

from .logits import MSP, Energy

__all__ = ["MSP", "Energy"]
