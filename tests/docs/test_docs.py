"""What the documentation shows is run: the shell blocks of the tutorial and the readme, a Makefile, and every link."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from testing.tiny_models import llama, save_model

from lorazip_cli.main import app
from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions
from lorazip_core.sample import sample_path

ROOT = Path(__file__).resolve().parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A shell block, the exit code that it ends with, and what is shown of its output.
BLOCK = re.compile(r"^```sh(?: fails=(\d+))?\n(.*?)^```\n(?:```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)


def check_shown(shown: str, printed: str) -> None:
    """Every line that a page shows is printed, in this order; figures may differ, as they do between processors."""
    lines = iter([_without_figures(line) for line in printed.splitlines()])
    for line in shown.splitlines():
        if line != "…":
            assert _without_figures(line) in lines, f"{line!r} is not in, or not in this order:\n{printed}"


def _without_figures(line: str) -> str:
    return re.sub(r"[\d.]+", "0", line)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tutorial was followed to its end."""
    folder = tmp_path_factory.mktemp("tutorial")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    blocks = BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text())
    assert len(blocks) > 8
    for code, block, shown in blocks:
        script = "\n".join(["exec 2>&1", "set -e", block])
        done = subprocess.run(["sh", "-c", script], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
        assert done.returncode == int(code or 0), f"{block}\n{done.stdout}"
        check_shown(shown, done.stdout)
    return folder


@pytest.mark.slow
def test_the_tutorial_gives_what_it_says(walked: Path) -> None:
    assert (walked / "served" / "fv_capitalize" / "adapter_model.safetensors").is_file()
    assert [path.name for path in (walked / "one").iterdir() if path.is_dir()] == ["fv_capitalize"]


@pytest.mark.slow
def test_its_makefile_builds_once(walked: Path) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text()
    makefile = re.search(r"^```make\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert makefile is not None
    (walked / "Makefile").write_text(makefile[1])
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    first = subprocess.run(["make", "build/verify.json"], cwd=walked, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    again = subprocess.run(["make", "-q", "build/verify.json"], cwd=walked, env=environment, check=False)
    assert again.returncode == 0


@pytest.mark.slow
def test_what_the_readme_shows_is_printed(tmp_path: Path) -> None:
    use = re.search(r"^## Use\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert use is not None
    (tmp_path / "lorazip_core").symlink_to(ROOT / "lorazip_core")  # as in a checkout
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    blocks = re.findall(r"^```console\n(.*?)^```", use[1], re.MULTILINE | re.DOTALL)
    calls = [call.partition("\n") for block in blocks for call in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    assert len(calls) >= 7
    for command, _, shown in calls:
        done = subprocess.run(
            ["sh", "-c", f"exec 2>&1; {command}"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        check_shown(shown, done.stdout)


@pytest.mark.parametrize(
    ("page", "least"), [("README.md", 4), ("docs/tutorial.md", 25), ("docs/ci.md", 7), ("docs/pipeline.md", 9)]
)
def test_commands_of_a_page_can_be_called(page: str, least: int) -> None:
    """Quicker than to follow the page: what it shows is parsed, with every variable of a shell or of make as 0.3."""
    fenced = "".join(
        re.findall(r"^```(?:sh|console|make|yaml).*?\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    )
    lines = re.sub(r"\\\n\s*", " ", fenced).splitlines()
    found = [match[1] for line in lines if (match := re.match(r"[\s$-]*(?:run: )?(lorazip [a-z]+ .*)", line))]
    assert len(found) >= least
    for line in found:
        plain = re.sub(r"\$(?:\(\w+\)|\w+|@|<)", "0.3", re.split(r" (?:[|;&>]|2>)", line)[0])
        _, name, *arguments = shlex.split(plain, comments=True)
        command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
        command.make_context(name, arguments)


def test_the_example_of_serving_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "serving.md").read_text()
    example, *_ = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    compress(sample_path(), tmp_path / "bundle", CompressOptions())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    y = names["y"]
    assert y.shape == (3, 576)
    assert [bool(each.any()) for each in y] == [True, False, True]


def test_the_example_of_transformers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model of random weights that has the layers that the sample is for."""
    page = (ROOT / "docs" / "serving.md").read_text()
    _, example, _ = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    compress(sample_path(), tmp_path / "bundle", CompressOptions())
    save_model(tmp_path / "base", llama(18, hidden_size=576, num_attention_heads=9, num_key_value_heads=3))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["tokens"].shape == (3, names["inputs"]["input_ids"].shape[1] + 4)
    base = names["model"](**names["inputs"]).logits
    assert [bool((each != own).any()) for each, own in zip(names["logits"], base, strict=True)] == [True, False, True]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {link}"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_no_placeholder_is_left(page: Path) -> None:
    assert re.findall(r"@[A-Z]+\d*@", page.read_text()) == []
