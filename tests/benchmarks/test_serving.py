"""The benchmark of serving, with a stand-in for the engine: what it is told, and what becomes of what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from testing.random_adapters import plain, write_collection

sys.path.insert(0, str(Path(__file__).parent))

import serving

from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions

# As fast as it has slots, and faster in every round; it fails after the first load where its environment says so.
ENGINE = """\
import json, os, sys
spec = json.load(open(sys.argv[1]))
slots = spec["engine"].get("max_loras", 0)
with open(spec["results"], "a") as file:
    def write(**measured): file.write(json.dumps(measured) + "\\n")
    write(vllm="0.30.0", start_seconds=2.0, cache_tokens=64)
    for load in spec["loads"]:
        for number in range(spec["rounds"]):
            seconds = 1 + slots - number / 4
            speed = {"requests_per_second": 8 / seconds, "tokens_per_second": 80 / seconds}
            write(load=load["name"], requests=8, seconds=seconds, first_token_p50=0.1, first_token_p99=0.2, **speed)
        file.flush()
        if str(slots) == os.environ.get("FAILS_WITH"):
            raise ValueError("no room")
with open(os.environ["SEEN"], "a") as file:
    file.write(json.dumps(spec) + "\\n")
"""


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run it on three adapters and their bundle: exit code, table, lines for people, what engines were told."""
    adapters, bundle, seen = tmp_path / "adapters", tmp_path / "made", tmp_path / "seen"
    write_collection(adapters, plain(3), seed=1)
    compress(adapters, bundle, CompressOptions())
    (tmp_path / "engine.py").write_text(ENGINE)
    monkeypatch.setattr(serving, "ENGINE", tmp_path / "engine.py")
    monkeypatch.setenv("SEEN", str(seen))

    def run(*words: str) -> tuple[int, list[list[str]], str, list[Any]]:
        seen.write_text("")
        about = ["--dummy", "tiny", "--adapters", str(adapters), "--bundles", str(bundle), "--max-num-seqs", "2"]
        code = serving.main(["run", *about, "--requests", "8", "--loads", "4+2,4+3", *words])
        output = capsys.readouterr()
        table = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.out.splitlines()[2:]]
        return code, table, output.err, list(map(json.loads, seen.read_text().splitlines()))

    return run


def test_every_row_has_an_engine_of_its_own(measured: Any, tmp_path: Path) -> None:
    code, table, _, told = measured()
    assert code == 0
    names = ["base", "one", "bundle made", "stock, 1 slots as made", "stock, 2 slots"]
    assert [row[:2] for row in table] == [[load, name] for load in ("4+2", "4+3") for name in names]
    base, one, bundle, in_bytes, in_sequences = (spec["engine"] for spec in told)
    assert not base.keys() & {"enable_lora", "max_loras"}
    assert all(engine["load_format"] == "dummy" and engine["max_model_len"] == 8 for engine in (base, bundle))
    lora = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": one["lora_target_modules"]}
    for engine, slots, held in ((one, 1, 1), (in_bytes, 1, 3), (in_sequences, 2, 3)):
        expected = {**base, **lora, "max_loras": slots, "max_cpu_loras": held}
        assert engine == {**expected, "model": engine["model"]}
    assert one["lora_target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert [len(spec["adapters"]) for spec in told] == [0, 1, 3, 3, 3]
    assert [spec["preload"] for spec in told] == [False, True, False, True, True]
    digest = json.loads((tmp_path / "made" / "manifest.json").read_bytes())["manifest_sha256"]
    settings = {"bundle": str(tmp_path / "made"), "manifest_sha256": digest, "spare": 0}
    assert bundle["additional_config"] == {"lorazip": settings}
    assert (bundle["max_loras"], bundle["max_lora_rank"]) == (2, 1)
    assert all(path == f"lorazip:{name}" for name, path in told[2]["adapters"])


def test_speeds_are_beside_those_of_the_base(measured: Any) -> None:
    _, table, said, _ = measured("--rows", "stock-seqs,base", "--rounds", "3")
    assert [row[1:5] for row in table[:2]] == [
        ["stock, 2 slots", "2.9", "27%", "29"],  # of 3, 2.75 and 2.5 seconds that of 2.75
        ["base", "10.7", "100%", "107"],
    ]
    assert said.splitlines()[0].startswith("stock, 2 slots, 4+2: 2.9 requests/s, - of base")


def test_what_was_measured_outlives_a_failure(measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS_WITH", "2")
    kept = ["--json", str(tmp_path / "rows.json")]
    code, table, said, _ = measured(*kept, "--rows", "stock-seqs,base")
    assert code == 1
    assert [row[:2] for row in table] == [["4+2", "stock, 2 slots"], ["4+2", "base"], ["4+3", "base"]]
    assert "stock, 2 slots: FAILED: 1: ValueError: no room (" in said
    monkeypatch.delenv("FAILS_WITH")
    code, table, _, told = measured(*kept, "--rows", "stock-seqs")
    assert (code, len(told)) == (0, 1)
    assert sorted(row[1] for row in table) == ["base"] * 2 + ["stock, 2 slots"] * 2
    with pytest.raises(SystemExit, match="other settings"):
        measured(*kept, "--rows", "base", "--seed", "1")


def test_an_engine_that_hangs_is_ended(measured: Any, tmp_path: Path) -> None:
    (tmp_path / "engine.py").write_text("import time\ntime.sleep(600)\n")
    code, table, said, _ = measured("--rows", "base", "--timeout", "0.2")
    assert (code, table) == (1, [])
    assert "base: FAILED: more than 0.2 s: see its log" in said


@pytest.mark.parametrize("rows", ["one", "bundle", "stock-bytes", "stock-seqs", "other"])
def test_what_a_row_needs_is_asked_for(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        serving.main(["run", "--dummy", "tiny", "--rows", rows])
    assert "needs --" in str(raised.value) or "no row 'other'" in capsys.readouterr().err
