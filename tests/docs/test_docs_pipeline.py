"""docs/pipeline.md is run against a Hub on loopback: its Makefile from a list to a checked bundle, and its CI file."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from testing.hub import HubServer, Record, Repository

from lorazip_core.sample import sample_path

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "pipeline.md").read_text(encoding="utf-8")
CHAIN = ["fetch", "cluster", "compress", "verify"]
SAMPLES = sorted(path for path in sample_path().iterdir() if path.is_dir())[:4]


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return str(found)


@dataclass
class Project:
    """A folder with the Makefile, a list and a Hub of its own."""

    folder: Path
    hub: HubServer

    def run(self, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MAKE", "MFLAGS"))
        }
        return subprocess.run(
            ["sh", "-e", "-c", command],
            cwd=self.folder,
            env=inherited
            | {
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
                "NO_PROXY": "127.0.0.1",
                "HF_ENDPOINT": self.hub.url,
                "HF_HOME": str(self.folder / ".hf"),
            }
            | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def make(self, arguments: str = "") -> list[str]:
        """The commands of lorazip that `make` ran; it succeeded."""
        done = self.run(f"make {arguments}")
        assert done.returncode == 0, done.stdout + done.stderr
        return commands(done.stdout)

    def write_list(self, *lines: str) -> None:
        (self.folder / "adapters.txt").write_text("".join(f"{line}\n" for line in lines))

    @property
    def lock(self) -> Path:
        return self.folder / "adapters" / "lorazip.lock"

    @property
    def asked(self) -> list[Record]:
        """Requests about repositories and their files since the log was cleared."""
        return self.hub.log.where(lambda request: not request.path.startswith("/api/agent"))

    def dates(self) -> dict[str, int]:
        files = [self.lock, *(path for path in (self.folder / "build").rglob("*") if path.is_file())]
        return {path.relative_to(self.folder).as_posix(): path.stat().st_mtime_ns for path in files}

    def names(self) -> list[str]:
        bundle = json.loads((self.folder / "build" / "bundle" / "manifest.json").read_bytes())
        return sorted(adapter["name"] for adapter in bundle["adapters"])


def commands(output: str) -> list[str]:
    return re.findall(r"^lorazip (\w+)", output, re.MULTILINE)


def repository(id: str, folder: Path) -> Repository:
    return Repository.from_directory(id, folder, card_data={"library_name": "peft", "license": "apache-2.0"})


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    with HubServer(*(repository(f"org/{path.name}", path) for path in SAMPLES)) as hub:
        (tmp_path / "Makefile").write_text(block("make"))
        project = Project(tmp_path, hub)
        project.write_list(*(f"org/{path.name}" for path in SAMPLES[:2]))
        yield project


@pytest.mark.slow
def test_the_makefile(project: Project) -> None:
    first = [f"org/{path.name}" for path in SAMPLES[:2]]
    assert project.make() == CHAIN
    assert project.names() == first
    report = json.loads((project.folder / "build" / "verify.json").read_bytes())
    assert report["ok"]

    # Again: nothing.
    before = project.dates()
    project.hub.log.clear()
    again = project.run("make")
    assert (again.returncode, again.stdout) == (0, "make: 'build/verify.json' is up to date.\n")
    assert project.run("make -q").returncode == 0

    # A list that names the same: it is read, the Hub isn't asked, nothing is made.
    project.write_list("# the same", *first)
    assert project.make() == ["fetch"]
    assert project.dates() == before
    assert not project.asked
    again = project.run("make")
    assert (again.returncode, again.stdout) == (0, "make: 'build/verify.json' is up to date.\n")

    # Another adapter in place of one: only that one is asked for, all is made again.
    new = f"org/{SAMPLES[2].name}"
    project.write_list(first[0], new)
    assert project.make() == CHAIN
    assert project.names() == [first[0], new]
    assert all(new in request.path for request in project.asked if request.origin == "hub")
    assert project.run("make -q").returncode == 0

    # A limit that does not hold is not done.
    strict = project.run("make -W build/bundle/manifest.json MAX_ERROR=0.0001")
    assert (strict.returncode, commands(strict.stdout)) == (2, ["verify"])
    assert "above the limit" in strict.stderr
    assert not (project.folder / "build" / "verify.json").exists()
    assert project.make() == ["verify"]

    # The ways to have something made again.
    assert project.make("-n -W adapters/lorazip.lock") == CHAIN[1:]
    (project.folder / "adapters" / ".fetched").unlink()
    assert project.make() == ["fetch"]


@pytest.mark.slow
def test_update_and_what_it_changes(project: Project) -> None:
    assert project.make("adapters/lorazip.lock") == ["fetch"]
    assert project.run("mkdir -p build/bundle && touch build/clusters.json").returncode == 0
    assert project.run("touch build/bundle/manifest.json && touch build/verify.json").returncode == 0
    assert project.make("update") == ["fetch"]
    assert project.run("make -q").returncode == 0, "there was nothing new"
    moved = project.hub.catalogue.repositories[f"org/{SAMPLES[0].name}"]
    moved.commit({"adapter_model.safetensors": SAMPLES[3] / "adapter_model.safetensors"})
    assert project.make("update") == ["fetch"]
    assert project.make("-n") == CHAIN[1:]
    assert moved.head in project.lock.read_text()


@pytest.mark.slow
def test_a_hub_that_fails_stops_make_and_the_next_one_goes_on(project: Project) -> None:
    repository = project.hub.catalogue.repositories[f"org/{SAMPLES[1].name}"]
    repository.gated = "manual"
    failed = project.run("make")
    assert (failed.returncode, commands(failed.stdout)) == (2, ["fetch"])
    assert "access is restricted" in failed.stderr
    assert not project.lock.exists()
    assert (project.folder / "adapters" / "org" / SAMPLES[0].name / "adapter_model.safetensors").is_file()
    assert project.run("make -q").returncode == 1

    repository.gated = False
    project.hub.log.clear()
    assert project.make("adapters/lorazip.lock") == ["fetch"]
    assert {id for id, _ in project.hub.log.downloads()} == {repository.id}


class TestGithub:
    STEPS = yaml.safe_load(block("yaml"))["jobs"]["bundle"]

    def lines(self) -> list[str]:
        runs = [step["run"] for step in self.STEPS["steps"] if "run" in step]
        assert runs[0] == "pip install './lorazip[report]'"
        return runs[1:]

    def clone(self, project: Project) -> None:
        """Keep what a new job has: the lock, the list, and the Hub's cache, which went through a tar file."""
        (cache,) = [step["with"] for step in self.STEPS["steps"] if step.get("uses") == "actions/cache@v4"]
        assert cache["path"] == ".hf/hub"
        assert "hashFiles('adapters/lorazip.lock')" in cache["key"]
        with tarfile.open(project.folder / "cache.tar", "w") as tar:
            tar.add(project.folder / ".hf" / "hub", ".hf/hub")
        for folder in (".hf", "build", "adapters/org"):
            shutil.rmtree(project.folder / folder, ignore_errors=True)
        with tarfile.open(project.folder / "cache.tar") as tar:
            tar.extractall(project.folder, filter="fully_trusted")

    @pytest.mark.slow
    def test_with_the_cache_it_needs_no_network(self, project: Project) -> None:
        assert project.run("lorazip fetch @adapters.txt -o adapters").returncode == 0
        self.clone(project)
        lock = project.lock.read_bytes()
        project.hub.log.clear()
        summary = project.folder / "summary"
        summary.touch()
        environment = {"MAX_ERROR": self.STEPS["env"]["MAX_ERROR"], "GITHUB_STEP_SUMMARY": str(summary), "HF_TOKEN": ""}
        for line in self.lines():
            offline = {"HF_HUB_OFFLINE": "1"} if line.startswith("lorazip fetch") else {}
            done = project.run(line, **environment, **offline)
            assert done.returncode == 0, done.stderr
        assert not project.hub.log.requests
        assert project.lock.read_bytes() == lock
        assert summary.read_text().startswith("### ✅")
        assert len(list(project.folder.glob(self.STEPS["steps"][-1]["with"]["path"]))) == 3

    @pytest.mark.slow
    def test_a_line_without_its_lock_fails(self, project: Project) -> None:
        assert project.run("lorazip fetch @adapters.txt -o adapters").returncode == 0
        with (project.folder / "adapters.txt").open("a") as file:
            file.write(f"org/{SAMPLES[3].name}\n")
        done = project.run(self.lines()[0], HF_TOKEN="")
        assert done.returncode == 1
        assert "was made without" in done.stderr

    def test_the_lock_is_what_version_control_keeps(self, project: Project) -> None:
        assert project.run("lorazip fetch @adapters.txt -o adapters").returncode == 0
        (project.folder / ".gitignore").write_text(block("gitignore"))
        seen = project.run("git init -q . && git ls-files --others --exclude-standard adapters build")
        assert seen.stdout.split() == ["adapters/lorazip.lock"]
