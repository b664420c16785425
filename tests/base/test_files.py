"""base: directories that appear whole or not at all, names, and canonical JSON."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorazip_core.base import atomic, filesystem
from lorazip_core.base.atomic import Building, atomic_directory, check_output, resumable_directory
from lorazip_core.base.digests import canonical_json, safe_name, sha256_bytes, sha256_file
from lorazip_core.base.errors import Interrupted, LocalError, OutputExists
from lorazip_core.base.filesystem import chmod_to_umask, tree
from lorazip_core.bundle.manifest import InnerPath


def not_ours(folder: Path) -> str | None:
    return None if (folder / "mark").is_file() else "it has no mark"


def build(target: Path, *, force: bool = False) -> AbstractContextManager[Path]:
    return atomic_directory(target, force=force, not_ours=not_ours)


def put(target: Path, text: str, *, force: bool = False) -> None:
    with build(target, force=force) as folder:
        (folder / "mark").write_text(text)


def listing(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


class Killed(BaseException):
    pass


def test_a_fresh_directory_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "not/yet/there"
    with build(target) as folder:
        (folder / "mark").write_text("new")
        assert not target.exists()
        assert folder.parent == target.parent
    assert (target / "mark").read_text() == "new"
    assert listing(target.parent) == {"there"}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit, Killed])
def test_a_failure_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:

    def half(folder: Path) -> None:
        (folder / "mark").write_text("half")
        (folder / "sub").mkdir()
        raise failure

    with pytest.raises(failure), build(tmp_path / "out") as folder:
        half(folder)
    assert listing(tmp_path) == set()


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_with_force_leaves_the_old(tmp_path: Path, failure: type[BaseException]) -> None:
    put(tmp_path / "out", "old")
    with pytest.raises(failure), build(tmp_path / "out", force=True):
        raise failure
    assert (tmp_path / "out/mark").read_text() == "old"
    assert listing(tmp_path) == {"out"}


def test_an_existing_output_is_refused_without_force(tmp_path: Path) -> None:
    put(tmp_path / "out", "old")
    with pytest.raises(OutputExists, match="«force»") as error, build(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert error.value.exit_code == 6
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExists), build(tmp_path / "file"):
        pytest.fail("the block must not run")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(OutputExists):
        check_output(tmp_path / "dangling", force=False, not_ours=not_ours)


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_what_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    put(tmp_path / "out", "old")
    (tmp_path / "out/more").write_text("")
    put(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out/mark").read_text() == "new"
    assert listing(tmp_path / "out") == {"mark"}
    assert listing(tmp_path) == {"out"}


def test_force_refuses_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").write_text("years")
    (tmp_path / "file").write_text("years")
    for name in ("thesis", "file"):
        with pytest.raises(OutputExists, match="not written by lorazip"), build(tmp_path / name, force=True):
            pytest.fail("the block must not run")
    assert (tmp_path / "thesis/chapter").read_text() == (tmp_path / "file").read_text() == "years"
    assert listing(tmp_path) == {"thesis", "file"}


def test_force_takes_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExists):
        put(tmp_path / "out", "new")
    put(tmp_path / "out", "new", force=True)
    assert listing(tmp_path) == {"out"}


def test_what_appears_while_we_build_is_not_overwritten(tmp_path: Path) -> None:
    def appear(folder: Path) -> None:
        (folder / "mark").write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out/theirs").write_text("theirs")

    with pytest.raises(OutputExists), build(tmp_path / "out") as folder:
        appear(folder)
    assert (tmp_path / "out/theirs").read_text() == "theirs"
    assert listing(tmp_path) == {"out"}


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".out.partial/sub").mkdir(parents=True)
    (tmp_path / ".out.partial/sub/junk").write_text("junk")
    (tmp_path / ".out.partial/.lorazip").touch()
    (tmp_path / ".out.partial/link").symlink_to(tmp_path)
    put(tmp_path / "out", "new")
    assert listing(tmp_path / "out") == {"mark"}
    assert listing(tmp_path) == {"out"}


@pytest.mark.parametrize("name", [".out.partial", ".out.old"])
def test_what_somebody_else_calls_so_is_not_touched(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExists, match="was not written by lorazip"):
        put(tmp_path / "out", "new")
    assert (tmp_path / name / "thesis.tex").read_text() == "years of work"
    assert listing(tmp_path) == {name}


def test_a_run_killed_between_two_renames_is_mended(tmp_path: Path) -> None:
    """The old directory comes back: a run without force is refused, and a failing one with force loses nothing."""
    for state in ("refused", "fails"):
        folder = tmp_path / state
        put(folder / ".out.old", "old")
        if state == "refused":
            with pytest.raises(OutputExists):
                put(folder / "out", "new")
        else:
            with pytest.raises(RuntimeError), build(folder / "out", force=True):
                raise RuntimeError
        assert (folder / "out/mark").read_text() == "old"
        assert listing(folder) == {"out"}


def test_a_run_killed_after_the_exchange_is_cleared(tmp_path: Path) -> None:
    """Then .old, or .partial, holds what was replaced, and the new directory is in place."""
    for leftover in (".out.old", ".out.partial"):
        put(tmp_path / leftover / "out", "new")
        put(tmp_path / leftover / leftover, "old")
        put(tmp_path / leftover / "out", "newer", force=True)
        assert (tmp_path / leftover / "out/mark").read_text() == "newer"
        assert listing(tmp_path / leftover) == {"out"}


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("moment", range(1, 6))
def test_an_interruption_at_any_rename_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, moment: int
) -> None:
    """Interrupted just before or after the n-th rename, the output is whole at once: old or new."""
    put(tmp_path / "out", "old")
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    count = 0
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count * 2 - 1 == moment:
            raise KeyboardInterrupt
        result = rename(path, target)
        if count * 2 == moment:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "rename", interrupted)
    with suppress(KeyboardInterrupt):
        put(tmp_path / "out", "new", force=True)
    monkeypatch.setattr(Path, "rename", rename)
    assert (tmp_path / "out/mark").read_text() in ("old", "new")
    put(tmp_path / "out", "newer", force=True)
    assert listing(tmp_path) == {"out"}


def test_two_writers_of_one_target(tmp_path: Path) -> None:
    with build(tmp_path / "out") as folder:
        (folder / "mark").write_text("first")
        with pytest.raises(LocalError, match="another lorazip is writing it") as error, build(tmp_path / "out"):
            pytest.fail("the block must not run")
        assert error.value.exit_code == 8
        put(tmp_path / "other", "beside")  # another target is no conflict
    assert (tmp_path / "out/mark").read_text() == "first"
    assert listing(tmp_path) == {"out", "other"}


def test_a_writer_that_finishes_while_another_one_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second opens .partial, the first renames it into place, the second gets the lock: of the finished output."""
    flock = atomic.fcntl.flock

    def late(handle: int, operation: int) -> None:
        monkeypatch.setattr(atomic.fcntl, "flock", flock)
        (tmp_path / ".out.partial/mark").write_text("first")
        (tmp_path / ".out.partial").rename(tmp_path / "out")
        flock(handle, operation)

    monkeypatch.setattr(atomic.fcntl, "flock", late)
    with pytest.raises((LocalError, OutputExists)):
        put(tmp_path / "out", "second")
    assert (tmp_path / "out/mark").read_text() == "first"
    assert listing(tmp_path) == {"out"}


