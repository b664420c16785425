"""An engine of vLLM in a process of its own, which answers batches of requests: `answers`.

Run as a script it is that process: `python engine.py SPEC.json`, which prints nothing that matters.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

NEW = 6


class Request(NamedTuple):
    """A prompt of token ids, and an adapter by its name and ``lora_path``, or none."""

    prompt: list[int]
    name: str | None = None
    path: str | None = None


SMALL = {
    "dtype": "float32",
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 2**26,
    "max_model_len": 64,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 1024,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "seed": 0,
}
"""Arguments of `vllm.LLM` with which a tiny model starts soon on a CPU, and computes in float32."""


class Failed(Exception):
    """The process ended otherwise than it should; its output."""


def run(folder: Path, script: Path, spec: dict[str, Any]) -> Any:
    """What ``script`` writes as JSON to the ``results`` of its ``spec``. Raises Failed."""
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.json"
    (folder / "spec.json").write_text(json.dumps(spec | {"results": str(results)}))
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "spec.json")],
        env=os.environ
        | {
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.getenv("PYTHONPATH")])]),
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise Failed(done.stdout)
    return json.loads(results.read_text())


def answers(
    folder: Path,
    engine: dict[str, Any],
    requests: Sequence[Request],
    mutants: Sequence[str] = (),
    new: int = NEW,
) -> dict[str, list[list[int]]]:
    """The tokens of every request of one batch, by "as it is"; and of their first half by mutant, with that."""
    spec = {"engine": SMALL | engine, "requests": requests, "mutants": mutants, "new": new}
    found: dict[str, list[list[int]]] = run(folder, Path(__file__), spec)
    return found


def generate(llm: Any, requests: Sequence[Request], new: int) -> list[list[int]]:
    """In the process of the engine."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    ids: dict[tuple[str, str], int] = {}
    adapters = [
        LoRARequest(each.name, ids.setdefault((each.name, each.path), len(ids) + 1), each.path) if each.name else None
        for each in requests
    ]
    parameters = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": each.prompt} for each in requests]
    outputs = llm.generate(prompts, parameters, use_tqdm=False, lora_request=adapters)
    return [list(output.outputs[0].token_ids) for output in outputs]


def manager_of(llm: Any) -> Any:
    """What holds the adapters, in the process of the engine."""
    [found] = llm.collective_rpc(lambda worker: worker.model_runner.lora_manager)
    return found


@contextmanager
def _mutated(manager: Any, mutant: str) -> Iterator[None]:
    """Until the end of the block, the engine takes something of another adapter."""
    from lorazip_core.serving.cores import CoreTable

    store = manager._store
    kept = store._group_of.copy(), store._place_of.copy()
    data = [table.data.clone() for table in store._tables if not isinstance(table, CoreTable)]
    for kind, table in enumerate(store._tables):
        own = store._kind_of == kind
        if isinstance(table, CoreTable):
            if mutant == "cluster":
                store._group_of[own] = (store._group_of[own] + 1) % len(table.clusters)
            if mutant == "core":
                store._place_of[own] = (store._place_of[own] + 1) % own.sum()
        else:
            if mutant == "row":
                store._group_of[own] = (store._group_of[own] + 1) % own.sum()
            if mutant == "codes":
                table.data ^= 1
    if mutant == "none":
        manager._numbers = lambda ids, of_id: type(manager)._numbers(ids, of_id).clip(0)
    try:
        yield
    finally:
        store._group_of[:], store._place_of[:] = kept
        for table in store._tables:
            if not isinstance(table, CoreTable):
                table.data.copy_(data.pop(0))
        vars(manager).pop("_numbers", None)


MUTANTS = ("cluster", "core", "row", "codes", "none")


def main(path: str) -> None:
    from vllm import LLM

    spec = json.loads(Path(path).read_text())
    requests = [Request(*each) for each in spec["requests"]]
    llm = LLM(**spec["engine"])
    found = {"as it is": generate(llm, requests, spec["new"])}
    for mutant in spec["mutants"]:
        with _mutated(manager_of(llm), mutant):
            found[mutant] = generate(llm, requests[: len(requests) // 2], spec["new"])
    Path(spec["results"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
