"""Charts as inline SVG: pure functions from numbers to markup; colours come from the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from robustlab.report import words
from robustlab.report.ood_views import Roc
from robustlab.report.rows import Row
from robustlab.report.views import Curve, Drop, Point

_XY = tuple[float, float]
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Frame:
    """A plotting area: pixel box (left, top, right, bottom) and the data ranges on it."""

    box: tuple[float, float, float, float]
    xs: _XY
    ys: _XY = (0.0, 1.0)

    def x(self, value: float) -> float:
        """Return the horizontal pixel of a value, kept inside the box."""
        left, _, right, _ = self.box
        return left + (right - left) * _share(value, self.xs)

    def y(self, value: float) -> float:
        """Return the vertical pixel of a value, kept inside the box."""
        _, top, _, bottom = self.box
        return bottom - (bottom - top) * _share(value, self.ys)


def curve_chart(curve: Curve) -> Markup:
    """Draw accuracy and silent failures of one shift over severity, with interval bands."""
    width, height = 272, 196
    last = max(point.condition.severity for point in curve.points)
    frame = Frame((30, 10, width - 12, height - 50), (0.0, max(last, 1.0)))
    body = [_shares_axis(frame)]
    every = math.ceil(len(curve.points) / 7)
    for point in (p for i, p in enumerate(curve.points) if i % every == 0):
        label, below = _tick_labels(point)
        body.append(_x_tick(frame, point.condition.severity, label, below))
    clean = curve.points[0].accuracy
    if clean is not None and not math.isnan(clean.value):
        body.append(_line(frame, (frame.xs[0], clean.value), (frame.xs[1], clean.value), "ref"))
    body.append(_series(frame, curve.points, [p.silent for p in curve.points], "sil"))
    body.append(_series(frame, curve.points, [p.accuracy for p in curve.points], "acc"))
    unit = next((p.condition.unit for p in curve.points if p.condition.unit), "")
    caption = f"severity (below: {unit})" if unit and curve.kind != "attack" else "severity"
    caption = "budget eps" if curve.kind == "attack" else caption
    left, _, right, _ = frame.box
    body.append(_text((left + right) / 2, height - 6, caption, "axis-title", "middle"))
    label = f"{curve.shift}: " + "; ".join(
        f"{p.condition.where}: accuracy {words.estimate(p.accuracy)}" for p in curve.points if p.accuracy is not None
    )
    return _svg(width, height, label, body)


def attack_chart(curves: Sequence[Curve], chance: float | None) -> Markup:
    """Draw accuracy over the budget for every attack, with the level of guessing."""
    width, height = 560, 280
    last = max(_eps(p) for curve in curves for p in curve.points)
    frame = Frame((40, 14, width - 110, height - 46), (0.0, last or 1.0))
    body = [_shares_axis(frame)]
    for point in max(curves, key=lambda c: len(c.points)).points:
        label = "clean" if point.condition.shift == "clean" else point.condition.where.removeprefix("eps ")
        body.append(_x_tick(frame, _eps(point), label, ""))
    if chance is not None:
        body.append(_line(frame, (0.0, chance), (frame.xs[1], chance), "ref"))
        body.append(_text(frame.box[2] + 6, frame.y(chance) + 3.5, f"guessing {100 * chance:.0f} %", "tick", "start"))
    for number, curve in enumerate(curves):
        kind = f"acc a{number % 3}"
        points = [(_eps(p), p.accuracy) for p in curve.points]
        body.append(_band_line(frame, points, kind))
        end = points[-1][1]
        if end is not None and not math.isnan(end.value):
            y = frame.y(end.value) + 3.5 + (12 if chance is not None and abs(end.value - chance) < 0.04 else 0)
            body.append(_text(frame.box[2] + 6, y, curve.shift, f"tick strong k{number % 3}", "start"))
    body.append(_text((frame.box[0] + frame.box[2]) / 2, height - 6, "budget eps", "axis-title", "middle"))
    label = "Accuracy under attack. " + " ".join(
        f"{c.shift} {p.condition.where}: {words.estimate(p.accuracy)};" for c in curves for p in c.points if p.accuracy
    )
    return _svg(width, height, label, body)


def drop_bar(item: Drop, reach: _XY, limit: float) -> Markup:
    """Draw the fall in accuracy as a bar with its interval, the margin as a dashed line."""
    width, height = 260, 22
    frame = Frame((2, 0, width - 2, height), reach)
    row, mid = item.drop, height / 2
    body = [_line(frame, (0.0, 0.0), (0.0, 1.0), "zero"), _line(frame, (limit, 0.0), (limit, 1.0), "margin")]
    if not math.isnan(row.value):
        start, end = sorted((frame.x(0.0), frame.x(row.value)))
        kind = item.word.replace(" ", "-")
        body.append(
            Markup('<rect class="bar {}" x="{}" y="6" width="{}" height="10"/>').format(
                kind, *_px(start, max(end - start, 1.0))
            )
        )
        body.append(_whisker(frame, row.low, row.high, mid))
    label = f"{words.points(row.value)} points, {words.points(row.low)} to {words.points(row.high)}"
    return _svg(width, height, label, body, "cell")


def dot_whisker(row: Row, reach: _XY, reference: float | None = None) -> Markup:
    """Draw an estimate with its interval on a common scale."""
    width, height = 200, 20
    frame = Frame((6, 0, width - 6, height), reach)
    body = [_line(frame, (reach[0], 0.5), (reach[1], 0.5), "rail")]
    if reference is not None and not math.isnan(reference):
        body.append(_line(frame, (reference, 0.0), (reference, 1.0), "margin"))
    if not math.isnan(row.value):
        body.append(_whisker(frame, row.low, row.high, height / 2))
        body.append(_circle(frame.x(row.value), height / 2, 4.0, "dot"))
    return _svg(width, height, words.estimate(row), body, "cell")


def truth_marks(estimate: float, low: float, high: float, truth: float) -> Markup:
    """Draw an estimate with its interval, and the known truth as a diamond."""
    width, height = 200, 22
    values = [v for v in (estimate, low, high, truth) if not math.isnan(v)]
    if not values:
        return Markup("")
    pad = max(0.15 * (max(values) - min(values)), 0.01)
    frame = Frame((6, 0, width - 6, height), (min(values) - pad, max(values) + pad))
    mid = height / 2
    body = [_line(frame, (frame.xs[0], 0.5), (frame.xs[1], 0.5), "rail"), _whisker(frame, low, high, mid)]
    if not math.isnan(estimate):
        body.append(_circle(frame.x(estimate), mid, 4.0, "dot"))
    if not math.isnan(truth):
        body.append(
            Markup('<path class="truth" d="M{0} {1}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>').format(
                *_px(frame.x(truth), mid - 5.5)
            )
        )
    return _svg(width, height, f"estimate {estimate:.3f}, {low:.3f} to {high:.3f}, truth {truth}", body, "cell")


def rate_strip(row: Row, most: float, kind: str) -> Markup:
    """Draw a rate with its interval on the scale of the two big numbers."""
    width, height = 300, 16
    frame = Frame((1, 0, width - 1, height), (0.0, most))
    body = [_line(frame, (0.0, 0.5), (most, 0.5), "rail")]
    if not math.isnan(row.value):
        end = frame.x(row.value)
        body.append(
            Markup('<rect class="strip {}" x="1" y="5" width="{}" height="6"/>').format(kind, *_px(max(end - 1, 1.5)))
        )
        body.append(_whisker(frame, row.low, row.high, height / 2))
    return _svg(width, height, words.estimate(row), body, "strip-svg")


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability diagram: mean probability, frequency with its interval, band under calibration."""

    probability: float
    frequency: float
    low: float
    high: float
    band_low: float
    band_high: float
    count: int


