"""What CI systems read of a verification, JUnit XML and Markdown, read back with somebody else's reader."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from junitparser import Failure, JUnitXml, Skipped, TestCase
from markdown_it import MarkdownIt
from testing.made_up import HOSTILE, made_up, unreadable

from lorazip_core.base.text import plain
from lorazip_core.bundle.check import Finding
from lorazip_core.report.junit import junit
from lorazip_core.report.markdown import escape, markdown
from lorazip_core.report.outcome import gates
from lorazip_core.verify.run import Verification

SOUND, ORIGINALS = "the bundle is sound", "the originals are those of the bundle"
WORST_GATE, MEAN_GATE = "squared error of the worst adapter is at most 0.3", "squared error of the mean is at most 0.2"


def parsed(*verifications: Verification) -> JUnitXml:
    return JUnitXml.fromstring(junit([each.report for each in verifications]))


def results(suite: object) -> dict[str, str]:
    """The outcome of each case by name: ok, failed or skipped."""
    outcomes = {}
    for case in suite:  # type: ignore[attr-defined]
        assert isinstance(case, TestCase)
        kinds = [type(each) for each in case.result]
        outcomes[case.name] = {(): "ok", (Failure,): "failed", (Skipped,): "skipped"}[tuple(kinds)]
    return outcomes


def gate_finding(adapter: str | None, kind: str = "max-error") -> Finding:
    return Finding(kind, None, "squared error 0.4 is above the limit", damage=False, adapter=adapter)


class TestJUnit:
    def test_of_a_sound_bundle(self) -> None:
        (suite,) = parsed(made_up(3))
        assert suite.name == "bundle"
        names = [f"team/adapter-000{number}" for number in range(3)]
        assert results(suite) == dict.fromkeys([SOUND, ORIGINALS, *names], "ok")
        properties = {each.name: each.value for each in suite.properties()}
        assert properties["errors_are"] == "measured"
        assert properties["bytes_bundle"] == "10000000"
        assert {case.classname for case in suite} == {"lorazip.bundle", "lorazip.adapters"}
        assert {case.time for case in suite} == {0.0}

    def test_says_what_outputs_lose(self) -> None:
        report = made_up(3, outputs=True)
        (suite,) = parsed(report)
        outputs = report.report.outputs
        assert outputs is not None
        said = {each.name: each.value for each in suite.properties()}["outputs"]
        assert said == (
            "squared error of outputs, 2 adapters on the inputs of moments.safetensors:"
            f" mean {outputs.mean_squared_error:.4f}, worst {outputs.max_squared_error:.4f} ({outputs.worst_adapter})"
        )
        told = {case.name: case.system_out for case in suite}
        assert f"squared error of outputs: {outputs.max_squared_error:.4f}\n" in told[outputs.worst_adapter]
        assert "of outputs" not in told["team/adapter-0000"]
        (plain_suite,) = parsed(made_up(3))
        assert "outputs" not in {each.name for each in plain_suite.properties()}

    def test_of_claims_nothing_is_said_of_originals(self) -> None:
        (suite,) = parsed(made_up(3, measured=False))
        assert ORIGINALS not in results(suite)

    def test_a_gate_that_fails_fails_with_its_adapters(self) -> None:
        name = "team/adapter-0001"
        findings = (gate_finding(name), gate_finding(None, "max-mean-error"))
        (suite,) = parsed(made_up(3, max_error=0.3, max_mean_error=0.2, findings=findings))
        outcomes = results(suite)
        assert {case for case, outcome in outcomes.items() if outcome == "failed"} == {WORST_GATE, MEAN_GATE, name}
        (failure,) = next(case for case in suite if case.name == name).result
        assert failure.type == "max-error"
        assert failure.message == f"max-error: {name}: squared error 0.4 is above the limit"

    def test_a_limit_may_be_reached(self) -> None:
        summary = made_up(3).report.summary
        assert summary is not None
        assert summary.max_squared_error is not None
        for limit, verdict in ((summary.max_squared_error, "held"), (summary.max_squared_error * 0.999, "failed")):
            (gate,) = gates(made_up(3, max_error=limit).report)
            assert gate.verdict == verdict

    def test_gates_that_hold_pass_and_those_that_nobody_can_tell_are_skipped(self) -> None:
        (suite,) = parsed(made_up(3, max_error=0.9))
        assert results(suite)["squared error of the worst adapter is at most 0.9"] == "ok"
        (suite,) = parsed(made_up(3, max_error=0.9, unknown=(0,)))
        outcomes = results(suite)
        assert outcomes["squared error of the worst adapter is at most 0.9"] == "skipped"
        assert outcomes["team/adapter-0000"] == "skipped"
        assert suite.skipped == 2

    def test_every_finding_fails_something(self) -> None:
        findings = [
            Finding("wrong-digest", "cores/000.safetensors", "sha256", damage=True),
            Finding("source-missing", None, "none is there", damage=False),
            Finding("source-unlisted", "new", "not in the bundle", damage=False, adapter="new"),
            Finding("source-differs", "x", "other bytes", damage=False, adapter="team/adapter-0000"),
            Finding("later", None, "of a kind nobody knows yet", damage=False),
            gate_finding(None, "max-mean-error"),
        ]
        expected = [{SOUND}, {ORIGINALS}, {ORIGINALS}, {ORIGINALS, "team/adapter-0000"}, {ORIGINALS}, {MEAN_GATE}]
        for finding, failed in zip(findings, expected, strict=True):
            (suite,) = parsed(made_up(2, max_mean_error=0.2, findings=(finding,)))
            assert {case for case, outcome in results(suite).items() if outcome == "failed"} == failed
            texts = "".join(each.text for case in suite for each in case.result)
            assert finding.message in texts

    def test_several_findings_are_one_failure(self) -> None:
        name = "team/adapter-0000"
        findings = tuple(Finding("claim-differs", "m", f"number {n}", damage=False, adapter=name) for n in range(3))
        (suite,) = parsed(made_up(2, findings=findings))
        (failure,) = next(case for case in suite if case.name == name).result
        assert failure.message == f"claim-differs: {name}: m: number 0 (and 2 more)"
        assert failure.text.count("\n") == 2

    def test_a_bundle_that_cannot_be_read(self) -> None:
        (suite,) = parsed(unreadable())
        assert results(suite) == {SOUND: "failed", "squared error of the worst adapter is at most 0.1": "skipped"}

    def test_counts_are_those_of_the_cases(self) -> None:
        finding = gate_finding("team/adapter-0002")
        made = [made_up(5, max_error=0.3, findings=(finding, finding), unknown=(1,)), unreadable(), made_up(2)]
        xml = parsed(*made)
        written = [(suite.tests, suite.failures, suite.errors, suite.skipped) for suite in xml]
        total = (xml.tests, xml.failures, xml.errors, xml.skipped)
        for suite in xml:
            suite.update_statistics()  # junitparser's own count
        assert written == [(suite.tests, suite.failures, suite.errors, suite.skipped) for suite in xml]
        assert written == [(8, 2, 0, 1), (2, 1, 0, 1), (4, 0, 0, 0)]
        assert total == tuple(map(sum, zip(*written, strict=True)))

    def test_hostile_names_are_shown_and_legal(self) -> None:
        finding = Finding("kind", HOSTILE[3], "\x00\ud800\uffff", damage=True, adapter=HOSTILE[3])
        verification = made_up(names=HOSTILE, findings=(finding,))
        (suite,) = parsed(verification)
        names = [case.name for case in suite if case.classname == "lorazip.adapters"]
        assert names == [plain(name) for name in HOSTILE]
        text = junit([verification.report]).decode()
        assert not re.search("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", text)
        assert r"\x00\ud800\uffff" in text

    def test_same_report_same_bytes(self) -> None:
        assert junit([made_up(5).report]) == junit([made_up(5).report])


class Rendered(HTMLParser):
    """Cells of tables, list items, and every element that Markdown made."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.items: list[str] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
        if tag == "li":
            self.items.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data
        if "li" in self._open:
            self.items[-1] += data


