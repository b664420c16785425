"""Bundles that meet a budget or a mean error: never beyond it, not far below it, and as the plan has said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing import random_adapters as ra
from testing.broken import reseal

from lorazip_cli.main import main
from lorazip_core.adapter.module import Module
from lorazip_core.base.errors import UsageError
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.packed import packed_files
from lorazip_core.compress.run import CompressReport, compress
from lorazip_core.planning.options import CompressOptions
from lorazip_core.planning.plan import plan
from lorazip_core.serving.resident import Resident
from lorazip_core.verify.run import verify

MODULES = tuple(Module(f"layers.{i}.proj", "linear", 768, 512 + 256 * (i % 2)) for i in range(6))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ra.write_collection(tmp_path_factory.mktemp("adapters"), ra.plain(10, groups=3, rank=6, modules=MODULES))


def made(root: Path, bundle: Path, **wanted: Any) -> CompressReport:
    """A bundle that `verify` finds to be sound and true."""
    report = compress(root, bundle, CompressOptions(**wanted))
    assert verify(bundle, against=root).ok
    files = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    assert report.summary.bytes_bundle == files
    return report


@pytest.mark.parametrize(
    ("method", "budget"), [("auto", 40_000), ("coded", 80_000), ("coded", 200_000), ("svd", 400_000), ("svd", 700_000)]
)
def test_a_budget_is_met_and_used(adapters: Path, tmp_path: Path, method: Any, budget: int) -> None:
    report = made(adapters, tmp_path / "out", method=method, budget=budget)
    assert 0.95 * budget <= report.summary.bytes_bundle <= budget
    planned = plan(adapters, CompressOptions(method=method, budget=budget))
    assert planned.within_bound
    [chosen] = [point for point in planned.frontier if point.chosen]
    assert chosen.bytes_bundle == pytest.approx(report.summary.bytes_bundle, rel=0.05)
    assert chosen.mean_squared_error == pytest.approx(report.summary.mean_squared_error, rel=0.1)


@pytest.mark.parametrize(("method", "budget"), [("auto", 30_000), ("coded", 100_000), ("svd", 400_000)])
def test_a_budget_of_resident_bytes_is_met_and_used(adapters: Path, tmp_path: Path, method: Any, budget: int) -> None:
    wanted = {"method": method, "budget_per_adapter": budget // 10, "objective": "resident"}
    report = made(adapters, tmp_path / "out", **wanted)
    held = Resident.of(Bundle(tmp_path / "out"), torch.device("cpu"))
    assert report.bytes_resident == held.nbytes
    assert 0.95 * budget <= held.nbytes <= budget
    [chosen] = [point for point in plan(adapters, CompressOptions(**wanted)).frontier if point.chosen]
    assert chosen.bytes_bundle is None
    assert chosen.bytes_resident == pytest.approx(held.nbytes, rel=0.05)
    assert chosen.mean_squared_error == pytest.approx(report.summary.mean_squared_error, rel=0.1)


@pytest.mark.parametrize("error", [0.03, 0.1])
def test_what_is_few_is_what_was_asked_for(adapters: Path, tmp_path: Path, error: float) -> None:
    """At one error, codes for the disk take more on a device, and those for the device more on the disk."""
    taken = {}
    for objective in ("disk", "resident"):
        report = made(adapters, tmp_path / objective, max_mean_error=error, objective=objective)
        assert 0.95 * error <= report.summary.mean_squared_error <= error
        held = Resident.of(Bundle(tmp_path / objective), torch.device("cpu")).nbytes
        taken[objective] = report.summary.bytes_bundle, held
    assert taken["resident"][1] < 0.9 * taken["disk"][1]
    assert taken["resident"][0] > taken["disk"][0]


def test_more_bytes_lose_less(adapters: Path, tmp_path: Path) -> None:
    errors = [
        made(adapters, tmp_path / str(budget), budget=budget).summary.mean_squared_error
        for budget in (40_000, 80_000, 160_000)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("method", ["coded", "svd"])
@pytest.mark.parametrize("mean", [0.02, 0.1, 0.3])
def test_a_mean_error_is_met_and_used(adapters: Path, tmp_path: Path, method: Any, mean: float) -> None:
    report = made(adapters, tmp_path / "out", method=method, max_mean_error=mean)
    assert report.summary.mean_squared_error <= mean
    assert method == "svd" or report.summary.mean_squared_error >= 0.95 * mean  # a rank is no fine measure


def test_a_budget_by_the_adapter_is_one_for_all(adapters: Path, tmp_path: Path) -> None:
    made(adapters, tmp_path / "each", budget_per_adapter=8_000)
    made(adapters, tmp_path / "all", budget=80_000)
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("each", "all")]
    assert manifests[0] == manifests[1]


def test_an_attempt_that_misses_is_followed_by_one_that_does_not(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorazip_core.planning.spectra.FIRST_AIM", 1.5)
    report = made(adapters, tmp_path / "over", budget=80_000)
    assert 76_000 <= report.summary.bytes_bundle <= 80_000
    monkeypatch.setattr("lorazip_core.planning.spectra.FIRST_AIM", 0.5)
    report = made(adapters, tmp_path / "under", budget=80_000)
    assert 76_000 <= report.summary.bytes_bundle <= 80_000


@pytest.mark.parametrize("aim", [1.5, 0.5])
def test_an_attempt_that_misses_resident_bytes_is_followed(
    adapters: Path, tmp_path: Path, aim: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorazip_core.planning.spectra.FIRST_AIM", aim)
    report = made(adapters, tmp_path / "out", budget=80_000, objective="resident")
    assert 76_000 <= report.bytes_resident <= 80_000


def test_a_mean_error_that_is_far_from_used_up_is_followed_by_one_that_is(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorazip_core.planning.spectra.FIRST_AIM", 0.5)
    report = made(adapters, tmp_path / "out", max_mean_error=0.1)
    assert 0.098 <= report.summary.mean_squared_error <= 0.1


@pytest.mark.parametrize("method", ["coded", "svd"])
def test_every_budget_is_met_that_can_be(tmp_path: Path, method: Any) -> None:
    """Also of so few updates that sizes are far apart, and no prediction is right."""
    modules = tuple(Module(f"layers.{i}.proj", "linear", 3 + 30 * i, 5 + 11 * i) for i in range(3))
    root = ra.write_collection(tmp_path / "adapters", ra.plain(2, rank=2, modules=modules))
    least = made(root, tmp_path / "least", method=method, max_mean_error=1.0).summary.bytes_bundle
    for more in range(0, 320, 40):
        report = made(root, tmp_path / str(more), method=method, budget=least + more)
        assert report.summary.bytes_bundle <= least + more
    with pytest.raises(UsageError, match="gets no further than"):
        compress(root, tmp_path / "less", CompressOptions(method=method, budget=least - 60))


def test_what_is_kept_in_another_way_is_told_once(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not once an attempt."""
    monkeypatch.setattr("lorazip_core.planning.spectra.FIRST_AIM", 1.5)
    root = tmp_path / "adapters"
    shutil.copytree(adapters, root)
    ra.write_collection(root, (ra.Recipe("faint", modules=MODULES[:1], energy=1e-20),))
    words = ["--budget", "120kB", "--dtype", "f16"]
    assert main(["compress", str(root), "-o", str(tmp_path / "out"), *words]) == 0
    told = capsys.readouterr().err.splitlines()
    assert told.count("keeping adapters individually ...") == 2
    assert told.count("kept faint as it was: its values do not fit in f16") == 1


