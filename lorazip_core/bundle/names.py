"""What adapters in a directory are called in a bundle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ..base.errors import AdapterError
from ..base.text import printable
from .kinds import is_adapter

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
