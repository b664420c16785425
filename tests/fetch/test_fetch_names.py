"""Folder names of fetched adapters: distinct on any file system, portable, the same whatever the order."""

from __future__ import annotations

import random
import re
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from lorazip_core.adapter.lock import Origin, is_inner_path
from lorazip_core.fetch.names import give_names, identity
from lorazip_core.fetch.requested import RequestedAdapter

part = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\"), min_size=1, max_size=8).filter(
    lambda text: text not in (".", "..")
)
odd = st.sampled_from(["con", "CON", "aux.txt", "a", "A", "ä", "a\u0308", "ſ", "s", "x.", "-x", ".x", "b--c", "b", "c"])  # noqa: RUF001
subfolder = st.lists(part | odd, max_size=3).map("/".join)
repository = st.builds(
    "{}/{}".format, st.sampled_from(["ann", "Ann", "bob"]), st.sampled_from(["x", "X", "x.y", "con"])
)
hub = st.builds(
    lambda repository, subfolder, revision: Origin(repository=repository, subfolder=subfolder, revision=revision),
    repository,
    subfolder,
    st.sampled_from([None, "v1", "refs/pr/1"]),
)
local = st.builds(
    lambda directory, subfolder: Origin(directory=directory, subfolder=subfolder),
    st.sampled_from(["../ann", "/ann", "../x/ann", "../ann/", ".."]),
    subfolder,
)
origins = st.lists(hub | local, unique_by=identity, max_size=12)


def names(origins: list[Origin], taken: dict[tuple[str, str, str], str] | None = None) -> dict[Origin, str]:
    wanted = [RequestedAdapter(origin, None, ()) for origin in origins]
    return {wanted.origin: wanted.name for wanted in give_names(wanted, taken or {})}


def folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@given(origins)
def test_they_are_distinct_and_none_is_inside_another(origins: list[Origin]) -> None:
    found = list(names(origins).values())
    assert len({folded(name) for name in found}) == len(origins)
    assert all(name.count("/") == 1 for name in found)


@given(origins)
def test_every_part_is_portable(origins: list[Origin]) -> None:
    for name in names(origins).values():
        assert is_inner_path(name)
        for part in name.split("/"):
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@+=-]*", part)
            assert not part.endswith(".")
            assert part.split(".")[0].lower() not in {"con", "aux", "nul", "prn", "com1"}
            assert len(part) < 200


@given(origins, st.randoms(use_true_random=False))
def test_the_order_does_not_matter(origins: list[Origin], chance: random.Random) -> None:
    shuffled = list(origins)
    chance.shuffle(shuffled)
    assert names(shuffled) == names(origins)


@given(origins, st.integers(0, 12))
def test_who_has_a_name_keeps_it_when_others_come(origins: list[Origin], count: int) -> None:
    before = names(origins[:count])
    after = names(origins, {identity(origin): name for origin, name in before.items()})
    assert {origin: after[origin] for origin in before} == before
    assert len({folded(name) for name in after.values()}) == len(origins)


def test_they_are_readable() -> None:
    expected = {
        Origin(repository="ann/sql-lora"): "ann/sql-lora",
        Origin(repository="ann/many", subfolder="a/b"): "ann/many--a--b",
        Origin(directory="../mine", subfolder="x/y"): "mine/x--y",
        Origin(directory="/data/mine"): "local/mine",
    }
    assert names(list(expected)) == expected
