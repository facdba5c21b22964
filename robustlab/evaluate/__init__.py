"""The evaluation loop."""

from .api import evaluate_under_shift
from .executors import ProcessPool
from .modelspec import ModelSpec

__all__ = ["ModelSpec", "ProcessPool", "evaluate_under_shift"]
