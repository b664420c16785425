"""Names of adapters: which ones somebody means, and what those in a directory are called in a bundle."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from ..base.errors import AdapterError, UsageError
from ..base.text import printable
from .kinds import is_adapter
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


_ITSELF = "."  # the name of an adapter in the directory of the collection itself


class Names(NamedTuple):
    """What adapters below a directory are called in a bundle that they are added to."""

    within: str | None
    """The name of the directory, if it is an adapter itself."""

    @classmethod
    def below(cls, root: Path) -> Names:
        """Raises AdapterError for an adapter in a directory whose name is no text."""
        if not is_adapter(root):
            return cls(None)
        name = os.path.basename(os.path.abspath(root))
        if printable(name) != name:
            raise AdapterError(printable(name), "the name of its folder is not UTF-8", "rename it")
        return cls(name)

    def of(self, name: str) -> str:
        """Of an adapter by its path below the directory."""
        if self.within is None:
            return name
        return self.within if name == _ITSELF else f"{self.within}/{name}"
