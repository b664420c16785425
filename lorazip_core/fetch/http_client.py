"""huggingface_hub's HTTP client with what it lacks: a common wait for the rate limit, a time limit, and a way to stop.

The client retries on its own and thread by thread. When one request is told to wait (429 with Retry-After), all threads
should wait; a request that nobody answers should end; and Ctrl-C should not have to wait for sixteen downloads. All of
this is done through the client's public hooks.
"""

from __future__ import annotations

import contextlib
import email.utils
import logging
import math
import socket
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Self

from huggingface_hub import constants, get_session
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # public by its documentation

from ..base.threads import thread_pool
from .hub_errors import HubUnavailable

_TIMEOUT = 30.0  # seconds that a silent server has, where huggingface_hub would wait for ever
_LONG_WAIT = 5.0  # seconds; only such waits are reported
_WORTH_NOTING = 1.0  # seconds until a request is repeated, and since the last answer to any
_TOO_LONG = 900.0  # seconds: a longer wait is an error


class Stopped(Exception):
    """The run is over: no request is made any more."""


class HttpClient:
    """Within its context every request waits as long as the Hub asks any of them to, and `stop` ends them all.

    huggingface_hub prints nothing on stderr meanwhile: lorazip reports what fails in the end, once.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._lock = threading.Lock()
        self._context = contextlib.ExitStack()
        self._clients: list[tuple[Any, Any]] = []
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._not_before = 0.0
        self.stopped = threading.Event()
        self.last_answer = -math.inf
        """When the Hub last answered with other than 429 or a server error (`time.monotonic`)."""
        self._repeats_noted = 0
        """The highest number of a repetition that was reported since then."""

    @contextmanager
    def executor(self, jobs: int) -> Iterator[Executor]:
        """Threads for requests. Whatever ends the block early ends the requests too, wherever they wait."""
        with thread_pool(jobs) as executor:
            try:
                yield executor
            except BaseException:
                self.stop()
                raise

    def attach(self) -> None:
        """Hook into the present client of huggingface_hub, which replaces it after connection errors."""
        client = get_session()
        with self._lock:
            if not any(client is known for known, _ in self._clients):
                client.event_hooks["request"].append(self._before)
                client.event_hooks["response"].append(self._after)
                self._clients.append((client, client.timeout))
                client.timeout = _TIMEOUT

    def __enter__(self) -> Self:
        logger = logging.getLogger("huggingface_hub")
        self._level = logger.level
        if not constants.HF_DEBUG:
            logger.setLevel(logging.CRITICAL)
        self._context.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        return self

    def __exit__(self, *failure: object) -> None:
        """Leave the client, its logger and the warnings as they were."""
        self._context.close()
        logging.getLogger("huggingface_hub").setLevel(self._level)
        with self._lock:
            for client, timeout in self._clients:
                client.event_hooks["request"].remove(self._before)
                client.event_hooks["response"].remove(self._after)
                client.timeout = timeout
            self._clients.clear()

    def stop(self) -> None:
        """End every request, now, also those that wait for a byte."""
        self.stopped.set()
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(ImportError):  # Xet has connections of its own, and no public way to end them
            from huggingface_hub.utils._xet import abort_xet_session

            abort_xet_session()  # type: ignore[no-untyped-call]

    def check_stopped(self) -> None:
        """Raise Stopped after `stop`."""
        if self.stopped.is_set():
            raise Stopped

    def note_retry(self, what: str, seconds: float, number: int, repeats: int) -> None:
        """Say once for all requests that they fail and will be repeated, for the ``number``-th time of ``repeats``.

        Nothing is said while other requests are answered, nor of waits of less than a second.
        """
        with self._lock:
            is_outage = time.monotonic() - self.last_answer >= _WORTH_NOTING
            is_new = is_outage and seconds >= _WORTH_NOTING and number > self._repeats_noted
            if is_new:
                self._repeats_noted = number
        if is_new:
            self._note(f"{what}; trying again in {seconds:.0f} s ({number} of {repeats})")

    def _before(self, request: Any) -> None:
        while not self.stopped.is_set() and (left := self._not_before - time.monotonic()) > 0:
            self.stopped.wait(left)
        self.check_stopped()
        request.extensions["trace"] = self._remember

    def _after(self, response: Any) -> None:
        if response.status_code == 429:
            self._wait(_seconds_to_wait(response.headers))
        elif response.status_code < 500:
            with self._lock:
                self.last_answer, self._repeats_noted = time.monotonic(), 0

    def _wait(self, seconds: float) -> None:
        if seconds > _TOO_LONG:
            hours = f"{seconds / 3600:,.1f} hours" if seconds < 10**7 else "for ever"
            raise HubUnavailable(f"the Hub asks to wait {hours} (too many requests)", "HF_TOKEN raises the limit")
        with self._lock:
            until = time.monotonic() + seconds
            longer = until - self._not_before
            self._not_before = max(self._not_before, until)
        if seconds >= _LONG_WAIT and longer >= 1:
            self._note(f"the Hub asks to wait {seconds:.0f} s (too many requests; HF_TOKEN raises the limit)")

    def _remember(self, event: str, info: dict[str, Any]) -> None:
        """Every connection as it is made, from the client's trace of what it does."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            connection = info["return_value"].get_extra_info("socket")
            if connection is not None:
                self._sockets.add(connection)


def _seconds_to_wait(headers: Any) -> float:
    """What a 429 asks for: the end of the window of its rate limit, or Retry-After in seconds or as a date."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdecimal():
        return float(value[:12])
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, (email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return 0.0
