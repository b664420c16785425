"""What is sound is not good yet: large losses and large bundles are warned of, and limits are limits on a share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace
from testing import random_adapters as ra
from testing.made_up import made_up

from lorazip_cli.main import main
from lorazip_core.base.errors import UsageError
from lorazip_core.bundle.check import Finding
from lorazip_core.bundle.quality import LARGE_ERROR, QualityWarning, quality_warnings
from lorazip_core.bundle.summary import summarise
from lorazip_core.compress import key
from lorazip_core.planning.options import CompressOptions
from lorazip_core.reading.packs import CPU_BUDGET
from lorazip_core.report.junit import junit
from lorazip_core.report.markdown import markdown
from lorazip_core.report.outcome import finding_lines, is_good, limit_of_adapters, verdict
from lorazip_core.verify.run import verify


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve adapters that share nothing."""
    recipes = (ra.Recipe(f"t{i:02}", 4, (ra.Q, ra.V), group=i) for i in range(12))
    return ra.write_collection(tmp_path_factory.mktemp("unlike"), tuple(recipes))


@pytest.fixture(scope="module")
def lossy(unlike: Path) -> Path:
    bundle = unlike.with_name(f"{unlike.name}-bundle")
    assert main(["compress", str(unlike), "-o", str(bundle), "--rank", "2", "-q"]) == 0
    return bundle


