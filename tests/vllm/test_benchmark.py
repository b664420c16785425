"""The benchmark of serving with a real engine, tiny and on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import serving

from lorazip_core.bundle.reader import Bundle
from lorazip_core.maintain.remove import remove

SMALL = {"kv_cache_memory_bytes": 2**26, "enforce_eager": True}


@pytest.mark.slow
def test_it_measures_the_base_and_ordinary_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    place, kept = tmp_path / "made", tmp_path / "rows.json"
    made = ["make", str(place), "--adapters", "5", "--shape", "tiny", "--times", "4", "--device", "cpu"]
    assert serving.main(made) == 0
    words = ["--dummy", "tiny", "--adapters", str(place / "adapters"), "--bundles", str(place / "coded")]
    few = ["--loads", "8+2", "--requests", "6", "--warm-up", "2", "--max-num-seqs", "4"]
    engine = ["--gpu-memory-utilization", "0.05", "--engine", json.dumps(SMALL)]
    rows = ["--rows", "base,stock-bytes", "--json", str(kept)]
    assert serving.main(["run", *words, *few, *engine, *rows]) == 0
    base, stock = json.loads(kept.read_text())["rows"]
    assert (base["row"], stock["row"].partition(",")[0]) == ("base", "stock")
    for row in (base, stock):
        assert row["requests"] == 6
        assert 0 < row["first_token_p50"] <= row["first_token_p99"] <= row["seconds"]
        assert row["tokens_per_second"] == pytest.approx(2 * row["requests_per_second"])
        assert row["cache_tokens"] > 0
    assert stock["preload_seconds"] > 0


@pytest.mark.slow
def test_adapters_come_and_go_in_a_bundle_of_repeated_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    place, kept = tmp_path / "made", tmp_path / "rows.json"
    assert serving.main(["make", str(place), "--adapters", "5", "--shape", "tiny", "--device", "cpu"]) == 0
    fewer, many = tmp_path / "fewer", tmp_path / "many"
    remove(place / "coded", [Bundle(place / "coded").manifest.adapters[1].name], fewer)
    assert serving.main(["repeat", str(fewer), str(many), "--adapters", "9"]) == 0
    words = ["--dummy", "tiny", "--bundles", str(many), "--rows", "bundle", "--add", str(place / "coded")]
    few = ["--loads", "28+4", "--requests", "6", "--warm-up", "2", "--max-num-seqs", "4", "--changes", "7"]
    engine = ["--gpu-memory-utilization", "0.05", "--engine", json.dumps(SMALL)]
    assert serving.main(["run", *words, *few, *engine, "--json", str(kept)]) == 0
    [row] = json.loads(kept.read_text())["rows"]
    assert row["changed"]["changes"] == 7
    assert row["changed"]["requests"] > 0
    assert 0 < row["changed"]["load_p50"] <= row["changed"]["load_most"] < row["changed"]["seconds"]
    assert row["changed"]["unload_p50"] > 0
    assert row["changed"]["gpu_bytes_more"] == 0 or torch.cuda.is_available()
    assert abs(row["changed"]["main_bytes_more"]) < 2**29  # a process with vLLM takes more
