"""Run a command as a process of its own: seconds, peak memory, what it printed.

Linux counts the memory of the process that starts another one into the other's peak. So a tiny interpreter without
site-packages (this file as a script) starts the command, not a benchmark that has PyTorch loaded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple


class Finished(NamedTuple):
    """A process that exited with 0: wall time and peak resident memory, start-up included, and its stdout."""

    seconds: float
    peak_bytes: int
    stdout: str


def run(command: Sequence[object], *, environment: dict[str, str] | None = None) -> Finished:
    """Run ``command``; SystemExit with its stderr when it fails."""
    import subprocess
    import tempfile

    words = list(map(str, command))
    with tempfile.NamedTemporaryFile(suffix=".json") as figures:
        done = subprocess.run(
            [sys.executable, "-S", "-E", __file__, figures.name, *words],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(words[:4])} … failed with {done.returncode}:\n{done.stderr[-4000:]}")
        measured = json.load(figures)
    return Finished(measured["seconds"], measured["peak_bytes"], done.stdout)


def lorazip(*words: object) -> Finished:
    """Run lorazip from the environment of this interpreter."""
    return run([sys.executable, "-m", "lorazip_cli", *words])


def _measure(path: str, command: list[str]) -> int:
    """Start ``command``, wait, and write its figures to ``path``; returns its exit status."""
    started = time.monotonic()
    process = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(process, 0)
    seconds = time.monotonic() - started
    unit = 1 if sys.platform == "darwin" else 1024
    with open(path, "w") as file:
        json.dump({"seconds": seconds, "peak_bytes": usage.ru_maxrss * unit}, file)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(abs(_measure(sys.argv[1], sys.argv[2:])))
