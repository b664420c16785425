"""Work that is asked to stop does so between its steps, leaves nothing half-written, and tells how far it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import ModuleType

import pytest
import torch
from testing import random_adapters as ra
from testing.recorder import Recorder

import lorazip_cli.interrupt
import lorazip_core.adapter.reader
import lorazip_core.base.digests
import lorazip_core.base.threads
import lorazip_core.clustering.similarity
import lorazip_core.compress.individual
import lorazip_core.export.exporter
import lorazip_core.maths.chunks
import lorazip_core.maths.cp
import lorazip_core.maths.part
import lorazip_core.maths.tucker
import lorazip_core.reading.contents
import lorazip_core.verify.measure
from lorazip_cli.interrupt import interruptible
from lorazip_cli.main import main
from lorazip_cli.progress import Bars, Lines, progress
from lorazip_core.base.progress import Advance, part_of
from lorazip_core.base.stopping import check_stop, clear_stop, request_stop, stop_requested, stop_unmasked
from lorazip_core.base.threads import in_order
from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cleared() -> Iterator[None]:
    yield
    clear_stop()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ra.write_collection(tmp_path_factory.mktemp("adapters"), ra.MIXED)


@pytest.fixture(scope="module")
def bundle(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "bundle"
    compress(adapters, out, CompressOptions(rank=4))
    return out


def test_a_request_holds_until_it_is_cleared() -> None:
    check_stop()
    request_stop()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            check_stop()
    clear_stop()
    check_stop()


def test_an_interruption_that_became_another_failure_is_one_all_the_same() -> None:
    with pytest.raises(ValueError, match="shape"), stop_unmasked():
        raise ValueError("shape")
    request_stop()
    with pytest.raises(KeyboardInterrupt), stop_unmasked():
        raise ValueError("shape")


def test_work_that_nobody_waits_for_any_more_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a request, too: whoever catches KeyboardInterrupt in a notebook goes on."""
    monkeypatch.setattr(lorazip_core.base.threads, "cores", lambda: 2)  # so that both are at work, also on one core
    started = Event()

    def work(number: int) -> int:
        if number == 0:
            started.wait()
            return number
        started.set()
        while True:
            check_stop()

    with pytest.raises(RuntimeError, match="enough"):
        consume(in_order(work, range(2), CPU, workers=2))
    assert not stop_requested()


def consume(results: Iterator[int]) -> None:
    for _ in results:
        results.close()  # type: ignore[attr-defined]
        raise RuntimeError("enough")


def at_check(number: int) -> Callable[[], None]:
    """`check_stop`, at whose call of that ``number`` a stop is requested."""
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            request_stop()
        check_stop()

    return check


WORK: dict[str, tuple[ModuleType, list[str]]] = {
    "search for bases": (lorazip_core.maths.tucker, ["--rank", "4"]),
    "sums over adapters": (lorazip_core.maths.chunks, ["--rank", "4"]),
    "cores of adapters": (lorazip_core.maths.part, ["--rank", "4"]),
    "alternating least squares": (lorazip_core.maths.cp, ["--method", "diag", "--rank", "4"]),
    "truncated SVDs": (lorazip_core.compress.individual, ["--method", "svd"]),
    "similarities": (lorazip_core.clustering.similarity, ["--rank", "4", "--clusters", "2"]),
    "weights": (lorazip_core.reading.contents, []),
    "packs": (lorazip_core.base.threads, ["--rank", "4"]),
}


