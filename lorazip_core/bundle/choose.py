"""Adapters of a bundle that people name."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from fnmatch import fnmatchcase

from ..base.errors import UsageError
from .manifest import AdapterEntry
from .reader import Bundle


def choose(bundle: Bundle, wanted: Collection[str]) -> list[AdapterEntry]:
    """The adapters named, or that match a pattern, in the order of the bundle; all without any.

    Raises UsageError for a name that is none and matches none.
    """
    known = {adapter.name: adapter for adapter in bundle.manifest.adapters}
    chosen: set[str] = set()
    for name in wanted:
        found = [name] if name in known else [each for each in known if fnmatchcase(each, name)]
        if not found:
            raise unknown(name, known, str(bundle.path))
        chosen.update(found)
    return [adapter for name, adapter in known.items() if not wanted or name in chosen]


def unknown(name: str, known: Collection[str], where: str) -> UsageError:
    """That there is no adapter of this name among those ``known``, and which are named nearly so."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "'lorazip info' lists them"
    return UsageError(f"{where} has no adapter {name!r}", hint)
