"""The benchmarks on tiny collections: their arithmetic, their random adapters, going on where they stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.random_adapters import LINEAR, dense_updates, plain, write_collection

sys.path.insert(0, str(Path(__file__).parent))

import compressing
import eigen_iteration
import errors_of_adapters
import experts
import fetch
import floor
import grouped_collection
import matched_collection
import number_of_clusters
import other_tools
import process
import readers
import resident
import rounds
import scale
import scale_cpu

from lorazip_core.adapter.collection import open_collection
from lorazip_core.adapter.formats.peft import factor_keys
from lorazip_core.adapter.module import Module
from lorazip_core.maths.factored import truncated_svd


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight adapters that stand for the real ones."""
    return write_collection(tmp_path_factory.mktemp("real"), plain(8, groups=2), seed=3)


def test_made_up_experts_are_adapters(tmp_path: Path) -> None:
    experts.write(tmp_path, experts.Shape(experts=3, layers=2, hidden=8, inner=6, rank=2), adapters=2)
    collection = open_collection(tmp_path)
    assert len(collection.adapters) == 2
    shapes = {module.target.rpartition(".")[2]: (module.d_out, module.d_in) for module in collection.modules}
    assert shapes == {"gate_up_proj": (12, 8), "down_proj": (8, 6)}
    assert len(collection.modules) == 2 * 2 * 3


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
    assert done.seconds > 0
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
    stored = [adapter.stored_factors(module.name) for adapter in collection.adapters for module in LINEAR]
    assert all(factor.dtype == torch.bfloat16 for factors in stored for factor in factors)
    assert [module.name for module in open_collection(part).modules] == [LINEAR[0].name]


@pytest.mark.slow
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


@pytest.mark.slow
def test_compress_is_run_for_a_row(real: Path) -> None:
    row = number_of_clusters.measure(real, "joint", 4, 2, device="cpu", verify=True)
    assert sum(row["sizes"]) == 8
    assert row["cost"] == row["mean_squared_error"] + row["bytes_bundle"] / row["bytes_original"]


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve tiny adapters of two groups, as `scale.py make` writes them."""
    folder = tmp_path_factory.mktemp("large") / "grouped"
    words = ["--adapters", "12", "--shape", "tiny", "--groups", "2", "--device", "cpu"]
    assert scale.main(["make", str(folder), *words]) == 0
    return folder


def test_a_large_collection_grows_without_changing(
    grouped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--shape", "tiny", "--groups", "2", "--device", "cpu", "--adapters", "5"]
    assert scale.main(["make", str(tmp_path / "few"), *words]) == 0
    assert "5 adapters of 3 modules at rank 4" in capsys.readouterr().out
    assert scale.main(["make", str(tmp_path / "other"), *words, "--seed", "1"]) == 0
    weights = "a00004/adapter_model.safetensors"
    assert (tmp_path / "few" / weights).read_bytes() == (grouped / weights).read_bytes()
    assert (tmp_path / "other" / weights).read_bytes() != (grouped / weights).read_bytes()
    with pytest.raises(SystemExit, match="not empty"):
        scale.main(["make", str(grouped), *words])
    collection = open_collection(grouped)
    assert [adapter.name for adapter in collection.adapters] == [f"a{number:05}" for number in range(12)]
    stored = [adapter.stored_factors(module.name) for adapter in collection.adapters for module in collection.modules]
    assert all(factor.dtype == torch.bfloat16 for factors in stored for factor in factors)
    assert all(part.rank == 4 and part.scale == 2 for part in collection.adapters[0].parts.values())


def test_its_shapes_are_those_of_the_models() -> None:
    mistral = grouped_collection.recipe("mistral-7b")
    assert len(mistral.modules) == 96
    assert mistral.bytes_per_adapter == 2 * 16 * 589_824
    q, k = mistral.modules[:2]
    assert (q.d_out, q.d_in, k.d_out, k.d_in) == (4096, 4096, 1024, 4096)
    with pytest.raises(SystemExit, match="no projection 'x'"):
        grouped_collection.recipe("cpu", letters=("q", "x"))


def test_adapters_that_are_alike_fit_one_basis(tmp_path: Path) -> None:
    words = ["--count", "8", "--shape", "tiny", "--layers", "1", "--groups", "2"]
    lost = []
    for place in ("alike", "real"):
        assert (
            grouped_collection.main(["--out", str(tmp_path / place), *words, *(["--alike"] * (place == "alike"))]) == 0
        )
        collection = open_collection(tmp_path / place)
        updates = [torch.matmul(*adapter.factors(collection.modules[0].name)) for adapter in collection.adapters[::2]]
        values = torch.linalg.svdvals(torch.cat([update / update.norm() for update in updates], dim=1)).square()
        lost.append(float(values[6:].sum() / values.sum()))
    assert lost[0] < 0.5 * lost[1]
    with pytest.raises(SystemExit):
        grouped_collection.main(["--out", str(tmp_path / "real"), *words])


def test_adapters_of_a_group_are_more_alike_than_others() -> None:
    of = grouped_collection.recipe("tiny", d_model=128, letters=("q",), groups=4)
    source = grouped_collection.Source(of, torch.device("cpu"))
    key_b, key_a = factor_keys(of.modules[0])
    drawn = [source.draw(number) for number in range(40)]
    b, a = (torch.stack([one[key].float() for one in drawn]) for key in (key_b, key_a))
    us, vt = truncated_svd(b, a, 4)
    u, v = us / us.norm(dim=1, keepdim=True), vt.mT
    inner = (u[:, :, 0] @ u[:, :, 0].mT * (v[:, :, 0] @ v[:, :, 0].mT)).square()
    same = torch.arange(40)[:, None] % 4 == torch.arange(40) % 4
    different = inner[~same].mean()
    same &= ~torch.eye(40, dtype=torch.bool)
    assert 3 * different < inner[same].mean() < 0.5
    share = us[:, :, 0].square().sum(1) / us.square().sum((1, 2))
    assert 0.5 < float(share.median()) < 0.95


def test_a_process_is_watched_with_all_that_it_starts() -> None:
    child = "import sys; kept = bytearray(60_000_000); print('there', flush=True); sys.stdin.read()"
    program = f"""
