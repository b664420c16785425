"""What the documentation shows is run: the shell blocks of the tutorial, its Makefile, and every link."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```sh(?: fails=(\d+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tutorial was followed to its end."""
    folder = tmp_path_factory.mktemp("tutorial")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    blocks = BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text())
    assert len(blocks) > 8
    for code, block in blocks:
        script = "\n".join(["set -e", block])
        done = subprocess.run(["sh", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == int(code or 0), f"{block}\n{done.stdout}\n{done.stderr}"
    return folder


def test_the_tutorial_gives_what_it_says(walked: Path) -> None:
    assert (walked / "served" / "fv_capitalize" / "adapter_model.safetensors").is_file()
    assert [path.name for path in (walked / "one").iterdir() if path.is_dir()] == ["fv_capitalize"]


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
