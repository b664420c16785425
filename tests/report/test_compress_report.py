"""`compress --report`: the frontier of the plan on a page, from one reading, and where the page may not go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from testing import random_adapters as ra

import lorazip_core.compress.run
import lorazip_core.planning.plan
from lorazip_cli.main import main
from lorazip_core.compress.run import compress_by_frontier
from lorazip_core.planning.options import CompressOptions
from lorazip_core.planning.plan import plan
from lorazip_core.planning.spectra import Spectra

DRY = ("--dry-run",)


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ra.write_collection(tmp_path_factory.mktemp("in"), ra.plain(4, rank=4))


@pytest.fixture
def adapters(collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The collection; files with relative names are in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return collection


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every reading of the adapters for their singular values."""
    found: list[int] = []
    of = Spectra.of

    def counted(*arguments: Any) -> Spectra:
        found.append(1)
        return of(*arguments)

    monkeypatch.setattr(Spectra, "of", counted)
    return found


def run(adapters: Path, *words: str) -> int:
    return main(["compress", str(adapters), "-o", "b", "-q", *words])


@pytest.mark.parametrize(
    "options",
    [
        CompressOptions(),
        CompressOptions(budget_per_adapter=3000),
        CompressOptions(method="svd", max_mean_error=0.2),
        CompressOptions(method="svd", max_error=0.3, dtype="f32"),
    ],
    ids=["auto", "budget", "mean", "svd"],
)
def test_a_run_predicts_what_the_plan_does(adapters: Path, readings: list[int], options: CompressOptions) -> None:
    found = compress_by_frontier(adapters, Path("b"), options).frontier
    assert len(readings) == 1
    assert found is not None
    report = plan(adapters, options)
    assert found.points == report.frontier
    assert found.comparison(options) == report.comparison


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 0),
        (["--report", "r.html"], 1),
        (["--budget", "20kB"], 1),
        (["--budget", "20kB", "--report", "r.html"], 1),
        (["--rank", "2", "--report", "r.html"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_adapters_are_read_no_oftener_than_it_takes(
    adapters: Path, readings: list[int], words: list[str], expected: int
) -> None:
    assert run(adapters, *words) == 0
    assert len(readings) == expected


@pytest.mark.parametrize("words", [[], DRY, ["--rank", "2"], [*DRY, "--rank", "2"]], ids=" ".join)
def test_json_is_the_same_with_a_page(adapters: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    reports = []
    for page in ([], ["--report", "r.html"]):
        assert run(adapters, "--json", "--force", *words, *page) == 0
        reports.append(json.loads(capsys.readouterr().out) | {"seconds": 0, "output_exists": None})
    assert reports[0] == reports[1]
    text = Path("r.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert text.endswith("</html>")
    assert ("Error against size" in text) == ("--rank" not in words)


@pytest.mark.parametrize("words", [[], DRY], ids=" ".join)
def test_the_same_result_gives_the_same_page(adapters: Path, words: list[str]) -> None:
    pages = set()
    for _ in range(2):
        assert run(adapters, "--force", "--report", "r.html", *words) == 0
        pages.add(Path("r.html").read_bytes())
    assert len(pages) == 1


def test_there_is_no_page_where_compressing_fails(adapters: Path) -> None:
    assert run(adapters, "--max-mean-error", "1e-9", "--report", "r.html") == 2
    assert list(Path().iterdir()) == []


class TestRefused:
    """Before the work, which would fail the test."""

    @pytest.fixture(autouse=True)
    def no_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def work(*_: object, **__: object) -> None:
            raise AssertionError("the work began")

        monkeypatch.setattr(lorazip_core.compress.run, "compress_by_frontier", work)
        monkeypatch.setattr(lorazip_core.planning.plan, "plan", work)

    def refused(self, code: int, line: str, capsys: pytest.CaptureFixture[str], adapters: Path, *words: str) -> None:
        before = sorted(Path().rglob("*"))
        for more in ((), DRY):
            assert run(adapters, *words, *more) == code
            output = capsys.readouterr()
            assert output.out == ""
            assert output.err.startswith(f"lorazip: error: {line}")
            assert output.err.count("\n") == 1
        assert sorted(Path().rglob("*")) == before

    def test_a_file_that_exists(self, adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Path("mine").write_text("mine")
        self.refused(6, "mine exists (choose another --report, or --force", capsys, adapters, "--report", "mine")
        assert Path("mine").read_text() == "mine"

    def test_among_the_adapters(self, adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
        page = adapters / "r.html"
        self.refused(2, f"{page} is inside the input", capsys, adapters, "--report", str(page), "--force")

    def test_the_file_of_clusters(self, adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Path("c.json").write_text("{}")
        words = ["--clusters", "c.json", "--report", "c.json", "--force"]
        self.refused(2, "c.json is the input itself", capsys, adapters, *words)

    @pytest.mark.parametrize("page", ["b", "b/r.html", "./new/../b/x/r.html"])
    def test_in_the_place_of_the_bundle(self, page: str, adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
        line = f"--report {Path(page)}: it is where the bundle b goes"
        self.refused(2, line, capsys, adapters, "--report", page)

    def test_a_folder_that_the_bundle_is_in(self, adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["-o", "new/b", "--report", "new"]
        self.refused(2, "--report new: it is where the bundle new/b goes", capsys, adapters, *words)

    @pytest.mark.parametrize("missing", ["plotly", "jinja2"])
    def test_without_the_library(
        self, missing: str, adapters: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, missing, None)
        line = f"an HTML report needs {missing} (pip install {missing})"
        self.refused(8, line, capsys, adapters, "--report", "r.html")
