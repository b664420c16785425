"""The squared errors of adapters, as a chart and as a table: what the pages of `verify` and `compress` share."""

from __future__ import annotations

from collections.abc import Sequence

from ..base.text import error
from .charts import MOST_ROWS, Bars, bars, limit_lines, literal
from .outcome import KeptAdapter, kept_as
from .page import Chart, Table

_WORST = 20

WorstFirst = Sequence[tuple[KeptAdapter, float]]
"""Adapters with the squared error of each, the largest first."""


def errors_chart(worst: WorstFirst, *, x: str, limits: Sequence[tuple[float, str]]) -> Chart:
    """A bar for each adapter, and a line across them for each of ``limits``, a squared error and its meaning."""
    shown = worst[:MOST_ROWS]
    data = Bars(
        names=[adapter.name for adapter, _ in shown],
        values=[value for _, value in shown],
        hover=[_hover(adapter, value) for adapter, value in shown],
        groups=[kept_as(adapter) for adapter, _ in shown],
    )
    figure = bars(data, x=x, y="adapters, the worst on top")
    limit_lines(figure, limits, rows=len(shown))
    return Chart("Error of each adapter", figure, only_worst(len(shown), len(worst)))


def _hover(adapter: KeptAdapter, value: float) -> str:
    lines = [f"<b>{literal(adapter.name)}</b>", f"squared error {error(value)}", f"kept as {literal(kept_as(adapter))}"]
    if adapter.worst_module is not None:
        module = adapter.worst_module
        lines.append(f"worst module {literal(module.name)}: {error(module.squared_error)}")
    return "<br>".join(lines)


def worst_table(
    worst: WorstFirst,
    *,
    limit: float,
    claims: Sequence[float] | None = None,
    outputs: Sequence[float | None] | None = None,
    unknown: Sequence[str] = (),
) -> Table:
    """The worst adapters; those above ``limit`` stand out. ``claims`` are of the bundle, in the same order.

    So are the errors of ``outputs``, where they were measured. ``unknown`` are the names of adapters without an error.
    """
    more = [(head, each) for head, each in (("claimed", claims), ("of outputs", outputs)) if each is not None]
    rows = [
        (
            adapter.name,
            error(value),
            *(error(each[row]) for _, each in more),
            kept_as(adapter),
            adapter.worst_module.name if adapter.worst_module else "-",
            error(adapter.worst_module.squared_error if adapter.worst_module else None),
        )
        for row, (adapter, value) in enumerate(worst[:_WORST])
    ]
    head = ("adapter", "squared error", *(head for head, _ in more), "kept as", "worst module", "its error")
    numbers = frozenset({*range(1, 2 + len(more)), len(head) - 1})
    caption = only_worst(len(rows), len(worst))
    if unknown:
        caption = f"{caption} Not measured: {', '.join(unknown[:_WORST])}{' …' if len(unknown) > _WORST else ''}."
    bad = frozenset(row for row, (_, value) in enumerate(worst[:_WORST]) if value > limit)
    return Table("Worst adapters", head, rows, numbers, caption.strip(), bad)


def only_worst(shown: int, of: int) -> str:
    """What a caption says where not all adapters are shown; empty where they are."""
    return f"The worst {shown:,} of {of:,} adapters." if shown < of else ""
