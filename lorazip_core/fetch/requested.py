"""An adapter that is to be in the directory: its files, where they come from, and how to recognise them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from ..adapter.lock import LockedAdapter, LockedFile, Origin
from ..base.digests import sha256_file


@dataclass(frozen=True)
class RequestedFile:
    """A file of an adapter. What the Hub does not list is None; ``sha256`` or ``git_oid`` identify the content."""

    name: str
    path: str
    """Where it is in the repository, or the local directory."""
    size_bytes: int | None = None
    sha256: str | None = None
    git_oid: str | None = None
    """SHA-1 of ``blob SIZE\\0`` and the content: what the Hub lists for files that are not in Git LFS."""

    @property
    def has_digest(self) -> bool:
        """Whether its content can be checked; not every mirror of the Hub lists digests."""
        return self.sha256 is not None or self.git_oid is not None

    def identify(self, path: Path) -> LockedFile | None:
        """The file at ``path`` as the lock records it, or None when it is known not to be the requested one."""
        size = path.stat().st_size
        if self.size_bytes not in (None, size):
            return None
        sha256 = sha256_file(path)
        if self.sha256 not in (None, sha256):
            return None
        if self.sha256 is None and self.git_oid not in (None, _git_oid(path, size)):
            return None
        return LockedFile(self.name, size, sha256)


@dataclass(frozen=True)
class RequestedAdapter:
    """An adapter: where it comes from and its files. ``name``, its folder, is empty until names are given."""

    origin: Origin
    base_model: str | None
    files: tuple[RequestedFile, ...]
    name: str = ""
    local: Path | None = None
    """The folder of a local adapter."""

    @property
    def label(self) -> str:
        """Where it comes from, as messages name it."""
        return label_of(self.origin.repository or self.origin.directory or "", self.origin.subfolder)

    @property
    def size_bytes(self) -> int:
        """The sizes that are known, added up."""
        return sum(file.size_bytes or 0 for file in self.files)

    def named(self, name: str) -> RequestedAdapter:
        return replace(self, name=name)

    def locked(self, files: list[LockedFile]) -> LockedAdapter:
        """The entry of the lock, once its files have arrived."""
        return LockedAdapter(name=self.name, origin=self.origin, base_model=self.base_model, files=files)


def label_of(source: str, folder: str) -> str:
    """A folder of a repository or directory, as messages name it."""
    return "/".join(filter(None, (source, folder)))


def requested_by_lock(entry: LockedAdapter, directory: Path) -> RequestedAdapter:
    """The adapter of an entry of the lock of ``directory``: the same bytes from the same source."""
    origin = entry.origin
    folder = f"{origin.subfolder}/" if origin.subfolder else ""
    files = tuple(RequestedFile(file.path, folder + file.path, file.size_bytes, file.sha256) for file in entry.files)
    real = Path(os.path.realpath(directory))
    local = None if origin.directory is None else real / origin.directory / origin.subfolder
    return RequestedAdapter(origin, entry.base_model, files, entry.name, local)


def _git_oid(path: Path, size: int) -> str:
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def folder_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder of an adapter, by its path; a link, or what is no file, has an empty one."""
    found: dict[str, str] = {}
    for here, names, files in os.walk(folder):
        for name in files + [name for name in names if (Path(here) / name).is_symlink()]:
            path = Path(here) / name
            plain = path.is_file() and not path.is_symlink()
            found[path.relative_to(folder).as_posix()] = sha256_file(path) if plain else ""
    return found
