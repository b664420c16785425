"""That vLLM's own parser takes the command of `lorazip serve`, and understands it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions
from lorazip_core.sample import sample_path
from lorazip_core.vllm.launch import SERVER, plan
from lorazip_core.vllm.versions import installed


def test_it_reads_what_is_meant(tmp_path: Path) -> None:
    compress(sample_path(), tmp_path / "bundle", CompressOptions())
    theirs = ("--max_num_seqs", "8", "-tp", "2", "-O1", "--additional-config", '{"x": 1}')
    made = plan(
        tmp_path / "bundle",
        "owner/base",
        host="::1",
        port=81,
        spare=2,
        more=theirs,
        version=installed(),
        environment={},
    )
    assert made.command[1:3] == list(SERVER)
    read = make_arg_parser(FlexibleArgumentParser()).parse_args(made.command[3:])
    assert (read.model, read.host, read.port) == ("owner/base", "::1", 81)
    assert (read.enable_lora, read.max_loras, read.max_lora_rank, read.max_cpu_loras) == (True, 8, 1, None)
    assert (read.max_num_seqs, read.tensor_parallel_size) == (8, 2)
    digest = json.loads((tmp_path / "bundle" / "manifest.json").read_bytes())["manifest_sha256"]
    settings = {"bundle": str(tmp_path / "bundle"), "manifest_sha256": digest, "spare": 2}
    assert read.additional_config == {"x": 1, "lorazip": settings}