def reliability_chart(bins: Sequence[Bin], name: str, subject: str) -> Markup:
    """Draw frequency over probability with intervals, the band of a perfectly calibrated model, and counts below."""
    size, strip = 330, 54
    width, height = size + 10, size + strip + 44
    frame = Frame((40, 12, width - 14, size), (0.0, 1.0))
    left, _, right, bottom = frame.box
    body = [_shares_axis(frame), _line(frame, (0.0, 0.0), (1.0, 1.0), "ref")]
    filled = [item for item in bins if item.count > 0]
    body.append(
        _polygon(
            frame,
            [(b.probability, b.band_high) for b in filled],
            [(b.probability, b.band_low) for b in filled],
            "band null",
        )
    )
    body.append(_polyline(frame, [(b.probability, b.frequency) for b in filled], "line acc thin"))
    for item in filled:
        x = frame.x(item.probability)
        body.append(
            Markup('<line class="whisker" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
                *_px(x, frame.y(item.low), frame.y(item.high))
            )
        )
        body.append(
            _circle(
                x,
                frame.y(item.frequency),
                3.6,
                "dot",
                f"{item.count:,} at {item.probability:.2f}: {item.frequency:.2f} came true",
            )
        )
    base, most = bottom + 26 + strip - 14, max((b.count for b in filled), default=1)
    step = (right - left) / max(len(bins), 1)
    for number, item in enumerate(bins):
        if item.count:
            tall = (strip - 16) * math.log1p(item.count) / math.log1p(most)
            body.append(
                Markup('<rect class="count" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
                    *_px(left + number * step + 1, base - tall, max(step - 2, 1.0), tall), f"{item.count:,}"
                )
            )
    for tick in _TICKS:
        body.append(_text(frame.x(tick), bottom + 14, f"{100 * tick:.0f}", "tick", "middle"))
    body.append(_line_px(left, base, right, base, "axis"))
    body.append(
        _text((left + right) / 2, height - 8, f"{subject}, % (counts below, log scale)", "axis-title", "middle")
    )
    label = f"Reliability diagram, {name}: how often it came true, by {subject}. " + " ".join(
        f"{b.probability:.2f}: {b.frequency:.2f} ({b.low:.2f} to {b.high:.2f}), n={b.count}." for b in filled
    )
    return _svg(width, height, label, body)


