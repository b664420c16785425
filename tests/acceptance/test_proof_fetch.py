"""Fetching 300 adapters from a Hub that fails, cuts and limits: all arrive, none twice; and so after kill -9.

The Hub is the one of testing/hub on loopback, with 5% answers 500, 2% cut connections and a rate limit; a tenth of the
repositories is private. The adapters are made up, with the shapes of an attention layer of SmolLM2-135M.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from acceptance.real_data import Say
from testing.fetch_process import TOKEN, Contents, Killer, contents, left, repositories, sent_in_vain, start, there
from testing.hub import SIGNATURE, Cut, HubServer, RateLimit, Repository, Status
from testing.random_adapters import Recipe, write_collection

from lorazip_core.adapter.lock import LOCK_NAME, read_lock
from lorazip_core.adapter.module import Module

pytestmark = pytest.mark.acceptance

ADAPTERS = 300
JOBS = 16  # the default
SEED = 20240700
MODULES = tuple(
    Module(f"model.layers.0.self_attn.{name}_proj", "linear", d_out, 576)
    for name, d_out in (("q", 576), ("k", 192), ("v", 192))
)


class Undisturbed(NamedTuple):
    """A run that nobody killed."""

    lock: bytes
    seconds: float
    lookups: int
    """Requests before the first one for weights."""
    end: float
    """Seconds between the last request and the end of the process."""
    summary: dict[str, int]


class Organisation(NamedTuple):
    repositories: list[Repository]
    expected: Contents


@pytest.fixture(scope="module")
def organisation(tmp_path_factory: pytest.TempPathFactory) -> Organisation:
    root = tmp_path_factory.mktemp("adapters")
    recipes = (Recipe(f"t{number:03}", 16, MODULES, dtype=torch.bfloat16) for number in range(ADAPTERS))
    write_collection(root, tuple(recipes), seed=SEED)
    found = repositories(root, "many", private_every=10)
    expected = contents(found)
    assert len({files["adapter_model.safetensors"] for files in expected.values()}) == ADAPTERS
    return Organisation(found, expected)


@contextmanager
def unreliable(of: Organisation) -> Iterator[HubServer]:
    with HubServer(*of.repositories, tokens={TOKEN: "me"}, seed=SEED) as hub:
        hub.faults.add(Status(500), probability=0.05)
        hub.faults.add(Cut(), probability=0.02)
        hub.faults.add(RateLimit(200, 2.0), origin="hub")
        yield hub


@pytest.fixture(scope="module")
def undisturbed(organisation: Organisation, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Also the proof that all arrive, each of them once."""
    folder = tmp_path_factory.mktemp("undisturbed")
    target, home = folder / "out", folder / "home"
    with unreliable(organisation) as hub:
        started = time.monotonic()
        child = start(hub, target, home, "org:many")
        out, err = child.communicate()
        ended = time.monotonic()
        summary, requests = hub.log.summary(), hub.log.requests
        complete = hub.log.complete()
    assert child.returncode == 0, err
    assert TOKEN not in out + err
    assert SIGNATURE not in out + err
    assert hidden_words(folder, TOKEN, SIGNATURE) == []
    found = there(target)
    assert digests(found) == digests(organisation.expected)
    assert left(target) == []
    lock = read_lock(target)
    assert lock is not None
    assert {adapter.name for adapter in lock.adapters} == organisation.expected.keys()
    locked = {
        adapter.name: {file.path: (file.size_bytes, file.sha256) for file in adapter.files} for adapter in lock.adapters
    }
    assert locked == {
        name: {path: (len(data), hashlib.sha256(data).hexdigest()) for path, data in files.items()}
        for name, files in organisation.expected.items()
    }
    commits = {each.id: each.head for each in organisation.repositories}
    assert {adapter.name: adapter.origin.commit for adapter in lock.adapters} == commits
    assert complete == {(name, path): 1 for name, files in organisation.expected.items() for path in files}
    for what in ("cut", "rate_limited", "faults"):
        assert summary[what] > 0, what
    first = next(record.number for record in requests if record.path.endswith(".safetensors"))
    end = ended - requests[-1].at
    return Undisturbed((target / LOCK_NAME).read_bytes(), ended - started, first, end, summary)


