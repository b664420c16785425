"""``lorazip.lock``: what a directory of fetched adapters consists of, byte for byte, and where each came from.

Written by ``fetch``, read by it and by ``compress``, which puts the origin of each adapter into the manifest. It is
indented, so that it can live in version control and its changes be read.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from ..base.errors import Unsupported, UsageError
from .formats.names import CONFIG_NAME

LOCK_NAME = "lorazip.lock"
SCHEMA: Literal["lorazip.lock/1"] = "lorazip.lock/1"

# A "$" would let a line feed pass at the end.
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?![\s\S])")]
Commit = Annotated[str, Meta(pattern=r"^[0-9a-f]{40}(?![\s\S])")]
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(?![\s\S])")]
_REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")


class LockedFile(Struct, frozen=True):
    """A file of an adapter, in its folder."""

    path: FileName
    size_bytes: Count
    sha256: Sha256


class Origin(Struct, frozen=True, kw_only=True):
    """Where an adapter comes from: a repository of the Hub at a commit, or a local directory."""

    repository: str | None = None
    """``owner/name`` on the Hub; null for a local adapter."""
    revision: str | None = None
    """The branch, tag or commit that was asked for; null for the default branch."""
    commit: Commit | None = None
    """What that was when it was fetched; null for a local adapter."""
    subfolder: str = ""
    """The adapter's folder in its repository or directory, as a POSIX path; empty for the root."""
    directory: str | None = None
    """The local directory, relative to that of the lock unless it was given as an absolute path."""
    license: str | None = None
    """The licence that its model card names, as the Hub writes it (``apache-2.0``)."""


class LockedAdapter(Struct, frozen=True, kw_only=True):
    """An adapter below the directory of the lock. ``name`` is its folder there, as a POSIX path."""

    name: str
    origin: Origin
    base_model: str | None
    files: list[LockedFile]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


class Filters(Struct, frozen=True, kw_only=True):
    """What the adapters of a source were narrowed down to; see the options of ``fetch``."""

    base_model: str | None = None
    search: str | None = None
    tags: tuple[str, ...] = ()
    limit: int | None = None


class LeftOut(Struct, frozen=True):
    """Something that a source names and that was not fetched: which, and why."""

    what: str
    reason: str
    because: Literal["listing", "max-size", "skip-bad"] = "listing"
    """That it is no adapter that was asked for (``listing``), or the option of that run that left it out."""


class LockedSource(Struct, frozen=True, kw_only=True):
    """One SOURCE of ``fetch``, and the names of the adapters that it stands for."""

    source: str
    """As it was given; a local directory relative to the one of the lock, unless it is absolute."""
    filters: Filters | None
    adapters: list[str]
    left_out: list[LeftOut]


class Lock(Struct, frozen=True, kw_only=True):
    """The whole file: adapters in the order of their names, sources in the order in which they were first given."""

    schema: Literal["lorazip.lock/1"] = SCHEMA
    sources: list[LockedSource]
    adapters: list[LockedAdapter]


def encode_lock(lock: Lock) -> bytes:
    """The bytes of the file: sorted keys, two blanks of indentation, UTF-8."""
    text = json.dumps(msgspec.to_builtins(lock), sort_keys=True, ensure_ascii=False, indent=2)
    return text.encode() + b"\n"


def read_lock(directory: Path) -> Lock | None:
    """The lock of ``directory``, or None when it has none.

    Raises UsageError when the file is not a lock, names a place outside of ``directory`` or one adapter twice, and
    Unsupported for another version of the format.
    """
    path = directory / LOCK_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        fields = msgspec.json.decode(data)
        schema = fields.get("schema") if isinstance(fields, dict) else None
        if schema != SCHEMA and str(schema).startswith("lorazip.lock/"):
            raise Unsupported(f"{path}: {schema}; this lorazip reads {SCHEMA}", "update lorazip")
        if schema is None:  # the type has a default for it
            raise msgspec.ValidationError("it names no schema")
        lock = msgspec.convert(fields, Lock)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not a lock of lorazip: {error}", "restore it, or move it away and fetch") from None
    names: set[str] = set()
    for adapter in lock.adapters:
        if not is_inner_path(adapter.name):
            raise UsageError(f"{path}: the name {adapter.name!r} is no folder below it", "restore it, or fetch anew")
        if adapter.name in names:
            raise UsageError(f"{path}: two adapters are named {adapter.name!r}", "restore it, or fetch anew")
        names.add(adapter.name)
    return lock


def read_strictly(directory: Path) -> Lock | None:
    """As `read_lock`, for who writes where the lock says: also raises UsageError for what `fetch` never writes."""
    lock = read_lock(directory)
    if lock is not None and (wrong := _contradiction(lock) or next(filter(None, map(problem, lock.adapters)), None)):
        raise UsageError(f"{directory / LOCK_NAME}: {wrong}", "restore it, or move it away and fetch")
    return lock


def problem(entry: LockedAdapter) -> str | None:
    """What keeps an entry from being an adapter below the directory, in words; None if nothing does."""
    name, origin = entry.name, entry.origin
    if not is_inner_path(name) or any(part.startswith(".") for part in name.split("/")) or name == LOCK_NAME:
        return f"the name {name!r} is no folder below it"
    names = [file.path for file in entry.files]
    if CONFIG_NAME not in names or len(set(names)) < len(names):
        return f"{name!r} has no {CONFIG_NAME}, or a file twice"
    given = (origin.repository is not None, origin.commit is not None, origin.directory is not None)
    if given not in ((True, True, False), (False, False, True)):
        return f"{name!r} comes neither from a repository at a commit nor from a directory"
    if origin.repository is not None and not _REPOSITORY.fullmatch(origin.repository):
        return f"{name!r}: {origin.repository!r} is no repository"
    if origin.subfolder and not is_inner_path(origin.subfolder):
        return f"{name!r}: {origin.subfolder!r} is no subfolder"
    return None


def _contradiction(lock: Lock) -> str | None:
    """What does not fit together, as after a bad merge."""
    for text, times in Counter(source.source for source in lock.sources).most_common(1):
        if times > 1:
            return f"it has the source {text!r} {times} times"
    folded: dict[str, str] = {}
    for adapter in lock.adapters:
        other = folded.setdefault(unicodedata.normalize("NFC", adapter.name).casefold(), adapter.name)
        if other is not adapter.name:
            return f"it has the adapter {adapter.name!r} twice"
    for name in folded:
        parts = name.split("/")
        if above := next((up for n in range(1, len(parts)) if (up := "/".join(parts[:n])) in folded), None):
            return f"{folded[name]!r} is inside another adapter, {folded[above]!r}"
    known = {adapter.name for adapter in lock.adapters}
    for source in lock.sources:
        if unknown := next((name for name in source.adapters if name not in known), None):
            return f"the source {source.source!r} has {unknown!r}, which is none of its adapters"
    return None


def is_path_below(name: str) -> bool:
    """Whether the name of an adapter, which may have odd characters, is a path below the folder it is joined to."""
    return not {"", ".", ".."}.intersection(name.split("/")) and "\0" not in name


def is_inner_path(path: str) -> bool:
    """Whether a POSIX path stays below where it starts: no ``..``, not absolute, no empty or odd component."""
    return all(part not in ("", ".", "..") and not re.search(r"[\\\x00-\x1f\x7f]", part) for part in path.split("/"))
