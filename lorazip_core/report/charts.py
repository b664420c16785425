"""What the charts of all pages share: their look, names shown literally, bars and heat maps of any number of rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
from plotly.graph_objects import Bar, Figure, Heatmap, Scatter

from ..base.text import plain

# Paul Tol's "bright" scheme: told apart by the colour-blind too, on white and on black.
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377")
GREY = "#999999"
SCALE = "Cividis"

# Rows of a chart: so many can be named at their ticks, and so many at most be drawn.
NAMED_ROWS = 60
MOST_ROWS = 2000
_MOST_BARS = 200
_TICK_LETTERS = 30


class Bars(NamedTuple):
    """Rows from the top down: their values, what to say of each, and the group that colours each."""

    names: Sequence[str]
    values: Sequence[float]
    hover: Sequence[str]
    """Text with plotly's markup, so every name in it has to be `literal`."""
    groups: Sequence[str]


class Grid(NamedTuple):
    """A matrix to show as a heat map, and the names of its rows (from the top down) and columns."""

    values: numpy.ndarray
    """[rows, columns]; NaN is a gap."""
    rows: Sequence[str]
    columns: Sequence[str]


class Ticks(NamedTuple):
    """Labels of an axis, each at a position in rows or columns."""

    positions: Sequence[float]
    labels: Sequence[str]


def literal(text: str) -> str:
    """``text`` for plotly, which takes tags and entities in its labels for markup: all of it is shown as it is."""
    return plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def short(text: str) -> str:
    """A name for a tick: `literal`, and cut in its middle if it is long."""
    text = plain(text)
    if len(text) > _TICK_LETTERS:
        half = (_TICK_LETTERS - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    return literal(text)


def empty_figure(height: int, x: str, y: str, **layout: Any) -> Figure:
    """A figure without traces; ``height`` in pixels, the width is that of the page. Its colours are the page's."""
    figure = Figure()
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 16, "r": 16, "t": 28, "b": 16},
        font={"family": "system-ui, -apple-system, Segoe UI, Roboto, Liberation Sans, sans-serif"},
        xaxis={"title": {"text": x, "standoff": 10}, "automargin": True, "zeroline": False, "ticks": ""},
        yaxis={"title": {"text": y, "standoff": 14}, "automargin": True, "zeroline": False, "ticks": ""},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
        **layout,
    )
    return figure


def rows_height(rows: int, *, most: int) -> int:
    """Pixels for so many rows: 20 each while they are few, and what lies between two and ``most`` for many."""
    return max(170, min(rows * 20, most)) + 80


def colours(groups: Sequence[str]) -> dict[str, str]:
    """A colour for each group; where there are more groups than colours, the smallest share grey."""
    by_size = sorted(set(groups), key=lambda group: (-groups.count(group), group))
    chosen = set(by_size[: len(COLOURS)])
    free = iter(COLOURS)
    return {group: next(free) if group in chosen else GREY for group in natural_order(by_size)}


def natural_order(names: Sequence[str]) -> list[str]:
    """Sorted so that 2 comes before 10."""
    return sorted(names, key=natural_key)


