"""Fixtures of more than one module."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants
from testing.fetching import Fetching
from testing.hub import HubServer

import lorazip_core.fetch.options
from lorazip_core.fetch.options import FetchOptions, RetryPolicy

# As the Makefile has it: on small matrices, threads wait for each other more than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def signals_as_in_a_terminal() -> None:
    """SIGINT and SIGTERM do what they do by default, here and in all that tests start.

    `nohup`, shells for what runs behind them and some CI runners have their children ignore them, who pass it on.
    """
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


TOKENS = {"hf_secretofann": "ann", "hf_secretofbob": "bob"}


@pytest.fixture
def hub_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """huggingface_hub as in a new process of nobody: it reads most of its settings when it is imported."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield
    close_session()


@pytest.fixture
def hub(hub_client: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub that HF_ENDPOINT names, and a `fetch` that does not wait long between attempts."""
    retries = RetryPolicy(attempts=3, first_wait=0.01, seconds=600)
    monkeypatch.setattr(lorazip_core.fetch.options, "FetchOptions", partial(FetchOptions, retries=retries))
    with HubServer(tokens=TOKENS, page_size=3) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def fetch(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fetching:
    """The command against that Hub."""
    return Fetching(hub, tmp_path / "adapters", capsys)
