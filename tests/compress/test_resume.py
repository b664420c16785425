"""An interrupted compress: what it leaves, who goes on from it, and that nobody can tell from the bundle."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import pytest
import torch
from msgspec.structs import replace
from testing import random_adapters as ra
from testing.forked import forked
from testing.recorder import Recorder

import lorazip_core.compress.alone
import lorazip_core.compress.run
import lorazip_core.compress.shared
from lorazip_cli.main import main
from lorazip_core.base.errors import AdapterErrors, Interrupted, OutputExists
from lorazip_core.base.progress import Advance
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.export.exporter import export
from lorazip_core.planning.options import CompressOptions
from lorazip_core.reading.packs import Budget
from lorazip_core.schemes.scheme import Objective
from lorazip_core.verify.run import verify

# Two generations of bases, adapters that are kept individually, and clusters that are found.
OPTIONS = CompressOptions(rank=4, clusters=2, max_error=0.02)
SVD = CompressOptions(method="svd", rank=2)
PARTIAL = ".out.partial"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pieces(folder: Path) -> list[Path]:
    """What an interrupted run has left beside the output ``out`` in ``folder``."""
    return sorted((folder / PARTIAL).glob(".work-*/*"))


class Interrupt(Recorder):
    """Interrupts the making of ``out`` when stage ``label`` has advanced ``after`` times; packs count when stored."""

    def __init__(
        self, out: Path, label: str, after: int, failure: Callable[[], BaseException] = KeyboardInterrupt
    ) -> None:
        super().__init__()
        self._label, self._after, self._failure = label, after, failure
        self._out, self._advanced = out, 0

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Advance]:
        with super().stage(label, total) as advance:

            def count(steps: int) -> None:
                advance(steps)
                self._advanced += label == self._label
                if label == self._label and self._done() >= self._after:
                    raise self._failure()

            yield count

    def _done(self) -> int:
        packs = {"fitting bases": "pack-0-*", "fitting bases again": "pack-1-*"}
        if self._label in packs:
            return len(list(self._out.with_name(f".{self._out.name}.partial").glob(f".work-*/{packs[self._label]}")))
        return self._advanced


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ra.write_collection(tmp_path_factory.mktemp("adapters"), ra.MIXED)


@pytest.fixture(scope="module")
def whole(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bundle of a run that nobody interrupts."""
    progress, out = Recorder(), tmp_path_factory.mktemp("whole") / "out"
    report = compress(adapters, out, OPTIONS, progress=progress)
    assert {"fitting bases", "fitting bases again", "keeping adapters individually"} <= progress.stages.keys()
    assert 2 <= len(report.individual) <= 5
    return contents(out)


def interrupt(adapters: Path, out: Path, label: str, after: int, options: CompressOptions = OPTIONS) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(adapters, out, options, progress=Interrupt(out, label, after))


def go_on(adapters: Path, out: Path, options: CompressOptions = OPTIONS) -> str | None:
    """Compress once more; what was said of an earlier run."""
    progress = Recorder()
    compress(adapters, out, options, progress=progress)
    assert os.listdir(out.parent) == ["out"]
    return next((note for note in progress.notes if "interrupted" in note), None)


