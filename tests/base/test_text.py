"""Sizes in words: what has grown is never said to be saved or smaller."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from testing import peft_fixtures as fixtures
from testing.made_up import made_up

from lorazip_cli.main import main
from lorazip_core.base.text import saved, saving, times
from lorazip_core.report.markdown import markdown


@pytest.mark.parametrize(
    ("before", "after", "cell", "sentence", "factor"),
    [
        (1000, 250, "75.0%", "75.0% saved", "4.0 times smaller"),
        (1000, 1000, "0.0%", "0.0% saved", "1.0 times smaller"),
        (5757, 7209, "25.2% larger", "25.2% larger", "1.25 times the size"),
        (1000, 3000, "200.0% larger", "200.0% larger", "3.00 times the size"),
        (0, 10, "-", "-", "-"),
    ],
)
def test_sizes_before_and_after(before: int, after: int, cell: str, sentence: str, factor: str) -> None:
    ratio = 1 - after / before if before else None
    assert (saved(ratio), saving(ratio), times(before, after)) == (cell, sentence, factor)


def test_commands_say_that_a_bundle_is_larger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fixtures.save_adapter(tmp_path / "in" / "a", fixtures.tokens(), target_modules=["q"], r=1)
    monkeypatch.chdir(tmp_path)
    for argv in (
        ["compress", "in", "-o", "b", "--method", "svd", "--rank", "64", "--dtype", "f32"],
        ["verify", "b", "--against", "in"],
        ["info", "b"],
    ):
        assert main(argv) == 0
        out, err = capsys.readouterr()
        assert " times the size" in out + err
        for word in ("% saved", "times smaller"):
            assert word not in out + err
        assert ("% larger, " in out + err) == (argv[0] != "info")


def test_markdown_of_a_larger_bundle() -> None:
    report = made_up(12).report
    assert report.summary is not None
    summary = msgspec.structs.replace(
        report.summary, bytes_original=5757, bytes_bundle=7209, saved_ratio=1 - 7209 / 5757
    )
    text = markdown(msgspec.structs.replace(report, summary=summary))
    assert "| 25.2% larger, 1.25 times the size |" in text
    assert "smaller" not in text
