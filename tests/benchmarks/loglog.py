"""A plain picture of lines over two logarithmic axes, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 560, 460  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 40, 52
LINE_HEIGHT = 17
PANELS_IN_A_ROW = 2
_COLOURS = (
    *("#4e79a7", "#f28e2b", "#76b7b2", "#59a14f", "#b07aa1", "#9c755f"),
    *("#edc948", "#ff9da7", "#1b9e77", "#8c8c8c", "#7b3294", "#a6761d", "#66a61e"),
)
_STRONG = ("#d62728", "#8b0000", "#ff7f7f")


class Line(NamedTuple):
    """Points from left to right. ``strong`` ones are ours, with dots; a ``bound`` is dashed and black."""

    name: str
    points: Sequence[tuple[float, float]]
    strong: bool = False
    bound: bool = False


class Panel(NamedTuple):
    title: str
    lines: Sequence[Line]


def svg(panels: Sequence[Panel], x_label: str, y_label: str, x_range: tuple[float, float], y_least: float) -> str:
    """Panels, two in a row, over one legend; y up to 1. What is outside the axes is cut off."""
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    strokes = {line.name: _stroke(line, names) for panel in panels for line in panel.lines}
    across = min(len(panels), PANELS_IN_A_ROW)
    columns = max(1, WIDTH * across // 280)
    bottom = HEIGHT * math.ceil(len(panels) / PANELS_IN_A_ROW)
    height = bottom + math.ceil(len(names) / columns) * LINE_HEIGHT + 12
    size = f'width="{WIDTH * across}" height="{height}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        row, column = divmod(number, PANELS_IN_A_ROW)
        out.append(f'<g transform="translate({column * WIDTH},{row * HEIGHT})">')
        out += _panel(panel, number, strokes, x_label, y_label, x_range, (y_least, 1.0))
        out.append("</g>")
    for place, name in enumerate(names):
        x, y = 20 + place % columns * 280, bottom + place // columns * LINE_HEIGHT
        out.append(f'<path d="M{x},{y}h26" fill="none" {strokes[name]}/>')
        out.append(f'<text x="{x + 32}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*out, "</svg>", ""])


def _stroke(line: Line, names: Sequence[str]) -> str:
    if line.bound:
        return 'stroke="black" stroke-width="1.5" stroke-dasharray="5 3"'
    if line.strong:
        return f'stroke="{_STRONG[names.index(line.name) % len(_STRONG)]}" stroke-width="2.5"'
    return f'stroke="{_COLOURS[names.index(line.name) % len(_COLOURS)]}" stroke-width="1.5"'


def _panel(
    panel: Panel,
    number: int,
    strokes: dict[str, str],
    x_label: str,
    y_label: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> Iterator[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x_of(value: float) -> float:
        return LEFT + (right - LEFT) * _share(value, x_range)

    def y_of(value: float) -> float:
        return bottom - (bottom - TOP) * _share(value, y_range)

    frame = f'x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}"'
    yield f'<clipPath id="inside{number}"><rect {frame}/></clipPath>'
    yield f'<text x="{LEFT}" y="{TOP - 14}" font-size="14">{escape(panel.title)}</text>'
    for value in _ticks(*x_range):
        x = x_of(value)
        yield f'<path d="M{x:.1f},{TOP}V{bottom}" stroke="#e4e4e4"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>'
    for value in _ticks(*y_range):
        y = y_of(value)
        yield f'<path d="M{LEFT},{y:.1f}H{right}" stroke="#e4e4e4"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    yield f'<rect {frame} fill="none" stroke="#888"/>'
    yield f'<text x="{(LEFT + right) / 2}" y="{bottom + 36}" text-anchor="middle">{escape(x_label)}</text>'
    middle = (TOP + bottom) / 2
    yield f'<text transform="translate(16,{middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    yield f'<g clip-path="url(#inside{number})" fill="none">'
    for line in sorted(panel.lines, key=lambda line: line.strong):  # ours on top
        places = [f"{x_of(x):.0f},{y_of(max(y, y_range[0] / 10)):.0f}" for x, y in line.points]
        yield f"<g {strokes[line.name]}><title>{escape(line.name)}</title>"
        if len(places) > 1:
            yield f'<path d="M{"L".join(places)}"/>'
        width = 0 if line.bound else 7 if line.strong else 4
        if width:
            dots = "".join(f"M{place}h0" for place in places)
            yield f'<path d="{dots}" stroke-linecap="round" stroke-width="{width}"/>'
        yield "</g>"
    yield "</g>"


def _share(value: float, limits: tuple[float, float]) -> float:
    low, high = map(math.log, limits)
    return (math.log(value) - low) / (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    return [round(value, 12) for value in every if low * 0.999 <= value <= high * 1.001]
