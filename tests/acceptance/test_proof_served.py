"""Proof 9: the real base model serves real adapters of all kinds at once, and answers as PEFT does with each alone.

LORAZIP_BASE_MODEL names a folder where the base model is, or will be built.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from acceptance.real_data import Compressed, Say

from lorazip_core.bundle.reader import Bundle
from lorazip_core.export.exporter import export
from lorazip_core.planning.options import CompressOptions
from lorazip_core.serving.attach import attach

pytestmark = pytest.mark.acceptance

GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
QUESTIONS = 12
MIXED = CompressOptions(method="joint", rank=16, clusters=3, max_error=0.085)


@pytest.mark.parametrize(("options", "schemes"), [(CompressOptions(), {"coded"}), (MIXED, {"joint", "svd"})])
def test_tokens_of_a_mixed_batch(
    options: CompressOptions,
    schemes: set[str],
    model_folder: Path,
    data: Path,
    compressed: Compressed,
    tmp_path: Path,
    say: Say,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, _ = compressed(options)
    assert {adapter.scheme for adapter in Bundle(path).manifest.adapters} == schemes
    files = sorted((data / "smollm2-r16.tasks").glob("*.jsonl"))[:: 26 // QUESTIONS][:QUESTIONS]
    names: list[str | None] = [file.stem for file in files]
    questions = [json.loads(file.read_text().splitlines()[0])["input"] for file in files]
    export(path, tmp_path / "exported", dtype="f32")
    names[3] = names[7] = None
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    base: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    started = time.monotonic()
    with attach(base, path) as served:
        loaded = time.monotonic()
        found = served.generate(**inputs, **GREEDY, adapter_names=names)
        done = time.monotonic()
        beams = served.generate(**inputs, **GREEDY, adapter_names=names, num_beams=2)
    alone = base.generate(**inputs, **GREEDY), base.generate(**inputs, **GREEDY, num_beams=2)
    for row, name in enumerate(names):
        own = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
        if name is None:
            expected = [each[row : row + 1] for each in alone]
        else:
            model = PeftModel.from_pretrained(base, tmp_path / "exported" / name).eval()
            expected = [model.generate(**own, **GREEDY), model.generate(**own, **GREEDY, num_beams=2)]
            base = model.unload()
        assert found[row].tolist() == expected[0][0].tolist(), name
        assert beams[row].tolist() == expected[1][0].tolist(), name
    say(f"{served.nbytes:,} bytes in {loaded - started:.1f} s; {len(names)} rows in {done - loaded:.1f} s")
