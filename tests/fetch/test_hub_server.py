"""The server of `hub`, asked by the client that it's for: what the client makes of its answers, and of its faults.

The tests of a `place` hold for any Hub. With `-m network` they also ask the real one, which shows whether the server
still answers as it does. That is off by default, because it needs the internet; where it was written there was none, so
the real Hub hasn't been asked yet.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx2
import pytest
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import close_session
from testing.hub import (
    SIGNATURE,
    Call,
    Collection,
    Cut,
    Delay,
    Drip,
    Flip,
    HubServer,
    Item,
    RateLimit,
    Repository,
    Resize,
    Silence,
    Status,
    hub_process,
    too_many_requests,
)

BASE = "org/base"
CARD = {"library_name": "peft", "base_model": BASE, "license": "mit"}
CONFIG = b'{"peft_type": "LORA", "base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}'
WEIGHTS = bytes(range(256)) * 200
FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "adapter_config.json": CONFIG,
    "adapter_model.safetensors": WEIGHTS,
    "checkpoint/adapter_config.json": CONFIG,
}


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client reads its settings when it's imported, and other tests set it offline; it keeps its connections."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield
    close_session()


def adapter(id: str = "org/one", **settings: object) -> Repository:
    return Repository.of(id, FILES, **{"card_data": CARD, **settings})


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer(adapter(), tokens={"secret-of-ann": "ann", "secret-of-bob": "bob"}) as server:
        yield server


# Any Hub


@dataclass
class Place:
    """A repository of an adapter on some Hub."""

    endpoint: str
    id: str
    revision: str

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.endpoint, token=False)


@pytest.fixture(params=["loopback", pytest.param("the real Hub", marks=pytest.mark.network)])
def place(request: pytest.FixtureRequest) -> Place:
    if request.param == "loopback":
        return Place(request.getfixturevalue("server").url, "org/one", "main")
    return Place("https://huggingface.co", "peft-internal-testing/tiny-OPTForCausalLM-lora", "main")


def digests(content: bytes) -> tuple[str, str]:
    """As git and as LFS name it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


def test_metadata_is_that_of_the_files(place: Place, tmp_path: Path) -> None:
    info = place.api.model_info(place.id, revision=place.revision, files_metadata=True)
    assert info.siblings
    folder = Path(
        snapshot_download(place.id, revision=info.sha, endpoint=place.endpoint, cache_dir=tmp_path, token=False)
    )
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        sibling.rfilename for sibling in info.siblings
    }
    assert any(sibling.lfs for sibling in info.siblings)
    for sibling in info.siblings:
        content = (folder / sibling.rfilename).read_bytes()
        assert sibling.size == len(content)
        if sibling.lfs:
            assert (sibling.lfs.sha256, sibling.lfs.size) == (digests(content)[1], len(content))
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digests(content)[1]}\n".encode()
            pointer += b"size %d\n" % len(content)
            assert (sibling.blob_id, sibling.lfs.pointer_size) == (digests(pointer)[0], len(pointer))
        else:
            assert sibling.blob_id == digests(content)[0]


def test_tree_and_paths_say_the_same_as_the_model(place: Place) -> None:
    info = place.api.model_info(place.id, revision=place.revision, files_metadata=True)
    model = {s.rfilename: (s.size, s.blob_id, s.lfs and s.lfs.sha256) for s in info.siblings or ()}
    tree = place.api.list_repo_tree(place.id, revision=info.sha, recursive=True)
    assert {f.path: (f.size, f.blob_id, f.lfs and f.lfs.sha256) for f in tree if hasattr(f, "size")} == model
    paths = place.api.get_paths_info(place.id, [*model, "no such file"], revision=info.sha)
    assert {f.path: (f.size, f.blob_id, f.lfs and f.lfs.sha256) for f in paths} == model


