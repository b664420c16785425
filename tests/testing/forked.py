"""Children of the test's own process, for work that is killed in the middle: they start in milliseconds.

A new Python would first import torch, for seconds.
"""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from collections.abc import Callable

import torch

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "ctypes.dlsym"}
"""Uses of the file system that Python reports; ctypes.dlsym is how atomic_directory gets at renameat2."""


def forked(work: Callable[[], object], *, dies_at: int, of: Callable[[str, str], bool]) -> int:
    """How a child that does this work ends: an exit status, or the negative number of a signal.

    It kills itself when Python reports an event for the ``dies_at``-th time whose name and arguments fulfil ``of``.
    """
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's threads have not come along
            sys.addaudithook(_killer(dies_at, of))
            work()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _killer(step: int, of: Callable[[str, str], bool]) -> Callable[[str, tuple[object, ...]], None]:
    events = itertools.count(1)  # of any thread, each counted once

    def watch(event: str, args: tuple[object, ...]) -> None:
        if event in EVENTS and of(event, str(args)) and next(events) == step:
            os.kill(os.getpid(), 9)

    return watch
