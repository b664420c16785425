"""`lorazip serve` with a real server: a tiny model on a CPU, asked over HTTP."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import pytest
import torch

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")
from testing.tiny_models import save_model
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from grouped_collection import name_of, recipe, write

from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions

pytestmark = pytest.mark.slow

WIDTH, LAYERS, ADAPTERS = 256, 2, 3


class Server:
    """The process, and what it answers."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, model: str) -> None:
        self.process, self.url, self.model = process, f"http://127.0.0.1:{port}", model
        self._opener = build_opener(ProxyHandler({}))

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        with self._opener.open(request) as answer:
            return json.load(answer)

    def likelihoods(self, model: str) -> list[float]:
        """Of the tokens of one prompt."""
        body = {"model": model, "prompt": "a b c d", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        found: list[float] = self.ask("/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"][1:]
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("serve")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = save_model(place / "model", LlamaForCausalLM(config))
    of = recipe("tiny", d_model=WIDTH, layers=LAYERS)
    assert len(list(write(place / "adapters", of, ADAPTERS, torch.device("cpu")))) == ADAPTERS
    compress(place / "adapters", place / "bundle", CompressOptions())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", place / "bundle", "--model", model, "--host", "127.0.0.1", "--port", port, "--"]
    small = ["--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", 2**26, "--max-model-len", 64]
    words += [*small, "--dtype", "float32", "--enforce-eager"]
    command = [sys.executable, "-m", "lorazip_cli", *map(str, words)]
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
            process.kill()


def test_every_adapter_is_there_by_its_name(server: Server) -> None:
    listed = [model["id"] for model in server.ask("/v1/models")["data"]]
    assert listed == [server.model, *map(name_of, range(ADAPTERS))]
    found = [server.likelihoods(name) for name in listed]
    for number, one in enumerate(found):
        assert one == pytest.approx(server.likelihoods(listed[number]), abs=1e-5)
        for other in found[:number]:
            assert one != pytest.approx(other, abs=1e-3)


def test_another_is_not(server: Server) -> None:
    with pytest.raises(HTTPError) as raised:
        server.likelihoods("other")
    assert raised.value.code == 404


def test_it_ends_as_vllm_does(server: Server) -> None:
    """The last one of this file, as it ends the server."""
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait() == 0
