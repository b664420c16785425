"""What a reader of a collection should know of its adapters, though all of them can be used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from .collection import Collection
from .experts import apart
from .names import PARALLEL
from .reader import Part

# Transformers 4.52 moved the language model of multimodal models, and with it these parts of the paths in it.
_MOVED = ("model", "language_model")


def notes(collection: Collection) -> list[str]:
    """Lines for people: what was left out of tensor names, and names that may not be what they seem."""
    distinct = list({id(adapter.parts): adapter.parts for adapter in collection.adapters}.values())
    experts = apart(collection.modules)
    return [
        *_below(collection),
        *_removed(collection),
        *_kept(distinct),
        *_unshared(distinct),
        *([experts] if experts else []),
    ]


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


def _kept(distinct: Sequence[dict[str, Part]]) -> Iterator[str]:
    """A wrapper's name that may be a layer's as well; the first module that has it stands for all."""
    modules = sorted({name for parts in distinct for name in parts if PARALLEL in name.split(".")})
    if modules:
        yield (
            f"{PARALLEL!r} in {modules[0]} is taken for the name of a layer; "
            "if it is that of a training wrapper, PEFT will find no such module"
        )


def _unshared(distinct: Sequence[dict[str, Part]]) -> Iterator[str]:
    """A line for every two names of one module, in the old and the new paths of its model, of different adapters."""
    names: defaultdict[str, set[str]] = defaultdict(set)
    several: set[str] = set()
    for parts in distinct:
        seen: set[str] = set()
        for name in parts:
            rest = _without_moved(name)
            names[rest].add(name)
            if rest in seen:
                several.add(rest)  # one adapter has both, so they are two modules
            seen.add(rest)
    by_prefixes: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for rest, variants in sorted(names.items()):
        if len(variants) > 1 and rest not in several:
            by_prefixes[tuple(sorted(name.removesuffix(rest) for name in variants))].append(rest)
    for prefixes, modules in by_prefixes.items():
        example = " and ".join(prefix + modules[0] for prefix in prefixes)
        yield (
            f"{len(modules)} modules have names that differ only in their beginning, as {example}: "
            "adapters share bases only where the names are equal"
        )


def _without_moved(name: str) -> str:
    first, dot, rest = name.partition(".")
    return _without_moved(rest) if dot and first in _MOVED else name
