"""has_moved: do recent inputs of a model look like those it was evaluated on?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustlab.core.errors import RangeError
from robustlab.core.model import Model, wrap
from robustlab.core.source import Source
from robustlab.core.taps import PENULTIMATE, TappedModel
from robustlab.data import load_data, subset
from robustlab.metrics.drift import ks_by_feature, mmd
from robustlab.metrics.stats import holm

from .overlap import spread
from .units import adapt

_BATCH = 64
_SHOWN = 5
_MOST = 2000


@dataclass(frozen=True)
class Drift:
    """Whether recent inputs have moved.

    Args:
        moved: At least one of the two tests says so; where nothing moved, that has a chance of at most ``alpha``.
        p_value: Twice the smaller of the two p-values, at most 1.
        alpha: Chance of a false alarm.
        mmd: Unbiased squared maximum mean discrepancy of the features.
        mmd_p_value: Its p-value, by permutation of the units.
        features: Index, Kolmogorov-Smirnov statistic and corrected p-value of the features that moved most.
        ks_p_value: Smallest corrected p-value of all features.
        n_reference: Images of the reference.
        n_recent: Recent images.
        units: Independent units in both.
    """

    moved: bool
    p_value: float
    alpha: float
    mmd: float
    mmd_p_value: float
    features: tuple[tuple[int, float, float], ...]
    ks_p_value: float
    n_reference: int
    n_recent: int
    units: tuple[int, int]

    def summary(self) -> str:
        """Return it in words."""
        head = "The inputs have moved" if self.moved else "No decision: the inputs may be the same"
        lines = [
            f"{head} (p = {self.p_value:.3g}, false alarms in at most {100 * self.alpha:g} % of looks; "
            f"{self.n_recent} images beside {self.n_reference})",
            f"  all features together: MMD^2 {self.mmd:.3g}, p = {self.mmd_p_value:.3g}",
            f"  one by one: smallest corrected p = {self.ks_p_value:.3g}",
        ]
        lines += [f"    feature {index}: KS {value:.2f}, p = {p:.3g}" for index, value, p in self.features]
        return "\n".join(lines)


def has_moved(
    model: Any,
    reference: Any,
    recent: Any,
    *,
    tap: str = PENULTIMATE,
    cluster: str | None = None,
    alpha: float = 0.05,
    looks: int = 1,
    permutations: int = 1000,
    seed: int = 0,
) -> Drift:
    """Tell whether recent inputs look to a model like those of a reference, with a known share of false alarms.

    The features of both sets are compared as a whole (maximum mean discrepancy) and one by one (Kolmogorov-Smirnov,
    corrected by Holm); each test gets half of ``alpha``. With ``cluster``, patients are permuted, and for the second
    test the mean features of a patient are compared.

    A stream that is looked at again and again raises false alarms in the end: ``looks`` says how often it will be, and
    ``alpha`` then holds for all of them together.

    Args:
        model: A network, or a wrapped one.
        reference: Images like those it was evaluated on: a source, or what ``load_data`` takes. Of either set 2,000
            images are used at most.
        recent: Recent images, without labels; 50 or more.
        tap: Features to look at: ``"penultimate"``, or a module of the network.
        cluster: Column of the independent unit in both, e.g. ``"patient"``.
        alpha: Chance of a false alarm, above 0 and below 1.
        looks: Batches of the stream that will be looked at.
        permutations: Of the first test; raised where ``alpha`` asks for more.
        seed: Of the permutations.

    Raises:
        RangeError: ``alpha`` or ``looks`` make no sense.
        ConfigError: The model has no features.
        UnknownNameError: There is no such column.

    References:
        Rabanser, Guennemann, Lipton, Failing loudly: an empirical study of methods for detecting dataset shift, 2019,
        arXiv 1810.11953; Gretton et al. 2012; Holm 1979.
    """
    if not 0 < alpha < 1 or looks < 1:
        raise RangeError("has_moved", "alpha between 0 and 1, looks of 1 or more", f"{alpha}, {looks}", "0.05 and 1.")
    view = TappedModel(wrap(model), (tap,))
    sources = [_few(data if isinstance(data, Source) else load_data(data)) for data in (reference, recent)]
    spec = sources[0].info.spec
    features = [_features(view, source, spec, tap) for source in sources]
    units = [None if cluster is None else source.column(cluster) for source in sources]
    level = alpha / looks
    value, p_together = mmd(
        *features,
        reference_units=units[0],
        recent_units=units[1],
        permutations=max(permutations, int(20 / level)),
        seed=seed,
    )
    rows = [part if codes is None else _means(part, codes) for part, codes in zip(features, units, strict=True)]
    statistic, each = ks_by_feature(*rows)
    corrected = torch.tensor(holm(each.tolist()), dtype=torch.float64)
    order = corrected.argsort()[:_SHOWN].tolist()
    worst = float(corrected.min())
    p_value = min(1.0, 2 * min(p_together, worst))
    return Drift(
        p_value <= level,
        p_value,
        alpha,
        value,
        p_together,
        tuple((i, float(statistic[i]), float(corrected[i])) for i in order if float(corrected[i]) <= level / 2),
        worst,
        len(features[0]),
        len(features[1]),
        (len(rows[0]), len(rows[1])),
    )


def _few(source: Source) -> Source:
    """Return at most 2,000 of the images, spread over all: the first test compares all pairs."""
    return source if len(source) <= _MOST else subset(source, spread(len(source), _MOST))


def _features(view: Model, source: Source, spec: Any, tap: str) -> Tensor:
    parts = []
    for start in range(0, len(source), _BATCH):
        batch = adapt(source.read(range(start, min(start + _BATCH, len(source)))), source.info.spec, spec)
        parts.append(view.predict(batch.to(view.device)).features[tap].to("cpu", torch.float64))
    return torch.cat(parts)


def _means(features: Tensor, codes: Tensor) -> Tensor:
    """Return the mean features of each unit."""
    places = torch.unique(codes, return_inverse=True)[1]
    sums = features.new_zeros(int(places.max()) + 1, features.shape[1]).index_add_(0, places, features)
    return sums / torch.bincount(places)[:, None]
