"""docs/ci.md is run: the shell lines of both CI files, the Makefile, and its rule for exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

from lorazip_core.sample import sample_path

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "ci.md").read_text(encoding="utf-8")
REPORTS = ("verify.xml", "verify.html", "verify.json")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def ci_file(name: str) -> dict:
    (block,) = [block for block in blocks("yaml") if block.startswith(f"# {name}\n")]
    return yaml.safe_load(block)


GITHUB = ci_file(".github/workflows/adapters.yml")["jobs"]["bundle"]
GITLAB = ci_file(".gitlab-ci.yml")["bundle"]
GITHUB_STEPS = [step["run"] for step in GITHUB["steps"] if "run" in step]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sample as `adapters`, and what the lines before `verify` make of it."""
    folder = tmp_path_factory.mktemp("ci")
    shutil.copytree(sample_path(), folder / "adapters")
    installs, compresses, _ = zip(GITHUB_STEPS, GITLAB["script"], strict=True)
    assert set(installs) == {"pip install './lorazip[report]'"}
    for compress in set(compresses):
        shutil.rmtree(folder / "build", ignore_errors=True)
        assert run(folder, compress).returncode == 0
    return folder


@pytest.fixture
def folder(compressed: Path, tmp_path: Path) -> Path:
    shutil.copytree(compressed, tmp_path, dirs_exist_ok=True)
    return tmp_path


def run(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As both CI systems run a line: by a shell that stops at the first failure."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-e", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def check_reports(folder: Path, *, ok: bool) -> None:
    """All that the job uploads is there, and says whether the check has passed."""
    failures = ElementTree.parse(folder / "build" / "verify.xml").getroot().get("failures")
    assert (failures == "0") is ok
    assert json.loads((folder / "build" / "verify.json").read_bytes())["ok"] is ok
    assert (folder / "build" / "verify.html").read_text().endswith("</html>")


@pytest.mark.parametrize(("limit", "code"), [(None, 0), ("0.01", 1)])
@pytest.mark.slow
def test_github(limit: str | None, code: int, folder: Path) -> None:
    summary = folder / "step_summary"
    summary.touch()
    environment = {**GITHUB["env"], "GITHUB_STEP_SUMMARY": str(summary), **({"MAX_ERROR": limit} if limit else {})}
    done = run(folder, GITHUB_STEPS[2], **environment)
    assert done.returncode == code, done.stderr
    check_reports(folder, ok=code == 0)
    assert summary.read_text().startswith("### ✅" if code == 0 else "### ❌")


@pytest.mark.parametrize(("limit", "code"), [(None, 0), ("0.01", 1)])
@pytest.mark.slow
def test_gitlab(limit: str | None, code: int, folder: Path) -> None:
    done = run(folder, GITLAB["script"][2], **{**GITLAB["variables"], **({"MAX_ERROR": limit} if limit else {})})
    assert done.returncode == code, done.stderr
    check_reports(folder, ok=code == 0)
    assert (folder / "build" / "verify.md").read_text().startswith("### ✅" if code == 0 else "### ❌")


@pytest.mark.slow
def test_what_is_uploaded_is_what_is_written(folder: Path) -> None:
    assert run(folder, GITLAB["script"][2], **GITLAB["variables"]).returncode == 0
    upload, reporter = [step for step in GITHUB["steps"] if step.get("if") == "always()"]
    assert {path.name for path in folder.glob(upload["with"]["path"])} >= set(REPORTS)
    assert (folder / reporter["with"]["path"]).is_file()
    assert GITLAB["artifacts"]["when"] == "always"
    assert (folder / GITLAB["artifacts"]["reports"]["junit"]).is_file()


@pytest.mark.slow
def test_two_summaries_of_one_step_are_appended(folder: Path) -> None:
    (hint,) = re.findall(r"`(--summary [^`]*)`\.", TEXT.replace("\n", " "))
    summary = folder / "step_summary"
    summary.touch()
    command = f"lorazip verify build/bundle -q {hint}"
    assert run(folder, f"{command}; {command}", GITHUB_STEP_SUMMARY=str(summary)).returncode == 0
    assert summary.read_text().count("### ✅") == 2


@pytest.mark.slow
def test_makefile(folder: Path) -> None:
    (makefile,) = blocks("make")
    (folder / "Makefile").write_text(makefile)
    shutil.rmtree(folder / "build")
    first = run(folder, "make")
    assert first.returncode == 0, first.stderr
    check_reports(folder, ok=True)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = run(folder, "make")
    assert (again.returncode, "lorazip" in again.stdout) == (0, False)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    (folder / "build" / "verified").unlink()
    strict = run(folder, "make MAX_ERROR=0.01")
    assert (strict.returncode, "Error 1" in strict.stderr) == (2, True)
    check_reports(folder, ok=False)
    assert run(folder, "make -q").returncode == 1, "a check that failed is not done"


@pytest.mark.slow
def test_a_limit_that_does_not_hold_can_be_let_pass_and_damage_cannot(folder: Path) -> None:
    (command,) = blocks("sh")
    done = run(folder, command)
    assert done.returncode == 0
    assert "above the limit" in done.stderr
    (folder / "build" / "bundle" / "manifest.json").write_text("{}")
    assert run(folder, command).returncode != 0
