"""kill -9 leaves the old output, the new one or none: processes that kill themselves at each step of the work."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lorazip_core.compress.run import compress
from lorazip_core.planning.plan import CompressOptions
from lorazip_core.sample import sample_path
from lorazip_core.verify.run import verify

# A process that kills itself when Python reports, for the n-th time, a use of the file system with ``needle`` in it.
# ``ctypes.dlsym`` is how atomic_directory gets at renameat2.
DYING = """
import os, sys

step, needle, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "ctypes.dlsym"}
done = 0

def watch(event, args):
    global done
    what = f"{event} {args}"
    if event in EVENTS and (folder in what or "renameat2" in what) and needle in what:
        done += 1
        if done == step:
            os.kill(os.getpid(), 9)

sys.addaudithook(watch)
"""

REPLACE = """
from pathlib import Path
from lorazip_core.base.files import atomic_directory

with atomic_directory(Path(folder) / "bundle", force=True, not_ours=lambda path: None) as partial:
    for name in names:
        (partial / name).write_text("new")
"""

COMPRESS = """
from pathlib import Path
from lorazip_core.compress.run import compress
from lorazip_core.planning.plan import CompressOptions

compress(Path(sys.argv[4]), Path(folder) / "bundle", CompressOptions(method="svd", rank=1), force=True)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(program: str, step: int, needle: str, folder: Path, *argv: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", DYING + program, str(step), needle, str(folder), *map(str, argv)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})


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
        code = start(f"names = {tuple(new)}" + REPLACE, step, "", tmp_path).wait()
        states.append(contents(target))
        assert states[-1] in (old, new), step
        assert target.exists() or not old
        if code == 0:
            break
        assert code == -signal.SIGKILL
        exec(REPLACE, {"folder": tmp_path, "names": ("b",)})  # what the killed one left is in nobody's way
        assert contents(target) == {"b": b"new"}
        assert os.listdir(tmp_path) == ["bundle"]
    assert code == 0
    assert states[0] == old
    assert len(states) > 10


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
    children = [start(COMPRESS, step, needle, folders[needle, step], adapters) for needle, step in expected]
    assert {child.wait() for child in children} == {-signal.SIGKILL}
    for where, folder in folders.items():
        target = folder / "bundle"
        assert contents(target) == contents(expected[where]), where
        assert verify(target).ok
        assert len(os.listdir(folder)) == 2, where  # the target and what was being made or removed
        compress(adapters, target, CompressOptions(method="svd", rank=1), force=True)
        assert contents(target) == contents(new)
        assert os.listdir(folder) == ["bundle"]
