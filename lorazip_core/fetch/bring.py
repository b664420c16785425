"""One adapter into its place: its files downloaded or copied, checked, and read by the adapter reader."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import constants

from ..adapter.lock import LockedAdapter, LockedFile
from ..adapter.reader import open_adapter
from ..base.errors import AdapterError, LocalError
from ..base.filesystem import fsync, link_or_copy
from ..base.progress import Transfer
from ..base.text import megabytes
from .hub import Hub, Received
from .wanted import Wanted, WantedFile
from .workspace import Workspace


class NotAsLocked(AdapterError):
    """A local adapter is not (any more) what the lock has."""


def bring(wanted: Wanted, hub: Hub, workspace: Workspace, transfer: Transfer, allow_pickle: bool) -> LockedAdapter:
    """Have an adapter in its place, or held; its entry of the lock.

    Raises AdapterError when the reader refuses it or a local one is not what it was, HubError, LocalError.
    """
    folder = workspace.work(wanted.name)
    told = 0

    def received(size: int) -> None:
        nonlocal told
        told += size
        transfer.received(size)

    try:
        files = [_file(wanted, file, folder, hub, received) for file in wanted.files]
        open_adapter(wanted.label, folder, allow_pickle=allow_pickle or _is_pickled(wanted))
        entry = wanted.locked(files)
        workspace.arrived(entry, folder)
    except BaseException as error:
        transfer.received(-told)
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise _local(error) from error
        raise
    return entry


def _file(wanted: Wanted, file: WantedFile, folder: Path, hub: Hub, received: Received) -> LockedFile:
    target = folder / file.name
    if wanted.local is not None:
        return _local_file(wanted, file, wanted.local / file.name, target, received)
    assert wanted.origin.repository is not None
    assert wanted.origin.commit is not None
    told = 0

    def downloaded(size: int) -> None:
        nonlocal told
        told += size
        received(size)

    blob, identified = hub.file(wanted.origin.repository, wanted.origin.commit, file, downloaded)
    received(identified.size_bytes - told)  # what came from the cache
    link_or_copy(blob, target)
    fsync(target)
    return identified


def _local_file(wanted: Wanted, file: WantedFile, source: Path, target: Path, received: Received) -> LockedFile:
    """A copy, not a link: a training that writes its files anew would change what the lock has promised."""
    if not source.is_file():
        raise NotAsLocked(wanted.label, f"{source} is not there", "--update takes what is there now")
    shutil.copyfile(source, target)
    fsync(target)
    identified = file.identify(target)
    if identified is None:
        raise NotAsLocked(wanted.label, f"{source} is not what it was", "--update takes what is there now")
    received(identified.size_bytes)
    return identified


def _is_pickled(wanted: Wanted) -> bool:
    """The lock has pickles only for who asked for them when it was made."""
    return any(file.name.endswith(".bin") for file in wanted.files)


def check_space(todo: Iterable[Wanted], directory: Path, hub: Hub) -> None:
    """Raise LocalError if the files of ``todo`` do not fit, into the cache of the Hub or into ``directory``."""
    cache, directory = _existing(Path(constants.HF_HUB_CACHE)), _existing(directory)
    linked = cache.stat().st_dev == directory.stat().st_dev
    needed: Counter[Path] = Counter()
    for wanted in todo:
        origin = wanted.origin
        for file in wanted.files:
            if origin.repository is None or origin.commit is None:
                needed[directory] += file.size_bytes or 0
                continue
            if not hub.cached(origin.repository, origin.commit, file.path):
                needed[directory if linked else cache] += file.size_bytes or 0
            if not linked:
                needed[directory] += file.size_bytes or 0
    for place, size in needed.items():
        free = shutil.disk_usage(place).free
        if size > free:
            raise LocalError(
                f"{place}: {megabytes(size)} are needed, {megabytes(free)} are free",
                "free some space, choose another -o, or move the cache with HF_HOME",
            )


def _local(error: OSError) -> LocalError:
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    hint = "free some space, or choose another -o" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    return LocalError(f"{where}{error.strerror or error}", hint)


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
