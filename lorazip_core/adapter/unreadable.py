"""Files of an adapter that cannot be read as they are: the fault of that adapter, which others need not share."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..base.errors import AdapterError

# What the process lacks, whatever the file.
_OF_THE_PROCESS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_LFS_MAGIC = b"version https://git-lfs"
_HINTS = {errno.EACCES: "check its permissions", errno.EPERM: "check its permissions"}


@contextmanager
def unreadable(adapter: str) -> Iterator[None]:
    """Turn an OSError of reading files of ``adapter`` into an AdapterError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno in _OF_THE_PROCESS:
            raise
        file = os.path.basename(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else "a file"
        reason = f"{file} cannot be read: {error.strerror or error}"
        raise AdapterError(adapter, reason, _HINTS.get(error.errno or 0)) from None


def refuse_pointer(adapter: str, file: str, start: bytes, what: str) -> None:
    """Raise AdapterError for a file that is not ``what`` it should be, but what Git LFS has left in its place."""
    if start.startswith(_LFS_MAGIC):
        raise AdapterError(adapter, f"{file} is a Git LFS pointer, not {what}", "run 'git lfs pull'")
