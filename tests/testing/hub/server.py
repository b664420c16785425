"""Two origins on loopback, the Hub and its CDN, that speak HTTP/1.1 to any client."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote

from .answers import Answer, Origin, Request
from .cdn import Cdn
from .faults import Call, Faults
from .log import Log, Record
from .repository import CHUNK, Catalogue, Collection, Repository
from .routes import Routes


class HubServer:
    """A Hub while the context lasts. At its end it raises if a client broke a rule, unless `strict` is off.

    `page_size` is the most entries of a list that one answer holds. `resolve_cache` makes a small file's address
    redirect to another one of the same origin first, as today's Hub does, which costs a request more.
    """

    def __init__(
        self,
        *things: Repository | Collection,
        tokens: dict[str, str] | None = None,
        page_size: int = 1000,
        resolve_cache: bool = False,
        seed: int = 0,
        strict: bool = True,
    ) -> None:
        self.catalogue = Catalogue(tokens=tokens or {})
        self.catalogue.add(*things)
        self.faults = Faults(seed)
        self.log = Log()
        self._strict = strict
        self._cdn = Cdn()
        self._routes = Routes(self.catalogue, self._cdn, page_size=page_size, resolve_cache=resolve_cache)
        self._stopping = threading.Event()
        self._listeners = [_Listener(self, "hub"), _Listener(self, "cdn")]
        self._routes.url, self._cdn.url = (listener.url for listener in self._listeners)

    @property
    def url(self) -> str:
        """What HF_ENDPOINT has to be."""
        return self._routes.url

    @property
    def cdn_url(self) -> str:
        return self._cdn.url

    def __enter__(self) -> HubServer:
        for listener in self._listeners:
            listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        for listener in self._listeners:
            listener.stop()
        if self._strict and error is None:
            assert not self.log.violations, self.log.violations

    def pause(self, seconds: float) -> None:
        """Sleep, but no longer than the server lives."""
        if seconds > 0:
            self._stopping.wait(seconds)

    def answer(self, request: Request, record: Record) -> Answer:
        """What is sent, faults included."""
        if request.origin == "cdn" and record.authorized:
            self.log.violation(f"the token was sent to the CDN: {request.method} {request.path}")
        hitting = self.faults.hitting(request)
        record.fault = "+".join(rule.name for rule, _ in hitting)
        for rule, _ in hitting:
            if isinstance(rule.action, Call):
                rule.action.hook()
        answer = (self._cdn if request.origin == "cdn" else self._routes).answer(request)
        for rule, chance in hitting:
            answer = rule.action(answer, request, chance)
        return answer


class _Listener(ThreadingHTTPServer):
    """One origin. Its address is known before it starts; a thread serves each connection."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, hub: HubServer, origin: Origin) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.hub = hub
        self.origin = origin
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name=f"{origin} of tests", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Clients that keep their connections would keep the threads."""
        self.shutdown()
        self.server_close()
        self._thread.join()
        with self._lock:
            for connection in self._sockets:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._sockets.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._sockets.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may go away whenever they like; everything else is a bug here or in a hook and fails the test."""
        if not isinstance(sys.exception(), ConnectionError):
            self.hub.log.violation(f"not the client's fault: {sys.exception()!r}")
            super().handle_error(request, client_address)


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def do_GET(self) -> None:
        hub = self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address, _, query = self.path.partition("?")
        request = Request(
            self.server.origin,
            self.command,
            self.path,
            unquote(address),
            parse_qs(query, keep_blank_values=True),
            self.headers,
            body,
        )
        authorized = "Authorization" in self.headers
        record = hub.log.begin(request.origin, request.method, request.path, self.headers.get("Range"), authorized)
        try:
            answer = hub.answer(request, record)
            if not answer.sending.silent:
                hub.pause(answer.sending.delay)
                self._send(answer, record)
        finally:
            hub.log.end(record)
        if answer.sending.silent:
            hub.pause(answer.sending.delay)
            self.close_connection = True

    do_HEAD = do_POST = do_GET  # noqa: N815 - the names are those of http.server

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: there is a better log."""

    def version_string(self) -> str:
        return "lorazip-tests"

    def _send(self, answer: Answer, record: Record) -> None:
        record.status, record.served = answer.status, answer.served
        record.promised = 0 if self.command == "HEAD" else answer.size
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(answer.size))
        self.end_headers()
        sending = answer.sending
        end = record.promised if sending.cut_after is None else min(sending.cut_after, record.promised)
        if sending.drip:
            self._drip(answer, end, record, *sending.drip)
        elif end:
            self._send_at_once(answer, end, record)
        if sending.cut_after is not None:
            self._close(reset=sending.reset)

    def _send_at_once(self, answer: Answer, end: int, record: Record) -> None:
        content = answer.body if isinstance(answer.body, bytes) else answer.body.content
        if isinstance(content, bytes):
            view = memoryview(content)[answer.start : answer.start + end]
            for at in range(0, end, CHUNK):
                self.connection.sendall(view[at : at + CHUNK])
                record.sent += len(view[at : at + CHUNK])
        else:
            with content.open("rb") as file:
                record.sent += self.connection.sendfile(file, answer.start, end)

    def _drip(self, answer: Answer, end: int, record: Record, size: int, seconds: float) -> None:
        body = answer.bytes()[:end]
        for at in range(0, end, size):
            if at:
                self.server.hub.pause(seconds)
            self.connection.sendall(body[at : at + size])
            record.sent += len(body[at : at + size])

    def _close(self, *, reset: bool) -> None:
        self.close_connection = True
        if reset:
            # No lingering: the kernel throws away what is unsent and sends RST.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
