"""lorazip.lock: what is written is read back, the same bytes from the same content, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from testing import schemas

from lorazip_core.adapter.lock import (
    LOCK_NAME,
    Filters,
    LeftOut,
    Lock,
    LockedAdapter,
    LockedFile,
    LockedSource,
    Origin,
    encode_lock,
    is_inner_path,
    read_lock,
    read_strictly,
)
from lorazip_core.base.errors import LorazipError, Unsupported, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FULL = Lock(
    sources=[
        LockedSource(
            source="org:alice",
            filters=Filters(base_model="org/base", search="sql", tags=("lora",), limit=3),
            adapters=["alice/sql"],
            left_out=[LeftOut("alice/full", "no adapter_config.json")],
        ),
        LockedSource(source="./mine", filters=None, adapters=["mine/ünïcode"], left_out=[]),
    ],
    adapters=[
        LockedAdapter(
            name="alice/sql",
            origin=Origin(repository="alice/sql", revision="v1", commit=COMMIT, subfolder="x/y", license="mit"),
            base_model="org/base",
            files=[LockedFile("adapter_config.json", 20, "0" * 64), LockedFile("README.md", 22, "2" * 64)],
        ),
        LockedAdapter(name="mine/ünïcode", origin=Origin(directory="./mine"), base_model=None, files=[]),
    ],
)


def write(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda fields: None) -> Path:
    """The lock FULL in a folder, changed; returns the folder."""
    fields = json.loads(encode_lock(FULL))
    change(fields)
    (folder / LOCK_NAME).write_text(json.dumps(fields))
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_bytes(encode_lock(FULL))
    assert read_lock(tmp_path) == FULL
    assert FULL.adapters[0].size_bytes == 42


def test_no_lock_is_none(tmp_path: Path) -> None:
    assert read_lock(tmp_path) is None


def test_the_bytes_can_be_compared_and_read_by_people() -> None:
    data = encode_lock(FULL)
    fields = json.loads(data)
    assert data.decode() == json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert "ünïcode" in data.decode()
    assert fields["schema"] == "lorazip.lock/1"
    jsonschema.validate(fields, schemas.schema("lock-1"))


@pytest.mark.parametrize(
    "change",
    [
        lambda lock: lock.pop("schema"),
        lambda lock: lock.update(schema="lorazip.lock/2"),
        lambda lock: lock["adapters"][0].pop("files"),
        lambda lock: lock["adapters"][0]["origin"].update(commit=COMMIT[:7]),
        lambda lock: lock["adapters"][0]["files"][0].update(path="../x"),
    ],
)
def test_its_schema_refuses_what_is_not_one(change: Callable[[dict[str, Any]], Any]) -> None:
    fields = json.loads(encode_lock(FULL))
    change(fields)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(fields, schemas.schema("lock-1"))


def test_fields_from_the_future_are_ignored(tmp_path: Path) -> None:
    def add(fields: dict[str, Any]) -> None:
        for place in (fields, *fields["sources"], *fields["adapters"], *(a["origin"] for a in fields["adapters"])):
            place["a_field_from_the_future"] = [1]
        fields["adapters"][0]["files"][0]["mode"] = 0o644

    assert read_lock(write(tmp_path, add)) == FULL


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"lorazip.lock/1"',
        b"\xff",
        b'{"schema": "\\ud800"}',
        b'{"schema": "lorazip.lock/1", "sources": [], "adapters": [], "x": "\\udc00 alone"}',
        b"[" * 100_000,
        b"<<<<<<< ours\n{}\n",
    ],
)
def test_what_is_no_json_of_a_lock_is_refused_on_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / LOCK_NAME).write_bytes(data)
    refused(tmp_path, UsageError, "not a lock of lorazip")


@pytest.mark.parametrize(
    "change",
    [
        lambda lock: lock.pop("schema"),
        lambda lock: lock.update(schema=None),
        lambda lock: lock.update(schema=1),
        lambda lock: lock.update(schema="lorazip.clusters/1"),
        lambda lock: lock.pop("adapters"),
        lambda lock: lock["adapters"][0].pop("origin"),
        lambda lock: lock["adapters"][0]["origin"].update(commit="main"),
        lambda lock: lock["adapters"][0]["files"][0].update(size_bytes=-1),
        lambda lock: lock["adapters"][0]["files"][0].update(sha256="0" * 63),
        lambda lock: lock["adapters"][0]["files"][0].update(path="../adapter_config.json"),
        lambda lock: lock["adapters"][0]["files"][0].update(path=".hidden"),
    ],
)
def test_a_field_that_is_wrong_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    refused(write(tmp_path, change), UsageError, "not a lock of lorazip")


@pytest.mark.parametrize("schema", ["lorazip.lock/2", "lorazip.lock/10", "lorazip.lock/"])
def test_another_version_is_refused_as_such(tmp_path: Path, schema: str) -> None:
    refused(write(tmp_path, lambda lock: lock.update(schema=schema, adapters="of another kind")), Unsupported, schema)


@pytest.mark.parametrize(
    "name", ["..", "../x", "a/../../x", "/absolute", "", ".", "a//b", "a/", "./a", "a\\b", "a\0b", "a\nb"]
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    assert not is_inner_path(name)
    refused(write(tmp_path, lambda lock: lock["adapters"][1].update(name=name)), UsageError, "no folder below it")


def test_two_adapters_of_one_name_are_refused(tmp_path: Path) -> None:
    """As a merge of two branches could leave them: which one counts would be a guess."""
    refused(write(tmp_path, lambda lock: lock["adapters"][1].update(name="alice/sql")), UsageError, "two adapters")


@pytest.mark.parametrize("name", ["a", "a/b", "a..b/...", "-o", "a b", "日本語/ünïcode", ".hidden"])
def test_any_other_name_will_do(tmp_path: Path, name: str) -> None:
    assert is_inner_path(name)
    lock = read_lock(write(tmp_path, lambda lock: lock["adapters"][1].update(name=name)))
    assert lock is not None
    assert lock.adapters[1].name == name


def refused(folder: Path, failure: type[LorazipError], words: str) -> None:
    """Reading the lock raises this, in one line that names the file and says what to do."""
    with pytest.raises(failure) as caught:
        read_lock(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder / LOCK_NAME}: ")
    assert words in text
    assert "\n" not in text
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lock: lock["adapters"][0].update(name=".git/hooks"), "'.git/hooks' is no folder below it"),
        (lambda lock: lock["adapters"][0].update(name=LOCK_NAME), f"'{LOCK_NAME}' is no folder below it"),
        (lambda lock: lock["adapters"][0].update(name="mine"), "is inside another adapter, 'mine'"),
        (lambda lock: lock["adapters"][0].update(name="MINE/Ünïcode"), "it has the adapter 'mine/ünïcode' twice"),
        (lambda lock: lock["adapters"][0].update(files=[]), "has no adapter_config.json"),
        (lambda lock: lock["adapters"][0]["files"].append(lock["adapters"][0]["files"][0]), "or a file twice"),
        (lambda lock: lock["adapters"][0]["origin"].update(commit=None), "comes neither from a repository"),
        (lambda lock: lock["adapters"][0]["origin"].update(directory="x"), "comes neither from a repository"),
        (lambda lock: lock["adapters"][1]["origin"].update(directory=None), "comes neither from a repository"),
        (lambda lock: lock["adapters"][0]["origin"].update(repository="../../x"), "'../../x' is no repository"),
        (lambda lock: lock["adapters"][0]["origin"].update(subfolder="../.."), "'../..' is no subfolder"),
        (lambda lock: lock["sources"].append(lock["sources"][0]), "it has the source 'org:alice' 2 times"),
        (lambda lock: lock["sources"][0]["adapters"].append("x/y"), "has 'x/y', which is none of its adapters"),
    ],
)
def test_who_writes_by_it_reads_it_strictly(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    def with_files(fields: dict[str, Any]) -> None:
        fields["adapters"][1]["files"] = fields["adapters"][0]["files"][:1]
        for source in fields["sources"]:
            source["adapters"] = []

    def both(fields: dict[str, Any]) -> None:
        with_files(fields)
        change(fields)

    assert read_strictly(write(tmp_path, with_files)) is not None
    with pytest.raises(UsageError, match=re.escape(words)):
        read_strictly(write(tmp_path, both))


@pytest.mark.parametrize("size", [2**63, 10**400])
def test_absurd_numbers_are_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError):
        read_lock(write(tmp_path, lambda lock: lock["adapters"][0]["files"][0].update(size_bytes=size)))


def test_a_line_feed_at_the_end_is_no_digest(tmp_path: Path) -> None:
    for field in ("sha256", "path"):
        with pytest.raises(UsageError):
            read_lock(write(tmp_path, lambda lock, field=field: _append(lock["adapters"][0]["files"][0], field)))


def _append(fields: dict[str, Any], field: str) -> None:
    fields[field] += "\n"
