"""What goes back over the wire: a status, headers, a body, and how it is sent; and the Hub's own errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import Any, Literal
from urllib.parse import quote

from .repository import File

Origin = Literal["hub", "cdn"]


@dataclass(frozen=True)
class Request:
    """What routes and faults see of a request."""

    origin: Origin
    method: str
    target: str
    """Path and query as they came."""
    path: str
    """The path with its percent-encoding removed; what faults match and the log shows. It has no secrets in it."""
    query: Mapping[str, list[str]]
    headers: Message
    """Their names in any case."""
    body: bytes = b""


@dataclass
class Sending:
    """How a body goes out. Only faults change it."""

    delay: float = 0.0
    """Seconds before the first byte."""
    silent: bool = False
    """Nothing is sent and the connection is closed, after the delay."""
    cut_after: int | None = None
    """The connection is closed after so many bytes of the body, whatever Content-Length promised."""
    reset: bool = False
    """A cut connection ends with RST (a network error) instead of FIN (an incomplete message)."""
    drip: tuple[int, float] | None = None
    """So many bytes, then so many seconds of nothing."""


@dataclass
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | File = b""
    start: int = 0
    """A range of a file: from here, `length` bytes."""
    length: int | None = None
    served: tuple[str, str] | None = None
    """Repository and path of the file whose content the body is, for the log."""
    sending: Sending = field(default_factory=Sending)

    @property
    def size(self) -> int:
        whole = len(self.body) if isinstance(self.body, bytes) else self.body.size
        return whole - self.start if self.length is None else self.length

    def bytes(self) -> bytes:
        """The body in memory, for what cannot be sent straight from the disk."""
        whole = self.body if isinstance(self.body, bytes) else self.body.read()
        return whole[self.start : self.start + self.size]


def of_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return Answer(status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, body)


class Refused(Exception):
    """An error of the Hub: a body {"error": …}, and the same in headers, because an answer to HEAD has no body."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.answer = of_json({"error": message}, status, {"X-Error-Message": in_a_header(message), **(headers or {})})
        if code:
            self.answer.headers["X-Error-Code"] = code


def in_a_header(text: str) -> str:
    """Names may hold line breaks and characters that no header can."""
    return "".join(c if " " <= c <= "~" else quote(c, errors="surrogatepass") for c in text)