import subprocess, sys
files = [open("/dev/null") for _ in range(40)]
kept = bytearray(50_000_000)
subprocess.run([sys.executable, "-c", {child!r}])
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "there\n"
        seen = process._sample(waiting.pid, True)
        waiting.communicate()
    assert 110e6 < seen["anonymous"] < 250e6
    assert seen["anonymous"] <= seen["resident"]
    assert 40 < seen["open_files"] < 80
    done = process.run([sys.executable, "-c", program])  # there is nothing to read, and its child ends
    assert done.peak_bytes < 110e6  # the largest single process, as the kernel counts it


def test_a_process_meets_its_limit_or_is_killed() -> None:
    program = "import time; kept = bytearray(300_000_000); print('there'); time.sleep(600)"
    limited = process.run([sys.executable, "-c", program], data_limit=200_000_000, check=False)
    assert (limited.exit_code, limited.stdout) == (1, "")
    assert "MemoryError" in limited.stderr
    killed = process.run([sys.executable, "-u", "-c", program], kill_after=0.5, check=False)
    assert killed.exit_code == -9
    assert killed.stdout in ("", "there\n")  # whether it had come so far


@pytest.mark.slow
def test_every_way_to_read_reads_every_byte(grouped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scale.main(["read", str(grouped), "--json", str(tmp_path / "read.json")]) == 0
    table = capsys.readouterr().out
    figures = json.loads((tmp_path / "read.json").read_text())["readings"]
    size = sum(path.stat().st_size for path in grouped.glob("*/adapter_model.safetensors"))
    assert [(one["how"], one["threads"]) for one in figures] == [readers.BASELINE, *readers.OTHERS]
    assert all((one["adapters"], one["bytes"]) == (12, size) for one in figures)
    assert all(0 < one["seconds"] < one["process_seconds"] for one in figures)
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 1 + len(figures)
    assert readers.warm(grouped) == size


@pytest.mark.slow
def test_compressing_is_timed_beside_reading(grouped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--clusters", "2", "--rank", "4", "--device", "cpu", "--rounds", "2", "--at-most", "1000"]
    more = ["--scaling", "6", "--hard-limit", "50000000", "--json", str(tmp_path / "run.json")]
    # The limit is one that nothing can run in, and a trial that fails is a failure.
    assert scale.main(["run", str(grouped), *words, *more]) == 1
    out = capsys.readouterr().out
    assert "PASS compress takes" in out
    assert "the same bytes in every round" in out
    report = json.loads((tmp_path / "run.json").read_text())
    assert len(report["readings"]) == len(report["runs"]) == 2
    for name, ratios in report["ratios"].items():
        over = {"both with start-up": "process_seconds"}.get(name, "seconds")
        under = {"neither with start-up": "own_seconds"}.get(name, "seconds")
        pairs = zip(report["runs"], report["readings"], strict=True)
        assert ratios == [run[under] / read[over] for run, read in pairs]
    assert all(run["mean_squared_error"] < run["max_squared_error"] < 1 for run in report["runs"])
    assert report["verify"]["seconds"] > 0
    assert [one["adapters"] for one in report["scaling"]] == [6, 6]
    assert report["scaling"][0]["bytes_manifest"] < report["runs"][0]["bytes_manifest"]
    assert report["trials"][0]["exit_code"] != 0
    assert report["trials"][0]["same_bytes"] is None
    assert [path.name for path in grouped.parent.iterdir()] == ["grouped"]  # nothing stays beside it


@pytest.mark.slow
def test_a_killed_run_is_done_again_with_the_same_bytes(grouped: Path, tmp_path: Path) -> None:
    settings = compressing.Settings(clusters=2, rank=4, device="cpu")
    compressing.compress(grouped, tmp_path / "bundle", settings, adapters=12)
    killed, again = rounds.resumed(grouped, tmp_path, settings, 12, after=0.2)
    assert (killed.run.exit_code, killed.same, killed.holds) == (-9, None, True)
    assert (again.run.exit_code, again.same, again.holds) == (0, True, True)
    other = rounds.trial("another rank", grouped, tmp_path, compressing.Settings(2, 3, "cpu"), 12)
    assert (other.same, other.holds) == (False, False)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_links_come_round_again(grouped: Path, tmp_path: Path) -> None:
    linked = compressing.linked(grouped, tmp_path / "linked", 15)
    names = [adapter.name for adapter in open_collection(linked).adapters]
    assert names == [*(f"k00000/a{n:05}" for n in range(12)), *(f"k00001/a{n:05}" for n in range(3))]
    weights = "a00002/adapter_model.safetensors"
    assert (linked / "k00001" / weights).samefile(grouped / weights)


def test_a_line_is_fitted() -> None:
    assert rounds.line_through([(1, 5.0), (2, 7.0), (4, 11.0)]) == pytest.approx((3, 2))
    assert rounds.line_through([(1, 5.0)]) == (5, 0)


def test_the_rise_of_a_gpu_is_that_of_the_fullest() -> None:
    assert compressing._rise("0, 100\n1, 10\n0, 140\n1, 90\n0, 120\n1, 20\n") == 80 << 20
    assert compressing._rise("") is None


def test_the_floor_is_that_by_hand() -> None:
    modules = [(6, 4), (2, 4)]  # Σ (d_out + d_in) = 16
    slow = floor.Device(bandwidth=100.0, f32=1000.0, f64=10.0)
    # 10 adapters of rank 3: 480 numbers in bf16; two clusters' bases of 5 columns: 160 in float32.
    assert floor.floor(10, modules, 3, 2, [floor.Pass(5)], slow) == (960 + 640, 2 * 480 * 5, 16.0)
    back = floor.floor(10, modules, 3, 2, [floor.Pass(5, 3, back=True)], slow)
    each = 960 + 2 * 640, 2 * 2 * 480 * 5 + 4 * 2 * 16 * 25
    assert back == (3 * each[0], 3 * each[1], pytest.approx(3 * each[0] / 100))
    exact = floor.floor(10, modules, 3, 2, [floor.Pass(5, exact=True)], slow)
    assert exact.seconds == pytest.approx(4800 / 10)
    assert floor.floor(10, modules, 3, 2, [floor.Pass(5, everywhere=True)], slow) == (1600, 2 * 4800, 16.0)


def test_passes_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert floor.parse_pass("64x2b") == floor.Pass(64, 2, back=True)
    assert floor.parse_pass("16e") == floor.Pass(16, 1, exact=True)
    assert floor.parse_pass("16ae") == floor.Pass(16, 1, exact=True, everywhere=True)
    with pytest.raises(SystemExit, match="is no pass"):
        floor.parse_pass("x2")
    assert scale.main(["floor", "--adapters", "1000", "--passes", "64x2b", "16e", "--measured", "3"]) == 0
    one, several = capsys.readouterr().out.splitlines()
    # 18.87 GB of factors and 0.94 GB of bases at 3.35 TB/s take longer than 0.30 TFLOP at 67 TFLOP/s.
    assert one.startswith(
        "one pass: 1,000 adapters, 96 modules: 19.8 GB moved, 0.30 TFLOP, floor 5.9 ms; measured 3.000 s"
    )
    assert one.endswith(" 507.1 times the floor")
    assert several.startswith("64x2b 16e: ")


def test_the_iteration_of_the_paper_finds_what_was_planted() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 3, generator=generator)).Q for size in (30, 20))
    members = [(u @ torch.randn(3, 4, generator=generator), torch.randn(4, 3, generator=generator) @ v.mT)] * 2
    members += [(u @ torch.randn(3, 2, generator=generator), torch.randn(2, 3, generator=generator) @ v.mT)]
    bases, done = eigen_iteration.eigen_iteration(members, 3, generator)
    assert done < 20
    gone, energy = eigen_iteration.lost(members, bases)
    assert abs(gone) < 1e-9 * energy
    _, cut = eigen_iteration.eigen_iteration(members, 3, generator, most=1)
    assert cut == 1
    gone, _ = eigen_iteration.lost(members, (u[:, :2], v))
    dense = [((b - u[:, :2] @ (u[:, :2].mT @ b)) @ a).double().square().sum() for b, a in members]
    assert gone == pytest.approx(float(sum(dense)), rel=1e-4)


