"""Curves as SVG in the page itself: they take its colours, light or dark, and weigh kilobytes where plotly weighs five megabytes.

    page.charts([Chart("Loss", [Curve("training", points, band)], x_title="step")])

For what a person explores with the pointer (studies), `Page.figure` draws plotly's figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape

Point = tuple[float, float]

DOTS = 40
"""Up to so many points have a dot each, which tells its numbers to the pointer."""
TICKS = 4
LINE_HEIGHT, LETTER = 13, 6.2
"""Of text of 11 pixels, in pixels."""


@dataclass(frozen=True)
class Curve:
    """points: (x, y), sorted by x. band: (low, high) around each. Points that are not finite are left out.

    bars: the band is drawn as a bar at each point, for a few estimates; otherwise as an area. quiet: in grey. colour: number of one
    of the page's; default: the curve's place in its chart.
    """

    name: str
    points: Sequence[Point]
    band: Sequence[Point] = ()
    bars: bool = False
    quiet: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class Chart:
    """lines: values to compare with, by name. marked: an x that is pointed out, such as a recommended value.

    ticks: the values of x that have a label, with their texts; default: a few round numbers.
    """

    title: str
    curves: Sequence[Curve]
    x_title: str = ""
    lines: Mapping[str, float] = field(default_factory=dict)
    marked: float | None = None
    log: bool = False
    ticks: Mapping[float, str] = field(default_factory=dict)
    size: tuple[int, int] = (250, 150)
    """Width and height of the drawing, in the pixels in which its letters are 11 high."""


def chart_html(chart: Chart) -> str:
    """Title, legend where there is more than one thing, and the drawing."""
    legend = ""
    if len(chart.curves) + len(chart.lines) > 1:
        own = chart.curves if len(chart.curves) > 1 else ()  # of a lone one the title says it
        names = [(_colour(curve, place), curve.name) for place, curve in enumerate(own)]
        names += [(f"l{place}", name) for place, name in enumerate(chart.lines)]
        legend = "".join(f'<span><i class="{kind}"></i>{escape(name)}</span>' for kind, name in names)
    return f'<div class="chart"><p class="title">{escape(chart.title)}</p><p class="legend">{legend}</p>{_svg(chart)}</div>'


def _svg(chart: Chart) -> str:
    width, height = chart.size
    curves = [_finite(curve, chart.log) for curve in chart.curves]
    xs = [x for curve in curves for x, _ in curve.points]
    if not xs:
        return "<p>no values yet</p>"
    shown = [y for curve in curves for _, y in curve.points] + [
        y for curve in curves for pair in curve.band for y in pair
    ]
    y_axis = _Axis(min([*shown, *chart.lines.values()]), max([*shown, *chart.lines.values()]), chart.log)
    x_axis = _Axis(min(xs), max(xs), rounded=False)
    labels = [(value, _tick_text(value)) for value in y_axis.ticks()]
    left = 8 + LETTER * max(len(text) for _, text in labels)
    right, top, bottom = width - 8.0, 6.0, height - LINE_HEIGHT - (LINE_HEIGHT if chart.x_title else 0) - 4.0

    def x(value: float) -> str:
        return f"{left + (right - left) * x_axis.place(value):.1f}"

    def y(value: float) -> str:
        return f"{bottom - (bottom - top) * y_axis.place(value):.1f}"

    parts = []
    for value, text in labels:
        parts.append(f'<path class="grid" d="M{left:.1f} {y(value)}H{right:.1f}"/>')
        parts.append(f'<text x="{left - 4:.1f}" y="{float(y(value)) + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    under = chart.ticks or {value: _tick_text(value) for value in x_axis.ticks() if min(xs) <= value <= max(xs)}
    for place, (value, text) in enumerate(under.items()):
        at = x_axis.place(value)
        anchor = "start" if place == 0 and at < 0.1 else "end" if at > 0.9 else "middle"
        parts.append(
            f'<text x="{x(value)}" y="{bottom + LINE_HEIGHT:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
        )
    if chart.x_title:
        parts.append(
            f'<text x="{right:.1f}" y="{bottom + 2 * LINE_HEIGHT:.1f}" text-anchor="end">{escape(chart.x_title)}</text>'
        )
    for number, value in enumerate(chart.lines.values()):
        parts.append(f'<path class="line l{number}" d="M{left:.1f} {y(value)}H{right:.1f}"/>')
    if chart.marked is not None:
        parts.append(f'<path class="marked" d="M{x(chart.marked)} {top}V{bottom}"/>')
    for number, curve in enumerate(curves):
        parts.append(_drawn(curve, _colour(curve, number), x, y))
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.title)}">{"".join(parts)}</svg>'


def _drawn(curve: Curve, kind: str, x: Callable[[float], str], y: Callable[[float], str]) -> str:
    kind = f"{kind} quiet" if curve.quiet else kind
    path = "L".join(f"{x(a)} {y(b)}" for a, b in curve.points)
    band = ""
    if curve.band and curve.bars:
        band = (
            f'<path class="errors {kind}" d="'
            + "".join(
                f"M{x(a)} {y(low)}V{y(high)}" for (a, _), (low, high) in zip(curve.points, curve.band, strict=True)
            )
            + '"/>'
        )
    elif curve.band:
        upper = "L".join(f"{x(a)} {y(high)}" for (a, _), (_, high) in zip(curve.points, curve.band, strict=True))
        lower = "L".join(
            f"{x(a)} {y(low)}" for (a, _), (low, _) in reversed(list(zip(curve.points, curve.band, strict=True)))
        )
        band = f'<path class="band {kind}" d="M{upper}L{lower}Z"/>'
    dots = ""
    if len(curve.points) <= DOTS:
        dots = "".join(
            f'<circle class="{kind}" cx="{x(a)}" cy="{y(b)}" r="2.6"><title>{escape(curve.name)} {a:g}: {b:.4g}</title></circle>'
            for a, b in curve.points
        )
    return f'{band}<path class="curve {kind}" d="M{path}"/>{dots}'


def _finite(curve: Curve, log: bool) -> Curve:
    def fits(*heights: float) -> bool:
        return all(math.isfinite(height) and (height > 0 or not log) for height in heights)

    band = list(curve.band) or [(y, y) for _, y in curve.points]
    kept = [
        (point, pair)
        for point, pair in zip(curve.points, band, strict=True)
        if math.isfinite(point[0]) and fits(point[1])
    ]
    # A band that is not known at a point has no width there.
    pairs = [pair if fits(*pair) else (point[1], point[1]) for point, pair in kept]
    return replace(curve, points=[point for point, _ in kept], band=pairs if curve.band else ())


def _colour(curve: Curve, place: int) -> str:
    """The class of its colour; there are seven."""
    return f"c{min(place if curve.colour is None else curve.colour, 6)}"


class _Axis:
    """From values to places between 0 and 1. rounded: it begins and ends at a tick or a little beyond the values."""

    def __init__(self, low: float, high: float, log: bool = False, *, rounded: bool = True) -> None:
        self.log = log
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            wide = 0.5 if log or low == 0 else 0.1 * abs(low)
            low, high = (low - wide, high + wide) if rounded else (low - 0.5, high + 0.5)
        elif rounded:
            low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
        self.low, self.high = low, high

    def place(self, value: float) -> float:
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """A few round numbers within; of a logarithmic axis powers of ten, or where it spans less than two the ends."""
        if self.log:
            powers = range(math.ceil(self.low), math.floor(self.high) + 1)
            if len(powers) >= 2:
                return [10.0**power for power in powers[:: max(1, len(powers) // TICKS)]]
            return [float(f"{10**value:.2g}") for value in (self.low, self.high)]
        rough = (self.high - self.low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor((self.high - first * step) / step + 1e-9)
        return [(first + number) * step for number in range(count + 1)]


def _tick_text(value: float) -> str:
    if abs(value) >= 10_000 and value == round(value, -2):
        return f"{value / 1000:g}k"
    return f"{value:.4g}"
