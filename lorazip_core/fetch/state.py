"""What is in the directory already: the adapter that is wanted, an older one, or something that is not lorazip's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..adapter.lock import LockedAdapter, LockedFile
from .wanted import Wanted, folder_digests

Status = Literal["new", "updated", "restored", "present"]


@dataclass(frozen=True)
class State:
    """``status`` is what bringing the adapter makes of it; ``lost`` is a file that this would overwrite, if any."""

    status: Status
    entry: LockedAdapter | None = None
    """Of an adapter that is present: as the lock records it."""
    changed: tuple[str, ...] = ()
    """The files that differ from what is wanted, are missing, or are not wanted any more."""
    lost: str | None = None
    is_there: bool = True


def state_of(wanted: Wanted, place: Path, known: Sequence[LockedAdapter]) -> State:
    """Compare the folder at ``place``, byte for byte, with what is wanted and with what lorazip put there.

    ``known`` are the entries of the lock and of an unfinished run's journal for it.
    """
    if not os.path.lexists(place):
        return State("restored" if _again(wanted, known) else "new", is_there=False)
    if place.is_symlink() or not place.is_dir():
        return State("updated", lost=".")
    there = identified(wanted, place)
    if entry := entry_of(wanted, there):
        return State("present", entry)
    ours = {(file.path, file.sha256) for each in known for file in each.files}
    lost = next((path for path, digest in sorted(folder_digests(place).items()) if (path, digest) not in ours), None)
    changed = {name for name, file in there.items() if file is None} | {path for path, _ in ours} - there.keys()
    return State("restored" if _again(wanted, known) else "updated", changed=tuple(sorted(changed)), lost=lost)


def identified(wanted: Wanted, folder: Path) -> dict[str, LockedFile | None]:
    """Each wanted file as it is in ``folder``, or None where that is another one, none, or cannot be told."""
    found: dict[str, LockedFile | None] = {}
    for file in wanted.files:
        path = folder / file.name
        comparable = file.has_digest and path.is_file() and not path.is_symlink()
        found[file.name] = file.identify(path) if comparable else None
    return found


def entry_of(wanted: Wanted, files: Mapping[str, LockedFile | None]) -> LockedAdapter | None:
    """The entry of the lock if every file is the wanted one."""
    there = [file for file in files.values() if file is not None]
    return wanted.locked(there) if len(there) == len(files) else None


def _again(wanted: Wanted, known: Sequence[LockedAdapter]) -> bool:
    """Whether lorazip has put just this there before: the same commit, or the same bytes of a local adapter."""
    bytes_wanted = {(file.name, file.sha256) for file in wanted.files}
    return any(
        each.origin.commit == wanted.origin.commit
        if wanted.origin.commit is not None
        else {(file.path, file.sha256) for file in each.files} == bytes_wanted
        for each in known
    )
