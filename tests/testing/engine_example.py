"""The example of an engine in docs/serving.md, run where its model and its bundle are: `engine_example.py SPEC.json`.

Its engine is made small, and its results are the tokens of its answers.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import vllm

from testing.engine import SMALL


def main(path: str) -> None:
    spec = json.loads(Path(path).read_text())
    os.chdir(spec["folder"])
    whole = vllm.LLM
    vllm.LLM = lambda *given, **asked: whole(*given, **SMALL | asked)
    names: dict[str, Any] = {}
    exec(spec["example"], names)
    tokens = [list(answer.outputs[0].token_ids) for answer in names["answers"]]
    Path(spec["results"]).write_text(json.dumps(tokens))


if __name__ == "__main__":
    main(sys.argv[1])
