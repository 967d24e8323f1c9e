"""Small line charts as SVG text, for pages that stand in the repository; the reports' plotly needs a browser to make a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from library.report.template import FONT

WIDTH, HEIGHT = 250, 190
"""Of one panel, in pixels."""
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 30, 26
LEGEND = 26
"""Height of a line of it."""
LETTER, SLANTED = 6.2, 44
"""Width of a letter; height of labels at a slant, where level ones would lie on each other."""
INK, GRID = "#33383d", "#dfe3e6"


@dataclass(frozen=True)
class Series:
    """points: (x, y), in the order in which they are joined. band: (x, low, high) behind them."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    dashed: bool = False
    marks: bool = True


@dataclass(frozen=True)
class Panel:
    """ticks: (x, label). Series of one name in several panels are one entry of the legend."""

    title: str
    ticks: Sequence[tuple[float, str]]
    series: Sequence[Series] = field(default_factory=tuple)


def chart(panels: Sequence[Panel], columns: int) -> str:
    """All panels on one white picture, row by row, with one legend above them."""
    rows, width = math.ceil(len(panels) / columns), columns * WIDTH
    legend, top = _legend(panels, width)
    row = HEIGHT + SLANTED * any(_is_crowded(panel) for panel in panels)
    height = top + rows * row
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="{FONT}" font-size="11" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *legend,
    ]
    for place, panel in enumerate(panels):
        x, y = place % columns * WIDTH, top + place // columns * row
        parts += [f'<g transform="translate({x} {y})">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def ticks_between(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from below `low` to above `high`, about `count` steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _is_crowded(panel: Panel) -> bool:
    """Whether the labels below a panel would lie on each other."""
    return sum(LETTER * (len(label) + 1) for _, label in panel.ticks) > WIDTH - LEFT


def _legend(panels: Sequence[Panel], width: int) -> tuple[list[str], int]:
    """Its parts, in as many lines as it takes, and its height."""
    known = {series.name: series for panel in panels for series in reversed(panel.series) if series.name}
    parts, x, y = [], float(LEFT), 0
    for name, series in sorted(known.items(), key=lambda item: _first_place(panels, item[0])):
        room = 48 + LETTER * len(name)
        if x > LEFT and x + room > width:
            x, y = float(LEFT), y + LEGEND
        parts.append(f'<line x1="{x:.0f}" y1="{y + 13}" x2="{x + 22:.0f}" y2="{y + 13}" {_stroke(series)}/>')
        parts.append(f'<text x="{x + 28:.0f}" y="{y + 17}">{escape(name)}</text>')
        x += room
    return parts, y + LEGEND


def _first_place(panels: Sequence[Panel], name: str) -> int:
    names = [series.name for panel in panels for series in panel.series]
    return names.index(name)


def _panel(panel: Panel) -> list[str]:
    values = [y for one in panel.series for _, y in one.points]
    values += [y for one in panel.series for _, *ends in one.band for y in ends]
    levels = ticks_between(min(values), max(values))
    places = [x for x, _ in panel.ticks]
    left, right = min(places), max(places)
    margin = 0.06 * ((right - left) or 1)

    def across(x: float) -> float:
        return LEFT + (x - left + margin) / (right - left + 2 * margin) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - levels[0]) / (levels[-1] - levels[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="20" font-weight="600">{escape(panel.title)}</text>']
    digits = max(0, -math.floor(math.log10(levels[1] - levels[0]) + 1e-9))
    for level in levels:
        parts.append(f'<path d="M{LEFT} {down(level):.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        label = f"{level:.{digits}f}".replace("-", "−")
        parts.append(f'<text x="{LEFT - 6}" y="{down(level) + 4:.1f}" text-anchor="end">{label}</text>')
    for x, label in panel.ticks:
        turned = f'end" transform="rotate(-45 {across(x):.1f} {HEIGHT - 13})' if _is_crowded(panel) else "middle"
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - 9}" text-anchor="{turned}">{escape(label)}</text>')
    for series in panel.series:
        if series.band:
            edge = [(x, high) for x, _, high in series.band] + [(x, low) for x, low, _ in reversed(series.band)]
            corners = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in edge)
            parts.append(f'<polygon points="{corners}" fill="{series.colour}" fill-opacity="0.15"/>')
        line = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in series.points)
        parts.append(f'<polyline points="{line}" fill="none" {_stroke(series)}/>')
        if series.marks:
            parts += [
                f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="2.6" fill="{series.colour}"/>'
                for x, y in series.points
            ]
    return parts


def _stroke(series: Series) -> str:
    dash = ' stroke-dasharray="5 4"' if series.dashed else ""
    return f'stroke="{series.colour}" stroke-width="1.6"{dash}'