def hidden_words(folder: Path, *words: str) -> list[Path]:
    """The files below a folder with one of the words in them."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if any(word.encode() in path.read_bytes() for word in words)]


def digests(of: Contents) -> dict[str, dict[str, str]]:
    return {
        name: {path: hashlib.sha256(data).hexdigest() for path, data in files.items()} for name, files in of.items()
    }


def spread(choose: random.Random, count: int, start: int, stop: int) -> list[int]:
    """A random number from each of ``count`` equal parts of a range."""
    borders = [start + (stop - start) * part // count for part in range(count + 1)]
    return [choose.randrange(*pair) for pair in pairwise(borders)]


def test_all_arrive_and_none_twice(organisation: Organisation, undisturbed: Undisturbed, say: Say) -> None:
    """What it is about is asserted where the run is made, since the other proof needs it, too."""
    what = ("requests", "downloads", "cut", "refused", "rate_limited", "file_bytes")
    say(
        f"fetch of {ADAPTERS} adapters: {undisturbed.seconds:.1f} s,"
        f" {', '.join(f'{name} {undisturbed.summary[name]:,}' for name in what)}"
    )


def test_kill_at_any_moment(organisation: Organisation, undisturbed: Undisturbed, tmp_path: Path, say: Say) -> None:
    """Three kills while adapters are looked up, five among the weights, two after the last file."""
    choose = random.Random(SEED)
    files = sum(map(len, organisation.expected.values()))
    lookups = [(f"request {n}", n, 0, 0.0) for n in spread(choose, 3, 1, undisturbed.lookups)]
    transfer = [(f"file {n}", 0, n, 0.0) for n in spread(choose, 5, ADAPTERS + 1, files)]
    quarter = undisturbed.end / 4  # of the time for the last files, the lock and the end of the process
    delays = [choose.uniform(0.0, quarter), choose.uniform(quarter, 2 * quarter)]
    end = [(f"{delay:.2f} s after the last file", 0, files, delay) for delay in delays]
    say("moment of the kill: adapters in place, lock; complete at the server and not in the cache; fetched again")
    killed = 0
    for number, (moment, requests, sent, delay) in enumerate([*lookups, *transfer, *end]):
        target, home = tmp_path / "out", tmp_path / "home"
        with unreliable(organisation) as hub:
            killer = Killer()
            hub.faults.add(killer)
            killer.aim(lambda r, f, requests=requests, sent=sent: r >= requests and f >= sent, delay)  # type: ignore[misc]
            child = start(hub, target, home, "org:many")
            killer.pid = child.pid
            printed = "".join(child.communicate())
            assert child.returncode == -signal.SIGKILL or (delay and child.returncode == 0), f"{moment}: {printed}"
            killed += child.returncode != 0
            here = there(target)
            assert here == {name: organisation.expected[name] for name in here}, moment
            lock = (target / LOCK_NAME).read_bytes() if (target / LOCK_NAME).exists() else None
            assert lock in (None, undisturbed.lock)
            if lock is not None:
                assert len(here) == ADAPTERS
            assert set(hub.log.complete().values()) <= {0, 1}
            on_their_way = sent_in_vain(hub, organisation.repositories, home)
            again = start(hub, target, home, "org:many")
            printed += "".join(again.communicate())
            assert again.returncode == 0, f"{moment}: {printed}"
            complete = hub.log.complete()
        repeated = {file for file, times in complete.items() if times > 1}
        assert repeated <= on_their_way, moment
        assert len(on_their_way) <= JOBS, moment
        assert max(complete.values()) <= 2
        assert there(target) == organisation.expected
        assert (target / LOCK_NAME).read_bytes() == undisturbed.lock, moment
        assert left(target) == []
        assert TOKEN not in printed
        assert SIGNATURE not in printed
        say(
            f"  {number + 1:2} {moment:28} {len(here):3}, {'lock' if lock else 'none'};"
            f" {len(on_their_way):2}; {len(repeated):2}{'' if child.returncode else ' (it had ended before)'}"
        )
        shutil.rmtree(target)
        shutil.rmtree(home)
    assert killed >= len(lookups) + len(transfer) + 1
