"""What a run of ``fetch`` did, and what ``fetch --json`` prints."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from ..adapter.lock import LeftOut, Origin
from .state import Status


class FetchedAdapter(Struct, frozen=True, kw_only=True):
    """An adapter that was asked for and is there, or with ``dry_run`` would be."""

    name: str
    origin: Origin
    base_model: str | None
    files: int
    size_bytes: int
    status: Status
    """``new``, ``updated`` to another commit, ``restored`` to what the lock says, or ``present`` as it should be."""
    previous_commit: str | None
    changed_files: list[str]
    """Of an adapter that was updated: the files that differ, are new or are gone."""


class FetchFailure(Struct, frozen=True, kw_only=True):
    """Something that was asked for and is not there: which, and why."""

    what: str
    slug: str
    exit_code: int
    message: str
    skippable: bool
    """Whether ``skip_bad`` goes on without it."""


class FetchSummary(Struct, frozen=True, kw_only=True):
    """``bytes_downloaded`` are of file contents, repeated attempts included; 0 where the cache had all."""

    adapters: int
    new: int
    updated: int
    restored: int
    present: int
    removed: int
    left_out: int
    failures: int
    size_bytes: int
    bytes_downloaded: int
    seconds: float


class FetchReport(Struct, frozen=True, kw_only=True):
    """The result of ``fetch``. The lock has been written if ``complete``."""

    schema: Literal["lorazip.fetch/1"] = "lorazip.fetch/1"
    directory: str
    dry_run: bool
    locked: bool
    complete: bool
    adapters: list[FetchedAdapter]
    removed: list[str]
    left_out: list[LeftOut]
    failures: list[FetchFailure]
    summary: FetchSummary
