"""`lorazip serve` with a real server: a tiny model on a CPU, asked over HTTP."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")
from testing.server import Server, serve
from testing.tiny_models import save_model
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from grouped_collection import name_of, recipe, write

from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions

pytestmark = pytest.mark.slow

WIDTH, LAYERS, ADAPTERS = 256, 2, 3


def likelihoods(server: Server, model: str) -> list[float]:
    """Of the tokens of one prompt."""
    body = {"model": model, "prompt": "a b c d", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    found: list[float] = server.ask("/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"][1:]
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
    with serve(place, place / "bundle", model, "--max-model-len", 64) as started:
        yield started


def test_every_adapter_is_there_by_its_name(server: Server) -> None:
    listed = server.models()
    assert listed == [server.model, *map(name_of, range(ADAPTERS))]
    found = [likelihoods(server, name) for name in listed]
    for number, one in enumerate(found):
        assert one == pytest.approx(likelihoods(server, listed[number]), abs=1e-5)
        for other in found[:number]:
            assert one != pytest.approx(other, abs=1e-3)


def test_another_is_not(server: Server) -> None:
    status, line = server.fails("/v1/completions", {"model": "other", "prompt": "a"})
    assert status == 404
    assert line.startswith("The model `other` does not exist.")


def test_it_ends_as_vllm_does(server: Server) -> None:
    """The last one of this file, as it ends the server."""
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait() == 0
