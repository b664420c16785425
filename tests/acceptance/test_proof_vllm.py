"""Proof 10: vLLM serves real adapters from a bundle in one mixed stream, and answers as PEFT does with each exported.

It runs in the environment for vLLM. LORAZIP_BASE_MODEL names a folder where the base model is, or will be built.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")

import torch
from acceptance.real_data import Compressed, Say
from peft import PeftModel
from testing.engine import Request, answers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorazip_core.bundle.reader import Bundle
from lorazip_core.export.exporter import export
from lorazip_core.planning.options import CompressOptions

pytestmark = pytest.mark.acceptance

NEW = 12
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
TIMES = 40
"""How much smaller than the factors in bf16."""


@pytest.mark.parametrize("scheme", ["joint", "coded"])
def test_texts_of_a_mixed_stream(
    scheme: str, model_folder: Path, data: Path, compressed: Compressed, tmp_path: Path, say: Say
) -> None:
    factors = sum(file.stat().st_size for file in (data / "smollm2-r16").glob("*/adapter_model.safetensors"))
    options = {
        "joint": CompressOptions(method="joint", rank=64, dtype="f32"),
        "coded": CompressOptions(budget=factors // TIMES),
    }
    path, _ = compressed(options[scheme])
    assert {adapter.scheme for adapter in Bundle(path).manifest.adapters} == {scheme}
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    files = sorted((data / "smollm2-r16.tasks").glob("*.jsonl"))
    requests = []
    for file in files:
        chat = [{"role": "user", "content": json.loads(file.read_text().splitlines()[0])["input"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        requests.append(Request(prompt, file.stem, "lorazip:"))
    assert len(requests) == 26
    engine = {
        "model": str(model_folder),
        "max_model_len": 512,
        "kv_cache_memory_bytes": 2**29,
        "enable_lora": True,
        "max_loras": len(requests),
        "max_lora_rank": 1,
        "additional_config": {"lorazip": {"bundle": str(path)}},
    }
    begin = time.monotonic()
    mixed = answers(tmp_path / "mixed", engine, requests, new=NEW)["as it is"]
    served = time.monotonic()
    export(path, tmp_path / "exported", dtype="f32")
    base: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    base.generation_config.eos_token_id = None
    for number, (prompt, name, _) in enumerate(requests):
        ids, found = torch.tensor([prompt]), mixed[number]
        if number % 5 == 0:  # else this would be no proof
            assert base.generate(input_ids=ids, **GREEDY)[0, len(prompt) :].tolist() != found
        folder = tmp_path / "exported" / str(name)
        alone: Any = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True).eval()
        expected = alone.generate(input_ids=ids, **GREEDY)[0, len(prompt) :].tolist()
        base = alone.unload()
        assert tokenizer.decode(found) == tokenizer.decode(expected), name
    say(
        f"{scheme}: {len(requests)} texts of {NEW} tokens; {served - begin:.0f} s with the start, "
        f"one by one {time.monotonic() - served:.0f} s"
    )