def test_large_losses_are_said_by_compress_and_verify(
    unlike: Path, lossy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compress", str(unlike), "-o", str(tmp_path / "b"), "--rank", "2", "--json"]
    for command in (argv, ["verify", str(lossy), "--json"], ["verify", str(lossy), "--against", str(unlike), "--json"]):
        assert main(command) == 0
        output = capsys.readouterr()
        (warning,) = [each for each in json.loads(output.out)["warnings"] if each["kind"] == "large-errors"]
        assert "12 of 12 adapters lose more than 0.1" in warning["message"]
        assert all(word in warning["hint"] for word in ("--max-error", "--rank", "--clusters", "--method coded"))
        assert "lorazip: warning: 12 of 12 adapters" in output.err
    assert main(["verify", str(lossy)]) == 0
    assert f"{lossy}: sound, but 12 adapters with a squared error above 0.1\n" in capsys.readouterr().err
    assert main(["verify", str(lossy), "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_who_sets_a_limit_knows_what_he_loses(lossy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(lossy), "--max-error", "1"]) == 0
    output = capsys.readouterr().err
    assert f"{lossy}: sound, within --max-error 1\n" in output
    assert "lose more" not in output


def test_a_bundle_larger_than_its_originals_is_said(
    unlike: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compress", str(unlike), "-o", str(tmp_path / "b"), "--method", "svd", "--dtype", "f32", "--json"]
    assert main(argv) == 0
    output = capsys.readouterr()
    (warning,) = json.loads(output.out)["warnings"]
    assert warning["kind"] == "larger-than-originals"
    assert "--rank" in warning["hint"]
    assert "lorazip: warning: the bundle is larger than the adapters" in output.err


def test_nothing_is_said_of_a_good_bundle() -> None:
    errors = [0.0, 0.05, LARGE_ERROR]
    assert quality_warnings(errors, summarise(3, errors, 100, 100), method="joint", max_error=None) == []


@pytest.mark.parametrize("option", ["--max-error", "--max-mean-error"])
def test_a_limit_that_always_holds_is_refused(lossy: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for limit in ("25", "1.0001", "inf", "nan", "-0.1"):
        assert main(["verify", str(lossy), option, limit]) == 2
        assert option in capsys.readouterr().err
    assert main(["compress", "DIR", "-o", "B", "--max-error", "25"]) == 2
    with pytest.raises(UsageError, match="between 0 and 1, not 25"):
        verify(lossy, max_error=25)
    with pytest.raises(UsageError, match="between 0 and 1, not 25"):
        verify(lossy, max_mean_error=25)


def test_adapters_that_lorazip_exported_are_one_cause(
    lossy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(lossy), "-o", str(tmp_path / "x"), "-q"]) == 0
    capsys.readouterr()
    assert main(["verify", str(lossy), "--against", str(tmp_path / "x"), "--json"]) == 1
    output = capsys.readouterr()
    found = json.loads(output.out)["findings"]
    assert len(found) > 24
    assert found[0]["kind"] == "source-exported"
    lines = output.err.splitlines()
    errors = [line for line in lines if line.startswith("lorazip: error: ")]
    assert len(errors) == 2
    assert "none of the 12 adapters has the files" in errors[0]
    assert "lorazip exported" in errors[1]


def test_many_findings_of_a_kind_are_told_by_the_first_ones() -> None:
    failed = [Finding("max-error", None, "above", damage=False, adapter=f"a{i}") for i in range(11)]
    torn = [Finding("wrong-digest", f"cores/{i}", "torn", damage=True) for i in range(10)]
    lines = finding_lines(made_up(11, findings=(*torn, *failed)).report)
    assert lines[:10] == [f"cores/{i}: torn" for i in range(10)]
    assert lines[10:] == ["a0: above", "a1: above", "a2: above", "max-error: 8 more; --json has them all"]


def test_reports_say_how_a_bundle_was_made_and_which_limit_holds(unlike: Path, lossy: Path) -> None:
    digest = json.loads((lossy / "manifest.json").read_bytes())["manifest_sha256"]
    free = verify(lossy, against=unlike)
    assert free.manifest_sha256 == digest
    assert (verdict(free), is_good(free)) == ("sound, but 12 adapters with a squared error above 0.1", None)
    bound = verify(lossy, against=unlike, max_error=1)
    assert is_good(bound) is True
    for report, limit in ((free, "No limit was given"), (bound, "--max-error 1: held")):
        text = junit([report]).decode()
        assert "joint, rank 2, 1 cluster, bf16" in text
        assert digest in text
        assert limit in text
    assert "No limit was given" in markdown(free)
    assert digest in markdown(free)
    assert "12 of 12 adapters lose more" in markdown(free)


def test_a_verdict_counts_what_is_warned_of(unlike: Path, lossy: Path, tmp_path: Path) -> None:
    argv = ["compress", str(unlike), "-o", str(tmp_path / "b"), "--rank", "2", "--max-error", "0.999", "-q"]
    assert main(argv) == 0
    bounded = verify(tmp_path / "b")
    assert max(adapter.claimed_squared_error for adapter in bounded.adapters) > LARGE_ERROR
    assert (bounded.warnings, verdict(bounded), is_good(bounded), limit_of_adapters(bounded)) == (
        [],
        "sound",
        True,
        0.999,
    )
    larger = QualityWarning("larger-than-originals", "larger", "compress with a lower --rank")
    assert is_good(replace(bounded, warnings=[larger])) is True
    assert limit_of_adapters(verify(lossy)) == LARGE_ERROR


def test_pages_colour_what_is_above_the_limit(unlike: Path, lossy: Path) -> None:
    pytest.importorskip("plotly")
    from lorazip_core.report.html import verify_page
    from lorazip_core.verify.run import verify_by_module

    errors = sorted(adapter.claimed_squared_error for adapter in verify(lossy).adapters)
    page = verify_page(verify_by_module(lossy, against=unlike))
    assert page.count('<tr class="above">') == 12
    assert '<p class="verdict neutral">' in page
    assert "joint, rank 2, 1 cluster, bf16; base model org/base; manifest " in page
    assert "No limit was given" in page
    page = verify_page(verify_by_module(lossy, against=unlike, max_error=(errors[-3] + errors[-4]) / 2))
    assert page.count('<tr class="above">') == 3 + 1  # adapters, and the limit that does not hold
    assert '<p class="verdict bad">' in page


def test_work_is_resumed_on_a_like_processor_only(unlike: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from lorazip_core.adapter.collection import open_collection
    from lorazip_core.reading.scan import scan

    scanned = scan(open_collection(unlike), skip_bad=False, advance=lambda steps: None)
    keys = set()
    for capability in ("DEFAULT", "AVX2", "AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        keys.add(key.work_key(scanned, CompressOptions(), torch.device("cpu"), CPU_BUDGET))
    assert len(keys) == 3
    monkeypatch.setattr(key, "_processor_model", lambda: "of the same instructions")
    assert key.work_key(scanned, CompressOptions(), torch.device("cpu"), CPU_BUDGET) not in keys


def test_the_model_of_the_processor_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key.platform, "processor", lambda: "arm")
    told = tmp_path / "cpuinfo"
    assert key._processor_model(told) == "arm"
    told.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert key._processor_model(told) == "arm"
    told.write_text("processor\t: 0\nmodel\t\t: 106\nmodel name\t: Some CPU @ 2.60GHz\nmodel name\t: Another\n")
    assert key._processor_model(told) == "Some CPU @ 2.60GHz"
