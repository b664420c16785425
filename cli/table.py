"""Tables as text, and the numbers in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from lorazip_core.base.text import count, error, megabytes, plain, saved, saving, times

__all__ = ["by_file", "count", "error", "megabytes", "saved", "saving", "table", "times"]


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


def by_file(files: Mapping[str, Sequence[str]]) -> list[str]:
    """``files`` by adapter as lines by file: ``value_head.bin of 32 adapters: a, b, c, ...``."""
    adapters: defaultdict[str, list[str]] = defaultdict(list)
    for adapter, names in files.items():
        for name in names:
            adapters[name].append(adapter)
    return [
        f"{name} of {count(len(of), 'adapter')}: {', '.join(of[:3])}{', ...' if of[3:] else ''}"
        for name, of in sorted(adapters.items())
    ]
