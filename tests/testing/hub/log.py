"""What was asked and what was sent. No token and no signature is in it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from .answers import Origin


@dataclass
class Record:
    """One request."""

    number: int
    origin: Origin
    method: str
    path: str
    range: str | None
    authorized: bool
    """Whether it brought an Authorization header, of whatever worth."""
    status: int | None = None
    """None: no answer."""
    promised: int = 0
    """Bytes of body that Content-Length announced."""
    sent: int = 0
    fault: str = ""
    served: tuple[str, str] | None = None
    """Repository and path, if the body is (a part of) a file."""
    at: float = field(default_factory=time.monotonic)

    @property
    def cut(self) -> bool:
        return self.sent < self.promised

    @property
    def is_download(self) -> bool:
        return self.served is not None and self.method == "GET" and self.status in (200, 206)


class Log:
    """Every request in the order of arrival."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._violations: list[str] = []
        self._open = 0
        self._changed = threading.Condition()

    def begin(self, origin: Origin, method: str, path: str, range: str | None, authorized: bool) -> Record:
        with self._changed:
            record = Record(len(self._records), origin, method, path, range, authorized)
            self._records.append(record)
            self._open += 1
            return record

    def end(self, record: Record) -> None:
        with self._changed:
            self._open -= 1
            self._changed.notify_all()

    def violation(self, text: str) -> None:
        with self._changed:
            self._violations.append(text)

    def _settle(self) -> None:
        """A client has its last byte before the server has written down that it sent it."""
        self._changed.wait_for(lambda: self._open == 0, timeout=5)

    @property
    def requests(self) -> list[Record]:
        with self._changed:
            self._settle()
            return list(self._records)

    @property
    def violations(self) -> list[str]:
        """What no client may do, whatever else happens; bugs of the server too."""
        with self._changed:
            self._settle()
            return list(self._violations)

    def clear(self) -> None:
        with self._changed:
            self._settle()
            self._records.clear()

    def where(self, condition: Callable[[Record], bool]) -> list[Record]:
        return [record for record in self.requests if condition(record)]

    def downloads(self) -> dict[tuple[str, str], list[Record]]:
        """(repository, path) → the GETs that sent its content, whole or in part, complete or cut."""
        downloads = defaultdict(list)
        for record in self.requests:
            if record.is_download and record.served:
                downloads[record.served].append(record)
        return dict(downloads)

    def complete(self) -> dict[tuple[str, str], int]:
        """(repository, path) → how often its content was sent to the end."""
        return {file: sum(not record.cut for record in records) for file, records in self.downloads().items()}

    def summary(self) -> dict[str, int]:
        requests = self.requests
        return {
            "requests": len(requests),
            "metadata_requests": sum(record.served is None or record.method == "HEAD" for record in requests),
            "downloads": sum(record.is_download for record in requests),
            "cut": sum(record.is_download and record.cut for record in requests),
            "refused": sum(record.status is not None and record.status >= 400 for record in requests),
            "rate_limited": sum(record.status == 429 for record in requests),
            "unanswered": sum(record.status is None for record in requests),
            "faults": sum(bool(record.fault) for record in requests),
            "body_bytes": sum(record.sent for record in requests),
            "file_bytes": sum(record.sent for record in requests if record.is_download),
            "violations": len(self.violations),
        }
