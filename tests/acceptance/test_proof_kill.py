"""Proof 5: kill -9 at 50 moments of a compress: never a bundle that opens but is wrong, never an old one lost."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from acceptance.real_data import Say

from lorazip_cli.main import main

pytestmark = pytest.mark.acceptance

KILLS = 50
SEED = 20240700


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(root: Path, target: Path, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "lorazip_cli", "compress", str(root), "-o", str(target), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_kill_at_any_moment(data: Path, tmp_path: Path, say: Say) -> None:
    root, target = data / "smollm2-mini", tmp_path / "work" / "bundle"
    new, old = tmp_path / "new", tmp_path / "old"
    target.parent.mkdir()
    duration = min(seconds(root, new), seconds(root, tmp_path / "new again"))
    assert start(root, old, "--method", "svd", "--rank", "1").wait() == 0
    whole = {"new": contents(new), "old": contents(old)}
    assert whole["new"] != whole["old"]
    partial = target.with_name(".bundle.partial")
    choose = random.Random(SEED)
    outcomes: Counter[tuple[str, str, str]] = Counter()
    for number in range(KILLS):
        over_old, in_commit = number % 2 == 1, number % 5 < 2
        if over_old:
            shutil.copytree(old, target)
        child = start(root, target, *(["--force"] if over_old else []))
        if in_commit:  # from the manifest's first byte on
            while not (partial / "manifest.json").exists() and child.poll() is None:
                time.sleep(0.0002)
            time.sleep(choose.choice([0, choose.uniform(0, 0.01), choose.uniform(0, 0.1)]))
        else:
            time.sleep(choose.uniform(0, 1.02 * duration))
        child.kill()
        child.wait()
        state = state_of(target, whole)
        assert state in (("old", "new") if over_old else ("absent", "new")), f"kill {number}: {state}"
        left = "nothing" if not partial.exists() else "whole" if (partial / "manifest.json").exists() else "partial"
        kind, moment = "over an old bundle" if over_old else "fresh", "commit" if in_commit else "any"
        outcomes[kind, moment, f"{state}, {left}"] += 1
        if state != "absent":
            assert main(["verify", str(target), "-q"]) == 0
        again = ["compress", str(root), "-o", str(target), "-q"]
        assert main(again + ["--force"] * (state != "absent")) == 0
        assert state_of(target, whole) == "new"
        assert os.listdir(target.parent) == ["bundle"]
        shutil.rmtree(target)
    say(f"{KILLS} kills of a run of {duration:.1f} s; moment, what was there, what was left beside it:")
    for (kind, moment, result), count in sorted(outcomes.items()):
        say(f"  {kind:18} | {moment:6} | {result:15} | {count}")


def seconds(root: Path, target: Path) -> float:
    started = time.monotonic()
    assert start(root, target).wait() == 0
    return time.monotonic() - started


def state_of(target: Path, whole: dict[str, dict[str, bytes]]) -> str:
    if not os.path.lexists(target):
        return "absent"
    here = contents(target)
    return next((name for name, files in whole.items() if files == here), "WRONG")
