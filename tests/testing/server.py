"""A server of `lorazip serve` in a process of its own, asked over HTTP."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

SMALL = ("--gpu-memory-utilization", 0.05, "--kv-cache-memory-bytes", 2**26, "--dtype", "float32", "--enforce-eager")
"""Options of vLLM with which a tiny model starts soon on a CPU, and computes in float32."""


class Server:
    """The process, and what it answers."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, model: str) -> None:
        self.process, self.url, self.model = process, f"http://127.0.0.1:{port}", model
        self._opener = build_opener(ProxyHandler({}))

    def text(self, path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        with self._opener.open(request) as answer:
            return str(answer.read().decode())

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return json.loads(self.text(path, body))

    def fails(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """The status and the message with which a request is refused."""
        try:
            answer = self.text(path, body)
        except HTTPError as error:
            with error:
                return error.code, str(json.load(error)["error"]["message"])
        raise AssertionError(f"{path} {body}: {answer}")

    def status(self, path: str, body: dict[str, Any]) -> int:
        """That of the answer to a request."""
        try:
            self.text(path, body)
        except HTTPError as error:
            with error:
                return error.code
        return 200

    def models(self) -> list[str]:
        """All names under which it answers."""
        return [model["id"] for model in self.ask("/v1/models")["data"]]

    def tokens(self, model: str, prompt: list[int], new: int = 8) -> list[int]:
        """What follows a prompt."""
        body = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
        [choice] = self.ask("/v1/completions", body | {"return_token_ids": True})["choices"]
        return list(choice["token_ids"])

    def load(self, name: str, bundle: Path) -> None:
        self.text("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(bundle)})

    def unload(self, name: str) -> None:
        self.text("/v1/unload_lora_adapter", {"lora_name": name})


@contextmanager
def serve(place: Path, bundle: Path, model: Path, *options: object, ours: tuple[object, ...] = ()) -> Iterator[Server]:
    """Start one for the length of a block. Its log is ``place/log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", bundle, "--model", model, "--host", "127.0.0.1", "--port", port, *ours, "--", *SMALL, *options]
    command = [sys.executable, "-m", "lorazip_cli", *map(str, words)]
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        started = Server(process, port, str(model))
        while process.poll() is None:
            try:
                started.ask("/v1/models")
                break
            except URLError:
                time.sleep(0.2)
        assert process.poll() is None, (place / "log").read_text()[-4000:]
        try:
            yield started
        finally:
            process.terminate()
