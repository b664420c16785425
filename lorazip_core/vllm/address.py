"""Whether a server can listen where it is to: vLLM finds out when the model is loaded."""

from __future__ import annotations

import errno
import socket
from typing import NamedTuple

from ..base.errors import LocalError

_DEFAULT_PORT = 8000  # vLLM's


class Address(NamedTuple):
    """As options say it."""

    host: str | None
    """None: all."""
    port: str | None
    """None: vLLM's default."""


def check_free(address: Address) -> None:
    """Raise LocalError if another server listens there. What is no host or no port is for vLLM to refuse."""
    host, port = address
    number = _DEFAULT_PORT if port is None else int(port) if port.isdecimal() else None
    if number is None or number >= 2**16:
        return
    try:
        found = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        return
    family, kind, protocol, _, where = found[0]
    with socket.socket(family, kind, protocol) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM: one that has just ended is no other
        try:
            trial.bind(where)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise LocalError(f"port {number} is in use", "end the other server, or give another «port»") from None
