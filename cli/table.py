"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .console import plain


def megabytes(size: int) -> str:
    """Bytes in MB = 10⁶ bytes, small ones in bytes."""
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size:,} bytes"


def error(value: float | None) -> str:
    """A squared error; '-' where there is none."""
    return "-" if value is None else "0" if value == 0 else f"{value:.4f}" if value >= 1e-4 else f"{value:.1e}"


def percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.1f}%"


def times(before: int, after: int) -> str:
    """How many times smaller ``after`` is."""
    return f"{before / after:.1f} times smaller" if after else "-"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


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
