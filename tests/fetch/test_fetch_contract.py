"""What `fetch` relies on of a Hub: the same tests against the one on loopback and, with ``-m network``, the real one.

Those of the real Hub need the internet and are off by default.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from testing.fetching import Fetching, adapter_files, repository

from lorazip_core.adapter.collection import open_collection
from lorazip_core.adapter.lock import LOCK_NAME


class Place(NamedTuple):
    """A small adapter of a Hub that everybody may read."""

    fetch: Fetching
    id: str
    owner: str


@pytest.fixture(params=["loopback", pytest.param("the real Hub", marks=pytest.mark.network)])
def place(request: pytest.FixtureRequest, fetch: Fetching, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "loopback":
        fetch.hub.catalogue.add(repository("org/one"))
        return Place(fetch, "org/one", "org")
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")
    return Place(fetch, "peft-internal-testing/tiny-OPTForCausalLM-lora", "peft-internal-testing")


def test_an_adapter_is_brought_and_opens(place: Place) -> None:
    report = place.fetch.json(place.id, "--allow-pickle")
    assert place.fetch.code == 0
    (adapter,) = report["adapters"]
    assert adapter["status"] == "new"
    assert len(adapter["origin"]["commit"]) == 40
    assert report["summary"]["bytes_downloaded"] == adapter["size_bytes"] > 0
    assert len(open_collection(place.fetch.directory, allow_pickle=True).adapters) == 1


def test_a_second_run_downloads_nothing_and_an_update_finds_nothing(place: Place) -> None:
    place.fetch(place.id, "--allow-pickle")
    lock = place.fetch.lock
    for arguments in ([], ["--update"]):
        report = place.fetch.json(place.id, "--allow-pickle", *arguments)
        assert [each["status"] for each in report["adapters"]] == ["present"]
        assert report["summary"]["bytes_downloaded"] == 0
        assert place.fetch.lock == lock


def test_a_lock_gives_the_same_bytes_elsewhere(place: Place, tmp_path: Path) -> None:
    place.fetch(place.id, "--allow-pickle")
    there = Fetching(place.fetch.hub, tmp_path / "there", place.fetch.capsys)
    there.directory.mkdir()
    (there.directory / LOCK_NAME).write_bytes((place.fetch.directory / LOCK_NAME).read_bytes())
    assert there("--locked") == 0
    assert there.files() == place.fetch.files()


def test_a_listing_finds_it(place: Place) -> None:
    name = place.id.partition("/")[2]
    report = place.fetch.json(f"org:{place.owner}", "--search", name, "--dry-run", "--allow-pickle", "--skip-bad")
    assert place.id in {each["origin"]["repository"] for each in report["adapters"]}


def test_what_is_missing(place: Place) -> None:
    assert place.fetch(f"{place.owner}/there-is-no-such-repository", f"{place.id}@there-is-no-such-revision") == 7
    first, second = place.fetch.errors
    assert first.startswith(f"{place.owner}/there-is-no-such-repository: not found, or private (")
    assert second.startswith(f"{place.id}: it has no revision 'there-is-no-such-revision' (")


def test_the_hub_on_loopback_serves_what_it_is_given(fetch: Fetching) -> None:
    """Else the tests above would prove nothing of it."""
    fetch.hub.catalogue.add(repository("org/one"))
    fetch("org/one")
    assert fetch.files()["org/one/adapter_config.json"] == adapter_files(0)["adapter_config.json"]
