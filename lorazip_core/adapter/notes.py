"""What a reader of a collection should know of its adapters, though all of them can be used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from .collection import Collection
from .formats.registry import FORMATS
from .reader import distinct_parts


def notes(collection: Collection) -> list[str]:
    """Lines for people: what was left out of tensor names, and names that may not be what they seem."""
    lines = [*_below(collection), *_removed(collection)]
    for form in FORMATS:
        own = distinct_parts([adapter for adapter in collection.adapters if adapter.form is form])
        lines += form.notes([parts for parts, _ in own])
    return lines


def _below(collection: Collection) -> Iterator[str]:
    """Checkpoints of a training, most of all."""
    names = {adapter.name for adapter in collection.adapters}
    if below := [name for name in sorted(names, key=str.encode) if not names.isdisjoint(_above(name))]:
        which = f"{below[0]!r}{f' and {len(below) - 1:,} more' if below[1:] else ''}"
        yield f"in the folder of another adapter, and taken as adapters of their own: {which}"


def _above(name: str) -> Iterator[str]:
    """The names that an adapter has whose folder ``name`` is in."""
    if name != ".":
        yield "."
    parts = name.split("/")
    yield from ("/".join(parts[:length]) for length in range(1, len(parts)))


def _removed(collection: Collection) -> Iterator[str]:
    names: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for adapter in collection.adapters:
        names[adapter.layout.removed].append(adapter.name)
    for removed, adapters in names.items():
        if removed:
            more = f" and {len(adapters) - 3} more" if len(adapters) > 3 else ""
            yield (
                f"{', '.join(adapters[:3])}{more}: names of tensors carry {' and '.join(removed)}; "
                "they are read, and will be exported, without"
            )
