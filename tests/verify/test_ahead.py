"""Files unpacked ahead: in order, few at a time, and only those that are asked for."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from typing import Any

import pytest

from lorazip_core.verify.ahead import FILES, Ahead


class _Files:
    """As a bundle, the files of which are their own names."""

    def __init__(self) -> None:
        self.unpacked: list[str] = []

    def unpacked_in(self, path: str) -> str:
        self.unpacked.append(path)
        if path == "bad":
            raise OSError(path)
        return path


class _AtOnce(Executor):
    """Does everything when it is submitted."""

    def submit(self, function: Any, /, *arguments: Any, **words: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **words))
        except OSError as error:
            future.set_exception(error)
        return future


def test_a_few_are_unpacked_before_they_are_asked_for() -> None:
    files, paths = _Files(), list("abcdefghij")
    ahead = Ahead(files, paths, _AtOnce())
    assert files.unpacked == paths[:FILES]
    for number, path in enumerate(paths, 1):
        assert ahead(path) == ahead(path) == path
        assert files.unpacked == paths[: FILES + number]


def test_others_are_passed_over_and_some_come_again() -> None:
    """Adapters of one file may have several layouts, and come in several blocks; some cannot be read."""
    ahead = Ahead(_Files(), ["a", "bad", "c", "a", "b"], _AtOnce())
    assert [ahead(path) for path in ("a", "c", "a", "b")] == ["a", "c", "a", "b"]


def test_what_cannot_be_unpacked_says_so_when_it_is_asked_for() -> None:
    ahead = Ahead(_Files(), ["a", "bad"], _AtOnce())
    assert ahead("a") == "a"
    with pytest.raises(OSError, match="bad"):
        ahead("bad")
