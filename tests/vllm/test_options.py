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
from lorazip_core.vllm.forbidden import FORBIDDEN
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


def test_it_reads_a_file_as_we_do(tmp_path: Path) -> None:
    """What the file alone says holds, what the command says holds more, and settings of both are there."""
    compress(sample_path(), tmp_path / "bundle", CompressOptions())
    file = tmp_path / "options.yaml"
    file.write_text(
        "model: owner/base\nport: 82\nseed: 5\nmax_num_seqs: 4\nmax-lora-rank: 8\nenable-sleep-mode: false\n"
        "additional-config: {x: 1, y: {z: 2}}\n"
    )
    theirs = ("--seed", "6", f"--config={file}", "--additional_config", '{"x": 3}')
    made = plan(tmp_path / "bundle", "owner/base", port=81, more=theirs, version=installed(), environment={})
    read = make_arg_parser(FlexibleArgumentParser()).parse_args(made.command[3:])
    assert (read.model, read.port, read.seed) == ("owner/base", 81, 6)
    assert (read.enable_lora, read.max_num_seqs, read.max_loras, read.max_lora_rank) == (True, 4, 4, 8)
    assert read.additional_config.keys() == {"x", "y", "lorazip"}
    assert (read.additional_config["x"], read.additional_config["y"]) == (3, {"z": 2})


def test_what_is_forbidden_are_options_of_vllm() -> None:
    parser = make_arg_parser(FlexibleArgumentParser())
    assert {each.option for each in FORBIDDEN} <= parser._option_string_actions.keys()
