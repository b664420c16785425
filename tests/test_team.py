"""Several processes under torchrun: the bytes of one, one voice, and failures that all of them notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing import random_adapters as ra

from lorazip_cli.main import main
from lorazip_core.base import team
from lorazip_core.bundle.reader import Bundle
from lorazip_core.clustering.run import ClusterOptions, cluster
from lorazip_core.compress.run import compress
from lorazip_core.planning.plan import CompressOptions

PROCESS = Path(__file__).with_name("team_process.py")
VARIANTS = {
    "joint": ["--rank", "4", "--clusters", "3"],
    "diag": ["--method", "diag", "--rank", "4", "--clusters", "2"],
    "svd": ["--method", "svd", "--rank", "2"],
    "guaranteed": ["--rank", "4", "--clusters", "2", "--max-error", "0.02"],
    "auto": ["--rank", "4", "--clusters", "auto"],
}


class Told(NamedTuple):
    """What one process did with one command."""

    code: int
    out: str
    err: str


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def torchrun(processes: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def together(processes: int, commands: list[list[str]], folder: Path) -> list[list[Told]]:
    """What each of several processes did with each of the commands."""
    folder.mkdir()
    (folder / "commands.json").write_text(json.dumps(commands))
    ended = torchrun(processes, PROCESS, folder / "commands.json", folder)
    assert ended.returncode == 0, ended.stderr
    return [[Told(**told) for told in json.loads((folder / f"{rank}.json").read_text())] for rank in range(processes)]


def alone(command: list[str], capsys: pytest.CaptureFixture[str]) -> Told:
    capsys.readouterr()
    code = main(command)
    return Told(code, *capsys.readouterr())


def said(err: str) -> list[str]:
    """The lines of stderr, but for those that tell how long a step took, which only a slow one has."""
    return [line for line in err.splitlines() if ": done in " not in line]


def report(out: str) -> dict[str, Any]:
    """The one JSON object of stdout, less what differs between two runs: paths, times, and what a process
    already holds, which counts in the memory that it will need."""
    told = json.loads(out)
    differs = ("seconds", "bundle", "output", "memory_bytes", "least_memory_bytes")
    return {key: value for key, value in told.items() if key not in differs}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ra.write_collection(tmp_path_factory.mktemp("adapters"), ra.MIXED)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection with a NaN in the weights of one adapter."""
    root = ra.write_collection(tmp_path_factory.mktemp("spoilt"), ra.MIXED)
    weights = root / "b" / "d" / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, weights)
    return root


