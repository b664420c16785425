"""One engine of vLLM, measured: `python serving_engine.py SPEC.json`, which `serving.py` starts for each row.

The specification is a JSON object: the arguments of `vllm.LLM` (``engine``), ``loads`` of ``prompt`` and ``new``
tokens, how many ``requests``, ``warm_up`` requests and ``rounds``, ``adapters`` as pairs of a name and a path (each
request takes one at random; without any all are of the base model), whether to ``preload`` them, a ``seed``, and the
file for ``results``.

Every line of that file is what was measured, written as soon as it is.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import vllm
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

FIRST_TOKEN = 10  # ids below are often special


class Batch(NamedTuple):
    """All requests of a load, which arrive at once."""

    prompts: list[Any]
    adapters: list[LoRARequest] | None
    new: int


def batch(load: dict[str, int], count: int, adapters: list[LoRARequest], vocabulary: int, seed: int) -> Batch:
    """Random prompts, no two of which begin alike, and a random adapter for each."""
    drawn = random.Random(seed)
    prompts = [
        {"prompt_token_ids": [drawn.randrange(FIRST_TOKEN, vocabulary) for _ in range(load["prompt"])]}
        for _ in range(count)
    ]
    return Batch(prompts, [drawn.choice(adapters) for _ in prompts] if adapters else None, load["new"])


def generate(llm: LLM, of: Batch) -> dict[str, Any]:
    """Seconds until all are answered, and until the first token of each, from the moment at which it was taken in."""
    parameters = SamplingParams(max_tokens=of.new, ignore_eos=True, temperature=0, detokenize=False)
    started = time.perf_counter()
    outputs = llm.generate(of.prompts, parameters, use_tqdm=False, lora_request=of.adapters)
    seconds = time.perf_counter() - started
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert tokens == len(of.prompts) * of.new
    first = sorted(output.metrics.first_token_latency for output in outputs)
    return {
        "requests": len(outputs),
        "seconds": seconds,
        "requests_per_second": len(outputs) / seconds,
        "tokens_per_second": tokens / seconds,
        "first_token_p50": first[len(first) // 2],
        "first_token_p99": first[min(len(first) * 99 // 100, len(first) - 1)],
    }


def main(path: str) -> int:
    spec = json.loads(Path(path).read_text())

    def write(**measured: Any) -> None:
        with open(spec["results"], "a") as file:
            file.write(json.dumps(measured) + "\n")

    started = time.perf_counter()
    llm = LLM(**spec["engine"], disable_log_stats=False)  # the statistics have the times of first tokens
    engine = llm.llm_engine
    cache = engine.vllm_config.cache_config
    write(
        vllm=vllm.__version__,
        start_seconds=time.perf_counter() - started,
        cache_tokens=(cache.num_gpu_blocks or 0) * cache.block_size,
    )
    adapters = [LoRARequest(name, number, path) for number, (name, path) in enumerate(spec["adapters"], 1)]
    if spec["preload"]:
        started = time.perf_counter()
        for adapter in adapters:
            engine.add_lora(adapter)
        write(preload_seconds=time.perf_counter() - started)
    vocabulary = engine.model_config.get_vocab_size()
    for number, load in enumerate(spec["loads"]):
        seeds = spec["seed"] + 2 * number, spec["seed"] + 2 * number + 1
        generate(llm, batch(load, spec["warm_up"], adapters, vocabulary, seeds[0]))
        for _ in range(spec["rounds"]):
            measured = generate(llm, batch(load, spec["requests"], adapters, vocabulary, seeds[1]))
            write(load=load["name"], **measured)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