KEY, OTHER = "0" * 64, "1" * 64


def interrupted(
    target: Path,
    *,
    key: str = KEY,
    failure: type[BaseException] = KeyboardInterrupt,
    left: tuple[str, ...] = ("piece", ".begun"),
) -> str:
    """A run that makes pieces of the names ``left`` and is then interrupted; what it says."""

    def half(building: Building) -> None:
        work = building.work(key)
        (building.path / "bases").mkdir()
        (building.path / "bases/half").write_text("half")
        for name in left:
            (work / name).write_text(name)
        raise failure

    with pytest.raises(failure) as caught, resumable_directory(target, force=False, not_ours=not_ours) as building:
        half(building)
    assert isinstance(caught.value, Interrupted) == (failure is KeyboardInterrupt and "piece" in left)
    return str(caught.value)


def test_what_is_finished_outlives_an_interruption(tmp_path: Path) -> None:
    for _ in range(2):
        interrupted(tmp_path / "out")
        assert [path.name for path in (tmp_path / ".out.partial").iterdir() if path.name != ".lorazip"] == [
            f".work-{KEY}"
        ]
        assert listing(tmp_path) == {".out.partial"}
    with resumable_directory(tmp_path / "out", force=False, not_ours=not_ours) as building:
        assert (building.work(KEY) / "piece").read_text() == "piece"
        (building.path / "mark").write_text("new")
    assert listing(tmp_path) == {"out"}
    assert listing(tmp_path / "out") == {"mark"}


def test_an_interruption_says_where_it_is_kept(tmp_path: Path) -> None:
    told = interrupted(tmp_path / "out")
    assert f"what was finished is kept in {tmp_path}/.out.partial (the same command goes on" in told


def test_an_interruption_says_whose_work_is_kept(tmp_path: Path) -> None:
    """A run that was stopped before it knew its own key would clear what an earlier one left, and has not yet."""
    interrupted(tmp_path / "out", key=OTHER)
    with (
        pytest.raises(
            Interrupted, match=r"what an earlier run has finished is kept in .* \(the command of that run goes"
        ),
        resumable_directory(tmp_path / "out", force=False, not_ours=not_ours),
    ):
        raise KeyboardInterrupt
    assert (tmp_path / f".out.partial/.work-{OTHER}/piece").read_text() == "piece"


