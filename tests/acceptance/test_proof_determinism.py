"""Proof 6: the same adapters and parameters give the same bytes, in any process and in any order on the disk.

LORAZIP_COLLECTION names another collection than smollm2-mini.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance.real_data import Process, Say

pytestmark = pytest.mark.acceptance

COLLECTION = os.environ.get("LORAZIP_COLLECTION", "smollm2-mini")
RUNS = {
    "joint": ["--method", "joint"],
    "diag": ["--method", "diag"],
    "svd": ["--method", "svd"],
    "clusters": ["--method", "joint", "--clusters", "4"],
}


def digest(folder: Path) -> str:
    """Over every path and every byte."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0")
        if path.is_file():
            total.update(path.stat().st_size.to_bytes(8) + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def shuffled(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy whose folders were made in another order, in memory if possible: there, a listing shows that order."""
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(dir=where) as copy:
        folders = [folder for folder in (data / COLLECTION).iterdir() if folder.is_dir()]
        random.Random(1).shuffle(folders)
        for folder in folders:
            shutil.copytree(folder, Path(copy) / folder.name)
        yield Path(copy)


@pytest.mark.parametrize("run", RUNS)
def test_same_bytes(run: str, data: Path, shuffled: Path, tmp_path: Path, process: Process, say: Say) -> None:
    root = data / COLLECTION
    found = {}
    started = time.monotonic()
    runs = [("first", root, 1), ("again", root, 1), ("shuffled", shuffled, 1), ("2 threads", root, 2)]
    for name, source, threads in runs:
        result = process("compress", source, "-o", tmp_path / name, *RUNS[run], threads=threads)
        assert result.returncode == 0, result.stderr
        found[name] = digest(tmp_path / name)
    same = {name: value == found["first"] for name, value in found.items()}
    listed = [[each.name for each in folder.iterdir() if each.is_dir()] for folder in (root, shuffled)]
    say(
        f"{run:9} sha256 {found['first'][:16]}…; again {same['again']}, folders made in another order"
        f" {same['shuffled']} (listed in another order: {listed[0] != listed[1]}), on 2 threads {same['2 threads']};"
        f" {time.monotonic() - started:.0f} s"
    )
    assert same["again"]
    assert same["shuffled"]


def test_same_cluster_file(data: Path, shuffled: Path, tmp_path: Path, process: Process, say: Say) -> None:
    found = {}
    for name, source, threads in [
        ("first", data / COLLECTION, 1),
        ("again", data / COLLECTION, 1),
        ("shuffled", shuffled, 1),
        ("2 threads", data / COLLECTION, 2),
    ]:
        result = process("cluster", source, "-o", tmp_path / name, threads=threads)
        assert result.returncode == 0, result.stderr
        found[name] = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    say(f"cluster   sha256 {found['first'][:16]}…; {found}")
    assert len(set(found.values())) == 1