def score_histogram(inside: Sequence[float], outside: Sequence[float], reach: _XY, label: str) -> Markup:
    """Draw the shares of in-distribution and OOD samples by score, as two overlaid histograms."""
    width, height = 272, 140
    top = max([*inside, *outside, 1e-9])
    frame = Frame((8, 8, width - 8, height - 24), (0.0, float(max(len(inside), 1))), (0.0, top))
    body = []
    for kind, shares in (("id", inside), ("ood", outside)):
        corners = [(float(i + side), share) for i, share in enumerate(shares) for side in (0, 1)]
        body.append(_polygon(frame, corners, [(float(len(shares)), 0.0), (0.0, 0.0)][::-1], f"hist {kind}"))
    left, _, right, bottom = frame.box
    body.append(_line_px(left, bottom, right, bottom, "axis"))
    body.append(_text(left, height - 8, f"{reach[0]:.3g}", "tick", "start"))
    body.append(_text((left + right) / 2, height - 8, "score; right is more unusual", "axis-title", "middle"))
    body.append(_text(right, height - 8, f"{reach[1]:.3g}", "tick", "end"))
    return _svg(width, height, label, body)


def roc_chart(curves: Sequence[Roc], name: str, named: int = 3) -> Markup:
    """Draw the ROC curves of several scores on one set, the first few in colours and named, the others thin."""
    size = 236
    width, height = size + 36, size + 30
    frame = Frame((34, 8, width - 10, height - 38), (0.0, 1.0))
    left, _, right, bottom = frame.box
    body = [_shares_axis(frame), _line(frame, (0.0, 0.0), (1.0, 1.0), "ref")]
    for tick in _TICKS:
        body.append(_text(frame.x(tick), bottom + 14, f"{100 * tick:.0f}", "tick", "middle"))
    for curve in reversed(curves[named:]):
        body.append(_polyline(frame, curve.points, "line thin other"))
    for number, curve in reversed(list(enumerate(curves[:named]))):
        body.append(_polyline(frame, curve.points, f"line acc a{number}"))
        y = bottom - 8 - 14 * (min(named, len(curves)) - 1 - number)
        text = f"{curve.scorer} {words.number('auroc-ood', curve.row.value)}"
        body.append(_text(right - 6, y, text, f"tick strong k{number}", "end"))
    body.append(_text((left + right) / 2, height - 8, "false alarms, %", "axis-title", "middle"))
    label = f"ROC curves on {name}: share of foreign images found over share of known ones flagged. " + " ".join(
        f"{curve.scorer}: AUROC {words.estimate(curve.row)}." for curve in curves
    )
    return _svg(width, height, label, body)


def _share(value: float, reach: _XY) -> float:
    low, high = reach
    return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.0


