"""Options in place of the parameters that the core's messages name, and nothing else changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import typer

from lorazip_cli.failures import explain
from lorazip_cli.main import app, main
from lorazip_cli.progress import Bars, Lines
from lorazip_cli.wording import OPTIONS, in_options, report_in_options
from lorazip_core.base.errors import AdapterError, AdapterErrors, UsageError
from lorazip_core.base.text import unmarked
from lorazip_core.bundle.finding import Finding
from lorazip_core.bundle.manifest import SkippedEntry
from lorazip_core.bundle.quality import QualityWarning
from lorazip_core.sample import sample_path


def declared() -> Iterator[str]:
    """The options of all commands."""
    for command in typer.main.get_command(app).commands.values():
        for parameter in command.params:
            yield from parameter.opts


def test_every_option_in_the_table_is_one() -> None:
    assert set(OPTIONS.values()) <= set(declared())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("choose another «output», or «force» to replace it", "choose another -o, or --force to replace it"),
        ("x exists (choose another «output»)", "x exists (choose another -o)"),
        ("«no_such_thing» 1, missing field `rank`", "«no_such_thing» 1, missing field `rank`"),
        ("adapter '«force»': bad", "adapter '«force»': bad"),
        ("adapter 'a «force»': bad", "adapter 'a «force»': bad"),
        ("/tmp/«force»/«output» exists", "/tmp/«force»/«output» exists"),
        ("a«force»b, «force", "a«force»b, «force"),
    ],
)
def test_known_parameters_become_options(text: str, expected: str) -> None:
    assert in_options(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a («allow_pickle», or «output»)", "a (allow_pickle, or output)"),
        ("adapter 'a «force»': bad", "adapter 'a «force»': bad"),
        ("/tmp/«force»/«output» exists", "/tmp/«force»/«output» exists"),
    ],
)
def test_what_is_stored_has_no_marks(text: str, expected: str) -> None:
    assert unmarked(text) == expected


class Report(msgspec.Struct, frozen=True):
    bundle: str
    warnings: list[QualityWarning]
    findings: list[Finding]
    skipped: list[SkippedEntry]
    left_out: dict[str, list[str]]


def test_of_a_report_only_the_texts_are_changed() -> None:
    def made(option: str) -> Report:
        return Report(
            "«force»",
            [QualityWarning("large-errors", f"a {option}", f"b {option}")],
            [Finding("«force»", "«force»", f"c {option}", False, "«force»")],
            [SkippedEntry("«force»", f"d {option}")],
            {"«force»": ["«force»"]},
        )

    assert report_in_options(made("«force»")) == made("--force")


def test_errors_name_options() -> None:
    errors = [AdapterError("«rank»", "bad", "«allow_pickle»"), AdapterError("b", "bad")]
    failure = explain(AdapterErrors(errors), ["compress"])
    assert failure is not None
    assert failure.lines[:2] == ["adapter '«rank»': bad (--allow-pickle)", "adapter 'b': bad"]
    failure = explain(UsageError("«rank» 0", "or «method» svd"), [])
    assert failure is not None
    assert failure.lines == ["--rank 0 (or --method svd)"]


@pytest.mark.parametrize("shown", [Lines(), Bars()])
def test_notes_name_options(shown: Lines | Bars, capsys: pytest.CaptureFixture[str]) -> None:
    shown.note("kept a as it was: it would exceed «max_error» 0.1")
    assert capsys.readouterr().err == "kept a as it was: it would exceed --max-error 0.1\n"


def test_what_a_bundle_has_left_out_is_said_in_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its manifest has the plain names of parameters, without the marks that messages have."""
    adapters, bundle, clusters = tmp_path / "adapters", tmp_path / "bundle", tmp_path / "clusters.json"
    for folder in sorted(sample_path().iterdir())[:3]:
        shutil.copytree(folder, adapters / folder.name)
    pickled = adapters / "«force»"
    pickled.mkdir()
    shutil.copy(folder / "adapter_config.json", pickled)
    (pickled / "adapter_model.bin").write_bytes(b"")
    reason = "(save it again as safetensors, or --allow-pickle to read it with weights_only=True)"
    stored = reason.replace("--allow-pickle", "allow_pickle")

    def skipped(*arguments: str, reason: str = reason) -> None:
        assert main([*arguments, "--json"]) == 0
        output = capsys.readouterr()
        [found] = json.loads(output.out)["skipped"]
        assert found["name"] == "«force»"
        assert found["reason"].endswith(reason)
        assert "«allow_pickle»" not in output.out + output.err

    skipped("compress", str(adapters), "--dry-run", "--skip-bad")
    skipped("compress", str(adapters), "-o", str(bundle), "--rank", "4", "--skip-bad")
    skipped("cluster", str(adapters), "-o", str(clusters), "--clusters", "2", "--rank", "4", "--skip-bad")
    skipped("info", str(bundle), reason=stored)
    assert json.loads((bundle / "manifest.json").read_text())["skipped"][0]["reason"].endswith(stored)
    assert main(["info", str(bundle)]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "pickled" in line]
    assert line.startswith("  «force»: ")
    assert line.endswith(stored)


def test_every_file_of_verify_names_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "bundle"
    assert main(["compress", str(sample_path()), "-o", str(bundle), "--rank", "1", "-q"]) == 0
    files = {"-o": "report.json", "--report": "page.html", "--junit": "tests.xml", "--summary": "summary.md"}
    arguments = [word for option, name in files.items() for word in (option, str(tmp_path / name))]
    assert main(["verify", str(bundle), "--json", *arguments]) == 0
    output = capsys.readouterr()
    hint = "compress with --max-error 0.1, a higher --rank"
    assert hint in output.err
    for text in (output.out, *((tmp_path / files[option]).read_text() for option in ("-o", "--report", "--summary"))):
        assert hint in text
    for text in (output.out, output.err, *((tmp_path / name).read_text() for name in files.values())):
        assert "«rank»" not in text
