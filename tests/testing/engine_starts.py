"""Engines of vLLM that are started one after another: `python engine_starts.py SPEC.json`, see `testing.engine.run`.

The ``engines`` of the specification are arguments of `vllm.LLM`. Of each, the results have what it answers without an
adapter and the name of the class that holds adapters in it; or the line with which it does not start. ``version`` is
what vLLM is to say that it is, and ``without`` a name MODULE:NAME that it is not to have.
"""

from __future__ import annotations

import gc
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import vllm
from vllm import LLM

from testing.engine import Request, generate


def start(arguments: dict[str, Any], prompt: list[int]) -> Any:
    try:
        llm = LLM(**arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    [manager] = llm.collective_rpc(lambda worker: getattr(worker.model_runner, "lora_manager", None))
    return [generate(llm, [Request(prompt)], 8)[0], type(manager).__name__]


def main(path: str) -> None:
    spec = json.loads(Path(path).read_text())
    if spec.get("version"):
        vllm.__version__ = spec["version"]
    if spec.get("without"):
        module, name = spec["without"].split(":")
        delattr(import_module(module), name)
    found = []
    for arguments in spec["engines"]:
        found.append(start(arguments, spec["prompt"]))
        gc.collect()
    Path(spec["results"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
