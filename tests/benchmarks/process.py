"""Run a command as a process of its own: seconds, peak memory, open files, what it printed.

Linux counts the memory of the process that starts another one into the other's peak. So a tiny interpreter without
site-packages (this file as a script) starts the command, not a benchmark that has PyTorch loaded. It can also watch the
command while it runs: what /proc says of it and of all processes that it started, 20 times a second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

INTERVAL = 0.05
MAPPINGS_EVERY = 10
_KIB_FIELDS = {"VmRSS": "resident", "RssAnon": "anonymous", "RssShmem": "shared", "VmPin": "pinned"}


class Watched(NamedTuple):
    """The largest of what was seen, in bytes or numbers, each summed over the process and those that it started.

    ``anonymous`` is memory that is neither a page of a file (which the kernel can drop) nor shared; where the kernel
    does not tell it apart (no RssAnon in /proc/PID/status) it is all resident memory. ``pinned`` is locked for
    devices, as far as the kernel counts it for a process. ``machine`` is by how much MemAvailable of /proc/meminfo
    fell: it misses nothing, but has in it whatever else the machine does. ``mappings`` are the lines of
    /proc/PID/maps: a mapped file counts there when its descriptor is closed; looked at every half second.
    """

    anonymous: int
    resident: int
    shared: int
    pinned: int
    machine: int
    open_files: int
    mappings: int


class Finished(NamedTuple):
    """A process that ended: wall time and peak resident memory, start-up included, and its stdout."""

    seconds: float
    peak_bytes: int
    stdout: str
    watched: Watched | None = None
    exit_code: int = 0
    stderr: str = ""


def run(
    command: Sequence[object],
    *,
    environment: dict[str, str] | None = None,
    watch: bool = False,
    data_limit: int | None = None,
    kill_after: float | None = None,
    check: bool = True,
) -> Finished:
    """Run ``command``; SystemExit with its stderr when it fails, unless ``check`` is off.

    ``data_limit`` is RLIMIT_DATA in bytes: no process of it can map more private memory. ``kill_after`` sends SIGKILL
    to it and to all that it started after so many seconds.
    """
    import subprocess
    import tempfile

    words = list(map(str, command))
    settings = {"watch": watch, "data_limit": data_limit, "kill_after": kill_after}
    with tempfile.NamedTemporaryFile(suffix=".json") as figures:
        done = subprocess.run(
            [sys.executable, "-S", "-E", __file__, figures.name, json.dumps(settings), *words],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            raise SystemExit(f"{' '.join(words[:4])} … failed with {done.returncode}:\n{done.stderr[-4000:]}")
        measured = json.load(figures)
    watched = Watched(**measured["watched"]) if measured["watched"] else None
    return Finished(
        measured["seconds"], measured["peak_bytes"], done.stdout, watched, measured["exit_code"], done.stderr
    )


def lorazip(*words: object) -> Finished:
    """Run lorazip from the environment of this interpreter."""
    return run([*LORAZIP, *words])


LORAZIP = (sys.executable, "-m", "lorazip_cli")


def _measure(path: str, settings: dict[str, float], command: list[str]) -> int:
    """Start ``command``, wait, and write its figures to ``path``; returns its exit status, negative for a signal."""
    if settings["data_limit"]:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(settings["data_limit"]),) * 2)
    watching = settings["watch"] or settings["kill_after"]
    if watching:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # to be waited for, at most INTERVAL
    available = _available()
    started = time.monotonic()
    process = os.posix_spawnp(command[0], command, os.environ, setsigmask=())
    peaks: dict[str, int] = {}
    deadline = started + settings["kill_after"] if settings["kill_after"] else None
    turn = 0
    # One wait that does not reap, so that the last word is wait4's, with the usage of the process.
    while watching and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if settings["watch"]:
            for name, value in {
                **_sample(process, turn % MAPPINGS_EVERY == 0),
                "machine": available - _available(),
            }.items():
                peaks[name] = max(peaks.get(name, 0), value)
        if deadline and time.monotonic() > deadline:
            for each in list(_family(process)):
                _kill(each)
            deadline = None
        turn += 1
        signal.sigtimedwait({signal.SIGCHLD}, INTERVAL)
    _, status, usage = os.wait4(process, 0)
    seconds = time.monotonic() - started
    unit = 1 if sys.platform == "darwin" else 1024
    code = os.waitstatus_to_exitcode(status)
    watched = peaks if "resident" in peaks else None
    figures = {"seconds": seconds, "peak_bytes": usage.ru_maxrss * unit, "watched": watched, "exit_code": code}
    with open(path, "w") as file:
        json.dump(figures, file)
    return code


def _sample(process: int, with_mappings: bool) -> dict[str, int]:
    """The fields of `Watched` at this moment; empty when the process is gone, or is not yet what it will be."""
    sums: dict[str, int] = {}
    for number in _family(process):
        try:
            with open(f"/proc/{number}/status") as file:
                status = dict(line.split(":", 1) for line in file if ":" in line)
            files = len(os.listdir(f"/proc/{number}/fd"))
            mappings = _lines(f"/proc/{number}/maps") if with_mappings else 0
        except OSError:
            continue
        found = {name: int(status[field].split()[0]) * 1024 for field, name in _KIB_FIELDS.items() if field in status}
        if "resident" not in found:
            continue  # it has ended
        row = {
            "shared": 0,
            "pinned": 0,
            "anonymous": found["resident"],
            **found,
            "open_files": files,
            "mappings": mappings,
        }
        for name, value in row.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def _lines(path: str) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _family(process: int) -> Iterator[int]:
    """A process and all that it started, as far as they are still its descendants."""
    yield process
    try:
        tasks = os.listdir(f"/proc/{process}/task")
    except OSError:
        return
    for task in tasks:
        try:
            with open(f"/proc/{process}/task/{task}/children") as file:
                children = file.read().split()
        except OSError:
            continue
        for child in children:
            yield from _family(int(child))


def _available() -> int:
    """MemAvailable in bytes; 0 where /proc/meminfo does not have it."""
    try:
        with open("/proc/meminfo") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")), 0)
    except OSError:
        return 0


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    sys.exit(abs(_measure(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:])))
