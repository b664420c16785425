"""Tables as text, and the numbers in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorazip_core.text import count, error, megabytes, percent, plain, times

__all__ = ["count", "error", "megabytes", "percent", "table", "times"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns under their heads, two blanks apart; a column of numbers is flush right."""
    body = [[plain(cell) for cell in row] for row in rows]
    columns = list(zip(head, *body, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [len(column) > 1 and all(cell[:1].isdigit() or cell == "-" for cell in column[1:]) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in (head, *body)
    )
