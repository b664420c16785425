"""The HTML pages: what is on them, that they load nothing, and that no name can do harm."""

from __future__ import annotations

import base64
import html
import html.parser
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from plotly.offline import get_plotlyjs
from testing.made_up import FRONTIER, HOSTILE, assigned, compressed, made_up, planned, unreadable

import lorazip_core.report.charts as charts
from lorazip_core.base.errors import LocalError
from lorazip_core.base.text import plain
from lorazip_core.bundle.check import Finding
from lorazip_core.planning.options import CompressOptions
from lorazip_core.report.charts import MOST_ROWS, colours, literal, natural_order, short
from lorazip_core.report.html import check_available, cluster_page, compress_page, plan_page, verify_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Reader(html.parser.HTMLParser):
    """The elements of a page, the text of its cells by heading, its figures, and whatever could load something."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.figures: dict[str, dict[str, Any]] = {}
        self._heading = ""
        self._open: list[str] = []
        self._script = ""
        self.feed(text.replace(get_plotlyjs(), ""))  # five megabytes in one element, slow to parse
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in {"meta", "link"}:
            self._open.append(tag)
        if tag == "h2":
            self._heading = ""
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        if tag in {"td", "th"}:
            self.tables[self._heading][-1].append("")
        self._script = dict(attrs).get("type") or "" if tag == "script" else ""

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._script = ""

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "h2":
            self._heading += data
        elif inside in {"td", "th"}:
            self.tables[self._heading][-1][-1] += data
        elif inside == "script" and self._script == "application/json":
            self.figures[self._heading] = json.loads(data)
        if inside not in {"script", "style"}:
            self.text += data


def array(value: Any) -> np.ndarray:
    """An array of a figure, as plotly writes it: a list, or bytes in base64 with a type and a shape."""
    if isinstance(value, list):
        return np.array(value)
    flat = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
    shape = [int(each) for each in value.get("shape", "-1").split(",")]
    return flat.reshape(shape)


def bars_by_row(figure: dict[str, Any]) -> dict[int, tuple[float, str]]:
    """Value and group of each row of a bar chart."""
    return {
        int(row): (float(value), trace["name"])
        for trace in figure["data"]
        if trace["type"] == "bar"
        for row, value in zip(array(trace["y"]), array(trace["x"]), strict=True)
    }


def all_pages() -> list[Callable[[list[str]], str]]:
    finding = Finding("kind", HOSTILE[0], HOSTILE[1], damage=True, adapter=HOSTILE[2])
    return [
        lambda names: verify_page(made_up(names=names, max_error=0.3, findings=(finding,), unknown=(1,), outputs=True)),
        lambda names: cluster_page(*assigned(0, 2, names=names)),
        lambda names: compress_page(compressed(names=names), CompressOptions()),
    ]


PAGES = ["verify", "cluster", "compress"]


class TestVerifyPage:
    def test_shows_verdict_figures_and_gates(self) -> None:
        verification = made_up(12, max_error=0.5, max_mean_error=0.1)
        page = Reader(verify_page(verification))
        summary = verification.report.summary
        assert summary is not None
        assert "sound" in page.text
        for shown in ("12", "10.0 MB", "before: 100.0 MB", "90.0%", "10.0 times smaller", "squared, measured"):
            assert shown in page.text
        for value in (summary.mean_squared_error, summary.p95_squared_error, summary.max_squared_error):
            assert f"{value:.4f}" in page.text
        assert page.tables["Limits"][1:] == [
            ["--max-error", "worst adapter", "0.5", f"{summary.max_squared_error:.4f}", "held"],
            ["--max-mean-error", "mean", "0.1", f"{summary.mean_squared_error:.4f}", "failed"],
        ]

    def test_shows_what_outputs_lose(self) -> None:
        verification = made_up(4, outputs=True)
        page = Reader(verify_page(verification))
        outputs = verification.report.outputs
        assert outputs is not None
        for value in (outputs.mean_squared_error, outputs.max_squared_error):
            assert f"{value:.4f}" in page.text
        assert "squared, on moments.safetensors" in page.text
        head, *rows = page.tables["Worst adapters"]
        found = {row[0]: row[head.index("of outputs")] for row in rows}
        errors = {each.name: each.output_squared_error for each in verification.report.adapters}
        assert found == {name: "-" if value is None else f"{value:.4f}" for name, value in errors.items()}
        assert "of outputs" not in Reader(verify_page(made_up(4))).text

    def test_errors_are_sorted_and_coloured_by_how_adapters_are_kept(self) -> None:
        verification = made_up(12, max_error=0.4)
        figure = Reader(verify_page(verification)).figures["Error of each adapter"]
        rows = bars_by_row(figure)
        expected = sorted(verification.report.adapters, key=lambda adapter: -(adapter.squared_error or 0))
        assert [rows[row][0] for row in range(12)] == [adapter.squared_error for adapter in expected]
        for row, adapter in enumerate(expected):
            assert rows[row][1].startswith(adapter.scheme)
        assert figure["layout"]["yaxis"]["ticktext"] == [adapter.name for adapter in expected]
        (limit,) = [trace for trace in figure["data"] if trace["type"] == "scatter"]
        assert (limit["name"], list(array(limit["x"]))) == ("limit of the worst adapter: 0.4", [0.4, 0.4])
        of_bars = [trace["marker"]["color"] for trace in figure["data"] if trace["type"] == "bar"]
        assert len(set(of_bars)) == len(of_bars) == 3

    def test_the_heat_map_has_each_error_in_its_place(self) -> None:
        verification = made_up(5, 24)
        trace = Reader(verify_page(verification)).figures["Error of each module"]["data"][0]
        z = array(trace["z"])
        errors = verification.module_errors
        assert errors is not None
        assert z.shape == (5, 24)
        for i, adapter in enumerate(trace["meta"]["rows"]):
            for j, module in enumerate(trace["meta"]["columns"]):
                expected = errors.squared_errors[errors.adapters.index(adapter), errors.modules.index(module)]
                assert z[i, j] == pytest.approx(expected, rel=1e-6, nan_ok=True)
        assert np.isnan(z).sum() == 1
        assert trace["meta"]["columns"] == [f"layers.{n}.{kind}" for kind in ("q_proj", "v_proj") for n in range(12)]
        rows = bars_by_row(Reader(verify_page(verification)).figures["Error of each adapter"])
        assert [np.nanmean(row) for row in z] == pytest.approx([rows[row][0] for row in range(5)], rel=1e-5)

    def test_of_claims_there_is_no_heat_map(self) -> None:
        page = Reader(verify_page(made_up(5, measured=False)))
        assert list(page.figures) == ["Error of each adapter"]
        assert "squared, claimed" in page.text
        assert page.tables["Worst adapters"][0] == ["adapter", "squared error", "kept as", "worst module", "its error"]

    def test_what_could_not_be_measured_is_told_and_not_drawn(self) -> None:
        verification = made_up(5, unknown=(1, 4), max_error=0.9)
        page = Reader(verify_page(verification))
        assert "Those of 2 adapters could not be" in page.text
        assert "Not measured: team/adapter-0001, team/adapter-0004." in page.text
        assert len(bars_by_row(page.figures["Error of each adapter"])) == 3
        assert page.tables["Limits"][1][-1] == "not known"

    def test_a_bundle_that_cannot_be_read(self) -> None:
        page = Reader(verify_page(unreadable()))
        assert page.figures == {}
        assert page.tables["Findings"][1] == ["manifest", "-", "manifest.json", "bundle: no JSON", "yes"]
        assert page.tables["Limits"][1] == ["--max-error", "worst adapter", "0.1", "-", "not known"]
        assert page.tags["script"] == 0, "without a chart the library is left out"

    def test_of_very_many_adapters_the_worst_are_drawn(self) -> None:
        page = Reader(verify_page(made_up(MOST_ROWS + 1, 2)))
        traces = page.figures["Error of each adapter"]["data"]
        drawn = [trace for trace in traces if trace.get("mode") == "markers"]
        assert sum(len(array(trace["x"])) for trace in drawn) == MOST_ROWS
        assert array(page.figures["Error of each module"]["data"][0]["z"]).shape == (MOST_ROWS, 2)
        assert "The worst 2,000 of 2,001 adapters." in page.text
        assert len(page.tables["Worst adapters"]) == 21

    def test_a_thousand_adapters_stay_below_seven_megabytes(self) -> None:
        assert len(verify_page(made_up(1000, 96))) < 7e6


class TestClusterPage:
    @pytest.mark.parametrize(
        ("adapters", "clusters", "sizes"),
        [(1, 1, ""), (5, 1, ""), (9, 3, "3 adapters each"), (300, 7, "42 to 43 adapters each")],
    )
    def test_of_any_size(self, adapters: int, clusters: int, sizes: str) -> None:
        page = Reader(cluster_page(*assigned(adapters, clusters)))
        assert f"Clusters{clusters}{sizes}\n" in page.text
        assert ("Similarity" in page.figures) is (adapters > 1)
        assert {"Number of clusters", "Error against size", "Clusters", "Objective"} <= page.figures.keys()
        assert ("Outliers" in page.tables) is (adapters > 1)
        assert len(page.tables["Worst adapters"]) == 1 + min(adapters, 20)
        assert f"{clusters} cluster" in page.text

    def test_similarity_goes_cluster_by_cluster(self) -> None:
        assignment, similarity = assigned(30, 3)
        figure = Reader(cluster_page(assignment, similarity)).figures["Similarity"]
        trace = figure["data"][0]
        names = [adapter.name for adapter in assignment.adapters]
        order = [names.index(name) for name in trace["meta"]["rows"]]
        assert sorted(order) == list(range(30))
        assert [assignment.adapters[i].cluster for i in order] == [0] * 10 + [1] * 10 + [2] * 10
        assert trace["meta"]["columns"] == trace["meta"]["rows"]
        assert array(trace["z"]) == pytest.approx(similarity[np.ix_(order, order)], rel=1e-6)
        assert trace["zmax"] == pytest.approx(np.sort(similarity, axis=None)[-31])  # the diagonal aside
        borders = {shape["x0"] for shape in figure["layout"]["shapes"] if shape["x0"] == shape["x1"]}
        assert borders == {9.5, 19.5}

    def test_without_candidates_there_is_nothing_to_compare(self) -> None:
        page = Reader(cluster_page(*assigned(9, 2, candidates=False)))
        assert set(page.figures) == {"Similarity", "Clusters", "Objective"}

    def test_candidates_by_number_and_by_size(self) -> None:
        page = Reader(cluster_page(*assigned(9, 2)))
        by_name = {trace["name"]: trace for trace in page.figures["Number of clusters"]["data"]}
        assert set(by_name) == {"mean error", "worst error", "cost", "cost of svd, rank 4"}
        assert list(array(by_name["mean error"]["x"])) == [1, 2, 4, 8]
        assert array(by_name["worst error"]["y"]) == pytest.approx([0.7, 0.35, 0.175, 0.0875])
        assert "(chosen)<br>3.0 MB" in by_name["cost"]["hovertext"][1]
        by_size = {trace["name"]: trace for trace in page.figures["Error against size"]["data"]}
        assert array(by_size["joint, rank 16"]["x"]) == pytest.approx([2, 3, 5, 9])
        assert array(by_size["svd, each adapter alone"]["y"]) == pytest.approx([0.5, 0.125])

    def test_tables(self) -> None:
        assignment, similarity = assigned(9, 2)
        tables = Reader(cluster_page(assignment, similarity)).tables
        assert tables["Outliers"][1] == ["team/adapter-0000", "0.9000", "0.9900", "loses more than half of its update"]
        assert tables["Near duplicates"][1] == ["team/adapter-0000", "team/adapter-0001", "1.0e-05"]
        worst = max(assignment.adapters, key=lambda adapter: adapter.squared_error)
        assert tables["Worst adapters"][1] == [
            worst.name,
            str(worst.cluster),
            f"{worst.squared_error:.4f}",
            str(worst.next_cluster),
            "0.7000",
            "0.8000",
            worst.nearest,
            "0.400",
        ]

    def test_a_matrix_of_another_shape_is_refused(self) -> None:
        assignment, similarity = assigned(5, 2)
        with pytest.raises(ValueError, match=r"shape \(4, 4\)"):
            cluster_page(assignment, similarity[:4, :4])


def points(figure: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """The points of every trace by its name, rounded."""
    return {
        trace["name"]: [
            (round(float(x), 4), round(float(y), 4))
            for x, y in zip(array(trace["x"]).tolist(), array(trace["y"]).tolist(), strict=True)
            if y is not None
        ]
        for trace in figure["data"]
    }


class TestCompressPage:
    def test_draws_the_frontier_and_marks_what_was_chosen_and_what_came_out(self) -> None:
        made = compressed()
        figure = Reader(compress_page(made, CompressOptions())).figures["Error against size"]
        assert figure["layout"]["xaxis"]["type"] == figure["layout"]["yaxis"]["type"] == "log"
        summary = made.report.summary
        assert points(figure) == {
            "coded, mean": [(20.0, 0.001), (5.0, 0.1)],
            "coded, worst": [(20.0, 0.002), (5.0, 0.2)],
            "svd, mean": [(20.0, 0.02)],
            "svd, worst": [(20.0, 0.03)],
            "chosen, mean": [(9.0, 0.05)],
            "chosen, worst": [(9.0, 0.09)],
            "bundle, mean": [(10.0, round(summary.mean_squared_error or 0, 4))],
            "bundle, worst": [(10.0, round(summary.max_squared_error or 0, 4))],
        }
        looks = {(trace["marker"]["symbol"], trace.get("line", {}).get("dash")) for trace in figure["data"]}
        assert len(looks) == 6  # told apart without colours, but for the methods

    def test_the_table_has_the_figures_of_the_chart(self) -> None:
        page = Reader(compress_page(compressed(), CompressOptions()))
        found = {
            (round(x, 1), f"{y:.4f}") for each in points(page.figures["Error against size"]).values() for x, y in each
        }
        rows = page.tables["Sizes and errors"][1:]
        assert {(float(row[2].split()[0]), error) for row in rows for error in row[4:]} == found
        assert [row[:2] for row in rows] == [
            ["coded", "predicted"],
            ["svd", "predicted"],
            ["coded", "measured"],
            ["coded", "predicted, chosen"],
            ["coded", "predicted"],
        ]

    def test_what_loses_nothing_is_in_the_table_only(self) -> None:
        lossless = replace(FRONTIER.points[0], mean_squared_error=0.0, max_squared_error=0.0)
        report = replace(planned(), frontier=[lossless, *FRONTIER.points[1:]])
        page = Reader(plan_page(report, CompressOptions()))
        assert points(page.figures["Error against size"])["coded, mean"] == [(5.0, 0.1)]
        assert page.tables["Sizes and errors"][1][4:] == ["0", "0"]
        assert "An error of 0 has no place" in page.text
        assert "An error of 0 has no place" not in Reader(plan_page(planned(), CompressOptions())).text

    def test_shows_errors_figures_and_what_was_asked_for(self) -> None:
        made = compressed(30)
        page = Reader(compress_page(made, CompressOptions(max_error=0.45, dtype="f16")))
        errors = sorted((adapter.squared_error for adapter in made.manifest.adapters), reverse=True)
        rows = bars_by_row(page.figures["Error of each adapter"])
        assert [rows[row][0] for row in range(30)] == errors
        assert [row[1] for row in page.tables["Worst adapters"][1:]] == [f"{each:.4f}" for each in errors[:20]]
        (limit,) = [t for t in page.figures["Error of each adapter"]["data"] if t["type"] == "scatter"]
        assert limit["name"] == "limit of the worst adapter: 0.45"
        assert ["--max-error", "0.45"] in page.tables["Settings"]
        assert ["--method", "coded (auto)"] in page.tables["Settings"]
        assert ["--dtype", "f16"] in page.tables["Settings"]
        for shown in ("before: 100.0 MB", "90.0%", "10.0 times smaller", f"{made.report.worst.squared_error:.4f}"):
            assert shown in page.text

    def test_the_limit_that_coded_has_of_itself_is_shown(self) -> None:
        page = Reader(compress_page(compressed(), CompressOptions()))
        assert ["--max-error", "0.1"] in page.tables["Settings"]
        page = Reader(compress_page(compressed(), CompressOptions(budget=10**7)))
        assert ["--budget", "10,000,000 bytes"] in page.tables["Settings"]
        assert "--max-error" not in [row[0] for row in page.tables["Settings"]]

    def test_where_nothing_is_predicted_there_is_no_frontier(self) -> None:
        page = Reader(compress_page(compressed(frontier=None), CompressOptions(rank=4)))
        assert set(page.figures) == {"Error of each adapter"}
        assert "predicted for svd and coded only" in page.text

    def test_a_plan_has_no_measured_figures(self) -> None:
        page = Reader(plan_page(planned(), CompressOptions()))
        assert set(page.figures) == {"Error against size"}
        assert not [name for name in points(page.figures["Error against size"]) if name.startswith("bundle")]
        assert "measured" not in page.text
        assert "Of method auto: in 9.0 MB, coded is better." in page.text
        assert "11.1 times smaller" in page.text

    def test_a_plan_from_shapes_alone_has_no_chart(self) -> None:
        text = plan_page(planned(frontier=None), CompressOptions(method="joint", clusters=2))
        page = Reader(text)
        assert page.figures == {}
        assert "plotly.js" not in text
        assert page.tables["Methods"][1] == ["joint", "chosen", "16", "2", "9.0 MB", "91.0%"]
        assert ["--clusters", "2"] in page.tables["Settings"]


class TestHarmless:
    @pytest.mark.parametrize("make", all_pages(), ids=PAGES)
    def test_hostile_names_change_no_element(self, make: Callable[[list[str]], str]) -> None:
        harmless = Reader(make([f"name{number}" for number in range(len(HOSTILE))]))
        hostile = Reader(make(HOSTILE))
        assert hostile.tags == harmless.tags
        cells = [cell for table in hostile.tables.values() for row in table for cell in row]
        known = [n for i, n in enumerate(HOSTILE) if i != 1] if "lorazip verify" in hostile.text[:200] else HOSTILE
        for name in known:
            assert plain(name) in cells
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u2028\u202e\ufffe]", make(HOSTILE).partition("/**")[0])

    @pytest.mark.parametrize("make", all_pages(), ids=PAGES)
    def test_plotly_gets_no_markup_of_a_name(self, make: Callable[[list[str]], str]) -> None:
        page = make(HOSTILE)
        for block in re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL):
            assert "<" not in block
            texts = [text for text in strings(json.loads(block)) if "bdata" not in text]
            assert {tag for text in texts for tag in re.findall(r"<[^>]*>?", text)} <= {
                "<b>",
                "</b>",
                "<br>",
                "<extra>",
                "</extra>",
            }
            for text in texts:
                assert "<b>bold" not in text
                assert "<extra>no" not in text

    def test_literal_and_short(self) -> None:
        assert literal("<b>&lt;\n") == "&lt;b&gt;&amp;lt;\\n"
        assert short("a" * 20 + "<" * 20) == "a" * 14 + "…" + "&lt;" * 14
        assert short("x" * 30) == "x" * 30

    @pytest.mark.parametrize("make", all_pages(), ids=PAGES)
    def test_nothing_is_loaded(self, make: Callable[[list[str]], str]) -> None:
        page = Reader(make(["a", "b", "c"]))
        loading = [each for each in page.attributes if each[1] in {"src", "href", "srcset", "data", "action", "poster"}]
        assert loading == [("link", "href", "data:,")]
        (policy,) = [
            value for tag, name, value in page.attributes if tag == "meta" and value and "default-src" in value
        ]
        assert policy.startswith("default-src 'none'; script-src 'unsafe-inline';")
        assert "http" not in policy
        css = (Path(charts.__file__).parent / "page.css").read_text()
        assert not re.search(r"@import|url\(|@font-face", css)

    @pytest.mark.parametrize("make", all_pages(), ids=PAGES)
    def test_the_library_is_there_once_and_ids_are_fixed(self, make: Callable[[list[str]], str]) -> None:
        text = make(["a", "b", "c"])
        assert text.count("* plotly.js v") == 1
        ids = [value for _, name, value in Reader(text).attributes if name == "id"]
        assert len(ids) == len(set(ids)) > 0
        assert all(re.fullmatch(r"chart-\d+", each or "") for each in ids)

    @pytest.mark.slow
    def test_same_result_same_bytes(self) -> None:
        code = "import sys; sys.path[:0] = sys.argv[1:]; from test_report_pages import *; import hashlib\n"
        code += "print([hashlib.sha256(make(HOSTILE).encode()).hexdigest() for make in all_pages()])"
        seen = {
            subprocess.run(
                [sys.executable, "-c", code, *map(str, Path(__file__).parents[:2])],
                env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "PATH": ""},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for seed in ("1", "2")
        }
        assert len(seen) == 1

    @pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
    @pytest.mark.parametrize("make", all_pages(), ids=PAGES)
    def test_a_browser_draws_it_without_complaint(self, make: Callable[[list[str]], str], tmp_path: Path) -> None:
        (tmp_path / "page.html").write_text(make(HOSTILE), encoding="utf-8")
        done = subprocess.run(
            [
                str(BROWSER),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--enable-logging=stderr",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--virtual-time-budget=20000",
                "--dump-dom",
                (tmp_path / "page.html").as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert "CONSOLE" not in done.stderr, done.stderr
        assert re.search(r"<title>[^<]*lorazip", done.stdout)
        charts = done.stdout.count('class="chart')
        assert charts > 1
        assert done.stdout.count('class="main-svg"') >= charts
        ticks = map(html.unescape, re.findall(r'class="ytick"[^>]*>\s*<text[^>]*>([^<]*)</text>', done.stdout))
        assert {"<b>bold</b> &lt;i&gt; &amp;", "constructor", "__proto__"} <= set(ticks)


def strings(value: Any) -> list[str]:
    """Every string in a figure but the bytes of arrays."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, each in value.items() if key != "bdata" for text in strings(each)]
    return [text for each in value for text in strings(each)] if isinstance(value, list) else []


def test_colours_are_few_and_given_to_the_largest_groups() -> None:
    groups = [f"cluster {n}" for n in range(12) for _ in range(n + 1)]
    given = colours(groups)
    assert list(given) == [f"cluster {n}" for n in range(12)]
    assert [group for group, colour in given.items() if colour == charts.GREY] == [f"cluster {n}" for n in range(6)]
    assert len(set(given.values())) == 7


def test_natural_order() -> None:
    assert natural_order(["b10", "b9", "a", "b", "10", "9", "a1b2", "a1b10"]) == [
        "9", "10", "a", "a1b2", "a1b10", "b", "b9", "b10",
    ]  # fmt: skip


class TestMissing:
    @pytest.mark.parametrize("missing", ["plotly", "jinja2"])
    def test_is_one_line_that_says_what_to_install(self, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(LocalError, match=rf"needs {missing} \(pip install {missing}\)$"):
            check_available()
        with pytest.raises(LocalError):
            verify_page(made_up(2))

    def test_all_else_works_without(self) -> None:
        code = (
            "import sys; sys.modules['plotly'] = sys.modules['jinja2'] = None\n"
            "import lorazip_core.report, lorazip_core.report.junit, lorazip_core.report.markdown, lorazip_cli.main\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