def _px(*values: float) -> tuple[str, ...]:
    return tuple(f"{value:.1f}" for value in values)


def _eps(point: Point) -> float:
    return (
        0.0
        if point.condition.kind == "clean"
        else point.condition.amount
        if not math.isnan(point.condition.amount)
        else point.condition.severity
    )


def _tick_labels(point: Point) -> tuple[str, str]:
    condition = point.condition
    if condition.kind == "clean":
        return "0", "clean"
    if condition.kind == "attack":
        return condition.where.removeprefix("eps "), ""
    return f"{condition.severity:g}", "" if math.isnan(condition.amount) else f"{condition.amount:.3g}"


def _svg(width: float, height: float, label: str, body: Iterable[Markup], kind: str = "chart") -> Markup:
    return Markup(
        '<svg class="{}" viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">{}</svg>'
    ).format(kind, width, height, width, height, label, Markup("").join(body))


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(kind, *_px(x, y), anchor, text)


def _line_px(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(kind, *_px(x1, y1, x2, y2))


def _line(frame: Frame, start: _XY, end: _XY, kind: str) -> Markup:
    return _line_px(frame.x(start[0]), frame.y(start[1]), frame.x(end[0]), frame.y(end[1]), kind)


def _circle(x: float, y: float, radius: float, kind: str, tip: str = "") -> Markup:
    inner = Markup("<title>{}</title>").format(tip) if tip else Markup("")
    return Markup('<circle class="{}" cx="{}" cy="{}" r="{}">{}</circle>').format(kind, *_px(x, y, radius), inner)


def _whisker(frame: Frame, low: float, high: float, mid: float) -> Markup:
    if math.isnan(low) or math.isnan(high):
        return Markup("")
    a, b = frame.x(low), frame.x(high)
    return Markup('<path class="whisker" d="M{0} {2}V{3}M{0} {4}H{1}M{1} {2}V{3}"/>').format(
        *_px(a, b, mid - 3.5, mid + 3.5, mid)
    )


def _shares_axis(frame: Frame) -> Markup:
    left, _, right, _ = frame.box
    parts = []
    for tick in _TICKS:
        y = frame.y(tick)
        parts.append(_line_px(left, y, right, y, "axis" if tick == 0 else "grid"))
        parts.append(_text(left - 6, y + 3.5, f"{100 * tick:.0f}", "tick", "end"))
    return Markup("").join(parts)


def _x_tick(frame: Frame, value: float, label: str, below: str) -> Markup:
    x, bottom = frame.x(value), frame.box[3]
    parts = [_line_px(x, bottom, x, bottom + 3, "axis"), _text(x, bottom + 14, label, "tick", "middle")]
    if below:
        parts.append(_text(x, bottom + 27, below, "tick faint", "middle"))
    return Markup("").join(parts)


def _series(frame: Frame, points: Sequence[Point], rows: Sequence[Row | None], kind: str) -> Markup:
    return _band_line(frame, [(p.condition.severity, row) for p, row in zip(points, rows, strict=True)], kind)


def _band_line(frame: Frame, points: Sequence[tuple[float, Row | None]], kind: str) -> Markup:
    drawn = [(x, row) for x, row in points if row is not None and not math.isnan(row.value)]
    banded = [(x, row) for x, row in drawn if not (math.isnan(row.low) or math.isnan(row.high))]
    parts = [
        _polygon(frame, [(x, r.high) for x, r in banded], [(x, r.low) for x, r in banded], f"band {kind}"),
        _polyline(frame, [(x, row.value) for x, row in drawn], f"line {kind}"),
        *(
            _circle(
                frame.x(x),
                frame.y(r.value),
                2.6,
                f"mark {kind}",
                f"{words.title(r.metric)} {words.estimate(r)}, n={r.n:,}",
            )
            for x, r in drawn
        ),
    ]
    return Markup("").join(parts)


def _polyline(frame: Frame, points: Sequence[_XY], kind: str) -> Markup:
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    return Markup('<polyline class="{}" points="{}"/>').format(escape(kind), path)


def _polygon(frame: Frame, upper: Sequence[_XY], lower: Sequence[_XY], kind: str) -> Markup:
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in [*upper, *reversed(lower)])
    return Markup('<polygon class="{}" points="{}"/>').format(kind, path)
