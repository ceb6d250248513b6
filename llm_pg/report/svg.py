"""Curves as inline SVG. Colours come from the page's style sheet by class, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 36
MOST_POINTS = 300
MOST_NUMBERS = 1_000  # points whose numbers are in the page, for a part of the curve; fewer of a chart with many lines
SMOOTH_FROM = 40  # points from which a line is drawn faint, with its running mean over it

Point = tuple[float, float]


@dataclass
class Series:
    """A line.

    Attributes:
        label: what it shows.
        points: (x, y).
        band: (x, low, high).
        marks: points of their own, with bars where there is a band.
        style: number of its colour.
        run: place of the run whose steps x counts; None = x counts something else, or steps of several runs.
    """

    label: str
    points: list[Point]
    band: list[tuple[float, float, float]] = field(default_factory=list)
    marks: bool = False
    style: int = 0
    run: int | None = None


@dataclass
class Chart:
    """A panel.

    Attributes:
        title: what it shows.
        unit: of y.
        caption: how to read it.
        series: its lines.
        low: a value of y that is always shown; None = the data's least.
        high: the same at the upper end.
        smooth: whether a running mean may be drawn.
        x: what the abscissa counts.
        group: the heading that it is under.
    """

    title: str
    unit: str
    caption: str
    series: list[Series]
    low: float | None = None
    high: float | None = None
    smooth: bool = True
    x: str = "step"
    group: str = "Outcome"


def thinned(points: Sequence[tuple[float, ...]], most: int = MOST_POINTS) -> list[tuple[float, ...]]:
    """At most `most` points: means of neighbours."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // most)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(sum(column) / len(part) for column in zip(*part, strict=True)) for part in parts]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """The mean over a twentieth of the points around each."""
    half = max(len(points) // 40, 1)
    out = []
    for i, (x, _) in enumerate(points):
        near = points[max(i - half, 0) : i + half + 1]
        out.append((x, sum(y for _, y in near) / len(near)))
    return out


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Three digits, short."""
    if value == 0:
        return "0"
    if 9999.5 <= abs(value) < 999_500:
        return f"{value / 1000:.3g}k"
    if abs(value) >= 999_500 or abs(value) < 0.001:
        return f"{value:.1e}".replace(".0e", "e").replace("e+0", "e").replace("e-0", "e-")
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"  # 999.7 would be 1e+03 with three digits


class Frame:
    """From data to the coordinates of the drawing."""

    def __init__(self, chart: Chart) -> None:
        xs = [p[0] for s in chart.series for p in s.points] or [0.0]
        ys = [p[1] for s in chart.series for p in s.points]
        ys += [y for s in chart.series for _, low, high in s.band for y in (low, high)]
        ys += [y for y in (chart.low, chart.high) if y is not None]
        self.x0, self.x1 = min(xs), max(xs)
        self.y0, self.y1 = min(ys, default=0.0), max(ys, default=1.0)
        if self.x0 == self.x1:
            self.x1 = self.x0 + 1
        room = (self.y1 - self.y0) * 0.06 or abs(self.y0) * 0.1 or 1.0
        if chart.low is None or self.y0 < chart.low:
            self.y0 -= room
        if chart.high is None or self.y1 > chart.high:
            self.y1 += room

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Sequence[tuple[float, ...]]) -> str:
        return "M" + "L".join(f"{self.x(p[0]):.1f} {self.y(p[1]):.1f}" for p in points)


def _axes(frame: Frame, chart: Chart) -> list[str]:
    middle, across = (TOP + HEIGHT - BOTTOM) / 2, (LEFT + WIDTH - RIGHT) / 2
    out = [
        f'<text class="axis" x="{across}" y="{HEIGHT - 3}" text-anchor="middle">{escape(chart.x)}</text>',
        f'<text class="axis" x="10" y="{middle}" transform="rotate(-90 10 {middle})" text-anchor="middle">'
        f"{escape(chart.unit or chart.title.lower())}</text>",
    ]
    for value in ticks(frame.y0, frame.y1, 4):
        y = frame.y(value)
        out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
    for value in ticks(frame.x0, frame.x1, 5):
        if value == int(value):
            words = number(value) if value < 10000 else f"{value / 1000:g}k"
            at = f'x="{frame.x(value):.1f}" y="{HEIGHT - BOTTOM + 15}"'
            out.append(f'<text {at} text-anchor="middle">{words}</text>')
    return out


def _drawn(series: Series, frame: Frame, smooth: bool) -> list[str]:
    style, out = f"s{series.style % 8}", []
    points = [(p[0], p[1]) for p in thinned(series.points)]
    if not points:
        return []
    if series.marks:
        out += [
            f'<path class="{style} bar" d="M{frame.x(x):.1f} {frame.y(low):.1f}V{frame.y(high):.1f}"/>'
            for x, low, high in series.band
        ]
        out += [f'<circle class="{style} dot" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>' for x, y in points]
    elif series.band:
        band = thinned(series.band)
        edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        out.append(f'<path class="{style} area" d="{frame.path(edge)}Z"/>')
    if smooth and len(points) >= SMOOTH_FROM:
        out.append(f'<path class="{style} line raw" d="{frame.path(points)}"/>')
        points = running_mean(points)
    out.append(f'<path class="{style} line" d="{frame.path(points)}"/>')
    return out


def spoken(chart: Chart) -> str:
    """The chart in a sentence, for those who cannot see it."""
    parts = []
    for s in chart.series:
        if s.points:
            (x0, y0), (x1, y1) = s.points[0], s.points[-1]
            parts.append(f"{s.label}: {number(y0)} at {chart.x} {x0:.0f}, {number(y1)} at {chart.x} {x1:.0f}")
    return f"{chart.title}. " + "; ".join(parts)


def svg(chart: Chart, index: int) -> str:
    """The drawing; `index` is its place in the page's data, where the numbers for hovering are."""
    frame = Frame(chart)
    inside = _axes(frame, chart)
    for series in chart.series:
        inside += _drawn(series, frame, chart.smooth)
    label = escape(spoken(chart), quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" data-chart="{index}" '
        f'aria-label="{label}">{"".join(inside)}<path class="cross" d=""/></svg>'
    )


def _brief(value: float) -> float | int:
    """A whole number without its decimal point, as it takes fewest characters in JSON."""
    return int(value) if value == int(value) else value


def hover_data(chart: Chart) -> dict[str, object]:
    """Numbers behind the drawing: limits of x in data and in pixels, and every line's points."""
    frame = Frame(chart)
    most = max(MOST_NUMBERS // max(len(chart.series), 1), MOST_POINTS)
    lines = []
    for s in chart.series:
        points = thinned(s.points, most)
        lines.append(
            {
                "label": s.label,
                "x": [_brief(round(p[0], 2)) for p in points],
                "y": [_brief(float(f"{p[1]:.4g}")) for p in points],
                "style": s.style,
                "run": s.run,
                "marks": s.marks,
                "band": [[round(x, 2), float(f"{a:.4g}"), float(f"{b:.4g}")] for x, a, b in thinned(s.band)],
            }
        )
    return {
        "of": chart.x,
        "y": chart.unit or chart.title.lower(),
        "title": chart.title,
        "low": chart.low,
        "high": chart.high,
        "smooth": chart.smooth,
        "x0": frame.x0,
        "x1": frame.x1,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "lines": lines,
    }
