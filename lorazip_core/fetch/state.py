"""What is in the directory already: the adapter that is requested, an older one, or something that is not lorazip's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..adapter.lock import LockedAdapter, LockedFile
from .requested import RequestedAdapter, folder_digests

Status = Literal["new", "updated", "restored", "present"]


@dataclass(frozen=True)
class State:
    """``status`` is that of the adapter once it is fetched; ``lost`` is a file that this would overwrite, if any."""

    status: Status
    entry: LockedAdapter | None = None
    """Of an adapter that is present: as the lock records it."""
    changed: tuple[str, ...] = ()
    """The files that differ from what is requested, are missing, or are not requested any more."""
    lost: str | None = None
    is_there: bool = True


def state_of(requested: RequestedAdapter, folder: Path, known: Sequence[LockedAdapter]) -> State:
    """Compare the folder at ``folder``, byte for byte, with what is requested and with what lorazip put there.

    ``known`` are the entries of the lock and of an unfinished run's journal for it.
    """
    if not os.path.lexists(folder):
        return State("restored" if _again(requested, known) else "new", is_there=False)
    if folder.is_symlink() or not folder.is_dir():
        return State("updated", lost=".")
    there = identified(requested, folder)
    if entry := entry_of(requested, there):
        return State("present", entry)
    ours = {(file.path, file.sha256) for each in known for file in each.files}
    lost = next((path for path, digest in sorted(folder_digests(folder).items()) if (path, digest) not in ours), None)
    changed = {name for name, file in there.items() if file is None} | {path for path, _ in ours} - there.keys()
    return State("restored" if _again(requested, known) else "updated", changed=tuple(sorted(changed)), lost=lost)


def identified(requested: RequestedAdapter, folder: Path) -> dict[str, LockedFile | None]:
    """Each requested file as it is in ``folder``; None if it is missing, another one, or has no digest to compare."""
    found: dict[str, LockedFile | None] = {}
    for file in requested.files:
        path = folder / file.name
        comparable = file.has_digest and path.is_file() and not path.is_symlink()
        found[file.name] = file.identify(path) if comparable else None
    return found


def entry_of(requested: RequestedAdapter, files: Mapping[str, LockedFile | None]) -> LockedAdapter | None:
    """The entry of the lock if every file is the requested one."""
    there = [file for file in files.values() if file is not None]
    return requested.locked(there) if len(there) == len(files) else None


def _again(requested: RequestedAdapter, known: Sequence[LockedAdapter]) -> bool:
    """Whether lorazip has put just this there before: the same commit, or the same bytes of a local adapter."""
    bytes_requested = {(file.name, file.sha256) for file in requested.files}
    return any(
        each.origin.commit == requested.origin.commit
        if requested.origin.commit is not None
        else {(file.path, file.sha256) for file in each.files} == bytes_requested
        for each in known
    )
