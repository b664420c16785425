"""An engine of vLLM that is told one thing after another: `python engine_steps.py SPEC.json`, see `testing.engine.run`.

The ``steps`` of the specification are lists: a verb and what it takes. What each gives, or the line of its error, is
an element of the results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


class Steps:
    """The verbs."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.llm = LLM(**spec["engine"])
        self.prompt: list[int] = spec["prompt"]

    def ask(self, *adapters: list[Any]) -> list[list[int]]:
        """The tokens of several requests, each with the arguments of `_adapter`, or none."""
        parameters = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": self.prompt} for _ in adapters]
        requests = [_adapter(*each) if each else None for each in adapters]
        outputs = self.llm.generate(prompts, parameters, use_tqdm=False, lora_request=requests)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def add(self, *adapter: Any) -> bool:
        return self.llm.llm_engine.add_lora(_adapter(*adapter))

    def remove(self, adapter_id: int) -> bool:
        return self.llm.llm_engine.remove_lora(adapter_id)

    def reload(self, model: str) -> None:
        """Have the weights of another model in place of those of the base model."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": model})

    def held(self) -> list[int]:
        """How many adapters the worker holds and knows ids of, how many are free, and ids in the front end."""
        [manager] = self.llm.collective_rpc(lambda worker: worker.model_runner.lora_manager)
        known = self.llm.llm_engine.input_processor._lorazip
        return [len(manager._held), len(manager._of_id), len(manager._store._free), len(known._ids)]

    def abort(self) -> None:
        """Forget requests that were taken in before an error."""
        states = self.llm.llm_engine.output_processor.request_states
        self.llm.llm_engine.abort_request(list(states), internal=True)


def _adapter(name: str, adapter_id: int, path: str, in_place: bool = False) -> LoRARequest:
    """Its later fields have other places in other releases."""
    return LoRARequest(name, adapter_id, path, load_inplace=in_place)


def main(path: str) -> None:
    spec = json.loads(Path(path).read_text())
    found: list[Any] = []
    steps = Steps(spec)
    for verb, *arguments in spec["steps"]:
        try:
            found.append(getattr(steps, verb)(*arguments))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
            steps.abort()
    Path(spec["results"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