def test_work_of_another_key_is_removed(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", key=OTHER)
    with resumable_directory(tmp_path / "out", force=False, not_ours=not_ours) as building:
        assert not listing(building.work(KEY))
        assert listing(building.path) == {".lorazip", f".work-{KEY}"}
        (building.path / "mark").touch()


@pytest.mark.parametrize("failure", [RuntimeError, SystemExit, Killed])
def test_another_failure_removes_the_work(tmp_path: Path, failure: type[BaseException]) -> None:
    interrupted(tmp_path / "out")
    interrupted(tmp_path / "out", failure=failure)
    assert listing(tmp_path) == set()


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_what_is_in_the_place_of_the_folder_is_refused(tmp_path: Path, kind: str) -> None:
    partial, elsewhere = tmp_path / ".out.partial", tmp_path / "elsewhere"
    if kind == "file":
        partial.write_text("mine")
    else:
        partial.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.mkdir()
    before = listing(tmp_path)
    with pytest.raises(OutputExists, match=r"\.out\.partial exists and was not written by lorazip"):
        put(tmp_path / "out", "new")
    assert listing(tmp_path) == before


def test_unfinished_work_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", left=(".begun",))
    assert listing(tmp_path) == set()


def test_a_directory_without_work_clears_it(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    put(tmp_path / "out", "new")
    assert listing(tmp_path) == {"out"}
    assert listing(tmp_path / "out") == {"mark"}


def test_two_runs_do_not_go_on_from_one_work(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    with resumable_directory(tmp_path / "out", force=False, not_ours=not_ours) as building:
        with pytest.raises(LocalError, match="another lorazip is writing it"):
            interrupted(tmp_path / "out", key=OTHER)
        assert listing(building.work(KEY)) == {"piece", ".begun"}
        (building.path / "mark").touch()


def test_all_is_fsynced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that will be there, files and directories, before it gets its name; pieces of work need not be."""
    synced = set()

    def fsync(path: Path) -> None:
        synced.add(path)
        assert not (tmp_path / "out").exists() or path == tmp_path

    for module in (filesystem, atomic):
        monkeypatch.setattr(module, "fsync", fsync)
    with resumable_directory(tmp_path / "out", force=False, not_ours=not_ours) as building:
        (building.work(KEY) / "piece").touch()
        (building.path / "sub").mkdir()
        for name in ("mark", "sub/a", "sub/b"):
            (building.path / name).touch()
    partial = tmp_path / ".out.partial"
    assert synced >= {tmp_path, partial, partial / "sub", partial / "mark", partial / "sub/a", partial / "sub/b"}
    assert not any(".work" in str(path) for path in synced)


def test_a_link_as_target_is_followed(tmp_path: Path) -> None:
    put(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    put(tmp_path / "link", "new", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/mark").read_text() == "new"


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_permissions_are_those_of_the_umask(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        with build(tmp_path / "out") as folder:
            filesystem.write_file(folder / "sub/file", b"x")
            (folder / "mark").touch(mode=0o600)
            chmod_to_umask(folder / "mark")
        assert os.umask(mask) == mask  # it only looks
    for name in ("mark", "sub/file"):
        assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == 0o666 & ~mask
    for name in ("", "sub"):
        assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == 0o777 & ~mask


@pytest.mark.parametrize(
    "names",
    [
        ["a", "A"],
        ["a/b", "a_b", "a-b", "a b", "a\\b", "a:b"],
        ["é", "e\u0301", "e", "É"],  # composed, decomposed, plain, upper
        ["ß", "ss", "SS"],
        ["ﬁ", "fi"],
        ["", ".", "..", "...", "/", "-"],
        ["模型", "型模"],
        ["x" * 200, "x" * 201, "x" * 80],
        ["con", "CON", "nul", "aux.txt"],
    ],
)
def test_safe_names_of_different_names_differ_on_every_file_system(names: list[str]) -> None:
    safe = [safe_name(name) for name in names]
    assert len({name.casefold() for name in safe}) == len(names)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.one_of(st.text(max_size=30), st.text("_-. aZ/é", max_size=6)))
def test_safe_names_are_portable_and_allowed_in_a_manifest(name: str) -> None:
    (pattern,) = (meta.pattern for meta in InnerPath.__metadata__)
    assert re.search(pattern, f"configs/{safe_name(name)}.json")
    assert len(safe_name(name)) <= 100
    assert safe_name(name) == safe_name(name)


def test_safe_names_can_be_read() -> None:
    assert safe_name("fv_Ag News").startswith("fv_ag-news-")
    assert safe_name("owner/répo").startswith("owner-repo-")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(json_values)
def test_canonical_json_round_trips_to_the_same_bytes(value: object) -> None:
    try:
        data = canonical_json(value)
    except UnicodeEncodeError:  # a lone surrogate
        assume(False)
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data


def test_canonical_json_has_one_form() -> None:
    assert canonical_json({"b": 1, "a": [1.5, "é", None]}) == '{"a":[1.5,"é",null],"b":1}\n'.encode()
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical_json(number)


def test_digests_and_trees(tmp_path: Path) -> None:
    (tmp_path / "b/empty").mkdir(parents=True)
    (tmp_path / "b/file").write_bytes(b"abc")
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "link").symlink_to("b")
    assert list(tree(tmp_path)) == ["a", "link", "b/file", "b/empty/"]
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_bytes(b"abc") == sha256_file(tmp_path / "b/file") == abc
