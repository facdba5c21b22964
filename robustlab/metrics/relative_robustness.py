"""Robustness against that of other models: corruption errors over a baseline's, and effective robustness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from scipy.special import expit, logit
from scipy.stats import t

from robustlab.core.errors import ConfigError, RangeError

from .base import Conditions, Context, Estimate
from .robustness import mean_of, paired, severity_mean, severity_rise, shift_values
from .smooth import everyone
from .stats import Linear, estimate_of
from .stats.compare import comparable
from .store import PredictionStore

MINIMUM = 0.01
"""Mean errors of a baseline (or their rise) up to this are too small to divide by."""
FEWEST_MODELS = 10


def condition_errors(
    conditions: Conditions, context: Context, metric: str = "balanced-accuracy"
) -> tuple[float, dict[str, list[float]]]:
    """Return (clean error, errors of every shift by severity), each 1 - metric, for ``corruption_error``.

    Args:
        conditions: Clean and shifted predictions.
        context: Operating points: multi-label decisions are made at the frozen thresholds.
        metric: Registered name of a metric on labels with values in [0, 1].
    """
    item = comparable(metric)

    def error(store: PredictionStore) -> float:
        return 1 - item.point(store, context).get("", math.nan)

    errors = {shift: [error(item.store) for item in items] for shift, items in conditions.by_shift().items()}
    return error(conditions.clean), errors


@dataclass(frozen=True)
class CorruptionErrors:
    """Errors of a model divided by those of a baseline.

    Args:
        ratios: Shift to ratio; NaN where the baseline's denominator is too small.
        raw: Shift to the numerator, as a mean over severities.
        reasons: Shift to ``"baseline_too_small"``, where that is so, or ``"undefined"``.
        below: Shift to the denominator, as a mean over severities.
    """

    ratios: Mapping[str, float]
    raw: Mapping[str, float]
    reasons: Mapping[str, str]
    below: Mapping[str, float]

    @property
    def defined(self) -> list[float]:
        """The ratios that are not NaN."""
        return [value for value in self.ratios.values() if not math.isnan(value)]

    @property
    def mean(self) -> float:
        """Mean of the defined ratios: mCE (or BE) and relative mCE (or rBE); NaN without any.

        medmnistc divides by all denominators, negative ones too: that is ``minimum=-math.inf``.
        """
        return fmean(self.defined) if self.defined else math.nan

    @property
    def median(self) -> float:
        """Median of the defined ratios, which one small denominator does not move; NaN without any."""
        return median(self.defined) if self.defined else math.nan


def corruption_error(
    errors: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]], *, minimum: float = MINIMUM
) -> CorruptionErrors:
    """Return CE_c = sum_s E[c,s] / sum_s B[c,s] of every shift: a ratio of sums, not a mean of ratios.

    With E = 1 - balanced accuracy it is MedMNIST-C's balanced error (BE). ``mean`` is mCE.

    Args:
        errors: Shift to errors by severity, of the model.
        baseline: The same of the baseline model; a published table may hold one number a shift, the mean.
        minimum: Mean errors of the baseline up to this give NaN.

    Raises:
        ConfigError: The baseline lacks a shift or a severity, or a shift has none.

    References:
        Hendrycks and Dietterich, 2019, arXiv:1903.12261; Di Salvo, Doerrich and Ledig, 2024, arXiv:2406.17536.
    """
    return _ratios("corruption_error", errors, baseline, 0.0, 0.0, minimum)


def relative_corruption_error(
    errors: Mapping[str, Sequence[float]],
    baseline: Mapping[str, Sequence[float]],
    *,
    clean: float,
    baseline_clean: float,
    minimum: float = MINIMUM,
) -> CorruptionErrors:
    """Return sum_s (E[c,s] - E0) / sum_s (B[c,s] - B0) of every shift (with balanced errors MedMNIST-C's rBE).

    Denominators near 0 or below it occur in published tables; they give NaN, and the numerators stay in ``raw``.

    Args:
        errors: As in ``corruption_error``.
        baseline: As in ``corruption_error``.
        clean: Clean error of the model; may be 0.
        baseline_clean: Clean error of the baseline.
        minimum: Mean rises of the baseline's error up to this give NaN.

    Raises:
        ConfigError: The baseline lacks a shift or a severity, or a shift has none.
    """
    return _ratios("relative_corruption_error", errors, baseline, clean, baseline_clean, minimum)


def _ratios(
    who: str,
    errors: Mapping[str, Sequence[float]],
    baseline: Mapping[str, Sequence[float]],
    clean: float,
    baseline_clean: float,
    minimum: float,
) -> CorruptionErrors:
    ratios, raw, reasons, denominators = {}, {}, {}, {}
    for shift, values in errors.items():
        base = baseline.get(shift, ())
        if not values or len(base) not in (1, len(values)):
            raise ConfigError(
                who,
                f"{len(values) or 'some'} baseline errors of {shift!r}, or their mean",
                f"{len(base)} for {len(values)} severities",
                "Run model and baseline under the same conditions.",
            )
        raw[shift] = fmean(values) - clean
        below = denominators[shift] = fmean(base) - baseline_clean
        if math.isnan(raw[shift]) or math.isnan(below):
            ratios[shift], reasons[shift] = math.nan, "undefined"
        elif below <= minimum:
            ratios[shift], reasons[shift] = math.nan, "baseline_too_small"
        else:
            ratios[shift] = raw[shift] / below
    return CorruptionErrors(ratios, raw, reasons, denominators)


def errors_over_baseline(
    conditions: Conditions,
    context: Context,
    baseline: Mapping[str, Sequence[float]],
    *,
    baseline_clean: float | None = None,
    metric: str = "balanced-accuracy",
    minimum: float = MINIMUM,
) -> dict[str, Estimate]:
    """Return ``corruption_error`` of predictions with intervals: of every shift, and as ``""`` of the mean of these.

    With ``baseline_clean`` it is ``relative_corruption_error``. Shifts whose denominator is too small leave the mean.
    The baseline's numbers are taken as known without error, as those of published tables are; the interval is the one
    of the model's errors, over patients where they are known.

    Args:
        conditions: Clean and shifted predictions.
        context: Operating points and confidence.
        baseline: Shift to the baseline's errors by severity, or to their mean.
        baseline_clean: Its clean error.
        metric: Registered name of a metric on labels with values in [0, 1], of which errors are 1 - metric.
        minimum: Denominators up to this, as means over severities, give NaN with the reason ``baseline_too_small``.

    Raises:
        ConfigError: The baseline lacks a shift or a severity.
    """
    same = paired(conditions)
    clean = same.clean
    rise = baseline_clean is not None
    found = shift_values(same, metric, context, severity_rise if rise else severity_mean)
    who = "relative_corruption_error" if rise else "corruption_error"
    values = {shift: [math.nan] * len(items) for shift, items in same.by_shift().items()}
    below = _ratios(who, values, baseline, 0.0, baseline_clean or 0.0, minimum).below
    parts = {}
    for shift, part in found.items():
        share = below[shift] if below[shift] > minimum else math.nan
        parts[shift] = Linear(((0.0 if rise else 1.0) - part.value) / share, -part.influence / share)
    kept = [part for part in parts.values() if not math.isnan(part.value)]
    nothing = Linear(math.nan, torch.zeros_like(clean.ids, dtype=torch.float64))
    whole = {"": mean_of(kept) if kept else nothing, **parts}
    bounds = (-math.inf, math.inf) if rise else (0.0, math.inf)
    out = {}
    for shift, part in whole.items():
        small = not kept if not shift else not below[shift] > minimum
        note = f"; mean of {len(kept)} of {len(parts)} shifts" if not shift else ""
        reason = "baseline_too_small" if small else "undefined"
        confidence = context.resampler.confidence
        out[shift] = estimate_of(
            clean, part, everyone(clean), confidence=confidence, bounds=bounds, reason=reason, note=note
        )
    return out


def effective_robustness(
    clean: Estimate, shifted: Estimate, baselines: Sequence[tuple[float, float]], *, confidence: float = 0.95
) -> Estimate:
    """Return how far accuracy under shift lies above what models of that clean accuracy have: rho = a - f(a0).

    f is the line logit(a) = b0 + b1 logit(a0) through baseline models, by least squares; accuracies are clipped to
    [1/(2n), 1 - 1/(2n)]. The interval joins (MOVER) those of both accuracies, taken as independent, and that of the
    fitted line at a0; the scatter of single models about the line is not in it.

    Args:
        clean: Accuracy on clean data, with its interval.
        shifted: Accuracy under shift.
        baselines: (clean accuracy, accuracy under shift) of at least 10 models that were not made robust.
        confidence: Coverage of the intervals, in (0, 1).

    Raises:
        RangeError: An accuracy of a baseline lies outside [0, 1].

    References:
        Taori et al., Measuring robustness to natural distribution shifts in image classification, 2020,
        arXiv:2007.00644; Miller et al., Accuracy on the line, 2021, arXiv:2107.04649.
    """
    if not all(0 <= value <= 1 for pair in baselines for value in pair):
        raise RangeError("effective_robustness", "accuracies as shares in [0, 1]", f"{baselines!r}", "Divide by 100.")
    n, units = min(clean.n, shifted.n), min(clean.n_units, shifted.n_units)
    if len(baselines) < FEWEST_MODELS:
        return Estimate.undefined("too_few_models", n=n, n_units=units)
    if math.isnan(clean.value) or math.isnan(shifted.value) or n == 0:
        return Estimate.undefined(clean.reason or shifted.reason or "no_samples", n=n, n_units=units)

    def odds(value: float, samples: int) -> float:
        edge = 1 / (2 * samples)
        return float(logit(min(max(value, edge), 1 - edge)))

    x, y = ([odds(pair[side], (clean, shifted)[side].n) for pair in baselines] for side in (0, 1))
    centre, level = fmean(x), fmean(y)
    width = sum((value - centre) ** 2 for value in x)
    if width == 0:
        return Estimate.undefined("no_variance", n=n, n_units=units)
    slope = sum((a - centre) * (b - level) for a, b in zip(x, y, strict=True)) / width
    freedom = len(x) - 2
    scatter = sum((b - level - slope * (a - centre)) ** 2 for a, b in zip(x, y, strict=True)) / freedom

    def line(value: float) -> float:
        return level + slope * (odds(value, clean.n) - centre)

    at = line(clean.value)
    error = math.sqrt(scatter * (1 / len(x) + (odds(clean.value, clean.n) - centre) ** 2 / width))
    half = float(t.ppf((1 + confidence) / 2, freedom)) * error
    expected = float(expit(at))
    ends = sorted(float(expit(line(value))) for value in (clean.low, clean.high))
    up = (shifted.high - shifted.value, expected - float(expit(at - half)), expected - ends[0])
    down = (shifted.value - shifted.low, float(expit(at + half)) - expected, ends[1] - expected)
    rho = shifted.value - expected
    method = f"MOVER; line through {len(x)} models, slope {slope:.3g}, residual sd {math.sqrt(scatter):.3g} (logit)"
    reason = "" if not any(map(math.isnan, (*up, *down))) else "no_interval"
    return Estimate(rho, rho - math.hypot(*down), rho + math.hypot(*up), n, units, method, reason)