@pytest.mark.parametrize("what", WORK)
def test_compress_stops_within_it(
    what: str, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, options = WORK[what]
    if what in ("sums over adapters", "cores of adapters"):
        # Piece by piece, as those of many adapters.
        monkeypatch.setattr(lorazip_core.maths.chunks, "_MOST_IN_CHUNK", 1)
        monkeypatch.setitem(lorazip_core.maths.chunks.ELEMENTS_AT_ONCE, "cpu", 1)
    monkeypatch.setattr(module, "check_stop", at_check(2))
    command = ["compress", str(adapters), "-o", str(tmp_path / "out"), *options, "-q"]
    assert main(command) == 130
    assert capsys.readouterr().err.startswith("lorazip: error: interrupted; ")
    assert set(os.listdir(tmp_path)) <= {".out.partial"}
    monkeypatch.undo()
    assert main(command) == 0
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("module", "verb"),
    [
        (lorazip_core.base.digests, "verify"),
        (lorazip_core.verify.measure, "against"),
        (lorazip_core.export.exporter, "export"),
        (lorazip_core.base.threads, "cluster"),
        (lorazip_core.maths.tucker, "cluster"),
    ],
)
def test_others_stop(
    module: ModuleType,
    verb: str,
    adapters: Path,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = {
        "verify": ["verify", str(bundle)],
        "against": ["verify", str(bundle), "--against", str(adapters)],
        "export": ["export", str(bundle), "-o", str(tmp_path / "out")],
        "cluster": ["cluster", str(adapters), "-o", str(tmp_path / "clusters.json"), "--clusters", "2", "--rank", "4"],
    }
    monkeypatch.setattr(module, "check_stop", at_check(2))
    assert main([*commands[verb], "-q"]) == 130
    assert capsys.readouterr() == ("", "lorazip: error: interrupted; nothing was left half-written\n")
    assert os.listdir(tmp_path) == []
    assert not stop_requested()  # the next call in this process is not that command


class Calls(Recorder):
    """Writes down every call of ``advance``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[int]] = {}

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Advance]:
        with super().stage(label, total) as advance:

            def count(steps: int) -> None:
                self.calls.setdefault(label, []).append(steps)
                advance(steps)

            yield count


@pytest.mark.parametrize("method", ["joint", "diag"])
def test_progress_moves_within_a_pack(method: str, tmp_path: Path) -> None:
    """One module: there is a single pack."""
    root = ra.write_collection(tmp_path / "in", ra.plain(5, modules=(ra.Q,)))
    told = Calls()
    compress(root, tmp_path / "out", CompressOptions(method=method, rank=3), progress=told)  # type: ignore[arg-type]
    total, done = told.stages["fitting bases"]
    assert done == total
    assert len(told.calls["fitting bases"]) > 10
    assert max(told.calls["fitting bases"]) < total / 2


def test_parts_add_up_whatever_they_are_told() -> None:
    told: list[float] = []
    with part_of(told.append, 3.0) as outer:
        with part_of(outer, 0.5) as early:
            early(0.25)
        with part_of(outer, 0.5) as more:
            for _ in range(5):
                more(0.4)
    assert sum(told) == pytest.approx(3)
    assert min(told) >= 0


class TestSignals:
    def test_the_first_is_announced_and_the_second_ends_the_process(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Left(BaseException):
            pass

        def leave(code: int) -> None:
            assert code == 130
            raise Left

        monkeypatch.setattr(lorazip_cli.interrupt.os, "_exit", leave)
        with interruptible():
            progress(quiet=False)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
            assert capsys.readouterr().err == "stopping ... (a second signal ends it at once)\n"
            for number in (signal.SIGTERM, signal.SIGINT):
                with pytest.raises(Left):
                    signal.raise_signal(number)
            assert capsys.readouterr().err == ""
        assert not stop_requested()

    def test_a_bar_says_it_too(self, capsys: pytest.CaptureFixture[str]) -> None:
        for shown in (Bars(), Lines()):
            with shown.stage("work", 2):
                shown.stopping()
            assert "stopping ..." in capsys.readouterr().err

    def test_what_a_destructor_loses_is_not_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        class Losing:
            def __del__(self) -> None:
                signal.raise_signal(signal.SIGINT)

        with interruptible():
            Losing()
            assert stop_requested()
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_while_the_command_is_imported_there_is_one_line(self, number: signal.Signals) -> None:
        program = f"""
import signal, sys
class Interrupting:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "typer":
            signal.raise_signal({int(number)})
sys.meta_path.insert(0, Interrupting)
sys.argv = ["lorazip", "--help"]
from lorazip_cli.__main__ import run
run()
"""
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout) == (130, "")
        assert ended.stderr == "lorazip: error: interrupted; nothing was left half-written\n"