@pytest.fixture(autouse=True)
def one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs are solved by this thread, so that it is known how many are finished when it is interrupted."""

    def in_order(
        function: Callable[[object], object], items: Iterable[object], device: torch.device, *, workers: int = 1
    ) -> Generator[object, None, None]:
        yield from map(function, items)

    monkeypatch.setattr(lorazip_core.compress.shared, "in_order", in_order)


@pytest.mark.parametrize(
    ("label", "after", "left"),
    [
        ("fitting bases", 1, "2 of 6"),  # the clusters and one pack
        ("fitting bases", 3, "4 of 6"),
        ("fitting bases again", 2, "6 of 6"),
        ("keeping adapters individually", 1, "6 of 6"),
    ],
)
def test_the_next_run_goes_on_to_the_same_bytes(
    adapters: Path, whole: dict[str, bytes], tmp_path: Path, label: str, after: int, left: str
) -> None:
    interrupt(adapters, tmp_path / "out", label, after)
    assert os.listdir(tmp_path) == [PARTIAL]
    kept = pieces(tmp_path)
    interrupt(adapters, tmp_path / "out", "reading adapters", 2)  # while it looks whether it can go on
    assert pieces(tmp_path) == kept
    assert go_on(adapters, tmp_path / "out") == f"going on from {left} pieces of an interrupted run"
    assert contents(tmp_path / "out") == whole


def test_what_is_there_is_not_made_again(
    adapters: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(adapters, tmp_path / "out", "keeping adapters individually", 3)
    kept = pieces(tmp_path)

    def never(*arguments: object) -> None:
        pytest.fail("it was there")

    monkeypatch.setattr(lorazip_core.compress.shared, "encode_pack", never)
    monkeypatch.setattr(lorazip_core.compress.run, "_assigned", never)
    monkeypatch.setattr(lorazip_core.compress.alone, "keep_individually", never)
    interrupt(adapters, tmp_path / "out", "keeping adapters individually", 2)
    assert pieces(tmp_path) == kept
    go_on(adapters, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_adapters_that_are_packed_go_on_too(adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one piece, and files are packed before all of them are there."""
    monkeypatch.setattr("lorazip_core.compress.packed.PACKED_ADAPTERS", 2)
    coded = CompressOptions(method="coded", max_error=0.2)
    compress(adapters, tmp_path / "whole", coded)
    (tmp_path / "here").mkdir()
    interrupt(adapters, tmp_path / "here/out", "keeping adapters individually", 3, coded)
    kinds = {piece.name.split("-")[0] for piece in pieces(tmp_path / "here")}
    assert {"individual"} <= kinds <= {"individual", "packed"}
    assert "going on from" in (go_on(adapters, tmp_path / "here/out", coded) or "")
    assert contents(tmp_path / "here/out") == contents(tmp_path / "whole")


