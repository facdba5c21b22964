"""Counts and sums of a value per cluster: means with cluster-robust intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustlab.metrics.base import Estimate
from robustlab.metrics.stats import Bounds, linear_interval, spread
from robustlab.metrics.stats.bootstrap import UNBOUNDED

from .base import UNIT, Places, State, blocks, check_rows, zeros

_LARGEST = float(1 << 31)


@dataclass(eq=False, kw_only=True)
class Moments(State):
    """Counts and sums of a per-sample value (NLL, Brier, Dice) in every cluster.

    A value is split into its floor and the rest in steps of 2^-32, which are summed apart: |value| < 2^31, kept to
    1.2e-10, at most 2^31 - 1 rows.

    Args:
        counts: int64 (U,), values.
        whole: int64 (U,), sums of floors.
        rest: int64 (U,), sums of what is above the floors, in fixed point.
        refused: int64 (), values or clusters outside their range.
        rows: Rows seen.
    """

    counts: Tensor
    whole: Tensor
    rest: Tensor
    sums: ClassVar[tuple[str, ...]] = ("counts", "whole", "rest")

    @staticmethod
    def empty(clusters: int, *, device: torch.device | str = "cpu") -> Moments:
        """Return a state without rows.

        Args:
            clusters: Number of independent units, U.
            device: Where updates come from.
        """
        counts, whole, rest = (zeros((clusters,), device) for _ in range(3))
        return Moments(counts=counts, whole=whole, rest=rest, refused=zeros((), device))

    def update(self, values: Tensor, clusters: Tensor) -> None:
        """Add rows.

        Args:
            values: Floating (N,); NaN does not enter, infinity is refused.
            clusters: int64 (N,) in [0, U), -1 for rows that do not enter.
        """
        check_rows("Moments", len(values), clusters)
        self.count_rows(len(values))
        size = len(self.counts)
        for block in blocks(len(values), 1, values.device):
            given = values[block].to(torch.float64)
            refuse = given.abs() >= _LARGEST
            value = torch.where(refuse, 0, given).nan_to_num_()
            code = clusters[block]
            places = Places.find(torch.zeros_like(code), code, (size, 1), torch.isnan(given), refuse, self.refused)
            places.add_counts(self.counts)
            floor = value.floor()
            places.add_fixed(self.rest, value - floor)
            places.add_fixed(self.whole, floor / UNIT)  # 2^31 - 1 floors of up to 2^31 fit

    def totals(self) -> tuple[Tensor, Tensor]:
        """Return (count int64, sum float64) of every cluster, (U,)."""
        self.check()
        return self.counts, self.whole.to(torch.float64) + self.rest.to(torch.float64) / UNIT

    def estimate(self, *, confidence: float = 0.95, bounds: Bounds = UNBOUNDED) -> Estimate:
        """Return the mean of all values with the interval that a metric over the same rows and clusters has.

        V = U / (U - 1) sum_u (S_u - mean n_u)^2 / N^2 over the clusters with values.

        Args:
            confidence: Coverage in (0, 1).
            bounds: Valid range of the mean; decides the scale of the interval.
        """
        counts, sums = self.totals()
        entered = counts > 0
        number, units = int(counts.sum()), int(entered.sum())
        if number == 0:
            return Estimate.undefined("no_samples")
        # all sums at once, in whole numbers: the order of clusters changes no digit
        value = (int(self.whole.sum()) * UNIT + int(self.rest.sum())) / (number * UNIT)
        error, freedom = spread((sums - value * counts)[entered] / number)
        method = "influence values over clusters"
        inside = bounds[0] < value < bounds[1]
        if units < 2 or error == 0 or not inside:
            reason = "too_few_units" if units < 2 else "no_variance"
            return Estimate(value, math.nan, math.nan, number, units, method, reason)
        low, high = linear_interval(value, error, freedom, confidence=confidence, bounds=bounds)
        return Estimate(value, low, high, number, units, method)

    def _accepted(self) -> str:
        return f"values between -2^31 and 2^31, clusters from -1 to {len(self.counts) - 1}"
