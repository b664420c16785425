"""`lorazip fetch` against a Hub on loopback: what is brought, under which names, and what a second run does."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from huggingface_hub import constants
from peft import PeftConfig
from testing import schemas
from testing.fetching import BASE, CARD, NEEDED, Fetching, adapter_files, repository
from testing.hub import Call, Collection, HubServer, Item, Repository
from testing.random_adapters import plain, write_collection

from lorazip_cli.main import main
from lorazip_core.adapter.collection import open_collection
from lorazip_core.adapter.lock import LOCK_NAME
from lorazip_core.fetch import run, workspace
from lorazip_core.fetch.report import FetchReport


def serve(hub: HubServer, *ids: str, **settings: object) -> list[Repository]:
    repositories = [repository(id, seed, **settings) for seed, id in enumerate(ids)]
    hub.catalogue.add(*repositories)
    return repositories


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def left_out(report: dict[str, Any]) -> dict[str, str]:
    return {each["what"]: each["reason"] for each in report["left_out"]}


class TestSources:
    def test_a_repository(self, fetch: Fetching) -> None:
        (one,) = serve(fetch.hub, "ann/sql")
        assert fetch("ann/sql") == 0
        assert fetch.files() == {f"ann/sql/{name}": adapter_files(0)[name] for name in NEEDED}
        assert PeftConfig.from_pretrained(fetch.directory / "ann" / "sql").base_model_name_or_path == BASE
        (entry,) = fetch.lock.adapters
        assert (entry.origin.repository, entry.origin.commit, entry.origin.revision) == ("ann/sql", one.head, None)
        assert (entry.origin.license, entry.base_model) == ("mit", BASE)
        assert fetch.err.splitlines()[-2:] == [
            f"1 adapter in {fetch.directory}, {entry.size_bytes:,} bytes: 1 new; {entry.size_bytes:,} bytes downloaded",
            f"go on with: lorazip cluster {fetch.directory} -o clusters.json",
        ]

    def test_only_what_is_needed_is_downloaded(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/sql")
        fetch("ann/sql")
        assert fetch.downloaded() == [f"ann/sql/{name}" for name in NEEDED]

    def test_a_revision_is_a_branch_a_tag_or_a_commit(self, fetch: Fetching) -> None:
        (one,) = serve(fetch.hub, "ann/sql")
        old = one.head
        one.tag("v1")
        one.commit(adapter_files(7))
        new = one.head
        fetch("ann/sql@v1", f"ann/sql@{old}", "ann/sql")
        commits = {entry.origin.revision: entry.origin.commit for entry in fetch.lock.adapters}
        assert commits == {"v1": old, None: new}  # one commit by two names is one adapter

    def test_two_revisions_of_one_repository_have_two_stable_folders(self, fetch: Fetching, tmp_path: Path) -> None:
        (one,) = serve(fetch.hub, "ann/sql")
        one.tag("v1")
        one.commit(adapter_files(7))
        fetch("ann/sql", "ann/sql@v1")
        names = {entry.origin.revision: entry.name for entry in fetch.lock.adapters}
        assert len({name.casefold() for name in names.values()}) == 2
        fetch("ann/sql@v1", "ann/sql", output=tmp_path / "again")
        assert fetch.files() == Fetching(fetch.hub, tmp_path / "again", fetch.capsys).files()

    def test_folders_of_a_repository_are_adapters(self, fetch: Fetching) -> None:
        files = {f"{folder}/{name}": data for folder in ("a", "b/c") for name, data in adapter_files(3).items()}
        fetch.hub.catalogue.add(Repository.of("ann/many", files))
        assert fetch("ann/many") == 0
        assert fetch.names == ["ann/many--a", "ann/many--b--c"]
        assert {entry.origin.subfolder for entry in fetch.lock.adapters} == {"a", "b/c"}

    def test_a_folder_can_be_named(self, fetch: Fetching) -> None:
        files = {f"{folder}/{name}": data for folder in ("a", "b/c") for name, data in adapter_files(3).items()}
        fetch.hub.catalogue.add(Repository.of("ann/many", files))
        assert fetch("ann/many/b") == 0
        assert fetch.names == ["ann/many--b--c"]

    def test_checkpoints_below_an_adapter_are_left_out_and_said(self, fetch: Fetching) -> None:
        checkpoints = {f"checkpoint-{n}/{name}": data for n in (1, 2) for name, data in adapter_files(n).items()}
        fetch.hub.catalogue.add(Repository.of("ann/sql", adapter_files() | checkpoints))
        report = fetch.json("ann/sql")
        assert fetch.names == ["ann/sql"]
        (left_out,) = report["left_out"]
        assert left_out["what"] == "ann/sql/…"
        assert left_out["reason"] == "2 more adapters in folders of an adapter; name a folder to have it"

    def test_a_collection(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/sql", "bob/math")
        fetch.hub.catalogue.add(
            Repository.of("bob/full", {"config.json": b"{}", "model.safetensors": b"x"}),
            Repository.of("bob/ia3", adapter_files(1, peft_type="IA3")),
            Collection(
                "ann/mine-0123",
                (Item("ann/sql"), Item("bob/math"), Item("bob/full"), Item("bob/ia3"), Item("ann/rows", "dataset")),
            ),
        )
        report = fetch.json("collection:ann/mine-0123")
        assert fetch.code == 0
        assert fetch.names == ["ann/sql", "bob/math"]
        assert {each["what"]: each["reason"] for each in report["left_out"]} == {
            "ann/rows": "a dataset, not a model",
            "bob/full": "no adapter_config.json: not an adapter",
            "bob/ia3": "PEFT type IA3 is not supported, only LORA",
        }
        assert ("bob/ia3", "adapter_model.safetensors") not in fetch.hub.log.downloads()

    @pytest.mark.parametrize("kind", ["org", "user"])
    def test_all_of_an_author_over_several_pages(self, fetch: Fetching, kind: str) -> None:
        serve(fetch.hub, *(f"ann/lora{n}" for n in range(8)), "bob/lora")
        assert fetch(f"{kind}:ann") == 0
        assert fetch.names == [f"ann/lora{n}" for n in range(8)]
        pages = fetch.hub.log.where(lambda request: request.path.split("?")[0] == "/api/models")
        assert len(pages) == 3

    def test_filters_narrow_an_author_down(self, fetch: Fetching) -> None:
        for number, (name, base, tags) in enumerate(
            [("sql-a", BASE, ("x",)), ("sql-b", BASE, ("x", "y")), ("sql-c", "org/other", ("x",)), ("math", BASE, ())]
        ):
            fetch.hub.catalogue.add(
                Repository.of(
                    f"ann/{name}",
                    adapter_files(number, base=base),
                    card_data=CARD | {"base_model": base},
                    tags=(*tags, f"base_model:adapter:{base}"),
                    downloads=number,
                )
            )

        def found(name: str, *options: str) -> list[str]:
            there = Fetching(fetch.hub, fetch.directory / name, fetch.capsys)
            assert there("org:ann", *options) == 0
            return there.names

        assert found("base", "--base-model", BASE) == ["ann/math", "ann/sql-a", "ann/sql-b"]
        assert found("search", "--search", "sql") == ["ann/sql-a", "ann/sql-b", "ann/sql-c"]
        assert found("tags", "--tag", "x", "--tag", "y") == ["ann/sql-b"]
        assert found("limit", "--limit", "2") == ["ann/math", "ann/sql-c"]  # the most downloaded

    def test_limit_counts_adapters_only(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a", "ann/b")
        fetch.hub.catalogue.add(Repository.of("ann/full", {"config.json": b"{}"}, downloads=9))
        assert fetch("org:ann", "--limit", "2") == 0
        assert fetch.names == ["ann/a", "ann/b"]

    def test_a_base_model_is_checked_in_the_configuration(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a")
        fetch.hub.catalogue.add(
            Repository.of("ann/liar", adapter_files(1, base="org/other")),
            Collection("ann/c-1", (Item("ann/a"), Item("ann/liar"))),
        )
        assert fetch("collection:ann/c-1", "--base-model", BASE) == 0
        assert fetch.names == ["ann/a"]
        assert f"  ann/liar: its base model is org/other, not {BASE}" in fetch.err

    @pytest.mark.parametrize(
        ("address", "source"),
        [
            ("https://huggingface.co/ann/many", "ann/many"),
            ("https://huggingface.co/ann/many/", "ann/many"),
            ("http://www.huggingface.co/ann/many?library=peft#files", "ann/many"),
            ("https://HuggingFace.co/ann/many.git", "ann/many"),
            ("hf.co/ann/many", "ann/many"),
            ("https://hf.co/ann/many/tree/main", "ann/many@main"),
            ("https://huggingface.co/ann/many/tree/main/a/", "ann/many/a@main"),
            ("https://huggingface.co/ann/many/blob/main/adapter_config.json", "ann/many@main"),
            ("https://huggingface.co/ann/many/resolve/v1/b/c/README.md?download=true", "ann/many/b/c@v1"),
            ("https://huggingface.co/ann/many/tree/refs%2Fpr%2F1/b", "ann/many/b@refs/pr/1"),
            ("https://huggingface.co/collections/ann/best-0?sort=new", "collection:ann/best-0"),
        ],
    )
    def test_a_pasted_address_is_recorded_as_what_it_names(self, fetch: Fetching, address: str, source: str) -> None:
        files = {f"{folder}/{name}": data for folder in ("a", "b/c") for name, data in adapter_files(3).items()}
        many = Repository.of("ann/many", files)
        many.tag("v1")
        many.tag("refs/pr/1")
        fetch.hub.catalogue.add(many, Collection("ann/best-0", (Item("ann/many"),)))
        assert fetch(address) == 0
        assert [each.source for each in fetch.lock.sources] == [source]
        lock = (fetch.directory / LOCK_NAME).read_bytes()
        requests = len(fetch.hub.log.requests)
        assert fetch(source) == 0
        assert (fetch.directory / LOCK_NAME).read_bytes() == lock
        assert len(fetch.hub.log.requests) == requests

    def test_a_list_with_comments_and_revisions(self, fetch: Fetching, tmp_path: Path) -> None:
        one, _ = serve(fetch.hub, "ann/sql", "bob/math")
        one.tag("v1")
        (tmp_path / "list.txt").write_text("# mine\r\n\r\nann/sql@v1  # the old one\n  bob/math\nbob/math\n")
        assert fetch(f"@{tmp_path / 'list.txt'}") == 0
        assert [source.source for source in fetch.lock.sources] == ["ann/sql@v1", "bob/math"]

    def test_a_local_directory_is_copied(self, fetch: Fetching, tmp_path: Path) -> None:
        write_collection(tmp_path / "mine", plain(3))
        inner = sorted(path.name for path in (tmp_path / "mine").iterdir())
        (tmp_path / "mine" / inner[0] / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
        assert fetch(f"{tmp_path / 'mine'}/") == 0
        assert fetch.names == [f"mine/{name}" for name in inner]
        assert [entry.origin.license for entry in fetch.lock.adapters] == ["cc0-1.0", None, None]
        weights = tmp_path / "mine" / inner[0] / "adapter_model.safetensors"
        kept = fetch.directory / "mine" / inner[0] / "adapter_model.safetensors"
        assert kept.read_bytes() == weights.read_bytes()
        assert not kept.samefile(weights)  # a training that writes it anew must not change what the lock promised
        assert not fetch.hub.log.requests

    def test_local_directories_are_recorded_relative_to_the_lock(
        self, fetch: Fetching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_collection(tmp_path / "mine", plain(1))
        monkeypatch.chdir(tmp_path)
        assert fetch("./mine") == 0
        assert [source.source for source in fetch.lock.sources] == ["../mine"]
        (tmp_path / "list.txt").write_text("./mine\n")
        monkeypatch.chdir("/")
        assert fetch(f"@{tmp_path / 'list.txt'}", "--locked") == 0  # relative to the list

    def test_two_directories_of_one_name(self, fetch: Fetching, tmp_path: Path) -> None:
        for parent in ("x", "y"):
            write_collection(tmp_path / parent / "mine", plain(1), seed=ord(parent))
        assert fetch(str(tmp_path / "x" / "mine"), str(tmp_path / "y" / "mine")) == 0
        names = fetch.names
        assert len(names) == len(set(names)) == 2
        assert len(open_collection(fetch.directory).adapters) == 2

    def test_shards_are_brought_with_their_index(self, fetch: Fetching) -> None:
        files = adapter_files()
        weights = files.pop("adapter_model.safetensors")
        shard = "adapter_model-00001-of-00001.safetensors"
        keys = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")]).keys() - {"__metadata__"}
        index = {"metadata": {}, "weight_map": dict.fromkeys(keys, shard)}
        files |= {shard: weights, "adapter_model.safetensors.index.json": json.dumps(index).encode()}
        fetch.hub.catalogue.add(Repository.of("ann/sharded", files))
        assert fetch("ann/sharded") == 0
        assert f"ann/sharded/{shard}" in fetch.files()

    def test_a_sum_of_sources_says_what_base_models_they_have(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a")
        fetch.hub.catalogue.add(Repository.of("ann/b", adapter_files(1, base="org/other")))
        fetch("ann/a", "ann/b")
        assert "the adapters have 2 base models: org/base (1), org/other (1)" in fetch.err


class TestAgain:
    def test_nothing_is_downloaded_or_asked_and_the_lock_stays(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a", "ann/b")
        fetch("org:ann")
        lock = fetch.directory / LOCK_NAME
        os.utime(lock, ns=(0, 0))
        fetch.hub.log.clear()
        assert fetch("org:ann") == 0
        assert fetch.err.splitlines()[-1].endswith(": all as they should be, nothing to download")
        assert not fetch.hub.log.requests
        assert lock.stat().st_mtime_ns == 0
        assert fetch() == 0  # without sources: what the lock says
        assert not fetch.hub.log.requests

    def test_the_lock_holds_when_branches_move(self, fetch: Fetching) -> None:
        one, _ = serve(fetch.hub, "ann/a", "ann/b")
        fetch("org:ann")
        files = fetch.files()
        one.commit(adapter_files(9))
        assert fetch("org:ann") == 0
        assert fetch.files() == files

    def test_update_moves_on_and_says_what_changed(self, fetch: Fetching) -> None:
        one, two = serve(fetch.hub, "ann/a", "ann/b")
        fetch("org:ann")
        old = one.head
        one.commit({"adapter_model.safetensors": adapter_files(9)["adapter_model.safetensors"]})
        two.commit({"notes.txt": b"not needed"})
        report = fetch.json("--update")
        changes = {each["name"]: (each["status"], each["changed_files"]) for each in report["adapters"]}
        assert changes == {"ann/a": ("updated", ["adapter_model.safetensors"]), "ann/b": ("present", [])}
        assert fetch.files()["ann/a/adapter_model.safetensors"] == adapter_files(9)["adapter_model.safetensors"]
        assert {entry.origin.commit for entry in fetch.lock.adapters} == {one.head, two.head}
        one.commit({"adapter_model.safetensors": adapter_files(10)["adapter_model.safetensors"]})
        middle = one.head
        fetch("org:ann", "--update")
        assert f"  ann/a: {report['adapters'][0]['origin']['commit'][:7]} to {middle[:7]}" in fetch.err
        assert old != middle

    def test_updates_wait_for_each_other(self, fetch: Fetching) -> None:
        """Until all have arrived, the old lock and the old adapters hold together."""
        one, two = serve(fetch.hub, "ann/a", "ann/b")
        fetch("org:ann")
        lock, files = fetch.lock, fetch.files()
        one.commit(adapter_files(9))
        two.commit({"adapter_model.safetensors": b"no weights"})
        assert fetch("org:ann", "--update") == 3
        assert (fetch.lock, {name: data for name, data in fetch.files().items() if name[0] != "."}) == (lock, files)
        two.commit(adapter_files(10))
        fetch.hub.log.clear()
        assert fetch("org:ann", "--update") == 0
        assert not [name for name in fetch.downloaded() if name.startswith("ann/a/")]  # it had arrived before
        assert not (fetch.directory / ".lorazip-fetch").exists()

    @pytest.mark.parametrize("then", [["org:ann"], ["bob/c"], ["--locked"], []])
    def test_an_update_that_is_given_up_leaves_no_trace(self, fetch: Fetching, then: list[str]) -> None:
        one, two, _ = serve(fetch.hub, "ann/a", "ann/b", "bob/c")
        fetch("org:ann")
        files = fetch.files()
        one.commit(adapter_files(9))
        two.commit({"adapter_model.safetensors": b"no weights"})
        report = fetch.json("org:ann", "--update")
        assert fetch.code == 3
        assert report["adapters"] == []  # what has arrived is not in place
        assert "1 adapter arrived and will replace what is there when all have" in fetch.err
        assert fetch(*then) == 0
        assert {name: data for name, data in fetch.files().items() if name.startswith("ann/")} == files
        assert fetch("--locked") == 0

    def test_what_an_update_brought_needs_no_cache(self, fetch: Fetching, tmp_path: Path) -> None:
        one, two = serve(fetch.hub, "ann/a", "ann/b")
        fetch("org:ann")
        one.commit(adapter_files(9))
        two.commit({"adapter_model.safetensors": b"no weights"})
        fetch("org:ann", "--update")
        two.commit(adapter_files(10))
        shutil.rmtree(tmp_path / "hf")
        fetch.hub.log.clear()
        assert fetch("org:ann", "--update") == 0
        assert not [name for name in fetch.downloaded() if name.startswith("ann/a/adapter_model")]

    def test_an_unfinished_run_goes_on_at_the_same_commits(self, fetch: Fetching) -> None:
        (one,) = serve(fetch.hub, "ann/a")
        old = one.head
        assert fetch("ann/a", "ann/none") == 7
        one.commit(adapter_files(9))
        assert fetch("ann/a") == 0
        assert fetch.lock.adapters[0].origin.commit == old

    def test_what_only_an_unfinished_run_knows_is_too_much_for_locked(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a")
        fetch("org:ann")
        fetch.hub.catalogue.add(repository("ann/c", 3), Repository.of("ann/d", adapter_files(1, use_dora=True)))
        assert fetch("org:ann", "--update") == 3
        for _ in range(2):
            assert fetch("--locked") == 1
            (line,) = fetch.errors
            assert line.startswith(f"{fetch.directory / 'ann/c'}: {LOCK_NAME} has no such adapter (an unfinished fetch")

    def test_what_arrived_for_another_source_is_remembered(self, fetch: Fetching) -> None:
        """A run for ann/b alone must not make it forget that the folder ann/a is its own."""
        one, _ = serve(fetch.hub, "ann/a", "ann/b")
        assert fetch("ann/a", "ann/none") == 7
        one.commit(adapter_files(9))
        assert fetch("ann/b") == 0
        assert fetch.names == ["ann/b"]
        assert fetch("ann/a", "--update") == 0
        assert fetch.files()["ann/a/adapter_model.safetensors"] == adapter_files(9)["adapter_model.safetensors"]
        assert not (fetch.directory / ".lorazip-fetch").exists()

    def test_update_takes_what_a_local_directory_has_now(self, fetch: Fetching, tmp_path: Path) -> None:
        write_collection(tmp_path / "mine", plain(1))
        fetch(str(tmp_path / "mine"))
        (name,) = fetch.names
        write_collection(tmp_path / "again", plain(1), seed=1)
        (folder,) = (tmp_path / "mine").iterdir()
        weights = next((tmp_path / "again").rglob("*.safetensors")).read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(weights)  # of the same size
        assert fetch(str(tmp_path / "mine")) == 0
        assert fetch.files()[f"{name}/adapter_model.safetensors"] != weights
        assert fetch(str(tmp_path / "mine"), "--update") == 0
        assert fetch.files()[f"{name}/adapter_model.safetensors"] == weights

    def test_sources_add_up(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a", "ann/b")
        fetch("ann/a")
        fetch("ann/b")
        assert fetch.names == ["ann/a", "ann/b"]
        lock = fetch.lock
        assert [source.source for source in lock.sources] == ["ann/a", "ann/b"]
        fetch("ann/a")
        assert fetch.lock == lock

    def test_prune_removes_what_is_not_named(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a", "ann/b", "bob/c")
        fetch("ann/a", "ann/b", "bob/c")
        report = fetch.json("ann/a", "--prune")
        assert report["removed"] == ["ann/b", "bob/c"]
        assert fetch.names == ["ann/a"]
        assert {path.name for path in fetch.directory.iterdir()} == {"ann", LOCK_NAME}

    def test_prune_keeps_what_people_have_changed(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a", "ann/b")
        fetch("ann/a", "ann/b")
        (fetch.directory / "ann" / "b" / "notes.txt").write_text("mine")
        assert fetch("ann/a", "--prune") == 6
        assert fetch.names == ["ann/a", "ann/b"]
        assert (fetch.directory / "ann" / "b" / "notes.txt").exists()

    def test_a_deleted_adapter_is_restored_from_the_cache(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a")
        fetch("ann/a")
        files = fetch.files()
        for path in (fetch.directory / "ann" / "a").iterdir():
            path.unlink()
        (fetch.directory / "ann" / "a").rmdir()
        fetch.hub.log.clear()
        assert fetch() == 0
        assert fetch.files() == files
        assert not fetch.hub.log.requests

    def test_a_missing_file_is_restored(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a")
        fetch("ann/a")
        files = fetch.files()
        (fetch.directory / "ann" / "a" / "README.md").unlink()
        report = fetch.json("ann/a")
        assert fetch.files() == files
        assert [each["status"] for each in report["adapters"]] == ["restored"]

    def test_a_changed_file_is_not_overwritten_without_force(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a")
        fetch("ann/a")
        files = fetch.files()
        config = fetch.directory / "ann" / "a" / "adapter_config.json"
        config.unlink()
        config.write_text("{}")
        assert fetch("ann/a") == 6
        assert config.read_text() == "{}"
        assert fetch("ann/a", "--force") == 0
        assert fetch.files() == files

    @pytest.mark.parametrize("what", ["file", "link", "dangling link", "file above"])
    def test_somebody_elses_file_or_link_is_not_taken(self, fetch: Fetching, tmp_path: Path, what: str) -> None:
        serve(fetch.hub, "ann/a", "bob/b")
        place = fetch.directory / "ann" / "a"
        if what == "file above":
            place = place.parent
        place.parent.mkdir(parents=True)
        if "file" in what:
            place.write_text("precious")
        else:
            place.symlink_to(tmp_path if what == "link" else tmp_path / "nowhere")
        assert fetch("ann/a", "bob/b") == 6
        assert len(fetch.errors) == 1
        assert place.is_symlink() or place.read_text() == "precious"
        assert (fetch.directory / "bob" / "b" / "adapter_config.json").exists()

    def test_somebody_elses_folder_is_not_taken(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a")
        (fetch.directory / "ann" / "a").mkdir(parents=True)
        (fetch.directory / "ann" / "a" / "adapter_config.json").write_text("{}")
        assert fetch("ann/a") == 6
        assert fetch.files() == {"ann/a/adapter_config.json": b"{}"}

    def test_what_is_there_already_byte_for_byte_is_taken(self, fetch: Fetching) -> None:
        """After a lost lock, say."""
        serve(fetch.hub, "ann/a")
        fetch("ann/a")
        (fetch.directory / LOCK_NAME).unlink()
        fetch.hub.log.clear()
        assert fetch("ann/a") == 0
        assert fetch.names == ["ann/a"]
        assert not [name for name in fetch.downloaded() if "config" not in name]


class TestSkipped:
    """What an option left out is not settled by it: the next run without the option asks again."""

    def test_a_bad_commit(self, fetch: Fetching) -> None:
        one, _ = serve(fetch.hub, "ann/a", "ann/b")
        fetch("ann/a", "ann/b")
        files, good = fetch.files(), fetch.lock.adapters
        one.commit({"adapter_model.safetensors": b"no weights"})
        assert fetch("--update", "--skip-bad") == 0
        assert (fetch.files(), fetch.lock.adapters) == (files, good)
        assert "left out: 1" in fetch.err
        assert fetch("ann/a", "ann/b", "--prune", "--skip-bad") == 0
        assert "left out: 1" in fetch.err
        assert fetch.files() == files
        assert fetch("ann/a", "ann/b") == 0  # the commit of the lock is good
        assert "left out" not in fetch.err
        assert fetch.lock.sources[0].left_out == []

    def test_one_that_is_refused_now(self, fetch: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        serve(fetch.hub, "ann/a")
        serve(fetch.hub, "ann/private", private=True, readers=frozenset({"ann"}))
        monkeypatch.setenv("HF_TOKEN", "hf_secretofann")
        fetch("ann/private", "ann/a")
        files = fetch.files()
        monkeypatch.delenv("HF_TOKEN")
        assert fetch("ann/private", "ann/a", "--update", "--prune", "--skip-bad") == 0
        assert fetch.files() == files

    def test_one_that_was_too_large(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a")
        fetch.hub.catalogue.add(Repository.of("ann/large", adapter_files(1) | {"README.md": bytes(2000)}))
        fetch("org:ann", "--max-size", "2KB")
        assert fetch.names == ["ann/a"]
        assert fetch("org:ann", "--max-size", "2KB") == 0
        assert "left out: 1" in fetch.err
        assert fetch("org:ann") == 0
        assert fetch.names == ["ann/a", "ann/large"]

    def test_the_lock_is_the_same_whatever_answers_first(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a")
        bad = [f"ann/bad{n}" for n in range(12)]
        fetch.hub.catalogue.add(
            *(Repository.of(id, adapter_files(n) | {"adapter_model.safetensors": b""}) for n, id in enumerate(bad))
        )
        locks = set()
        for _ in range(4):
            assert fetch("org:ann", "--skip-bad") == 0
            locks.add((fetch.directory / LOCK_NAME).read_bytes())
            shutil.rmtree(fetch.directory)
        assert len(locks) == 1


class TestLocked:
    def test_into_an_empty_directory_it_is_the_same(self, fetch: Fetching, tmp_path: Path) -> None:
        one, *_ = serve(fetch.hub, "ann/a", "ann/b")
        fetch("org:ann")
        one.commit(adapter_files(9))
        there = Fetching(fetch.hub, tmp_path / "there", fetch.capsys)
        there.directory.mkdir()
        (there.directory / LOCK_NAME).write_bytes((fetch.directory / LOCK_NAME).read_bytes())
        assert there("--locked") == 0
        assert there.files() == fetch.files()
        assert there.lock == fetch.lock

    def test_the_hub_is_asked_for_files_only(
        self, fetch: Fetching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:

        serve(fetch.hub, "ann/a")
        fetch("ann/a")
        there = Fetching(fetch.hub, tmp_path / "there", fetch.capsys)
        there.directory.mkdir()
        (there.directory / LOCK_NAME).write_bytes((fetch.directory / LOCK_NAME).read_bytes())
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other"))
        fetch.hub.log.clear()
        assert there("ann/a", "--locked") == 0
        assert not fetch.hub.log.where(lambda request: request.path.startswith("/api/"))

    def test_other_sources_than_the_lock_has(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a", "ann/b")
        fetch("ann/a")
        assert fetch("ann/a", "ann/b", "--locked") == 1
        assert fetch.errors == [
            f"{fetch.directory / LOCK_NAME} was made without 'ann/b', or with other filters"
            " (fetch without --locked to add it)"
        ]

    def test_an_adapter_that_the_lock_does_not_have(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a")
        fetch("ann/a")
        write_collection(fetch.directory / "mine", plain(1))
        assert fetch() == 0
        assert "has adapters that were not fetched, such as 'mine/" in fetch.err
        assert fetch("--locked") == 1
        (line,) = fetch.errors
        assert line.endswith(f": {LOCK_NAME} has no such adapter (move it away)")

    def test_where_all_is_there_no_workspace_is_made(self, fetch: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        serve(fetch.hub, "ann/a")
        fetch("ann/a")
        monkeypatch.setattr(run, "Workspace", None)
        assert fetch("--locked") == 0

    def test_it_does_not_finish_what_a_killed_run_began(self, fetch: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
        (one,) = serve(fetch.hub, "ann/a")
        fetch("ann/a")
        lock, files = fetch.lock, fetch.files()
        one.commit(adapter_files(9))
        with monkeypatch.context() as patch:
            patch.setattr(workspace.Workspace, "_take_away", lambda self, name: 1 / 0)
            assert fetch("ann/a", "--update") == 70
        assert (fetch.directory / ".lorazip-fetch" / LOCK_NAME).exists()
        assert fetch("--locked") == 0
        assert (fetch.lock, {name: fetch.files()[name] for name in files}) == (lock, files)


class TestOutput:
    def test_a_dry_run_says_what_would_be_and_changes_nothing(self, fetch: Fetching) -> None:
        one, _ = serve(fetch.hub, "ann/a", "ann/b")
        assert fetch("org:ann", "--dry-run") == 0
        size = sum(len(adapter_files(0)[name]) for name in NEEDED)
        head, first, _, total = fetch.out.splitlines()
        assert head.split() == ["adapter", "commit", "files", "size", "base", "model", "status"]
        assert first.split() == ["ann/a", one.head[:7], "3", str(size), "bytes", BASE, "new"]
        assert total.startswith("2 adapters, ")
        assert not fetch.directory.exists()
        assert not [name for name in fetch.downloaded() if "safetensors" in name]

    def test_json_is_one_object_of_its_schema(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a")
        for arguments in (["ann/a", "ann/none", "--dry-run"], ["ann/a", "ann/none"], ["ann/a"], ["ann/a"]):
            report = fetch.json(*arguments)
            jsonschema.validate(report, schemas.schema("fetch-1"))
            assert report["summary"]["failures"] == len(report["failures"]) == fetch.err.count("lorazip: error: ")
            assert report["complete"] == (fetch.code == 0 and "--dry-run" not in arguments)
        assert set(FetchReport.__struct_fields__) == set(report)

    def test_quiet_says_nothing(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a")
        assert fetch("ann/a", "-q") == 0
        assert (fetch.out, fetch.err) == ("", "")

    def test_the_lock_is_for_people_and_version_control(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a")
        fetch("ann/a")
        text = (fetch.directory / LOCK_NAME).read_text()
        jsonschema.validate(json.loads(text), schemas.schema("lock-1"))
        assert text.startswith('{\n  "adapters": [\n')
        assert os.stat(fetch.directory / LOCK_NAME).st_mode & 0o777 == 0o666 & ~_umask()
        assert str(fetch.directory) not in text

    def test_permissions_are_those_of_the_umask(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a")
        fetch("ann/a")
        for path in (fetch.directory / "ann" / "a").iterdir():
            assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


class TestSafety:
    HOSTILE = ("../evil", "/abs", "a/../../b", "CON", "nul.txt", "x\ny", "a\\b", "trailing.", "é", "sub", "Sub", "SUB")

    def test_no_path_of_a_repository_escapes_or_collides(self, fetch: Fetching, tmp_path: Path) -> None:
        folders = [*self.HOSTILE, unicodedata.normalize("NFD", "é"), "\u017fub", ".hidden", "a" * 200]
        files = {f"{folder}/{name}": data for folder in folders for name, data in adapter_files(1).items()}
        fetch.hub.catalogue.add(Repository.of("ann/evil", files))
        before = sorted(path.name for path in tmp_path.iterdir())
        assert fetch("ann/evil") == 0
        assert sorted({*before, "adapters", "hf"}) == sorted(path.name for path in tmp_path.iterdir())
        folded = [unicodedata.normalize("NFC", name).casefold() for name in fetch.names]
        assert len(folded) == len(set(folded)) == len(folders) - fetch.err.count("the path of its folder is unsafe")
        for name in fetch.names:
            assert name.startswith("ann/evil--")
            assert name.isascii()
            assert (fetch.directory / name / "adapter_config.json").is_file()
        assert len(open_collection(fetch.directory).adapters) == len(folded)

    def test_a_link_on_the_way_is_not_followed(self, fetch: Fetching, tmp_path: Path) -> None:
        serve(fetch.hub, "ann/a")
        (tmp_path / "outside").mkdir()
        fetch.directory.mkdir()
        (fetch.directory / "ann").symlink_to(tmp_path / "outside")
        assert fetch("ann/a") == 2
        link = fetch.directory / "ann"
        assert fetch.errors == [f"{link} is a link, and adapters would go where it leads (remove it)"]
        assert not list((tmp_path / "outside").iterdir())

    @pytest.mark.parametrize("what", [".lorazip-fetch", "work", "held", "old", "journal.jsonl", LOCK_NAME])
    def test_links_in_its_own_folder_are_not_followed(self, fetch: Fetching, tmp_path: Path, what: str) -> None:
        serve(fetch.hub, "ann/a")
        victim = tmp_path / "victim"
        for name in ("work", "old", "held"):
            (victim / name).mkdir(parents=True)
        (victim / "file").write_text("precious")
        own = fetch.directory / ".lorazip-fetch"
        link = own if what == own.name else own / what
        link.parent.mkdir(parents=True)
        link.symlink_to(victim if "." not in what or link == own else victim / "file")
        assert fetch("ann/a") == 2
        assert fetch.errors == [f"{link} is a link, and lorazip keeps its own files there (remove it)"]
        assert sorted(path.name for path in victim.iterdir()) == ["file", "held", "old", "work"]
        assert (victim / "file").read_text() == "precious"

    def test_half_a_lock_in_its_own_folder_is_no_obstacle(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a")
        (fetch.directory / ".lorazip-fetch").mkdir(parents=True)
        (fetch.directory / ".lorazip-fetch" / LOCK_NAME).write_text('{"schema": "lorazip.lock/1", "sou')
        assert fetch("ann/a") == 0
        assert not (fetch.directory / ".lorazip-fetch").exists()

    def test_a_directory_that_is_a_link_itself(
        self, fetch: Fetching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_collection(tmp_path / "mine", plain(1))
        (tmp_path / "real" / "deep").mkdir(parents=True)
        fetch.directory.symlink_to(tmp_path / "real" / "deep")
        monkeypatch.chdir(tmp_path)
        assert fetch("./mine") == 0
        assert fetch("--update") == 0
        shutil.rmtree(tmp_path / "real" / "deep" / "mine")
        assert fetch("--locked") == 0

    def test_a_commit_made_while_fetching_changes_nothing(self, fetch: Fetching) -> None:
        (one,) = serve(fetch.hub, "ann/a")
        head = one.head
        fetch.hub.faults.add(Call(lambda: one.commit(adapter_files(9))), path="/resolve/", times=1)
        assert fetch("ann/a") == 0
        assert fetch.lock.adapters[0].origin.commit == head
        assert fetch.files()["ann/a/adapter_model.safetensors"] == adapter_files(0)["adapter_model.safetensors"]

    def test_a_corrupt_file_in_the_cache_is_fetched_anew(self, fetch: Fetching, tmp_path: Path) -> None:
        serve(fetch.hub, "ann/a")
        fetch("ann/a")
        for path in (tmp_path / "hf").rglob("blobs/*"):
            path.unlink()
            path.write_bytes(b"rotten")
        for path in (fetch.directory / "ann" / "a").iterdir():
            path.unlink()
        assert fetch() == 0
        assert fetch.files() == {f"ann/a/{name}": adapter_files(0)[name] for name in NEEDED}

    def test_files_are_linked_from_the_cache(self, fetch: Fetching) -> None:
        serve(fetch.hub, "ann/a")
        fetch("ann/a")
        assert all(path.stat().st_nlink == 2 for path in (fetch.directory / "ann" / "a").iterdir())


def test_what_was_fetched_goes_through_the_chain(fetch: Fetching, tmp_path: Path) -> None:
    one, *_ = serve(fetch.hub, "ann/a", "ann/b", "ann/c")
    fetch("org:ann")
    bundle = str(tmp_path / "bundle")
    assert main(["compress", str(fetch.directory), "-o", bundle, "--rank", "2", "-q"]) == 0
    assert main(["verify", bundle, "--against", str(fetch.directory), "-q"]) == 0
    fetch.capsys.readouterr()
    assert main(["info", bundle]) == 0
    assert f"ann/a@{one.head[:7]}" in fetch.capsys.readouterr().out


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


class TestLocal:
    """What is fetched of a directory of the user's own, links followed, and what of it is left out."""

    def test_checkpoints_below_an_adapter_are_left_out_and_said(self, fetch: Fetching, tmp_path: Path) -> None:
        for number, name in enumerate(("run1", "run1/checkpoint-100", "run1/x/checkpoint-200", "run2")):
            write_files(tmp_path / "mine" / name, adapter_files(number))
        report = fetch.json(str(tmp_path / "mine"))
        assert fetch.names == ["mine/run1", "mine/run2"]
        assert left_out(report) == {
            f"{tmp_path}/mine/run1/…": "2 more adapters in folders of an adapter; name a folder to have it"
        }
        assert fetch(str(tmp_path / "mine" / "run1" / "checkpoint-100")) == 0
        assert "local/checkpoint-100" in fetch.names

    def test_checkpoints_below_the_directory_itself(self, fetch: Fetching, tmp_path: Path) -> None:
        write_files(tmp_path / "mine", adapter_files())
        write_files(tmp_path / "mine" / "checkpoint-1", adapter_files(1))
        report = fetch.json(str(tmp_path / "mine"))
        assert fetch.names == ["local/mine"]
        assert list(left_out(report)) == [f"{tmp_path}/mine/…"]

    def test_of_a_repository_it_is_the_same(self, fetch: Fetching) -> None:
        folders = ("run1", "run1/checkpoint-1", "run2")
        files = {f"{folder}/{name}": data for folder in folders for name, data in adapter_files().items()}
        fetch.hub.catalogue.add(Repository.of("ann/runs", files))
        report = fetch.json("ann/runs")
        assert fetch.names == ["ann/runs--run1", "ann/runs--run2"]
        assert left_out(report) == {
            "ann/runs/run1/…": "1 more adapter in folders of an adapter; name a folder to have it"
        }

    def test_links_are_followed_and_what_they_lead_to_is_copied(self, fetch: Fetching, tmp_path: Path) -> None:
        mine, store = tmp_path / "mine", tmp_path / "store"
        write_files(store / "one", adapter_files(1))
        write_files(store / "two", adapter_files(2))
        write_files(mine / "cached", {"README.md": b"A card."})
        (mine / "one").symlink_to(store / "one")
        (mine / "again").symlink_to("one")
        (mine / "gone").symlink_to("nothing")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (mine / "cached" / name).symlink_to(f"../../store/two/{name}")
        report = fetch.json(str(mine))
        assert fetch.names == ["mine/again", "mine/cached"]
        assert left_out(report) == {
            f"{mine}/one": "the same folder as 'again'",
            f"{mine}/gone": "a link to nothing",
        }
        assert not any(path.is_symlink() for path in fetch.directory.rglob("*"))
        there = fetch.files()
        assert there["mine/cached/adapter_model.safetensors"] == adapter_files(2)["adapter_model.safetensors"]
        assert fetch("--locked") == 0
        shutil.rmtree(fetch.directory / "mine" / "cached")
        assert fetch() == 0
        assert fetch.files() == there

    def test_a_link_into_the_output_is_refused(self, fetch: Fetching, tmp_path: Path) -> None:
        """Else every run would bring what the last one brought."""
        write_files(fetch.directory / "ann" / "a", adapter_files())
        write_files(tmp_path / "mine" / "b", adapter_files(1))
        (tmp_path / "mine" / "all").symlink_to(fetch.directory)
        assert fetch(str(tmp_path / "mine")) == 2
        where = f"'{tmp_path}/mine/all/ann/a' is in -o {str(fetch.directory)!r}"
        assert fetch.errors == [f"{where} (choose another -o, or remove the link)"]

    def test_a_name_that_is_no_text(self, fetch: Fetching, tmp_path: Path) -> None:
        write_files(tmp_path / "mine" / "a", adapter_files())
        write_files(tmp_path / "mine" / os.fsdecode(b"\xff"), adapter_files(1))
        assert fetch(str(tmp_path / "mine")) == 3
        assert fetch.errors[0].endswith("the name of its folder is not UTF-8 (rename it)")

    @pytest.mark.parametrize("local", [True, False])
    def test_weights_beside_an_adapter_are_named(self, fetch: Fetching, tmp_path: Path, local: bool) -> None:
        others = dict.fromkeys(("a.pt", "b.bin", "c.pth", "d.npz"), b"weights")
        files = adapter_files() | others | {"training_args.bin": b"", "adapter_model.bin": b""}
        write_files(tmp_path / "mine" / "a", files)
        fetch.hub.catalogue.add(Repository.of("ann/a", files))
        report = fetch.json(str(tmp_path / "mine") if local else "ann/a")
        assert left_out(report) == {
            f"{tmp_path}/mine/a" if local else "ann/a": (
                "a.pt, b.bin, c.pth and 1 more: beside the adapter, and not fetched with it"
            )
        }
        assert len(fetch.names) == 1
        assert fetch("--locked") == 0
