"""What to say of an exception, and the exit code that goes with it."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import typer

from lorazip_core.base.errors import AdapterErrors, LocalError, LorazipError
from lorazip_core.base.filesystem import system_error
from lorazip_core.base.text import megabytes

from .table import count
from .usage import explain_usage
from .wording import in_options

_HINTS = {
    errno.ENOSPC: "free some space, or choose another -o",
    errno.EDQUOT: "free some space, or choose another -o",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "choose an -o on a file system that can be written",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
}


class Failure(NamedTuple):
    """Lines for stderr, one for each thing that is wrong."""

    lines: list[str]
    exit_code: int


def explain(error: Exception, arguments: Sequence[str]) -> Failure | None:
    """The failure that an exception of a command stands for, or None for one that is a bug."""
    match error:
        case AdapterErrors(errors=errors):
            escape = arguments[:1] in (["add"], ["cluster"], ["compress"]) and "--skip-bad" not in arguments
            hint = " (--skip-bad goes on without)" if escape else ""
            lines = [in_options(str(each)) for each in errors]
            return Failure([*lines, f"{count(len(errors), 'adapter')} cannot be used{hint}"], error.exit_code)
        case LorazipError():
            return Failure([in_options(str(error))], error.exit_code)
        case typer.TyperException():
            return Failure([explain_usage(error)], error.exit_code)
        case OSError() if error.errno != errno.ENOMEM:
            return Failure([_local(error.errno, error.strerror or str(error), error.filename)], LocalError.exit_code)
    number = system_error(error)
    if number == errno.ENOMEM or _is_out_of_memory(error):
        return Failure([_no_memory(str(error), arguments[:1])], LocalError.exit_code)
    if isinstance(error, RuntimeError) and _NO_THREAD in str(error):
        hint = "raise the limit of processes: ulimit -u, or close other programs"
        return Failure([f"{_NO_THREAD} ({hint})"], LocalError.exit_code)
    if number is not None:
        return Failure([_local(number, os.strerror(number), None)], LocalError.exit_code)
    return None


def _local(number: int | None, reason: str, file: str | bytes | int | None) -> str:
    where = f"{os.fsdecode(file)}: " if isinstance(file, str | bytes) else ""
    hint = f" ({_HINTS[number]})" if number in _HINTS else ""
    return f"{where}{reason}{hint}"


_NO_THREAD = "can't start new thread"
_BOUNDED = (["cluster"], ["compress"])  # the commands with --memory and --device-memory
# As the allocators of torch, numpy, C++ and the kernel put it; "CUDA error" on a GPU that others have filled, on which
# CUDA cannot even start.
_SIGNS_OF_NO_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "bad_alloc",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",
)
_WANTED = re.compile(r"(?:[Tt]ried|Unable) to allocate ([0-9.]+) (bytes|[KMGTPE]iB)")


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # never imported here: a usage error must not cost a second
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error) for sign in _SIGNS_OF_NO_MEMORY)


def _no_memory(text: str, command: Sequence[str]) -> str:
    """One line for the text of an allocator: on which device, how much it was asked for, and what to do."""
    on_gpu = "CUDA" in text or "CUBLAS" in text or "CUSOLVER" in text
    found = _WANTED.search(text)
    wanted = ""
    if found is not None:
        size = megabytes(int(float(found[1]))) if found[2] == "bytes" else f"{found[1]} {found[2]}"
        wanted = f": {size} more were asked for"
    if on_gpu:
        bound = "bound what is taken with --device-memory, or " if list(command) in _BOUNDED else ""
        return f"not enough memory on the GPU{wanted} ({bound}choose --device cpu)"
    bound = ", or bound what is taken with --memory" if list(command) in _BOUNDED else ""
    return f"not enough memory{wanted} (close other programs{bound})"
