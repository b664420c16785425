"""kill -9 leaves the old output, the new one or none: processes that kill themselves at each step of the work."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
from testing.forked import forked

from lorazip_core.base.atomic import atomic_directory
from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions
from lorazip_core.sample import sample_path
from lorazip_core.verify.run import verify


def replace(target: Path, names: Iterable[str]) -> None:
    with atomic_directory(target, force=True, not_ours=lambda path: None) as partial:
        for name in names:
            (partial / name).write_text("new")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def end_of(work: Callable[[], object], step: int, needle: str, folder: Path) -> int:
    """How a process ends that kills itself at the n-th use of files in ``folder`` with ``needle`` in it."""

    def counts(event: str, args: str) -> bool:
        return (str(folder) in args or "renameat2" in args) and needle in f"{event} {args}"

    return forked(work, dies_at=step, of=counts)


@pytest.mark.parametrize("over", ["nothing", "an old one"])
def test_killed_at_any_step_a_directory_is_old_or_new_or_not_there(over: str, tmp_path: Path) -> None:
    old = dict.fromkeys(("a", "manifest.json"), b"old") if over == "an old one" else {}
    new = dict.fromkeys(("a", "b", "manifest.json"), b"new")
    target = tmp_path / "bundle"
    states = []
    for step in range(1, 100):
        shutil.rmtree(target, ignore_errors=True)
        for name, data in old.items():
            target.mkdir(exist_ok=True)
            (target / name).write_bytes(data)
        code = end_of(partial(replace, target, new), step, "", tmp_path)
        states.append(contents(target))
        assert states[-1] in (old, new), step
        assert target.exists() or not old
        if code == 0:
            break
        assert code == -signal.SIGKILL
        replace(target, ["b"])  # what the killed one left is in nobody's way
        assert contents(target) == {"b": b"new"}
        assert os.listdir(tmp_path) == ["bundle"]
    assert code == 0
    assert states[0] == old
    assert len(states) > 10


@pytest.mark.slow  # test_resume.py kills compress too
def test_a_killed_compress_leaves_the_old_bundle_or_the_new_one(tmp_path: Path) -> None:
    adapters, old, new = tmp_path / "adapters", tmp_path / "old", tmp_path / "new"
    for source in sorted(sample_path().iterdir())[:2]:
        shutil.copytree(source, adapters / source.name)
    compress(adapters, old, CompressOptions(method="svd", rank=2))
    compress(adapters, new, CompressOptions(method="svd", rank=1))
    expected = {
        (".partial/manifest.json", 1): old,
        ("renameat2", 1): old,
        ("shutil.rmtree", 1): old,  # the pieces are about to be removed
        ("shutil.rmtree", 2): new,  # what was replaced is
    }
    folders = {where: tmp_path / str(number) for number, where in enumerate(expected)}
    for folder in folders.values():
        shutil.copytree(old, folder / "bundle")
    for where, folder in folders.items():
        target = folder / "bundle"
        again = partial(compress, adapters, target, CompressOptions(method="svd", rank=1), force=True)
        assert end_of(again, where[1], where[0], folder) == -signal.SIGKILL
        assert contents(target) == contents(expected[where]), where
        assert verify(target).ok
        assert len(os.listdir(folder)) == 2, where  # the target and what was being made or removed
        again()
        assert contents(target) == contents(new)
        assert os.listdir(folder) == ["bundle"]
