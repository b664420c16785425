"""One adapter: its files downloaded or copied, checked, and read by the adapter reader."""

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
from ..base.filesystem import copy, fsync, link_or_copy, nearest_existing
from ..base.progress import Transfer
from ..base.text import megabytes
from .hub import Hub, Received
from .requested import RequestedAdapter, RequestedFile
from .workspace import Workspace


class NotAsLocked(AdapterError):
    """A local adapter differs from the lock, or is gone."""


def fetch_adapter(
    requested: RequestedAdapter, hub: Hub, workspace: Workspace, transfer: Transfer, allow_pickle: bool
) -> LockedAdapter:
    """Fetch an adapter into its folder in ``workspace``; its entry of the lock.

    Raises AdapterError when the reader refuses it or a local one has changed, HubError, LocalError.
    """
    folder = workspace.work(requested.name)
    reported = 0

    def received(size: int) -> None:
        nonlocal reported
        reported += size
        transfer.received(size)

    try:
        files = [_file(requested, file, folder, hub, received) for file in requested.files]
        open_adapter(requested.label, folder, allow_pickle=allow_pickle or _is_pickled(requested))
        entry = requested.locked(files)
        workspace.arrived(entry, folder)
    except BaseException as error:
        transfer.received(-reported)
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise _local(error) from error
        raise
    return entry


def _file(requested: RequestedAdapter, file: RequestedFile, folder: Path, hub: Hub, received: Received) -> LockedFile:
    target = folder / file.name
    if requested.local is not None:
        return _local_file(requested, file, requested.local / file.name, target, received)
    assert requested.origin.repository is not None
    assert requested.origin.commit is not None
    arrived = 0

    def downloaded(size: int) -> None:
        nonlocal arrived
        arrived += size
        received(size)

    blob, identified = hub.file(requested.origin.repository, requested.origin.commit, file, downloaded)
    received(identified.size_bytes - arrived)  # the rest was in the cache
    link_or_copy(blob, target)
    fsync(target)
    return identified


def _local_file(
    requested: RequestedAdapter, file: RequestedFile, source: Path, target: Path, received: Received
) -> LockedFile:
    """A copy, not a link: a training that writes its files anew would change what the lock has promised."""
    if not source.is_file():
        raise NotAsLocked(requested.label, f"{source} is not there", "«update» takes what is there now")
    copy(source, target)
    fsync(target)
    identified = file.identify(target)
    if identified is None:
        raise NotAsLocked(requested.label, f"{source} is not what it was", "«update» takes what is there now")
    received(identified.size_bytes)
    return identified


def _is_pickled(requested: RequestedAdapter) -> bool:
    """Whether it has a pickle, which is in a lock only if pickles were allowed when it was made."""
    return any(file.name.endswith(".bin") for file in requested.files)


def check_space(todo: Iterable[RequestedAdapter], directory: Path, hub: Hub) -> None:
    """Raise LocalError if the cache of the Hub, or ``directory``, has no space for the files of ``todo``."""
    cache, directory = (nearest_existing(path.absolute()) for path in (Path(constants.HF_HUB_CACHE), directory))
    linked = cache.stat().st_dev == directory.stat().st_dev
    needed: Counter[Path] = Counter()
    for requested in todo:
        origin = requested.origin
        for file in requested.files:
            if origin.repository is None or origin.commit is None:
                needed[directory] += file.size_bytes or 0
                continue
            if not hub.cached(origin.repository, origin.commit, file.path):
                needed[directory if linked else cache] += file.size_bytes or 0
            if not linked:
                needed[directory] += file.size_bytes or 0
    for folder, size in needed.items():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise LocalError(
                f"{folder}: {megabytes(size)} are needed, {megabytes(free)} are free",
                "free some space, choose another «output», or move the cache with HF_HOME",
            )


def _local(error: OSError) -> LocalError:
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    hint = "free some space, or choose another «output»" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    return LocalError(f"{where}{error.strerror or error}", hint)
