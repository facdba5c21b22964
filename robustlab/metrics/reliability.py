"""The reliability curve with its intervals and its consistency band."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import binom
from torch import Tensor

from .forecasts import BINS, bin_index, bin_totals, forecasts
from .stats import proportion
from .store import PredictionStore


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability curve, one entry a bin, NaN in empty bins.

    Args:
        mean_p: float64 (M,), mean probability.
        frequency: float64 (M,), share of events.
        n: int64 (M,), forecasts.
        low: float64 (M,), lower Wilson end of the frequency (at the effective n of clustered samples).
        high: float64 (M,), upper end.
        band_low: float64 (M,), lower end of the frequencies expected under perfect calibration: binomial at mean p, of
            as many forecasts, or of the effective n of clustered samples.
        band_high: float64 (M,), upper end.
    """

    mean_p: Tensor
    frequency: Tensor
    n: Tensor
    low: Tensor
    high: Tensor
    band_low: Tensor
    band_high: Tensor


def reliability(store: PredictionStore, bins: int = BINS, *, confidence: float = 0.95) -> Reliability:
    """Return the reliability curve of what ``ece`` looks at; multi-label pools the annotated decisions of all labels.

    The decisions on one image are clustered, like the images of one patient.

    Args:
        store: Labelled predictions.
        bins: Number of equal-width bins.
        confidence: Coverage of intervals and band, in (0, 1).

    References:
        Bröcker and Smith, Increasing the reliability of reliability diagrams, 2007.
    """
    made = forecasts(store)
    units = torch.arange(len(store), device=store.ids.device) if store.clusters is None else store.clusters
    p, happened, codes = (
        torch.cat([values[item.entered] for item, values in zip(made, side, strict=True)])
        for side in ([item.p for item in made], [item.happened for item in made], [units] * len(made))
    )
    clusters = None if store.clusters is None and len(made) == 1 else codes
    index = bin_index(p, bins)
    counts = torch.bincount(index, minlength=bins)
    mean_p, frequency = (bin_totals(index, values, bins) / counts for values in (p, happened.to(torch.float64)))
    ends, sizes = [], []
    for m in range(bins):
        rows = index == m
        estimate = proportion(happened[rows], None if clusters is None else clusters[rows], confidence=confidence)
        ends.append((estimate.low, estimate.high))
        sizes.append(estimate.effective_n if estimate.n else 0.0)
    low, high = torch.tensor(ends, dtype=torch.float64).T
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    size, centre = torch.tensor(sizes, dtype=torch.float64).round().numpy(), mean_p.cpu().numpy()
    band = [torch.from_numpy(binom.ppf(tail, size.clip(1), centre) / size.clip(1)) for tail in tails]
    return Reliability(mean_p.cpu(), frequency.cpu(), counts.cpu(), low, high, band[0], band[1])
