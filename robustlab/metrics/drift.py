"""Has a batch moved: two-sample tests with a known share of false alarms."""

from __future__ import annotations

import torch
from scipy.stats import ks_2samp
from torch import Tensor

from robustlab.core.errors import ShapeError
from robustlab.core.rng import SampleRng

_CELLS = 1 << 24
_LEAST = 1e-12


def _checked(reference: Tensor, recent: Tensor) -> None:
    shapes = tuple(reference.shape), tuple(recent.shape)
    if any(len(shape) != 2 or shape[0] < 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        wanted = "two sets (N, D) of two rows or more and of the same width"
        raise ShapeError("drift", wanted, f"{shapes[0]} and {shapes[1]}", "Check the features.")


def mmd(
    reference: Tensor,
    recent: Tensor,
    *,
    reference_units: Tensor | None = None,
    recent_units: Tensor | None = None,
    permutations: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return (unbiased squared maximum mean discrepancy, p-value by permutation of the units).

    The kernel is exp(-|x - y|^2 / m) with m the median of the squared distances of all pairs.

    Args:
        reference: float (N, D).
        recent: float (M, D).
        reference_units: Independent units, int64 (N,), e.g. patients; rows if None.
        recent_units: Likewise, int64 (M,); no unit is in both sets.
        permutations: Random relabellings; the p-value is at least 1 / (permutations + 1).
        seed: Of the relabellings.

    Raises:
        ShapeError: Sets do not fit.

    References:
        Gretton, Borgwardt, Rasch, Schoelkopf, Smola, A kernel two-sample test, 2012.
    """
    _checked(reference, recent)
    rows = torch.cat((reference, recent)).to(torch.float64)
    squared = torch.cdist(rows, rows).square()
    above = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    width = squared[above[0], above[1]].median().clamp_min(_LEAST)
    kernel = torch.exp(-squared / width)
    kernel.fill_diagonal_(0)
    codes = [
        torch.arange(len(part)) if units is None else torch.unique(units.cpu(), return_inverse=True)[1]
        for part, units in ((reference, reference_units), (recent, recent_units))
    ]
    split = int(codes[0].max()) + 1
    units = torch.cat((codes[0], codes[1] + split))
    total = int(units.max()) + 1
    keys = SampleRng.make(seed, "mmd", torch.arange(permutations)).uniform("order", (total,))
    order = torch.cat((torch.arange(total)[None], keys.argsort(1)))
    # a unit stands in the first set where its place in the order is among the first
    first = torch.zeros(len(order), total, dtype=torch.bool).scatter_(1, order[:, :split], True)
    inside = first[:, units].to(rows)
    values = torch.cat([_unbiased(kernel, part) for part in torch.split(inside, max(1, _CELLS // len(rows)))])
    found = float(values[0])
    return found, (1 + int((values[1:] >= found - _LEAST).sum())) / (permutations + 1)


def _unbiased(kernel: Tensor, inside: Tensor) -> Tensor:
    """Return the statistic for indicators (R, N) of the first set."""
    n = inside.sum(1)
    m = len(kernel) - n
    to_first = inside @ kernel
    within = (to_first * inside).sum(1)
    between = (to_first * (1 - inside)).sum(1)
    rest = kernel.sum() - within - 2 * between
    # a relabelling of few large units can leave a set with a single row
    pairs = [(size * (size - 1)).clamp_min(1) for size in (n, m)]
    return within / pairs[0] + rest / pairs[1] - 2 * between / (n * m).clamp_min(1)


def ks_by_feature(reference: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Kolmogorov-Smirnov statistic and p-value of each feature, float64 (D,), as scipy's ``ks_2samp``.

    Args:
        reference: float (N, D), of independent rows.
        recent: float (M, D), of independent rows.

    Raises:
        ShapeError: Sets do not fit.
    """
    _checked(reference, recent)
    found = ks_2samp(reference.double().cpu().numpy(), recent.double().cpu().numpy(), axis=0)
    return torch.as_tensor(found.statistic), torch.as_tensor(found.pvalue)