def test_joint_is_compared_with_the_iteration(
    grouped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    report = compressing.compress(grouped, bundle, compressing.Settings(2, 4, "cpu", ("--dtype", "f32")), adapters=12)
    words = ["--bundle", str(bundle), "--modules", "3", "--device", "cpu", "--json", str(tmp_path / "eigen.json")]
    assert eigen_iteration.main([str(grouped), *words]) == 0
    assert "times as fast" in capsys.readouterr().out
    rows = json.loads((tmp_path / "eigen.json").read_text())["rows"]
    assert len(rows) == 3
    for row in rows:
        assert row["joint_error"] <= row["eigen_error"] * (1 + 1e-4) < 1  # many starts, not one
        assert row["eigen_error"] < 1.1 * row["joint_error"]
        assert len(row["rounds"]) == 2
    assert report.mean_squared_error is not None
    problems, rank = eigen_iteration.load(grouped, bundle, 3, torch.device("cpu"))
    assert rank == 4
    # Weighted by adapter, the errors of all modules add up to the mean of the bundle.
    parts = [
        [eigen_iteration.lost(m, eigen_iteration.solve_joint([p], 4, 0)[0][c]) for c, m in p.clusters.items()]
        for p in problems
    ]
    assert sum(x for part in parts for x, _ in part) / 12 == pytest.approx(report.mean_squared_error, rel=1e-3)
    assert sum(x for part in parts for _, x in part) == pytest.approx(12, rel=1e-6)


@pytest.mark.slow
def test_memory_and_many_on_a_cpu(grouped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, place = tmp_path / "figures.json", ["--work", str(tmp_path)]
    sizes = ["--clusters", "2", "--rank", "4"]
    words = ["memory", str(grouped), *sizes, "--at-most", "1000", "--json", str(file), *place]
    assert scale_cpu.main(words) == 1
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 1
    assert 1000 < rows[0]["above"] < 500e6
    assert rows[0]["watched"]["anonymous"] == rows[0]["above"] + rows[0]["idle"]
    assert scale_cpu.main(["many", "--hard-links", "10,30", *sizes, "--json", str(file), *place]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["adapters"] for row in rows] == [10, 30]
    assert rows[1]["bytes_manifest"] < 3 * rows[0]["bytes_manifest"]
    assert "least squares" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.slow
def test_codes_for_a_fixed_width_take_less_of_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modules = tuple(Module(f"layers.{i}.proj", "linear", 256, 192) for i in range(4))
    folder = write_collection(tmp_path / "some", plain(4, rank=6, modules=modules))
    assert resident.stored(folder) == 4 * 4 * 6 * (256 + 192) * 2
    assert resident.main([str(folder), "--times", "10"]) == 0
    [line] = capsys.readouterr().out.splitlines()[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0].startswith("some, ")
    assert float(cells[2]) < float(cells[1])
    assert cells[3] == f"{100 * (float(cells[2]) / float(cells[1]) - 1):+.0f}%"
