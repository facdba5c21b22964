"""Row: one number of a report, in long format."""

from __future__ import annotations

from dataclasses import dataclass

from robustlab.metrics.base import Direction


@dataclass(frozen=True)
class Row:
    """One number.

    Args:
        model: Model name.
        data: Data set name; for OOD rows ``"ID vs NAME"``.
        shift: Shift label; ``"clean"`` for unshifted data.
        severity: 0 for clean; budgets of attacks are at 5 k / B.
        amount: Physical amount at that severity; NaN for clean and for composed shifts without one.
        unit: Unit of ``amount``.
        group: ``"column=level"``, or empty for everybody.
        target: Class or label, or empty.
        scorer: Detector, or empty.
        metric: Metric name.
        value: Point estimate, NaN when undefined.
        low: Lower end of the 95 % interval.
        high: Upper end.
        n: Samples that entered.
        n_units: Independent units that entered.
        method: How the interval was made.
        reason: Why something is undefined; empty otherwise.
        direction: ``"higher"`` is better, ``"lower"`` is better, or ``"none"``.
    """

    model: str
    data: str
    shift: str
    severity: float
    amount: float
    unit: str
    group: str
    target: str
    scorer: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    n_units: int
    method: str
    reason: str
    direction: Direction
