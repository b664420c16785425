"""One engine of vLLM, measured: `python serving_engine.py SPEC.json`, which `serving.py` starts for each row.

The specification is a JSON object: the arguments of `vllm.LLM` (``engine``), ``loads`` of ``prompt`` and ``new``
tokens, how many ``requests``, ``warm_up`` requests and ``rounds``, ``adapters`` as pairs of a name and a path (each
request takes one at random; without any all are of the base model), whether to ``preload`` them, a ``seed``, and the
file for ``results``. ``changes`` are how often one of the adapters ``to_add``, as such pairs, comes or goes while
requests run.

Every line of that file is what was measured, written as soon as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import vllm
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

FIRST_TOKEN = 10  # ids below are often special
RUNNING, SHORT = 128, {"prompt": 16, "new": 16}
"""How many requests there are while adapters come and go, and what they are: an adapter stays until those are done."""
ROUND = 10**6
"""An id is that of one load of an adapter, and of no other."""


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


def change(llm: LLM, of: Batch, to_add: list[LoRARequest], changes: int) -> dict[str, Any]:
    """Load and unload adapters in turn while there are always requests, some of them for these; how long that takes.

    One is unloaded when its requests are done, which the engine insists on.
    """
    engine = llm.llm_engine
    parameters = SamplingParams(max_tokens=of.new, ignore_eos=True, temperature=0, detokenize=False)
    taken: dict[str, list[float]] = {"load": [], "unload": []}
    there: list[LoRARequest] = []
    running: dict[str, int] = {}
    asked, answered, for_young = 0, 0, 0
    memory = None

    def step() -> None:
        nonlocal answered
        for output in engine.step():
            if output.finished:
                answered += 1
                del running[output.request_id]

    started = time.perf_counter()
    while (done := sum(map(len, taken.values()))) < changes:
        if memory is None and done >= changes // 10:  # what is read or made once is there
            memory = gpu_memory(), main_memory()
        while len(running) < RUNNING:
            young = there[1:][-2:]
            if young and asked % 4 == 0:
                adapter = young[for_young % len(young)]
                for_young += 1
            else:
                adapter = of.adapters[asked % len(of.adapters)] if of.adapters else None
            given = str(asked)
            engine.add_request(given, of.prompts[asked % len(of.prompts)], parameters, lora_request=adapter)
            running[given] = adapter.lora_int_id if adapter else 0
            asked += 1
        step()
        begun = time.perf_counter()
        if len(there) < len(to_add):
            new = to_add[len(taken["load"]) % len(to_add)]
            adapter = LoRARequest(new.lora_name, new.lora_int_id + (1 + len(taken["load"])) * ROUND, new.lora_path)
            engine.add_lora(adapter)
            there.append(adapter)
            taken["load"].append(time.perf_counter() - begun)
        elif there[0].lora_int_id not in running.values():
            engine.remove_lora(there.pop(0).lora_int_id)
            taken["unload"].append(time.perf_counter() - begun)
    seconds = time.perf_counter() - started
    while engine.has_unfinished_requests():
        step()
    for adapter in there:
        engine.remove_lora(adapter.lora_int_id)
    assert memory is not None  # there is at least one change
    return {
        "changes": changes,
        "requests": answered,
        "seconds": seconds,
        "gpu_bytes_more": gpu_memory() - memory[0],
        "main_bytes_more": main_memory() - memory[1],
        **{f"{what}_p50": sorted(each)[len(each) // 2] for what, each in taken.items() if each},
        **{f"{what}_most": max(each) for what, each in taken.items() if each},
    }


def gpu_memory() -> int:
    """Bytes in use of the GPUs that there are for this process, whoever uses them; 0 without any."""
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if (own := os.getenv("CUDA_VISIBLE_DEVICES")) is not None:
        words.append(f"--id={own}")
    try:
        found = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return sum(int(line) * 2**20 for line in found.split())


def main_memory() -> int:
    """Bytes of main memory of this process and of those that it has started."""
    own, found = psutil.Process(), 0
    for each in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += each.memory_info().rss
    return found


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
    if spec["changes"]:
        to_add = [LoRARequest(name, number, path) for number, (name, path) in enumerate(spec["to_add"], 1)]
        running = batch(SHORT, spec["requests"], adapters, vocabulary, spec["seed"])
        write(changed=change(llm, running, to_add, spec["changes"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
