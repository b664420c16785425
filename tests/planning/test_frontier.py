"""What methods would lose at the size of the chosen one, and the line that says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from testing import random_adapters as ra
from testing.made_up import FRONTIER

from lorazip_cli.main import main
from lorazip_core.adapter.collection import open_collection
from lorazip_core.adapter.module import Module
from lorazip_core.base.device import CPU
from lorazip_core.base.progress import Silent
from lorazip_core.planning.frontier import Frontier, frontier
from lorazip_core.planning.options import CompressOptions
from lorazip_core.planning.plan import plan
from lorazip_core.planning.spectra import Spectra, planned_step
from lorazip_core.reading.scan import scan

MODULES = tuple(Module(f"layers.{i}.proj", "linear", 320, 240) for i in range(3))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ra.write_collection(tmp_path_factory.mktemp("in"), ra.plain(4, rank=8, modules=MODULES))


def found(root: Path, options: CompressOptions) -> Frontier:
    collection = open_collection(root, allow_pickle=False, allow_mixed_base=False, skip_bad=False)
    scanned = scan(collection, skip_bad=False, advance=lambda done: None)
    spectra = Spectra.of(scanned, CPU, Silent())
    return frontier(spectra, scanned, planned_step(spectra, scanned, options), options)


def test_the_other_method_is_as_large_as_the_chosen_one(root: Path) -> None:
    result = found(root, CompressOptions(method="svd", max_mean_error=0.6))
    [chosen] = [point for point in result.points if point.chosen]
    assert [point.method for point in result.beside] == ["coded"]
    assert result.beside[0].bytes_bundle == pytest.approx(chosen.bytes_bundle, rel=0.05)
    assert result.beside[0].mean_squared_error < chosen.mean_squared_error


def test_a_method_that_cannot_be_as_small_is_not_beside(root: Path) -> None:
    assert found(root, CompressOptions(max_mean_error=0.9)).beside == []


def test_only_auto_is_compared() -> None:
    assert FRONTIER.comparison(CompressOptions()) == (
        "in 9.0 MB, coded is predicted to lose 0.0500 on average; svd would lose 0.3000"
    )
    alone = replace(FRONTIER, beside=[])
    assert str(alone.comparison(CompressOptions())).endswith("on average; svd cannot be as small")
    assert FRONTIER.comparison(CompressOptions(method="coded")) is None


def test_a_dry_run_tells_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = plan(root, CompressOptions())
    assert report.comparison
    assert main(["compress", str(root), "--dry-run"]) == 0
    assert f"compared {report.comparison}\n" in capsys.readouterr().out
    assert main(["compress", str(root), "--dry-run", "--method", "coded"]) == 0
    assert "compared" not in capsys.readouterr().out
