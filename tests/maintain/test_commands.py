"""`lorazip add` and `lorazip remove`: the sample goes into a bundle in parts, and out again."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from testing import random_adapters as ra
from testing import schemas
from testing.broken import edit_manifest

from lorazip_cli.main import main
from lorazip_core.base import filesystem
from lorazip_core.sample import sample_path

NAMES = sorted(folder.name for folder in sample_path().iterdir() if folder.is_dir())
OLD, NEW = NAMES[:3], NAMES[3:5]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real adapters in two directories, and bundles of the first ones: codes, and a shared basis."""
    root = tmp_path_factory.mktemp("maintain")
    for folder, names in (("old", OLD), ("new", NEW)):
        for name in names:
            shutil.copytree(sample_path() / name, root / folder / name)
    run("compress", root / "old", "-o", root / "coded")
    run("compress", root / "old", "-o", root / "joint", "--rank", 8)
    return root


def run(*argv: object, code: int = 0) -> None:
    assert main([*map(str, argv), "-q"]) == code


def told(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> dict[str, Any]:
    """The JSON of a command, which is as its schema says."""
    capsys.readouterr()
    run(*argv, "--json", code=code)
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    jsonschema.validate(report, schemas.schema(f"{argv[0]}-1"))
    return report


@pytest.mark.parametrize("bundle", ["coded", "joint"])
def test_real_adapters_come_and_go(root: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = told(capsys, "add", root / bundle, root / "new", "-o", tmp_path / "2")
    assert [(each["name"], each["scheme"], each["cluster"]) for each in report["added"]] == [
        (name, "coded", None)
        for name in NEW  # tasks that have nothing in common
    ]
    assert all(each["squared_error"] < 0.1 for each in report["added"])
    assert all((each["cluster_squared_error"] is None) == (bundle == "coded") for each in report["added"])
    assert report["bytes_after"] == told(capsys, "info", tmp_path / "2")["bytes_bundle"]
    # The originals of all, and of the new ones alone.
    options = [option for name in NEW for option in ("--adapter", name)]
    proof = told(capsys, "verify", tmp_path / "2", "--against", root / "new", *options, "--max-error", 0.1)
    assert [each["name"] for each in proof["adapters"]] == NEW
    assert told(capsys, "verify", tmp_path / "2", "--against", root / "new", code=1)["ok"] is False
    for name in NAMES[:5]:
        (tmp_path / "all").mkdir(exist_ok=True)
        (tmp_path / "all" / name).symlink_to(root / ("old" if name in OLD else "new") / name)
    assert told(capsys, "verify", tmp_path / "2", "--against", tmp_path / "all")["ok"] is True
    run("export", tmp_path / "2", "-o", tmp_path / "exported")
    assert {path.name for path in (tmp_path / "exported").iterdir() if path.is_dir()} == {*OLD, *NEW}
    report = told(capsys, "remove", tmp_path / "2", *NEW, "-o", tmp_path / "3")
    assert (report["removed"], report["rewritten"], report["adapters"]) == (NEW, [], 3)
    before, after = (
        {p.name: p.read_bytes() for p in folder.rglob("*.*")} for folder in (root / bundle, tmp_path / "3")
    )
    assert before == after


def test_people_are_told_what_was_done(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["add", str(root / "joint"), str(root / "new"), "-o", str(tmp_path / "2")]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert f"2 adapters added to {root / 'joint'}: 5 adapters in {tmp_path / '2'}, " in err
    assert "served by no shared basis, and kept on their own: 2\n" in err
    assert f"  {NEW[0]}: it would lose 0." in err
    assert main(["info", str(tmp_path / "2")]) == 0
    assert "added        2 adapters since it was made: 0 on shared bases, 2 on their own\n" in capsys.readouterr().out
    assert main(["remove", str(tmp_path / "2"), NEW[0], "-o", str(tmp_path / "3")]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert f"1 adapter removed from {tmp_path / '2'}: 4 adapters in {tmp_path / '3'}, " in err


def test_a_plan_is_data(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("add", root / "joint", root / "new", "--dry-run", "-o", tmp_path / "2")
    assert capsys.readouterr().out.splitlines()[1:] == [f"  {name}: coded, on its own" for name in NEW]
    report = told(capsys, "add", root / "joint", root / "new", "--dry-run", "--max-error", 1)
    assert [(each["scheme"], each["cluster"]) for each in report["added"]] == [("joint", 0)] * 2
    assert (report["output"], report["bytes_after"]) == (None, None)
    run("remove", root / "coded", OLD[0], "--dry-run")
    assert capsys.readouterr().out.splitlines()[1:] == [f"  {OLD[0]}", "files: 0 dropped, 1 written again without them"]
    report = told(capsys, "remove", root / "joint", OLD[0], "--dry-run")
    assert (report["output"], report["rewritten"]) == (None, ["cores/0-0.safetensors"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "code", "line"),
    [
        (
            ["add", "coded", "old", "-o", "2"],
            3,
            f"adapter '{OLD[0]}': the bundle has one of that name (rename it, or --re",
        ),
        (["add", "coded", "new", "-o", "coded"], 2, "coded is the input itself"),
        (["add", "coded", "new", "-o", "old", "--force"], 6, "old exists and was not written by lorazip"),
        (["add", "coded", "joint", "-o", "2"], 2, "joint is a bundle, not a directory of adapters"),
        (["add", "old", "new", "-o", "2"], 2, "old is a directory of adapters, not a bundle"),
        (["add", "coded", "odd", "-o", "2"], 3, "base model 'org/base', but the bundle has 'HuggingFaceTB/SmolLM2"),
        (["add", "limited", "new", "-o", "2", "--max-error", "0.3"], 2, "--max-error 0.3: the bundle was made so that"),
        (["remove", "coded", "-o", "2"], 2, "NAME"),
        (["remove", "coded", "*", "-o", "2"], 2, "coded: these are all of its adapters"),
        (["remove", "coded", "fv_ag_new", "-o", "2"], 2, "coded has no adapter 'fv_ag_new' (did you mean"),
    ],
)
def test_what_cannot_be_done_is_a_line(
    root: Path,
    tmp_path: Path,
    argv: list[str],
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    ra.write_collection(tmp_path / "odd", (ra.Recipe("odd"),))
    if "limited" in argv:
        run("compress", "old", "-o", "limited", "--max-error", 0.2)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main([*argv, "-q"]) == code
    assert line in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_bundle_that_outgrows_its_budget_says_so(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("compress", root / "old", "-o", tmp_path / "1", "--budget", "60kB")
    assert main(["add", str(tmp_path / "1"), str(root / "new"), "-o", str(tmp_path / "2")]) == 0
    assert "more than the --budget of 60,000 bytes that it was made for" in capsys.readouterr().err
    of_old = told(capsys, "info", tmp_path / "1")["adapters"]
    mean = sum(each["squared_error"] for each in of_old) / len(of_old)
    for each in told(capsys, "info", tmp_path / "2")["adapters"]:
        if each["added"]:
            assert 0.9 * mean < each["squared_error"] <= mean


def test_a_budget_of_what_a_device_holds_is_compared_with_that(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("compress", root / "old", "-o", tmp_path / "1", "--objective", "resident", "--budget", "80kB")
    run("add", tmp_path / "1", root / "new", "-o", tmp_path / "2")
    held = told(capsys, "info", tmp_path / "2", "--resident")["resident"]["bytes"]
    for short in (1, 0):
        edit_manifest(tmp_path / "1", lambda m, budget=held - short: m["parameters"].update(budget=budget))
        assert main(["add", str(tmp_path / "1"), str(root / "new"), "-o", str(tmp_path / "2"), "--force"]) == 0
        assert ("on a device now, more than the --budget of" in capsys.readouterr().err) == bool(short)


Usage = namedtuple("Usage", "total used free")
VERBS = {
    "add": lambda root: ["add", root / "joint", root / "new"],
    "remove": lambda root: ["remove", root / "joint", OLD[0]],
}


@pytest.fixture(params=VERBS)
def verb(request: pytest.FixtureRequest, root: Path) -> list[object]:
    return VERBS[request.param](root)


def refuse_to_link(source: Path, target: Path) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(target))


def test_space_for_what_has_to_be_copied_is_wanted_before_the_work(
    root: Path, verb: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The basis alone takes more than all that is written where files are linked."""
    [basis] = (root / "joint" / "bases").iterdir()
    monkeypatch.setattr(filesystem.shutil, "disk_usage", lambda path: Usage(10**9, 0, basis.stat().st_size))
    run(*verb, "-o", tmp_path / "linked")
    monkeypatch.setattr(os, "link", refuse_to_link)
    monkeypatch.setattr("lorazip_core.maintain.carry.on_one_file_system", lambda folder, target: False)
    capsys.readouterr()
    assert main([*map(str, verb), "-o", str(tmp_path / "copied")]) == 8
    error = capsys.readouterr().err
    assert f"{tmp_path}: about " in error
    assert "(free some space, or choose another -o)" in error
    assert "taking over" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["linked"]


def test_a_disk_that_is_full_all_the_same_is_named(
    verb: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

    for function in ("link", "copyfile"):
        monkeypatch.setattr(os if function == "link" else shutil, function, full)
        assert main([*map(str, verb), "-o", str(tmp_path / "out"), "-q"]) == 8
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"lorazip: error: {tmp_path}/.out.partial/")
        assert line.endswith("No space left on device (free some space, or choose another -o)")
        assert not list(tmp_path.iterdir())
        monkeypatch.setattr(os, "link", refuse_to_link)


def test_file_systems(tmp_path: Path) -> None:
    assert filesystem.on_one_file_system(tmp_path, tmp_path / "not" / "there")
    assert not filesystem.on_one_file_system(tmp_path, Path("/proc/there"))
