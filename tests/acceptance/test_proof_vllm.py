"""Proof 10: vLLM serves real adapters in one mixed stream from a bundle, and each answers as it does exported.

It runs in the environment for vLLM. LORAZIP_BASE_MODEL names a folder where the base model is, or will be built.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")

import testing.engine_texts
from acceptance.real_data import Compressed, Say
from testing.engine import run

from lorazip_core.bundle.reader import Bundle
from lorazip_core.export.exporter import export
from lorazip_core.planning.options import CompressOptions

pytestmark = pytest.mark.acceptance

SCRIPT = Path(testing.engine_texts.__file__)
NEW = 12
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
    files = sorted((data / "smollm2-r16.tasks").glob("*.jsonl"))
    requests = [[file.stem, json.loads(file.read_text().splitlines()[0])["input"]] for file in files]
    assert len(requests) == 26
    export(path, tmp_path / "exported", target="vllm", dtype="f32")
    engine = {
        "model": str(model_folder),
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 32,
        "gpu_memory_utilization": 0.05,
        "kv_cache_memory_bytes": 2**29,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "enable_lora": True,
    }
    bundled = {"additional_config": {"lorazip": {"bundle": str(path)}}, "max_loras": 26, "max_lora_rank": 1}
    # Two slots: before 0.33, on a CPU, rows without an adapter have that of the last one.
    ordinary = {"max_loras": 2, "max_lora_rank": 64 if scheme == "joint" else 16}

    def texts(name: str, how: dict[str, Any], path: str, at_once: bool) -> list[str]:
        begin = time.monotonic()
        spec = {"engine": engine | how, "new": NEW, "path": path, "requests": requests, "at_once": at_once}
        found = run(tmp_path / name, SCRIPT, spec)
        say(f"{scheme}, {name}: {time.monotonic() - begin:.0f} s, {found['seconds']:.0f} s of them for the answers")
        answers: list[str] = found["texts"]
        return answers

    mixed = texts("mixed", bundled, "lorazip:", True)
    alone = texts("exported", ordinary, str(tmp_path / "exported") + "/{}", False)
    assert mixed == alone
    assert len(set(mixed)) > 13