def natural_key(name: str) -> list[str | int]:
    """Text and numbers in turn, so that only like is compared with like."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]


def bars(data: Bars, *, x: str, y: str) -> Figure:
    """Horizontal bars, one a row; points where bars would be thinner than a pixel and hide one another.

    The rows are named at the ticks only while there is room for it.
    """
    number = len(data.names)
    figure = empty_figure(rows_height(number, most=560), x, y, barmode="overlay")
    for group, colour in colours(data.groups).items():
        members = [row for row, own in enumerate(data.groups) if own == group]
        common = {
            "name": literal(group),
            "x": [data.values[row] for row in members],
            "y": members,
            "hovertext": [data.hover[row] for row in members],
            "hovertemplate": "%{hovertext}<extra></extra>",
        }
        if number > _MOST_BARS:
            figure.add_trace(Scatter(mode="markers", marker={"color": colour, "size": 4}, **common))
        else:  # a width, since plotly would take it from the rows of this group alone
            marker = {"color": colour, "line": {"width": 0}}
            figure.add_trace(Bar(orientation="h", width=0.75, marker=marker, **common))
    figure.update_layout(showlegend=len(set(data.groups)) > 1)
    figure.update_xaxes(rangemode="tozero")
    _rows_axis(figure, data.names)
    return figure


def twin_bars(
    names: Sequence[str],
    values: tuple[Sequence[float], Sequence[float]],
    *,
    titles: tuple[str, str],
    hover: Sequence[str],
) -> Figure:
    """Two figures of each row as horizontal bars, side by side: the same rows, each half with its own axis."""
    figure = empty_figure(rows_height(len(names), most=560), titles[0], "", bargap=0.4)
    for half, (axis, colour) in enumerate(zip(("x", "x2"), COLOURS[::2], strict=False)):
        figure.add_trace(
            Bar(
                orientation="h",
                x=list(values[half]),
                y=list(range(len(names))),
                xaxis=axis,
                hovertext=list(hover),
                hovertemplate="%{hovertext}<extra></extra>",
                marker={"color": colour, "line": {"width": 0}},
            )
        )
    figure.update_layout(
        showlegend=False, xaxis2=figure.layout.xaxis.to_plotly_json() | {"title": {"text": titles[1], "standoff": 10}}
    )
    figure.update_xaxes(rangemode="tozero", nticks=6)
    figure.update_layout(xaxis_domain=[0, 0.48], xaxis2_domain=[0.54, 1])
    _rows_axis(figure, names)
    return figure


def limit_lines(figure: Figure, limits: Sequence[tuple[float, str]], *, rows: int) -> None:
    """A line across all rows for each (value, text). The legend names them, where texts never cover one another."""
    for (value, text), dash in zip(limits, ("dash", "dot"), strict=False):
        figure.add_trace(
            Scatter(
                name=text,
                x=[value, value],
                y=[-0.5, rows - 0.5],
                mode="lines",
                line={"dash": dash, "width": 2},
                hoverinfo="skip",
                meta={"colour": "text"},
            )
        )
    if limits:
        figure.update_layout(showlegend=True)


def heat_map(
    grid: Grid, *, x: str, y: str, unit: str, most: float, columns: Ticks, rows: Ticks | None = None
) -> Figure:
    """A cell for each value, coloured from 0 to ``most``. The rows are named while there is room, or have ``rows``."""
    number = len(grid.rows)
    figure = empty_figure(rows_height(number, most=900), x, y)
    figure.add_trace(
        Heatmap(
            z=grid.values.astype(numpy.float32),  # half the size, and more digits than anybody reads
            zmin=0,
            zmax=most,
            colorscale=SCALE,
            colorbar={"title": {"text": unit, "side": "right"}, "thickness": 12, "outlinewidth": 0},
            meta={"rows": [literal(name) for name in grid.rows], "columns": [literal(name) for name in grid.columns]},
            hovertemplate="%{text}<br>" + unit + " %{z:.4f}<extra></extra>",
            hoverongaps=False,
        )
    )
    figure.update_xaxes(tickmode="array", tickvals=columns.positions, ticktext=columns.labels, showgrid=False)
    _rows_axis(figure, grid.rows, rows)
    figure.update_yaxes(showgrid=False)
    return figure


def _rows_axis(figure: Figure, names: Sequence[str], ticks: Ticks | None = None) -> None:
    """Rows from the top down, each by its number: two names that look the same are still two rows."""
    if ticks is None and len(names) <= NAMED_ROWS:
        ticks = Ticks(range(len(names)), [short(name) for name in names])
    figure.update_yaxes(range=[len(names) - 0.5, -0.5], showgrid=False)
    if ticks is None:
        figure.update_yaxes(showticklabels=False)
    else:
        figure.update_yaxes(tickmode="array", tickvals=list(ticks.positions), ticktext=list(ticks.labels))