def test_two_processes_do_what_one_does(
    adapters: Path, spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it in one start of the processes: every kind of bundle, a file of clusters, plans and failures."""
    pair, one = tmp_path / "pair", tmp_path / "one"
    pair.mkdir()
    one.mkdir()

    def commands(where: Path) -> dict[str, list[str]]:
        made = {
            name: ["compress", str(adapters), "-o", str(where / name), "--json", *options]
            for name, options in VARIANTS.items()
        }
        made["clusters"] = ["cluster", str(adapters), "-o", str(where / "clusters.json"), "--json", "--rank", "4"]
        made["plan"] = ["compress", str(adapters), "--dry-run", "--json"]
        made["spoilt"] = ["compress", str(spoilt), "-o", str(where / "spoilt"), "--json"]
        made["skipped"] = ["compress", str(spoilt), "-o", str(where / "skipped"), "--json", "--skip-bad"]
        made["again"] = ["compress", str(adapters), "-o", str(where / "svd"), "--json"]
        return made

    first, second = together(2, list(commands(pair).values()), tmp_path / "told")
    for name, theirs, others in zip(commands(pair), first, second, strict=True):
        expected = alone(commands(one)[name], capsys)
        assert (theirs.code, others.code) == (expected.code, expected.code), (name, theirs.err)
        assert others.out == "", name  # one process speaks for all
        if expected.code:
            assert theirs.out == expected.out == "", name
            assert said(theirs.err) == said(expected.err.replace(str(one), str(pair))), name
        else:
            assert report(theirs.out) == report(expected.out), name
            assert said(theirs.err) == said(expected.err.replace(str(one), str(pair))), name
    assert contents(pair) == contents(one)
    assert {path.name for path in pair.iterdir()} == {*VARIANTS, "clusters.json", "skipped"}


def test_more_processes_than_packs(adapters: Path, tmp_path: Path) -> None:
    """Three of them, for the adapters, packs and probes of a collection of two adapters of one module."""
    few = ra.write_collection(tmp_path / "few", ra.plain(2, modules=(ra.Q,)))
    told = together(3, [["compress", str(few), "-o", str(tmp_path / "trio"), "--rank", "2", "-q"]], tmp_path / "told")
    assert [each.code for [each] in told] == [0, 0, 0]
    assert main(["compress", str(few), "-o", str(tmp_path / "one"), "--rank", "2", "-q"]) == 0
    assert contents(tmp_path / "trio") == contents(tmp_path / "one")


def test_one_process_goes_on_from_what_two_have_left(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = together(2, [["interrupted", str(adapters), str(tmp_path / "out")]], tmp_path / "told")
    assert [each.code for [each] in told] == [130, 130]
    left = sorted(path.name[:8] for path in tmp_path.glob(".out.partial/.work-*/pack-*"))
    assert {"pack-0-0", "pack-0-1"} <= set(left)  # each of the two has stored its first one
    assert "pack-0-4" not in left
    options = ["--rank", "4", "--clusters", "2"]
    assert main(["compress", str(adapters), "-o", str(tmp_path / "out"), *options]) == 0
    assert f"going on from {len(left) + 1} of 6 pieces" in capsys.readouterr().err  # one is who is in which cluster
    assert main(["compress", str(adapters), "-o", str(tmp_path / "whole"), *options]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_failure_of_the_first_is_that_of_all_and_nobody_waits_for_one_who_has_left(tmp_path: Path) -> None:
    first, second = together(2, [["first-fails"], ["second-leaves"]], tmp_path / "told")
    assert first[0] == second[0] == Told(3, "", "adapter 'one': is bad (mend it)\nadapter 'two': is bad\n")
    assert first[1].code == 8
    assert first[1].err == "another process of this run has ended (it said why, or torchrun does)\n"


def test_the_command_under_torchrun(adapters: Path, spoilt: Path, tmp_path: Path) -> None:
    options = ["--rank", "4", "--json"]
    ended = torchrun(2, "-m", "lorazip_cli", "compress", adapters, "-o", tmp_path / "pair", *options)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["schema"] == "lorazip.compress/1"
    assert main(["compress", str(adapters), "-o", str(tmp_path / "one"), "--rank", "4", "-q"]) == 0
    assert contents(tmp_path / "pair") == contents(tmp_path / "one")

    ended = torchrun(2, "-m", "lorazip_cli", "compress", spoilt, "-o", tmp_path / "bad", *options)
    assert ended.returncode == 1  # whatever the processes end with
    assert ended.stdout == ""
    assert "lorazip: error: adapter 'b/d': " in ended.stderr
    assert "exitcode  : 3" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "pair"]


def test_variables_of_another_job_are_not_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK and WORLD_SIZE are set for every process of many a cluster; those of torchrun come with a run."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with team.joined():
        assert (team.size(), team.rank(), team.is_first()) == (1, 0, True)


def test_a_training_that_calls_the_library_in_one_of_its_processes_does_not_wait_for_the_others(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "a run"}.items():
        monkeypatch.setenv(name, value)
    compress(adapters, tmp_path / "out", CompressOptions(rank=4, clusters=2))
    assert Bundle(tmp_path / "out").manifest.adapters
    cluster(adapters, tmp_path / "clusters.json", ClusterOptions(clusters=2, rank=4))
    assert (team.size(), team.is_first()) == (1, True)
