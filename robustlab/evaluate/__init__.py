"""The evaluation loop."""

from .api import evaluate_under_shift

__all__ = ["evaluate_under_shift"]
