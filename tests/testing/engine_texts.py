"""Texts of an engine of vLLM: `python engine_texts.py SPEC.json`, see `testing.engine.run`.

The ``requests`` of the specification are pairs of an adapter and a question, which a chat begins with; ``path`` is the
``lora_path`` of all, with {} for the name. They are answered ``at_once`` or one after another.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(path: str) -> None:
    spec = json.loads(Path(path).read_text())
    llm = LLM(**spec["engine"])
    parameters = SamplingParams(max_tokens=spec["new"], temperature=0, ignore_eos=True)
    chats = [[{"role": "user", "content": question}] for _, question in spec["requests"]]
    adapters = [
        LoRARequest(name, number, spec["path"].format(name)) for number, (name, _) in enumerate(spec["requests"], 1)
    ]
    begin = time.monotonic()
    if spec["at_once"]:
        outputs = llm.chat(chats, parameters, use_tqdm=False, lora_request=adapters)
    else:
        outputs = [
            output
            for chat, adapter in zip(chats, adapters, strict=True)
            for output in llm.chat(chat, parameters, use_tqdm=False, lora_request=adapter)
        ]
    found = {"seconds": time.monotonic() - begin, "texts": [output.outputs[0].text for output in outputs]}
    Path(spec["results"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
