"""kill -9 and Ctrl-C during `fetch`: every adapter is whole or absent, and a restart ends as if nothing had been.

The processes that are killed are forks of one that has imported everything, which saves two seconds for each.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from testing.fetch_process import TOKEN, Killer, contents, environment, left, repositories, sent_in_vain, start, there
from testing.hub import SIGNATURE, Drip, HubServer, Repository
from testing.random_adapters import plain, write_collection

from lorazip_core.adapter.lock import LOCK_NAME, read_lock

# Forks a `lorazip` for each line of JSON on stdin, says its process id, and how it ended. With a step it kills itself:
# when Python reports, for the n-th time, a use of the file system in the folder; or "finishing", once the new lock is
# to be written, for the n-th time any use, since the removal of a tree names its files without their folder. Half of
# a file having been written is a step, too.
NURSERY = """
import contextlib, io, json, os, sys
from lorazip_cli.main import main
import lorazip_core.base.atomic as atomic

with contextlib.redirect_stderr(io.StringIO()):
    assert main(["fetch", "./absent", "-o", "./absent either"]) == 2  # imports the rest

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.chmod", "shutil.rmtree"}

def die_at(step, folder, wanted):
    done, finishing = 0, False

    def watch(event, args):
        nonlocal done, finishing
        if event in EVENTS:
            what = f"{event} {args}"
            finishing = finishing or (event == "open" and ".lorazip-fetch/.lorazip.lock." in what and "'w" in what)
            if finishing == wanted and (finishing or folder in what):
                done += 1
                if done == step:
                    os.kill(os.getpid(), 9)

    def write_file(path, data):
        path.write_bytes(data[:len(data) // 2])
        watch("open", (str(path), "half of it"))
        whole(path, data)

    whole, atomic.write_file = atomic.write_file, write_file
    sys.addaudithook(watch)

for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if pid == 0:
        if asked["step"]:
            die_at(asked["step"], asked["folder"], asked["finishing"])
        code = main(asked["words"])
        sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Nursery:
    """Starts processes one after the other; each is waited for before the next one."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(
        self, target: Path, *words: str, step: int = 0, finishing: bool = False, killer: Killer | None = None
    ) -> int:
        """The exit status of `lorazip fetch`."""
        asked = {"words": ["fetch", *words, "-q", "-o", str(target)], "step": step, "finishing": finishing}
        asked["folder"] = str(target)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        if killer is not None:
            killer.pid = pid
        return int(self._process.stdout.readline())


@contextmanager
def nursery(hub: HubServer, home: Path) -> Iterator[Nursery]:
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        env=environment(hub.url, home) | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Nursery(process)


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_killed_again_and_again_it_arrives_in_the_end(tmp_path: Path) -> None:
    """At the fifth file, while adapters are looked up; among the weights; when the last file is on its way."""
    jobs = 4
    root = write_collection(tmp_path / "adapters", plain(12))
    org = repositories(root, "org", private_every=5)
    expected = contents(org)
    target, home = tmp_path / "out", tmp_path / "home"
    arrived = []
    with HubServer(*org, tokens={TOKEN: "me"}) as hub, nursery(hub, home) as processes:
        killer = Killer()
        hub.faults.add(killer)
        on_their_way: set[tuple[str, str]] = set()
        for files in (5, 20, 30, 36, None):
            killer.aim(lambda requests, sent, files=files: files is not None and sent >= files)  # type: ignore[misc]
            before = hub.log.complete()
            code = processes.run(target, "org:org", "--jobs", str(jobs), killer=killer)
            assert code == (0 if files is None else -signal.SIGKILL), files
            after = hub.log.complete()
            repeated = {file for file in after if after[file] > max(1, before.get(file, 0))}
            assert repeated <= on_their_way
            # The server has sent them to the end, and the client may not have come to read them.
            on_their_way = sent_in_vain(hub, org, home)
            assert len(on_their_way) <= jobs
            here = there(target)
            assert here == {name: expected[name] for name in here}, files
            assert (read_lock(target) is None) == (files is not None)
            arrived.append(len(here))
        assert processes.run(tmp_path / "undisturbed", "org:org") == 0
    assert there(target) == expected
    assert left(target) == []
    assert (target / LOCK_NAME).read_bytes() == (tmp_path / "undisturbed" / LOCK_NAME).read_bytes()
    assert arrived == sorted(arrived)
    assert arrived[0] == 0
    assert 0 < arrived[2] <= arrived[3] < 12


@pytest.mark.parametrize(("stride", "least"), [(25, 1), pytest.param(5, 4, marks=pytest.mark.slow)])
def test_killed_at_any_step_an_update_has_been_made_or_not(stride: int, least: int, tmp_path: Path) -> None:
    """An adapter that stays, one that changes, one that goes and one that is new; killed in the middle of each step."""
    root = write_collection(tmp_path / "adapters", plain(5))
    stays, changes, goes, comes = org = repositories(root, "org")[:4]
    new_weights = (root / "t04" / "adapter_model.safetensors").read_bytes()
    prepared, updated, target = tmp_path / "prepared", tmp_path / "updated", tmp_path / "out"
    first = [each.id for each in (stays, changes, goes)]
    second = [*(each.id for each in (stays, changes, comes)), "--update", "--prune", "--jobs", "1"]
    with HubServer(*org, tokens={TOKEN: "me"}) as hub, nursery(hub, tmp_path / "home") as processes:
        assert processes.run(prepared, *first) == 0
        old = contents([stays, changes, goes])
        changes.commit({"adapter_model.safetensors": new_weights})
        new = contents([stays, changes, comes])
        shutil.copytree(prepared, updated)
        assert processes.run(updated, *second) == 0
        assert (there(prepared), there(updated)) == (old, new)
        old_lock, new_lock = ((folder / LOCK_NAME).read_bytes() for folder in (prepared, updated))
        states: Counter[str] = Counter()
        for finishing in (False, True):
            step, code = 1, -1
            while code != 0:
                shutil.copytree(prepared, target)
                code = processes.run(target, *second, step=step, finishing=finishing)
                if code != 0:
                    assert code == -signal.SIGKILL
                    states[state := state_of(target, old, new, old_lock, new_lock)] += 1
                    step += stride // 5 if finishing and state != "new" else stride  # the other steps are much alike
                    assert processes.run(target, *second) == 0, (finishing, step)
                assert all_bytes(target) == all_bytes(updated), (finishing, step)
                assert left(target) == []
                shutil.rmtree(target)
    assert states.keys() == {"old", "finishing", "new"}
    assert min(states.values()) >= least, states


def state_of(target: Path, old: dict, new: dict, old_lock: bytes, new_lock: bytes) -> str:
    """Which of the two states a directory is in, or on the way from one to the other; what is in it is checked."""
    here, lock = there(target), (target / LOCK_NAME).read_bytes()
    for name, files in here.items():
        assert files in [version[name] for version in (old, new) if name in version], name
    if lock == new_lock:
        assert here == new
        return "new"
    assert lock == old_lock
    if not (target / ".lorazip-fetch" / LOCK_NAME).exists():
        assert here in (old, new | old)  # what is new goes into its place at once
        return "old"
    return "finishing"


def test_ctrl_c_is_heard_in_the_middle_of_a_slow_download(tmp_path: Path) -> None:
    root = write_collection(tmp_path / "adapters", plain(2))
    org: list[Repository] = repositories(root, "org")
    target, home = tmp_path / "out", tmp_path / "home"
    with HubServer(*org, tokens={TOKEN: "me"}) as hub:
        drip = hub.faults.add(Drip(10, 1.0), origin="cdn", method="GET")  # it would take longer than `ended` waits
        child = start(hub, target, home, "org:org", "-q")
        until = time.monotonic() + 600  # only a test that hangs meets it
        while drip.hits < 2 and child.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.3)  # some of the bytes arrive
        child.send_signal(signal.SIGINT)
        out, err = ended(child)
        hub.faults.clear()
        assert child.returncode == 130
        assert out == ""
        assert err == "lorazip: error: interrupted; nothing was left half-written\n"
        assert there(target) == {}
        again = start(hub, target, home, "org:org")
        out, err = ended(again)
    assert again.returncode == 0, err
    assert there(target) == contents(org)
    assert left(target) == []
    assert TOKEN not in out + err
    assert SIGNATURE not in out + err


def ended(child: subprocess.Popen[str]) -> tuple[str, str]:
    """What it printed; it does not outlive the test."""
    try:
        return child.communicate(timeout=600)
    finally:
        child.kill()