def test_more_adapters_than_a_packed_file_holds(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(adapters, tmp_path / "one", max_error=0.1)
    monkeypatch.setattr("lorazip_core.compress.packed.PACKED_ADAPTERS", 3)
    made(adapters, tmp_path / "several", max_error=0.1)
    one, several = (Bundle(tmp_path / name) for name in ("one", "several"))
    paths = [adapter.individual for adapter in several.manifest.adapters]
    assert [paths.count(path) for path in dict.fromkeys(paths)] == [3, 3, 3, 1]
    monkeypatch.setattr("lorazip_core.compress.packed.PACKED_MODULES", 2 * len(MODULES) + 1)
    made(adapters, tmp_path / "pairs", max_error=0.1)
    paths = [adapter.individual for adapter in Bundle(tmp_path / "pairs").manifest.adapters]
    assert [paths.count(path) for path in dict.fromkeys(paths)] == [2, 2, 2, 2, 2]
    for a, b in zip(one.manifest.adapters, several.manifest.adapters, strict=True):
        for module in one.modules(a):
            own, other = one.own(a, module.name), several.own(b, module.name)
            assert all(own[suffix].equal(other[suffix]) for suffix in own)


def test_every_damaged_packed_file_is_named(adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorazip_core.compress.packed.PACKED_ADAPTERS", 3)
    made(adapters, tmp_path / "out", max_error=0.1)
    paths = list(dict.fromkeys(adapter.individual for adapter in Bundle(tmp_path / "out").manifest.adapters))
    for path in (paths[0], paths[2]):
        tensors = load_file(tmp_path / "out" / path)
        save_file(tensors | {"codes": tensors["codes"][:-1].clone()}, tmp_path / "out" / path)
    tensors = load_file(tmp_path / "out" / paths[3])
    save_file({name: tensor for name, tensor in tensors.items() if name != "bases"}, tmp_path / "out" / paths[3])
    reseal(tmp_path / "out")
    report = verify(tmp_path / "out", against=adapters)
    damage = sorted((finding.path, finding.kind) for finding in report.findings)
    assert damage == [(paths[0], "unreadable"), (paths[2], "unreadable"), (paths[3], "missing-tensor")]
    known = [adapter.name for adapter in report.adapters if adapter.squared_error is not None]
    assert known == [adapter.name for adapter in Bundle(tmp_path / "out").packed_in(paths[1])]


def test_a_packed_file_is_made_as_soon_as_it_can_be() -> None:
    told = []

    def kept() -> Iterator[tuple[int, str, int]]:
        for number in range(70):
            told.append(number)
            yield number, "svd" if number % 5 == 4 else "coded", 2

    files = packed_files(kept(), 1)
    first = next(files)
    assert first.adapters == [number for number in told if number % 5 != 4]
    assert len(first.adapters) == 32
    rest = list(files)
    assert [len(file.adapters) for file in rest] == [24]
    assert {file.path for file in (first, *rest)} == {f"individual/coded-{place}.safetensors" for place in (0, 1)}
    assert first.piece != rest[0].piece


def test_a_packed_file_has_a_bounded_number_of_modules() -> None:
    own = [(number, "coded", 2**18 + (number == 2)) for number in range(9)]
    assert [file.adapters for file in packed_files(own, 1)] == [[0, 1, 2], [3, 4, 5, 6], [7, 8]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "2kB"], "--budget 2,000 bytes: names, configurations and what is no LoRA factor take "),
        (["--budget-per-adapter", "200"], "--budget-per-adapter 200 bytes, 2,000 bytes in all: names, "),
        (["--max-mean-error", "1e-9"], "--max-mean-error 1e-09: coded gets no further than "),
        (["--method", "svd", "--budget", "30kB"], "--budget 30,000 bytes: svd gets no further than "),
        (["--budget", "30kB", "--max-error", "0.1"], "--max-error and --budget exclude each other"),
        (["--method", "svd", "--rank", "2", "--budget", "30kB"], "--budget and --rank exclude each other"),
        (["--method", "joint", "--budget", "30kB"], "--budget: how much joint has to keep for it is not known"),
        (["--clusters", "2", "--max-mean-error", "0.1"], "--max-mean-error: how much joint has to keep"),
        (["--objective", "resident", "--budget", "50"], "--budget 50 bytes: what tells where codes are takes "),
        (["--objective", "resident", "--method", "svd"], "--objective resident: svd of rank 4 takes the same"),
        (["--objective", "resident", "--rank", "4"], "--objective resident: joint of rank 4 takes the same"),
        (["--max-mean-error", "0"], "--max-mean-error 0.0: it has to be above 0"),
        (["--method", "coded", "--rank", "3"], "--rank 3: coded has no rank"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_met_is_one_line_and_leaves_nothing(
    adapters: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made(adapters, tmp_path / "out", max_error=0.1)
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    if said.endswith(("take ", "further than ", "in all: names, ")):
        assert main(["compress", str(adapters), "--dry-run", "-q", *words]) == 0
        assert "note     that is more than what may be: compress is likely" in capsys.readouterr().out
        assert main(["compress", str(adapters), "--dry-run", "-q", "--json", *words]) == 0
        assert json.loads(capsys.readouterr().out)["within_bound"] is False
    assert main(["compress", str(adapters), "-o", str(tmp_path / "out"), "--force", "-q", *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lorazip: error: {said}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_what_was_asked_for_is_in_the_manifest(adapters: Path, tmp_path: Path) -> None:
    made(adapters, tmp_path / "budget", budget=80_000)
    made(adapters, tmp_path / "mean", max_mean_error=0.1)
    told = [json.loads((tmp_path / name / "manifest.json").read_bytes())["parameters"] for name in ("budget", "mean")]
    assert (told[0]["budget"], told[0]["method"], told[0]["rank"]) == (80_000, "coded", None)
    assert "max_mean_error" not in told[0]
    assert told[1]["max_mean_error"] == 0.1
    made(adapters, tmp_path / "resident", objective="resident")
    told.append(json.loads((tmp_path / "resident" / "manifest.json").read_bytes())["parameters"])
    assert [each.get("objective") for each in told] == [None, None, "resident"]
