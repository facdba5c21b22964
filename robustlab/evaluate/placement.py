"""Which corruptions, at which severities, make a reference look like a site: the fit behind ``locate``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.optimize import least_squares
from scipy.stats import chi2
from torch import Tensor

from robustlab.core.corruption import STAGES, Corruption
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext, from_bytes, to_bytes
from robustlab.core.types import Batch

from .image_statistics import image_statistics

Vector = NDArray[np.float64]

GRID = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0)
_FINE = np.linspace(0, 5, 101)
_REPLICATES = 400
_SHRINK = 0.05  # of the correlations between statistics, which few images tell badly
_ALPHA = 0.01  # chance that an axis is seen where there is nothing
_LINE = float(chi2.ppf(0.95, 1))
_BLOCK = 64
_STAINS = ("haematoxylin", "eosin")
_MOST_AXES = 4
_ROUNDS = 8  # in which severities of several axes settle
_NEARLY = 25.0  # chi-square above the best of what is looked at more closely
_LOOKS = 3
_APART = 0.05  # severities that are one


@dataclass(frozen=True)
class Found:
    """What was found of one axis; see ``locate.Place``."""

    axis: str
    seen: bool
    severity: float
    low: float
    high: float
    direction: str = ""
    reason: str = ""


@dataclass(eq=False)
class _Way:
    """A corruption, and which way it goes where its draws are signs.

    Args:
        axis: The corruption.
        direction: Words; empty for corruptions that go one way, or as drawn.
        signs: What takes the place of the drawn signs, for each of them.
        backwards: From the reference towards less of the corruption, straight on from its slightest severity.
        points: Severity to statistics less those of the clean reference, where they were simulated.
    """

    axis: Corruption
    direction: str = ""
    signs: tuple[int, ...] = ()
    backwards: bool = False
    points: Mapping[float, Vector] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        known = sorted(self.points)
        self.curve = PchipInterpolator(known, np.stack([self.points[at] for at in known])) if known else None

    def along(self, severity: float) -> Vector:
        """Return how far the statistics move."""
        assert self.curve is not None  # noqa: S101 - there are points before anything is fitted
        found: Vector = -severity / GRID[1] * self.curve(GRID[1]) if self.backwards else self.curve(severity)
        return found


_Trial = tuple[tuple[Vector, float], _Way]
"""Severities and chi-square, and the way that was tried last."""


class Placement:
    """A reference and how corruptions move it; the same for any number of sites.

    Args:
        reference: Clean images, with ids.
        axes: Corruptions that suit them.
        units: Independent units of the images, int64 (N,) from 0.
        seed: Seed of draws and of the resampling.
    """

    def __init__(self, reference: Batch, axes: Sequence[Corruption], units: Tensor, seed: int = 0) -> None:
        self.seed = seed
        self.units = units
        self.reference = reference.replace(from_bytes(to_bytes(reference.images)))
        self.clean = image_statistics(self.reference.images)
        self.start = self.clean.mean(0).cpu().numpy()
        still = {GRID[0]: np.zeros_like(self.start)}
        self.ways = [
            replace(way, points=still | {at: self.shift([(way, at)]) for at in GRID[1:]})
            for axis in axes
            for way in self._ways(axis)
        ]
        back = [way for way in self.ways if way.axis.gradual and not way.signs]
        self.ways += [replace(way, backwards=True) for way in back]

    def place(self, images: Tensor, units: int) -> tuple[list[Found], float]:
        """Return what is found of every axis, and the p-value of what no axis explains.

        Args:
            images: Of the site, float (N, C, H, W) in [0, 1].
            units: How many of them are independent.
        """
        target = image_statistics(images).mean(0).cpu().numpy() - self.start
        fit = _Fit(self, target, units)
        return fit.found(), fit.unexplained

    def _ways(self, axis: Corruption) -> list[_Way]:
        """Return the ways in which a site can lie along an axis.

        Where a corruption draws for each image which way it goes, a site, which has one scanner and one laboratory,
        goes one of these ways with all its images.
        """
        draws = axis.prepare(self.reference, ShiftContext(seed=self.seed))
        drawn = draws.values() if isinstance(draws, Mapping) else ()
        if not drawn or not all(bool((value.abs() == 1).all()) for value in drawn):
            return [_Way(axis)]
        slots = max(value[0].numel() for value in drawn)
        names = _STAINS if axis.family == "staining" else ("",)
        ways = []
        for signs in itertools.product((1, -1), repeat=min(slots, len(names))):
            words = [f"{name} {'up' if sign > 0 else 'down'}".strip() for name, sign in zip(names, signs, strict=True)]
            ways.append(_Way(axis, ", ".join(words), (*signs, *[1] * (slots - len(signs)))))
        return ways

    def shift(self, chosen: Sequence[tuple[_Way, float]]) -> Vector:
        """Return how far the mean statistics of the reference move."""
        found: Vector = self._moved(chosen).mean(0).cpu().numpy() - self.start
        return found

    def _moved(self, chosen: Sequence[tuple[_Way, float]]) -> Tensor:
        """Return statistics (N, P) of the reference, corrupted in the order in which images are made.

        What has less of a corruption than the reference cannot be made of it and is left out.
        """
        batch = self.reference
        chosen = [pair for pair in chosen if not pair[0].backwards]
        for way, severity in sorted(chosen, key=lambda pair: STAGES.index(pair[0].axis.stage)):
            ctx = ShiftContext(seed=self.seed)
            draws = way.axis.prepare(batch, ctx)
            if way.signs:
                signs = torch.tensor(way.signs, device=batch.images.device)
                draws = {
                    name: signs[: value[0].numel()].to(value.dtype).expand(len(value), -1).reshape(value.shape)
                    for name, value in draws.items()
                }
            batch = way.axis.perform(batch, draws, severity, ctx)
        return torch.cat([image_statistics(from_bytes(to_bytes(part))) for part in torch.split(batch.images, _BLOCK)])

    def whitening(self, chosen: Sequence[tuple[_Way, float]], units: int) -> Vector:
        """Return the inverse root of the covariance of a site's difference, were it the reference so corrupted."""
        total = np.zeros((len(self.start), len(self.start)))
        have = len(torch.unique(self.units))
        for statistics, count in ((self._moved(chosen), units), (self.clean, have)):
            rng = SampleRng.make(self.seed, "locate", torch.arange(_REPLICATES))
            drawn = rng.integers("units", have, (count,))
            times = torch.zeros(_REPLICATES, have, dtype=torch.float64)
            times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
            weights = times[:, self.units].to(statistics.device)
            total += np.cov((weights / weights.sum(1, keepdim=True) @ statistics).cpu().numpy().T)
        total = (1 - _SHRINK) * total + _SHRINK * np.diag(np.diag(total)) + 1e-10 * np.eye(len(total))
        return np.asarray(np.linalg.inv(np.linalg.cholesky(total)), dtype=np.float64)


