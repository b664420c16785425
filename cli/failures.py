"""What to say of an exception, and the exit code that goes with it."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import typer

from lorazip_core.errors import AdapterErrors, LocalError, LorazipError

from .table import count
from .usage import explain_usage

_HINTS = {
    errno.ENOSPC: "free some space, or choose another -o",
    errno.EDQUOT: "free some space, or choose another -o",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "choose an -o on a file system that can be written",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
}

_SYSTEM_ERROR = re.compile(r"(?:os error|Os \{ code:) (\d+)")  # safetensors tells the number in its text only


class Failure(NamedTuple):
    """Lines for stderr, one for each thing that is wrong."""

    lines: list[str]
    exit_code: int


def explain(error: Exception, arguments: Sequence[str]) -> Failure | None:
    """The failure that an exception of a command stands for, or None when nobody foresaw it: then it is a bug."""
    match error:
        case AdapterErrors(errors=errors):
            escape = arguments[:1] in (["cluster"], ["compress"]) and "--skip-bad" not in arguments
            hint = " (--skip-bad goes on without)" if escape else ""
            lines = [*map(str, errors), f"{count(len(errors), 'adapter')} cannot be used{hint}"]
            return Failure(lines, error.exit_code)
        case LorazipError():
            return Failure([str(error)], error.exit_code)
        case typer.TyperException():
            return Failure([explain_usage(error)], error.exit_code)
        case OSError():
            return Failure([_local(error.errno, error.strerror or str(error), error.filename)], LocalError.exit_code)
    if _is_out_of_memory(error):
        first_line = str(error).partition("\n")[0] or "out of memory"
        hint = "close other programs, or choose a smaller --rank or --device cpu"
        return Failure([f"not enough memory: {first_line} ({hint})"], LocalError.exit_code)
    if type(error).__name__ == "SafetensorError" and (system := _SYSTEM_ERROR.search(str(error))):
        number = int(system[1])
        return Failure([_local(number, os.strerror(number), None)], LocalError.exit_code)
    return None


def _local(number: int | None, reason: str, file: str | bytes | int | None) -> str:
    where = f"{os.fsdecode(file)}: " if isinstance(file, str | bytes) else ""
    hint = f" ({_HINTS[number]})" if number in _HINTS else ""
    return f"{where}{reason}{hint}"


# The last one comes from a GPU that others have filled, on which CUDA cannot even start.
_SIGNS_OF_NO_MEMORY = ("can't allocate memory", "can't start new thread", "CUDA error: out of memory")


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # never imported here: a usage error must not cost a second
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_NO_MEMORY)
