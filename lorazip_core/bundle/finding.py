"""What a check of a bundle can find."""

from __future__ import annotations

from msgspec import Struct


class Finding(Struct, frozen=True):
    """Something that does not hold: of the bundle itself (``damage``), or of what was asked about it."""

    kind: str
    path: str | None
    """The file it is about, relative to the bundle, or to the directory of originals for kinds ``source-…``."""
    message: str
    damage: bool
    adapter: str | None = None
