"""What a person sees while adapters are fetched: a bar on a terminal, lines in a log."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from testing.fetching import repository
from testing.hub import Drip, HubServer

from lorazip_cli.progress import Bars, Lines, progress


def test_a_log_gets_lines_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with Lines(clock=lambda: now).transfer("fetching", 300, 2_000_000_000) as transfer:
        for number in range(200):
            now += 0.5
            transfer.received(10_000_000)
            if number % 2:
                transfer.finished(3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fetching: 300 adapters, 2,000.0 MB ..."
    assert lines[1] == "fetching: 27 of 300 adapters, 200.0 MB of 2,000.0 MB, 20.0 MB/s, about 1 min 30 s left"
    assert len(lines) == 12
    assert lines[-1] == "fetching: 300 of 300 adapters, 2,000.0 MB of 2,000.0 MB in 1 min 40 s"


def test_the_rate_is_that_of_the_time_since_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with Lines(clock=lambda: now).transfer("fetching", 1, 1_000_000_000) as transfer:
        now = 10.0
        transfer.received(500_000_000)
        now = 110.0
        transfer.received(100_000_000)
        now = 170.0
        transfer.received(-100_000_000)  # an attempt that failed
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].endswith("50.0 MB/s, about 10 s left")
    assert lines[2].endswith("1.0 MB/s, about 6 min 40 s left")
    assert lines[3] == "fetching: 0 of 1 adapter, 500.0 MB of 1,000.0 MB, 0 bytes/s"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=True).transfer("fetching", 2, 10) as transfer:
        transfer.received(10)
        transfer.finished(2)
    assert capsys.readouterr() == ("", "")


def test_a_bar_counts_from_many_threads() -> None:
    bars = Bars()
    with bars.transfer("fetching", 40, 40_000) as transfer:

        def work() -> None:
            for _ in range(10):
                transfer.received(1000)
                transfer.finished()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bars._live is not None
        (task,) = bars._live.tasks
        assert (task.completed, task.fields["done"]) == (40_000, 40)


@pytest.mark.parametrize("plain", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_terminal_gets_a_bar_unless_it_is_told_not_to(hub: HubServer, tmp_path: Path, plain: bool) -> None:
    hub.catalogue.add(*(repository(f"ann/x{number}", number) for number in range(3)))
    hub.faults.add(Drip(200, 0.05), origin="cdn", method="GET")
    controller, terminal = pty.openpty()
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "TERM": "xterm"}
    environment["HF_HUB_OFFLINE"] = "0"
    environment.pop("NO_COLOR", None)
    child = subprocess.Popen(
        [sys.executable, "-m", "lorazip_cli", "fetch", "org:ann", "-o", str(tmp_path / "adapters")],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=environment | ({"NO_COLOR": "1"} if plain else {}),
    )
    os.close(terminal)
    seen = b""
    try:
        while chunk := os.read(controller, 4096):
            seen += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(controller)
    assert child.stdout is not None
    assert child.stdout.read() == b""
    child.stdout.close()
    assert child.wait() == 0
    assert (b"\x1b[" in seen) is not plain
    assert (b"fetching 0/3" in seen) is not plain
    assert b"3 new" in seen