class TestMarkdown:
    def test_has_verdict_figures_gates_and_the_worst(self) -> None:
        verification = made_up(12, max_error=0.5, max_mean_error=0.1)
        text = markdown(verification.report)
        summary = verification.report.summary
        assert summary is not None
        assert text.startswith("### ✅ lorazip verify <code>bundle</code>: sound, within --max-error 0.5\n")
        rows = Rendered(text).rows
        errors = (summary.mean_squared_error, summary.p95_squared_error, summary.max_squared_error)
        mean, p95, worst = (f"{value:.4f}" for value in errors)
        assert ["12", "100.0 MB", "10.0 MB", "90.0%, 10.0 times smaller", mean, p95, worst] in rows
        assert ["--max-error", "worst adapter", "0.5", worst, "✅ held"] in rows
        assert ["--max-mean-error", "mean", "0.1", mean, "❌ failed"] in rows
        listed = [row for row in rows if row[0].startswith("team/")]
        ranked = sorted(verification.report.adapters, key=lambda adapter: -(adapter.squared_error or 0))[:10]
        assert [row[0] for row in listed] == [adapter.name for adapter in ranked]
        assert "The worst 10 of 12 adapters:" in text
        assert "measured against <code>originals</code>" in text

    def test_says_what_outputs_lose(self) -> None:
        verification = made_up(4, outputs=True)
        outputs = verification.report.outputs
        assert outputs is not None
        text = markdown(verification.report)
        worst = f"{outputs.max_squared_error:.4f}"
        assert "Squared error of outputs, 3 adapters on the inputs of moments.safetensors" in html.unescape(text)
        head, *rows = (row for row in Rendered(text).rows if len(row) == 6)
        column = head.index("of outputs")
        assert {row[0]: row[column] for row in rows}[outputs.worst_adapter] == worst
        assert {row[0]: row[column] for row in rows}["team/adapter-0000"] == "-"
        assert "of outputs" not in markdown(made_up(4).report)

    def test_tells_of_claims_and_of_what_is_not_known(self) -> None:
        assert "as the bundle claims" in markdown(made_up(2, measured=False).report)
        rows = Rendered(markdown(made_up(3, max_error=0.9, unknown=(0,)).report)).rows
        assert rows[3][-1] == "❔ not known"

    def test_of_a_bundle_that_cannot_be_read(self) -> None:
        text = markdown(unreadable().report)
        assert text.startswith("### ❌ lorazip verify <code>bundle</code>: 1 finding\n")
        assert Rendered(text).items == ["damage, manifest: manifest.json: bundle: no JSON"]

    def test_of_many_findings_the_first_are_listed(self) -> None:
        findings = tuple(gate_finding(f"a{number}") for number in range(70))
        items = Rendered(markdown(made_up(2, findings=findings).report)).items
        assert len(items) == 51
        assert items[0] == "max-error: a0: squared error 0.4 is above the limit"
        assert items[-1] == "… and 20 more, which the JSON report has"

    @pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
    def test_hostile_names_are_shown_as_they_are(self, hostile: str) -> None:
        finding = Finding("kind", hostile, hostile, damage=False, adapter=hostile)
        rendered = Rendered(markdown(made_up(names=[hostile, "b"], findings=(finding,)).report))
        assert rendered.tags == {"h3", "code", "table", "thead", "tbody", "tr", "th", "td", "p", "ul", "li"}
        shown = plain(hostile)
        assert [row[0] for row in rendered.rows if len(row) == 5 and row[0] != "adapter"].count(shown) == 1
        assert {len(row) for row in rendered.rows} == {5, 7}
        assert rendered.items == [f"kind: {shown}: {shown}: {shown}".rstrip()]

    def test_ordinary_names_stay_readable(self) -> None:
        for name in ("fv_choose_middle_of_3", "team/adapter-v1.2", "a, b: c"):
            assert escape(name) == name

    def test_nothing_is_left_that_a_forge_would_make_a_link_of(self) -> None:
        for text in ("@someone", "#1", "http://x.example", "www.x.example", ":rocket:", "org/repo#2", "a@b.example"):
            assert escape(text) != text
            assert html.unescape(escape(text)) == text


def test_the_summary_of_hostile_names_has_no_raw_control_characters(tmp_path: Path) -> None:
    text = markdown(made_up(names=HOSTILE).report)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u2028\u202e]", text)
