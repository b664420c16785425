"""The main job end to end, as a shell runs it: the installed command, its JSON against the schemas, PEFT at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from testing import random_adapters

from lorazip_core.adapter.collection import open_collection

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schemas"


def lorazip(*argv: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lorazip")), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == code, done.stderr
    return done


def report(*argv: str | Path, code: int = 0) -> dict[str, Any]:
    """The one JSON object that a command prints, valid by the schema that it names."""
    document = json.loads(lorazip(*argv, "--json", code=code).stdout)
    kind, version = document["schema"].removeprefix("lorazip.").split("/")
    jsonschema.validate(document, json.loads((SCHEMAS / f"{kind}-{version}.json").read_text()))
    return dict(document)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapters.write_collection(tmp_path_factory.mktemp("adapters"), random_adapters.MIXED)


@pytest.mark.parametrize(
    "method", ["joint", *(pytest.param(other, marks=pytest.mark.slow) for other in ("diag", "svd"))]
)
def test_compress_verify_export_info(adapters: Path, tmp_path: Path, method: str) -> None:
    bundle, out = tmp_path / "bundle", tmp_path / "out"
    planned = report("compress", adapters, "--method", method, "--rank", "3", "--dry-run")
    made = report("compress", adapters, "-o", bundle, "--method", method, "--rank", "3", "--max-error", "0.9")
    verified = report("verify", bundle, "--against", adapters)
    inside = report("info", bundle)
    exported = report("export", bundle, "-o", out)

    names = [recipe.name for recipe in random_adapters.MIXED]
    assert planned["adapters"] == made["summary"]["adapters"] == len(names)
    assert planned["schemes"][0]["method"] == made["method"] == method
    assert verified["ok"]
    assert verified["errors_are"] == "measured"
    assert verified["summary"]["max_squared_error"] == pytest.approx(made["worst"]["squared_error"], rel=1e-4)
    assert [adapter["name"] for adapter in inside["adapters"]] == names
    assert [adapter["name"] for adapter in exported["adapters"]] == names
    again = open_collection(out)
    assert [adapter.name for adapter in again.adapters] == names
    assert again.modules == open_collection(adapters).modules


@pytest.mark.slow
def test_a_gate_that_does_not_hold_exits_with_1(adapters: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    lorazip("compress", adapters, "-o", bundle, "--rank", "1")
    found = report("verify", bundle, "--against", adapters, "--max-error", "0.001", code=1)
    assert not found["ok"]
    assert {finding["kind"] for finding in found["findings"]} == {"max-error"}


@pytest.mark.slow
def test_a_flipped_bit_exits_with_4(adapters: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    lorazip("compress", adapters, "-o", bundle, "--method", "joint")
    basis = bundle / "bases" / "0.safetensors"
    data = bytearray(basis.read_bytes())
    data[-1] ^= 1
    basis.write_bytes(data)
    found = report("verify", bundle, code=4)
    assert [finding["path"] for finding in found["findings"]] == ["bases/0.safetensors"]


@pytest.mark.slow
def test_bad_adapters_are_all_named_and_exit_with_3(tmp_path: Path) -> None:
    root = random_adapters.write_collection(tmp_path / "in", random_adapters.plain(3))
    for name in ("t00", "t01"):
        (root / name / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    failed = lorazip("compress", root, "-o", tmp_path / "bundle", "-q", code=3)
    lines = failed.stderr.splitlines()
    assert len(lines) == 3
    assert "'t00'" in lines[0]
    assert "'t01'" in lines[1]
    assert not (tmp_path / "bundle").exists()
    left = report("compress", root, "-o", tmp_path / "bundle", "--skip-bad")
    assert [skipped["name"] for skipped in left["skipped"]] == ["t00", "t01"]
