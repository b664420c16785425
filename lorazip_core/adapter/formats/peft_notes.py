"""Names of modules that may not be what they seem, though PEFT's rules give no other answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from ..module import Part
from .target_parameters import apart
from .wrappers import PARALLEL

# Transformers 4.52 moved the language model of multimodal models, and with it these parts of the paths in it.
_MOVED = ("model", "language_model")


def notes(adapters: Sequence[Mapping[str, Part]]) -> Iterator[str]:
    """Lines for people on the modules of ``adapters``, each given by the parts that it has."""
    yield from _kept(adapters)
    yield from _unshared(adapters)
    yield from apart(sorted({part.module for parts in adapters for part in parts.values()}))


def _kept(adapters: Sequence[Mapping[str, Part]]) -> Iterator[str]:
    """A wrapper's name that may be a layer's as well; the first module that has it stands for all."""
    modules = sorted({name for parts in adapters for name in parts if PARALLEL in name.split(".")})
    if modules:
        yield (
            f"{PARALLEL!r} in {modules[0]} is taken for the name of a layer; "
            "if it is that of a training wrapper, PEFT will find no such module"
        )


def _unshared(adapters: Sequence[Mapping[str, Part]]) -> Iterator[str]:
    """A line for every two names of one module, in the old and the new paths of its model, of different adapters."""
    names: defaultdict[str, set[str]] = defaultdict(set)
    several: set[str] = set()
    for parts in adapters:
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
