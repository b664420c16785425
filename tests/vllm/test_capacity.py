"""How many adapters a GPU holds, against the same arithmetic on what is in the bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from testing.random_adapters import plain, write_collection

from lorazip_cli.main import main
from lorazip_core.bundle.manifest import read_manifest
from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions
from lorazip_core.sample import sample_path

GPU = 10**9


@pytest.fixture(scope="module")
def base(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of two files, whose modules fit, with 1,000,000 bytes more."""
    folder = tmp_path_factory.mktemp("base")
    weights = {
        f"{module.name}.weight": torch.zeros(module.d_out, module.d_in, dtype=torch.bfloat16)
        for module in read_manifest(bundle, ()).modules
    }
    save_file(weights, folder / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": torch.zeros(250_000)}, folder / "model-00002-of-00002.safetensors")
    save_file({"output.weight": torch.zeros(250_000)}, folder / "consolidated.safetensors")
    return folder


@pytest.fixture
def asked(bundle: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def ask(*words: str) -> Any:
        assert main(["info", str(bundle), "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    return ask


def slot(bundle: Path, rank: int) -> int:
    return sum(2 * rank * (each.d_out + each.d_in) for each in read_manifest(bundle, ()).modules)


def test_a_slot_is_of_the_rank_of_the_originals(bundle: Path, asked: Any) -> None:
    report = asked("--serving")
    expected = slot(bundle, 16)
    resident = report["resident"]["bytes"]
    assert report["serving"] == {
        "slots": {"rank": 16, "bytes": expected, "in_bytes_of_bundle": resident // expected, "fit": None},
        "memory": None,
    }


def test_ranks_are_rounded_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_collection(tmp_path / "adapters", plain(2), seed=1)
    compress(tmp_path / "adapters", tmp_path / "bundle", CompressOptions())
    assert main(["info", str(tmp_path / "bundle"), "--json", "--serving"]) == 0
    found = json.loads(capsys.readouterr().out)["serving"]["slots"]
    assert (found["rank"], found["bytes"]) == (8, slot(tmp_path / "bundle", 8))


@pytest.mark.parametrize("shared", [False, True])
def test_what_fits_is_what_is_left_in_shares_of_an_adapter(
    shared: bool, bundle: Path, base: Path, asked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if shared:
        compress(sample_path(), tmp_path / "joint", CompressOptions(method="joint", rank=8))
        assert main(["info", str(tmp_path / "joint"), "--json", "--serving", "--gpu-memory", str(GPU)]) == 0
        report, weights, share = json.loads(capsys.readouterr().out), None, 0.3
    else:
        report = asked("--serving", "--gpu-memory", "1GB", "--model", str(base), "--cache-share", "0.25")
        modules = read_manifest(bundle, ()).modules
        weights, share = 1_000_000 + sum(2 * each.d_out * each.d_in for each in modules), 0.25
    left = GPU - round(share * GPU) - (weights or 0)
    held = report["resident"]
    memory = report["serving"]["memory"]
    fit = memory.pop("fit")
    assert memory == {
        "bytes": GPU,
        "bytes_model": weights,
        "bytes_cache": round(share * GPU),
        "bytes_adapters": left,
    }
    assert held["bytes_shared"] + fit * held["mean_bytes_own"] <= left
    assert held["bytes_shared"] + (fit + 1) * held["mean_bytes_own"] > left
    assert report["serving"]["slots"]["fit"] == left // slot(bundle, 16)


def test_where_the_model_alone_is_too_large_nothing_fits(base: Path, asked: Any) -> None:
    report = asked("--serving", "--gpu-memory", "1MB", "--model", str(base))["serving"]
    assert report["memory"]["bytes_adapters"] < 0
    assert (report["memory"]["fit"], report["slots"]["fit"]) == (0, 0)


def test_the_listing_says_it(bundle: Path, base: Path, asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--serving", "--gpu-memory", "1GB", "--model", str(base)]
    fit = asked(*words)["serving"]["memory"]["fit"]
    assert main(["info", str(bundle), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    [gpu] = [line for line in lines if line.startswith("GPU ")]
    assert gpu.startswith(
        "GPU          1,000.0 MB: 7.6 MB for the base model, 300.0 MB for the KV cache and all else, "
    )
    [fits] = [line for line in lines if line.startswith("fits ")]
    assert fits.startswith(f"fits         {fit:,} adapters like these, or ")
    assert main(["info", str(bundle), "--serving", "--gpu-memory", "1MB", "--model", str(base)]) == 0
    assert ", 0.3 MB for the KV cache and all else, which is 6.9 MB too much\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gpu-memory", "1GB"], "--gpu-memory says nothing without --serving"),
        (["--serving", "--model", "."], "--model says nothing without --gpu-memory"),
        (["--serving", "--gpu-memory", "1GB", "--cache-share", "1"], "1.0 is not a share"),
        (["--serving", "--gpu-memory", "1GB", "--model", "NOWHERE"], "NOWHERE has no safetensors files"),
    ],
)
def test_what_makes_no_sense(bundle: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(bundle), *words]) == 2
    assert line in capsys.readouterr().err


def test_another_model_is_refused(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = read_manifest(bundle, ()).modules[0].name
    save_file({f"{name}.weight": torch.zeros(3, 5)}, tmp_path / "model.safetensors")
    words = ["--serving", "--gpu-memory", "1GB", "--model", str(tmp_path)]
    assert main(["info", str(bundle), *words]) == 2
    assert f"is not the base model of these adapters: {name} is" in capsys.readouterr().err
