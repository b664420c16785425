"""What `fetch` says when something is wrong, word for word, and its exit code; and what is there afterwards."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import constants
from testing.fetching import BASE, Fetching, adapter_files, repository
from testing.hub import (
    SIGNATURE,
    Answer,
    Call,
    Collection,
    Cut,
    Drip,
    Flip,
    Item,
    Repository,
    Resize,
    Silence,
    Status,
    too_many_requests,
)
from testing.random_adapters import plain, write_collection

import lorazip_core.fetch.options
from lorazip_core.adapter.lock import LOCK_NAME
from lorazip_core.fetch import download, workspace
from lorazip_core.fetch import hub as hub_module
from lorazip_core.fetch.http_client import HttpClient
from lorazip_core.fetch.hub import Hub
from lorazip_core.fetch.options import FetchOptions, RetryPolicy

LOG_IN = "set HF_TOKEN or run 'hf auth login'"
KEPT = "what has arrived is kept: run again later"
GRAMMAR = "none of owner/repo[/subfolder][@revision], collection:owner/slug, org:NAME, user:NAME, @list.txt, ./dir"
UNFINISHED = f"1 failure: {LOCK_NAME} was not written; what has arrived stays (run again to go on"
OTHER_ADDRESS = "an address is a source only on https://huggingface.co, and without a password (write owner/repo)"
ADAPTER = {f"adapter/{name}": data for name, data in adapter_files().items()}


@pytest.fixture
def good(fetch: Fetching) -> Fetching:
    """A Hub with one good adapter, ann/a."""
    fetch.hub.catalogue.add(repository("ann/a"))
    return fetch


def log_in_page(answer: Answer, request: object, chance: object) -> Answer:
    """A page in place of an answer, as a hotel's network gives it."""
    return Answer(200, {"Content-Type": "text/html"}, b"<html>log in</html>")


def impatient(monkeypatch: pytest.MonkeyPatch, retries: RetryPolicy) -> list[float]:
    """A `fetch` that retries without waiting; the seconds that it would have waited, as they come."""
    waits: list[float] = []
    monkeypatch.setattr(hub_module, "sleep_using_event", lambda stopped: waits.append)
    monkeypatch.setattr(lorazip_core.fetch.options, "FetchOptions", partial(FetchOptions, retries=retries))
    return waits


def check(fetch: Fetching, code: int, *lines: str, arrived: bool = True) -> None:
    """It failed with just these lines; ann/a, if it was asked for, is there all the same, without a lock."""
    assert (fetch.code, fetch.errors) == (code, list(lines))
    assert (fetch.directory / "ann" / "a" / "adapter_config.json").exists() == arrived
    assert not (fetch.directory / LOCK_NAME).exists()
    assert "Traceback" not in fetch.err


