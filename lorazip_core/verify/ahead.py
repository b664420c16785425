"""Files of several adapters, unpacked by other threads before the one that computes comes to them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Executor, Future

from ..bundle.reader import Bundle
from ..bundle.unpacked import Unpacked

FILES = 4
"""How many are unpacked at once, and wait: each is in memory as a whole."""


class Ahead:
    """`Bundle.unpacked_in` for one thread that asks for files in an order that is known: that of ``paths``."""

    def __init__(self, bundle: Bundle, paths: Iterable[str], pool: Executor) -> None:
        self._bundle = bundle
        self._pool = pool
        self._left = iter(paths)
        self._begun: deque[tuple[str, Future[dict[int, Unpacked]]]] = deque()
        self._path: str | None = None
        self._unpacked: dict[int, Unpacked] = {}
        for _ in range(FILES):
            self._begin()

    def __call__(self, path: str) -> dict[int, Unpacked]:
        """What is in a file, as often as it is asked for; raises as `Bundle.unpacked_in`. Others may be passed over."""
        while self._path != path:
            self._path, unpacked = self._begun.popleft()
            self._begin()
            if self._path == path:
                self._unpacked = unpacked.result()
        return self._unpacked

    def _begin(self) -> None:
        if (path := next(self._left, None)) is not None:
            self._begun.append((path, self._pool.submit(self._bundle.unpacked_in, path)))
