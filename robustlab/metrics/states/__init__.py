"""Streaming states for outputs too large to store: integer sums whose merges are bitwise equal in any order and split.

Dense outputs are flattened to rows first: ``logits.movedim(1, -1).flatten(0, -2)``. Every state takes batches with
``update`` on its own device without waiting for it, adds up with ``merge``, and is saved as the plain tensors of
``to_dict``. Values that a state cannot hold are counted on the device, and raised when a number is asked for.
"""

from .base import MAX_ROWS, State
from .bins import Bins, BrierParts
from .confusion import Confusion, answers
from .grid import Bracket, Grid
from .moments import Moments

__all__ = ["MAX_ROWS", "Bins", "Bracket", "BrierParts", "Confusion", "Grid", "Moments", "State", "answers"]
