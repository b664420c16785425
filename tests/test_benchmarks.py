"""The benchmarks on tiny collections: their arithmetic, their random adapters, going on where they stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from random_adapters import LINEAR, dense_updates, plain, write_collection
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import errors_of_adapters
import fetch
import matched_collection
import number_of_clusters
import other_tools
import process

from lorazip_core.adapter import open_collection


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight adapters that stand for the real ones."""
    return write_collection(tmp_path_factory.mktemp("real"), plain(8, groups=2), seed=3)


def test_errors_are_those_of_dense_matrices(real: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for folder in real.iterdir():
        target = other / folder.name
        target.mkdir(parents=True)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["lora_alpha"] *= 1.5
        (target / "adapter_config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({key: each * 0.9 + 0.01 for key, each in tensors.items()}, target / "adapter_model.safetensors")
    weighted, by_module = [], []
    for folder in sorted(real.iterdir()):
        x, y = dense_updates(folder), dense_updates(other / folder.name)
        lost = [((x[name] - y[name]) ** 2).sum() for name in x]
        energy = [(x[name] ** 2).sum() for name in x]
        weighted.append(sum(lost) / sum(energy))
        by_module.append(np.mean([a / b for a, b in zip(lost, energy, strict=True)]))
    found = errors_of_adapters.compare(real, other)
    assert found == pytest.approx((np.mean(weighted), max(weighted), np.mean(by_module)), rel=1e-12)
    assert errors_of_adapters.compare(real, real).worst < 1e-28


def test_half_the_error_at_no_more_bytes_is_demanded() -> None:
    def row(tool: str, options: str, size: int, error: float) -> other_tools.Row:
        return other_tools.Row(tool, options, size, error, error, error, [1.0], [1], [1.0], [1])

    ours = row("lorazip", other_tools.TARGET, 100, 0.2)
    for error, holds in ((0.4, True), (0.39, False)):
        results = other_tools.checks([row("lorashare", "k = 8", 100, error), ours], 1000)
        assert [ok for ok, what in results if "lorashare" in what] == [holds, holds]
    assert "PASS" not in other_tools.table([ours], 1000)
    keeps_originals = other_tools.checks([row("vlora", "k = 16", 1001, 0.1), ours], 1000)[0]
    assert keeps_originals[0]
    assert "as they are" in keeps_originals[1]


def test_a_process_is_measured() -> None:
    done = process.run([sys.executable, "-c", "print(len(bytearray(50_000_000)))"])
    assert done.stdout == "50000000\n"
    assert 50e6 < done.peak_bytes < 150e6
    assert 0 < done.seconds < 60
    with pytest.raises(SystemExit, match="failed with 3"):
        process.run([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_generator_writes_the_same_valid_adapters_again(real: Path, tmp_path: Path) -> None:
    def write(name: str, *options: str) -> Path:
        assert matched_collection.main(["--data", str(real), "--out", str(tmp_path / name), *options]) == 0
        return tmp_path / name

    first, second = write("first", "--count", "3"), write("second", "--count", "2")
    other, part = write("other", "--count", "1", "--seed", "1"), write("part", "--count", "1", "--modules", "q_proj")
    weights = "s00000/adapter_model.safetensors"
    assert (first / weights).read_bytes() == (second / weights).read_bytes()
    assert (first / weights).read_bytes() != (other / weights).read_bytes()
    collection = open_collection(first)
    assert [adapter.name for adapter in collection.adapters] == ["s00000", "s00001", "s00002"]
    assert set(collection.modules) == set(LINEAR)
    scales = {part.scale for adapter in collection.adapters for part in adapter.parts.values()}
    assert scales == {part.scale for part in open_collection(real).adapters[0].parts.values()}
    assert all(adapter.dtype(module.name) == "BF16" for adapter in collection.adapters for module in LINEAR)
    assert [module.name for module in open_collection(part).modules] == [LINEAR[0].name]


def test_the_generator_compares(real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert matched_collection.main(["--data", str(real), "--show", "--batches", "1"]) == 0
    assert "joint, R=16, 4 clusters, mean, worst" in capsys.readouterr().out


def test_the_generator_says_when_the_data_is_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        matched_collection.main(["--data", str(tmp_path / "none"), "--show"])
    assert exit_.value.code == 2
    assert "not there" in capsys.readouterr().err


def test_the_least_cost_is_marked_and_rows_are_not_computed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    computed = []

    def fake(folder: Path, method: str, rank: int, clusters: int, **others: object) -> number_of_clusters.Row:
        computed.append(clusters)
        return number_of_clusters.Row(
            method=method,
            rank=rank,
            clusters=clusters,
            bytes_bundle=clusters,
            bytes_original=10,
            mean_squared_error=0.4 / clusters,
            max_squared_error=0.5,
            cost=0.4 / clusters + clusters / 10,
            sizes=[1] * clusters,
            seconds=1.0,
            peak_bytes=1,
            verified=False,
        )

    monkeypatch.setattr(number_of_clusters, "measure", fake)
    arguments = [str(tmp_path), "-o", str(tmp_path / "rows.json"), "--methods", "joint"]
    assert number_of_clusters.main([*arguments, "--clusters", "1,2"]) == 0
    assert number_of_clusters.main([*arguments, "--clusters", "1,2,3,4"]) == 0
    assert computed == [1, 2, 3, 4]
    first, second = capsys.readouterr().out.split("| method")[1:]
    assert [line.split("|")[2].strip() for line in second.splitlines() if "least" in line] == ["2"]
    assert ("more may be better" in first, "more may be better" in second) == (True, False)

    for clusters, code in ((2, 0), (3, 1)):
        file = tmp_path / "clusters.json"
        candidates = [{"method": "joint", "clusters": k, "chosen": k == clusters} for k in (1, 2, 3, 4)]
        file.write_text(json.dumps({"candidates": candidates}))
        again = number_of_clusters.main([*arguments, "--clusters", "1", "--auto", str(file)])
        assert again == code
    assert computed == [1, 2, 3, 4]


def test_compress_is_run_for_a_row(real: Path) -> None:
    row = number_of_clusters.measure(real, "joint", 4, 2, device="cpu", verify=True)
    assert sum(row["sizes"]) == 8
    assert row["cost"] == row["mean_squared_error"] + row["bytes_bundle"] / row["bytes_original"]


def test_fetch_is_timed_beside_loops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--count", "10", "--delay", "0.005", "--repeat", "1", "--work", str(tmp_path)]
    assert fetch.main([*words, "--faster", "0", "--json", str(tmp_path / "figures.json")]) == 0
    assert "PASS" in capsys.readouterr().out
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    size = rows["loop"]["bytes"][0]
    assert all(abs(rows[name]["bytes"][0] / size - 1) < 0.01 for name in ("fetch", "threads"))  # the same files
    assert rows["fetch"]["requests"][0] < rows["loop"]["requests"][0]
    assert [rows[f"fetch{what}"]["requests"][0] for what in (", again", " --update, again")] == [0, 11]
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_fetch_has_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(*arguments: object) -> dict[str, fetch.Row]:
        return {name: fetch.Row([seconds], [1], [1], [1]) for name, seconds in (("fetch", 2.0), ("loop", 9.0))}

    monkeypatch.setattr(fetch, "measure", fake)
    assert [fetch.main(["--count", "1", "--faster", limit]) for limit in ("4.4", "4.6")] == [0, 1]
