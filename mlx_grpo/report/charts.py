"""Line charts as inline SVG: no script, colours from the page, readable without colour.

A line is told apart by its dashes and by its name in the legend; every chart carries a title and a
description for screen readers, and its figures as tooltips.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Literal

from markupsafe import Markup

Point = tuple[float, float]

WIDTH, HEIGHT = 360, 200
TOP, BOTTOM = 10, 24
LEFT, RIGHT = 30, 8
"""Margins at least; they grow with the labels."""
DIGIT = 7.7
"""Width of a digit at the labels' size, in the widest of the usual fonts."""
MOST_POINTS = 240
"""Beyond it a line is thinned to means: there are no more pixels."""
TOOLTIPS = 60


@dataclass(frozen=True)
class Line:
    """A named series; `look` is a class of the page's style sheet."""

    name: str
    points: Sequence[Point]
    look: Literal["a", "b", "c", "d", "e", "target", "faint"] = "a"
    marks: bool = False
    """Whether each point is drawn: for few, as evaluations are."""
    steps: bool = False
    """Whether a value holds until the next one, as a setting does."""


@dataclass(frozen=True)
class Band:
    """The area between two values."""

    name: str
    points: Sequence[tuple[float, ...]]
    """(x, low, high)."""


@dataclass(frozen=True)
class Chart:
    """A figure of the page."""

    title: str
    unit: str
    lines: Sequence[Line]
    bands: Sequence[Band] = ()
    axis: str = "iteration"
    """What a step from left to right is."""

    @property
    def drawn(self) -> bool:
        """Whether there is anything to see."""
        return any(len(line.points) > 1 for line in self.lines)


def svg(chart: Chart) -> Markup:
    """The chart as an SVG element."""
    lines = [_thinned(line) for line in chart.lines if line.points]
    bands = [b for b in chart.bands if b.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ys += [y for b in bands for _, low, high in b.points for y in (low, high)]
    x_ticks, y_ticks = ticks(min(xs), max(xs), whole=True), ticks(min(ys), max(ys))
    columns = {x: name for x, name in labels(x_ticks).items() if min(xs) <= x <= max(xs)}
    margins = (
        max(LEFT, 8 + DIGIT * max(map(len, labels(y_ticks).values()))),
        max(RIGHT, 1 + DIGIT / 2 * max(map(len, columns.values()), default=0)),
    )
    scale = _Scale(min(xs), max(xs), y_ticks[0], y_ticks[-1], *margins)
    head = Markup(
        '<svg viewBox="0 0 {w} {h}" role="img" aria-label="{title}: {told}"><title>{title}</title>'
    ).format(w=WIDTH, h=HEIGHT, title=chart.title, told=_told(chart))
    parts = [head, _grid(scale, columns, labels(y_ticks))]
    parts += [_band(b, scale) for b in bands]
    parts += [_line(line, scale) for line in lines]
    parts += [_tooltips(chart, scale), Markup("</svg>")]
    return Markup("").join(parts)


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Four to seven round numbers that enclose low and high."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):  # less is rounding
        low, high = (low - abs(low) / 2, low + abs(low) / 2) if low else (0.0, 1.0)
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def labels(values: Sequence[float]) -> dict[float, str]:
    """Each value with as few digits, three or more, as tell it from the others."""
    for digits in range(3, 12):
        texts = [_rounded(v, digits) for v in values]
        if len(set(texts)) == len(texts):
            break
    return dict(zip(values, texts, strict=True))


def _rounded(value: float, digits: int) -> str:
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.{max(0, digits - len(str(int(abs(value)))))}f}"
    return f"{value:.{digits}g}"


