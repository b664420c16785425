"""Names that someone may have meant, out of few and of very many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lorazip_core.bundle import near
from lorazip_core.bundle.near import NearNames, did_you_mean

MANY = NearNames(f"customer-{number}" for number in range(10_000))
SLIPS: list[Callable[[str, int], str]] = [
    lambda name, at: name[:at] + name[at + 1 :],
    lambda name, at: f"{name[:at]}x{name[at:]}",
    lambda name, at: f"{name[:at]}x{name[at + 1 :]}",
    lambda name, at: name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
]


@pytest.mark.parametrize("slip", SLIPS)
def test_one_of_very_many_is_found_wherever_the_slip_is_in_its_word(slip: Callable[[str, int], str]) -> None:
    for name in ("customer-7", "customer-4711"):
        for at in range(len("custome")):  # a swap takes the letter after it, too
            assert MANY.find(slip(name, at), 1, 0.75) == [name]


@pytest.mark.parametrize(
    ("names", "wrong", "most", "found"),
    [
        (["b", "svd", "svd2"], "svdd", 1, ["svd"]),
        (["b", "svd", "svd2"], "svdd", 3, ["svd", "svd2"]),
        (["svd"], "other", 1, []),
        (["svd"], "", 1, []),
        ([], "svd", 1, []),
        ([f"{first}-name" for first in "abcdefghijklmnopqrstuvwxyz0123456"], "0-names", 1, ["0-name"]),
    ],
)
def test_the_likest_come_first(names: list[str], wrong: str, most: int, found: list[str]) -> None:
    assert NearNames(names).find(wrong, most, 0.75) == found


def test_a_name_is_compared_with_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a server of thousands of adapters would be slow for all while somebody asks for wrong ones."""
    compared = []

    def matches(word: str, possible: list[str], *others: Any) -> list[str]:
        compared.append(len(possible))
        return []

    monkeypatch.setattr(near, "get_close_matches", matches)
    for wrong in ("customr-7", "", "zzz", "customer-", "7", "x" * 20):
        MANY.find(wrong, 1, 0.75)
    NearNames(f"customer-{number}" for number in range(33)).find("customer", 1, 0.75)
    assert max(compared) <= 32
    del compared[:]
    MANY.find("customer-7" * 1000, 1, 0.75)  # whose length alone says that none is like it
    assert compared == []


def test_length_alone_excludes_nothing_that_is_near() -> None:
    assert NearNames(["abcdef"]).find("abcdef1234", 1, 0.75) == ["abcdef"]  # 2 · 6 / 16
    assert NearNames(["abcdef"]).find("abcdef12345", 1, 0.75) == []


def test_the_question() -> None:
    assert did_you_mean(["a"]) == "did you mean 'a'?"
    assert did_you_mean(["a", "b", "c"]) == "did you mean 'a' or 'b' or 'c'?"
