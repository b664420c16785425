"""The files of `verify`: where they may go, that they are whole, and that they are there when a check fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from threading import Thread

import pytest
from testing.random_bundle import make_bundle

import lorazip_core.verify.run
from lorazip_cli import report_file
from lorazip_cli.main import main
from lorazip_core.base import atomic

OPTIONS = ("-o", "--report", "--junit", "--summary")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def bundle(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(sound.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("bundle")


def verify(bundle: Path, *argv: str) -> int:
    return main(["verify", str(bundle), "-q", *argv])


def all_four() -> list[str]:
    return ["-o", "r.json", "--report", "r.html", "--junit", "r.xml", "--summary", "r.md"]


def check_all_four(ok: bool) -> None:
    assert json.loads(Path("r.json").read_bytes())["ok"] is ok
    page = Path("r.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert page.endswith("</html>")
    assert (ElementTree.parse("r.xml").getroot().get("failures") == "0") is ok
    assert Path("r.md").read_text().startswith("### ✅" if ok else "### ❌")
    assert all(not path.name.endswith(".partial") for path in Path().iterdir())


class TestWritten:
    def test_all_of_a_sound_bundle(self, bundle: Path) -> None:
        assert verify(bundle, "--against", "originals", *all_four()) == 0
        check_all_four(ok=True)
        assert "Error of each module" in Path("r.html").read_text()

    def test_also_when_a_limit_does_not_hold(self, bundle: Path) -> None:
        assert verify(bundle, "--max-error", "0.7", *all_four()) == 1
        check_all_four(ok=False)

    @pytest.mark.parametrize("damaged", ["manifest.json", "cores/000-001.safetensors"])
    def test_also_when_the_bundle_is_damaged(self, bundle: Path, damaged: str) -> None:
        os.truncate(bundle / damaged, 20)
        assert verify(bundle, "--against", "originals", *all_four()) == 4
        check_all_four(ok=False)

    def test_json_stays_the_one_object_on_stdout(
        self, bundle: Path, capsysbinary: pytest.CaptureFixture[bytes]
    ) -> None:
        assert verify(bundle, "--json", *all_four()) == 0
        assert capsysbinary.readouterr().out == Path("r.json").read_bytes()

    def test_the_same_bundle_gives_the_same_bytes(self, bundle: Path) -> None:
        assert verify(bundle, "--against", "originals", *all_four()) == 0
        before = [Path(name).read_bytes() for name in all_four()[1::2]]
        assert verify(bundle, "--against", "originals", *all_four(), "--force") == 0
        assert before == [Path(name).read_bytes() for name in all_four()[1::2]]

    def test_a_new_folder_is_made(self, bundle: Path) -> None:
        assert verify(bundle, "--junit", "new/folder/r.xml") == 0
        assert ElementTree.parse("new/folder/r.xml").getroot().get("tests") == "11"


class TestRefused:
    """Before the work: `verify_by_module` would fail the test."""

    @pytest.fixture(autouse=True)
    def no_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def work(*_: object, **__: object) -> None:
            raise AssertionError("the work began")

        monkeypatch.setattr(lorazip_core.verify.run, "verify_by_module", work)

    def refused(self, code: int, line: str, capsys: pytest.CaptureFixture[str], bundle: Path, *argv: str) -> None:
        before = sorted(Path().rglob("*"))
        assert verify(bundle, *argv) == code
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith(f"lorazip: error: {line}")
        assert output.err.count("\n") == 1
        assert sorted(Path().rglob("*")) == before

    @pytest.mark.parametrize("option", OPTIONS)
    def test_an_output_that_exists(self, option: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Path("mine").write_text("mine")
        self.refused(6, f"mine exists (choose another {option}, or --force", capsys, bundle, option, "mine")
        assert Path("mine").read_text() == "mine"

    @pytest.mark.parametrize("option", OPTIONS)
    def test_places_where_it_may_not_go(self, option: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Path("link").symlink_to(bundle)
        Path("empty").touch()
        for path in ("bundle/new", "link/new", "bundle/manifest.json"):
            self.refused(2, f"{path} is inside the bundle", capsys, bundle, option, path, "--force")
        self.refused(2, "originals is a directory", capsys, bundle, option, "originals", "--force")
        self.refused(2, f"{Path.cwd() / 'empty'} is a file", capsys, bundle, option, "empty/r", "--force")

    def test_two_options_with_one_file(self, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Path("folder").symlink_to(".")
        self.refused(2, "--junit and --summary both name", capsys, bundle, "--junit", "x", "--summary", "folder/x")
        self.refused(2, "-o and --report both name", capsys, bundle, "-o", "x", "--report", "./x")
        Path("empty").touch()
        Path("hard").hardlink_to("empty")
        self.refused(2, "--report and --junit both name", capsys, bundle, "--report", "empty", "--junit", "hard")

    def test_a_folder_that_cannot_be_written(
        self, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
        self.refused(8, f"{Path.cwd()}: Permission denied", capsys, bundle, "--junit", "new/r.xml")

    @pytest.mark.parametrize("missing", ["plotly", "jinja2"])
    def test_a_page_without_its_library(
        self, missing: str, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, missing, None)
        line = f"an HTML report needs {missing} (pip install {missing})"
        self.refused(8, line, capsys, bundle, "--report", "r.html")


class TestInPlace:
    def test_an_empty_file_is_filled_and_stays_the_same_file(self, bundle: Path) -> None:
        Path("summary").touch()
        Path("link").symlink_to("summary")
        before = Path("summary").stat()
        assert verify(bundle, "--summary", "link") == 0
        after = Path("summary").stat()
        assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
        assert Path("summary").read_text().startswith("### ✅")
        assert Path("link").is_symlink()
        assert verify(bundle, "--summary", "link") == 6
        assert verify(bundle, "--summary", "link", "--force", "--max-error", "0") == 1
        assert Path("link").is_symlink()
        assert Path("summary").read_text().startswith("### ❌")

    def test_is_empty_again_when_it_could_not_be_filled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place = tmp_path / "summary"
        place.touch()

        class Full:
            def __enter__(self) -> Full:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def write(self, data: bytes) -> None:
                place.write_bytes(data[:3])
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(report_file, "open", lambda *_: Full(), raising=False)
        with pytest.raises(OSError, match="No space"):
            report_file.write_data(place, b"### all of it")
        assert place.read_bytes() == b""

    def test_a_full_disk_leaves_what_was_there(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("old").write_text("old")

        def full(path: Path, data: bytes) -> None:
            path.write_bytes(data[:3])
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(atomic, "write_file", full)
        assert verify(bundle, "--summary", "old", "--force") == 8
        assert Path("old").read_text() == "old"
        assert {path.name for path in Path().iterdir()} == {"bundle", "originals", "old"}

    def test_a_device_is_never_replaced(self, bundle: Path) -> None:
        assert verify(bundle, "--summary", "/dev/null", "--force") == 0
        assert Path("/dev/null").is_char_device()

    def run(self, bundle: Path, command: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PY": sys.executable, "B": str(bundle)}
        return subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=600)

    @pytest.mark.slow
    def test_stdout_gets_the_report(self, bundle: Path) -> None:
        done = self.run(bundle, '"$PY" -m lorazip_cli verify "$B" -q --summary /dev/stdout')
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("### ✅")

    def test_a_log_that_it_is_appended_to_stays(self, bundle: Path) -> None:
        script = 'echo first > log; "$PY" -m lorazip_cli verify "$B" -q --junit /dev/stdout >> log; echo last >> log'
        assert self.run(bundle, script).returncode == 0
        lines = Path("log").read_text().splitlines()
        assert (lines[0], lines[1][:5], lines[-1]) == ("first", "<?xml", "last")

    @pytest.mark.parametrize("option", OPTIONS)
    def test_json_has_stdout_for_itself(self, option: str, bundle: Path) -> None:
        done = self.run(bundle, f'"$PY" -m lorazip_cli verify "$B" --json {option} /dev/stdout')
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"lorazip: error: {option} /dev/stdout is where --json prints")

    def test_a_pipe_whose_reader_leaves_is_no_failure(self, bundle: Path) -> None:
        os.mkfifo("pipe")
        reader = Thread(target=lambda: open("pipe", "rb").close())
        reader.start()
        assert verify(bundle, "--report", "pipe") == 0  # a page is far larger than what a pipe holds
        reader.join()
