"""`lorazip fetch` as a process of its own, what it is to bring, and the moments at which tests kill it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from lorazip_core.adapter.discovery import find_adapters
from lorazip_core.adapter.lock import LOCK_NAME
from lorazip_core.adapter.reader import open_adapter
from lorazip_core.fetch.workspace import FOLDER
from testing.hub import Answer, HubServer, Repository, Request

LORAZIP = Path(sys.executable).with_name("lorazip")
TOKEN = "hf_SecretOfTheTestsThatNoOutputMayShow"
Contents = dict[str, dict[str, bytes]]


def repositories(root: Path, owner: str, *, private_every: int | None = None) -> list[Repository]:
    """One for every folder of ``root``; every so manieth is private, readable by ``me``."""
    card = {"library_name": "peft", "base_model": "org/base", "license": "mit"}
    found = []
    for number, folder in enumerate(sorted(root.iterdir()), 1):
        private = private_every is not None and number % private_every == 0
        settings = {"private": True, "readers": frozenset({"me"})} if private else {}
        found.append(Repository.from_directory(f"{owner}/{folder.name}", folder, card_data=card, **settings))
    return found


def contents(of: list[Repository]) -> Contents:
    """What is to arrive: adapter → file → bytes."""
    return {each.id: {path: file.read() for path, file in each.commits[each.head].files.items()} for each in of}


def environment(url: str, home: Path) -> dict[str, str]:
    """For a process that has to talk to the Hub at ``url``, with a cache of its own and a token."""
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}
    return {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | settings


def start(hub: HubServer, target: Path, home: Path, *words: str) -> subprocess.Popen[str]:
    """The installed command; its output goes to pipes."""
    return subprocess.Popen(
        [LORAZIP, "fetch", *words, "-o", target],
        env=environment(hub.url, home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def there(target: Path) -> Contents:
    """The adapters in a directory, hidden folders aside; every one must open."""
    found: Contents = {}
    for name, folder, *_ in find_adapters(target).adapters if target.exists() else ():
        open_adapter(name, folder)
        found[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")}
    return found


def left(target: Path) -> list[str]:
    """What is in a directory beside its adapters and their lock."""
    return sorted(
        path.name for path in target.iterdir() if path.name == FOLDER or not (path.is_dir() or path.name == LOCK_NAME)
    )


def sent_in_vain(hub: HubServer, repositories: list[Repository], home: Path) -> set[tuple[str, str]]:
    """The files that the server has sent to the end, and that are not in the client's cache."""
    commits = {each.id: each.head for each in repositories}
    sent = {file for file, times in hub.log.complete().items() if times}
    return {
        (id, path)
        for id, path in sent
        if not isinstance(try_to_load_from_cache(id, path, cache_dir=home / "hub", revision=commits[id]), str)
    }


class Killer:
    """A fault that kills a process when a request arrives; added last, it sees what other faults made of the answer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._when: Callable[[int, int], bool] = lambda requests, files: False
        self._delay = 0.0
        self._requests = 0
        self._files: set[tuple[str, str]] = set()
        self.pid: int | None = None

    def aim(self, when: Callable[[int, int], bool], delay: float = 0.0) -> None:
        """Kill `pid`, so many seconds after ``when`` was true of the requests and of the files sent whole, so far."""
        self._when, self._delay = when, delay

    def __call__(self, answer: Answer, request: Request, chance: random.Random) -> Answer:
        with self._lock:
            self._requests += 1
            whole = answer.served is not None and request.method == "GET" and answer.sending.cut_after is None
            if whole and answer.served is not None and answer.status in (200, 206):
                self._files.add(answer.served)
            if self.pid is not None and self._when(self._requests, len(self._files)):
                threading.Timer(self._delay, self._kill, (self.pid,)).start()
                self.pid = None
        return answer

    @staticmethod
    def _kill(pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