class _Fit:
    """The fit of one site."""

    def __init__(self, placement: Placement, target: Vector, units: int) -> None:
        self.placement = placement
        self.ways = list(placement.ways)
        self.target = target
        self.units = units
        self.unexplained = 1.0
        self.twins: dict[Corruption, str] = {}

    def _fit(self, whiten: Vector, ways: Sequence[_Way]) -> tuple[Vector, float]:
        """Return severities and chi-square."""
        if not ways:
            return np.zeros(0), float(((whiten @ self.target) ** 2).sum())

        def residual(severities: Vector) -> Vector:
            left = self.target.copy()
            for way, severity in zip(ways, severities, strict=True):
                left -= way.along(float(severity))
            found: Vector = whiten @ left
            return found

        low, high = np.zeros(len(ways)), np.full(len(ways), 5.0)
        best: tuple[Vector, float] = (low, np.inf)
        for share in (0.1, 0.4, 0.8):
            start = low + share * (high - low)
            found = least_squares(residual, start, bounds=(low, high), diff_step=np.array([0.01]))
            if 2 * found.cost < best[1]:
                best = found.x, float(2 * found.cost)
        return best

    def found(self) -> list[Found]:
        """Return what was found of every axis."""
        line = float(chi2.ppf(1 - _ALPHA / max(1, len(self.ways)), 1))
        chosen: list[_Way] = []
        whiten = self.placement.whitening([], self.units)
        severities, now = self._fit(whiten, chosen)
        while len(chosen) < _MOST_AXES:
            free = [way for way in self.ways if all(way.axis is not other.axis for other in chosen)]
            trials = [(self._fit(whiten, [*chosen, way]), way) for way in free]
            if not trials:
                break
            if not chosen:
                trials = self._looked_at(whiten, trials)
            least = min(value for (_, value), _ in trials)
            # less of something is a way out only where more of something else does not do
            close = [trial for trial in trials if trial[0][1] - least < _LINE]
            (values, least), way = min(close, key=lambda trial: (trial[1].backwards, trial[0][1]))
            if now - least < line:
                break
            chosen.append(way)
            whiten = self.placement.whitening(list(zip(chosen, values.tolist(), strict=True)), self.units)
            severities, now = self._fit(whiten, chosen)
        # with the spread of images that have been corrupted, what came early may no longer be needed
        while len(chosen) > 1:
            without = [(self._fit(whiten, rest), rest) for rest in itertools.combinations(chosen, len(chosen) - 1)]
            (values, least), rest = min(without, key=lambda trial: trial[0][1])
            if least - now >= line:
                break
            chosen, severities, now = list(rest), values, least
        if len(chosen) > 1:
            severities, now = self._together(whiten, chosen, severities)
        left = [way for way in self.ways if all(way.axis is not other.axis for other in chosen)]
        rows = self._chosen_rows(whiten, chosen, severities, now, left)
        self.unexplained = float(chi2.sf(now, len(self.target) - len(chosen)))
        for axis in dict.fromkeys(way.axis for way in left):
            if axis in self.twins:
                reason = f"it cannot be told from {self.twins[axis]}"
                rows.append(Found(axis.name, False, np.nan, np.nan, np.nan, "", reason))
            else:
                ways = [way for way in left if way.axis is axis and not way.backwards]
                rows.append(self._left_row(whiten, chosen, severities, ways))
        return rows

    def _looked_at(self, whiten: Vector, trials: Sequence[_Trial]) -> list[_Trial]:
        """Return trials of single ways, those that fit nearly best with the severity they point at simulated.

        Between the grid a curve is a guess, and not every corruption changes as smoothly as that.
        """
        least = min(value for (_, value), _ in trials)
        found = []
        for (values, value), way in trials:
            for _ in range(_LOOKS):
                at = float(values[-1])
                if way.backwards or value - least > _NEARLY or min(abs(at - known) for known in way.points) < _APART:
                    break
                place = self.ways.index(way)
                way = replace(way, points={**way.points, at: self.placement.shift([(way, at)])})
                self.ways[place] = way
                values, value = self._fit(whiten, [way])
            found.append(((values, value), way))
        return found

    def _together(self, whiten: Vector, chosen: Sequence[_Way], severities: Vector) -> tuple[Vector, float]:
        """Return severities and chi-square with the reference corrupted by all axes at once: curves do not just add."""
        now = np.inf
        for _ in range(_ROUNDS):
            forth = [pair for pair in zip(chosen, severities.tolist(), strict=True) if not pair[0].backwards]
            made = self.placement.shift(forth)
            apart = np.sum([np.zeros_like(made), *(way.along(severity) for way, severity in forth)], axis=0)
            whole, self.target = self.target, self.target - (made - apart)
            before = severities
            severities, now = self._fit(whiten, chosen)
            self.target = whole
            if float(np.abs(severities - before).max()) < 0.02:
                break
        return severities, now

    def _slopes(self, ways: Sequence[_Way], severities: Vector) -> Vector:
        """Return how fast the statistics move with each severity, (P, ways)."""
        columns = []
        for way, severity in zip(ways, severities, strict=True):
            low, high = max(0.0, float(severity) - 0.25), min(5.0, float(severity) + 0.25)
            columns.append((way.along(high) - way.along(low)) / (high - low))
        return np.stack(columns, 1)

    def _chosen_rows(
        self, whiten: Vector, chosen: Sequence[_Way], severities: Vector, now: float, left: Sequence[_Way]
    ) -> list[Found]:
        if not chosen:
            return []
        slopes = whiten @ self._slopes(chosen, severities)
        errors = np.sqrt(np.diag(np.linalg.pinv(slopes.T @ slopes)))
        rows = []
        for way, severity, error in zip(chosen, severities.tolist(), errors.tolist(), strict=True):
            if way.backwards:
                reason = "the images have less of it than the reference"
                rows.append(Found(way.axis.name, False, np.nan, np.nan, np.nan, "", reason))
                continue
            others = [item for item in chosen if item is not way]
            also = []
            for other in left:
                if other.backwards:
                    continue
                values, value = self._fit(whiten, [*others, other])
                if value - now < _LINE:
                    also.append((value, f"{other.axis.name} at {values[-1]:.1f}"))
                    self.twins[other.axis] = way.axis.name
            notes = [f"could be {min(also)[1]} as well"] if also else []
            if severity > 4.99:
                notes.append("at severity 5 or beyond")
            low, high = max(0.0, severity - 1.96 * error), min(5.0, severity + 1.96 * error)
            rows.append(Found(way.axis.name, True, severity, low, high, way.direction, ", ".join(notes)))
        return rows

    def _left_row(self, whiten: Vector, chosen: Sequence[_Way], severities: Vector, ways: Sequence[_Way]) -> Found:
        """Return what can be said of an axis that explains nothing: how much of it would have gone unseen."""
        rest = whiten @ (self.target - sum((w.along(float(s)) for w, s in zip(chosen, severities, strict=True)), 0.0))
        blind = whiten @ self._slopes(chosen, severities) if chosen else np.zeros((len(rest), 0))
        kept = np.eye(len(rest)) - blind @ np.linalg.pinv(blind)
        best = (0.0, 0.0, 0.0)
        alone = 0.0
        for way in ways:
            curve = np.stack([whiten @ way.along(float(s)) for s in _FINE])
            loss = (((rest - curve) @ kept) ** 2).sum(1)
            inside = _FINE[loss - loss.min() <= _LINE]
            if inside.max() >= best[2]:
                best = float(_FINE[loss.argmin()]), float(inside.min()), float(inside.max())
            hidden = _FINE[(curve**2).sum(1) <= _LINE]
            alone = max(alone, float(hidden.max()))
        value, low, high = best
        reason = ""
        if high > 1:
            if alone <= 1 and chosen:
                names = ", ".join(way.axis.name for way in chosen)
                reason = f"up to severity {high:.1f} of it could hide behind {names}"
            else:
                reason = f"images differ so much that up to severity {high:.1f} of it would not show"
        return Found(ways[0].axis.name, False, value, low, high, "", reason)
