"""Rows of the user: inputs, the outputs that are wanted, and which adapters they are for. Nothing here loads torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from ..base.errors import UsageError
from ..base.filesystem import tree

_SUFFIX = ".jsonl"
_HINT = 'a row is one line: {"input": "…", "output": "…"}'


class Row(NamedTuple):
    """A question, and the answer that an adapter was trained to give."""

    input: str
    output: str


class Rows(NamedTuple):
    """Rows for some adapters by name, and rows for every adapter."""

    by_adapter: dict[str, list[Row]]
    for_all: list[Row]

    def of(self, adapter: str) -> list[Row]:
        """The rows of one adapter, its own first."""
        return [*self.by_adapter.get(adapter, ()), *self.for_all]

    def all(self) -> list[Row]:
        """Every row once, in order."""
        return list(dict.fromkeys(row for rows in (*self.by_adapter.values(), self.for_all) for row in rows))

    def unknown(self, adapters: Collection[str]) -> list[str]:
        """The names with rows that none of ``adapters`` has."""
        return sorted(self.by_adapter.keys() - set(adapters))

    def first(self, most: int | None) -> Rows:
        """At most so many rows of each adapter, and for all."""
        return Rows({name: rows[:most] for name, rows in self.by_adapter.items()}, self.for_all[:most])


class _Line(msgspec.Struct):
    input: str
    output: str
    adapter: str | None = None


def read_rows(path: Path) -> Rows:
    """The rows in a file of JSON lines, or in a folder with a file ``ADAPTER.jsonl`` for each adapter.

    In a file, ``adapter`` says for which adapter a row is; without it, the row is for every one. In a folder the name
    of the file does. Raises UsageError, with file and line, for what is no row, and where there are none.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist: no rows there")
    by_adapter: defaultdict[str, list[Row]] = defaultdict(list)
    for_all: list[Row] = []
    if path.is_dir():
        for name in tree(path):
            if name.endswith(_SUFFIX) and not any(part.startswith(".") for part in name.split("/")):
                by_adapter[name.removesuffix(_SUFFIX)] = [Row(line.input, line.output) for line in _lines(path / name)]
    else:
        for line in _lines(path):
            rows = for_all if line.adapter is None else by_adapter[line.adapter]
            rows.append(Row(line.input, line.output))
    if not (for_all or any(by_adapter.values())):
        what = f"it has no ADAPTER{_SUFFIX} with rows in it" if path.is_dir() else "it is empty"
        raise UsageError(f"{path}: no rows: {what}", _HINT)
    return Rows({name: rows for name, rows in sorted(by_adapter.items()) if rows}, for_all)


def _lines(path: Path) -> Iterator[_Line]:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.split(b"\n"), 1):  # JSON may have other line breaks in its texts
        if not line.strip():
            continue
        try:
            yield msgspec.json.decode(line, type=_Line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}:{number}: not a row: {error}", _HINT) from None
