"""A verification as JUnit XML, which CI systems show test by test.

A bundle is a test suite. Its cases are: the bundle is sound; with originals, they are the ones that it was made from;
each limit that was asked for; and each adapter.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import NamedTuple

from ..base.text import error, plain
from ..bundle.finding import Finding
from ..verify.run import AdapterReport, VerifyReport
from .answers import answer_gates, bound, divergence, figures, found, kept
from .gate import Gate
from .outcome import gates, kept_as, limits, lost_of_outputs, made_with, squared_error


class _Case(NamedTuple):
    group: str
    name: str
    failures: Sequence[Finding]
    skipped: str | None = None
    """Why it is not known whether the test passes."""
    output: str | None = None


def junit(reports: Sequence[VerifyReport]) -> bytes:
    """One test suite for each report. The same reports give the same bytes.

    Every ``time`` is 0: readers expect the attribute, and a duration would make each run another file. What XML 1.0
    forbids and a name may have (control characters, surrogates, U+FFFE) is never printable, so `plain` escapes it.
    """
    root = ElementTree.Element("testsuites", {"name": "lorazip verify"})
    for report in reports:
        root.append(_suite(report))
    for field in ("tests", "failures", "errors", "skipped"):
        root.set(field, str(sum(int(suite.get(field, "0")) for suite in root)))
    root.set("time", "0")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _suite(report: VerifyReport) -> ElementTree.Element:
    cases = _cases(report)
    suite = ElementTree.Element(
        "testsuite",
        {
            "name": plain(report.bundle),
            "tests": str(len(cases)),
            "failures": str(sum(bool(case.failures) for case in cases)),
            "errors": "0",
            "skipped": str(sum(case.skipped is not None and not case.failures for case in cases)),
            "time": "0",
        },
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(report):
        ElementTree.SubElement(properties, "property", {"name": name, "value": plain(value)})
    for case in cases:
        suite.append(_element(case))
    return suite


def _properties(report: VerifyReport) -> list[tuple[str, str]]:
    properties = [("errors_are", report.errors_are), ("against", report.against or "-")]
    properties += [("made_with", made_with(report) or "-"), ("limits", limits(report))]
    properties += [(f"warning.{warning.kind}", warning.message) for warning in report.warnings]
    if (lost := lost_of_outputs(report)) is not None:
        properties.append(("outputs", lost))
    if report.model is not None:
        properties.append(("answers", figures(report.model)))
    if summary := report.summary:
        for field in summary.__struct_fields__:
            value = getattr(summary, field)
            properties.append((field, "-" if value is None else str(value)))
    return properties


def _cases(report: VerifyReport) -> list[_Case]:
    """Every finding is in one of the cases at least, so that a report that is not ok has a failure."""
    names = {adapter.name for adapter in report.adapters}
    damage = [found for found in report.findings if found.damage]
    of_gates = {kind: [each for each in report.findings if each.kind == kind] for kind in _KINDS.values()}
    rest = [found for found in report.findings if not found.damage and found.kind not in of_gates]
    others = [found for found in rest if found.kind.startswith("source-") or found.adapter not in names]
    cases = [_Case("bundle", "the bundle is sound", damage)]
    if report.against is not None or others:
        cases.append(_Case("bundle", "the originals are those of the bundle", others))
    cases += [_gate(gate, of_gates[_KINDS[gate.option]]) for gate in gates(report)]
    cases += [_answer_gate(gate, of_gates[_KINDS[gate.option]]) for gate in answer_gates(report)]
    return cases + [_adapter(report, adapter) for adapter in report.adapters]


_KINDS = {
    "--max-error": "max-error",
    "--max-mean-error": "max-mean-error",
    "--min-kept": "min-kept",
    "--max-kl": "max-kl",
}


def _gate(gate: Gate, failures: Sequence[Finding]) -> _Case:
    unknown = "not every adapter has an error that is known" if gate.held is None else None
    name = f"squared error of the {gate.applies_to} is at most {gate.limit:g}"
    return _Case("limits", name, failures, unknown, f"squared error: {error(gate.found)}")


def _answer_gate(gate: Gate, failures: Sequence[Finding]) -> _Case:
    unknown = "not every adapter with rows has answers that are known" if gate.held is None else None
    return _Case("limits", bound(gate), failures, unknown, f"{gate.applies_to}: {found(gate)}")


def _adapter(report: VerifyReport, adapter: AdapterReport) -> _Case:
    failures = [found for found in report.findings if found.adapter == adapter.name]
    known = squared_error(report, adapter)
    lines = [f"squared error: {error(known)} ({report.errors_are})", f"kept as: {kept_as(adapter)}"]
    if adapter.output_squared_error is not None:
        lines.insert(1, f"squared error of outputs: {error(adapter.output_squared_error)}")
    if worst := adapter.worst_module:
        lines.append(f"worst module: {worst.name}: {error(worst.squared_error)}")
    scored = report.model.adapters if report.model else []
    for answers in (each for each in scored if each.name == adapter.name):
        exact = answers.exact_match
        lines.append(f"exact match: {exact.compressed:.3f}, original {exact.original:.3f}: kept {kept(answers.kept)}")
        lines.append(f"KL: {divergence(answers.kl)}")
    skipped = "its error could not be measured" if known is None else None
    return _Case("adapters", adapter.name, failures, skipped, "\n".join(lines))


def _element(case: _Case) -> ElementTree.Element:
    element = ElementTree.Element("testcase", {"classname": f"lorazip.{case.group}", "name": plain(case.name)})
    element.set("time", "0")
    if case.failures:
        lines = [_line(found) for found in case.failures]
        attributes = {"message": lines[0], "type": case.failures[0].kind}
        if len(lines) > 1:
            attributes["message"] += f" (and {len(lines) - 1} more)"
        ElementTree.SubElement(element, "failure", attributes).text = "\n".join(lines)
    elif case.skipped is not None:
        ElementTree.SubElement(element, "skipped", {"message": case.skipped})
    if case.output is not None:
        ElementTree.SubElement(element, "system-out").text = "\n".join(map(plain, case.output.split("\n")))
    return element


def _line(found: Finding) -> str:
    about = ": ".join(filter(None, (found.adapter, found.path)))
    return plain(f"{found.kind}: {about}: {found.message}" if about else f"{found.kind}: {found.message}")