def stepped(rows: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Rows of (x, values...) between which the values jump, halfway."""
    corners = list(rows[:1])
    for before, after in pairwise(rows):
        if after[1:] != before[1:]:
            middle = (before[0] + after[0]) / 2
            corners += [(middle, *before[1:]), (middle, *after[1:])]
    return [*corners, *rows[-1:]]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Centred moving average over a twentieth of the points."""
    half = len(points) // 40
    windows = (points[max(0, i - half) : i + half + 1] for i in range(len(points)))
    return [(x, fmean(v for _, v in w)) for (x, _), w in zip(points, windows, strict=True)]


def spread(runs: Sequence[Sequence[Point]]) -> tuple[list[Point], list[tuple[float, float, float]]]:
    """(mean, mean minus and plus one standard deviation) over runs, where all have a value."""
    tables = [dict(points) for points in runs]
    common = sorted(set.intersection(*map(set, tables))) if tables else []
    means, area = [], []
    for x in common:
        values = [table[x] for table in tables]
        middle, deviation = fmean(values), stdev(values) if len(values) > 1 else 0.0
        means.append((x, middle))
        area.append((x, middle - deviation, middle + deviation))
    return means, area


def shown(value: float) -> str:
    """A number with three digits that matter."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


@dataclass(frozen=True)
class _Scale:
    left: float
    right: float
    low: float
    high: float
    before: float
    after: float
    """Margins at the left and at the right."""

    @property
    def width(self) -> float:
        return WIDTH - self.before - self.after

    def x(self, value: float) -> float:
        share = (value - self.left) / (self.right - self.left or 1)
        return self.before + share * self.width

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low or 1)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Sequence[tuple[float, ...]]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)


def _grid(scale: _Scale, columns: dict[float, str], rows: dict[float, str]) -> Markup:
    lines = Markup("").join(
        Markup(
            '<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
            '<text x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>'
        ).format(scale.before, WIDTH - scale.after, y, y, scale.before - 6, y + 4, name)
        for v, name in rows.items()
        for y in [scale.y(v)]
    )
    wide = DIGIT * (2 + max(map(len, columns.values()), default=0)) * len(columns)
    spared = list(columns.items())[:: math.ceil(wide / scale.width) or 1]  # none over the next
    return lines + Markup("").join(
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            scale.x(v), HEIGHT - 8, name
        )
        for v, name in spared
    )


def _band(band: Band, scale: _Scale) -> Markup:
    upper = [(x, high) for x, _, high in band.points]
    lower = [(x, low) for x, low, _ in reversed(band.points)]
    return Markup('<polygon class="band" points="{}"/>').format(scale.path([*upper, *lower]))


def _line(line: Line, scale: _Scale) -> Markup:
    points = stepped(line.points) if line.steps else line.points
    drawn = Markup('<polyline class="line {}" points="{}"/>').format(line.look, scale.path(points))
    if line.marks:
        drawn += Markup("").join(
            Markup('<circle class="mark {}" cx="{:.1f}" cy="{:.1f}" r="3.5"/>').format(
                line.look, scale.x(x), scale.y(y)
            )
            for x, y in line.points
        )
    return drawn


def _tooltips(chart: Chart, scale: _Scale) -> Markup:
    """Invisible columns that name the figures at their place."""
    tables = {line.name: dict(line.points) for line in chart.lines if line.look != "faint"}
    xs = sorted({x for table in tables.values() for x in table})
    xs = xs[:: max(1, math.ceil(len(xs) / TOOLTIPS))]
    width = scale.width / max(1, len(xs))
    return Markup("").join(
        Markup(
            '<rect class="tip" x="{:.1f}" y="{}" width="{:.1f}" height="{}">'
            "<title>{}</title></rect>"
        ).format(scale.x(x) - width / 2, TOP, width, HEIGHT - TOP - BOTTOM, tip)
        for x in xs
        for tip in [_tip(f"{chart.axis} {x:g}", x, tables)]
    )


def _tip(place: str, x: float, tables: dict[str, dict[float, float]]) -> str:
    there = [f"{name}: {shown(table[x])}" for name, table in tables.items() if x in table]
    return "\n".join([place, *there])


def _told(chart: Chart) -> str:
    """The chart in words."""
    words = [
        f"{line.name} from {shown(line.points[0][1])} to {shown(line.points[-1][1])}"
        for line in chart.lines
        if line.points and line.look != "faint"
    ]
    return "; ".join(words)


def _thinned(line: Line) -> Line:
    size = math.ceil(len(line.points) / MOST_POINTS)
    if size < 2 or (line.steps and len(stepped(line.points)) <= MOST_POINTS):
        return line
    chunks = [line.points[i : i + size] for i in range(0, len(line.points), size)]
    means = [(fmean(x for x, _ in c), fmean(y for _, y in c)) for c in chunks]
    return Line(line.name, means, line.look, line.marks)