class TestRefusals:
    def test_missing(self, good: Fetching) -> None:
        good("ann/a", "ann/none")
        check(good, 7, f"ann/none: not found, or private (check the name; if it is private, {LOG_IN})")
        assert good.err.splitlines()[-1] == f"{UNFINISHED}, or --skip-bad)"

    def test_missing_with_a_token(self, good: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secretofann")
        good("ann/a", "ann/none")
        check(good, 7, "ann/none: not found, or your token may not read it (check the name and the token)")

    def test_private(self, good: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        good.hub.catalogue.add(repository("ann/private", 1, private=True, readers=frozenset({"ann"})))
        good("ann/a", "ann/private")
        check(good, 7, f"ann/private: not found, or private (check the name; if it is private, {LOG_IN})")
        monkeypatch.setenv("HF_TOKEN", "hf_secretofbob")
        good("ann/a", "ann/private")
        check(good, 7, "ann/private: not found, or your token may not read it (check the name and the token)")
        monkeypatch.setenv("HF_TOKEN", "hf_secretofann")
        assert good("ann/a", "ann/private") == 0

    def test_gated(self, good: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        good.hub.catalogue.add(repository("ann/gated", 1, gated="manual", readers=frozenset({"ann"})))
        ask = f"ask for it at {good.hub.url}/ann/gated, then {LOG_IN}"
        good("ann/a", "ann/gated")
        check(good, 7, f"ann/gated: access is restricted ({ask})")
        monkeypatch.setenv("HF_TOKEN", "hf_secretofbob")
        good("ann/a", "ann/gated")
        check(good, 7, f"ann/gated: access is restricted ({ask})")
        monkeypatch.setenv("HF_TOKEN", "hf_secretofann")
        assert good("ann/a", "ann/gated") == 0

    def test_a_token_that_is_not_valid(self, good: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_outofdate")
        good("ann/a")
        check(good, 7, f"{good.hub.url} refuses your token (renew HF_TOKEN, or run 'hf auth login')", arrived=False)

    def test_a_revision_that_is_gone(self, good: Fetching) -> None:
        good("ann/a", "ann/a@v9")
        check(good, 7, "ann/a: it has no revision 'v9' (was it deleted or its history rewritten?)")

    def test_disabled(self, good: Fetching) -> None:
        good.hub.catalogue.add(repository("ann/off", 1, disabled=True))
        good("ann/a", "ann/off")
        check(good, 7, "ann/off: the Hub has disabled it")

    def test_a_collection_that_is_not_there(self, good: Fetching) -> None:
        good("ann/a", "collection:ann/none-1")
        check(good, 7, f"collection:ann/none-1: not found, or private (check the name; if it is private, {LOG_IN})")

    def test_an_author_without_models(self, good: Fetching) -> None:
        good("ann/a", "org:nobody")
        check(good, 7, "org:nobody: the Hub lists no model that matches (check the name and filters)")

    def test_another_refusal_says_what_the_hub_says_but_not_the_token(
        self, good: Fetching, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secretofann")
        good.hub.catalogue.add(repository("ann/teapot", 1))
        good.hub.faults.add(Status(418, "short and stout", echo_authorization=True), path="teapot")
        good("ann/a", "ann/teapot")
        check(good, 7, "ann/teapot: the Hub answers 418: short and stout (Authorization: Bearer ***)")

    def test_skip_bad_leaves_them_out(self, good: Fetching) -> None:
        good.hub.catalogue.add(repository("ann/gated", 1, gated="auto"))
        assert good("ann/a", "ann/none", "ann/gated", "--skip-bad") == 0
        assert good.names == ["ann/a"]
        left_out = {each.what: each.reason for source in good.lock.sources for each in source.left_out}
        assert left_out == {
            "ann/none": f"not found, or private (check the name; if it is private, {LOG_IN})",
            "ann/gated": f"access is restricted (ask for it at {good.hub.url}/ann/gated, then {LOG_IN})",
        }


class TestTrouble:
    def test_rate_limited_to_the_end(self, good: Fetching) -> None:
        good.hub.catalogue.add(repository("ann/busy", 1))
        good.hub.faults.add(too_many_requests(0), path="/api/models/ann/busy")
        good("ann/a", "ann/busy")
        hint = "what has arrived is kept: run again later, with fewer --jobs, or with HF_TOKEN set"
        check(good, 7, f"ann/busy: the Hub still answers 429 (too many requests) after 3 attempts ({hint})")

    @pytest.mark.parametrize("ratelimit", [False, True])
    def test_told_to_wait_everybody_waits(self, good: Fetching, ratelimit: bool) -> None:
        good.hub.catalogue.add(*(repository(f"ann/x{n}", n) for n in range(6)))
        good.hub.faults.add(too_many_requests(1, ratelimit=ratelimit), path="/api/models/ann/x0", times=1)
        assert good("org:ann") == 0
        requests = good.hub.log.requests
        refused = next(request for request in requests if request.status == 429)
        waited = [request.at - refused.at for request in requests if request.at > refused.at]
        early = [seconds for seconds in waited if seconds < 0.9]
        assert len(early) <= 16  # those that were on their way

    @pytest.mark.parametrize(
        ("value", "says"),
        [("7200", "2.0 hours"), ("9" * 30, "for ever"), ("Fri, 31 Dec 2199 23:59:59 GMT", "for ever")],
    )
    def test_told_to_wait_too_long_it_ends(self, good: Fetching, value: str, says: str) -> None:
        good.hub.faults.add(Status(429, "Too Many Requests", {"Retry-After": value}))
        good("ann/a")
        line = f"the Hub asks to wait {says} (too many requests) (HF_TOKEN raises the limit)"
        check(good, 7, line, arrived=False)

    @pytest.mark.parametrize("value", ["²", "soon", "-1", ""])
    def test_a_wait_that_is_no_number(self, good: Fetching, value: str) -> None:
        good.hub.faults.add(Status(429, "Too Many Requests", {"Retry-After": value}), path="/api/", times=1)
        assert good("ann/a") == 0

    def test_the_hub_is_down(self, good: Fetching) -> None:
        good.hub.faults.add(Status(503, "Service Unavailable"))
        good("ann/a", *(f"ann/{n}" for n in range(40)))
        check(good, 7, f"the Hub still answers 503 after 3 attempts ({KEPT})", arrived=False)

    def test_one_repository_fails_all_the_time(self, good: Fetching) -> None:
        good.hub.catalogue.add(repository("ann/ill", 1))
        good.hub.faults.add(Status(500), path="/api/models/ann/ill")
        good("ann/a", "ann/ill")
        check(good, 7, f"ann/ill: the Hub still answers 500 after 3 attempts ({KEPT})")
        assert good.err.splitlines()[-1] == f"{UNFINISHED})"  # --skip-bad would not help

    def test_the_hub_goes_down_on_the_way(self, good: Fetching) -> None:
        """One line for all, and those that had arrived stay."""
        good.hub.catalogue.add(*(repository(f"ann/x{n:02}", n) for n in range(30)))
        down = good.hub.faults.add(Status(503), origin="cdn", path="ann/x[12].*safetensors")
        good("org:ann", "--jobs", "2")
        assert good.code == 7
        assert len(good.errors) == 3
        assert good.errors[-1] == f"the Hub still answers 503 after 3 attempts ({KEPT})"
        assert "did not arrive" in good.err
        assert 11 <= len(list((good.directory / "ann").iterdir())) <= 13
        good.hub.faults.remove(down)
        assert good("org:ann") == 0
        assert len(good.names) == 31

    def test_failures_that_pass_are_not_told(self, good: Fetching) -> None:
        good.hub.faults.add(Status(500), path="/api/models/", times=2)
        good.hub.faults.add(Cut(20, reset=True), origin="cdn", method="GET", times=2)
        assert good("ann/a", "-q") == 0
        assert (good.out, good.err) == ("", "")

    def test_nobody_answers(self, good: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        good("ann/a", "ann/b")
        check(good, 7, f"no answer from {url} after 3 attempts: Connection refused ({KEPT})", arrived=False)

    @pytest.mark.parametrize("arguments", [[], ["-q"]])
    def test_what_is_tried_again_is_said_once_for_all(
        self, good: Fetching, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
    ) -> None:
        """Of forty requests that fail side by side, one line for each round, with the reason and the time."""
        waits = impatient(monkeypatch, RetryPolicy(attempts=4, first_wait=4.0))
        good.hub.faults.add(Status(503, "Service Unavailable"))
        assert good(*(f"ann/{n}" for n in range(40)), *arguments) == 7
        lines = [line for line in good.err.splitlines() if "trying again" in line]
        if arguments:
            assert lines == []
            return
        found = [re.fullmatch(r"the Hub answers 503; trying again in (\d+) s \((\d) of 3\)", line) for line in lines]
        assert [match and match[2] for match in found] == ["1", "2", "3"]
        assert {match and match[1] for match in found} <= {f"{seconds:.0f}" for seconds in waits}

    def test_why_nobody_answers_is_said(self, good: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        impatient(monkeypatch, RetryPolicy(attempts=3, first_wait=4.0))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        assert good("ann/a") == 7
        lines = [re.sub(r"in \d+ s", "in N s", line) for line in good.err.splitlines() if "trying" in line]
        why = "the Hub does not answer (Connection refused)"
        assert lines == [f"{why}; trying again in N s ({number} of 2)" for number in (1, 2)]

    def test_no_such_host(self, good: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://user:password@no-such-host.invalid")
        good("ann/a")
        (line,) = good.errors
        assert line.startswith("no answer from http://no-such-host.invalid after 3 attempts: ")
        assert good.code == 7

    def test_the_connection_is_lost_again_and_again(self, good: Fetching) -> None:
        good.hub.catalogue.add(repository("ann/cut", 1))
        good.hub.faults.add(Cut(20, reset=True), origin="cdn", path="ann/cut")
        good("ann/a", "ann/cut")
        where = f"ann/cut: adapter_model.safetensors: no answer from {good.hub.url} after 3 attempts"
        check(good, 7, f"{where}: Connection reset by peer ({KEPT})")

    def test_a_server_that_says_nothing_is_not_waited_for(
        self, good: Fetching, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
        good.hub.catalogue.add(repository("ann/mute", 1))
        good.hub.faults.add(Silence(30), path="/api/models/ann/mute")
        good("ann/a", "ann/mute")
        check(good, 7, f"ann/mute: no answer from {good.hub.url} after 3 attempts: timed out ({KEPT})")

    def test_a_slow_one_is(self, good: Fetching) -> None:
        good.hub.faults.add(Drip(100, 0.05), origin="cdn", method="GET")
        assert good("ann/a") == 0

    def test_corrupt_to_the_end(self, good: Fetching) -> None:
        good.hub.catalogue.add(repository("ann/flip", 1))
        good.hub.faults.add(Flip(), origin="cdn", path="ann/flip", method="GET")
        good("ann/a", "ann/flip")
        what = "ann/flip: adapter_model.safetensors arrived 3 times with other bytes than its digest says"
        check(good, 7, f"{what} (was it changed on the way, by a proxy or a mirror?)")
        assert good("ann/a", "ann/flip", "--skip-bad") == 7  # the adapter is not what is bad

    def test_a_slash_at_the_end_of_the_address(self, hub_client: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Servers differ in what they make of two in a row."""
        monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
        assert Hub(HttpClient(print), RetryPolicy()).endpoint == "https://mirror.example"

    @pytest.mark.parametrize("path", ["README", "config", "safetensors"])
    def test_corrupt_once(self, good: Fetching, path: str) -> None:
        good.hub.faults.add(Flip(), path=path, method="GET", times=1)
        assert good("ann/a") == 0
        assert all(adapter_files(0)[Path(name).name] == data for name, data in good.files().items())

    def test_shorter_than_promised(self, good: Fetching) -> None:
        good.hub.catalogue.add(repository("ann/short", 1))
        good.hub.faults.add(Resize(-5), origin="cdn", path="ann/short", method="GET")
        good("ann/a", "ann/short")
        (line,) = good.errors
        assert line.startswith("ann/short: adapter_model.safetensors: ")
        check(good, 7, line)

    def test_offline(self, good: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        good("ann/a")
        check(
            good,
            7,
            "ann/a: not in the cache, and HF_HUB_OFFLINE is set (unset it, or fetch it online)",
            arrived=False,
        )
        assert not good.hub.log.requests

    def test_offline_with_a_lock_and_the_cache_it_works(self, good: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        good("ann/a")
        shutil.rmtree(good.directory / "ann")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        good.hub.log.clear()
        assert good("ann/a", "--locked") == 0
        assert not good.hub.log.requests

    def test_what_is_no_hub(self, good: Fetching) -> None:
        good.hub.faults.add(log_in_page, path="/api/")
        good("ann/a")
        hint = "is HF_ENDPOINT right, or a proxy in between?"
        check(good, 7, f"ann/a: {good.hub.url} does not answer as a Hub does ({hint})", arrived=False)

    def test_nothing_secret_is_said(self, good: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        token = "hf_secretofann"
        monkeypatch.setenv("HF_TOKEN", token)
        good.hub.catalogue.add(*(repository(f"ann/x{n}", n) for n in range(5)))
        good.hub.faults.add(Status(500, echo_authorization=True), path="x1")
        good.hub.faults.add(Cut(20, reset=True), origin="cdn", path="x2")
        good.hub.faults.add(Status(403, echo_authorization=True), path="x3")
        good.hub.faults.add(Flip(), origin="cdn", path="x4")
        for arguments in (["--json"], ["--skip-bad"]):
            assert good("org:ann", *arguments) == 7
            written = "".join(path.read_text() for path in good.directory.rglob("*.jsonl"))
            for text in (good.out, good.err, written):
                assert token not in text
                assert SIGNATURE not in text


class TestAdapters:
    @pytest.mark.parametrize(
        ("files", "line"),
        [
            ({"config.json": b"{}"}, "no adapter_config.json: not an adapter"),
            (
                {"adapter_config.json": b"{}"},
                "no weights: neither adapter_model.safetensors nor adapter_model.safetensors.index.json",
            ),
            (adapter_files(1, peft_type="IA3"), "PEFT type IA3 is not supported, only LORA"),
            (
                adapter_files(1, use_dora=True),
                "DoRA (use_dora), but module model.layers.0.self_attn.q_proj has no lora_magnitude_vector "
                "(save it again with PEFT)",
            ),
            (adapter_files(1) | {"adapter_config.json": b"{"}, None),
            (adapter_files(1) | {"adapter_model.safetensors": b"no weights"}, None),
            (adapter_files(1, r=3), None),
            (
                {"adapter_config.json": adapter_files(1)["adapter_config.json"], "adapter_model.bin": b"x"},
                "adapter_model.bin is pickled, and a pickle can run code (--allow-pickle fetches and reads it safely)",
            ),
        ],
    )
    def test_one_that_cannot_be_used(self, good: Fetching, files: dict[str, bytes], line: str | None) -> None:
        good.hub.catalogue.add(Repository.of("ann/bad", files))
        good("ann/a", "ann/bad")
        (said,) = good.errors
        check(good, 3, f"adapter 'ann/bad': {line}" if line else said)
        assert said.startswith("adapter 'ann/bad': ")
        assert good("ann/a", "ann/bad", "--skip-bad") == 0
        assert good.names == ["ann/a"]
        assert not (good.directory / ".lorazip-fetch").exists()

    def test_the_lock_says_why_without_marks(self, good: Fetching) -> None:
        """A report names the option; what is stored, the parameter."""
        config = adapter_files(1)["adapter_config.json"]
        good.hub.catalogue.add(Repository.of("ann/bad", {"adapter_config.json": config, "adapter_model.bin": b"x"}))
        report = good.json("ann/a", "ann/bad", "--skip-bad")
        reason = "adapter_model.bin is pickled, and a pickle can run code ({} fetches and reads it safely)"
        assert [each["reason"] for each in report["left_out"]] == [reason.format("--allow-pickle")]
        stored = [each.reason for source in good.lock.sources for each in source.left_out]
        assert stored == [reason.format("allow_pickle")]
        old = (good.directory / LOCK_NAME).read_text()
        (good.directory / LOCK_NAME).write_text(old.replace("allow_pickle", "«allow_pickle»"))
        assert good("ann/a", "ann/bad", "--skip-bad") == 0  # of a lock with marks, too
        assert (good.directory / LOCK_NAME).read_text() == old

    def test_a_folder_without_an_adapter(self, good: Fetching) -> None:
        good("ann/a", "ann/a/sub")
        check(good, 3, "adapter 'ann/a': no adapter_config.json in sub: not an adapter")

    def test_too_large(self, good: Fetching) -> None:
        good.hub.catalogue.add(
            Repository.of("ann/large", adapter_files(1) | {"README.md": bytes(2000)}),
            Collection("ann/c-1", (Item("ann/a"), Item("ann/large"))),
        )
        assert good("collection:ann/c-1", "--max-size", "2KB") == 0
        assert good.names == ["ann/a"]
        size = sum(len(adapter_files(1)[name]) for name in ("adapter_config.json", "adapter_model.safetensors")) + 2000
        reason = f"it has {size:,} bytes, more than the 2,000 bytes allowed"
        assert f"  ann/large: {reason}" in good.err
        shutil.rmtree(good.directory)
        good("ann/a", "ann/large", "--max-size", "2KB")
        check(good, 3, f"adapter 'ann/large': {reason}")

    def test_another_base_model_than_asked_for(self, good: Fetching) -> None:
        good("ann/a", "--base-model", "org/other")
        check(good, 3, f"adapter 'ann/a': its base model is {BASE}, not org/other", arrived=False)

    def test_a_directory_without_adapters(self, good: Fetching, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        good("ann/a", str(tmp_path / "empty"))
        line = f"adapter {str(tmp_path / 'empty')!r}: no adapter_config.json at or below it: no adapters here"
        check(good, 3, line)

    def test_fail_fast_stops(self, good: Fetching) -> None:
        good("ann/none", "ann/a", "--fail-fast")
        assert good.code == 7
        assert len(good.errors) == 1
        assert not (good.directory / "ann").exists()

    def test_the_lowest_code_of_several_failures(self, good: Fetching) -> None:
        good.hub.catalogue.add(Repository.of("ann/bad", {"config.json": b"{}"}))
        assert good("ann/a", "ann/none", "ann/bad") == 3
        assert len(good.errors) == 2
        assert f"2 failures: {LOCK_NAME} was not written" in good.err


class TestLocked:
    @pytest.fixture
    def locked(self, good: Fetching, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fetching:
        """ann/a is locked, and neither here nor in the cache any more."""
        good("ann/a")
        shutil.rmtree(good.directory / "ann")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other"))
        return good

    def test_the_repository_is_gone(self, locked: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secretofann")  # without a token the Hub does not say so
        locked.hub.catalogue.remove("ann/a")
        assert locked("--locked") == 1
        assert locked.errors == ["ann/a: not found, or your token may not read it (check the name and the token)"]
        assert locked.err.splitlines()[-1] == f"1 failure: {locked.directory} is not what {LOCK_NAME} says"

    def test_the_commit_is_gone(self, locked: Fetching) -> None:
        old = locked.lock.adapters[0].origin.commit
        locked.hub.catalogue.repositories["ann/a"].commit(adapter_files(3))
        locked.hub.catalogue.repositories["ann/a"].squash()
        assert locked("--locked") == 1
        assert locked.errors == [f"ann/a: it has no revision {old!r} (was it deleted or its history rewritten?)"]

    def test_the_bytes_are_others(self, locked: Fetching) -> None:
        locked.hub.faults.add(Flip(), path="README", method="GET")
        assert locked("--locked") == 1
        what = "ann/a: README.md arrived 3 times with other bytes than its digest says"
        assert locked.errors == [f"{what} (was it changed on the way, by a proxy or a mirror?)"]

    def test_the_hub_does_not_answer(self, locked: Fetching) -> None:
        locked.hub.faults.add(Status(500), method="GET")
        assert locked("--locked") == 7
        assert locked.errors == [f"ann/a: README.md: the Hub still answers 500 after 3 attempts ({KEPT})"]

    def test_a_local_adapter_has_changed(self, good: Fetching, tmp_path: Path) -> None:
        write_collection(tmp_path / "mine", plain(1))
        good(str(tmp_path / "mine"))
        (name,) = good.names
        source = tmp_path / "mine" / name.partition("/")[2] / "adapter_config.json"
        source.write_text(source.read_text() + "\n")
        shutil.rmtree(good.directory / "mine")
        label = f"{tmp_path / 'mine'}/{name.partition('/')[2]}"
        line = f"adapter {label!r}: {source} is not what it was (--update takes what is there now)"
        assert good("--locked") == 1
        assert good.errors == [line]
        assert good() == 3
        assert good.errors == [line]
        assert good("--update") == 0

    def test_without_a_lock(self, good: Fetching) -> None:
        assert good("ann/a", "--locked") == 2
        assert good.errors == [f"{good.directory} has no {LOCK_NAME} (fetch once without --locked)"]

    @pytest.mark.parametrize("option", ["--update", "--prune", "--skip-bad"])
    def test_with_what_would_change_it(self, good: Fetching, option: str) -> None:
        assert good("ann/a", "--locked", option) == 2
        assert good.errors == [
            "--locked has just what the lock says, so no --update, --prune or --skip-bad goes with it"
        ]


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            ([], "{dir} has no lorazip.lock (name a SOURCE, or choose another -o)"),
            (["one"], f"'one': {GRAMMAR}"),
            (["a/b/../c"], "'a/b/../c': '../c' is no folder of a repository"),
            (["https://user:hf_secret@huggingface.co/a/b"], OTHER_ADDRESS),
            (["https://huggingface.co:8443/a/b"], OTHER_ADDRESS),
            (["https://hub.example/a/b?token=hf_secret"], OTHER_ADDRESS),
            (["https://huggingface.co.example/a/b"], OTHER_ADDRESS),
            (["hf://a/b"], OTHER_ADDRESS),
            (["https://[::1/a/b"], OTHER_ADDRESS),
            (
                ["https://huggingface.co/acme/?search=hf_secret"],
                "'https://huggingface.co/acme/': the page of an organisation or a user"
                " (for all its adapters write org:acme or user:acme)",
            ),
            (
                ["huggingface.co/datasets/a/b"],
                "'https://huggingface.co/datasets/a/b': a dataset, not a model",
            ),
            (
                ["https://hf.co/a/b/discussions/7"],
                "'https://huggingface.co/a/b/discussions/7': neither a repository, nor one of its folders or files,"
                " nor a collection",
            ),
            (["https://hf.co/a/b/tree/main/x/%2e%2e/y"], "'a/b/x/../y@main': 'x/../y' is no folder of a repository"),
            (["a/b--c"], "'a/b--c': 'a/b--c' is no name of a repository"),
            (["~no-such-user/x"], "'~no-such-user/x' is not a directory"),
            (["./none"], "'./none' is not a directory"),
            (["@none.txt"], "@none.txt: there is no file 'none.txt'"),
            (["@/"], "@/: not a text file with one source a line"),
            (
                ["a/b", "--search", "x"],
                "--search, --tag and --limit narrow down org:NAME and user:NAME, and there is none",
            ),
            (["--prune"], "--prune removes what the given sources do not name, and none is given"),
            (
                ["a/b", "--max-size", "huge"],
                "Invalid value for '--max-size': 'huge' is no size: give bytes, or K, M, G, T or Ki, Mi, Gi, Ti,"
                " like 500MB or 8G (see 'lorazip fetch --help')",
            ),
        ],
    )
    def test_what_makes_no_sense(self, fetch: Fetching, arguments: list[str], line: str) -> None:
        assert fetch(*arguments) == 2
        assert fetch.errors == [line.format(dir=fetch.directory)]
        assert not fetch.directory.exists()

    @pytest.mark.parametrize(
        ("place", "line"),
        [
            ("bundle", "{dir} is a bundle, and adapters would go into it (choose another -o)"),
            ("bundle/x/y", "{dir} is inside the bundle {tmp}/bundle (choose another -o)"),
            ("adapter", "{dir} is the folder of an adapter, and adapters would go into it (choose another -o)"),
            (
                "adapter/x",
                "{dir} is in the folder of an adapter, {tmp}/adapter (choose another -o: inputs are never changed)",
            ),
        ],
    )
    def test_into_a_bundle_or_an_adapter(self, fetch: Fetching, tmp_path: Path, place: str, line: str) -> None:
        for name, content in {"bundle/manifest.json": b'{"format":"lorazip.bundle"}', **ADAPTER}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        before = sorted(tmp_path.rglob("*"))
        assert fetch("ann/a", output=tmp_path / place) == 2
        assert fetch.errors == [line.format(dir=tmp_path / place, tmp=tmp_path)]
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("endpoint", ["127.0.0.1:1", "http://[bad", "ftp://host", "http://"])
    def test_an_address_of_no_hub(self, fetch: Fetching, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert fetch("ann/a") == 2
        assert fetch.errors == ["HF_ENDPOINT is no address such as https://huggingface.co"]

    def test_a_token_that_can_be_none(self, fetch: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_é")
        assert fetch("ann/a") == 2
        assert fetch.errors == ["the token of the Hub has characters that no token has (look at HF_TOKEN)"]

    def test_a_cache_inside_the_directory(self, fetch: Fetching, tmp_path: Path) -> None:
        assert fetch("ann/a", output=tmp_path / "hf") == 2
        assert fetch.errors == [
            f"the cache of the Hub is inside {tmp_path / 'hf'} (choose another -o, or another HF_HOME)"
        ]

    def test_a_line_of_a_list(self, fetch: Fetching, tmp_path: Path) -> None:
        path = tmp_path / "list.txt"
        path.write_text("ann/a\n\nann/b@\n")
        assert fetch(f"@{path}") == 2
        assert fetch.errors[0].startswith(f"{path}:3: 'ann/b@': none of owner/repo")
        path.write_text("@other.txt\n")
        assert fetch(f"@{path}") == 2
        assert fetch.errors == [f"{path}:1: '@other.txt': a list cannot name another one"]

    def test_a_directory_without_its_dot(
        self, fetch: Fetching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "mine").mkdir()
        monkeypatch.chdir(tmp_path)
        assert fetch("mine") == 2
        assert fetch.errors[0].endswith("(for the directory write ./mine)")

    @pytest.mark.parametrize(
        ("source", "line"),
        [
            ("./bundle", "'./bundle' is a bundle, not a directory of adapters ('lorazip export bundle -o DIR' makes"),
            ("./bundle/../bundle/", "'./bundle/../bundle/' is a bundle, not a directory of adapters ("),
            (
                "./bundle/cores",
                "'./bundle/cores' is a folder of a bundle, not a directory of adapters (name the bundle,",
            ),
            ("@list.txt", "list.txt:1: './bundle' is a bundle, not a directory of adapters ("),
        ],
    )
    @pytest.mark.parametrize("options", [[], ["--dry-run"]])
    def test_a_bundle_as_the_source(
        self,
        fetch: Fetching,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        source: str,
        line: str,
        options: list[str],
    ) -> None:
        (tmp_path / "bundle" / "cores").mkdir(parents=True)
        (tmp_path / "bundle" / "manifest.json").write_bytes(b'{"format":"lorazip.bundle"}')
        (tmp_path / "list.txt").write_text("./bundle\n")
        monkeypatch.chdir(tmp_path)
        assert fetch(source, *options) == 2
        (error,) = fetch.errors
        assert error.startswith(line)
        assert not (fetch.directory / "lorazip.lock").exists()

    def test_directories_in_each_other(self, fetch: Fetching, tmp_path: Path) -> None:
        assert fetch(str(tmp_path)) == 2
        assert fetch.errors == [
            f"{str(tmp_path)!r} and -o {str(fetch.directory)!r} lie in each other (choose another -o)"
        ]

    def test_a_file_in_place_of_the_directory(self, fetch: Fetching) -> None:
        fetch.directory.write_text("")
        assert fetch("ann/a") == 2
        assert fetch.errors == [f"{fetch.directory} is a file, not a directory (choose another -o)"]

    def test_a_link_to_nothing_in_its_place(self, fetch: Fetching, tmp_path: Path) -> None:
        fetch.directory.symlink_to(tmp_path / "nothing")
        assert fetch("ann/a") == 2
        assert fetch.errors == [f"{fetch.directory} is a link to nothing (choose another -o)"]

    def test_a_lock_that_is_none(self, good: Fetching) -> None:
        good.directory.mkdir()
        (good.directory / LOCK_NAME).write_text("[]")
        assert good("ann/a") == 2
        assert good.errors[0].startswith(f"{good.directory / LOCK_NAME}: not a lock of lorazip: ")
        (good.directory / LOCK_NAME).write_text('{"schema": "lorazip.lock/9"}')
        assert good("ann/a") == 5
        assert good.errors == [
            f"{good.directory / LOCK_NAME}: lorazip.lock/9; this lorazip reads lorazip.lock/1 (update lorazip)"
        ]


class TestLocalResources:
    def test_no_space(self, good: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage("/")._replace(free=100)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        assert good("ann/a") == 8
        (line,) = good.errors
        assert line.endswith(
            "bytes are needed, 100 bytes are free (free some space, choose another -o, or move the cache with HF_HOME)"
        )
        assert not [name for name in good.downloaded() if "config" not in name]

    def test_the_disk_is_full_on_the_way(self, good: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        good.hub.catalogue.add(*(repository(f"ann/x{n}", n) for n in range(9)))
        link = download.link_or_copy

        def full(source: Path, target: Path) -> None:
            if target.parent.name.startswith("ann-x5"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            link(source, target)

        monkeypatch.setattr(download, "link_or_copy", full)
        assert good("org:ann", "--jobs", "1") == 8
        (line,) = good.errors
        assert line.endswith("No space left on device (free some space, or choose another -o)")
        assert sorted(path.name for path in (good.directory / "ann").iterdir()) == ["a", *(f"x{n}" for n in range(5))]
        monkeypatch.setattr(download, "link_or_copy", link)
        assert good("org:ann") == 0

    def test_the_disk_is_full_where_a_local_adapter_is_copied(
        self, good: Fetching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(source: Path, target: Path) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

        write_collection(tmp_path / "local", plain(1))
        monkeypatch.setattr(shutil, "copyfile", full)
        assert good(str(tmp_path / "local")) == 8
        (line,) = good.errors
        assert str(good.directory) in line

    def test_another_run_at_work(self, good: Fetching) -> None:
        with workspace.Workspace(good.directory):
            assert good("ann/a") == 8
            assert good.errors == [
                f"{good.directory}: another lorazip is fetching into it (wait for it, or choose another -o)"
            ]

    def test_across_file_systems_files_are_copied(self, good: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(source: Path, target: Path) -> None:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "link", refuse)
        assert good("ann/a") == 0
        assert all(path.stat().st_nlink == 1 for path in (good.directory / "ann" / "a").iterdir())


def test_a_commit_that_vanishes_on_the_way_is_looked_up_again(good: Fetching) -> None:
    """Somebody squashes the history between the listing and the download."""
    one = good.hub.catalogue.repositories["ann/a"]

    def squash() -> None:
        one.commit(adapter_files(5))
        one.squash()

    good.hub.faults.add(Call(squash), path="/resolve/.*safetensors", times=1)
    assert good("ann/a") == 7
    assert good.errors[0].startswith("ann/a: it has no revision ")
    assert good("ann/a") == 0
    assert good.lock.adapters[0].origin.commit == one.head