def test_svd_goes_on_too(adapters: Path, tmp_path: Path) -> None:
    compress(adapters, tmp_path / "whole", SVD)
    (tmp_path / "here").mkdir()
    interrupt(adapters, tmp_path / "here/out", "keeping adapters individually", 3, SVD)
    told = go_on(adapters, tmp_path / "here/out", SVD)
    assert told is not None
    assert re.fullmatch("going on from [3-7] of 7 pieces of an interrupted run", told)  # those under way are finished
    assert contents(tmp_path / "here/out") == contents(tmp_path / "whole")
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "here/out").rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("needle", "step", "left"),
    [
        ("/.labels", 1, None),  # nothing was finished
        ("/.pack-0-2", 2, "3 of 6"),  # as it is renamed
        ("/.pack-1-1", 2, "6 of 6"),
        ("/.individual-", 3, "6 of 6"),
        ("/cores/", 2, "6 of 6"),
        ("/manifest.json", 1, "6 of 6"),
    ],
)
def test_killed_anywhere_the_next_run_goes_on(
    needle: str, step: int, left: str | None, adapters: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Killed while a piece is written or renamed, while the bundle is put together, and as it is complete."""
    out = tmp_path / "out"

    def counts(event: str, args: str) -> bool:
        return event in {"open", "os.rename"} and str(tmp_path) in args and needle in args.split(",")[0]

    assert forked(lambda: compress(adapters, out, OPTIONS, force=True), dies_at=step, of=counts) == -signal.SIGKILL
    assert os.listdir(tmp_path) == [PARTIAL]
    told = go_on(adapters, out)
    assert told == (left and f"going on from {left} pieces of an interrupted run")
    assert contents(out) == whole


def spoil(piece: Path, how: str) -> None:
    data = bytearray(piece.read_bytes())
    if how == "cut":
        del data[-1:]
    elif how == "empty":
        data.clear()
    elif how == "zeros":
        data[:] = bytes(len(data))
    elif how == "flipped":
        data[-1] ^= 1
    elif how == "of another":
        data[:] = b"whole, but not what its name says"
    piece.write_bytes(data)


@pytest.mark.parametrize(
    "how", ["cut", "flipped", *(pytest.param(how, marks=pytest.mark.slow) for how in ("empty", "zeros", "of another"))]
)
def test_a_damaged_piece_is_made_again(adapters: Path, whole: dict[str, bytes], tmp_path: Path, how: str) -> None:
    interrupt(adapters, tmp_path / "out", "keeping adapters individually", 2)
    damaged = {name: next(path for path in pieces(tmp_path) if path.name.startswith(name)) for name in FIRST}
    for piece in damaged.values():
        spoil(piece, how)
    (damaged["labels"].parent / ".pack-0-0").write_bytes(b"begun")
    shutil.copy(damaged["kept-"], damaged["kept-"].with_name(f"pack-0-1.{'0' * 64}"))  # a second one of its name
    told = go_on(adapters, tmp_path / "out")
    assert told is not None
    assert contents(tmp_path / "out") == whole


FIRST = ("labels", "pack-0-0", "pack-1-", "individual-", "kept-")


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(replace(OPTIONS, rank=3), marks=pytest.mark.slow),
        replace(OPTIONS, seed=1),
        pytest.param(replace(OPTIONS, dtype="f32"), marks=pytest.mark.slow),
        pytest.param(replace(OPTIONS, weights="module"), marks=pytest.mark.slow),
        replace(OPTIONS, max_error=0.5),
        replace(OPTIONS, clusters=1),
        replace(OPTIONS, method="diag"),
        SVD,
    ],
)
def test_other_options_start_over(adapters: Path, tmp_path: Path, other: CompressOptions) -> None:
    compress(adapters, tmp_path / "whole", other)
    (tmp_path / "here").mkdir()
    interrupt(adapters, tmp_path / "here/out", "keeping adapters individually", 1)
    assert go_on(adapters, tmp_path / "here/out", other) is None
    assert contents(tmp_path / "here/out") == contents(tmp_path / "whole")


def test_another_objective_starts_over(adapters: Path, tmp_path: Path) -> None:
    disk, resident = (CompressOptions(max_error=0.2, objective=objective) for objective in get_args(Objective))
    compress(adapters, tmp_path / "whole", resident)
    (tmp_path / "here").mkdir()
    interrupt(adapters, tmp_path / "here/out", "keeping adapters individually", 3, disk)
    assert go_on(adapters, tmp_path / "here/out", resident) is None
    assert contents(tmp_path / "here/out") == contents(tmp_path / "whole")


def test_other_adapters_start_over(adapters: Path, tmp_path: Path) -> None:
    """One that was trained further, and one that is new."""
    root = tmp_path / "in"
    shutil.copytree(adapters, root)
    for number, change in enumerate([ra.Recipe("e", 5, (ra.V, ra.DOWN)), ra.Recipe("new")]):
        here = tmp_path / str(number)
        here.mkdir()
        interrupt(root, here / "out", "fitting bases", 3)
        shutil.rmtree(root / change.name, ignore_errors=True)
        ra.write_collection(root, (change,), seed=5)
        assert go_on(root, here / "out") is None
        compress(root, tmp_path / f"whole-{number}", OPTIONS)
        assert contents(here / "out") == contents(tmp_path / f"whole-{number}")


@pytest.mark.parametrize("label", ["reading adapters", "clustering, round 1"])
def test_where_nothing_was_finished_nothing_is_left(adapters: Path, tmp_path: Path, label: str) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        compress(adapters, tmp_path / "out", OPTIONS, progress=Interrupt(tmp_path / "out", label, 1))
    assert not isinstance(caught.value, Interrupted)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failure", [RuntimeError, OSError, SystemExit])
def test_any_other_failure_leaves_nothing(adapters: Path, tmp_path: Path, failure: type[BaseException]) -> None:
    interrupt(adapters, tmp_path / "out", "fitting bases", 2)
    with pytest.raises(failure):
        compress(adapters, tmp_path / "out", OPTIONS, progress=Interrupt(tmp_path / "out", "fitting bases", 3, failure))
    assert os.listdir(tmp_path) == []


def test_an_adapter_gone_bad_leaves_nothing(tmp_path: Path) -> None:
    root = ra.write_collection(tmp_path / "in", ra.MIXED)
    (tmp_path / "here").mkdir()
    interrupt(root, tmp_path / "here/out", "fitting bases", 2)
    os.truncate(root / "e/adapter_model.safetensors", 100)
    with pytest.raises(AdapterErrors):
        compress(root, tmp_path / "here/out", OPTIONS)
    assert pieces(tmp_path / "here")  # it was noticed before anything was touched
    compress(root, tmp_path / "here/out", OPTIONS, skip_bad=True)
    assert os.listdir(tmp_path / "here") == ["out"]


def test_over_an_old_bundle(adapters: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(adapters, out, SVD)
    old = contents(out)
    with pytest.raises(Interrupted, match=r"kept in .*/\.out\.partial"):
        compress(adapters, out, OPTIONS, force=True, progress=Interrupt(out, "fitting bases", 2))
    assert contents(out) == old
    with pytest.raises(OutputExists):
        compress(adapters, out, OPTIONS)
    assert pieces(tmp_path)
    compress(adapters, out, OPTIONS, force=True)
    assert contents(out) == whole
    assert os.listdir(tmp_path) == ["out"]


def test_another_verb_takes_the_place(adapters: Path, tmp_path: Path) -> None:
    compress(adapters, tmp_path / "bundle", SVD)
    (tmp_path / "here").mkdir()
    interrupt(adapters, tmp_path / "here/out", "fitting bases", 2)
    export(tmp_path / "bundle", tmp_path / "here/out")
    assert os.listdir(tmp_path / "here") == ["out"]
    assert not list((tmp_path / "here/out").glob(".*"))


def test_several_shards_from_several_packs(adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the work is cut, everything has its place in the bundle and its claims are true; it loses the same, but
    for what the search for bases leaves undone."""
    options = CompressOptions(rank=4, clusters=2, dtype="f32")
    compress(adapters, tmp_path / "whole", options)
    packs = lorazip_core.compress.shared.cut_into_packs
    monkeypatch.setattr(
        lorazip_core.compress.shared, "cut_into_packs", lambda sizes, shapes, budget: packs(sizes, shapes, Budget(1, 1))
    )
    compress(adapters, tmp_path / "cut", options)
    assert contents(tmp_path / "cut").keys() == contents(tmp_path / "whole").keys()
    before, after = (Bundle(tmp_path / name).manifest for name in ("whole", "cut"))
    assert [shard.adapters for cluster in after.clusters for shard in cluster.shards] == [
        shard.adapters for cluster in before.clusters for shard in cluster.shards
    ]
    assert [(entry.name, entry.cluster, entry.files) for entry in after.adapters] == [
        (entry.name, entry.cluster, entry.files) for entry in before.adapters
    ]
    assert verify(tmp_path / "cut", against=adapters).ok
    # A search ends when a round gains less than 1e-7 of the energy; a basis in a wrong place costs more than 0.1 of it.
    errors = [entry.squared_error for entry in before.adapters]
    assert [entry.squared_error for entry in after.adapters] == pytest.approx(errors, rel=0, abs=1e-4)


class TestTheCommand:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("masked", [False, True])
    def test_says_what_is_kept(
        self,
        adapters: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        number: signal.Signals,
        masked: bool,
    ) -> None:
        """Also where a library makes another failure of it."""
        encode_pack, done = lorazip_core.compress.shared.encode_pack, 0

        def third(*arguments: object) -> object:
            nonlocal done
            done += 1
            if done == 3:
                try:
                    signal.raise_signal(number)
                except KeyboardInterrupt:
                    if masked:
                        raise ValueError("could not determine the shape") from None
                    raise
            return encode_pack(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(lorazip_core.compress.shared, "encode_pack", third)
        command = ["compress", str(adapters), "-o", str(tmp_path / "out"), "--rank", "4", "-q"]
        assert main(command) == 130
        assert capsys.readouterr().err == (
            f"lorazip: error: interrupted; what was finished is kept in {tmp_path / PARTIAL}"
            " (the same command goes on from there; remove that folder if you do not want it)\n"
        )
        assert len(pieces(tmp_path)) == 2
        assert main(command) == 0
        assert Bundle(tmp_path / "out").manifest.adapters

    def test_says_that_nothing_is_kept(
        self, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def first(*arguments: object) -> None:
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(lorazip_core.compress.shared, "encode_pack", first)
        assert main(["compress", str(adapters), "-o", str(tmp_path / "out"), "--method", "joint", "-q"]) == 130
        assert capsys.readouterr().err == "lorazip: error: interrupted; nothing was left half-written\n"
        assert os.listdir(tmp_path) == []


def test_weights_that_change_after_the_scan_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place and of one size, so that no read fails."""
    root = ra.write_collection(tmp_path / "in", ra.MIXED)
    weights = root / "e/adapter_model.safetensors"
    encode_pack, done = lorazip_core.compress.shared.encode_pack, 0

    def third(*arguments: object) -> object:
        nonlocal done
        done += 1
        if done == 3:
            data = weights.read_bytes()
            weights.write_bytes(data[:-2] + b"\x01\x02")
        return encode_pack(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(lorazip_core.compress.shared, "encode_pack", third)
    (tmp_path / "here").mkdir()
    with pytest.raises(AdapterErrors, match="'e': its weights changed while they were being read"):
        compress(root, tmp_path / "here/out", OPTIONS)
    assert os.listdir(tmp_path / "here") == []
