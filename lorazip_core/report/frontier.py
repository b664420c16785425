"""A frontier, bytes against squared error, as a chart and as a table with the same figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from plotly.graph_objects import Figure, Scatter

from ..base.text import error, megabytes, times
from ..bundle.summary import Summary
from ..planning.frontier import FrontierPoint
from .charts import COLOURS, GREY, empty_figure, literal
from .page import Chart, Table

_HEIGHT = 440
_WRITTEN = COLOURS[4]


class _Row(NamedTuple):
    """A point as the chart and the table have it."""

    method: str
    what: str
    size: int
    mean: float
    worst: float

    @classmethod
    def of(cls, point: FrontierPoint) -> _Row:
        what = "predicted, chosen" if point.chosen else "predicted"
        return cls(point.method, what, point.bytes, point.mean_squared_error, point.max_squared_error)


def frontier_sections(
    points: Sequence[FrontierPoint],
    original: int,
    *,
    method: str,
    written: Summary | None = None,
    bytes_resident: int | None = None,
    weighted: bool = False,
) -> tuple[Chart, Table]:
    """All ``points`` of a collection of ``original`` bytes, and of the bundle that was ``written`` what it has.

    ``bytes_resident`` are those of the bundle on a device, where they are what the points are about. Errors that are
    ``weighted`` by inputs are not those of weights, which were measured.
    """
    rows = [_Row.of(point) for point in points]
    if written is not None and not weighted:
        assert written.mean_squared_error is not None
        assert written.max_squared_error is not None
        rows.append(
            _Row(
                method,
                "measured",
                written.bytes_bundle if bytes_resident is None else bytes_resident,
                written.mean_squared_error,
                written.max_squared_error,
            )
        )
        rows.sort(key=lambda row: -row.size)
    return _chart(points, rows, weighted=weighted), _table(rows, original)


def _counted(points: Sequence[FrontierPoint]) -> str:
    """Which bytes they are about."""
    return "bundle, MB" if all(point.bytes_resident is None for point in points) else "on a device, MB"


def _chart(points: Sequence[FrontierPoint], rows: Sequence[_Row], *, weighted: bool) -> Chart:
    what = "squared error, weighted by inputs" if weighted else "squared error"
    figure = empty_figure(_HEIGHT, _counted(points), what)
    methods = sorted({point.method for point in points})
    colour = dict(zip(methods, [*COLOURS[:4], *[GREY] * len(methods)], strict=False))
    for method in methods:
        own = [_Row.of(point) for point in points if point.method == method and not point.chosen]
        for dash, symbol, which in (("solid", "circle", "mean"), ("dash", "circle-open", "worst")):
            line = {"color": colour[method], "width": 2, "dash": dash}
            _add(figure, f"{method}, {which}", own, which, mode="lines+markers", line=line, marker={"symbol": symbol})
    for row in rows:
        if row.what == "predicted":
            continue
        written = row.what == "measured"
        name, symbol = ("bundle", "diamond") if written else ("chosen", "star")
        for which, shape in (("mean", symbol), ("worst", f"{symbol}-open")):
            marker = {"color": _WRITTEN if written else colour[row.method], "size": 14, "symbol": shape}
            _add(figure, f"{name}, {which}", [row], which, mode="markers", marker=marker)
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log", exponentformat="power")
    figure.update_layout(showlegend=True)
    caption = (
        "What the collection would take and lose, predicted from the singular values of all updates. Both axes are"
        " logarithmic; lower and further left is better. A star is what was chosen"
        + (", a diamond the bundle that was written, as measured." if len(rows) > len(points) else ".")
        + " The table has the same figures."
    )
    if weighted:
        caption += " Errors are weighted by inputs, as the calibration has it; those of weights are larger."
    if any(row.mean <= 0 or row.worst <= 0 for row in rows):
        caption += " An error of 0 has no place on such an axis, so only the table shows it."
    return Chart("Error against size", figure, caption)


def _add(figure: Figure, name: str, rows: Sequence[_Row], which: str, **look: object) -> None:
    errors = [row.mean if which == "mean" else row.worst for row in rows]
    figure.add_trace(
        Scatter(
            name=literal(name),
            x=[row.size / 1e6 for row in rows],
            y=[each if each > 0 else None for each in errors],
            hovertext=[f"{literal(name)}<br>{megabytes(row.size)}" for row in rows],
            hovertemplate="%{hovertext}<br>squared error %{y:.4g}<extra></extra>",
            **look,
        )
    )


def _table(rows: Sequence[_Row], original: int) -> Table:
    return Table(
        "Sizes and errors",
        ("method", "figures are", "size", "against the originals", "mean squared error", "worst squared error"),
        [
            (
                row.method,
                row.what,
                megabytes(row.size),
                times(original, row.size),
                error(row.mean),
                error(row.worst),
            )
            for row in rows
        ],
        frozenset({2, 3, 4, 5}),
    )