def test_head_of_a_file_tells_commit_digest_and_size(place: Place) -> None:
    info = place.api.model_info(place.id, revision=place.revision, files_metadata=True)
    for sibling in info.siblings or ():
        url = hf_hub_url(place.id, sibling.rfilename, revision=place.revision, endpoint=place.endpoint)
        head = get_hf_file_metadata(url, token=False, endpoint=place.endpoint)
        assert head.commit_hash == info.sha
        assert head.etag == (sibling.lfs.sha256 if sibling.lfs else sibling.blob_id)
        assert head.size == sibling.size


def test_what_does_not_exist(place: Place, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        place.api.model_info(place.id + "-that-nobody-made")
    for revision in ("no-such-branch", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            place.api.model_info(place.id, revision=revision)
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(place.id, "no such file", endpoint=place.endpoint, cache_dir=tmp_path, token=False)
    with pytest.raises(RemoteEntryNotFoundError):
        list(place.api.list_repo_tree(place.id, "no such folder"))


def test_an_organisations_models_can_be_listed(place: Place) -> None:
    organisation, name = place.id.split("/")
    listed = {m.id: m for m in place.api.list_models(author=organisation, search=name, full=True)}
    assert listed[place.id].sha == place.api.model_info(place.id).sha
    assert "adapter_config.json" in {sibling.rfilename for sibling in listed[place.id].siblings or ()}


# Listing


def test_lists_come_in_pages() -> None:
    others = [adapter(f"org/a{i}") for i in range(5)]
    with HubServer(*others, adapter("else/where"), Repository.of("org/base", {"x": b"x"}), page_size=2) as server:
        api = HfApi(endpoint=server.url, token=False)
        filters = [f"base_model:adapter:{BASE}", "peft", "license:mit"]
        assert [m.id for m in api.list_models(author="org", filter=filters)] == [r.id for r in others]
        assert len(server.log.requests) == 3
        assert [m.id for m in api.list_models(limit=3)] == [r.id for r in others[:3]]
        assert [m.sha for m in api.list_models(author="else", expand=["sha"])] == [adapter("else/where").head]
        server.log.clear()
        tree = [entry.path for entry in api.list_repo_tree("org/a0", recursive=True)]
        assert sorted(tree) == sorted([*FILES, "checkpoint"])
        assert len(server.log.requests) == 3
        assert [entry.path for entry in api.list_repo_tree("org/a0", "checkpoint")] == [
            "checkpoint/adapter_config.json"
        ]


def test_a_parameter_that_the_server_does_not_know_is_not_passed_over(server: HubServer) -> None:
    with pytest.raises(HfHubHTTPError, match="does not know pipeline_tag"):
        list(HfApi(endpoint=server.url, token=False).list_models(pipeline_tag="text-generation"))


def test_a_collection_hides_what_the_reader_may_not_see(server: HubServer) -> None:
    server.catalogue.add(adapter("org/hidden", private=True, readers=frozenset({"ann"})))
    items = (Item("org/one", note="the first"), Item("org/hidden"), Item("org/data", "dataset"), Item("org/gone"))
    server.catalogue.add(Collection("org/mine-0123456789abcdef01234567", items))
    api = HfApi(endpoint=server.url)
    seen = api.get_collection("org/mine-0123456789abcdef01234567", token=False)
    assert [(item.item_id, item.item_type, item.note) for item in seen.items] == [
        ("org/one", "model", "the first"),
        ("org/data", "dataset", None),
        ("org/gone", "model", None),
    ]
    assert len(api.get_collection(seen.slug, token="secret-of-ann").items) == 4
    with pytest.raises(HfHubHTTPError, match="Collection not found"):
        api.get_collection("org/none-0123456789abcdef01234567", token=False)


def test_branches_and_tags(server: HubServer) -> None:
    repository = server.catalogue.repositories["org/one"]
    repository.tag("v1")
    old = repository.head
    new = repository.commit({"more.txt": b"more"}, delete=("README.md",))
    api = HfApi(endpoint=server.url, token=False)
    assert api.model_info("org/one").sha == new
    assert api.model_info("org/one", revision="v1").sha == api.model_info("org/one", revision=old).sha == old
    assert {s.rfilename for s in api.model_info("org/one").siblings or ()} == {*FILES, "more.txt"} - {"README.md"}
    refs = api.list_repo_refs("org/one")
    assert [(r.name, r.target_commit) for r in refs.branches + refs.tags] == [("main", new), ("v1", old)]


def test_commits_depend_on_content_alone() -> None:
    assert adapter("a/b").head == adapter("c/d").head
    assert Repository.of("a/b", {"x": b"hello world\n"}).at("main").files["x"].blob_id == (  # type: ignore[union-attr]
        "3b18e512dba79e4c8300dd08aeb37f8e728b8dad"
    )
    again = adapter()
    first = again.head
    assert again.commit(FILES) != first


def test_hostile_names_are_listed_and_served_as_they_are(server: HubServer) -> None:
    names = ["../x", "/etc/x", "a/../../x", "CON", "a\nb", "\u00e9", "e\u0301", "A", "a", "q?x=1#y", "%41"]
    for id, ending in (("org/regular", ""), ("org/lfs", ".bin")):
        files = {name + ending: f"content of {number}".encode() for number, name in enumerate(names)}
        server.catalogue.add(Repository.of(id, files))
        api = HfApi(endpoint=server.url, token=False)
        assert [s.rfilename for s in api.model_info(id).siblings or ()] == list(files)
        assert {f.path for f in api.list_repo_tree(id, recursive=True) if hasattr(f, "size")} == files.keys()
        for path, content in files.items():
            status, headers, body = get(server.url + f"/{id}/resolve/main/{quote(path, safe='')}")
            if ending:
                assert status == 302
                status, headers, body = get(headers["Location"])
            assert (status, body) == (200, content)


# Downloads


def snapshot(server: HubServer, cache: Path, id: str = "org/one", token: str | bool = False, **options: object) -> Path:
    return Path(snapshot_download(id, endpoint=server.url, cache_dir=cache, token=token, **options))  # type: ignore[arg-type]


def get(url: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Without the client: it doesn't follow, retry or tidy up."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=300)
    try:
        connection.request(method, f"{parts.path}?{parts.query}", headers=headers)
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()
    finally:
        connection.close()


def test_a_snapshot_has_the_files_and_a_second_one_downloads_nothing(server: HubServer, tmp_path: Path) -> None:
    folder = snapshot(server, tmp_path)
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    assert folder.name == server.catalogue.repositories["org/one"].head
    # The client knows two files of the same content as one.
    assert set(server.log.complete().values()) == {1}
    assert ("org/one", "adapter_model.safetensors") in server.log.downloads()
    server.log.clear()
    assert snapshot(server, tmp_path) == folder
    assert server.log.downloads() == {}


def test_files_are_read_from_a_directory_when_they_are_served(server: HubServer, tmp_path: Path) -> None:
    for path, content in FILES.items():
        (tmp_path / "on disk" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "on disk" / path).write_bytes(content)
    repository = Repository.from_directory("org/disk", tmp_path / "on disk")
    assert repository.at("main").files.keys() == FILES.keys()  # type: ignore[union-attr]
    assert [f.etag for f in repository.commits[repository.head].files.values()] == [
        f.etag for f in adapter().commits[adapter().head].files.values()
    ]
    server.catalogue.add(repository)
    folder = snapshot(server, tmp_path / "cache", "org/disk")
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES


def test_ranges(server: HubServer) -> None:
    for url in (server.url + "/org/one/resolve/main/README.md", _signed(server)):
        content = FILES["README.md"] if "README" in url else WEIGHTS
        size = len(content)
        for asked, start, end in (
            ("5-", 5, size),
            ("0-0", 0, 1),
            ("3-9", 3, 10),
            ("-4", size - 4, size),
            ("7-999999", 7, size),
        ):
            status, headers, body = get(url, Range=f"bytes={asked}")
            assert (status, body) == (206, content[start:end])
            assert headers["Content-Range"] == f"bytes {start}-{end - 1}/{size}"
        status, headers, body = get(url, Range=f"bytes={size}-")
        assert (status, headers["Content-Range"], body) == (416, f"bytes */{size}", b"")


def _signed(server: HubServer) -> str:
    status, headers, _ = get(server.url + "/org/one/resolve/main/adapter_model.safetensors")
    assert (status, headers["X-Linked-Size"]) == (302, str(len(WEIGHTS)))
    assert headers["Location"].startswith(server.cdn_url)
    return headers["Location"]


def test_the_cdn_serves_signed_addresses_only(server: HubServer) -> None:
    assert SIGNATURE in _signed(server)
    assert get(_signed(server).partition("?")[0])[0] == 403
    assert SIGNATURE not in repr(server.log.requests)


def test_small_files_may_be_behind_a_redirect_too(tmp_path: Path) -> None:
    with HubServer(adapter(), resolve_cache=True) as server:
        folder = snapshot(server, tmp_path)
        assert {path: (folder / path).read_bytes() for path in FILES} == FILES
        assert server.log.where(lambda r: r.path.startswith("/api/resolve-cache/"))


def test_a_renamed_repository_is_found_by_its_old_name(server: HubServer, tmp_path: Path) -> None:
    server.catalogue.renamed["old/name"] = "org/one"
    assert HfApi(endpoint=server.url, token=False).model_info("old/name").id == "org/one"
    assert (snapshot(server, tmp_path, "old/name") / "adapter_config.json").read_bytes() == CONFIG


def test_a_push_does_not_change_what_a_commit_is_and_a_squash_ends_it(server: HubServer, tmp_path: Path) -> None:
    repository = server.catalogue.repositories["org/one"]
    old = repository.head
    push = Call(lambda: repository.commit({"adapter_model.safetensors": b"new"}))
    server.faults.add(push, path="/resolve/.*adapter_model", times=1)
    folder = snapshot(server, tmp_path)
    assert folder.name == old != repository.head
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS

    server.faults.clear()
    server.faults.add(Call(repository.squash), path="/resolve/", times=1)
    with pytest.raises(RevisionNotFoundError):
        snapshot(server, tmp_path / "other", max_workers=1)
    assert repository.commits.keys() == {repository.head}


# Who may see what


def test_a_private_repository_looks_like_none(server: HubServer, tmp_path: Path) -> None:
    server.catalogue.add(adapter("org/hidden", private=True, readers=frozenset({"ann"})))
    api = HfApi(endpoint=server.url)
    answers = []
    for id in ("org/hidden", "org/none"):
        for token in (False, "secret-of-bob"):
            with pytest.raises(RepositoryNotFoundError) as caught:
                api.model_info(id, token=token)
            answers.append((caught.value.response.status_code, caught.value.server_message))
    assert answers == [(401, "Invalid username or password."), (404, "Repository not found")] * 2
    assert "org/hidden" not in {m.id for m in api.list_models(token="secret-of-bob")}
    assert "org/hidden" in {m.id for m in api.list_models(token="secret-of-ann")}
    assert (snapshot(server, tmp_path, "org/hidden", "secret-of-ann") / "adapter_config.json").read_bytes() == CONFIG


def test_a_gated_repository_shows_itself_but_not_its_files(server: HubServer, tmp_path: Path) -> None:
    server.catalogue.add(adapter("org/gated", gated="manual", readers=frozenset({"ann"})))
    api = HfApi(endpoint=server.url)
    info = api.model_info("org/gated", token=False, files_metadata=True)
    assert info.gated == "manual"
    assert {s.rfilename for s in info.siblings or ()} == set(FILES)
    for token, status in ((False, 401), ("secret-of-bob", 403)):
        with pytest.raises(GatedRepoError) as caught:
            hf_hub_download("org/gated", "README.md", endpoint=server.url, cache_dir=tmp_path / "no", token=token)
        assert caught.value.response.status_code == status
    snapshot(server, tmp_path, "org/gated", "secret-of-ann")


def test_an_invalid_token_is_refused_everywhere(server: HubServer) -> None:
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as caught:
        HfApi(endpoint=server.url).model_info("org/one", token="hf_wrong")
    assert caught.value.response.status_code == 401


def test_a_disabled_repository(server: HubServer) -> None:
    server.catalogue.add(adapter("org/bad", disabled=True))
    with pytest.raises(DisabledRepoError):
        HfApi(endpoint=server.url, token=False).model_info("org/bad")


def test_the_client_sends_no_token_to_the_cdn(server: HubServer, tmp_path: Path) -> None:
    snapshot(server, tmp_path, token="secret-of-ann")
    assert server.log.where(lambda r: r.origin == "cdn")
    assert all(record.authorized == (record.origin == "hub") for record in server.log.requests)
    assert server.log.violations == []


def test_who_sends_a_token_to_the_cdn_is_found_out() -> None:
    with (
        pytest.raises(AssertionError, match="the token was sent to the CDN: GET /org/one/"),
        HubServer(adapter()) as server,
    ):
        get(_signed(server), Authorization="Bearer secret")


# Faults


def test_a_cut_download_is_resumed(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client loses the last, incomplete chunk; its chunks of 10 MB are more than a test should send."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4_000)
    server.faults.add(Cut(10_000), origin="cdn", method="GET", nth={1})
    path = hf_hub_download("org/one", "adapter_model.safetensors", endpoint=server.url, cache_dir=tmp_path, token=False)
    assert Path(path).read_bytes() == WEIGHTS
    first, second = server.log.downloads()["org/one", "adapter_model.safetensors"]
    assert (first.status, first.sent, first.promised, first.cut, first.fault) == (
        200,
        10_000,
        len(WEIGHTS),
        True,
        "Cut",
    )
    assert (second.status, second.sent, second.range) == (206, len(WEIGHTS) - 8_000, "bytes=8000-")
    assert server.log.complete() == {("org/one", "adapter_model.safetensors"): 1}


@pytest.mark.parametrize(("reset", "error"), [(False, httpx2.RemoteProtocolError), (True, httpx2.ReadError)])
def test_a_cut_is_an_incomplete_message_or_a_network_error(
    server: HubServer, reset: bool, error: type[Exception]
) -> None:
    server.faults.add(Cut(5, reset=reset))
    with pytest.raises(error):
        httpx2.get(server.url + "/org/one/resolve/main/adapter_config.json")


def test_too_many_requests_are_tried_again_after_a_while(server: HubServer) -> None:
    rule = server.faults.add(too_many_requests(0), path="^/api/models$", times=1)
    start = time.monotonic()
    assert [m.id for m in HfApi(endpoint=server.url, token=False).list_models()] == ["org/one"]
    assert time.monotonic() - start >= 1
    assert rule.hits == 1
    assert [r.status for r in server.log.requests] == [429, 200]


def test_the_hubs_own_header_says_how_long_to_wait(server: HubServer) -> None:
    server.faults.add(too_many_requests(55, ratelimit=True))
    with pytest.raises(HfHubHTTPError, match=r"reached your 'api' rate limit.*\nRetry after 55 seconds"):
        HfApi(endpoint=server.url, token=False).model_info("org/one")


def test_a_rate_limit_slides(server: HubServer) -> None:
    now = 0.0
    server.faults.add(RateLimit(3, 1, clock=lambda: now), origin="hub")
    url = server.url + "/api/models/org/one"
    answers = [get(url) for _ in range(5)]
    assert [status for status, _, _ in answers] == [200, 200, 200, 429, 429]
    assert answers[-1][1]["Retry-After"] == "1"
    now = 1.05
    assert get(url)[0] == 200
    assert server.log.summary()["rate_limited"] == 2


def test_wrong_bytes_and_wrong_sizes(server: HubServer) -> None:
    url = server.url + "/org/one/resolve/main/adapter_config.json"
    server.faults.add(Flip(), times=1)
    _, _, body = get(url)
    assert len(body) == len(CONFIG)
    assert sum((a ^ b).bit_count() for a, b in zip(body, CONFIG, strict=True)) == 1
    server.faults.add(Resize(-3), times=1)
    assert get(url)[2] == CONFIG[:-3]
    server.faults.add(Resize(3), times=1)
    assert get(url)[2] == CONFIG + b"\0\0\0"
    assert get(url)[2] == CONFIG


def test_errors_that_are_not_the_clients_fault(server: HubServer) -> None:
    for status in (500, 503, 504):
        server.faults.add(Status(status), times=1)
        with pytest.raises(HfHubHTTPError) as caught:
            HfApi(endpoint=server.url, token=False).model_info("org/one")
        assert caught.value.response.status_code == status
    server.faults.add(Status(500, echo_authorization=True))
    with pytest.raises(HfHubHTTPError, match="secret-of-ann"):
        HfApi(endpoint=server.url, token="secret-of-ann").model_info("org/one")
    assert "secret-of-ann" not in repr(server.log.requests)


def test_slow_and_silent(server: HubServer) -> None:
    url = server.url + "/org/one/resolve/main/adapter_config.json"
    slow = server.faults.add(Delay(0.1))
    server.faults.add(Drip(len(CONFIG) // 3 + 1, 0.05))
    start = time.monotonic()
    assert get(url)[2] == CONFIG
    assert time.monotonic() - start >= 0.2
    server.faults.remove(slow)
    server.faults.add(Silence(), times=1)
    with pytest.raises(httpx2.TimeoutException):
        httpx2.get(url, timeout=httpx2.Timeout(300, read=1))
    server.faults.add(Silence(0), times=1)
    with pytest.raises(http.client.RemoteDisconnected):
        get(url)
    assert [r.status for r in server.log.requests] == [200, None, None]


def _hits(seed: int, backwards: bool) -> dict[str, list[str]]:
    """Per path, what its requests met; the paths are asked for from threads, in one order or the other."""
    paths = [f"/api/models/org/{i}" for i in range(8)]
    with HubServer(*[adapter(f"org/{i}") for i in range(8)], seed=seed) as server:
        server.faults.add(Status(503), probability=0.3)
        server.faults.add(Flip(), probability=0.3)
        threads = [
            threading.Thread(target=lambda p=path: [get(server.url + p) for _ in range(6)])
            for path in (reversed(paths) if backwards else paths)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {p: [f"{r.fault} {r.status}" for r in server.log.requests if r.path == p] for p in paths}


def test_random_faults_depend_on_the_seed_and_not_on_the_order() -> None:
    once = _hits(1, False)
    assert _hits(1, True) == once
    assert _hits(2, False) != once
    assert {hit for hits in once.values() for hit in hits} == {" 200", "Status 503", "Flip 200", "Status+Flip 503"}


def test_a_bug_of_a_hook_fails_the_test() -> None:
    def bug() -> None:
        raise ZeroDivisionError

    server = HubServer(adapter())
    server.faults.add(Call(bug))
    with (
        pytest.raises(AssertionError, match="ZeroDivisionError"),
        server,
        pytest.raises(http.client.RemoteDisconnected),
    ):
        get(server.url + "/api/models")


# Another process


def test_client_and_server_as_processes_of_their_own(tmp_path: Path) -> None:
    """The client finds the server by HF_ENDPOINT alone, as `lorazip fetch` does."""
    for name in ("a", "b/c"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "adapter_config.json").write_bytes(CONFIG)
        (tmp_path / "adapters" / name / "adapter_model.safetensors").write_bytes(WEIGHTS)
    program = (
        "import huggingface_hub as h, json\n"
        "ids = [m.id for m in h.list_models(author='bench', filter='base_model:adapter:org/base')]\n"
        "assert ids == [i.item_id for i in h.get_collection('bench/all').items]\n"
        "print(json.dumps({i: h.hf_hub_download(i, 'adapter_model.safetensors') for i in ids}))\n"
    )
    with hub_process(tmp_path / "adapters", "--owner", "bench", "--delay", "0.01", "--limit", "100/1") as server:
        assert server.repositories == 2
        settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | settings
        ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr.decode()
    found = json.loads(ended.stdout)
    assert found.keys() == {"bench/a", "bench/b-c"}
    assert all(Path(path).read_bytes() == WEIGHTS for path in found.values())
    assert server.summary["downloads"] == 2
    assert server.summary["violations"] == 0
