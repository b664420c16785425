"""The server as a process of its own: for benchmarks, where it must not share the client's interpreter."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .faults import Delay, Drip, RateLimit, Status
from .repository import Collection, Item, Repository
from .server import HubServer


def repositories_of(directory: Path, owner: str) -> list[Repository]:
    """One for every adapter under a directory, tagged as the Hub tags adapters."""
    found = []
    for config in sorted(directory.rglob("adapter_config.json")):
        path = config.parent.relative_to(directory).as_posix()
        # Ids are short of characters, and the client refuses "--" and "..".
        name = re.sub(r"[^A-Za-z0-9_]+", "-", directory.name if path == "." else path).strip("-")
        card = {"library_name": "peft", "base_model": json.loads(config.read_bytes()).get("base_model_name_or_path")}
        found.append(Repository.from_directory(f"{owner}/{name}", config.parent, card_data=card))
    if len({repository.id for repository in found}) < len(found):
        raise ValueError("two adapters would be the same repository")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Serve until standard input ends; print what was asked for then, and since the last time for every line of it."""
    parser = argparse.ArgumentParser(
        prog="python -m testing.hub", description="A Hugging Face Hub on loopback, for tests."
    )
    parser.add_argument("directory", type=Path, help="every adapter under it becomes a repository")
    parser.add_argument("--owner", default="org", help="whose they are; OWNER/all is a collection of them")
    parser.add_argument("--delay", type=float, default=0.0, metavar="SECONDS", help="before every answer")
    parser.add_argument("--bandwidth", type=int, metavar="BYTES", help="a second, for each connection to the CDN")
    parser.add_argument("--limit", metavar="REQUESTS/SECONDS", help="refuse more requests to the Hub than these")
    parser.add_argument("--unavailable", type=float, default=0.0, metavar="P", help="how likely an answer is 503")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page-size", type=int, default=1000)
    parser.add_argument("--resolve-cache", action="store_true", help="redirect small files too, as today's Hub")
    asked = parser.parse_args(arguments)

    things = repositories_of(asked.directory, asked.owner)
    items = tuple(Item(repository.id) for repository in things)
    server = HubServer(
        *things,
        Collection(f"{asked.owner}/all", items),
        page_size=asked.page_size,
        resolve_cache=asked.resolve_cache,
        seed=asked.seed,
    )
    if asked.delay:
        server.faults.add(Delay(asked.delay))
    if asked.bandwidth:
        server.faults.add(Drip(1 << 16, (1 << 16) / asked.bandwidth), origin="cdn", method="GET")
    if asked.unavailable:
        server.faults.add(Status(503, "Service Unavailable"), probability=asked.unavailable)
    if asked.limit:
        requests, _, seconds = asked.limit.partition("/")
        server.faults.add(RateLimit(int(requests), float(seconds)), origin="hub")
    with server:
        print(json.dumps({"url": server.url, "cdn_url": server.cdn_url, "repositories": len(things)}), flush=True)
        for _ in sys.stdin:
            print(json.dumps(server.log.summary()), flush=True)
            server.log.clear()
        print(json.dumps(server.log.summary()), flush=True)


@dataclass
class HubProcess:
    url: str
    cdn_url: str
    repositories: int
    summary: dict[str, int] = field(default_factory=dict)
    """What was asked for since the last `lap`: there once the process has ended."""
    process: subprocess.Popen[str] | None = None

    def lap(self) -> dict[str, int]:
        """What was asked for since the last time."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found: dict[str, int] = json.loads(self.process.stdout.readline())
        return found


@contextmanager
def hub_process(directory: Path, *options: str) -> Iterator[HubProcess]:
    """A server of a directory's adapters, with options of `python -m testing.hub`."""
    search = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with subprocess.Popen(
        [sys.executable, "-m", "testing.hub", str(directory), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": search},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        started = process.stdout.readline()
        if not started:
            raise RuntimeError("the server did not start")
        hub = HubProcess(**json.loads(started), process=process)
        try:
            yield hub
        finally:
            process.stdin.close()
            hub.summary.update(json.loads(process.stdout.readline() or "{}"))
