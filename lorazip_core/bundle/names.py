"""Adapters of a bundle, chosen by their names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ..base.errors import UsageError
from .manifest import Manifest


def matching(manifest: Manifest, bundle: Path, wanted: Sequence[str]) -> list[str]:
    """The adapters that are called, or match a pattern of `fnmatch`, as ``wanted``; in the order of the manifest.

    Raises UsageError for what none is called or matches.
    """
    known = [adapter.name for adapter in manifest.adapters]
    chosen: set[str] = set()
    for name in wanted:
        found = [name] if name in known else [each for each in known if fnmatchcase(each, name)]
        if not found:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "'lorazip info' lists them"
            raise UsageError(f"{bundle} has no adapter {name!r}", hint)
        chosen.update(found)
    return [name for name in known if name in chosen]
